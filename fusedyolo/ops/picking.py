"""Cells that predict a box each: where predictions lie, and the launches that settle what goes to which object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..heads import PickHead, pick_head_from_key
from ..kernels.launch import PICK_DECODED, PICK_SETTLED, PICK_THREADS, Wishes, pick_config, pick_shift, power_of_two
from ..kernels.levels import Strides
from ..kernels.picks import boxes, pick, records, settle, site, wish
from ..terms import TERMS
from ..tuned import wishes
from .launch import Launch, Layout, accumulator, done_counter, layouts, odd, planned, row_maxima
from .strides import map_strides

Maps = tuple[tuple[int, int], ...]


@planned
def parts_of(form: str, preds: tuple[Layout, ...], key: str, maps: Maps) -> records.Predictions:
    """Where box, objectness and class of each level lie in predictions of a ``form`` (see
    :func:`fusedyolo.checks.point_predictions`), whose ``layouts`` are given, for the head of this ``key`` and maps of
    such (height, width): all that kernels take but for the tensors, in whose place are their numbers. See
    :func:`fill_parts`.
    """
    head = pick_head_from_key(key)
    count = len(head.widths)
    parts: list[list[tuple[int, int, Strides]]] = [[] for _ in range(count)]  # of each level tensor, start, strides
    cell = 0
    for level, (height, width) in enumerate(maps):
        channel = 0
        for k, channels in enumerate(head.widths):
            if form == "planes":
                image, by, step = preds[k].stride
                parts[k].append((k, cell * step, Strides(image, width * step, step, 0, by)))
            else:
                at = level if form == "maps" else level * count + k
                strides = map_strides(preds[at], channels)._replace(anchor=0)
                parts[k].append((at, channel * strides.channel if form == "maps" else 0, strides))
            channel += channels
        cell += height * width
    found = []
    for own in parts:
        at_level, starts, strides_of = zip(*own, strict=True)
        found.append(records.Part(at_level, odd(starts), odd(strides_of)))
    return records.Predictions(found[0], found[1] if head.objectness else None, found[-1])


def fill_parts(parts: records.Predictions, tensors: Sequence[Tensor]) -> records.Predictions:
    """What :func:`parts_of` says, with the ``tensors`` of the predictions, or gradients of such layouts, in order."""
    return records.Predictions(*[None if part is None else _filled(part, tensors) for part in parts])


def _filled(part: records.Part, tensors: Sequence[Any]) -> records.Part:
    return part._replace(ptrs=tuple([tensors[at] for at in part.ptrs]))


def lies_as(parts: Sequence[records.Predictions], maps: Maps) -> str:
    """The layout of predictions, or of these and gradients, see ``kernels/picks/views.py``."""
    found = {_layout(part, maps) for each in parts for part in each if part is not None}
    return found.pop() if len(found) == 1 else "strided"


def _layout(part: records.Part, maps: Maps) -> str:
    found = set()
    for by, (_, width) in zip(part.by, maps, strict=True):
        _, row, column, _, channel = [(number - 3) // 2 for number in by]
        found.add(
            "strided"
            if row != width * column
            else "planes"
            if column == 1
            else "channels"
            if channel == 1
            else "strided"
        )
    return found.pop() if len(found) == 1 else "strided"


def tuned_for(head: PickHead, pred: Layout, maps: Maps, lies: str) -> Wishes:
    """What a measurement found for the launches of a head."""
    terms = f"{head.decode}{head.reg_max} {head.assigner} {head.overlap} {head.box} {head.label}"
    largest = max(height * width for height, width in maps)
    return wishes("pick", terms, pred, lies == "planes", pred.shape[0], largest, head.num_classes)


def levels_of(maps: Maps, head: PickHead) -> records.Levels:
    """Maps of such (height, width), as kernels take them."""
    heights, widths = zip(*maps, strict=True)
    begins = (0, *accumulate(height * width for height, width in maps))
    return records.Levels(odd(widths), odd(heights), tuple(head.strides), odd(begins))


class _Plan(NamedTuple):
    """The launches but for their tensors, and the records in them that tensors go into."""

    decode: Launch
    pick: Launch
    settle: Launch
    predictions: records.Predictions
    problem: wish.Problem
    tiles: int  # of an image


@planned
def _plan(form: str, preds: tuple[Layout, ...], key: str, maps: Maps, size: tuple[float, float]) -> _Plan:
    head, batch = pick_head_from_key(key), preds[0].shape[0]
    limit = head.topk2 if head.assigner == "aligned" and head.topk2 != head.topk else None
    spec = spec_of(head, preds[0].dtype)
    numbers = records.Numbers(
        alpha=wish.power(head.alpha),
        beta=wish.power(head.beta),
        small=head.small,
        radius=head.radius,
        reach=reach_of(head),
        overlap_args=head.overlap_args,
    )
    problem = wish.Problem(
        predictions=None,
        levels=levels_of(maps, head),
        frame=site.Frame(head.centre_limit, size[1], size[0], 2 * batch + 3),
        numbers=numbers,
        terms=records.Terms(TERMS[head.overlap].kernel),
    )
    predictions = parts_of(form, preds, key, maps)
    lies = lies_as((predictions,), maps)
    largest = max(height * width for height, width in maps)
    config = pick_config(largest, lies, head.num_classes, tuned_for(head, preds[0], maps, lies))
    first = {
        "levels": problem.levels,
        "frame": problem.frame,
        "numbers": numbers,
        "SPEC": spec,
        "CELLS": PICK_DECODED,
        "BINS": power_of_two(head.reg_max),
        "LAYOUT": _layout(predictions.box, maps),
    }
    tiles = sum(-(-height * width // PICK_DECODED) for height, width in maps)
    picks = {"SPEC": spec, "BLOCK": config.region, "CELLS": PICK_DECODED}
    ends = {"SPEC": spec, "BLOCK": PICK_SETTLED, "K2": 0 if limit is None else power_of_two(limit)}
    return _Plan(
        Launch(boxes.decode_kernel, (batch * tiles,), first, PICK_THREADS, exact=True),
        Launch(pick.pick_kernel, (1,), picks, PICK_THREADS, exact=True),
        Launch(settle.settle_kernel, (1,), ends, PICK_THREADS, exact=True),
        predictions,
        problem,
        tiles,
    )


def spec_of(head: PickHead, dtype: torch.dtype) -> records.Spec:
    """The structure of a head, for predictions of a type."""
    return records.Spec(
        C=head.num_classes,
        REG_MAX=head.reg_max,
        DECODE=head.decode,
        OBJECTNESS=head.objectness,
        ASSIGNER=head.assigner,
        INSIDE=head.inside,
        TOPK=head.topk,
        TOPK2=head.topk2,
        DISTANCE=head.distance,
        SOFT=head.soft,
        ACC=accumulator(dtype)[0],
        K=power_of_two(head.topk),
    )


def workspace_rows(batch: int) -> int:
    """For how many rows a :func:`.launch.workspace` is to be that :func:`pick_launches` takes."""
    return 2 + (batch + 1) // 2


def pick_launches(
    preds: Sequence[Tensor],
    form: str,
    maps: Maps,
    rows: Tensor,
    offsets: Tensor | None,
    head: PickHead,
    size: tuple[float, float],
    workspace: Tensor | None = None,
) -> tuple[list[Launch], records.Decoded, records.Settled]:
    """The launches that settle which row each cell goes to, and the tensors that they leave.

    ``preds`` and ``form`` as :func:`fusedyolo.checks.point_predictions` gives them, maps and image of such (height,
    width). A ``workspace`` has a place for each of :func:`workspace_rows`.
    """
    plan, pred, M = _plan(form, layouts(preds), head.key, maps, size), preds[0], rows.shape[0]
    batch, N, K = pred.shape[0], sum(height * width for height, width in maps), plan.pick.arguments["SPEC"].K
    costs, tiles = (N, plan.tiles) if head.assigner == "simota" else (0, 0)
    acc, bits = accumulator(pred.dtype)[1], torch.int64 if pred.dtype == torch.float64 else torch.int32
    shift = 0 if costs else pick_shift(M)
    left = (M, 1 << shift if shift else 0, K)
    decoded = records.Decoded(
        boxes_ptr=pred.new_empty((batch, N, 4), dtype=acc),
        picker_ptr=pred.new_empty((batch, N), dtype=torch.int32),
        claim_ptr=pred.new_empty((batch, N), dtype=torch.int64),
        row_ptr=pred.new_empty((batch, N), dtype=torch.int32),
        score_ptr=pred.new_empty((batch, N), dtype=acc),
        done_ptr=pred.new_empty(M, dtype=torch.int32),
        cost_ptr=pred.new_empty((batch, costs), dtype=acc),
        list_ptr=pred.new_empty((batch, costs), dtype=torch.int32),
        tiles_ptr=pred.new_empty((batch, tiles, 2), dtype=torch.int32),
        bounds_ptr=pred.new_empty((batch, tiles, 4), dtype=acc),
    )
    picked = records.Picked(
        index_ptr=pred.new_empty((M, K), dtype=torch.int32),
        overlap_ptr=pred.new_empty((M, K), dtype=acc),
        worth_ptr=pred.new_empty((M, 0 if costs else K), dtype=acc),
        clash_ptr=pred.new_empty(M * K if costs else batch * N, dtype=torch.int32),
        part_key_ptr=pred.new_empty(left, dtype=bits),
        part_cell_ptr=pred.new_empty(left, dtype=torch.int32),
        part_overlap_ptr=pred.new_empty(left, dtype=bits),
    )
    settled = records.Settled(
        norm_ptr=pred.new_empty((), dtype=acc),
        counts_ptr=pred.new_empty(2, dtype=torch.int32),
        nans_ptr=pred.new_empty(2, dtype=acc),
    )
    sums = row_maxima(pred.device, workspace_rows(batch), workspace)
    tally = records.Tally(done_counter(pred.device, workspace), sums, sums[1:].view(torch.int32))
    predictions = fill_parts(plan.predictions, preds)
    targets = records.Targets(rows, offsets, None)
    common = {
        "problem": plan.problem._replace(predictions=predictions),
        "targets": targets,
        "M": M,
        "decoded": decoded,
        "picked": picked,
        "tally": tally,
    }
    first = {"predictions": predictions, "targets": targets, "M": M, "decoded": decoded, "tally": tally}
    launches = [
        plan.decode.filled(first),
        _of_rows(plan.pick, M << shift).filled({**common, "shift": shift}),
        _of_rows(plan.settle, M).filled({**common, "settled": settled}),
    ]
    return launches, decoded, settled


def _of_rows(launch: Launch, programs: int) -> Launch:
    """Of as many programs; one where there is no row, which finishes."""
    return replace(launch, grid=(max(1, programs),))


def reach_of(head: PickHead) -> tuple[float, float, float]:
    """How many cells a region has at most, see ``kernels/picks/region.py``: on each axis its pixels over the stride and
    1.25 more, and what rounding may add."""
    inverse = [1 / stride for stride in head.strides]
    return sum(1.001 * i * i for i in inverse), sum(1.3 * i for i in inverse), 1.7 * len(inverse)
