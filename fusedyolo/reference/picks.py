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
from .pick_pairs import Pairs, Points, cells, pairs_of, pairs_within, row_chunks, widest
from .primitives import at_hand, constants, pow_pos
from .rows import Regions, read_rows
from .terms import BOX_TERMS

NONE = -float("inf")  # what a row wants a prediction that it cannot have
INSIDE = 1e-9  # pixels; a cell's middle lies deeper than this in a region
BEYOND = 1.01  # below so many numbers less than reg_max a distance lies
IOU_WEIGHT, IOU_EPS = 3.0, 1e-8  # of SimOTA's cost, 3 (-ln(IoU + 1e-8))
LOWEST_LOG = -100.0  # of the logarithms in its cross-entropies


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
    """What some rows want. Of several tiers all of one come before any of the next, whatever their worth; :data:`NONE`
    is what cannot be.
    """

    pairs: Pairs
    worth: Sequence[Tensor]  # [P]: how much a row wants a prediction, a tensor a tier
    claim: Sequence[Tensor]  # [P]: how strong its claim is where several picked it, likewise
    picks: Tensor  # [rows] int64: so many each picks


class Assigner(NamedTuple):
    """What one kind has of its own."""

    wishes: Callable[[], Iterator[Wish]]  # of all rows, some at a time
    score: Callable[[Tensor], tuple[Tensor, Tensor]]  # of rows [B, N], M for none, those that stay; their soft scores
    nans: Tensor  # 0-dim: NaN if a class logit is that a row had to look at, else 0


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


def offsets(centre: Tensor, middle: Tensor, dtype: torch.dtype) -> Tensor:
    """Centres [..., 2] in pixels, from the middles of cells; float64 both."""
    return (centre - middle).to(dtype)


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


def wishes(seen: Seen, objects: Objects, head: PickHead) -> Iterator[Wish]:
    """What rows want, some at a time."""
    yield from _ASSIGNERS[head.assigner](seen, objects, head).wishes()


def _settle(assigner: Assigner, objects: Objects, shape: Sequence[int], head: PickHead) -> Tensor:
    """[B, N] int64: the row that each prediction goes to; M where there is none."""
    (B, N), M, image = shape, len(objects.valid), objects.image
    nothing = torch.full((B, N), M, device=image.device)
    picks = image.new_zeros(B * N + 1)  # how many rows picked a prediction; the last place is none
    picker = image.new_full((B * N + 1,), M)  # the first of them
    claims: list[tuple[Tensor, Tensor]] = []
    for wish in assigner.wishes():
        pair, worth = best(wish, min(head.topk, N))
        chosen = (worth > NONE) & (torch.arange(pair.shape[1], device=image.device) < wish.picks[:, None])
        at, row = image[wish.pairs.row] * N + wish.pairs.cell, wish.pairs.row
        place = torch.where(chosen, at[pair], B * N).flatten()
        picks = picks.scatter_add(0, place, torch.ones_like(place))
        picker = picker.scatter_reduce(0, place, row[pair].flatten(), "amin")
        claim = wish.claim
        if head.region == "range":
            own = at.new_zeros(len(at) + 1).scatter(0, torch.where(chosen, pair, len(at)).flatten(), 1)[:-1]
            claim = [torch.where(own > 0, each, NONE) for each in claim]
        if not claims:
            claims = [(torch.full_like(nothing, NONE, dtype=each.dtype), nothing) for each in claim]
        claims = [_running(*had, each, at, row, M) for had, each in zip(claims, claim, strict=True)]
    owner = nothing
    for strength, who in reversed(claims):
        owner = torch.where(strength > NONE, who, owner)
    picks, picker = (each[:-1].view(B, N) for each in (picks, picker))
    return torch.where(picks > 1, owner, picker)


def best(wish: Wish, k: int) -> tuple[Tensor, Tensor]:
    """The k pairs that each row wants most, best first, equals by their order: which, and worth, [rows, k].

    Of each tier all come before those of the next. What cannot be is any pair, or -1.
    """
    table = wish.pairs.table
    found = [largest_of(torch.where(table < 0, NONE, worth[table]), k) for worth in wish.worth]
    index, worth = (torch.cat(each, 1) for each in zip(*found, strict=True))
    if len(found) > 1:
        order = (worth == NONE).to(torch.uint8).sort(dim=1, stable=True).indices[:, :k]
        index, worth = index.gather(1, order), worth.gather(1, order)
    return table.gather(1, index), worth


