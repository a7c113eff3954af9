"""Which prediction answers for which object, where objects pick among predictions by what these predict.

An :class:`Assigner` says of a chunk of rows what these want and how many, and of pairs the soft scores; taking the best
and settling who keeps what several picked is done here for all of them. Nothing is ever as large as rows times
predictions: rows come by the chunk, a row's picks are ``topk`` indices, and the strongest claim to a prediction is a
running maximum. Rows of an image count in their order, predictions in that of level, row, column.

Places are measured from the middle of a cell. A row's offset from it is a difference of float64 numbers, rounded once
(in float32 ``fma(cx, width, -x)``), so that a tiny object far from the origin keeps its digits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..heads import PickHead
from .overlap import Corners, area, iou
from .pairs import chunks
from .primitives import at_hand, constants, pow_pos
from .rows import Regions, read_rows
from .terms import BOX_TERMS

NONE = -float("inf")  # what a row wants a prediction that it cannot have
INSIDE = 1e-9  # pixels; a cell's middle lies deeper than this in a region
BEYOND = 1.01  # below so many numbers less than reg_max a distance lies
IOU_WEIGHT, IOU_EPS = 3.0, 1e-8  # of SimOTA's cost, 3 (-ln(IoU + 1e-8))
LOWEST_LOG = -100.0  # of the logarithms in its cross-entropies


class Points(NamedTuple):
    """The N cells of all levels."""

    middle: Tensor  # [N, 2] in pixels, float64
    stride: Tensor  # [N] pixels per cell, float64


class Objects(NamedTuple):
    """Target rows, made safe; behind the M rows one of nothing, for predictions that have none."""

    valid: Tensor  # [M] bool: no regions, nor rows that cannot be
    image: Tensor  # [M] int64
    label: Tensor  # [M + 1] int64; -1 of nothing
    centre: Tensor  # [M + 1, 2] in pixels, float64
    sides: Tensor  # [M + 1, 2] in pixels
    weight: Tensor | None = None  # [M + 1], 1 of nothing; None where all are
    regions: Regions | None = None  # in pixels; likewise


class Seen(NamedTuple):
    """What an assigner sees of predictions; nothing of it has a gradient."""

    boxes: Tensor  # [B, N, 4] in pixels, x1, y1, x2, y2 from the middle of the cell
    cls: Tensor  # [B, C, N] logits
    obj: Tensor | None  # [B, N] logits
    points: Points


class Picked(NamedTuple):
    """Who answers for what: this, and no more, is what a loss needs to be told."""

    row: Tensor  # [B, N] int64; -1 for none
    score: Tensor  # [B, N] in [0, 1], the target of the logit of its class; 0 where there is none
    nans: Tensor  # 0-dim, see Assigner
    hidden: Tensor | None  # [B, N] bool: has no row, and its cell has its middle in an ignored region; None: none has


class Wish(NamedTuple):
    """What a chunk of rows wants, each of [rows, N]. Of several tiers all of one come before any of the next, whatever
    their worth; :data:`NONE` is what cannot be.
    """

    worth: Sequence[Tensor]  # how much a row wants a prediction, a tensor a tier
    claim: Sequence[Tensor]  # how strong its claim is where several picked it, likewise
    picks: Tensor  # [rows] int64: so many each picks


class Assigner(NamedTuple):
    """What one kind has of its own."""

    want: Callable[[slice], Wish]  # what the rows of a slice want
    score: Callable[[Tensor], tuple[Tensor, Tensor]]  # of rows [B, N], M for none, those that stay; their soft scores
    nans: Tensor  # 0-dim: NaN if a class logit is that a row had to look at, else 0


def points_of(maps: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device) -> Points:
    """The cells of maps of such (height, width), level by level, row by row."""
    middles, each = [], []
    for (H, W), stride in zip(maps, strides, strict=True):
        x, y = (torch.arange(n, device=device, dtype=torch.float64) for n in (W, H))
        middles.append((torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).flatten(0, 1) + 0.5) * stride)
        each.append(x.new_full((H * W,), stride))
    return Points(torch.cat(middles), torch.cat(each))


def read_objects(
    rows: Tensor,
    head: PickHead,
    batch_size: int,
    size: tuple[float, float],
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> Objects:
    """Target rows [M, 6] of centres and sides relative to an image of ``size`` (height, width), and their weights."""
    read = read_rows(rows, head, batch_size, weights)
    boxes = torch.cat((read.boxes.double(), read.boxes.new_full((1, 4), 0.5, dtype=torch.float64)))
    boxes = boxes * constants((size[1], size[0]) * 2, boxes)
    label = torch.cat((read.label, read.label.new_full((1,), -1)))
    weight = None if read.weight is None else torch.cat((read.weight, read.weight.new_ones(1))).to(dtype)
    regions = None if read.regions is None else read.regions.scaled(size[1], size[0])
    return Objects(read.valid, read.image, label, boxes[:, :2], boxes[:, 2:].to(dtype), weight, regions)


def offsets(centre: Tensor, points: Points, dtype: torch.dtype) -> Tensor:
    """Centres [..., N, 2] or [rows, 1, 2] in pixels, from the middles of the cells."""
    return (centre - points.middle).to(dtype)


def pick(seen: Seen, objects: Objects, head: PickHead) -> Picked:
    """The assignment of all images."""
    M = len(objects.valid)
    with torch.no_grad():
        assigner = _ASSIGNERS[head.assigner](seen, objects, head)
        row, soft = assigner.score(_settle(assigner, objects, seen.boxes.shape[:2], head))
        hidden = None
        if objects.regions is not None:
            hidden = (row == M) & objects.regions.of_points(seen.points.middle.float(), len(row))
        return Picked(torch.where(row < M, row, -1), torch.where(row < M, soft, 0.0), assigner.nans, hidden)


def wishes(seen: Seen, objects: Objects, head: PickHead) -> Iterator[tuple[slice, Wish]]:
    """What rows want, some at a time."""
    assigner = _ASSIGNERS[head.assigner](seen, objects, head)
    for now in _chunks(len(objects.valid), seen.boxes.shape[1]):
        yield now, assigner.want(now)


def _settle(assigner: Assigner, objects: Objects, shape: Sequence[int], head: PickHead) -> Tensor:
    """[B, N] int64: the row that each prediction goes to; M where there is none."""
    (B, N), M, image = shape, len(objects.valid), objects.image
    nothing = torch.full((B, N), M, device=image.device)
    picks = image.new_zeros(B * N + 1)  # how many rows picked a prediction; the last place is none
    picker = image.new_full((B * N + 1,), M)  # the first of them
    claims: list[tuple[Tensor, Tensor]] = []
    for now in _chunks(M, N):
        wish = assigner.want(now)
        index, worth = best(wish.worth, min(head.topk, N))
        order = torch.arange(index.shape[1], device=index.device)
        chosen = (worth > NONE) & (order < wish.picks[:, None])
        place = torch.where(chosen, image[now, None] * N + index, B * N).flatten()
        row = torch.arange(now.start, now.start + len(index), device=index.device)[:, None]
        picks.scatter_add_(0, place, torch.ones_like(place))
        picker.scatter_reduce_(0, place, row.expand_as(index).flatten(), "amin")
        if head.region == "range":
            own = torch.zeros_like(wish.worth[0]).scatter_reduce(1, index, chosen.to(worth.dtype), "amax")
            wish = wish._replace(claim=[torch.where(own > 0, claim, NONE) for claim in wish.claim])
        if not claims:
            claims = [(torch.full_like(nothing, NONE, dtype=claim.dtype), nothing) for claim in wish.claim]
        claims = [_running(*had, claim, image[now], row, M) for had, claim in zip(claims, wish.claim, strict=True)]
    owner = nothing
    for strength, who in reversed(claims):
        owner = torch.where(strength > NONE, who, owner)
    picks, picker = (each[:-1].view(B, N) for each in (picks, picker))
    return torch.where(picks > 1, owner, picker)


def _chunks(M: int, N: int) -> Iterator[slice]:
    """Those of M rows, without the one behind them."""
    for now in chunks(M, N):
        yield slice(now.start, min(now.stop, M))


def best(tiers: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k predictions that each row wants most, best first, equals by their index: indices and worth, [rows, k].

    Of each of the ``tiers`` [rows, N] all come before those of the next.
    """
    found = [_largest(tier, k) for tier in tiers]
    index, worth = (torch.cat(each, 1) for each in zip(*found, strict=True))
    order = (worth == NONE).to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
    return index.gather(1, order), worth.gather(1, order)


