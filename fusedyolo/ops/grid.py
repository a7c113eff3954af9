"""Anchor-grid losses: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads import GridHead, head_from_key, obj_scales
from ..kernels import assign, grid
from ..kernels.launch import SMALLEST_TILE, grid_config
from ..reference.grid import NEIGHBOURS, grid_view
from ..terms import TERMS
from ..tuned import wishes
from .launch import Launch, accumulator, done_counter, refuse_double_backward, run_all

_MATCH = {"best_anchor": assign.best_anchor, "ratio": assign.ratio, "iou_band": None}


@lru_cache(maxsize=256)
def _grid_constants(key: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a grid launch takes from the row alone."""
    head = head_from_key(key)
    box = TERMS[head.box]
    ignore, gate = head.ignore_thresh, head.class_gate
    pools = [own if head.per_level else range(len(head.anchors)) for own in head.levels]
    quality: Any = None if head.quality is None else TERMS[head.quality].kernel
    if (head.quality, head.quality_args) == (head.box, head.box_args):
        quality = "box"
    is_band = head.assigner == "iou_band"
    return {
        "strides": head.strides,
        "scales": head.scale_x_y,
        "anchors": tuple(tuple(side for t in pool for side in head.anchors[t]) for pool in pools),
        "thresh": head.anchor_t if head.assigner == "ratio" else head.iou_thresh,
        "limit": head.centre_limit,
        "gains": (head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain),
        "prior_gain": head.prior_gain,
        "band": head.band,
        "ignore_thresh": 1.0 if ignore is None else ignore,
        "gate": 0.0 if gate is None else gate,
        "labels": (*head.class_targets, head.first_weight, head.quality_ratio),
        "shape": (head.area_weight, head.area_cap),
        "box_args": head.box_args,
        "label_args": head.label_args,
        "obj_args": head.obj_args,
        "quality_args": head.quality_args,
        "C": head.num_classes,
        "AXIS": TERMS[head.decode].kernel,
        "BOX": None if box.is_offset else box.kernel,
        "OFFSET": box.kernel if box.is_offset else None,
        "LABEL": TERMS[head.label].kernel,
        "OBJ": TERMS[head.objectness].kernel,
        "QUALITY": quality,
        "MATCH": _MATCH[head.assigner],
        "KINDS": len(NEIGHBOURS) if head.assigner == "ratio" else 1,
        "SHARING": "one" if is_band else head.shared,
        "UNIT": head.unit,
        "IGNORES": ignore is not None,
        "GATED": gate is not None,
        "AVERAGE": head.average_box,
        "SMOOTH": head.smooth_levels,
        "PRIOR": head.prior_gain > 0,
        "MEAN_ROWS": head.mean_rows,
        "MEAN_USED": head.obj_mean == "used",
        "ACC": accumulator(dtype)[0],
        "K_PAD": 1 << (4 + head.num_classes).bit_length(),
        "LEVELS": tuple(tuple(pool.index(t) for t in own) for own, pool in zip(head.levels, pools, strict=True)),
    }


@lru_cache(maxsize=256)
def _family(key: str) -> str:
    """The terms of a row: losses of the same ones share what tuning found."""
    head = head_from_key(key)
    return " ".join((head.decode, head.box, str(head.quality), head.label, head.objectness, head.assigner))


class GridOutputs(NamedTuple):
    """What a loss launch leaves. The last three are empty where no gradient will be asked for; only what the gradient
    launch reads of them is ever written.
    """

    total: Tensor  # 0-dim
    parts: Tensor  # [3], and where the row asks for means two numbers a level that the gradient takes
    counts: Tensor  # int32 [2]: assigned predictions, invalid rows
    state: Tensor  # uint8: a byte a prediction, then (at a multiple of 4) an int32 for each program
    kept: Tensor  # [places, 5 + C, rounded up to a multiple of 8]: gradients of assigned predictions
    true_obj: Tensor  # [N]: objectness targets, where they are more than a byte says


