"""Anchor-grid losses: operators, autograd, launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..heads import GridHead, head_from_key, obj_scales, reach
from ..kernels import assign
from ..kernels.grid import assign as grid_assign
from ..kernels.grid import choose, gradient, loss, offer, records
from ..kernels.launch import (
    AWARDED,
    AWARDING,
    CANDIDATE_REGISTERS,
    MOST_REGISTERS,
    OFFER_THREADS,
    PICK_THREADS,
    SMALLEST_TILE,
    class_tile,
    even_tile,
    grad_parts,
    grid_config,
    grid_gradient,
    power_of_two,
    price_tile,
)
from ..kernels.levels import Strides
from ..operator import call, differentiable, fake, operator
from ..reference.candidates import NEIGHBOURS, neighbour_reach
from ..terms import TERMS
from ..tuned import wishes
from .launch import Launch, Layout, accumulator, alike, done_counter, layouts, odd, planned, refuse_double_backward
from .steps import Outline, Steps
from .strides import map_strides

_MATCH = {
    "best_anchor": assign.best_anchor, "shape_iou": assign.shape_iou, "ratio": assign.ratio, "iou_band": None,
}  # fmt: skip


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
        "KINDS": len(NEIGHBOURS) if neighbour_reach(head) else 1,
        "REACH": neighbour_reach(head),
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
        "ZEROS": _zeros(head),
        "MEAN_ROWS": head.mean_rows,
        "MEAN_USED": head.obj_mean == "used",
        "BY_IMAGE": head.by_image,
        "BY_LEVEL": head.by_level,
        "PER_LEVEL": head.per_level,
        "OWN": None if head.per_level or own == tuple(range(len(own))) else own,
        "ANCHORS": tuple(map(len, head.levels)),
        "PLACES": head.places_per_row,
        "TABLES": head.places_per_row if head.by_cost else 0,
        "ACC": acc,
    }
    competing = [head.anchors[t] for t in own] if head.per_level else head.anchors
    return _Parts(terms, numbers, spec, tuple(side for anchor in competing for side in anchor))


def _zeros(head: GridHead) -> bool:
    """Whether something may be 0 that multiplies what may be infinite, where neither rows nor classes have weights."""
    gains = (head.box_gain, head.obj_gain, head.noobj_gain, head.cls_gain, *head.obj_balance)
    label = TERMS[head.label]
    numbers = dict(zip((*label.numbers, *label.optional), head.label_args, strict=False))
    larger = any(number > 1 for name, number in numbers.items() if name != "gamma")  # than the largest logit
    return 0 in gains or (head.shared == "each" and larger)


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

    total: Tensor  # 0-dim, or [B] of each image, or [L, 2] of each level, box with classes and objectness
    parts: Tensor  # [3], or of images [3 B], and where the row asks for means two numbers a level for the gradient; of
    # levels the first three are of no meaning, and behind the means are the columns of each one's sums
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
    acc, kept = accumulator(pred.dtype)[1], -(-(5 + head.num_classes) // 8) * 8
    means = 2 * len(head.levels) if head.mean_rows or head.obj_mean == "used" else 0
    size = places = targets = 0
    if room is not None:
        size = room.states + room.programs
        # no more assignments than predictions, nor than rows can make
        places = _least(room.predictions, rows.shape[0] * head.places_per_row)
        targets = room.padded if any(head.smooth) else 0
    images, levels = pred.shape[0] if head.by_image else 1, len(head.levels)
    columns = loss.N_PARTS.value * levels if head.by_level else 0
    return GridOutputs(
        pred.new_empty((images,) if head.by_image else (levels, 2) if head.by_level else (), dtype=acc),
        pred.new_empty(3 * images + means + columns, dtype=acc),
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(size, dtype=torch.int32),
        pred.new_empty(places, kept, dtype=acc),
        pred.new_empty(targets, dtype=acc),
    )


def _least(a: Any, b: Any) -> Any:
    """Of two integers, which are symbols in a compiled graph."""
    return min(a, b) if type(a) is int and type(b) is int else torch.sym_min(a, b)


def grid_outputs(preds: list[Tensor], rows: Tensor, head: GridHead, with_state: bool) -> GridOutputs:
    """Memory for what a loss launch leaves."""
    room = _room([pred.shape for pred in preds], head) if with_state else None
    return _outputs(preds[0], rows, head, room)


class _Plan(NamedTuple):
    """Both launches of a step but for what calls bring, and how much they leave."""

    loss: Steps  # with what the gradient needs
    loss_alone: Steps
    grad: Steps
    room: _Room


@planned
def _plan(key: str, preds: tuple[Layout, ...], lead: tuple[Layout, ...] = ()) -> _Plan:
    """Where rows pick by cost it is that of the maps ``lead``, if there are some."""
    head = head_from_key(key)
    parts, shapes = _parts(key, preds[0].dtype), [pred.shape for pred in preds]
    strides = [map_strides(pred, 5 + head.num_classes) for pred in preds]
    batch, cells = shapes[0][0], [shape[2] * shape[3] for shape in shapes]
    planes = all(by.column == 1 for by in strides)
    tuned = wishes("grid", _family(key), preds[0], planes, batch, max(cells), head.num_classes)
    ignores, few = parts.spec["IGNORES"], len(head.levels) == 1
    config = grid_config(max(cells), planes, preds[0].dtype.itemsize, tuned, ignores, few)
    per_plane = tuple(len(own) * n for own, n in zip(head.levels, cells, strict=True))
    tiles = [even_tile(n, config.cells, few) for n in cells]
    sizes = [shape[2:4] for shape in shapes]
    near = 0
    if parts.spec["KINDS"] > 1 and not head.by_cost:
        near = near_places(parts.spec["REACH"], list(map(len, head.levels)), sizes, tiles)
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
        tiles=odd(tuple(tiles)),
    )
    whole = class_tile(head.num_classes, config.threads, apart=False)
    spec = records.Spec(
        **parts.spec,
        LAYOUT=_layout(strides, preds),
        CELLS=config.cells,
        ROWS=config.rows,
        PICKS=whole["LANES"],
        K_PAD=whole["HELD"],
        **class_tile(head.num_classes, config.threads, parts.spec["APART"] and not head.average_box),
        CHANNELS=config.channels,
        PARTS=grad_parts(config, 5 + head.num_classes, planes),
    )
    programs = sum(batch * len(own) * -(-n // tile) for own, n, tile in zip(head.levels, cells, tiles, strict=True))
    common = {"levels": levels, "head": parts.numbers, "terms": parts.terms, "SPEC": spec}
    room, acc = _room(shapes, head), accumulator(preds[0].dtype)[1]
    places, rows_read = head.places_per_row, config.rows
    lists = 8 * places + 2 * near  # integers a row, see grid.records.Lists
    numbers = programs * (loss.N_PARTS.value + 5 * (rows_read + config.cells) * spec.IGNORES)  # boxes met by a tile too
    spread = 4 * places * (spec.SHARING in ("each", "sum"))  # numbers a row, see there

    # of each program some blocks, and integers for blocks of candidates and rows; these are rounded up with all rows
    fixed = programs * (4 * rows_read + config.cells + 2)
    listed = lists - (-programs * (spec.KINDS + 1) // rows_read)

    def loss_steps(with_state: bool) -> Steps:
        own = Outline()
        partial = own.scratch(acc, (numbers,), spread)
        weights = (own.tensor("class_weights"), None)[:: -1 if head.weigh_classes else 1]
        given = {
            "maps": own.tensors("preds", len(preds)),
            "targets": records.Targets(own.tensor("rows"), own.tensor("offsets"), *weights, own.tensor("weights")),
            "M": own.M,
            "lists_ptr": own.scratch(torch.int32, (fixed,), listed),
            "offers": None,
            "saved": _saved(own, room, head) if with_state else records.Saved(*(None,) * 5),
            "outputs": records.Outputs(
                own.tensor("total"), own.tensor("parts"), own.tensor("counts"), partial, own.tensor("done")
            ),
        }
        first = []
        if head.by_cost:
            given["offers"] = _offers(own, spec.TABLES, head.topk, acc)
            judged = {**common, **{name: given[name] for name in ("maps", "targets", "M", "offers")}}
            if lead:
                by = odd(tuple([map_strides(pred, 5 + head.num_classes) for pred in lead]))
                judged |= {"maps": own.tensors("lead", len(lead)), "levels": levels._replace(by=by)}
            first = _picking(judged, spec, head, acc)
        # the peers' operators decide with products and sums that are rounded one by one
        settings = config.threads, config.max_registers
        last = Launch(
            loss.grid_kernel,
            (programs,),
            common | given,
            *settings,
            exact=True,
            stages=config.stages,
            weights=given["targets"][2:],
        )
        return own.steps(*first, last)

    own = Outline()
    given = {
        "maps": own.tensors("preds", len(preds)),
        "grads": own.tensors("grads", len(preds)),
        "saved": _saved(own, room, head),
        "parts_ptr": own.tensor("parts"),
        "grad_out_ptr": own.tensor("grad_total"),
    }
    own_config = grid_gradient(config, planes)
    grid, settings = (programs * spec.PARTS,), (own_config.threads, own_config.max_registers)
    grads = alike(preds)
    grads_by = [map_strides(grad, 5 + head.num_classes) for grad in grads]
    given["grads_by"] = odd(tuple(grads_by))
    if _layout(grads_by, grads) != spec.LAYOUT:
        given["SPEC"] = spec._replace(LAYOUT="strided")
    grad = Launch(gradient.grid_grad_kernel, grid, common | given, *settings, stages=config.stages)
    return _Plan(loss_steps(True), loss_steps(False), own.steps(grad), room)


def _offers(own: Outline, tables: int, most: int, acc: torch.dtype) -> records.Offers:
    """Memory for what rows offer, of which each picks so many at ``most``."""
    return records.Offers(
        M=own.M,
        cell_ptr=own.scratch_of_rows(torch.int32, tables),
        row_ptr=own.scratch_of_rows(torch.int32, tables),
        count_ptr=own.scratch_of_rows(torch.int32),
        place_ptr=own.scratch_of_rows(torch.int32, tables),
        code_ptr=own.scratch_of_rows(torch.int32, tables),
        boxes_ptr=own.scratch_of_rows(acc, tables, 4),
        obj_ptr=own.scratch_of_rows(acc, tables),
        cost_ptr=own.scratch_of_rows(acc, tables),
        bounds_ptr=own.scratch_of_rows(acc, 4),
        clash_ptr=own.scratch_of_rows(torch.int32, most),
        clashes_ptr=own.scratch(torch.int32, (1,)),
    )


def _picking(given: dict[str, Any], spec: records.Spec, head: GridHead, acc: torch.dtype) -> list[Launch]:
    """The launches by which rows pick predictions by their cost."""
    common = {name: value for name, value in given.items() if name != "terms"}
    width = {"WIDTH": power_of_two(spec.TABLES)}
    most = MOST_REGISTERS if acc == torch.float64 else None
    across, threads = price_tile(head.num_classes, OFFER_THREADS)
    offered, each = given | width | {"ACROSS": across}, common | {"COUNT": head.topk, "K": power_of_two(head.topk)}
    shared = common | width | {"BLOCK": AWARDED}
    return [
        Launch(offer.offer_kernel, _one_a_row, offered, threads, most or CANDIDATE_REGISTERS, exact=True),
        Launch(choose.choose_kernel, _one_a_row, each, PICK_THREADS, most, exact=True),
        Launch(choose.award_kernel, _awarding, shared, PICK_THREADS, most, exact=True),
    ]


def _one_a_row(M: int) -> tuple[int]:
    return (max(1, M),)


def _awarding(M: int) -> tuple[int]:
    return (min(max(1, 2 * M), AWARDING),)


def near_places(reach: float, anchors: Sequence[int], sizes: Sequence[Sequence[int]], tiles: Sequence[int]) -> int:
    """In how many tiles a row is looked at, at most, that reaches so far: of maps with so many ``anchors`` and such
    ``sizes``, (height, width), those with a part of the lines of cells that are near it.
    """
    lines = math.ceil(2 * reach + grid_assign.ABOVE.value + grid_assign.BELOW.value)
    return sum(
        count * min(-(-height * width // tile), 2 + lines * width // tile)
        for count, (height, width), tile in zip(anchors, sizes, tiles, strict=True)
    )


def _layout(strides: Sequence[Strides], maps: Sequence[Layout]) -> str:
    """That of a :class:`~fusedyolo.kernels.grid.records.Spec`."""
    if all(by.row == by.column * each.shape[3] for by, each in zip(strides, maps, strict=True)):
        if all(by.column == 1 for by in strides):
            return "planes"
        if all(by.channel == 1 for by in strides):
            return "channels"
    return "strided"


def _saved(own: Outline, room: _Room, head: GridHead) -> records.Saved:
    """What a loss launch leaves, as the kernels take it."""
    state, true_obj = own.tensor("state"), own.tensor("true_obj") if any(head.smooth) else None
    bases = state.after(room.states * torch.int32.itemsize, torch.int32)
    return records.Saved(
        state, true_obj, own.tensor("kept"), bases, own.tensor("weights") if any(head.smooth) else None
    )


def _loss_given(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    outputs: GridOutputs,
    workspace: Tensor | None,
    weights: Tensor | None,
    lead: list[Tensor],
) -> dict[str, Any]:
    """What a call brings to a loss launch; ``weights`` are those of the rows."""
    return {
        "preds": preds,
        "lead": lead,
        "rows": rows,
        "offsets": offsets,
        "class_weights": class_weights,
        "weights": weights,
        "done": done_counter(rows.device, workspace),
        **outputs._asdict(),
    }


def grid_launches(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    head: GridHead,
    outputs: GridOutputs,
    with_state: bool,
    weights: Tensor | None = None,
    lead: Sequence[Tensor] = (),
) -> dict[str, Launch]:
    """The launches that leave the loss and, ``with_state``, what :func:`grid_grad_launch` needs."""
    plan = _plan(head.key, layouts(preds), layouts(lead))
    given = _loss_given(preds, rows, offsets, class_weights, outputs, None, weights, list(lead))
    steps = plan.loss if with_state else plan.loss_alone
    names = ("offer", "choose", "award", "loss") if head.by_cost else ("loss",)
    return dict(zip(names, steps.launches(rows.device, rows.shape[0], **given), strict=True))


def grid_grad_launch(
    preds: list[Tensor],
    grads: list[Tensor],
    grad_total: Tensor,
    head: GridHead,
    outputs: GridOutputs,
    weights: Tensor | None = None,
) -> Launch:
    """The launch that leaves the gradient, times ``grad_total``, after a loss launch with state; ``grads`` lie as
    ``torch.empty_like`` has them.
    """
    given = outputs._asdict() | {"preds": preds, "grads": grads, "grad_total": grad_total, "weights": weights}
    return _plan(head.key, layouts(preds)).grad.launches(grad_total.device, 0, **given)[0]


@operator
def grid_loss(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    key: str,
    with_state: bool,
    lead: list[Tensor],
    workspace: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss of an anchor-grid head in one launch; returns :class:`GridOutputs`, of use to a gradient ``with_state``.

    A compiled graph brings its ``workspace``; ``weights`` are those of the rows. Where rows pick by cost it is that of
    the maps ``lead``, if there are some.
    """
    plan = _plan(key, layouts(preds), layouts(lead) if lead else ())
    outputs = _outputs(preds[0], rows, head_from_key(key), plan.room if with_state else None)
    given = _loss_given(preds, rows, offsets, class_weights, outputs, workspace, weights, lead)
    (plan.loss if with_state else plan.loss_alone).run(rows.device, rows.shape[0], **given)
    return tuple(outputs)  # type: ignore[return-value]


