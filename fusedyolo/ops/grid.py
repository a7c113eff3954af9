"""Anchor-grid losses: operators, autograd, launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..heads import GridHead, head_from_key, obj_scales, reach
from ..kernels import assign
from ..kernels.grid import gradient, loss, records
from ..kernels.launch import SMALLEST_TILE, GridConfig, Wishes, grid_config
from ..kernels.levels import Strides
from ..reference.grid import NEIGHBOURS
from ..terms import TERMS
from ..tuned import wishes
from .launch import Launch, accumulator, done_counter, odd, refuse_double_backward, run_all

_MATCH = {"best_anchor": assign.best_anchor, "ratio": assign.ratio, "iou_band": None}


class _Parts(NamedTuple):
    """What a launch takes from the row alone."""

    terms: records.Terms
    numbers: records.Numbers
    spec: dict[str, Any]
    anchors: tuple[float, ...]


@lru_cache(maxsize=256)
def _parts(key: str, dtype: torch.dtype) -> _Parts:
    head = head_from_key(key)
    box = TERMS[head.box]
    is_band = head.assigner == "iou_band"
    of_box = (head.quality, head.quality_args) == (head.box, head.box_args)
    own = tuple(t for level in head.levels for t in level)
    acc, torch_acc = accumulator(dtype)
    threshold = 1.0 if head.ignore_thresh is None else head.ignore_thresh
    terms = records.Terms(
        axis=TERMS[head.decode].kernel,
        box=None if box.is_offset else box.kernel,
        offset=box.kernel if box.is_offset else None,
        label=TERMS[head.label].kernel,
        objectness=TERMS[head.objectness].kernel,
        quality=None if head.quality is None or of_box else TERMS[head.quality].kernel,
        match=_MATCH[head.assigner],
    )
    numbers = records.Numbers(
        C=head.num_classes,
        thresh=head.anchor_t if head.assigner == "ratio" else head.iou_thresh,
        limit=head.centre_limit,
        box_gain=head.box_gain,
        obj_gain=head.obj_gain,
        noobj_gain=head.noobj_gain,
        cls_gain=head.cls_gain,
        prior_gain=head.prior_gain,
        band_low=head.band[0],
        band_high=head.band[1],
        ignore_thresh=threshold,
        ignore_margin=_half_step(threshold, torch_acc),
        reach=1.001 * reach(threshold),
        gate=0.0 if head.class_gate is None else head.class_gate,
        positive=head.class_targets[0],
        negative=head.class_targets[1],
        first_weight=head.first_weight,
        quality_ratio=head.quality_ratio,
        area_weight=head.area_weight,
        area_cap=head.area_cap,
        box_args=head.box_args,
        label_args=head.label_args,
        obj_args=head.obj_args,
        quality_args=head.quality_args,
    )
    spec = {
        "KINDS": len(NEIGHBOURS) if head.assigner == "ratio" else 1,
        "SHARING": "one" if is_band else head.shared,
        "UNIT": head.unit,
        "QUALITY_IS_BOX": of_box,
        "IGNORES": head.ignore_thresh is not None,
        "GATED": head.class_gate is not None,
        "AVERAGE": head.average_box,
        "SMOOTH": any(head.smooth),
        "PRIOR": head.prior_gain > 0,
        "MEAN_ROWS": head.mean_rows,
        "MEAN_USED": head.obj_mean == "used",
        "PER_LEVEL": head.per_level,
        "OWN": None if head.per_level or own == tuple(range(len(own))) else own,
        "ANCHORS": tuple(map(len, head.levels)),
        "PLACES": head.places_per_row,
        "ACC": acc,
        "K_PAD": 1 << (4 + head.num_classes).bit_length(),
    }
    competing = [head.anchors[t] for t in own] if head.per_level else head.anchors
    return _Parts(terms, numbers, spec, tuple(side for anchor in competing for side in anchor))


def _half_step(value: float, dtype: torch.dtype) -> float:
    """Half of what separates a number, as a kernel receives it, from the next larger one of this type."""
    step = np.spacing(np.float32(value) if dtype == torch.float32 else np.float64(np.float32(value)))
    return float(step) / 2


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
    state: Tensor  # uint8: a byte a prediction, planes from multiples of 16 on, then an int32 for each program
    kept: Tensor  # [places, 5 + C, rounded up to a multiple of 8]: gradients of assigned predictions
    true_obj: Tensor  # objectness targets, where they are more than a byte says; planes as in ``state``


def grid_outputs(preds: list[Tensor], rows: Tensor, head: GridHead, with_state: bool) -> GridOutputs:
    """Memory for what a loss launch leaves."""
    pred, channels = preds[0], 5 + head.num_classes
    acc = accumulator(pred.dtype)[1]
    means = 2 * len(preds) if head.mean_rows or head.obj_mean == "used" else 0
    size = places = targets = 0
    if with_state:
        planes = [(pred.shape[0] * len(own), p.shape[2] * p.shape[3]) for p, own in zip(preds, head.levels, strict=True)]
        padded = sum(count * _padded(cells) for count, cells in planes)
        size = padded + 4 * sum(count * -(-cells // SMALLEST_TILE) for count, cells in planes)
        # no more assignments than predictions, nor than rows can make; in a compiled graph both are symbols
        places = torch.sym_min(sum(count * cells for count, cells in planes), rows.shape[0] * head.places_per_row)
        targets = padded if any(head.smooth) else 0
    return GridOutputs(
        pred.new_empty((), dtype=acc),
        pred.new_empty(3 + means, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(size, dtype=torch.uint8),
        pred.new_empty((places, -(-channels // 8) * 8), dtype=acc),
        pred.new_empty(targets, dtype=acc),
    )


def _padded(cells: int) -> int:
    return -(-cells // 16) * 16


class _Maps(NamedTuple):
    """Prediction maps, or gradients, as the kernels see them."""

    batch: int
    widths: tuple[int, ...]
    heights: tuple[int, ...]
    strides: tuple[Strides, ...]
    planes: bool  # neighbouring cells are neighbours in memory
    layout: str  # of a Spec


@lru_cache(maxsize=256)
def _maps(shapes: tuple[torch.Size, ...], strides: tuple[tuple[int, ...], ...], channels: int) -> _Maps:
    heights, widths = [shape[2] for shape in shapes], [shape[3] for shape in shapes]
    steps = [map_strides(shape, stride, channels) for shape, stride in zip(shapes, strides, strict=True)]
    flat = all(s.row == s.column * width for s, width in zip(steps, widths, strict=True))
    planes = all(s.column == 1 for s in steps)
    layout = "strided"
    if flat:
        layout = "planes" if planes else "channels" if all(s.channel == 1 for s in steps) else "strided"
    return _Maps(shapes[0][0], tuple(widths), tuple(heights), tuple(steps), planes, layout)


class _Tiling(NamedTuple):
    """What does not change between calls with predictions of the same shapes and strides."""

    levels: records.Levels  # without the maps
    config: GridConfig
    programs: int
    spec: records.Spec


@lru_cache(maxsize=256)
def _tiling(key: str, maps: _Maps, dtype: torch.dtype, layout: str, tuned: Wishes) -> _Tiling:
    head, parts = head_from_key(key), _parts(key, dtype)
    cells = tuple(w * h for w, h in zip(maps.widths, maps.heights, strict=True))
    config = grid_config(max(cells), maps.planes, dtype.itemsize, tuned)
    scales = obj_scales(
        head.obj_balance, head.obj_mean, tuple(len(own) * n for own, n in zip(head.levels, cells, strict=True))
    )
    levels = records.Levels(
        maps=(),
        by=tuple(Strides(*odd(by)) for by in maps.strides),
        widths=odd(maps.widths),
        heights=odd(maps.heights),
        cell_sides=head.strides,
        scales=head.scale_x_y,
        obj_scales=scales,
        smooth=odd(tuple(map(int, head.smooth_levels))),
        anchors=parts.anchors,
    )
    pad = parts.spec["K_PAD"]
    spec = records.Spec(
        **parts.spec,
        LAYOUT=layout,
        CELLS=config.cells,
        ROWS=config.rows,
        NEAR=min(64, config.rows),
        PICKS=max(1, 8 * config.threads // pad),
        CHANNELS=config.channels,
    )
    programs = sum(maps.batch * len(own) * -(-n // config.cells) for own, n in zip(head.levels, cells, strict=True))
    return _Tiling(levels, config, programs, spec)


def _tilings(preds: list[Tensor], grads: list[Tensor], head: GridHead) -> tuple[_Tiling, int]:
    """Of a launch that reads some maps and writes some gradients; and the number of images."""
    shapes, channels = tuple([pred.shape for pred in preds]), 5 + head.num_classes
    maps = _maps(shapes, tuple([pred.stride() for pred in preds]), channels)
    layout = maps.layout
    if grads and _maps(shapes, tuple([grad.stride() for grad in grads]), channels).layout != layout:
        layout = "strided"
    cells = max(w * h for w, h in zip(maps.widths, maps.heights, strict=True))
    tuned = wishes("grid", _family(head.key), preds[0], maps.planes, maps.batch, cells, head.num_classes)
    return _tiling(head.key, maps, preds[0].dtype, layout, tuned), maps.batch


def _saved(preds: list[Tensor], head: GridHead, outputs: GridOutputs) -> records.Saved:
    """What a loss launch leaves, as the kernels take it."""
    if outputs.state.numel() == 0:
        return records.Saved(None, None, None, None)
    planes = [(p.shape[0] * len(own), p.shape[2] * p.shape[3]) for p, own in zip(preds, head.levels, strict=True)]
    start = sum(count * _padded(cells) for count, cells in planes)
    return records.Saved(
        outputs.state,
        outputs.true_obj if any(head.smooth) else None,
        outputs.kept,
        outputs.state[start:].view(torch.int32),
    )


LISTS = 6  # see grid.records.Lists


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
    tiling, batch = _tilings(preds, [], head)
    parts, config, spec, M = _parts(head.key, preds[0].dtype), tiling.config, tiling.spec, rows.shape[0]
    blocks = -(-M * spec.KINDS // spec.ROWS)
    room = LISTS * M * spec.PLACES + 2 * blocks * tiling.programs
    numbers = tiling.programs * (loss.N_PARTS.value + 5 * spec.NEAR * spec.IGNORES)
    arguments = {
        "levels": tiling.levels._replace(maps=tuple(preds)),
        "targets": records.Targets(rows, offsets, class_weights),
        "M": M,
        "B": batch,
        "lists_ptr": rows.new_empty(room, dtype=torch.int32),
        "saved": _saved(preds, head, outputs),
        "outputs": records.Outputs(
            outputs.total,
            outputs.parts,
            outputs.counts,
            rows.new_empty(numbers, dtype=outputs.total.dtype),
            done_counter(rows.device, workspace),
        ),
        "head": parts.numbers,
        "terms": parts.terms,
        "SPEC": spec,
    }
    settings = config.threads, config.max_registers
    # the peers' operators decide with products and sums that are rounded one by one
    return Launch(loss.grid_kernel, (tiling.programs,), arguments, *settings, exact=True, stages=config.stages)


def grid_grad_launch(
    preds: list[Tensor], grads: list[Tensor], grad_total: Tensor, head: GridHead, outputs: GridOutputs
) -> Launch:
    """The launch that leaves the gradient, times ``grad_total``, after a loss launch with state."""
    tiling, batch = _tilings(preds, grads, head)
    parts, config = _parts(head.key, preds[0].dtype), tiling.config
    strides = tuple([Strides(*odd(map_strides(grad.shape, grad.stride(), 5 + head.num_classes))) for grad in grads])
    arguments = {
        "levels": tiling.levels._replace(maps=tuple(preds)),
        "grads": records.Grads(tuple(grads), strides),
        "B": batch,
        "saved": _saved(preds, head, outputs),
        "parts_ptr": outputs.parts,
        "grad_out_ptr": grad_total,
        "head": parts.numbers,
        "terms": parts.terms,
        "SPEC": tiling.spec,
    }
    settings = config.threads, config.max_registers
    return Launch(gradient.grid_grad_kernel, (tiling.programs,), arguments, *settings, stages=config.stages)


def map_strides(shape: torch.Size, stride: tuple[int, ...], channels: int) -> Strides:
    """Strides of a map ``[B, A * channels, H, W]`` or ``[B, A, H, W, channels]``; those of axes of length 1 are made
    to follow their neighbours."""
    if len(stride) == 4:
        b, k, y, x = stride
        a = k * channels
    else:
        b, a, y, x, k = stride
    if shape[3] == 1:
        x = y if shape[2] > 1 else 1
    if shape[2] == 1:
        y = x * shape[3]
    return Strides(b, y, x, a, k)


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
