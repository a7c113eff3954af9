"""Losses of cells that hold one object each: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..heads import cell_head_from_key
from ..kernels import cells
from ..kernels.launch import cell_config
from ..reference import cell_views
from ..tuned import wishes
from .launch import Launch, Layout, accumulator, done_counter, layout, planned, refuse_double_backward, run_all
from .operator import differentiable, fake, operator


@lru_cache(maxsize=256)
def _family(key: str) -> str:
    """The terms of a row: losses of the same ones share what tuning found."""
    head = cell_head_from_key(key)
    return f"{head.num_boxes} boxes" + " root" * head.root + " nearest" * head.nearest + " rescore" * head.rescore


def _view_strides(key: str, at: Layout) -> tuple[Any, ...]:
    """The stride from image to image; of boxes, confidences and class scores the place of the first and the others."""
    views = cell_views(at.meta(), cell_head_from_key(key))
    return (views[0].stride(0), *((view.storage_offset(), *view.stride()[1:]) for view in views))


@planned
def _plan(key: str, pred: Layout, grad: Layout | None, with_loss: bool, skip_one: bool) -> Launch:
    """A launch but for its tensors."""
    head = cell_head_from_key(key)
    triton_acc, acc = accumulator(pred.dtype)
    batch, cells_an_image = pred.shape[0], head.grid_size**2
    planes = len(pred.shape) == 2
    tuned = wishes("cell", _family(key), pred, planes, batch, cells_an_image, head.num_classes)
    config = cell_config(batch * cells_an_image, head.channels, 5 * head.num_boxes, acc.itemsize, tuned)
    arguments = {
        "views": _view_strides(key, pred),
        "d_views": None if grad is None else _view_strides(key, grad),
        "numbers": (head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain),
        "B": batch,
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
        "WITH_LOSS": with_loss,
        "WITH_GRAD": grad is not None,
        "SKIP_ONE": skip_one,
    }
    programs = -(-batch * cells_an_image // config.cells)
    # the box that answers for a cell is found again for the gradient, and of equal boxes it must be the same
    settings = config.threads, config.max_registers
    return Launch(cells.cell_kernel, (programs,), arguments, *settings, exact=True, stages=config.stages)


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
    plan = _plan(key, layout(pred), None if grad is None else layout(grad), outputs is not None, skip_one)
    total, parts, counts = outputs or (None, None, None)
    sums = done = None
    if total is not None:
        sums = total.new_empty(plan.grid[0] * cells.N_PARTS.value)
        done = done_counter(pred.device, workspace)
    return plan.filled(
        {
            "pred_ptr": pred,
            "d_ptr": grad,
            "rows_ptr": rows,
            "offsets_ptr": offsets,
            "M": rows.shape[0],
            "grad_out_ptr": grad_total,
            "total_ptr": total,
            "parts_ptr": parts,
            "counts_ptr": counts,
            "partial_ptr": sums,
            "done_ptr": done,
        }
    )


def cell_outputs(pred: Tensor, with_grad: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Memory for the total, the parts and the counts of a loss launch, and for a gradient, empty unless asked for."""
    acc = accumulator(pred.dtype)[1]
    outputs = pred.new_empty((), dtype=acc), pred.new_empty(3, dtype=acc), pred.new_empty(2, dtype=torch.int32)
    return outputs, torch.empty_like(pred) if with_grad else pred.new_empty(0)


@operator
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


@fake(cell_loss)
def _(pred, rows, offsets, key, with_grad, workspace=None):
    outputs, grad = cell_outputs(pred, with_grad)
    return *outputs, grad


@operator
def cell_loss_grad(grad_total: Tensor, pred: Tensor, rows: Tensor, offsets: Tensor | None, key: str) -> Tensor:
    """Gradient of :func:`cell_loss`'s total by ``pred``, times ``grad_total`` (0-dim), in one launch."""
    grad = torch.empty_like(pred)
    run_all([cell_launch(pred, grad, rows, offsets, key, None, grad_total)], pred.device)
    return grad


@fake(cell_loss_grad)
def _(grad_total, pred, rows, offsets, key):
    return torch.empty_like(pred)


@partial(operator, mutates=("grad",))
def cell_loss_rescale(
    grad: Tensor, grad_total: Tensor, pred: Tensor, rows: Tensor, offsets: Tensor | None, key: str
) -> None:
    """Turns ``grad``, the gradient for a ``grad_total`` of 1, into that for this one: a launch that is over at once if
    it is 1, which only the device knows.
    """
    run_all([cell_launch(pred, grad, rows, offsets, key, None, grad_total, skip_one=True)], pred.device)


@fake(cell_loss_rescale)
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
        return None
    grad, ctx.stored = ctx.stored, None
    if grad is None or torch.is_grad_enabled():  # with create_graph, the gradient is to know that it has none itself
        grad = cell_loss_grad(grad_total, pred, rows, offsets, ctx.key)
    else:
        cell_loss_rescale(grad, grad_total, pred, rows, offsets, ctx.key)
    return grad


differentiable(cell_loss, _backward, _save)
differentiable(cell_loss_grad, refuse_double_backward(cell_loss_grad))
