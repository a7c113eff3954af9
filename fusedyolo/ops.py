"""Custom operators: what the dispatcher, autograd and torch.compile see, and the launches behind them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .heads import OFFSET_KINDS, GridHead, head_from_key
from .kernels import grid, pointwise
from .kernels.launch import POINTWISE_BLOCK, POINTWISE_THREADS, grid_config
from .kernels.terms import box, decode, label, offset
from .reference import grid_view

import triton.language as tl  # isort: skip

_ACC = {torch.float64: (tl.float64, torch.float64)}


def accumulator(dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """The compute type of predictions of this dtype, for Triton and for PyTorch: float64 for float64, else float32."""
    return _ACC.get(dtype, (tl.float32, torch.float32))


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run, compile or count. ``max_registers``, a thread's, is of NVIDIA only."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int
    max_registers: int | None = None

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options(torch.version.hip is None))

    def options(self, nvidia: bool) -> dict[str, int]:
        """Compiler options: a warp is 32 threads on NVIDIA's GPUs, 64 on AMD's data-centre GPUs."""
        if not nvidia:
            return {"num_warps": max(1, self.threads // 64)}
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.threads // 32, **limit}


@lru_cache(maxsize=256)
def _grid_constants(key: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a grid launch takes from the row alone."""
    head = head_from_key(key)
    is_offset = head.box in OFFSET_KINDS
    gate = head.class_gate
    return {
        "strides": head.strides,
        "scales": head.scale_x_y,
        "anchors": tuple(side for anchor in head.anchors for side in anchor),
        "numbers": (
            head.box_gain,
            head.obj_gain,
            head.noobj_gain,
            head.cls_gain,
            head.ignore_thresh,
            head.iou_thresh,
            0.0 if gate is None else gate,
            head.area_weight,
            *head.class_targets,
            head.first_weight,
        ),
        "box_args": head.box_args,
        "label_args": head.label_args,
        "C": head.num_classes,
        "AXIS": getattr(decode, head.decode),
        "BOX": None if is_offset else getattr(box, head.box),
        "OFFSET": getattr(offset, head.box) if is_offset else None,
        "LABEL": getattr(label, head.label),
        "RELATIVE": head.relative,
        "GATED": gate is not None,
        "AVERAGE": head.average_box,
        "ACC": accumulator(dtype)[0],
        "C_PAD": 1 << (head.num_classes - 1).bit_length(),
        "LEVELS": head.levels,
    }