def grid_outputs(preds: list[Tensor], rows: Tensor, head: GridHead, with_state: bool) -> GridOutputs:
    """Memory for what a loss launch leaves."""
    pred, channels = preds[0], 5 + head.num_classes
    acc = accumulator(pred.dtype)[1]
    means = 2 * len(preds) if head.mean_rows or head.obj_mean == "used" else 0
    size = places = targets = 0
    if with_state:
        predictions = [p.numel() // channels for p in preds]
        programs = sum(-(-n // SMALLEST_TILE) for n in predictions) + pred.shape[0] * len(head.anchors)
        size = _bases_start(sum(predictions)) + 4 * programs
        # no more assignments than predictions, nor than rows can make; in a compiled graph both are symbols
        places = torch.sym_min(sum(predictions), rows.shape[0] * head.places_per_row)
        targets = sum(predictions) if any(head.smooth) else 0
    return GridOutputs(
        pred.new_empty((), dtype=acc),
        pred.new_empty(3 + means, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(size, dtype=torch.uint8),
        pred.new_empty((places, -(-channels // 8) * 8), dtype=acc),
        pred.new_empty(targets, dtype=acc),
    )


def _bases_start(predictions: int) -> int:
    return -(-predictions // 4) * 4


def _common_arguments(
    preds: list[Tensor], grads: list[Tensor] | None, head: GridHead, outputs: GridOutputs, kept: bool
):
    """What both launches take, and their tile; they must agree on it."""
    views = [grid_view(pred, len(level)) for pred, level in zip(preds, head.levels, strict=True)]
    strides = [cell_strides(view) for view in views]
    grad_strides = None
    if grads is not None:
        grad_views = [grid_view(grad, len(level)) for grad, level in zip(grads, head.levels, strict=True)]
        grad_strides = [cell_strides(view) for view in grad_views]
    batch, widths = views[0].shape[0], [view.shape[3] for view in views]
    cells = [view.shape[2] * view.shape[3] for view in views]
    planes = all(s[3] == 1 for s in strides)
    tuned = wishes("grid", _family(head.key), preds[0], planes, batch, max(cells), head.num_classes)
    config = grid_config(max(cells), planes, preds[0].element_size(), tuned)
    programs = sum(batch * len(own) * -(-count // config.cells) for own, count in zip(head.levels, cells, strict=True))
    flat = all(s[2] == s[3] * width for s, width in zip(strides + (grad_strides or []), widths * 2, strict=False))
    start = _bases_start(sum(view[..., 0].numel() for view in views))
    arguments = {
        "raw_ptrs": tuple(preds),
        "s_raws": tuple(strides),
        "Ws": tuple(widths),
        "Hs": tuple(view.shape[2] for view in views),
        "HWs": tuple(cells),
        "obj_scales": obj_scales(
            head.obj_balance, head.obj_mean, tuple(view.shape[1] * n for view, n in zip(views, cells, strict=True))
        ),
        "state_ptr": outputs.state if kept else None,
        "bases_ptr": outputs.state[start:].view(torch.int32) if kept else None,
        "kept_ptr": outputs.kept if kept else None,
        "true_obj_ptr": outputs.true_obj if kept and any(head.smooth) else None,
        "parts_ptr": outputs.parts,
        "B": batch,
        "FLAT": flat,
        "CELLS": config.cells,
    }
    return arguments, grad_strides, config, programs


def grid_launch(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    head: GridHead,
    outputs: GridOutputs,
    with_state: bool,
    workspace: Tensor | None = None,
) -> Launch:
    """The launch that leaves the loss and, ``with_state``, what :func:`grid_grad_launch` needs."""
    common, _, config, programs = _common_arguments(preds, None, head, outputs, with_state)
    arguments = {
        **common,
        **_grid_constants(head.key, preds[0].dtype),
        "rows_ptr": rows,
        "offsets_ptr": offsets,
        "M": rows.shape[0],
        "weights_ptr": class_weights,
        "total_ptr": outputs.total,
        "counts_ptr": outputs.counts,
        "partial_ptr": rows.new_empty(programs * grid.N_PARTS.value, dtype=outputs.total.dtype),
        "done_ptr": done_counter(rows.device, workspace),
        "BLOCK_G": config.rows,
    }
    settings = config.threads, config.max_registers
    # who is assigned to whom is tested more than once, and the copies must not be rounded differently
    return Launch(grid.grid_kernel, (programs,), arguments, *settings, exact=True, stages=config.stages)


_GRAD_CONSTANTS = (
    "strides", "scales", "anchors", "gains", "prior_gain", "shape", "box_args", "obj_args", "C",
    "AXIS", "BOX", "OFFSET", "OBJ", "UNIT", "SMOOTH", "PRIOR", "MEAN_ROWS", "MEAN_USED", "ACC", "LEVELS",
)  # fmt: skip


def grid_grad_launch(
    preds: list[Tensor], grads: list[Tensor], grad_total: Tensor, head: GridHead, outputs: GridOutputs
) -> Launch:
    """The launch that leaves the gradient, times ``grad_total``, after a loss launch with state."""
    common, grad_strides, config, programs = _common_arguments(preds, grads, head, outputs, True)
    constants = _grid_constants(head.key, preds[0].dtype)
    arguments = {
        **common,
        **{name: constants[name] for name in _GRAD_CONSTANTS},
        "d_ptrs": tuple(grads),
        "s_ds": tuple(grad_strides),
        "grad_out_ptr": grad_total,
        "CHANNELS": config.channels,
    }
    return Launch(
        grid.grid_grad_kernel, (programs,), arguments, config.threads, config.max_registers, stages=config.stages
    )


def cell_strides(view: Tensor) -> tuple[int, ...]:
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
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of an anchor-grid head in one launch; returns :class:`GridOutputs`, of use to a gradient ``with_state``.

    A compiled graph brings its ``workspace``.
    """
    head = head_from_key(key)
    outputs = grid_outputs(preds, rows, head, with_state)
    launch = grid_launch(preds, rows, offsets, class_weights, head, outputs, with_state, workspace)
    run_all([launch], rows.device)
    return outputs.total, outputs.parts, outputs.counts, outputs.state, outputs.kept, outputs.true_obj


@grid_loss.register_fake
def _(preds, rows, offsets, class_weights, key, with_state, workspace=None):
    return tuple(grid_outputs(preds, rows, head_from_key(key), with_state))


@torch.library.custom_op("fusedyolo::grid_loss_grad", mutates_args=())
def grid_loss_grad(
    grad_total: Tensor,
    preds: list[Tensor],
    parts: Tensor,
    state: Tensor,
    kept: Tensor,
    true_obj: Tensor,
    key: str,
) -> list[Tensor]:
    """Gradient of :func:`grid_loss`'s total by every map, times ``grad_total`` (0-dim), in one launch."""
    grads = [torch.empty_like(pred) for pred in preds]
    outputs = GridOutputs(grad_total, parts, grad_total, state, kept, true_obj)
    run_all([grid_grad_launch(preds, grads, grad_total, head_from_key(key), outputs)], grad_total.device)
    return grads


@grid_loss_grad.register_fake
def _(grad_total, preds, parts, state, kept, true_obj, key):
    return [torch.empty_like(pred) for pred in preds]


def _save_grid(ctx, inputs, output):
    preds, ctx.key = inputs[0], inputs[4]
    outputs = GridOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.save_for_backward(outputs.parts, outputs.state, outputs.kept, outputs.true_obj, *preds)


def _grid_backward(ctx, grad_total, *_grads):
    parts, state, kept, true_obj, *preds = ctx.saved_tensors
    others = (None,) * (len(ctx.needs_input_grad) - 1)  # a workspace counts only where there is one
    if grad_total is None:
        return [None] * len(preds), *others
    if state.numel() == 0:
        raise RuntimeError("grid_loss: no gradient was prepared, with_state was False")
    return grid_loss_grad(grad_total, preds, parts, state, kept, true_obj, ctx.key), *others


grid_loss.register_autograd(_grid_backward, setup_context=_save_grid)
grid_loss_grad.register_autograd(refuse_double_backward(grid_loss_grad._qualname))
