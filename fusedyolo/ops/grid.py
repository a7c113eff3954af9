"""Anchor-grid losses: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..heads import OFFSET_KINDS, GridHead, head_from_key
from ..kernels import grid
from ..kernels.launch import grid_config
from ..kernels.terms import box, decode, label, offset
from ..reference import grid_view
from .launch import Launch, accumulator, done_counter, refuse_double_backward


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
        done = done_counter(rows.device)
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
    outputs, state = grid_outputs(preds, head, with_state)
    stored = state if with_state else None
    grid_launch(preds, None, stored, rows, offsets, class_weights, head, outputs, None).run()
    return *outputs, state


def grid_outputs(preds: list[Tensor], head: GridHead, with_state: bool) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Memory for the total, the parts and the counts of a loss launch, and for the state."""
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
    outputs, state = grid_outputs(preds, head_from_key(key), with_state)
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
grid_loss_grad.register_autograd(refuse_double_backward(grid_loss_grad._qualname))
