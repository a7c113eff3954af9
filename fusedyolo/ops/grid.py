"""Anchor-grid losses: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..heads import GridHead, head_from_key, obj_scales, reach
from ..kernels import assign
from ..kernels.grid import gradient, loss, records
from ..kernels.launch import SMALLEST_TILE, grad_parts, grid_config, power_of_two
from ..kernels.levels import Strides
from ..operator import differentiable, fake, operator
from ..reference.grid import NEIGHBOURS
from ..terms import TERMS
from ..tuned import wishes
from .launch import (
    Launch,
    Layout,
    accumulator,
    done_counter,
    layouts,
    odd,
    planned,
    refuse_double_backward,
    run_all,
)
from .strides import map_strides

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
    box, label, objectness = TERMS[head.box], TERMS[head.label], TERMS[head.objectness]
    is_band = head.assigner == "iou_band"
    of_box = (head.quality, head.quality_args) == (head.box, head.box_args)
    own = tuple(t for level in head.levels for t in level)
    acc, torch_acc = accumulator(dtype)
    threshold = 1.0 if head.ignore_thresh is None else head.ignore_thresh
    terms = records.Terms(
        axis=TERMS[head.decode].kernel,
        box=None if box.is_offset else box.kernel,
        offset=box.kernel if box.is_offset else None,
        label=label.kernel,
        objectness=objectness.kernel,
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
        label_args=label.kernel_args(head.label_args),
        obj_args=objectness.kernel_args(head.obj_args),
        quality_args=head.quality_args,
    )
    spec = {
        "KINDS": len(NEIGHBOURS) if head.assigner == "ratio" else 1,
        "SHARING": "one" if is_band else head.shared,
        "APART": label.elementwise,
        "HARD": head.class_targets == (1.0, 0.0),
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
        "K_PAD": power_of_two(5 + head.num_classes),
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
    state: Tensor  # int32: two bits a prediction, planes from multiples of 16 on, then an integer for each program
    kept: Tensor  # [places, 5 + C, rounded up to a multiple of 8]: gradients of assigned predictions
    true_obj: Tensor  # objectness targets, where they are more than a state says; planes likewise


class _Room(NamedTuple):
    """How much memory a loss launch leaves; of predictions whose sizes are symbols symbols."""

    predictions: int
    padded: int  # planes, each from a multiple of 16 on
    states: int  # integers, to a multiple of 16 bytes: a kernel is compiled for how its pointers are aligned
    programs: int  # at most


def _room(shapes: Sequence[Sequence[int]], head: GridHead) -> _Room:
    planes = [(s[0] * len(own), s[2] * s[3]) for s, own in zip(shapes, head.levels, strict=True)]
    padded = sum(count * (-(-cells // 16) * 16) for count, cells in planes)
    return _Room(
        sum(count * cells for count, cells in planes),
        padded,
        -(-padded // 64) * 4,
        sum(count * -(-cells // SMALLEST_TILE) for count, cells in planes),
    )


def _outputs(pred: Tensor, rows: Tensor, head: GridHead, room: _Room | None) -> GridOutputs:
    acc, channels = accumulator(pred.dtype)[1], 5 + head.num_classes
    means = 2 * len(head.levels) if head.mean_rows or head.obj_mean == "used" else 0
    size = places = targets = 0
    if room is not None:
        size = room.states + room.programs
        # no more assignments than predictions, nor than rows can make; in a compiled graph both are symbols
        places = torch.sym_min(room.predictions, rows.shape[0] * head.places_per_row)
        targets = room.padded if any(head.smooth) else 0
    return GridOutputs(
        pred.new_empty((), dtype=acc),
        pred.new_empty(3 + means, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(size, dtype=torch.int32),
        pred.new_empty((places, -(-channels // 8) * 8), dtype=acc),
        pred.new_empty(targets, dtype=acc),
    )


def grid_outputs(preds: list[Tensor], rows: Tensor, head: GridHead, with_state: bool) -> GridOutputs:
    """Memory for what a loss launch leaves."""
    room = _room([pred.shape for pred in preds], head) if with_state else None
    return _outputs(preds[0], rows, head, room)


class _Plan(NamedTuple):
    """Both launches of a step but for their tensors, and the sizes of what they share."""

    loss: Launch
    grad: Launch
    room: _Room
    lists: int  # integers a row, see grid.records.Lists
    numbers: int  # partial sums, and boxes met by a tile
    spread: int  # numbers a row, see there


@planned
def _plan(key: str, preds: tuple[Layout, ...]) -> _Plan:
    head = head_from_key(key)
    parts, shapes = _parts(key, preds[0].dtype), [pred.shape for pred in preds]
    strides = [map_strides(pred, 5 + head.num_classes) for pred in preds]
    batch, cells = shapes[0][0], [shape[2] * shape[3] for shape in shapes]
    planes = all(by.column == 1 for by in strides)
    tuned = wishes("grid", _family(key), preds[0], planes, batch, max(cells), head.num_classes)
    config = grid_config(max(cells), planes, preds[0].dtype.itemsize, tuned)
    per_plane = tuple(len(own) * n for own, n in zip(head.levels, cells, strict=True))
    near = _near_places(head, shapes, config.cells) if parts.spec["KINDS"] > 1 else 0
    levels = records.Levels(
        batch=2 * batch + 3,
        near_places=2 * near + 3,
        by=odd(tuple(strides)),
        widths=odd(tuple([shape[3] for shape in shapes])),
        heights=odd(tuple([shape[2] for shape in shapes])),
        cell_sides=head.strides,
        scales=head.scale_x_y,
        obj_scales=obj_scales(head.obj_balance, head.obj_mean, per_plane),
        smooth=odd(tuple(map(int, head.smooth_levels))),
        anchors=parts.anchors,
    )
    spec = records.Spec(
        **parts.spec,
        LAYOUT=_layout(strides, preds),
        CELLS=config.cells,
        ROWS=config.rows,
        PICKS=max(1, 8 * config.threads // parts.spec["K_PAD"]),
        CHANNELS=config.channels,
        PARTS=grad_parts(config, 5 + head.num_classes, planes),
    )
    programs = sum(batch * len(own) * -(-n // config.cells) for own, n in zip(head.levels, cells, strict=True))
    arguments = {"levels": levels, "head": parts.numbers, "terms": parts.terms, "SPEC": spec}
    settings = config.threads, config.max_registers
    return _Plan(
        # the peers' operators decide with products and sums that are rounded one by one
        Launch(loss.grid_kernel, (programs,), arguments, *settings, exact=True, stages=config.stages),
        Launch(gradient.grid_grad_kernel, (programs * spec.PARTS,), arguments, *settings, stages=config.stages),
        _room(shapes, head),
        8 * head.places_per_row + 2 * near,
        programs * (loss.N_PARTS.value + 5 * (config.rows + config.cells) * spec.IGNORES),
        4 * head.places_per_row * (spec.SHARING in ("each", "sum")),
    )


def _near_places(head: GridHead, shapes: Sequence[Sequence[int]], cells: int) -> int:
    """How many tiles have a part of three lines of cells, at most, on all maps."""
    maps = [(len(own), shape[2], shape[3]) for own, shape in zip(head.levels, shapes, strict=True)]
    return sum(count * min(-(-height * width // cells), 2 + 3 * width // cells) for count, height, width in maps)


@planned
def _grad_plan(key: str, preds: tuple[Layout, ...], grads: tuple[Layout, ...]) -> Launch:
    """The gradient launch with the strides of the gradients; of one layout with the predictions' only if both are."""
    plan, head = _plan(key, preds), head_from_key(key)
    strides = [map_strides(grad, 5 + head.num_classes) for grad in grads]
    spec = plan.grad.arguments["SPEC"]
    if _layout(strides, grads) != spec.LAYOUT:
        spec = spec._replace(LAYOUT="strided")
    return replace(
        plan.grad, arguments={**plan.grad.arguments, "grads_by": odd(tuple(strides)), "SPEC": spec}, compiled={}
    )


