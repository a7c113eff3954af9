"""From predictions of anchor-grid heads to detections: which (prediction, class) pairs exceed a score, and greedy NMS.

A pair's index is ``prediction * C + class``, predictions in the order level, anchor, y, x; its score the probability of
an object times that of the class. Scores, boxes and overlaps are float64; float32 only tells where none can pass.

``scan_kernel`` runs three times over the same tiles of CELLS cells. COUNT leaves how many pairs of each tile pass, and
a histogram of their scores. RECOUNT has work only in an image of more than K pairs: it raises that image's threshold
to a bin of the histogram, above which all pairs enter, and in which those of the lowest index do. WRITE puts what
enters into K slots, by index: places follow from the counts, so no order depends on timing, and no atomic is on floats.
"""

import triton
import triton.language as tl

from .primitives import exact, logistic, safe_div

COUNT: tl.constexpr = tl.constexpr(0)
RECOUNT: tl.constexpr = tl.constexpr(1)
WRITE: tl.constexpr = tl.constexpr(2)


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
def _softmax(at, s_k, hot, C, CELLS: tl.constexpr, CLASSES: tl.constexpr):
    """Largest class logit of each cell, and the sum of exponentials relative to it."""
    top = tl.full([CELLS], float("-inf"), tl.float64)
    total = tl.zeros([CELLS], tl.float64)
    for k0 in range(0, C, CLASSES):
        k = k0 + tl.arange(0, CLASSES)
        inside = hot[:, None] & (k < C)[None, :]
        z = tl.load(at[:, None] + ((5 + k) * s_k)[None, :], mask=inside, other=float("-inf")).to(tl.float64)
        higher = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing but -inf so far: the sum stays 0
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        top = higher
    empty = total == 0.0  # all are -inf, or masked out
    return tl.where(empty, 0.0, top), tl.where(empty, 1.0, total)


@triton.jit
def _passing(at, s_k, k, C, hot, obj, norm, low, conf, SOFTMAX: tl.constexpr):
    """[CELLS, CLASSES]: scores of a block of classes, and which of them exceed ``conf``."""
    inside = hot[:, None] & (k < C)[None, :]
    z = tl.load(at[:, None] + ((5 + k) * s_k)[None, :], mask=inside, other=0.0)
    score = tl.zeros_like(z.to(tl.float64))
    passing = inside
    if not SOFTMAX:
        passing = inside & (obj.to(tl.float32)[:, None] * logistic(z.to(tl.float32))[0] >= low)
    if tl.max(passing.to(tl.int32)) > 0:
        if SOFTMAX:
            score = obj[:, None] * (tl.exp(z.to(tl.float64) - norm[0][:, None]) / norm[1][:, None])
        else:
            score = obj[:, None] * logistic(z.to(tl.float64))[0]
        passing = passing & (score > conf)
    return score, passing


