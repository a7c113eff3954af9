"""Cells that predict a box each: where predictions lie, and the launches that settle what goes to which object."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..heads import PickHead, branches_from_key, pick_head_from_key
from ..kernels.launch import (
    CANDIDATE_REGISTERS,
    MOST_REGISTERS,
    PICK_DECODED,
    PICK_SETTLED,
    PICK_THREADS,
    PRICE_THREADS,
    WIDE_THREADS,
    Wishes,
    pick_config,
    pick_shift,
    power_of_two,
    price_tile,
)
from ..kernels.levels import Strides
from ..kernels.picks import costs, decode, pick, records, settle, site, wish
from ..terms import TERMS
from ..tuned import wishes
from .launch import COUNTERS, Launch, Layout, accumulator, counters_and_maxima, layouts, odd, planned
from .steps import Outline, Slot, Steps
from .strides import map_strides

Maps = tuple[tuple[int, int], ...]
R = TypeVar("R")


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


def fill_parts(parts: records.Predictions, tensors: Sequence[Any]) -> records.Predictions:
    """What :func:`parts_of` says, with the ``tensors`` of the predictions, or gradients of such layouts, in order; or
    with slots for them."""
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


class Found(NamedTuple):
    """Of a plan, what the launches that settle which row each cell goes to leave of a branch."""

    decoded: records.Decoded
    settled: records.Settled


def in_branches(items: Sequence[R], count: int) -> list[Sequence[R]]:
    """Those of each of so many branches, of which each has as many."""
    each = len(items) // count
    return [items[i * each : (i + 1) * each] for i in range(count)]


def share_of(own: Outline, name: str, i: int, each: int, dtype: torch.dtype) -> Slot:
    """Of a tensor that has ``each`` numbers a branch, those of the i-th."""
    slot = own.tensor(name)
    return slot.after(i * each * dtype.itemsize, dtype) if i else slot


class _Branches:
    """What is said of each of the branches of a plan."""

    def __init__(self, own: Outline, batch: int, N: int):
        self.own, self.batch, self.N = own, batch, N

    def tally(self, i: int) -> records.Tally:
        """Of zeros of :func:`workspace_rows`; the first has counters apart, which others of our launches count in."""
        sums, size, each = self.own.tensor("sums"), torch.int64.itemsize, workspace_rows(self.batch)
        first = i * each
        done = sums.after((first + each - COUNTERS) * size, torch.int32)
        return records.Tally(
            done if i else self.own.tensor("done"),
            sums.after(first * size, torch.int64) if i else sums,
            sums.after((first + 1) * size, torch.int32),
        )

    def settled(self, i: int, acc: torch.dtype) -> records.Settled:
        """Of the i-th."""
        return records.Settled(
            share_of(self.own, "norm", i, 2, acc),
            share_of(self.own, "counts", i, 2, torch.int32),
            self.own.scratch(acc, (2,)),
        )

    def decoded(self, i: int, acc: torch.dtype, costs: int, tiles: int) -> records.Decoded:
        """Of the i-th, of which so many cells of an image may have costs, and so many tiles candidates."""
        own, batch, N = self.own, self.batch, self.N
        return records.Decoded(
            boxes_ptr=own.scratch(acc, (batch, N, 4)),
            picker_ptr=own.scratch(torch.int32, (batch, N)),
            claim_ptr=own.scratch(torch.int64, (batch, N)),
            row_ptr=share_of(own, "row", i, batch * N, torch.int32),
            score_ptr=share_of(own, "score", i, batch * N, acc),
            done_ptr=own.scratch_of_rows(torch.int32),
            cost_ptr=own.scratch(acc, (batch, costs)),
            list_ptr=own.scratch(torch.int32, (batch, costs)),
            tiles_ptr=own.scratch(torch.int32, (batch, tiles, 2)),
            bounds_ptr=own.scratch(acc, (batch, tiles, 4)),
        )

    def picked(self, spec: records.Spec, acc: torch.dtype, programs: int) -> records.Picked:
        """Of one whose rows have so many programs, or 0 where it is one."""
        own, K, priced = self.own, spec.K, spec.ASSIGNER == "simota"
        bits = torch.int64 if acc == torch.float64 else torch.int32
        return records.Picked(
            index_ptr=own.scratch_of_rows(torch.int32, K),
            overlap_ptr=own.scratch_of_rows(acc, K),
            worth_ptr=own.scratch_of_rows(acc, 0 if priced else K),
            clash_ptr=own.scratch_of_rows(torch.int32, K)
            if priced
            else own.scratch(torch.int32, (self.batch * self.N,)),
            part_key_ptr=own.scratch_of_rows(bits, programs, K),
            part_cell_ptr=own.scratch_of_rows(torch.int32, programs, K),
            part_overlap_ptr=own.scratch_of_rows(bits, programs, K),
        )


def picking(
    own: Outline,
    form: str,
    preds: tuple[Layout, ...],
    key: str,
    maps: Maps,
    size: tuple[float, float],
    shift: int,
) -> tuple[list[Launch], list[Found]]:
    """The launches that settle which row each cell goes to, of all branches of a ``key``, and what they leave of each.

    ``preds`` of a ``form`` as :func:`fusedyolo.checks.point_predictions` gives them, branch by branch, maps and image
    of such (height, width), two to the power of ``shift`` programs of a row, see :func:`shift_for`.

    Calls bring what :func:`brought` says, and ``row`` and ``score`` [branches * B, N], ``norm`` and ``counts``
    [branches * 2] to be filled, see :class:`~fusedyolo.kernels.picks.records.Decoded` and ``Settled``.
    """
    heads, batch = branches_from_key(key), preds[0].shape[0]
    head = heads[0]
    specs = tuple([spec_of(each, preds[0].dtype) for each in heads])
    at = [parts_of(form, each, head.key, maps) for each in in_branches(preds, len(heads))]
    filled = in_branches(own.tensors("preds", len(preds)), len(heads))
    predictions = [fill_parts(part, each) for part, each in zip(at, filled, strict=True)]
    lies = lies_as(at, maps)
    largest = max(height * width for height, width in maps)
    tuned = tuned_for(head, preds[0], maps, lies)
    config = pick_config(largest, lies, head.num_classes, preds[0].dtype.itemsize, tuned)
    N, tiles = sum(height * width for height, width in maps), _tiles(maps)
    priced, acc = head.assigner == "simota", accumulator(preds[0].dtype)[1]
    each = _Branches(own, batch, N)
    problem = wish.Problem(
        predictions=None,
        levels=levels_of(maps, head),
        frame=site.Frame(head.centre_limit, size[1], size[0], 2 * batch + 3),
        numbers=records.Numbers(
            alpha=wish.power(head.alpha),
            beta=wish.power(head.beta),
            small=head.small,
            radius=head.radius,
            reach=reach_of(head),
            overlap_args=head.overlap_args,
        ),
        terms=records.Terms(TERMS[head.overlap].kernel),
    )
    branches = [
        records.Branch(
            problem._replace(predictions=predictions[i]),
            each.decoded(i, acc, *((N, tiles) if priced else (0, 0))),
            each.picked(spec, acc, 1 << shift if shift else 0),
            each.tally(i),
            each.settled(i, acc),
        )
        for i, spec in enumerate(specs)
    ]
    targets = records.Targets(own.tensor("rows"), own.tensor("offsets"), None, own.tensor("weights"))
    common = {"targets": targets, "M": own.M, "SPECS": specs}
    boxes_lie = {_layout(each.box, maps) for each in at}
    decoding = common | {
        "branches": tuple([branch._replace(picked=None, settled=None) for branch in branches]),
        "CELLS": PICK_DECODED,
        "BINS": power_of_two(head.reg_max),
        "LAYOUT": boxes_lie.pop() if len(boxes_lie) == 1 else "strided",
    }
    prices = {name: decoding[name] for name in ("branches", "SPECS", "CELLS")}
    prices["ACROSS"], threads = price_tile(head.num_classes, PRICE_THREADS)
    picks = common | {
        "branches": tuple([branch._replace(settled=None) for branch in branches]),
        "shift": shift,
        "BLOCK": config.region,
        "CELLS": PICK_DECODED,
    }
    ends = common | {
        "branches": tuple(branches),
        "BLOCK": PICK_THREADS if priced else PICK_SETTLED,  # of SimOTA cells that several picked: one a thread
        "K2S": tuple([0 if (limit := _limit(each)) is None else power_of_two(limit) for each in heads]),
    }
    most = MOST_REGISTERS if acc == torch.float64 else None
    programs, count = (len(heads) * batch * tiles,), len(heads)
    wide = PICK_THREADS if most is None else WIDE_THREADS
    boxes = Launch(decode.decode_kernel, programs, decoding, wide, most, exact=True)
    cost = Launch(costs.cost_kernel, programs, prices, threads, most, exact=True)
    # where there is no row, one program finishes
    limit = CANDIDATE_REGISTERS if priced and most is None else most
    select = Launch(pick.pick_kernel, lambda M: (max(1, M << shift) * count,), picks, PICK_THREADS, limit, exact=True)
    end = Launch(settle.settle_kernel, lambda M: (max(1, M) * count,), ends, PICK_THREADS, most, exact=True)
    found = [Found(branch.decoded, branch.settled) for branch in branches]
    return [boxes, *([cost] if priced else ()), select, end], found


def _limit(head: PickHead) -> int | None:
    """How many cells a row keeps, if not all that it has."""
    return head.topk2 if head.assigner == "aligned" and head.topk2 != head.topk else None


def _tiles(maps: Maps) -> int:
    """Programs of an image that decode its boxes."""
    return sum(-(-height * width // PICK_DECODED) for height, width in maps)


def shift_for(head: PickHead, rows: int) -> int:
    """Programs of a row that picks cells, two to this power."""
    return 0 if head.assigner == "simota" else pick_shift(rows)


def brought(
    preds: Sequence[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    branches: int = 1,
    workspace: Tensor | None = None,
    weights: Tensor | None = None,
) -> dict[str, Any]:
    """What calls of so many ``branches`` bring to :func:`picking`; a ``workspace`` has a place for each of
    :func:`workspace_rows`, ``weights`` are those of the rows.
    """
    done, sums = counters_and_maxima(rows.device, workspace_rows(preds[0].shape[0], branches), workspace)
    return {"preds": preds, "rows": rows, "offsets": offsets, "weights": weights, "done": done, "sums": sums}


def spec_of(head: PickHead, dtype: torch.dtype) -> records.Spec:
    """The structure of a head, for predictions of a type."""
    return records.Spec(
        C=head.num_classes,
        REG_MAX=head.reg_max,
        DECODE=head.decode,
        OBJECTNESS=head.objectness,
        ASSIGNER=head.assigner,
        INSIDE=head.inside,
        REGION=head.region,
        TOPK=head.topk,
        TOPK2=head.topk2,
        DISTANCE=head.distance,
        SOFT=head.soft,
        ACC=accumulator(dtype)[0],
        K=power_of_two(head.topk),
    )


def workspace_rows(batch: int, branches: int = 1) -> int:
    """For how many rows a :func:`.launch.workspace` is to be that the launches of so many branches take: for each the
    int64s of a :class:`~fusedyolo.kernels.picks.records.Tally`, its counters at the end.
    """
    return branches * (2 + (batch + 1) // 2 + COUNTERS)


@planned
def _plan(form: str, preds: tuple[Layout, ...], key: str, maps: Maps, size: tuple[float, float], shift: int) -> Steps:
    own = Outline()
    return own.steps(*picking(own, form, preds, key, maps, size, shift)[0])


def pick_launches(
    preds: Sequence[Tensor],
    form: str,
    maps: Maps,
    rows: Tensor,
    offsets: Tensor | None,
    head: PickHead,
    size: tuple[float, float],
) -> tuple[list[Launch], records.Decoded, records.Settled]:
    """The launches of :func:`picking` alone, and the tensors that they leave."""
    pred, M = preds[0], rows.shape[0]
    steps = _plan(form, layouts(preds), head.key, maps, size, shift_for(head, M))
    places, acc = (pred.shape[0], sum(height * width for height, width in maps)), accumulator(pred.dtype)[1]
    launches = steps.launches(
        rows.device,
        M,
        **brought(preds, rows, offsets),
        row=pred.new_empty(places, dtype=torch.int32),
        score=pred.new_empty(places, dtype=acc),
        norm=pred.new_empty(2, dtype=acc),
        counts=pred.new_empty(2, dtype=torch.int32),
    )
    (branch,) = launches[-1].arguments["branches"]
    return launches, branch.decoded, branch.settled


def reach_of(head: PickHead) -> tuple[float, float, float]:
    """How many cells a region has at most, see ``kernels/picks/region.py``: on each axis its pixels over the stride and
    1.25 more, and what rounding may add."""
    inverse = [1 / stride for stride in head.strides]
    return sum(1.001 * i * i for i in inverse), sum(1.3 * i for i in inverse), 1.7 * len(inverse)