def _layout(strides: Sequence[Strides], maps: Sequence[Layout]) -> str:
    """That of a :class:`~fusedyolo.kernels.grid.records.Spec`."""
    if all(by.row == by.column * each.shape[3] for by, each in zip(strides, maps, strict=True)):
        if all(by.column == 1 for by in strides):
            return "planes"
        if all(by.channel == 1 for by in strides):
            return "channels"
    return "strided"


def _saved(outputs: GridOutputs, room: _Room, head: GridHead) -> records.Saved:
    """What a loss launch leaves, as the kernels take it."""
    bases = outputs.state[room.states :]
    return records.Saved(outputs.state, outputs.true_obj if any(head.smooth) else None, outputs.kept, bases)


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
    plan, M = _plan(head.key, layouts(preds)), rows.shape[0]
    spec, (programs,) = plan.loss.arguments["SPEC"], plan.loss.grid
    each = 4 * spec.ROWS + spec.CELLS - (-M * spec.KINDS // spec.ROWS) - (-M // spec.ROWS)
    partial = rows.new_empty(plan.numbers + plan.spread * M, dtype=outputs.total.dtype)
    done = done_counter(rows.device, workspace)
    return plan.loss.filled(
        {
            "maps": tuple(preds),
            "targets": records.Targets(rows, offsets, class_weights),
            "M": M,
            "lists_ptr": rows.new_empty(plan.lists * M + programs * each, dtype=torch.int32),
            "saved": _saved(outputs, plan.room, head) if with_state else NOTHING,
            "outputs": records.Outputs(outputs.total, outputs.parts, outputs.counts, partial, done),
        }
    )


NOTHING = records.Saved(None, None, None, None)


def grid_grad_launch(
    preds: list[Tensor], grads: list[Tensor], grad_total: Tensor, head: GridHead, outputs: GridOutputs
) -> Launch:
    """The launch that leaves the gradient, times ``grad_total``, after a loss launch with state."""
    at = layouts(preds)
    return _grad_plan(head.key, at, layouts(grads)).filled(
        {
            "maps": tuple(preds),
            "grads": tuple(grads),
            "saved": _saved(outputs, _plan(head.key, at).room, head),
            "parts_ptr": outputs.parts,
            "grad_out_ptr": grad_total,
        }
    )


@operator
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
    outputs = _outputs(preds[0], rows, head, _plan(key, layouts(preds)).room if with_state else None)
    launch = grid_launch(preds, rows, offsets, class_weights, head, outputs, with_state, workspace)
    run_all([launch], rows.device)
    return outputs.total, outputs.parts, outputs.counts, outputs.state, outputs.kept, outputs.true_obj


@fake(grid_loss)
def _(preds, rows, offsets, class_weights, key, with_state, workspace=None):
    return tuple(grid_outputs(preds, rows, head_from_key(key), with_state))


@operator
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


@fake(grid_loss_grad)
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
    if grad_total is None:
        return [None] * len(preds)
    if state.numel() == 0:
        raise RuntimeError("grid_loss: no gradient was prepared, with_state was False")
    return grid_loss_grad(grad_total, preds, parts, state, kept, true_obj, ctx.key)


differentiable(grid_loss, _grid_backward, _save_grid)
differentiable(grid_loss_grad, refuse_double_backward(grid_loss_grad))