def grid_launch(
    preds: list[Tensor],
    grads: list[Tensor] | None,
    state: Tensor | None,
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    head: GridHead,
    outputs: tuple[Tensor, Tensor, Tensor] | None,
    grad_total: Tensor | None,
) -> Launch:
    """A launch of the grid driver: the loss with ``outputs`` (total, parts, counts), the gradient with ``grads``."""
    views = [grid_view(pred, len(level)) for pred, level in zip(preds, head.levels, strict=True)]
    strides = [_cell_strides(view) for view in views]
    grad_strides: list[tuple[int, ...]] | None = None
    if grads is not None:
        grad_views = [grid_view(grad, len(level)) for grad, level in zip(grads, head.levels, strict=True)]
        grad_strides = [_cell_strides(view) for view in grad_views]
    batch = views[0].shape[0]
    cells = [view.shape[2] * view.shape[3] for view in views]
    config = grid_config(max(cells), all(s[3] == 1 for s in grad_strides or strides), grads is not None)
    programs = sum(
        batch * len(level) * -(-count // config.cells) for level, count in zip(head.levels, cells, strict=True)
    )
    widths = [view.shape[3] for view in views]
    flat = all(s[2] == s[3] * width for s, width in zip(strides + (grad_strides or []), widths * 2, strict=False))
    dtype = views[0].dtype
    ranges = None if state is None else state[_ranges_start(preds, head) :].view(torch.int32)
    total, parts, counts = outputs or (None, None, None)
    partial = done = None
    if outputs is not None:
        partial = rows.new_empty(programs * 4, dtype=accumulator(dtype)[1])
        done = _done_counter(rows.device)
    arguments = {
        "raw_ptrs": tuple(preds),
        "d_ptrs": None if grads is None else tuple(grads),
        "s_raws": tuple(strides),
        "s_ds": None if grad_strides is None else tuple(grad_strides),
        "Ws": tuple(widths),
        "Hs": tuple(view.shape[2] for view in views),
        "HWs": tuple(cells),
        "state_ptr": state,
        "ranges_ptr": ranges,
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "M": rows.shape[0],
        "weights_ptr": class_weights,
        "grad_out_ptr": grad_total,
        "B": batch,
        "total_ptr": total,
        "parts_ptr": parts,
        "counts_ptr": counts,
        "partial_ptr": partial,
        "done_ptr": done,
        "WITH_LOSS": outputs is not None,
        "WITH_GRAD": grads is not None,
        "FLAT": flat,
        "CELLS": config.cells,
        "CHANNELS": config.channels,
        "BLOCK_G": config.rows,
        **_grid_constants(head.key, dtype),
    }
    return Launch(grid.grid_kernel, (programs,), arguments, config.threads, config.max_registers)


def _cell_strides(view: Tensor) -> tuple[int, ...]:
    """Strides by image, anchor, row, column, channel; those of axes of length 1 are made to follow their neighbours."""
    b, a, y, x, k = view.stride()
    if view.shape[3] == 1:
        x = y if view.shape[2] > 1 else 1
    if view.shape[2] == 1:
        y = x * view.shape[3]
    return b, a, y, x, k


_DONE: dict[tuple[torch.device, int], Tensor] = {}


def _done_counter(device: torch.device) -> Tensor:
    """The counter of finished programs, one a stream because launches on two streams overlap.

    The kernel leaves it at 0, so it is filled once, not once a call. A captured graph gets one of its own: memory that
    a capture allocates belongs to the graph.
    """
    if device.type == "cpu":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    counter = _DONE.get((device, stream))
    if counter is None:
        counter = _DONE[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return counter


@torch.library.custom_op("fusedyolo::grid_loss", mutates_args=())
def grid_loss(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    key: str,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of an anchor-grid head in one launch.

    Returns the total (0-dim), its parts box, objectness and class ``[3]``, the counts of assigned predictions and
    invalid rows (int32 ``[2]``), and what :func:`grid_loss_grad` needs to know (uint8, empty without ``with_state``).
    """
    head = head_from_key(key)
    outputs, state = _grid_outputs(preds, head, with_state)
    stored = state if with_state else None
    grid_launch(preds, None, stored, rows, offsets, class_weights, head, outputs, None).run()
    return *outputs, state


def _grid_outputs(
    preds: list[Tensor], head: GridHead, with_state: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    pred = preds[0]
    acc = accumulator(pred.dtype)[1]
    total = pred.new_empty((), dtype=acc)
    parts = pred.new_empty(3, dtype=acc)
    counts = pred.new_empty(2, dtype=torch.int32)
    size = _ranges_start(preds, head) + 8 * pred.shape[0] if with_state else 0
    return (total, parts, counts), pred.new_empty(size, dtype=torch.uint8)


def _ranges_start(preds: list[Tensor], head: GridHead) -> int:
    """Where in the state, behind a byte a prediction, each image's range of rows begins: two int32 an image."""
    predictions = sum(pred.numel() // (5 + head.num_classes) for pred in preds)
    return -(-predictions // 4) * 4


@grid_loss.register_fake
def _(preds, rows, offsets, class_weights, key, with_state):
    outputs, state = _grid_outputs(preds, head_from_key(key), with_state)
    return *outputs, state


@torch.library.custom_op("fusedyolo::grid_loss_grad", mutates_args=())
def grid_loss_grad(
    grad_total: Tensor,
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    state: Tensor,
    key: str,
) -> list[Tensor]:
    """Gradient of :func:`grid_loss`'s total by every map, times ``grad_total`` (0-dim), in one launch."""
    grads = [torch.empty_like(pred) for pred in preds]
    head = head_from_key(key)
    grid_launch(preds, grads, state, rows, offsets, class_weights, head, None, grad_total).run()
    return grads


@grid_loss_grad.register_fake
def _(grad_total, preds, rows, offsets, class_weights, state, key):
    return [torch.empty_like(pred) for pred in preds]


def _save_grid(ctx, inputs, output):
    preds, rows, offsets, class_weights, ctx.key, _with_state = inputs
    _total, parts, counts, state = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(parts, counts, state)
    ctx.save_for_backward(rows, offsets, class_weights, state, *preds)


def _grid_backward(ctx, grad_total, _grad_parts, _grad_counts, _grad_state):
    rows, offsets, class_weights, state, *preds = ctx.saved_tensors
    if grad_total is None:
        return [None] * len(preds), None, None, None, None, None
    grads = grid_loss_grad(grad_total, preds, rows, offsets, class_weights, state, ctx.key)
    return grads, None, None, None, None, None


grid_loss.register_autograd(_grid_backward, setup_context=_save_grid)


def _pointwise(
    kernel: Any,
    inputs: tuple[Tensor, Tensor],
    n: int,
    term: dict[str, Any],
    args: list[float],
    reduction: str,
    loss: Tensor | None,
    grad_out: Tensor | None,
    grads: tuple[Tensor, ...],
) -> Launch:
    """A launch of a pointwise driver over ``n`` items: the loss with ``loss``, the gradient with ``grads``."""
    programs = -(-n // POINTWISE_BLOCK)
    tl_acc, acc = accumulator(inputs[0].dtype)
    reduce = reduction != "none"
    reduce_forward = reduce and loss is not None
    arguments = {
        **dict(zip(_POINTWISE_NAMES[kernel], (*inputs, *(grads or (None, None))), strict=False)),
        "n": n,
        "args": tuple(args),
        "scale": 1.0 / n if reduction == "mean" else 1.0,
        "loss_ptr": loss,
        "partial_ptr": inputs[0].new_empty(programs, dtype=acc) if reduce_forward else None,
        "done_ptr": _done_counter(inputs[0].device) if reduce_forward else None,
        "grad_out_ptr": grad_out,
        "REDUCE": reduce,
        "WITH_GRAD": loss is None,
        "ACC": tl_acc,
        "BLOCK": POINTWISE_BLOCK,
        **term,
    }
    return Launch(kernel, (programs,), arguments, POINTWISE_THREADS)


_POINTWISE_NAMES = {
    pointwise.label_kernel: ("x_ptr", "t_ptr", "dx_ptr"),
    pointwise.box_kernel: ("p_ptr", "g_ptr", "dp_ptr", "dg_ptr"),
}


def _pointwise_loss(kernel: Any, a: Tensor, b: Tensor, shape, term: dict[str, Any], args, reduction: str) -> Tensor:
    loss = a.new_empty(shape if reduction == "none" else (), dtype=accumulator(a.dtype)[1])
    n = math.prod(shape)
    if n == 0:
        return loss.zero_()
    _pointwise(kernel, (a.contiguous(), b.contiguous()), n, term, args, reduction, loss, None, ()).run()
    return loss


def _pointwise_grad(kernel: Any, grad_out: Tensor, a: Tensor, b: Tensor, n: int, term, args, reduction, grads) -> None:
    if n > 0:
        inputs = (a.contiguous(), b.contiguous())
        _pointwise(kernel, inputs, n, term, args, reduction, None, grad_out.contiguous(), grads).run()


@torch.library.custom_op("fusedyolo::label_loss", mutates_args=())
def label_loss(inputs: Tensor, targets: Tensor, kind: str, args: list[float], reduction: str) -> Tensor:
    """A label term of ``inputs`` (logits) against ``targets`` of the same shape; float64 for float64, else float32."""
    term = {"LABEL": getattr(label, kind)}
    return _pointwise_loss(pointwise.label_kernel, inputs, targets, inputs.shape, term, args, reduction)


@label_loss.register_fake
def _(inputs, targets, kind, args, reduction):
    return inputs.new_empty(inputs.shape if reduction == "none" else (), dtype=accumulator(inputs.dtype)[1])


@torch.library.custom_op("fusedyolo::label_loss_grad", mutates_args=())
def label_loss_grad(
    grad_out: Tensor, inputs: Tensor, targets: Tensor, kind: str, args: list[float], reduction: str
) -> Tensor:
    """Gradient of :func:`label_loss` by ``inputs``."""
    grad = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    term = {"LABEL": getattr(label, kind)}
    _pointwise_grad(pointwise.label_kernel, grad_out, inputs, targets, inputs.numel(), term, args, reduction, (grad,))
    return grad


@label_loss_grad.register_fake
def _(grad_out, inputs, targets, kind, args, reduction):
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


@torch.library.custom_op("fusedyolo::box_loss", mutates_args=())
def box_loss(boxes1: Tensor, boxes2: Tensor, kind: str, args: list[float], reduction: str) -> Tensor:
    """A box term of pairs of boxes ``[..., 4]`` (xyxy); float64 for float64, else float32."""
    term = {"BOX": getattr(box, kind)}
    return _pointwise_loss(pointwise.box_kernel, boxes1, boxes2, boxes1.shape[:-1], term, args, reduction)


@box_loss.register_fake
def _(boxes1, boxes2, kind, args, reduction):
    return boxes1.new_empty(boxes1.shape[:-1] if reduction == "none" else (), dtype=accumulator(boxes1.dtype)[1])


@torch.library.custom_op("fusedyolo::box_loss_grad", mutates_args=())
def box_loss_grad(
    grad_out: Tensor, boxes1: Tensor, boxes2: Tensor, kind: str, args: list[float], reduction: str
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`box_loss` by both sets of boxes."""
    grads = (
        torch.empty_like(boxes1, memory_format=torch.contiguous_format),
        torch.empty_like(boxes2, memory_format=torch.contiguous_format),
    )
    term = {"BOX": getattr(box, kind)}
    n = boxes1.numel() // 4
    _pointwise_grad(pointwise.box_kernel, grad_out, boxes1, boxes2, n, term, args, reduction, grads)
    return grads


@box_loss_grad.register_fake
def _(grad_out, boxes1, boxes2, kind, args, reduction):
    return (
        torch.empty_like(boxes1, memory_format=torch.contiguous_format),
        torch.empty_like(boxes2, memory_format=torch.contiguous_format),
    )


def _save_pair(ctx, inputs, output):
    a, b, ctx.kind, ctx.args, ctx.reduction = inputs
    ctx.save_for_backward(a, b)


def _label_backward(ctx, grad_out):
    grad = label_loss_grad(grad_out, *ctx.saved_tensors, ctx.kind, ctx.args, ctx.reduction)
    return grad, None, None, None, None


def _box_backward(ctx, grad_out):
    grads = box_loss_grad(grad_out, *ctx.saved_tensors, ctx.kind, ctx.args, ctx.reduction)
    return *grads, None, None, None


label_loss.register_autograd(_label_backward, setup_context=_save_pair)
box_loss.register_autograd(_box_backward, setup_context=_save_pair)


def _refuse_double_backward(name: str) -> Callable[..., Any]:
    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name}: double backward is not supported; use backend='torch' for it")

    return refuse


for _op in (grid_loss_grad, label_loss_grad, box_loss_grad):
    _op.register_autograd(_refuse_double_backward(_op._qualname))