def largest_of(worth: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the k largest of each row, largest first, equals by their index, whatever topk does."""
    N = worth.shape[1]
    if at_hand(worth):
        values, index = worth.topk(min(k + 1, N), 1)
        if not ((values[:, 1:] == values[:, :-1]) & (values[:, 1:] > NONE)).any():  # no equals
            return index[:, :k], values[:, :k]
    least = worth.topk(k, 1).values[:, -1:]
    more, equal = worth > least, worth == least
    chosen = more | (equal & (equal.cumsum(1) <= k - more.sum(1, keepdim=True)))
    index = N - torch.where(chosen, N - torch.arange(N, device=worth.device), 0).topk(k, 1).values  # ascending
    values, order = worth.gather(1, index).sort(dim=1, descending=True, stable=True)
    return index.gather(1, order), values


def _running(most: Tensor, who: Tensor, claim: Tensor, at: Tensor, row: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """The strongest claim [B, N] to each prediction so far and the first row that has it, with those of pairs [P], to
    the predictions ``at``.
    """
    top = torch.full_like(most, NONE).flatten().scatter_reduce(0, at, claim, "amax")
    row = torch.where(claim == top[at], row, M)
    first = torch.full_like(who, M).flatten().scatter_reduce(0, at, row, "amin").view(who.shape)
    stronger = top.view(most.shape) > most
    return torch.where(stronger, top.view(most.shape), most), torch.where(stronger, first, who)


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

    def regions() -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some rows, and the columns [rows, .] and the lines [rows, .] that a cell they can have lies in: so many that
        their pairs fit a chunk, with as many places for each row as one of them has cells.
        """
        points = seen.points
        few = at_hand(points.stride) and not ranged  # there a row without a cell is to look at all
        for now in row_chunks(M, len(points.columns.stride) + len(points.before) if few else len(points.stride)):
            x, y = _in_range(objects, now, points, head) if ranged else _in_region(objects, now, points, head.small)
            y = y & objects.valid[now, None]
            most = widest(x, y, points) if few else len(points.stride)
            for part in row_chunks(len(y), most) if most else ():
                yield slice(now.start + part.start, now.start + part.stop), x[part], y[part]

    def wanted(pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Worth and claim."""
        row, cell, image = pairs.row, pairs.cell, objects.image[pairs.row]
        off = offsets(objects.centre[row], seen.points.middle[cell], objects.sides.dtype)
        overlap = _similarity(seen.boxes[image, cell], off, objects.sides[row], head)
        overlap = torch.where(pairs.can, overlap, 0.0)
        return taken(metric(seen.cls[image, objects.label[row], cell], overlap), overlap, pairs.can)

    def wishes() -> Iterator[Wish]:
        k = min(head.topk, len(seen.points.stride))
        for now, x, y in regions():
            pairs = pairs_within(now, x, y, seen.points, k)
            worth, claim = wanted(pairs)
            picks = torch.full_like(objects.image[now], head.topk)
            if ranged:
                has = picks.new_zeros(len(picks)).index_add(0, pairs.row - now.start, (worth > NONE).long())
                without = (has == 0) & objects.valid[now]
                pairs = pairs_within(now, x | without[:, None], y | without[:, None], seen.points, k)
                worth, claim = wanted(pairs)
                picks = torch.where(without, 1, picks)
            if len(pairs.row):
                yield Wish(pairs, (worth,), (claim,), picks)

    def score(row: Tensor) -> tuple[Tensor, Tensor]:
        off = offsets(objects.centre[row], seen.points.middle, seen.boxes.dtype)
        overlap = _similarity(seen.boxes, off, objects.sides[row], head)
        wanted = metric(seen.cls.gather(1, objects.label[row].clamp(min=0)[:, None])[:, 0], overlap)
        if head.topk2 is not None and head.topk2 != head.topk:
            row = torch.where(_ranks(wanted, row) < head.topk2, row, M)
        return row, _soft_scores(wanted, overlap, row, M)

    return Assigner(wishes, score, seen.cls.new_zeros(()))  # the class loss looks at all of them


def _in_region(objects: Objects, now: slice, points: Points, small: float) -> tuple[Tensor, Tensor]:
    """[rows, columns] and [rows, lines]: whether their middle lies in the box of a row, of which a side below ``small``
    counts as so much. In float32 as the peer takes the steps, whatever the compute type: edges of boxes in whole pixels
    lie on the middles of cells, and which side of these they fall on is a matter of its rounding.
    """
    centre, half = objects.centre[now].float(), objects.sides[now].float() / 2
    low, high = centre - half, centre + half
    centre, side = (low + high) / 2, high - low
    half = torch.where(side < small, small, side) / 2
    x, y = (
        (lines.middle.float() - low[:, None] > INSIDE) & (high[:, None] - lines.middle.float() > INSIDE)
        for lines, low, high in zip((points.columns, points.lines), *_by_axis(centre, half), strict=True)
    )
    return x, y


def _by_axis(centre: Tensor, half: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The lower and the upper edges [rows] of boxes on each axis."""
    return (centre - half).unbind(1), (centre + half).unbind(1)


def _in_range(objects: Objects, now: slice, points: Points, head: PickHead) -> tuple[Tensor, Tensor]:
    """[rows, columns] and [rows, lines]: whether their middle lies in the box of a row, or on its border, and
    distributions can say how far each side is from there. In float32, likewise.
    """
    centre, half = objects.centre[now].float(), objects.sides[now].float() / 2
    found, most = [], head.reg_max - BEYOND
    for lines, low, high in zip((points.columns, points.lines), *_by_axis(centre, half), strict=True):
        middle, stride = lines.middle.float(), lines.stride.float()
        before, behind = (middle - low[:, None]) / stride, (high[:, None] - middle) / stride
        found.append((torch.minimum(before, behind) >= 0) & (torch.maximum(before, behind) <= most))
    return found[0], found[1]


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
    edges = Corners(*seen.boxes.permute(2, 0, 1).contiguous())

    def near(now: slice) -> tuple[Tensor, Tensor]:
        """[rows, N] bool: the cells of each row's own, and those that it makes candidates."""
        centre, half = objects.centre[now], objects.sides[now] / 2
        close, within = [], []
        for axis, lines in enumerate((seen.points.columns, seen.points.lines)):
            off = offsets(centre[:, axis, None], lines.middle, half.dtype).abs()
            close.append(off < (head.radius * lines.stride).to(half.dtype))
            within.append(off < half[:, axis, None])
        own = cells(close[0], close[1] & objects.valid[now, None], seen.points)
        if not head.inside:
            return own, own
        inside = cells(within[0], within[1] & objects.valid[now, None], seen.points)
        return own & inside, own | inside

    candidate = torch.zeros(B, N, dtype=torch.uint8, device=seen.cls.device)
    for now in row_chunks(M, N):
        found = near(now)[1].to(torch.uint8)
        candidate.scatter_reduce_(0, objects.image[now, None].expand_as(found), found, "amax")
    apart, shared = _costs_of(candidate, seen.cls, seen.obj)

    def wishes() -> Iterator[Wish]:
        k = min(head.topk, N)
        for now in row_chunks(M, N):
            image, sides = objects.image[now], objects.sides[now, None]
            off = offsets(objects.centre[now, None], seen.points.middle, sides.dtype)
            overlap = _ious(Corners(*(edge.index_select(0, image) for edge in edges)), off, sides)
            cost = shared.index_select(0, image) + apart[image, objects.label[now]]
            cost = cost - IOU_WEIGHT * (overlap + IOU_EPS).log()
            possible = (candidate.index_select(0, image) > 0) & objects.valid[now, None] & ~cost.isnan()
            pairs = pairs_of(now, possible, k)
            if not len(pairs.row):
                continue
            at = (pairs.row - now.start) * N + pairs.cell
            overlap, cost, own = (each.flatten()[at] for each in (overlap, cost, near(now)[0]))
            overlap = torch.where(pairs.can, overlap, 0.0)
            largest = torch.where(pairs.table < 0, 0.0, overlap[pairs.table]).topk(k, 1).values
            worth = [torch.where(pairs.can & which, -cost, NONE) for which in (own, ~own)]
            yield Wish(pairs, worth, worth, largest.sum(1).long().clamp(min=1))

    def score(row: Tensor) -> tuple[Tensor, Tensor]:
        off = offsets(objects.centre[row], seen.points.middle, seen.boxes.dtype)
        return row, _ious(edges, off, objects.sides[row])

    nans = torch.where((candidate > 0) & shared.isnan(), shared, 0.0).sum()
    return Assigner(wishes, score, nans)


def _ious(boxes: Corners, off: Tensor, sides: Tensor) -> Tensor:
    """IoU of boxes [..., N] with true ones at ``off`` [..., N, 2] of such sides; 0 where it is NaN."""
    (x1, y1), (x2, y2) = (off - sides / 2).unbind(-1), (off + sides / 2).unbind(-1)
    areas = (boxes.x2 - boxes.x1) * (boxes.y2 - boxes.y1)
    value = iou(boxes, Corners(x1, y1, x2, y2), areas, area(sides))
    return torch.where(value > 0, value, 0.0)


def _costs_of(candidate: Tensor, cls: Tensor, obj: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`class_costs` of the candidates [B, N]; of others anything, 0 where values are at hand: few are."""
    if not at_hand(candidate):
        return class_costs(cls, obj)
    image, cell = candidate.nonzero(as_tuple=True)
    apart, shared = class_costs(cls[image, :, cell].T[None], obj[image, cell][None])
    of_all = torch.zeros_like(cls).permute(0, 2, 1).index_put((image, cell), apart[0].T)
    return of_all.permute(0, 2, 1), torch.zeros_like(obj).index_put((image, cell), shared[0])


def class_costs(cls: Tensor, obj: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of q = sqrt(sigmoid(cls) sigmoid(obj)) with a one-hot target: the sum over the classes of a cell
    is what they share, [B, N], plus what tells the true class apart, [B, C, N].
    """
    log_q = (logsigmoid(cls) + logsigmoid(obj)[:, None]) / 2
    miss = (-torch.expm1(log_q)).log().clamp(min=LOWEST_LOG)
    return miss - log_q.clamp(min=LOWEST_LOG), -miss.sum(1)


_ASSIGNERS = {"aligned": _aligned, "simota": _simota}
