"""Losses over anchors that each predict a box and the logits of all classes: the twin of ``kernels/dense``.
Boxes are x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..heads import DenseHead
from .overlap import area, corner_areas, corners_of
from .pairs import PairIoU, chunks
from .primitives import Places, at_hand, constants, weighed, where_used
from .rows import BoxRows, Rows, read_corners
from .terms import BOX_TERMS, DECODE, ENCODE, LABEL_TERMS, OFFSET_TERMS
from .terms.box import boxes_of_sizes
from .terms.label import LOW, cross_entropy

BACKGROUND, IGNORED = -1, -2
LARGEST_AREA = 1e8  # square pixels; torchvision takes an area from this, and the largest difference wins


def flat(maps: Sequence[Tensor], channels: int) -> Tensor:
    """``[B, N, channels]`` of that, or of maps ``[B, A * channels, H, W]``; N counts levels, rows, columns, anchors."""
    if maps[0].ndim == 3:
        return maps[0]
    cells = [m.unflatten(1, (-1, channels)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
    return torch.cat(cells, 1)


def dense_match(
    anchors: Tensor, rows: Rows, head: DenseHead, batch_size: int, ends: tuple[int, int] = (0, 0)
) -> Tensor:
    """[B, N] int64: the row that each of anchors [N, 4] takes, or BACKGROUND, or IGNORED, as it is, too, where it takes
    none and its centre lies in an ignored region.

    ``ends`` are the numbers of anchors of the first and the last level, which the matcher ``"centre"`` asks for. In the
    dtype of the anchors, step by step as torchvision computes, so that decisions are the same bits.
    """
    match = _match(anchors, rows, head, batch_size, ends)
    if rows.regions is None:
        return match
    low, high = anchors.float().split(2, 1)
    centres = (low + high) * 0.5
    return torch.where((match < 0) & rows.regions.of_points(centres, batch_size), IGNORED, match)


def _match(anchors: Tensor, rows: Rows, head: DenseHead, batch_size: int, ends: tuple[int, int]) -> Tensor:
    """:func:`dense_match` without regions."""
    if head.matcher == "centre":
        return _smallest_around(anchors, rows, head, batch_size, ends)
    pairs = PairIoU(anchors[None], corner_areas(anchors)[None], rows.boxes, corner_areas(rows.boxes), rows)
    best, taken = pairs.matches(batch_size, head.rescue is not None, keep=head.rescue in ("equal", "own"))
    taken = torch.where(taken < len(rows.label), taken, BACKGROUND)
    low = (best < head.band[0]) | (taken < 0)
    match = torch.where(low, BACKGROUND, torch.where(best < head.band[1], IGNORED, taken))
    if head.rescue == "equal":
        match = torch.where(pairs.best_of_a_row(batch_size), taken, match)
    if head.rescue == "own":
        wanted = pairs.last_row_of_equals(batch_size)
        match = torch.where(wanted >= 0, wanted, match)
    if head.rescue in ("best", "best_first"):
        wanted = pairs.row_that_wants(batch_size, head.rescue == "best_first")
        match = torch.where(wanted >= 0, wanted, match)
    return match


def normaliser(found: Tensor, head: DenseHead) -> Tensor:
    """[B]: what the sums over each image are divided by, of the numbers ``found`` [B] of anchors with a row."""
    batch_size, least = found.shape[0], found.clamp(min=1)
    if head.mean == "image":
        return least * batch_size
    of_batch = {"batch": found.sum().clamp(min=1), "images": least.sum(), "one more": found.sum() + 1}[head.mean]
    return of_batch.expand(batch_size)


def _smallest_around(anchors: Tensor, rows: Rows, head: DenseHead, batch_size: int, ends: tuple[int, int]) -> Tensor:
    x1, y1, x2, y2 = anchors.unbind(1)
    x, y, side, N = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, len(anchors)
    index = torch.arange(N, device=anchors.device)
    low = torch.where(index < ends[0], 0.0, side * head.scale_range[0])
    high = torch.where(index >= N - ends[1], math.inf, side * head.scale_range[1])
    reach = side * head.radius
    M, bound = len(rows.label), 1e-5  # the peer's
    best = anchors.new_full((batch_size, N), bound)
    match = torch.full((batch_size, N), M, device=anchors.device)

    def value(now: slice) -> Tensor:
        """[rows, N]: how much a row is wanted, 0 where it does not fit."""
        tx1, ty1, tx2, ty2 = rows.boxes[now, :, None].unbind(1)
        off = torch.maximum((x - (tx1 + tx2) / 2).abs(), (y - (ty1 + ty2) / 2).abs())
        left, top, right, bottom = x - tx1, y - ty1, tx2 - x, ty2 - y
        nearest = torch.minimum(torch.minimum(left, top), torch.minimum(right, bottom))
        farthest = torch.maximum(torch.maximum(left, top), torch.maximum(right, bottom))
        fits = (off < reach) & (nearest > 0) & (farthest > low) & (farthest < high) & rows.valid[now, None]
        return torch.where(fits, LARGEST_AREA - corner_areas(rows.boxes[now])[:, None], 0.0)

    for now in chunks(M, N):
        wanted = value(now)
        best.scatter_reduce_(0, rows.image[now, None].expand_as(wanted), wanted, "amax")
    for now in chunks(M, N):
        wanted, image = value(now), rows.image[now]
        row = torch.arange(now.start, now.start + len(image), device=anchors.device)[:, None]
        row = torch.where((wanted >= bound) & (wanted == best.index_select(0, image)), row, M)
        match.scatter_reduce_(0, image[:, None].expand_as(row), row, "amin")
    return torch.where(match < M, match, BACKGROUND)


def dense_loss(
    cls: Tensor,
    box: Tensor,
    centre: Tensor | None,
    anchors: Tensor,
    rows: Tensor,
    head: DenseHead,
    size: tuple[float, float] | None,
    corners: bool,
    ends: tuple[int, int] = (0, 0),
    class_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor | None]]:
    """Loss of class logits [B, N, C], raw boxes [B, N, 4] and centreness [B, N, 1] against target rows [M, 6]; in
    float64 for float64 predictions, else in float32.

    Returns its terms (class, box, and centreness if there is one), differentiable; counts, int32, of anchors with a row
    and of invalid rows; and what the terms are divided by: [B], see :func:`normaliser`, and, where boxes are weighed by
    their centreness, the sum of these weights.

    ``size`` and ``corners`` are those of :func:`read_corners`, ``ends`` that of :func:`dense_match`; ``class_weights``
    [C] are what class terms are multiplied by, ``row_weights`` [M] what all terms of an anchor with a row are.
    """
    dtype = torch.float64 if cls.dtype == torch.float64 else torch.float32
    batch_size = cls.shape[0]
    anchors = anchors.detach().to(dtype)
    read = read_corners(rows, head, batch_size, size, corners, dtype, row_weights)
    match = dense_match(anchors, read, head, batch_size, ends)
    found = (match >= 0).sum(1)
    divisor = normaliser(found, head)
    weights = None if class_weights is None else class_weights.detach().to(dtype)
    flat_match = match.flatten()
    taken = Places(flat_match >= 0)
    row = torch.where(match >= 0, match, len(read.label))  # a row of nothing behind them
    label = torch.cat((read.label, read.label.new_full((1,), -1)))[row]
    weight = None
    if read.weight is not None:  # 1 where there is no row
        weight = torch.cat((read.weight, read.weight.new_ones(1))).to(dtype)[row]
    cls_loss = _class_loss(cls.to(dtype), match, label, found, divisor, taken, head, weights, weight)

    # what anchors with a row predict of it
    own, share = anchors[taken.index % len(anchors)], divisor[taken.index // len(anchors)]
    shift, sides = relative(own, read, taken.of(flat_match))
    raw = taken.of(box.flatten(0, 1)).to(dtype)
    weight = None if weight is None else taken.of(weight.flatten())
    boxes = _weighed(_box_loss(raw, taken.used, own, shift, sides, head, size), weight)
    image = taken.index // len(anchors)
    of_boxes = None
    if head.box_weight is None:
        box_loss = _total(boxes / share, image, batch_size, head)
    else:
        middle = where_used(centreness(shift, sides), taken.used)
        of_boxes = middle.sum().clamp(min=1e-6)
        box_loss = _total(weighed(boxes, middle), image, batch_size, head) / of_boxes
    terms = [cls_loss, weighed(box_loss, head.box_gain)]
    if centre is not None:
        target = torch.where(taken.used, centreness(shift, sides), 0.5)
        logit = where_used(taken.of(centre.flatten()).to(dtype), taken.used)
        bce = where_used(LABEL_TERMS["bce"](logit, target), taken.used)
        terms.append(_total(_weighed(bce, weight) / share, image, batch_size, head))
    counts = torch.stack((found.sum(), read.invalid)).to(torch.int32)
    return tuple(terms), counts, (divisor, of_boxes)


def _weighed(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss if weight is None else weighed(loss, weight)


def relative(anchors: Tensor, rows: BoxRows, match: Tensor) -> tuple[Tensor, Tensor]:
    """For each anchor the centre of its row from its own and the row's sides, [B, N, 2] in pixels; where it has no row,
    of a box like itself. ``match`` is [B, N] of ``anchors`` [N, 4], or [N].

    Corners are compared with corners, and centres with centres, in float64: differences keep their digits.
    """
    has = (match >= 0)[..., None]
    own = anchors[:, 2:] - anchors[:, :2]
    if not len(rows.label):
        return torch.zeros_like(own).expand(*match.shape, 2), own.expand(*match.shape, 2)
    row = match.clamp(min=0)
    if rows.centres is None:
        shift = rows.boxes[row] - anchors
        shift = 0.5 * (shift[..., :2] + shift[..., 2:])
    else:
        middle = 0.5 * (anchors[:, :2].double() + anchors[:, 2:].double())
        shift = (rows.centres[row] - middle).to(anchors.dtype)
    return torch.where(has, shift, 0.0), torch.where(has, rows.sides[row], own)


def _class_loss(
    logits: Tensor,
    match: Tensor,
    label: Tensor,
    found: Tensor,
    divisor: Tensor,
    taken: Places,
    head: DenseHead,
    class_weights: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """The sum over anchors, each over the ``divisor`` [B] of its image and times its ``weight`` [B, N]. What is not
    finite shows in it, whether or not it counts.
    """
    if head.negatives:
        return _ranked_loss(logits, match, label.clamp(min=0), found, divisor, head, class_weights, weight)
    term, N = LABEL_TERMS[head.label], logits.shape[1]
    classes = torch.arange(head.num_classes, device=logits.device)

    def of_others(logits: Tensor, match: Tensor, label: Tensor, weight: Tensor | None) -> Tensor:
        """The loss towards all classes but the label's, of an image or of each [B]."""
        other = (classes != label[..., None]) & (match != IGNORED)[..., None]
        loss = _weighed(term(torch.where(other, logits, LOW), False, head.label_args), class_weights)
        return _weighed(loss, None if weight is None else weight[..., None]).sum((-2, -1))

    if at_hand(logits):  # image by image, whose memory is used again
        weights = [None] * len(match) if weight is None else weight
        loss = torch.stack([of_others(*each) for each in zip(logits, match, label, weights, strict=True)])
    else:
        loss = of_others(logits, match, label, weight)
    loss = loss / divisor
    loss = loss if head.by_image else loss.sum()
    label = taken.of(label.flatten()).clamp(min=0)
    own = taken.of(logits.flatten(0, 1)).gather(1, label[:, None])[:, 0]
    own = term(where_used(own, taken.used), True, head.label_args)
    own = _weighed(own, None if class_weights is None else class_weights[label])
    own = _weighed(own, None if weight is None else taken.of(weight.flatten()))
    own = where_used(own, taken.used) / divisor[taken.index // N]
    loss = loss + _total(own, taken.index // N, len(match), head)
    ignored = Places((match == IGNORED).flatten())
    unread = ~(ignored.of(logits.detach().flatten(0, 1)) < math.inf) & ignored.used[:, None]
    if head.by_image:
        unread = _total(unread.any(1).to(loss.dtype), ignored.index // N, len(match), head) > 0
    else:
        unread = unread.any()
    return _nan_if(unread, loss)


def _ranked_loss(
    logits: Tensor,
    match: Tensor,
    label: Tensor,
    found: Tensor,
    divisor: Tensor,
    head: DenseHead,
    class_weights: Tensor | None,
    weight: Tensor | None,
) -> Tensor:
    """:func:`_class_loss` of anchors with a row and of the hardest others; ``label`` is 0 where there is no row.
    Anchors that are ignored cost nothing, and are the least hard.
    """
    has = match >= 0
    if at_hand(logits):  # image by image, which a cache holds
        hardness = torch.stack([cross_entropy(*each) for each in zip(logits.detach(), label, strict=True)])
    else:
        hardness = cross_entropy(logits.detach(), label)
    free = None if weight is None else (match == IGNORED) & ~hardness.isnan()
    hardness = _weighed(hardness, None if class_weights is None else class_weights[label])
    order = hardness if free is None else torch.where(free, 0.0, hardness)
    count = (head.negatives * found.float()).ceil().long()
    hardest = _hardest(torch.where(has, -1.0, order), count)  # anchors with a row behind all others
    times = has.to(torch.int64) + hardest.to(torch.int64)
    times = (times if free is None else torch.where(free, 0, times)).flatten()
    counted = Places(times > 0)
    own = where_used(counted.of(logits.flatten(0, 1)), counted.used[:, None])  # no gradient from a NaN elsewhere
    loss = cross_entropy(own, counted.of(label.flatten())) * counted.of(times)
    loss = _weighed(loss, None if class_weights is None else class_weights[counted.of(label.flatten())])
    loss = _weighed(loss, None if weight is None else counted.of(weight.flatten()))
    image = counted.index // logits.shape[1]
    loss = _total(where_used(loss, counted.used) / divisor[image], image, len(match), head)
    unknown = hardness.isnan()
    return _nan_if(unknown.any(1) if head.by_image else unknown.any(), loss)


def _hardest(hardness: Tensor, count: Tensor) -> Tensor:
    """[B, N] bool: those of the largest numbers of an image, ``count`` [B] of them, equals by their index."""
    N = hardness.shape[1]
    if at_hand(hardness):
        most = int(count.max())
        if 0 < most <= N // 4 and not hardness.isnan().any():  # few: quicker than a sort
            least = hardness.topk(most, 1).values.gather(1, (count - 1).clamp(min=0)[:, None])
            more, equal = hardness > least, hardness == least
            left = count[:, None] - more.sum(1, keepdim=True)
            return (count > 0)[:, None] & (more | (equal & (equal.cumsum(1) <= left)))
    order = hardness.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, torch.arange(N, device=order.device).expand_as(order))
    return rank < count[:, None]


def _total(values: Tensor, image: Tensor, batch_size: int, head: DenseHead) -> Tensor:
    """The sum of values [K], or [B] those of the images that they are of, ``image`` [K]."""
    return values.new_zeros(batch_size).index_add(0, image, values) if head.by_image else values.sum()


def _nan_if(unknown: Tensor, loss: Tensor) -> Tensor:
    return loss + torch.zeros_like(loss.detach()).masked_fill(unknown, math.nan)


def _box_loss(
    raw: Tensor,
    has: Tensor,
    anchors: Tensor,
    shift: Tensor,
    true: Tensor,
    head: DenseHead,
    size: tuple[float, float] | None,
) -> Tensor:
    """[K] of K anchors, 0 where they are not ``has``; ``shift`` and ``true`` are those of :func:`relative`."""
    raw = where_used(raw, has[..., None])
    a, b = raw[..., :2], raw[..., 2:]
    sides, weights = anchors[:, 2:] - anchors[:, :2], constants(head.weights, raw)
    if head.box in OFFSET_TERMS:
        logs = (true / sides).clamp(min=torch.finfo(torch.float32).tiny).log()
        loss = OFFSET_TERMS[head.box](a, b, weights[:2] * shift / sides, weights[2:] * logs, head.beta).sum(-1)
    else:
        centre, p = DECODE[head.decode](a, b, sides, sides / weights[:2], 1 / weights[2:])
        extent = None if size is None else constants((size[1], size[0]), raw)
        loss = BOX_TERMS[head.box](*boxes_of_sizes(p, true, shift - centre), head.box_args, extent)
    return where_used(loss, has)


def encode_anchors(anchors: Tensor, shift: Tensor, true: Tensor, head: DenseHead) -> Tensor:
    """[B, N, 4]: the raw boxes of anchors that decode to what :func:`relative` says."""
    sides, weights = anchors[:, 2:] - anchors[:, :2], constants(head.weights, anchors)
    return torch.cat(ENCODE[head.decode](shift, true, sides, sides / weights[:2], 1 / weights[2:]), -1)


def decode_anchors(
    cls: Tensor, box: Tensor, centre: Tensor | None, anchors: Tensor, head: DenseHead
) -> tuple[Tensor, Tensor]:
    """Boxes [B, N, 4] in pixels and scores [B, N, C] of predictions, in their dtype, as torchvision's detectors do.

    A score is a sigmoid, with centreness the root of its product with that one's; or a softmax over classes, 0 for the
    background.
    """
    sides, weights = anchors[:, 2:] - anchors[:, :2], constants(head.weights, anchors)
    shift, size = DECODE[head.decode](box[..., :2], box[..., 2:], sides, sides / weights[:2], 1 / weights[2:])
    boxes = corners_of(0.5 * (anchors[:, :2] + anchors[:, 2:]) + shift, size)
    if head.background:
        scores = cls.softmax(-1)
        return boxes, torch.cat((torch.zeros_like(scores[..., :1]), scores[..., 1:]), -1)
    scores = cls.sigmoid()
    return boxes, scores if centre is None else (scores * centre.sigmoid()).sqrt()


def centreness(shift: Tensor, true: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of the centres of anchors in boxes that hold them, [B, N],
    from what :func:`relative` says.
    """
    off, half = shift.abs(), true / 2
    return area((half - off) / (half + off)).clamp(min=0).sqrt()