def _largest(worth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the k largest of each row, largest first, equals by their index, whatever topk does."""
    if at_hand(worth):
        row, column = (worth > NONE).nonzero(as_tuple=True)
        count = row.bincount(minlength=len(worth))
        width = max(k, int(count.max())) if len(worth) else k
        if 2 * width < worth.shape[1]:  # most are nothing: the others side by side
            place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
            columns = worth.new_zeros(len(worth), width, dtype=torch.int64).index_put((row, place), column)
            index, values = _largest_of(
                worth.new_full((len(worth), width), NONE).index_put((row, place), worth[row, column]), k
            )
            return columns.gather(1, index), values
    return _largest_of(worth, k)


def _largest_of(worth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`_largest`, whatever they are."""
    N = worth.shape[1]
    least = worth.topk(k, 1).values[:, -1:]
    more, equal = worth > least, worth == least
    chosen = more | (equal & (equal.cumsum(1) <= k - more.sum(1, keepdim=True)))
    index = N - torch.where(chosen, N - torch.arange(N, device=worth.device), 0).topk(k, 1).values  # ascending
    values, order = worth.gather(1, index).sort(dim=1, descending=True, stable=True)
    return index.gather(1, order), values


def _running(most: Tensor, who: Tensor, claim: Tensor, image: Tensor, row: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """The strongest claim [B, N] to each prediction so far and the first row that has it, with those of more rows."""
    top, first = torch.full_like(most, NONE), torch.full_like(who, M)
    if at_hand(claim):  # most are none
        own, cell = (claim > NONE).nonzero(as_tuple=True)
        at, claim = image[own] * most.shape[1] + cell, claim[own, cell]
        top.view(-1).scatter_reduce_(0, at, claim, "amax")
        first.view(-1).scatter_reduce_(0, at, torch.where(claim == top.view(-1)[at], row[own, 0], M), "amin")
    else:
        at = image[:, None].expand_as(claim)
        top = top.scatter_reduce(0, at, claim, "amax")
        first = first.scatter_reduce(0, at, torch.where(claim == top.index_select(0, image), row, M), "amin")
    stronger = top > most
    return torch.where(stronger, top, most), torch.where(stronger, first, who)


def _similarity(boxes: Tensor, off: Tensor, sides: Tensor, head: PickHead) -> Tensor:
    """1 - the term of predicted boxes [..., 4] with true ones at ``off`` [..., 2] of such sides; 0 where it is NaN."""
    half = sides / 2
    value = 1 - BOX_TERMS[head.overlap](boxes, torch.cat((off - half, off + half), -1), head.overlap_args)
    return torch.where(value > 0, value, 0.0)


# ---- task-aligned


def _aligned(seen: Seen, objects: Objects, head: PickHead) -> Assigner:
    """Task-aligned assignment (Feng et al. 2021, arXiv 2108.07755), as YOLOv8 and its kin train."""
    M, ranged = len(objects.valid), head.region == "range"

    def metric(logit: Tensor, overlap: Tensor) -> Tensor:
        """How well a prediction is aligned with a row; 0 where it is NaN."""
        value = pow_pos(logit.sigmoid(), head.alpha, 0.0**head.alpha) * pow_pos(overlap, head.beta, 0.0**head.beta)
        return torch.where(value > 0, value, 0.0)

    def taken(wanted: Tensor, overlap: Tensor, can: Tensor) -> tuple[Tensor, Tensor]:
        """Worth and claim of pairs, of those that ``can`` be."""
        can = can & (overlap > 0) if head.beta > 0 else can
        return torch.where(can & (wanted > 0), wanted, NONE), torch.where(can, overlap, NONE)

    def want(now: slice) -> Wish:
        image, label, sides = objects.image[now], objects.label[now], objects.sides[now]
        region = (
            _in_range(objects, now, seen.points, head) if ranged else _in_region(objects, now, seen.points, head.small)
        )

        def wanted(cells: Tensor) -> tuple[Tensor, Tensor]:
            """Worth and claim of some cells."""
            if at_hand(cells):  # most pairs need no arithmetic
                row, cell = cells.nonzero(as_tuple=True)
                points = Points(seen.points.middle[cell], seen.points.stride[cell])
                off = offsets(objects.centre[now][row], points, sides.dtype)
                overlap = _similarity(seen.boxes[image[row], cell], off, sides[row], head)
                found = taken(metric(seen.cls[image[row], label[row], cell], overlap), overlap, row >= 0)
                nothing = torch.full(cells.shape, NONE, dtype=sides.dtype)
                worth, claim = (nothing.index_put((row, cell), each) for each in found)
                return worth, claim
            off = offsets(objects.centre[now, None], seen.points, sides.dtype)
            overlap = _similarity(seen.boxes.index_select(0, image), off, sides[:, None], head)
            overlap = torch.where(cells, overlap, 0.0)
            return taken(metric(seen.cls[image, label], overlap), overlap, cells)

        worth, claim = wanted(region & objects.valid[now, None])
        picks = torch.full_like(image, head.topk)
        if not ranged:
            return Wish((worth,), (claim,), picks)
        without = (worth == NONE).all(1) & objects.valid[now]
        other, other_claim = wanted(without[:, None].expand_as(worth))
        return Wish((worth, other), (torch.maximum(claim, other_claim),), torch.where(without, 1, picks))

    def score(row: Tensor) -> tuple[Tensor, Tensor]:
        off = offsets(objects.centre[row], seen.points, seen.boxes.dtype)
        overlap = _similarity(seen.boxes, off, objects.sides[row], head)
        wanted = metric(seen.cls.gather(1, objects.label[row].clamp(min=0)[:, None])[:, 0], overlap)
        if head.topk2 is not None and head.topk2 != head.topk:
            row = torch.where(_ranks(wanted, row) < head.topk2, row, M)
        return row, _soft_scores(wanted, overlap, row, M)

    return Assigner(want, score, seen.cls.new_zeros(()))  # the class loss looks at all of them


def _in_region(objects: Objects, now: slice, points: Points, small: float) -> Tensor:
    """[rows, N]: whether the middle of a cell lies in the box of a row, of which a side below ``small`` counts as so
    much. In float32 as the peer takes the steps, whatever the compute type: edges of boxes in whole pixels lie on the
    middles of cells, and which side of these they fall on is a matter of its rounding.
    """
    centre, half = objects.centre[now].float(), objects.sides[now].float() / 2
    low, high = centre - half, centre + half
    centre, side = (low + high) / 2, high - low
    half = torch.where(side < small, small, side) / 2
    low, high = centre - half, centre + half
    axes = zip(points.middle.float().unbind(1), low[:, None].unbind(2), high[:, None].unbind(2), strict=True)
    x, y = ((middle - low > INSIDE) & (high - middle > INSIDE) for middle, low, high in axes)
    return x & y


def _in_range(objects: Objects, now: slice, points: Points, head: PickHead) -> Tensor:
    """[rows, N]: whether the middle of a cell lies in the box of a row, or on its border, and distributions can say how
    far each side is from there. In float32, likewise.
    """
    centre, half = objects.centre[now, None].float(), objects.sides[now, None].float() / 2
    middle, stride = points.middle.float(), points.stride.float()[:, None]
    before, behind = (middle - (centre - half)) / stride, ((centre + half) - middle) / stride
    most = head.reg_max - BEYOND
    return ((torch.minimum(before, behind) >= 0) & (torch.maximum(before, behind) <= most)).all(-1)


def _ranks(wanted: Tensor, row: Tensor) -> Tensor:
    """[B, N]: how many predictions of its row are wanted more than each, or as much and come first."""
    order = wanted.flatten().sort(descending=True, stable=True).indices
    rows, by_row = row.flatten()[order].sort(stable=True)
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    return torch.empty_like(rank).scatter(0, order[by_row], rank).view(row.shape)


def _soft_scores(wanted: Tensor, overlap: Tensor, row: Tensor, M: int) -> Tensor:
    """[B, N]: wanted times the largest overlap of the row's predictions, over how much the best of them is wanted."""
    at = row.flatten()
    most, widest = (
        each.new_zeros(M + 1).scatter_reduce(0, at, each.flatten(), "amax")[row] for each in (wanted, overlap)
    )
    return wanted * widest / (most + 1e-9)


# ---- SimOTA


def _simota(seen: Seen, objects: Objects, head: PickHead) -> Assigner:
    """Simplified optimal transport (Ge et al. 2021, arXiv 2107.08430), as YOLOX trains."""
    assert seen.obj is not None
    (B, N), M = seen.obj.shape, len(objects.valid)
    apart, shared = class_costs(seen.cls, seen.obj)
    edges = Corners(*seen.boxes.permute(2, 0, 1).contiguous())

    def geometry(now: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Offsets, the cells of each row's own, and those that it makes candidates."""
        sides = objects.sides[now, None]
        off = offsets(objects.centre[now, None], seen.points, sides.dtype)
        reach = (head.radius * seen.points.stride).to(sides.dtype)[:, None]
        near = (off.abs() < reach).all(-1) & objects.valid[now, None]
        if not head.inside:
            return off, near, near
        inside = (off.abs() < sides / 2).all(-1) & objects.valid[now, None]
        return off, near & inside, near | inside

    candidate = torch.zeros(B, N, dtype=torch.uint8, device=seen.cls.device)
    for now in _chunks(M, N):
        found = geometry(now)[2].to(torch.uint8)
        candidate.scatter_reduce_(0, objects.image[now, None].expand_as(found), found, "amax")

    def want(now: slice) -> Wish:
        image = objects.image[now]
        off, own, _ = geometry(now)
        possible = (candidate.index_select(0, image) > 0) & objects.valid[now, None]
        overlap = _ious(Corners(*(edge.index_select(0, image) for edge in edges)), off, objects.sides[now, None])
        cost = shared.index_select(0, image) + apart[image, objects.label[now]]
        cost = cost - IOU_WEIGHT * (overlap + IOU_EPS).log()
        possible = possible & ~cost.isnan()
        largest = torch.where(possible, overlap, 0.0).topk(min(head.topk, N), 1).values
        worth = [torch.where(possible & which, -cost, NONE) for which in (own, ~own)]
        return Wish(worth, worth, largest.sum(1).long().clamp(min=1))

    def score(row: Tensor) -> tuple[Tensor, Tensor]:
        off = offsets(objects.centre[row], seen.points, seen.boxes.dtype)
        return row, _ious(edges, off, objects.sides[row])

    nans = torch.where((candidate > 0) & shared.isnan(), shared, 0.0).sum()
    return Assigner(want, score, nans)


def _ious(boxes: Corners, off: Tensor, sides: Tensor) -> Tensor:
    """IoU of boxes [..., N] with true ones at ``off`` [..., N, 2] of such sides; 0 where it is NaN."""
    (x1, y1), (x2, y2) = (off - sides / 2).unbind(-1), (off + sides / 2).unbind(-1)
    areas = (boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1)
    value = iou(boxes, Corners(x1, y1, x2, y2), areas, area(sides))
    return torch.where(value > 0, value, 0.0)


def class_costs(cls: Tensor, obj: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of q = sqrt(sigmoid(cls) sigmoid(obj)) with a one-hot target: the sum over the classes of a cell
    is what they share, [B, N], plus what tells the true class apart, [B, C, N].
    """
    log_q = (logsigmoid(cls) + logsigmoid(obj)[:, None]) / 2
    miss = (-torch.expm1(log_q)).log().clamp(min=LOWEST_LOG)
    return miss - log_q.clamp(min=LOWEST_LOG), -miss.sum(1)


_ASSIGNERS = {"aligned": _aligned, "simota": _simota}