@fake(grid_loss)
def _(preds, rows, offsets, class_weights, key, with_state, lead, workspace=None, weights=None):
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
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Gradient of :func:`grid_loss`'s total by every map, times ``grad_total`` (as the total), in one launch."""
    grads = [torch.empty_like(pred) for pred in preds]
    saved = {"parts": parts, "state": state, "kept": kept, "true_obj": true_obj, "weights": weights}
    _plan(key, layouts(preds)).grad.run(grad_total.device, 0, preds=preds, grads=grads, grad_total=grad_total, **saved)
    return grads


@fake(grid_loss_grad)
def _(grad_total, preds, parts, state, kept, true_obj, key, weights=None):
    return [torch.empty_like(pred) for pred in preds]


def _save_grid(ctx, inputs, output):
    preds, ctx.key, weights = inputs[0], inputs[4], inputs[8]
    outputs = GridOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(outputs.parts, outputs.state, outputs.kept, outputs.true_obj, weights, *preds)


def _grid_backward(ctx, grad_total):
    parts, state, kept, true_obj, weights, *preds = ctx.saved_tensors
    if grad_total is None:
        return [None] * len(preds)
    if state.numel() == 0:
        raise RuntimeError("grid_loss: no gradient was prepared, with_state was False")
    if head_from_key(ctx.key).by_level:  # means, which the launch reads level by level, take the gradient of each
        means = parts[3 : 3 + grad_total.numel()] * grad_total.flatten()
        parts, grad_total = torch.cat((parts[:3], means)), torch.ones_like(means[0])
    elif grad_total.dim():  # that of a sum is one number many times
        grad_total = grad_total.contiguous()
    return call(grid_loss_grad, grad_total, preds, parts, state, kept, true_obj, ctx.key, weights)


differentiable(grid_loss, _grid_backward, _save_grid, outputs=1)
differentiable(grid_loss_grad, refuse_double_backward(grid_loss_grad))
