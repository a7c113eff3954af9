"""From predictions of anchor-grid heads to detections: which (prediction, class) pairs exceed a score, and greedy NMS.

A pair's index is ``prediction * C + class``, predictions in the order level, anchor, y, x; its score the probability of
an object times that of the class. Scores, boxes and overlaps are float64; float32 only tells where none can pass.

``scan_kernel`` runs three times over the same tiles of CELLS cells. "count" leaves how many pairs of each tile pass,
and a histogram of their scores. "recount" has work only in an image of more than K pairs: it raises that image's
threshold to a bin of the histogram, above which all pairs enter, and in which those of the lowest index do. "write"
puts what enters into K slots, by index: places follow from the counts, so no order depends on timing, and no atomic is
on floats.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .levels import integer_of, number_of, pointer_of, strides_of
from .overlap import Corners, iou
from .primitives import exact, logistic, plain, safe_div


class ScanSpec(NamedTuple):
    """What a scan is compiled for: the MODE, whether class scores are a softmax, which neighbours are NEAR in memory
    ("cells", "channels" or None), classes of a block, and bins of scores from the LOWEST on.
    """

    MODE: Any
    SOFTMAX: Any
    NEAR: Any
    CELLS: Any
    CLASSES: Any
    LOWEST: Any
    BINS: Any
    BLOCK: Any


class NmsSpec(NamedTuple):
    """What a suppression is compiled for: whether classes suppress each other, boxes of a block, and how many others
    each of them is held against at a time.
    """

    AGNOSTIC: Any
    BLOCK: Any
    CHUNK: Any


class Levels(NamedTuple):
    """Maps, their strides, widths and cells, their own anchors (w, h, w, h, ...) in pixels, pixels of a cell, and grid
    sensitivities: of each a tuple with one entry a level.
    """

    raw_ptrs: Any
    by: Any
    Ws: Any
    HWs: Any
    anchors: Any
    strides: Any
    scales: Any


class Bound(NamedTuple):
    """What a score must exceed, a number below any such score if computed in float32, and the bin that the threshold of
    an image was raised to, -1 if it was not.
    """

    conf: Any
    low: Any
    cut: Any


class Counts(NamedTuple):
    """Of each image: scores in each of BINS, and of its T tiles the pairs that pass, those in bins above the cut, and
    those in that bin; the cut.
    """

    histogram_ptr: Any
    passing_ptr: Any
    above_ptr: Any
    edge_ptr: Any
    cut_ptr: Any


class Slots(NamedTuple):
    """K slots an image: scores, 0 where there is none, boxes [K, 4] and indices of pairs."""

    scores_ptr: Any
    boxes_ptr: Any
    index_ptr: Any


class Detections(NamedTuple):
    """What is kept of an image, ``max_det`` at most, and how many that are."""

    boxes_ptr: Any
    scores_ptr: Any
    labels_ptr: Any
    count_ptr: Any


class Site(NamedTuple):
    """Of the level, anchor and cells of a tile: the first cell, the number of the first prediction of the anchor."""

    level: Any
    anchor: Any
    first_cell: Any
    first_index: Any


class Tile(NamedTuple):
    """Cells of one image, level and anchor: where their numbers lie and elements from one number to the next, which
    cells may have a pair, the probability of an object, and of a softmax the largest logit and what the exponentials
    relative to it add up to.
    """

    at: Any
    step: Any
    hot: Any
    obj: Any
    top: Any
    total: Any


class Places(NamedTuple):
    """Slots of a tile: from the first one to that behind the last, for pairs above the cut and for those in it."""

    above: Any
    above_end: Any
    edge: Any
    edge_end: Any


class Box(NamedTuple):
    """Boxes and their classes."""

    corners: Corners
    label: Any


@triton.jit
def _score_bin(score, LOWEST: tl.constexpr, BINS: tl.constexpr):
    """Bin of a score: the upper half of it as float32, sign, exponent and 7 bits of mantissa."""
    upper = score.to(tl.float32).to(tl.int32, bitcast=True) >> 16
    return tl.minimum(tl.maximum(upper - LOWEST, 0), BINS - 1)


@triton.jit
def _cut(histogram_ptr, total, K, BINS: tl.constexpr):
    """The lowest bin above which there are at most K of ``total`` scores."""
    bins = tl.arange(0, BINS)
    above = total - tl.cumsum(tl.load(histogram_ptr + bins), axis=0)
    return tl.min(tl.where(above <= K, bins, BINS), axis=0)


@triton.jit
def _sums(ptr, t, T, BLOCK: tl.constexpr):
    """Sum of the first ``t`` of T counts, and of all."""
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for i0 in range(0, T, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        n = tl.load(ptr + i, mask=i < T, other=0)
        before += tl.where(i < t, n, 0)
        total += n
    return tl.sum(before, axis=0), tl.sum(total, axis=0)


@triton.jit
def _site_of(levels, t, CELLS: tl.constexpr):
    """Where tile t of an image lies."""
    level = t * 0
    tile = t
    first_index = t * 0
    tiles_before = 0
    index_before = 0
    for i in tl.static_range(len(levels.HWs)):
        HW = plain(levels.HWs[i])
        here = t >= tiles_before
        level = tl.where(here, i, level)
        tile = tl.where(here, t - tiles_before, tile)
        first_index = tl.where(here, index_before, first_index)
        tiles_before += len(levels.anchors[i]) // 2 * tl.cdiv(HW, CELLS)
        index_before += len(levels.anchors[i]) // 2 * HW
    HW = integer_of(levels.HWs, level)
    tiles = tl.cdiv(HW, CELLS)
    anchor = tile // tiles
    return Site(level, anchor, (tile % tiles) * CELLS, first_index + anchor * HW)


@triton.jit
def _cells_at(levels, b, site, cells, NEAR: tl.constexpr):
    """Where the numbers of some cells lie, and elements from one number to the next."""
    by = strides_of(levels.by, site.level)
    at = pointer_of(levels.raw_ptrs, site.level) + b.to(tl.int64) * by.image + site.anchor.to(tl.int64) * by.anchor
    step = by.channel
    if NEAR == "cells":
        at = at + cells
    else:
        W = integer_of(levels.Ws, site.level)
        at = at + (cells // W) * by.row + (cells % W) * by.column
        if NEAR == "channels":
            step = 1
    return at, step


@triton.jit
def _class_logits(at, step, hot, k, C, OTHER: tl.constexpr):
    """[CELLS, CLASSES]: logits of a block of classes, and which of them are there."""
    inside = hot[:, None] & (k < C)[None, :]
    return tl.load(at[:, None] + ((5 + k) * step)[None, :], mask=inside, other=OTHER), inside


@triton.jit
def _softmax(at, step, hot, C, CELLS: tl.constexpr, CLASSES: tl.constexpr):
    """Largest class logit of each cell, and the sum of exponentials relative to it."""
    top = tl.full([CELLS], float("-inf"), tl.float64)
    total = tl.zeros([CELLS], tl.float64)
    for k0 in range(0, C, CLASSES):
        z, _inside = _class_logits(at, step, hot, k0 + tl.arange(0, CLASSES), C, float("-inf"))
        z = z.to(tl.float64)
        higher = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: the sum stays 0
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        top = higher
    empty = total == 0.0  # all are -inf, or masked out
    return tl.where(empty, 0.0, top), tl.where(empty, 1.0, total)


@triton.jit
def _passing(tile, k, C, bound, SOFTMAX: tl.constexpr):
    """[CELLS, CLASSES]: scores of a block of classes, and which of them exceed the bound."""
    z, inside = _class_logits(tile.at, tile.step, tile.hot, k, C, 0.0)
    score = tl.zeros_like(z.to(tl.float64))
    passing = inside
    if not SOFTMAX:
        passing = inside & (tile.obj.to(tl.float32)[:, None] * logistic(z.to(tl.float32))[0] >= bound.low)
    if tl.max(passing.to(tl.int32)) > 0:
        if SOFTMAX:
            score = tile.obj[:, None] * (tl.exp(z.to(tl.float64) - tile.top[:, None]) / tile.total[:, None])
        else:
            score = tile.obj[:, None] * logistic(z.to(tl.float64))[0]
        passing = passing & (score > bound.conf)
    return score, passing


@triton.jit
def _tile_counts(tile, C, bound, histogram_ptr, SPEC: tl.constexpr):
    """[CELLS]: pairs of a cell in bins above the cut, and in that bin; "count" adds all of them to the histogram."""
    CELLS: tl.constexpr = SPEC.CELLS
    above = tl.zeros([CELLS], tl.int32)
    edge = tl.zeros([CELLS], tl.int32)
    for k0 in range(0, C, SPEC.CLASSES):
        score, passing = _passing(tile, k0 + tl.arange(0, SPEC.CLASSES), C, bound, SPEC.SOFTMAX)
        at_bin = _score_bin(score, SPEC.LOWEST, SPEC.BINS)
        if SPEC.MODE == "count":
            tl.atomic_add(histogram_ptr + at_bin, 1, mask=passing, sem="relaxed")
        above += tl.sum((passing & (at_bin > bound.cut)).to(tl.int32), axis=1)
        edge += tl.sum((passing & (at_bin == bound.cut)).to(tl.int32), axis=1)
    return above, edge


@triton.jit
def _own_anchor(levels, site):
    """Sides of the anchor of a tile."""
    w = levels.anchors[0][0]
    h = levels.anchors[0][1]
    for i in tl.static_range(len(levels.anchors)):
        for j in tl.static_range(len(levels.anchors[i]) // 2):
            own = (site.level == i) & (site.anchor == j)
            w = tl.where(own, levels.anchors[i][2 * j], w)
            h = tl.where(own, levels.anchors[i][2 * j + 1], h)
    return tl.cast(w, tl.float64), tl.cast(h, tl.float64)


@triton.jit
def _decoded(tile, taken, levels, site, cells, AXIS: tl.constexpr):
    """[CELLS]: the boxes of the cells that are taken, by their edges in pixels."""
    tx = tl.load(tile.at, mask=taken, other=0.0).to(tl.float64)
    ty = tl.load(tile.at + tile.step, mask=taken, other=0.0).to(tl.float64)
    tw = tl.load(tile.at + 2 * tile.step, mask=taken, other=0.0).to(tl.float64)
    th = tl.load(tile.at + 3 * tile.step, mask=taken, other=0.0).to(tl.float64)
    own_w, own_h = _own_anchor(levels, site)
    stride = tl.cast(number_of(levels.strides, site.level), tl.float64)
    scale = tl.cast(number_of(levels.scales, site.level), tl.float64)
    x, _jx = AXIS(tx, tw, own_w, stride, scale)
    y, _jy = AXIS(ty, th, own_h, stride, scale)
    cx, w = x
    cy, h = y
    W = integer_of(levels.Ws, site.level)
    cx += (cells % W) * stride
    cy += (cells // W) * stride
    return Corners(cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h)


@triton.jit
def _write_tile(tile, box, index, C, bound, counts, places, slots, SPEC: tl.constexpr):
    """Score, box and index of the pairs of a tile that enter, each in its slot; ``index`` are its predictions,
    ``counts`` what :func:`_tile_counts` found.
    """
    above, edge = counts
    at_above = places.above + tl.cumsum(above, axis=0) - above
    at_edge = places.edge + tl.cumsum(edge, axis=0) - edge
    for k0 in range(0, C, SPEC.CLASSES):
        k = k0 + tl.arange(0, SPEC.CLASSES)
        score, passing = _passing(tile, k, C, bound, SPEC.SOFTMAX)
        at_bin = _score_bin(score, SPEC.LOWEST, SPEC.BINS)
        is_above = (passing & (at_bin > bound.cut)).to(tl.int32)
        is_edge = (passing & (at_bin == bound.cut)).to(tl.int32)
        slot_above = at_above[:, None] + tl.cumsum(is_above, axis=1) - is_above
        slot_edge = at_edge[:, None] + tl.cumsum(is_edge, axis=1) - is_edge
        # the bounds tell only if a score came out otherwise than when it was counted: other tiles' slots stay theirs
        enters = (is_above > 0) & (slot_above < places.above_end)
        enters = enters | ((is_edge > 0) & (slot_edge < places.edge_end))
        slot = tl.where(is_above > 0, slot_above, slot_edge)
        tl.store(slots.scores_ptr + slot, score, mask=enters)
        tl.store(slots.index_ptr + slot, index[:, None] * C + k[None, :], mask=enters)
        for side in tl.static_range(4):
            edges, _score = tl.broadcast(box[side][:, None], score)
            tl.store(slots.boxes_ptr + 4 * slot + side, edges, mask=enters)
        at_above += tl.sum(is_above, axis=1)
        at_edge += tl.sum(is_edge, axis=1)


@triton.jit(do_not_specialize=["T", "K"])
def scan_kernel(levels, bound, C, T, K, counts, slots, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Pairs above a bound of an anchor-grid head; grid: T programs an image, one a level, anchor and CELLS cells.

    :class:`Levels`, :class:`Bound` (a score as three numbers), :class:`Counts` and :class:`Slots` say what is given.
    Histogram and scores are zeros at first.
    """
    pid = tl.program_id(0)
    b = pid // T
    t = pid % T
    cut = bound.cut
    places = Places(pid * 0, pid * 0, pid * 0, pid * 0)
    works = pid >= 0
    if SPEC.MODE == "recount":
        _before, passing = _sums(counts.passing_ptr + b * T, t, T, SPEC.BLOCK)
        works = passing > K
        if works:
            cut = _cut(counts.histogram_ptr + b * SPEC.BINS, passing, K, SPEC.BINS)
        else:
            tl.store(counts.above_ptr + pid, tl.load(counts.passing_ptr + pid))
            tl.store(counts.edge_ptr + pid, 0)
        if t == 0:
            tl.store(counts.cut_ptr + b, cut)
    if SPEC.MODE == "write":
        own_above = tl.load(counts.above_ptr + pid)
        own_edge = tl.load(counts.edge_ptr + pid)
        works = own_above + own_edge > 0
        if works:
            cut = tl.load(counts.cut_ptr + b)
            first_above, all_above = _sums(counts.above_ptr + b * T, t, T, SPEC.BLOCK)
            edge_before, _all_edge = _sums(counts.edge_ptr + b * T, t, T, SPEC.BLOCK)
            first_edge = all_above + edge_before
            edge_end = tl.minimum(first_edge + own_edge, K)
            places = Places(first_above, first_above + own_above, first_edge, edge_end)
    bound = Bound(exact(bound.conf), bound.low, cut)
    NEAR: tl.constexpr = SPEC.NEAR  # before Triton 3.7, no string is passed but by a name
    if works:
        site = _site_of(levels, t, SPEC.CELLS)
        cells = site.first_cell + tl.arange(0, SPEC.CELLS)
        at, step = _cells_at(levels, b, site, cells, NEAR)
        mask = cells < integer_of(levels.HWs, site.level)
        z = tl.load(at + 4 * step, mask=mask, other=float("-inf"))
        hot = mask & (logistic(z.to(tl.float32))[0] >= bound.low)
        above = tl.zeros_like(cells)
        edge = above
        if tl.max(hot.to(tl.int32), axis=0) > 0:
            for k in tl.static_range(4):  # a prediction with a NaN for a box is none
                side = tl.load(at + k * step, mask=hot, other=0.0).to(tl.float32)
                hot = hot & (side == side)
            obj = logistic(z.to(tl.float64))[0]
            top = obj
            total = obj
            if SPEC.SOFTMAX:
                top, total = _softmax(at, step, hot, C, SPEC.CELLS, SPEC.CLASSES)
            tile = Tile(at, step, hot, obj, top, total)
            above, edge = _tile_counts(tile, C, bound, counts.histogram_ptr + b * SPEC.BINS, SPEC)
            if SPEC.MODE == "write":
                box = _decoded(tile, hot & (above + edge > 0), levels, site, cells, AXIS)
                first = b.to(tl.int64) * K
                own = Slots(slots.scores_ptr + first, slots.boxes_ptr + 4 * first, slots.index_ptr + first)
                index = site.first_index + cells
                _write_tile(tile, box, index, C, bound, (above, edge), places, own, SPEC)
        if SPEC.MODE == "count":
            tl.store(counts.passing_ptr + pid, tl.sum(above, axis=0))
        if SPEC.MODE == "recount":
            tl.store(counts.above_ptr + pid, tl.sum(above, axis=0))
            tl.store(counts.edge_ptr + pid, tl.sum(edge, axis=0))


