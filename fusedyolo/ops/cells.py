"""Losses of cells that hold one object each: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..heads import cell_head_from_key
from ..kernels import cells
from ..kernels.launch import Wishes, cell_config
from ..reference import cell_views
from ..tuned import wishes
from .launch import Launch, accumulator, done_counter, refuse_double_backward, run_all


@lru_cache(maxsize=256)
def _constants(
    key: str, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], tuned: Wishes
) -> dict[str, Any]:
    """What a launch takes from the row and the layout of the predictions alone."""
    head = cell_head_from_key(key)
    triton_acc, acc = accumulator(dtype)
    total = shape[0] * head.grid_size**2
    config = cell_config(total, head.channels, 5 * head.num_boxes, acc.itemsize, tuned)
    return {
        "programs": -(-total // config.cells),
        "views": _view_strides(key, shape, stride),
        "numbers": (head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain),
        "B": shape[0],
        "S": head.grid_size,
        "C": head.num_classes,
        "N": head.num_boxes,
        "ROOT": head.root,
        "NEAREST": head.nearest,
        "RESCORE": head.rescore,
        "ACC": triton_acc,
        "CELLS": config.cells,
        "CHANNELS": config.channels,
        "BLOCK_G": config.rows,
        "threads": config.threads,
        "max_registers": config.max_registers,
        "stages": config.stages,
    }


@lru_cache(maxsize=256)
def _family(key: str) -> str:
    """The terms of a row: losses of the same ones share what tuning found."""
    head = cell_head_from_key(key)
    return f"{head.num_boxes} boxes" + " root" * head.root + " nearest" * head.nearest + " rescore" * head.rescore


@lru_cache(maxsize=256)
def _view_strides(key: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[Any, ...]:
    """The stride from image to image; of boxes, confidences and class scores the place of the first and the others."""
    views = cell_views(torch.empty_strided(shape, stride, device="meta"), cell_head_from_key(key))
    return (views[0].stride(0), *((view.storage_offset(), *view.stride()[1:]) for view in views))


def cell_launch(
    pred: Tensor,
    grad: Tensor | None,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    outputs: tuple[Tensor, Tensor, Tensor] | None,
    grad_total: Tensor | None = None,
    skip_one: bool = False,
    workspace: Tensor | None = None,
) -> Launch:
    """A launch of the driver of cells: the loss with ``outputs`` (total, parts, counts), the gradient with ``grad``.

    The gradient is multiplied by ``grad_total``; if ``skip_one`` it is left as it is where that is 1.
    """
    head = cell_head_from_key(key)
    tuned = wishes("cell", _family(key), pred, pred.dim() == 2, pred.shape[0], head.grid_size**2, head.num_classes)
    constants = dict(_constants(key, pred.dtype, tuple(pred.shape), pred.stride(), tuned))
    settings = ("programs", "threads", "max_registers", "stages")
    programs, threads, limit, stages = (constants.pop(name) for name in settings)
    total, parts, counts = outputs or (None, None, None)
    partial = done = None
    if outputs is not None:
        partial = pred.new_empty(programs * cells.N_PARTS.value, dtype=accumulator(pred.dtype)[1])
        done = done_counter(pred.device, workspace)
    arguments = {
        "pred_ptr": pred,
        "d_ptr": grad,
        "d_views": None if grad is None else _view_strides(key, tuple(grad.shape), grad.stride()),
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "M": rows.shape[0],
        "grad_out_ptr": grad_total,
        "total_ptr": total,
        "parts_ptr": parts,
        "counts_ptr": counts,
        "partial_ptr": partial,
        "done_ptr": done,
        "WITH_LOSS": outputs is not None,
        "WITH_GRAD": grad is not None,
        "SKIP_ONE": skip_one,
        **constants,
    }
    # the box that answers for a cell is found again for the gradient, and of equal boxes it must be the same
    return Launch(cells.cell_kernel, (programs,), arguments, threads, limit, exact=True, stages=stages)


def cell_outputs(pred: Tensor, with_grad: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Memory for the total, the parts and the counts of a loss launch, and for a gradient, empty unless asked for."""
    acc = accumulator(pred.dtype)[1]
    outputs = pred.new_empty((), dtype=acc), pred.new_empty(3, dtype=acc), pred.new_empty(2, dtype=torch.int32)
    return outputs, torch.empty_like(pred) if with_grad else pred.new_empty(0)


@torch.library.custom_op("fusedyolo::cell_loss", mutates_args=())
def cell_loss(
    pred: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    with_grad: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of a head of cells in one launch.

    Returns the total (0-dim), its parts box, confidence and class ``[3]``, the counts of cells with an object and of
    invalid rows (int32 ``[2]``), and the gradient of the total by ``pred`` (empty without ``with_grad``), which the
    first backward takes. A compiled graph brings its ``workspace``.
    """
    outputs, grad = cell_outputs(pred, with_grad)
    launch = cell_launch(pred, grad if with_grad else None, rows, offsets, key, outputs, workspace=workspace)
    run_all([launch], pred.device)
    return *outputs, grad


@cell_loss.register_fake
def _(pred, rows, offsets, key, with_grad, workspace=None):
    outputs, grad = cell_outputs(pred, with_grad)
    return *outputs, grad


@torch.library.custom_op("fusedyolo::cell_loss_grad", mutates_args=())
def cell_loss_grad(grad_total: Tensor, pred: Tensor, rows: Tensor, offsets: Tensor | None, key: str) -> Tensor:
    """Gradient of :func:`cell_loss`'s total by ``pred``, times ``grad_total`` (0-dim), in one launch."""
    grad = torch.empty_like(pred)
    run_all([cell_launch(pred, grad, rows, offsets, key, None, grad_total)], pred.device)
    return grad


@cell_loss_grad.register_fake
def _(grad_total, pred, rows, offsets, key):
    return torch.empty_like(pred)


@torch.library.custom_op("fusedyolo::cell_loss_rescale", mutates_args=("grad",))
def cell_loss_rescale(
    grad: Tensor, grad_total: Tensor, pred: Tensor, rows: Tensor, offsets: Tensor | None, key: str
) -> None:
    """Turns ``grad``, the gradient for a ``grad_total`` of 1, into that for this one: a launch that is over at once if
    it is 1, which only the device knows.
    """
    run_all([cell_launch(pred, grad, rows, offsets, key, None, grad_total, skip_one=True)], pred.device)


@cell_loss_rescale.register_fake
def _(grad, grad_total, pred, rows, offsets, key):
    return None


def _save(ctx, inputs, output):
    pred, rows, offsets, ctx.key, with_grad, _workspace = inputs
    _total, parts, counts, grad = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(parts, counts, grad)
    ctx.save_for_backward(pred, rows, offsets)
    # Not among the saved tensors, which must not change: the first backward changes it and gives it away. A tensor of
    # another type belongs to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = grad if with_grad and type(grad) is Tensor else None


def _backward(ctx, grad_total, _grad_parts, _grad_counts, _grad_grad):
    pred, rows, offsets = ctx.saved_tensors
    if grad_total is None:
        return None, None, None, None, None, None
    grad, ctx.stored = ctx.stored, None
    if grad is None or torch.is_grad_enabled():  # with create_graph, the gradient is to know that it has none itself
        grad = cell_loss_grad(grad_total, pred, rows, offsets, ctx.key)
    else:
        cell_loss_rescale(grad, grad_total, pred, rows, offsets, ctx.key)
    return grad, None, None, None, None, None


cell_loss.register_autograd(_backward, setup_context=_save)
cell_loss_grad.register_autograd(refuse_double_backward(cell_loss_grad._qualname))