@triton.jit
def _tile_counts(
    at, s_k, hot, obj, norm, C, low, conf, cut, histogram_ptr,
    MODE: tl.constexpr, SOFTMAX: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr,
    LOWEST: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """[CELLS]: pairs of a cell in bins above ``cut``, and in that bin; COUNT adds all of them to the histogram."""
    above = tl.zeros([CELLS], tl.int32)
    edge = tl.zeros([CELLS], tl.int32)
    for k0 in range(0, C, CLASSES):
        score, passing = _passing(at, s_k, k0 + tl.arange(0, CLASSES), C, hot, obj, norm, low, conf, SOFTMAX)
        at_bin = _score_bin(score, LOWEST, BINS)
        if MODE == COUNT:
            tl.atomic_add(histogram_ptr + at_bin, 1, mask=passing, sem="relaxed")
        above += tl.sum((passing & (at_bin > cut)).to(tl.int32), axis=1)
        edge += tl.sum((passing & (at_bin == cut)).to(tl.int32), axis=1)
    return above, edge


@triton.jit
def _write_tile(
    at, s_k, hot, obj, norm, C, low, conf, cut, above, edge, places, origin_x, origin_y, own_w, own_h, stride, scale,
    index, scores_ptr, boxes_ptr, index_ptr,
    AXIS: tl.constexpr, SOFTMAX: tl.constexpr, CELLS: tl.constexpr, CLASSES: tl.constexpr,
    LOWEST: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Score, box and index of the pairs of a tile that enter, each in its slot.

    ``places`` are the first slot above the cut and that behind the last, the first slot in it and that behind the last.
    """
    taken = hot & (above + edge > 0)
    x, _jx = AXIS(
        tl.load(at, mask=taken, other=0.0).to(tl.float64),
        tl.load(at + 2 * s_k, mask=taken, other=0.0).to(tl.float64),
        own_w,
        stride,
        scale,
    )
    y, _jy = AXIS(
        tl.load(at + s_k, mask=taken, other=0.0).to(tl.float64),
        tl.load(at + 3 * s_k, mask=taken, other=0.0).to(tl.float64),
        own_h,
        stride,
        scale,
    )
    x1 = x[0] + origin_x - 0.5 * x[1]
    y1 = y[0] + origin_y - 0.5 * y[1]
    x2 = x[0] + origin_x + 0.5 * x[1]
    y2 = y[0] + origin_y + 0.5 * y[1]
    at_above = places[0] + tl.cumsum(above, axis=0) - above
    at_edge = places[2] + tl.cumsum(edge, axis=0) - edge
    for k0 in range(0, C, CLASSES):
        k = k0 + tl.arange(0, CLASSES)
        score, passing = _passing(at, s_k, k, C, hot, obj, norm, low, conf, SOFTMAX)
        at_bin = _score_bin(score, LOWEST, BINS)
        is_above = (passing & (at_bin > cut)).to(tl.int32)
        is_edge = (passing & (at_bin == cut)).to(tl.int32)
        slot_above = at_above[:, None] + tl.cumsum(is_above, axis=1) - is_above
        slot_edge = at_edge[:, None] + tl.cumsum(is_edge, axis=1) - is_edge
        # the bounds tell only if a score came out otherwise than when it was counted: other tiles' slots stay theirs
        enters = ((is_above > 0) & (slot_above < places[1])) | ((is_edge > 0) & (slot_edge < places[3]))
        slot = tl.where(is_above > 0, slot_above, slot_edge)
        tl.store(scores_ptr + slot, score, mask=enters)
        tl.store(index_ptr + slot, index[:, None] * C + k[None, :], mask=enters)
        tl.store(boxes_ptr + 4 * slot, tl.broadcast_to(x1[:, None], [CELLS, CLASSES]), mask=enters)
        tl.store(boxes_ptr + 4 * slot + 1, tl.broadcast_to(y1[:, None], [CELLS, CLASSES]), mask=enters)
        tl.store(boxes_ptr + 4 * slot + 2, tl.broadcast_to(x2[:, None], [CELLS, CLASSES]), mask=enters)
        tl.store(boxes_ptr + 4 * slot + 3, tl.broadcast_to(y2[:, None], [CELLS, CLASSES]), mask=enters)
        at_above += tl.sum(is_above, axis=1)
        at_edge += tl.sum(is_edge, axis=1)


@triton.jit(do_not_specialize=["T", "K"])
def scan_kernel(
    raw_ptrs, s_raws, Ws, HWs, anchors, strides, scales, C, low, conf, T, K,
    histogram_ptr, passing_ptr, above_ptr, edge_ptr, cut_ptr, scores_ptr, boxes_ptr, index_ptr,
    MODE: tl.constexpr, AXIS: tl.constexpr, SOFTMAX: tl.constexpr, FLAT: tl.constexpr,
    CELLS: tl.constexpr, CLASSES: tl.constexpr, LOWEST: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs above ``conf`` of an anchor-grid head; grid: T programs an image, one a level, anchor and CELLS cells.

    Tuples ending in s hold one entry a level: ``raw_ptrs`` the maps, ``s_raws`` their element strides (image, anchor,
    row, column, channel), ``anchors`` its own (w, h, w, h, ...) in pixels. ``low`` is below any score, computed in
    float32, of a pair that exceeds ``conf``. Of each image: ``histogram_ptr`` [BINS], zeros at first; ``passing_ptr``,
    ``above_ptr``, ``edge_ptr`` [T] counts; ``cut_ptr`` the bin its threshold was raised to, -1 if it was not;
    ``scores_ptr`` [K], zeros at first, ``boxes_ptr`` [K, 4] and ``index_ptr`` [K] what entered.
    """
    pid = tl.program_id(0)
    b = pid // T
    t = pid % T
    limit = exact(conf)
    cut = pid * 0 - 1
    own_above = pid * 0
    own_edge = pid * 0
    first_above = pid * 0
    first_edge = pid * 0
    works = pid >= 0
    if MODE == RECOUNT:
        _before, total = _sums(passing_ptr + b * T, t, T, BLOCK)
        works = total > K
        if works:
            cut = _cut(histogram_ptr + b * BINS, total, K, BINS)
        else:
            tl.store(above_ptr + pid, tl.load(passing_ptr + pid))
            tl.store(edge_ptr + pid, 0)
        if t == 0:
            tl.store(cut_ptr + b, cut)
    if MODE == WRITE:
        own_above = tl.load(above_ptr + pid)
        own_edge = tl.load(edge_ptr + pid)
        works = own_above + own_edge > 0
        if works:
            cut = tl.load(cut_ptr + b)
            first_above, all_above = _sums(above_ptr + b * T, t, T, BLOCK)
            first_edge, _all_edge = _sums(edge_ptr + b * T, t, T, BLOCK)
            first_edge += all_above
    tile_start = 0
    index_start = 0
    for level in tl.static_range(len(raw_ptrs)):
        tiles = tl.cdiv(HWs[level], CELLS)
        here = len(anchors[level]) // 2 * tiles
        if works & (t >= tile_start) & (t < tile_start + here):
            a = (t - tile_start) // tiles
            cells = ((t - tile_start) % tiles) * CELLS + tl.arange(0, CELLS)
            mask = cells < HWs[level]
            s_raw = s_raws[level]
            at = raw_ptrs[level] + b.to(tl.int64) * s_raw[0] + a.to(tl.int64) * s_raw[1]
            if FLAT:  # a row of cells follows the one above: one stride serves
                at = at + cells * s_raw[3]
            else:
                at = at + (cells // Ws[level]) * s_raw[2] + (cells % Ws[level]) * s_raw[3]
            z = tl.load(at + 4 * s_raw[4], mask=mask, other=float("-inf"))
            hot = mask & (logistic(z.to(tl.float32))[0] >= low)
            above = tl.zeros([CELLS], tl.int32)
            edge = tl.zeros([CELLS], tl.int32)
            if tl.max(hot.to(tl.int32), axis=0) > 0:
                for k in tl.static_range(4):  # a prediction with a NaN for a box is none
                    side = tl.load(at + k * s_raw[4], mask=hot, other=0.0).to(tl.float32)
                    hot = hot & (side == side)
                obj = logistic(z.to(tl.float64))[0]
                norm = (obj, obj)
                if SOFTMAX:
                    norm = _softmax(at, s_raw[4], hot, C, CELLS, CLASSES)
                above, edge = _tile_counts(
                    at, s_raw[4], hot, obj, norm, C, low, limit, cut, histogram_ptr + b * BINS,
                    MODE, SOFTMAX, CELLS, CLASSES, LOWEST, BINS,
                )  # fmt: skip
                if MODE == WRITE:
                    own_w = tl.cast(anchors[level][0], tl.float64)
                    own_h = tl.cast(anchors[level][1], tl.float64)
                    for j in tl.static_range(1, len(anchors[level]) // 2):
                        own_w = tl.where(a == j, tl.cast(anchors[level][2 * j], tl.float64), own_w)
                        own_h = tl.where(a == j, tl.cast(anchors[level][2 * j + 1], tl.float64), own_h)
                    stride = tl.cast(strides[level], tl.float64)
                    places = (first_above, first_above + own_above, first_edge, tl.minimum(first_edge + own_edge, K))
                    slots = b.to(tl.int64) * K
                    _write_tile(
                        at, s_raw[4], hot, obj, norm, C, low, limit, cut, above, edge, places,
                        (cells % Ws[level]) * stride, (cells // Ws[level]) * stride, own_w, own_h, stride,
                        tl.cast(scales[level], tl.float64), index_start + a * HWs[level] + cells,
                        scores_ptr + slots, boxes_ptr + 4 * slots, index_ptr + slots,
                        AXIS, SOFTMAX, CELLS, CLASSES, LOWEST, BINS,
                    )  # fmt: skip
            if MODE == COUNT:
                tl.store(passing_ptr + pid, tl.sum(above, axis=0))
            if MODE == RECOUNT:
                tl.store(above_ptr + pid, tl.sum(above, axis=0))
                tl.store(edge_ptr + pid, tl.sum(edge, axis=0))
        tile_start += here
        index_start += len(anchors[level]) // 2 * HWs[level]


@triton.jit
def _load_boxes(boxes_ptr, index_ptr, slot, mask, C):
    """Corners and class of the boxes in some slots."""
    at = boxes_ptr + 4 * slot
    return (
        tl.load(at, mask=mask, other=0.0),
        tl.load(at + 1, mask=mask, other=0.0),
        tl.load(at + 2, mask=mask, other=0.0),
        tl.load(at + 3, mask=mask, other=0.0),
        tl.load(index_ptr + slot, mask=mask, other=0) % C,
    )


@triton.jit
def suppresses(area, other_area, inter, iou, label, other_label, AGNOSTIC: tl.constexpr):
    """Whether boxes of one class, or of any with AGNOSTIC, overlap by more than ``iou``; two without area do not."""
    over = safe_div(inter, area + other_area - inter) > iou
    if not AGNOSTIC:
        over = over & (label == other_label)
    return over


@triton.jit
def _suppressed(box, other, iou, AGNOSTIC: tl.constexpr):
    """[N, M]: whether each of N boxes is suppressed by each of M others."""
    ow = tl.minimum(box[2][:, None], other[2][None, :]) - tl.maximum(box[0][:, None], other[0][None, :])
    oh = tl.minimum(box[3][:, None], other[3][None, :]) - tl.maximum(box[1][:, None], other[1][None, :])
    inter = tl.maximum(ow, 0.0) * tl.maximum(oh, 0.0)
    area = (box[2] - box[0]) * (box[3] - box[1])
    other_area = (other[2] - other[0]) * (other[3] - other[1])
    return suppresses(area[:, None], other_area[None, :], inter, iou, box[4][:, None], other[4][None, :], AGNOSTIC)


@triton.jit(do_not_specialize=["K", "max_det"])
def nms_kernel(
    scores_ptr, order_ptr, boxes_ptr, index_ptr, C, K, max_det, iou, kept_ptr,
    out_boxes_ptr, out_scores_ptr, out_labels_ptr, out_count_ptr,
    AGNOSTIC: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Greedy non-maximum suppression; grid: one program an image.

    Of each image: ``scores_ptr`` [K] in descending order, 0 where there is no box, ``order_ptr`` [K] the slots that
    they come from, ``kept_ptr`` [max_det] memory for the slots of kept boxes. BLOCK boxes, one a bit of an int64, are
    held against those kept so far, then each against those before it in the block: it is kept unless a kept one of them
    suppresses it. Rounds settle that, of a chain of boxes at least one more each round; two or three are the rule.
    Stops at ``max_det`` boxes.
    """
    b = tl.program_id(0).to(tl.int64)
    scores_ptr += b * K
    order_ptr += b * K
    boxes_ptr += b * K * 4
    index_ptr += b * K
    kept_ptr += b * max_det
    out_boxes_ptr += b * max_det * 4
    out_scores_ptr += b * max_det
    out_labels_ptr += b * max_det
    limit = exact(iou)
    lane = tl.arange(0, BLOCK)
    bit = tl.full([BLOCK], 1, tl.int64) << lane.to(tl.int64)
    out = out_boxes_ptr.dtype.element_ty
    kept = max_det * 0
    start = kept
    end = kept + K
    while (start < end) & (kept < max_det):
        score = tl.load(scores_ptr + start + lane, mask=start + lane < K, other=0.0)
        alive = score > 0.0
        if tl.max(alive.to(tl.int32), axis=0) > 0:
            slot = tl.load(order_ptr + start + lane, mask=alive, other=0).to(tl.int32)
            box = _load_boxes(boxes_ptr, index_ptr, slot, alive, C)
            for k0 in range(0, kept, CHUNK):
                k = k0 + tl.arange(0, CHUNK)
                other_slot = tl.load(kept_ptr + k, mask=k < kept, other=0)
                other = _load_boxes(boxes_ptr, index_ptr, other_slot, k < kept, C)
                over = _suppressed(box, other, limit, AGNOSTIC) & (k < kept)[None, :]
                alive = alive & (tl.max(over.to(tl.int32), axis=1) == 0)
            bits = tl.sum(tl.where(alive, bit, 0), axis=0)
            if bits != 0:
                before = tl.zeros([BLOCK], tl.int64)
                for k0 in tl.range(0, BLOCK, CHUNK, loop_unroll_factor=1):
                    k = k0 + tl.arange(0, CHUNK)
                    real = tl.load(scores_ptr + start + k, mask=start + k < K, other=0.0) > 0.0
                    other_slot = tl.load(order_ptr + start + k, mask=real, other=0).to(tl.int32)
                    other = _load_boxes(boxes_ptr, index_ptr, other_slot, real, C)
                    over = _suppressed(box, other, limit, AGNOSTIC) & (k[None, :] < lane[:, None])
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
                tl.store(out_boxes_ptr + 4 * place, box[0].to(out), mask=stored)
                tl.store(out_boxes_ptr + 4 * place + 1, box[1].to(out), mask=stored)
                tl.store(out_boxes_ptr + 4 * place + 2, box[2].to(out), mask=stored)
                tl.store(out_boxes_ptr + 4 * place + 3, box[3].to(out), mask=stored)
                tl.store(out_scores_ptr + place, score.to(out), mask=stored)
                tl.store(out_labels_ptr + place, box[4].to(tl.int64), mask=stored)
                kept = tl.minimum(kept + tl.sum(number, axis=0), max_det)
                tl.debug_barrier()  # the next block's threads read the kept slots that other threads have just stored
            start += BLOCK
        else:
            start = end
    tl.store(out_count_ptr + b, kept)
    for k0 in range(0, max_det, BLOCK):
        k = k0 + lane
        empty = (k >= kept) & (k < max_det)
        for side in tl.static_range(4):
            tl.store(out_boxes_ptr + 4 * k + side, tl.zeros([BLOCK], out), mask=empty)
        tl.store(out_scores_ptr + k, tl.zeros([BLOCK], out), mask=empty)
        tl.store(out_labels_ptr + k, tl.full([BLOCK], -1, tl.int64), mask=empty)