@triton.jit
def _load_boxes(slots, slot, mask, C):
    """The boxes in some slots."""
    at = slots.boxes_ptr + 4 * slot
    corners = Corners(
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
        tl.load(at + 3, mask=mask, other=0.0),
    )
    return Box(corners, tl.load(slots.index_ptr + slot, mask=mask, other=0) % C)


@triton.jit
def area(box):
    """Area of boxes."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


@triton.jit
def suppresses(box, other, limit, AGNOSTIC: tl.constexpr):
    """Whether boxes of one class, or of any with AGNOSTIC, overlap by more than ``limit``; two without area do not."""
    over = iou(box.corners, other.corners, area(box.corners), area(other.corners), safe_div) > limit
    if not AGNOSTIC:
        over = over & (box.label == other.label)
    return over


@triton.jit
def _suppressed(box, other, limit, AGNOSTIC: tl.constexpr):
    """[N, M]: whether each of N boxes is suppressed by each of M others."""
    p = box.corners
    q = other.corners
    rows = Box(Corners(p.x1[:, None], p.y1[:, None], p.x2[:, None], p.y2[:, None]), box.label[:, None])
    columns = Box(Corners(q.x1[None, :], q.y1[None, :], q.x2[None, :], q.y2[None, :]), other.label[None, :])
    return suppresses(rows, columns, limit, AGNOSTIC)


@triton.jit(do_not_specialize=["K", "max_det"])
def nms_kernel(slots, order_ptr, kept_ptr, found, C, K, max_det, limit, SPEC: tl.constexpr):
    """Greedy non-maximum suppression; grid: one program an image.

    Of each image: :class:`Slots` with scores in descending order, ``order_ptr`` [K] the slots that their boxes and
    indices are in, ``kept_ptr`` [max_det] memory for the slots of kept boxes, and what is :class:`Detections`. BLOCK
    boxes, one a bit of an int64, are held against those kept so far, then each against those before it in the block: it
    is kept unless a kept one of them suppresses it. Rounds settle that, of a chain of boxes at least one more each
    round; two or three are the rule. Stops at ``max_det`` boxes.
    """
    b = tl.program_id(0).to(tl.int64)
    slots = Slots(slots.scores_ptr + b * K, slots.boxes_ptr + b * K * 4, slots.index_ptr + b * K)
    order_ptr += b * K
    kept_ptr += b * max_det
    boxes_ptr = found.boxes_ptr + b * max_det * 4
    scores_ptr = found.scores_ptr + b * max_det
    labels_ptr = found.labels_ptr + b * max_det
    dtype = boxes_ptr.dtype.element_ty
    limit = exact(limit)
    lane = tl.arange(0, SPEC.BLOCK)
    bit = tl.full(lane.shape, 1, tl.int64) << lane.to(tl.int64)
    kept = max_det * 0
    start = kept
    end = kept + K
    while (start < end) & (kept < max_det):
        score = tl.load(slots.scores_ptr + start + lane, mask=start + lane < K, other=0.0)
        alive = score > 0.0
        if tl.max(alive.to(tl.int32), axis=0) > 0:
            slot = tl.load(order_ptr + start + lane, mask=alive, other=0).to(tl.int32)
            box = _load_boxes(slots, slot, alive, C)
            for k0 in range(0, kept, SPEC.CHUNK):
                k = k0 + tl.arange(0, SPEC.CHUNK)
                other_slot = tl.load(kept_ptr + k, mask=k < kept, other=0)
                other = _load_boxes(slots, other_slot, k < kept, C)
                over = _suppressed(box, other, limit, SPEC.AGNOSTIC) & (k < kept)[None, :]
                alive = alive & (tl.max(over.to(tl.int32), axis=1) == 0)
            bits = tl.sum(tl.where(alive, bit, 0), axis=0)
            if bits != 0:
                before = tl.zeros_like(bit)
                for k0 in tl.range(0, SPEC.BLOCK, SPEC.CHUNK, loop_unroll_factor=1):
                    k = k0 + tl.arange(0, SPEC.CHUNK)
                    real = tl.load(slots.scores_ptr + start + k, mask=start + k < K, other=0.0) > 0.0
                    other_slot = tl.load(order_ptr + start + k, mask=real, other=0).to(tl.int32)
                    other = _load_boxes(slots, other_slot, real, C)
                    over = _suppressed(box, other, limit, SPEC.AGNOSTIC) & (k[None, :] < lane[:, None])
                    before |= tl.sum(over.to(tl.int64) << k[None, :].to(tl.int64), axis=1)
                keep = alive
                last = ~bits
                while bits != last:
                    last = bits
                    keep = alive & ((before & last) == 0)
                    bits = tl.sum(tl.where(keep, bit, 0), axis=0)
                number = keep.to(tl.int32)
                place = kept + tl.cumsum(number, axis=0) - number
                stored = keep & (place < max_det)
                tl.store(kept_ptr + place, slot, mask=stored)
                for side in tl.static_range(4):
                    tl.store(boxes_ptr + 4 * place + side, box.corners[side].to(dtype), mask=stored)
                tl.store(scores_ptr + place, score.to(dtype), mask=stored)
                tl.store(labels_ptr + place, box.label.to(tl.int64), mask=stored)
                kept = tl.minimum(kept + tl.sum(number, axis=0), max_det)
                tl.debug_barrier()  # the next block's threads read the kept slots that other threads have just stored
            start += SPEC.BLOCK
        else:
            start = end
    tl.store(found.count_ptr + b, kept)
    for k0 in range(0, max_det, SPEC.BLOCK):
        k = k0 + lane
        empty = (k >= kept) & (k < max_det)
        for side in tl.static_range(4):
            tl.store(boxes_ptr + 4 * k + side, tl.zeros(lane.shape, dtype), mask=empty)
        tl.store(scores_ptr + k, tl.zeros(lane.shape, dtype), mask=empty)
        tl.store(labels_ptr + k, tl.full(lane.shape, -1, tl.int64), mask=empty)
