"""The driver of anchor-grid heads: the only place that loads and stores their predictions.

A prediction map is ``[B, A, H, W, 5 + C]`` by strides, channels x, y, w, h, objectness, classes. A program owns CELLS
consecutive cells of one image, level and anchor; all levels are one launch. It meets every target row of its image:
as a whole tile for the ignore mask, and again, in the few tiles that hold assigned predictions, one prediction at a
time. Class logits are read only there, and only once.

Two launches. The loss leaves partial sums, which the last program to finish adds up in a fixed order, and, where a
gradient will be asked for, what that needs: one byte a prediction (BACKGROUND, IGNORED, ASSIGNED or SHARED), the
gradient of every assigned prediction, densely packed, and where the packed ones of each program begin. The gradient
launch is then a stream of stores: of a map it reads the objectness, of the loss launch the rest, of the target rows
nothing.

A candidate is a row at one of the KINDS cells that it may take on a level. Those of one image are numbered by kind,
then by row; in this order they count where they share a prediction.
"""

import triton
import triton.language as tl

from .assign import row_cell, row_valid
from .primitives import larger, logistic, near_divide
from .rows import image_rows, in_its_range, load_row, load_rows, rows_end, wrong_offsets
from .sums import column, column_sums, is_last

BACKGROUND: tl.constexpr = tl.constexpr(0)
IGNORED: tl.constexpr = tl.constexpr(1)
ASSIGNED: tl.constexpr = tl.constexpr(2)  # to one row
SHARED: tl.constexpr = tl.constexpr(3)  # to several
# columns of the partial sums: box, objectness, class, assigned predictions; with MEANS what they are divided by:
# candidates in use, and predictions whose objectness counts; two to spare
N_PARTS: tl.constexpr = tl.constexpr(8)


@triton.jit
def kept_stride(C):
    """Numbers between the kept gradients of two predictions: 5 + C, and what makes them begin with a sector."""
    return (5 + C + 7) // 8 * 8


@triton.jit
def _at(ptr, strides, cells, W, FLAT: tl.constexpr):
    """Where the cells of a map lie; FLAT: a row of cells follows the one above, and one stride serves."""
    if FLAT:
        at = ptr + cells * strides[1]
    else:
        at = ptr + (cells // W) * strides[0] + (cells % W) * strides[1]
    return at


@triton.jit
def _load_box(at, s_k, mask, ACC: tl.constexpr):
    """The four box logits of a tile."""
    tx = tl.load(at, mask=mask, other=0.0).to(ACC)
    ty = tl.load(at + s_k, mask=mask, other=0.0).to(ACC)
    tw = tl.load(at + 2 * s_k, mask=mask, other=0.0).to(ACC)
    th = tl.load(at + 3 * s_k, mask=mask, other=0.0).to(ACC)
    return tx, ty, tw, th


@triton.jit
def _next_candidate(
    rows_ptr, after, first, last, cell, site, rule,
    MATCH: tl.constexpr, KINDS: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first candidate behind ``after`` that is assigned to the same prediction, or their number."""
    b, W, H, stride, own, own_w, own_h = site
    anchors, thresh, C, limit = rule
    end = (last - first) * KINDS
    found = end
    q0 = after + 1
    while (q0 < end) & (found == end):
        q = q0 + tl.arange(0, BLOCK_G)
        if KINDS == 1:
            kind = 0
            g = first + q
        else:
            kind = q // (last - first)
            g = first + q % (last - first)
        row = load_rows(rows_ptr, g, q < end, BLOCK_G)
        here = (row_cell(row, kind, b, W, H, C, limit, KINDS > 1) == cell) & MATCH(
            row[4].to(ACC) * (W * stride), row[5].to(ACC) * (H * stride), own, own_w, own_h, anchors, thresh
        )
        found = tl.min(tl.where(here, q, end), axis=0)
        q0 += BLOCK_G
    return found


@triton.jit
def _count_invalid(rows_ptr, offsets_ptr, M, B, C, limit, BLOCK_G: tl.constexpr):
    """Rows that no program will use, padding behind the last row is none; and offsets that are wrong."""
    end = rows_end(offsets_ptr, M, B)
    n = tl.zeros([BLOCK_G], tl.int32)
    for g0 in range(0, end, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        row = load_rows(rows_ptr, g, g < end, BLOCK_G)
        used = in_its_range(row[0], g, row_valid(row, 0, B, C, limit), offsets_ptr)
        n += tl.where((g < end) & ~used, 1, 0)
    return tl.sum(n, axis=0) + wrong_offsets(offsets_ptr, M, B, BLOCK_G)


@triton.jit
def _iou(x1, x2, y1, y2, area, gx, gy, gw, gh):
    """IoU of boxes by their edges with a true box by its centre and size."""
    ow = tl.minimum(x2, gx + 0.5 * gw) - tl.maximum(x1, gx - 0.5 * gw)
    oh = tl.minimum(y2, gy + 0.5 * gh) - tl.maximum(y1, gy - 0.5 * gh)
    inter = tl.maximum(ow, 0.0) * tl.maximum(oh, 0.0)
    return near_divide(inter, area + gw * gh - inter)


@triton.jit
def _scan_rows(
    at, s_k, cells, mask, c0, t, scale, rows_ptr, first, last, site, rule, band, ignore_thresh, gate,
    AXIS: tl.constexpr, MATCH: tl.constexpr, KINDS: tl.constexpr, IGNORES: tl.constexpr, GATED: tl.constexpr,
    CELLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Of every cell of a tile: BACKGROUND, IGNORED, ASSIGNED or SHARED; its row, if rows are not found by their cell
    (MATCH is None); and its largest IoU, if above ignore_thresh and gated, else 0."""
    b, W, H, stride, own, own_w, own_h = site
    anchors, thresh, C, limit = rule
    best = tl.zeros([CELLS], ACC)
    state = tl.zeros([CELLS], tl.int32) + BACKGROUND
    taken = tl.zeros([CELLS], tl.int32) - 1
    nearest = best
    if IGNORES:
        x, _jx = AXIS(t[0], t[2], own_w, stride, scale)
        y, _jy = AXIS(t[1], t[3], own_h, stride, scale)
        px = x[0] + (cells % W) * stride
        py = y[0] + (cells // W) * stride
        px1 = px - 0.5 * x[1]
        px2 = px + 0.5 * x[1]
        py1 = py - 0.5 * y[1]
        py2 = py + 0.5 * y[1]
        area = x[1] * y[1]
    if MATCH is None:
        ax = ((cells % W).to(ACC) + 0.5) * stride
        ay = ((cells // W).to(ACC) + 0.5) * stride
    for g in range(first, last):
        row = load_row(rows_ptr, g)
        cell = row_cell(row, 0, b, W, H, C, limit, False)
        if cell >= 0:
            gw = row[4].to(ACC) * (W * stride)
            gh = row[5].to(ACC) * (H * stride)
            gx = row[2].to(ACC) * (W * stride)
            gy = row[3].to(ACC) * (H * stride)
            if IGNORES:
                best = tl.maximum(best, _iou(px1, px2, py1, py2, area, gx, gy, gw, gh))
            if MATCH is None:
                hw = 0.5 * own_w
                hh = 0.5 * own_h
                overlap = _iou(ax - hw, ax + hw, ay - hh, ay + hh, own_w * own_h, gx, gy, gw, gh)
                taken = tl.where(overlap > nearest, g, taken)
                nearest = tl.maximum(nearest, overlap)
            elif KINDS == 1:
                if (cell >= c0) & (cell < c0 + CELLS):
                    if MATCH(gw, gh, own, own_w, own_h, anchors, thresh):
                        state = tl.where(cells == cell, tl.where(state == BACKGROUND, ASSIGNED, SHARED), state)
            elif MATCH(gw, gh, own, own_w, own_h, anchors, thresh):
                for kind in range(KINDS):
                    cell = row_cell(row, kind, b, W, H, C, limit, True)
                    if (cell >= c0) & (cell < c0 + CELLS):
                        state = tl.where(cells == cell, tl.where(state == BACKGROUND, ASSIGNED, SHARED), state)
    if MATCH is None:
        state = tl.where(nearest > band[1], ASSIGNED, tl.where(nearest >= band[0], IGNORED, BACKGROUND))
    if IGNORES:
        over = (best > ignore_thresh) & mask
        if GATED:
            if tl.max(over.to(tl.int32), axis=0) > 0:
                hot = tl.zeros([CELLS], tl.int32)
                for k in tl.range(0, C, loop_unroll_factor=1):
                    z = tl.load(at + (5 + k) * s_k, mask=over, other=float("-inf")).to(ACC)
                    hot = tl.where(z > gate, 1, hot)
                over = over & (hot == 1)
        best = tl.where(over, best, 0.0)
        state = tl.where(over & (state == BACKGROUND), IGNORED, state)
    return state, taken, best


@triton.jit
def _true_box(row, cell, site, ACC: tl.constexpr):
    """Centre from the cell's origin, in cells, and size, in images, of a row."""
    _b, W, H, _stride, _own, _own_w, _own_h = site
    # the product is not rounded before the cell is taken off
    gx = tl.fma(row[2].to(ACC), W.to(ACC), -(cell % W).to(ACC))
    gy = tl.fma(row[3].to(ACC), H.to(ACC), -(cell // W).to(ACC))
    return gx, gy, row[4].to(ACC), row[5].to(ACC)


@triton.jit
def _box_term(
    t, true, scale, site, shape, box_args, quality_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, QUALITY: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Box loss of predictions against a true box, its gradient by the four box logits t, and their similarity."""
    _b, W, H, stride, _own, own_w, own_h = site
    gx, gy, gw, gh = true
    if UNIT == "image":
        unit_x = 1.0 / W.to(ACC)
        unit_y = 1.0 / H.to(ACC)
        unit_w = own_w / (W * stride)
        unit_h = own_h / (H * stride)
    elif UNIT == "cell":
        unit_x = tl.cast(1.0, ACC)
        unit_y = unit_x
        unit_w = own_w / stride
        unit_h = own_h / stride
    else:
        unit_x = stride
        unit_y = stride
        unit_w = own_w
        unit_h = own_h
    x, jx = AXIS(t[0], t[2], unit_w, unit_x, scale)
    y, jy = AXIS(t[1], t[3], unit_h, unit_y, scale)
    sw = gw * (W * unit_x)
    sh = gh * (H * unit_y)
    dcx = x[0] - gx * unit_x
    dcy = y[0] - gy * unit_y
    hx = 0.5 * (sw - x[1])
    hy = 0.5 * (sh - y[1])
    pair_x = (x[1], sw, dcx + hx, hx - dcx, W * unit_x)
    pair_y = (y[1], sh, dcy + hy, hy - dcy, H * unit_y)
    if OFFSET is not None:
        area_weight, area_cap = shape
        loss_x, dx, dw = OFFSET(t[0], t[2], gx, tl.log(gw * (W * stride) / own_w), scale)
        loss_y, dy, dh = OFFSET(t[1], t[3], gy, tl.log(gh * (H * stride) / own_h), scale)
        weight = 1.0 + area_weight * (1.0 - tl.minimum(gw * gh, area_cap))
        loss = weight * (loss_x + loss_y)
        d = (weight * dx, weight * dy, weight * dw, weight * dh)
    else:
        loss, g_x, g_y = BOX(pair_x, pair_y, box_args)
        d = (
            g_x[0] * jx[0] + g_x[1] * jx[2],
            g_y[0] * jy[0] + g_y[1] * jy[2],
            g_x[0] * jx[1] + g_x[1] * jx[3],
            g_y[0] * jy[1] + g_y[1] * jy[3],
        )
    if QUALITY is None:
        similarity = tl.cast(1.0, ACC)
    elif QUALITY == "box":  # what has just been computed
        similarity = larger(1.0 - loss, 0.0)
    else:
        distance, _gx, _gy = QUALITY(pair_x, pair_y, quality_args)
        similarity = larger(1.0 - distance, 0.0)
    return loss, d, similarity


@triton.jit
def _prior_term(
    t, scale, site, shape, box_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Box loss of a tile of predictions towards the middle of their cell, and its gradient.

    An offset term takes the anchor for the true size, an IoU term a true box without size.
    """
    if OFFSET is not None:
        loss_x, dx, dw = OFFSET(t[0], t[2], 0.5, 0.0, scale)
        loss_y, dy, dh = OFFSET(t[1], t[3], 0.5, 0.0, scale)
        loss = loss_x + loss_y
        d = (dx, dy, dw, dh)
    else:
        middle = tl.cast(0.5, ACC)
        none = tl.cast(0.0, ACC)
        loss, d, _similarity = _box_term(
            t, (middle, middle, none, none), scale, site, shape, box_args, (), AXIS, BOX, OFFSET, None, UNIT, ACC
        )
    return loss, d


@triton.jit
def _assigned_prediction(
    raw_ptr, kept_ptr, s_raw, cell, shared, q, scale, rows_ptr, first, last, weights_ptr, site, rule,
    gains, labels, shape, box_args, label_args, obj_args, quality_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr, OBJ: tl.constexpr,
    QUALITY: tl.constexpr, MATCH: tl.constexpr, KINDS: tl.constexpr, SHARING: tl.constexpr, UNIT: tl.constexpr,
    AVERAGE: tl.constexpr, SMOOTH: tl.constexpr, K_PAD: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Box, objectness and class loss of the prediction at a cell, and its candidates in use; keeps its gradient.

    ``q`` is its first candidate, ``shared`` says that there are others. Of several, SHARING takes the "last", or the
    box and class loss of "each", or the "sum" of their box losses and all their classes at once; with "one" there are
    no others.
    """
    box_gain, obj_gain, cls_gain = gains
    pos, neg, first_weight, quality_ratio = labels
    C = rule[2]
    k = tl.arange(0, K_PAD)  # lanes are channels; classes begin at 5
    is_class = (k >= 5) & (k < 5 + C)
    at = raw_ptr + (cell // site[1]) * s_raw[0] + (cell % site[1]) * s_raw[1]
    z = tl.load(at + k * s_raw[2], mask=is_class, other=0.0).to(ACC)
    z = tl.where(is_class, z, -1e30)  # adds nothing to a softmax
    # from channel to channel by one stride: multiples of it would be kept in registers across the loop over rows
    tx = tl.load(at).to(ACC)
    at += s_raw[2]
    ty = tl.load(at).to(ACC)
    at += s_raw[2]
    tw = tl.load(at).to(ACC)
    at += s_raw[2]
    th = tl.load(at).to(ACC)
    at += s_raw[2]
    obj = tl.load(at).to(ACC)
    y = tl.where(is_class, tl.zeros([K_PAD], ACC) + neg, 0.0)
    weight = tl.zeros([K_PAD], ACC) + 1.0
    m = tl.cast(1.0, ACC)
    once = tl.cast(first_weight, ACC)
    box = tl.cast(0.0, ACC)
    d0 = box
    d1 = box
    d2 = box
    d3 = box
    candidates = box
    similarity = m
    loss_cls = tl.zeros([K_PAD], ACC)
    d_cls = loss_cls
    end = (last - first) * KINDS
    if SHARING == "last":
        if shared:
            later = _next_candidate(rows_ptr, q, first, last, cell, site, rule, MATCH, KINDS, BLOCK_G, ACC)
            while later < end:
                q = later
                later = _next_candidate(rows_ptr, q, first, last, cell, site, rule, MATCH, KINDS, BLOCK_G, ACC)
    while q < end:
        if KINDS == 1:
            row = load_row(rows_ptr, first + q)
        else:
            row = load_row(rows_ptr, first + q % (last - first))
        label = row[1].to(tl.int32)
        if weights_ptr is not None:
            m = tl.load(weights_ptr + label).to(ACC)
            weight = tl.where(k == 5 + label, m * once, weight)
            once = tl.cast(1.0, ACC)
        if SHARING == "each":
            loss_k, d_k = LABEL(z, tl.where(k == 5 + label, pos, y), label_args)
            loss_cls += loss_k
            d_cls += d_k
        else:
            y = tl.where(k == 5 + label, pos, y)
        loss, d, similarity = _box_term(
            (tx, ty, tw, th), _true_box(row, cell, site, ACC), scale, site, shape, box_args, quality_args,
            AXIS, BOX, OFFSET, QUALITY, UNIT, ACC,
        )  # fmt: skip
        box += m * loss
        d0 += m * d[0]
        d1 += m * d[1]
        d2 += m * d[2]
        d3 += m * d[3]
        candidates += 1.0
        if (SHARING == "last") or (SHARING == "one"):
            q = end
        elif shared:
            q = _next_candidate(rows_ptr, q, first, last, cell, site, rule, MATCH, KINDS, BLOCK_G, ACC)
        else:
            q = end
    if SHARING != "each":
        loss_cls, d_cls = LABEL(z, y, label_args)
    box_scale = tl.cast(box_gain, ACC)
    if AVERAGE:
        p, _q, _e = logistic(z)
        pushed = tl.sum(tl.where(is_class & (y > p), 1, 0), axis=0)
        box_scale = box_scale / tl.maximum(pushed, 1).to(ACC)
    loss_obj = tl.cast(0.0, ACC)
    d_obj = loss_obj
    if not SMOOTH:
        loss_obj, d_obj = OBJ(obj, 1.0 - quality_ratio + quality_ratio * similarity, obj_args)
    if kept_ptr is not None:
        kept = cls_gain * weight * d_cls
        kept = tl.where(k == 0, box_scale * d0, kept)
        kept = tl.where(k == 1, box_scale * d1, kept)
        kept = tl.where(k == 2, box_scale * d2, kept)
        kept = tl.where(k == 3, box_scale * d3, kept)
        kept = tl.where(k == 4, obj_gain * m * d_obj, kept)
        tl.store(kept_ptr + k, kept, mask=k < 5 + C)
    cls = tl.sum(tl.where(is_class, weight * loss_cls, 0.0), axis=0)
    return box_scale * box, obj_gain * m * loss_obj, cls_gain * cls, candidates


@triton.jit
def _tile(
    raw_ptr, s_raw, HW, scale, c0, state_ptr, true_obj_ptr, kept_ptr, base_ptr, slots_ptr,
    rows_ptr, first, last, weights_ptr, site, rule, gains, noobj_gain, prior_gain, band, ignore_thresh, gate, labels,
    shape, box_args, label_args, obj_args, quality_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr, OBJ: tl.constexpr,
    QUALITY: tl.constexpr, MATCH: tl.constexpr, KINDS: tl.constexpr, SHARING: tl.constexpr, UNIT: tl.constexpr,
    IGNORES: tl.constexpr, GATED: tl.constexpr, AVERAGE: tl.constexpr, SMOOTH: tl.constexpr, PRIOR: tl.constexpr,
    MEAN_USED: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr, K_PAD: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """CELLS cells from c0 of one image, level and anchor: partial sums, and what the gradient needs."""
    b, W, H, stride, own, own_w, own_h = site
    anchors, thresh, C, limit = rule
    cells = c0 + tl.arange(0, CELLS)
    mask = cells < HW
    at = _at(raw_ptr, s_raw, cells, W, FLAT)
    obj = tl.load(at + 4 * s_raw[2], mask=mask, other=0.0).to(ACC)
    t = (obj, obj, obj, obj)
    bad = obj != obj  # a NaN that was read shows in the total even where nothing asks for it
    if IGNORES or PRIOR:
        t = _load_box(at, s_raw[2], mask, ACC)
        bad = bad | (t[0] != t[0]) | (t[1] != t[1]) | (t[2] != t[2]) | (t[3] != t[3])
    state, taken, best = _scan_rows(
        at, s_raw[2], cells, mask, c0, t, scale, rows_ptr, first, last, site, rule, band, ignore_thresh, gate,
        AXIS, MATCH, KINDS, IGNORES, GATED, CELLS, ACC,
    )  # fmt: skip
    if state_ptr is not None:
        tl.store(state_ptr + cells, state.to(tl.uint8), mask=mask)
    counts = mask
    true_obj = tl.cast(0.0, ACC)
    if SMOOTH:
        true_obj = best
        if true_obj_ptr is not None:
            tl.store(true_obj_ptr + cells, best, mask=mask)
    else:
        counts = mask & (state == BACKGROUND)
    loss_obj, _d_obj = OBJ(obj, true_obj, obj_args)
    loss_obj = tl.where(bad, float("nan"), tl.where(counts, noobj_gain * loss_obj, 0.0))
    part_obj = tl.sum(tl.where(mask, loss_obj, 0.0), axis=0)
    part_box = tl.cast(0.0, ACC)
    part_cls = tl.cast(0.0, ACC)
    assigned = tl.cast(0.0, ACC)
    candidates = tl.cast(0.0, ACC)
    used = tl.cast(0.0, ACC)
    if MEAN_USED:
        used += tl.sum(counts.to(tl.int32), axis=0).to(ACC)
    if PRIOR:
        prior, _d_prior = _prior_term(t, scale, site, shape, box_args, AXIS, BOX, OFFSET, UNIT, ACC)
        part_box += prior_gain * tl.sum(tl.where(mask & (state < ASSIGNED), prior, 0.0), axis=0)

    pending = tl.where((state >= ASSIGNED) & mask, state, 0)  # below 0 once a prediction is done
    here = tl.sum((pending > 0).to(tl.int32), axis=0)
    if here > 0:
        place_ptr = kept_ptr
        if kept_ptr is not None:
            base = tl.atomic_add(slots_ptr, here, sem="relaxed")
            tl.store(base_ptr, base)
            place_ptr = kept_ptr + base.to(tl.int64) * kept_stride(C)
        for g in range(first, last):
            row = load_row(rows_ptr, g)
            gw = row[4].to(ACC) * (W * stride)
            gh = row[5].to(ACC) * (H * stride)
            steps = KINDS
            if MATCH is None:
                steps = tl.sum(((taken == g) & (pending > 0)).to(tl.int32), axis=0)
            for step in range(steps):
                if MATCH is None:  # the next cell that has taken this row
                    cell = tl.min(tl.where((taken == g) & (pending > 0), cells, c0 + CELLS), axis=0)
                else:
                    cell = row_cell(row, step, b, W, H, C, limit, KINDS > 1)
                if (cell >= c0) & (cell < c0 + CELLS):
                    kind = tl.max(tl.where(cells == cell, pending, 0), axis=0)
                    todo = kind > 0
                    if MATCH is not None:
                        todo = todo & MATCH(gw, gh, own, own_w, own_h, anchors, thresh)
                    if todo:
                        pending = tl.where(cells == cell, -kind, pending)
                        q = g - first
                        if KINDS > 1:
                            q += step * (last - first)
                            if kind == SHARED:  # another row may come first
                                q = _next_candidate(
                                    rows_ptr, -1, first, last, cell, site, rule, MATCH, KINDS, BLOCK_G, ACC
                                )
                        slot_ptr = place_ptr
                        if kept_ptr is not None:
                            before = (pending != 0) & (cells < cell)
                            slot_ptr = place_ptr + tl.sum(before.to(tl.int32), axis=0) * kept_stride(C)
                        box, one, cls, n = _assigned_prediction(
                            raw_ptr, slot_ptr, s_raw, cell, kind == SHARED, q, scale, rows_ptr, first, last,
                            weights_ptr, site, rule, gains, labels, shape,
                            box_args, label_args, obj_args, quality_args,
                            AXIS, BOX, OFFSET, LABEL, OBJ, QUALITY, MATCH, KINDS, SHARING, UNIT, AVERAGE, SMOOTH,
                            K_PAD, BLOCK_G, ACC,
                        )  # fmt: skip
                        part_box += box
                        part_obj += one
                        part_cls += cls
                        assigned += 1.0
                        candidates += n
        if MEAN_USED and not SMOOTH:
            used += assigned
    return part_box, part_obj, part_cls, assigned, candidates, used


@triton.jit
def _place(pid, start, HW, anchors, LEVELS: tl.constexpr, level: tl.constexpr, CELLS: tl.constexpr):
    """Image, anchor of the level, first cell, the anchor's index and its sides: of a program, in a level from start."""
    tiles = tl.cdiv(HW, CELLS)
    ba = (pid - start) // tiles
    a = ba % len(LEVELS[level])
    b = ba // len(LEVELS[level])
    own = LEVELS[level][0]
    for t in tl.static_range(1, len(LEVELS[level])):
        own = tl.where(a == t, LEVELS[level][t], own)
    own_w = anchors[0]
    own_h = anchors[1]
    for t in tl.static_range(1, len(anchors) // 2):
        own_w = tl.where(own == t, anchors[2 * t], own_w)
        own_h = tl.where(own == t, anchors[2 * t + 1], own_h)
    return b, a, ((pid - start) % tiles) * CELLS, own, own_w, own_h


@triton.jit
def _store_parts(at, parts):
    """Six numbers of a program, as one access of a sector."""
    i = tl.arange(0, 8)
    values = tl.where(i == 0, parts[0], 0.0)
    for part in tl.static_range(1, 6):
        values = tl.where(i == part, parts[part], values)
    tl.store(at + i, values)


@triton.jit(do_not_specialize=["B", "M"])
def grid_kernel(
    raw_ptrs, s_raws, Ws, Hs, HWs, strides, scales, obj_scales, state_ptr, true_obj_ptr, kept_ptr, bases_ptr,
    rows_ptr, offsets_ptr, M, weights_ptr, anchors, thresh, limit, gains, prior_gain, band, ignore_thresh, gate, labels,
    shape, box_args, label_args, obj_args, quality_args, B, C,
    total_ptr, parts_ptr, counts_ptr, partial_ptr, done_ptr,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr, OBJ: tl.constexpr,
    QUALITY: tl.constexpr, MATCH: tl.constexpr, KINDS: tl.constexpr, SHARING: tl.constexpr, UNIT: tl.constexpr,
    IGNORES: tl.constexpr, GATED: tl.constexpr, AVERAGE: tl.constexpr, SMOOTH: tl.constexpr, PRIOR: tl.constexpr,
    MEAN_ROWS: tl.constexpr, MEAN_USED: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, K_PAD: tl.constexpr, BLOCK_G: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Loss of an anchor-grid head; grid: one program for each level, image, anchor and CELLS cells.

    Tuples ending in s, and ``anchors`` and SMOOTH, hold one entry a level: ``raw_ptrs`` the maps, ``s_raws`` their
    element strides (image, anchor, row, column, channel), ``anchors`` those that compete. ``LEVELS`` holds, a level,
    the indices of its own anchors among them. ``kept_ptr`` takes :func:`kept_stride` numbers for each assigned
    prediction: those of one program lie in the order of their cells, from the place that it stores at ``bases_ptr``.
    ``done_ptr`` counts finished programs, and places taken: 0 before and after every launch. H * W is an argument of
    its own because only then does the compiler know that every plane is aligned. ``parts_ptr`` takes the parts and
    behind them, a level, what box and class terms and what objectness are multiplied by for their means.
    """
    pid = tl.program_id(0)
    start = 0
    state_start = 0
    for level in tl.static_range(len(LEVELS)):
        here = B * len(LEVELS[level]) * tl.cdiv(HWs[level], CELLS)
        if (pid >= start) & (pid < start + here):
            b, a, c0, own, own_w, own_h = _place(pid, start, HWs[level], anchors[level], LEVELS, level, CELLS)
            first, last = image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G)
            s_raw = s_raws[level]
            raw_ptr = raw_ptrs[level] + b.to(tl.int64) * s_raw[0] + a.to(tl.int64) * s_raw[1]
            before = state_start + (b * len(LEVELS[level]) + a) * HWs[level]
            tile_state_ptr = state_ptr
            base_ptr = bases_ptr
            if state_ptr is not None:
                tile_state_ptr = state_ptr + before
                base_ptr = bases_ptr + pid
            tile_true_obj_ptr = true_obj_ptr
            if true_obj_ptr is not None:
                tile_true_obj_ptr = true_obj_ptr + before
            site = (
                b, Ws[level], Hs[level], tl.cast(strides[level], ACC), own, tl.cast(own_w, ACC), tl.cast(own_h, ACC)
            )  # fmt: skip
            obj_scale = tl.cast(obj_scales[level], ACC)
            parts = _tile(
                raw_ptr, (s_raw[2], s_raw[3], s_raw[4]), HWs[level], tl.cast(scales[level], ACC), c0,
                tile_state_ptr, tile_true_obj_ptr, kept_ptr, base_ptr, done_ptr + 1,
                rows_ptr, first, last, weights_ptr, site, (anchors[level], thresh, C, limit),
                (gains[0], obj_scale * gains[1], gains[3]), obj_scale * gains[2], prior_gain, band, ignore_thresh, gate,
                labels, shape, box_args, label_args, obj_args, quality_args,
                AXIS, BOX, OFFSET, LABEL, OBJ, QUALITY, MATCH, KINDS, SHARING, UNIT, IGNORES, GATED, AVERAGE,
                SMOOTH[level], PRIOR, MEAN_USED, FLAT, ACC, CELLS, K_PAD, BLOCK_G,
            )  # fmt: skip
            _store_parts(partial_ptr + pid * N_PARTS, parts)
        start += here
        state_start += B * len(LEVELS[level]) * HWs[level]

    if pid == 0:
        tl.store(counts_ptr + 1, _count_invalid(rows_ptr, offsets_ptr, M, B, C, limit, BLOCK_G))
    if is_last(done_ptr, start):
        if MEAN_ROWS or MEAN_USED:
            box = tl.cast(0.0, ACC)
            obj = tl.cast(0.0, ACC)
            cls = tl.cast(0.0, ACC)
            assigned = tl.cast(0.0, ACC)
            at = partial_ptr
            for level in tl.static_range(len(LEVELS)):
                programs = B * len(LEVELS[level]) * tl.cdiv(HWs[level], CELLS)
                sums = column_sums(at, programs, N_PARTS, ACC)
                per_row = tl.cast(1.0, ACC)
                per_used = tl.cast(1.0, ACC)
                if MEAN_ROWS:
                    per_row = 1.0 / tl.maximum(column(sums, 4), 1.0)
                if MEAN_USED:
                    per_used = 1.0 / tl.maximum(column(sums, 5), 1.0)
                box += per_row * column(sums, 0)
                obj += per_used * column(sums, 1)
                cls += per_row * column(sums, 2)
                assigned += column(sums, 3)
                tl.store(parts_ptr + 3 + 2 * level, per_row)
                tl.store(parts_ptr + 4 + 2 * level, per_used)
                at += programs * N_PARTS
        else:
            sums = column_sums(partial_ptr, start, N_PARTS, ACC)
            box = column(sums, 0)
            obj = column(sums, 1)
            cls = column(sums, 2)
            assigned = column(sums, 3)
        tl.store(parts_ptr, box)
        tl.store(parts_ptr + 1, obj)
        tl.store(parts_ptr + 2, cls)
        tl.store(total_ptr, box + obj + cls)
        tl.store(counts_ptr, assigned.to(tl.int32))
        tl.store(done_ptr, 0)  # ready for the next launch
        tl.store(done_ptr + 1, 0)


@triton.jit
def _tile_grad(
    raw_ptr, d_ptr, s_raw, s_d, HW, scale, c0, state_ptr, true_obj_ptr, kept_ptr, base_ptr, grads, site,
    noobj_gain, prior_gain, C, shape, box_args, obj_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, OBJ: tl.constexpr, UNIT: tl.constexpr,
    SMOOTH: tl.constexpr, PRIOR: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile, every entry stored once."""
    W = site[1]
    K = 5 + C
    grad_rows, grad_obj = grads
    cells = c0 + tl.arange(0, CELLS)
    mask = cells < HW
    at = _at(raw_ptr, s_raw, cells, W, FLAT)
    obj = tl.load(at + 4 * s_raw[2], mask=mask, other=0.0).to(ACC)
    state = tl.load(state_ptr + cells, mask=mask, other=BACKGROUND).to(tl.int32)
    assigned = state >= ASSIGNED
    true_obj = tl.cast(0.0, ACC)
    counts = state == BACKGROUND
    if SMOOTH:
        true_obj = tl.load(true_obj_ptr + cells, mask=mask, other=0.0)
        counts = mask
    _loss, d_obj = OBJ(obj, true_obj, obj_args)
    d_obj = tl.where(counts, grad_obj * noobj_gain * d_obj, 0.0)
    d_prior = (d_obj, d_obj, d_obj, d_obj)
    if PRIOR:
        t = _load_box(at, s_raw[2], mask, ACC)
        _prior, d_prior = _prior_term(t, scale, site, shape, box_args, AXIS, BOX, OFFSET, UNIT, ACC)
    d_at = _at(d_ptr, s_d, cells, W, FLAT)
    here = tl.sum(assigned.to(tl.int32), axis=0)
    if here > 0:  # two loops, so that tiles without an assigned prediction have no loads in theirs
        slot = tl.load(base_ptr) + tl.cumsum(assigned.to(tl.int32), axis=0) - 1
        kept_at = kept_ptr + slot.to(tl.int64) * kept_stride(C)
        for k0 in range(0, K, CHANNELS):
            k = k0 + tl.arange(0, CHANNELS)
            d = _background_grad(k, d_obj, d_prior, grad_rows * prior_gain, PRIOR)
            kept = tl.load(kept_at[None, :] + k[:, None], mask=(k < K)[:, None] & assigned[None, :], other=0.0)
            kept *= tl.where(k == 4, grad_obj, grad_rows)[:, None]
            own = assigned[None, :]
            if SMOOTH:  # objectness takes no notice
                own = own & (k != 4)[:, None]
            d = tl.where(own, kept, d)
            tl.store(
                d_at[None, :] + (k * s_d[2])[:, None],
                d.to(d_ptr.dtype.element_ty),
                mask=(k < K)[:, None] & mask[None, :],
            )
    else:
        for k0 in range(0, K, CHANNELS):
            k = k0 + tl.arange(0, CHANNELS)
            d = _background_grad(k, d_obj, d_prior, grad_rows * prior_gain, PRIOR)
            tl.store(
                d_at[None, :] + (k * s_d[2])[:, None],
                d.to(d_ptr.dtype.element_ty),
                mask=(k < K)[:, None] & mask[None, :],
            )


@triton.jit
def _background_grad(k, d_obj, d_prior, prior_scale, PRIOR: tl.constexpr):
    """Gradient of some channels where nothing is assigned."""
    d = tl.where((k == 4)[:, None], d_obj[None, :], 0.0)
    if PRIOR:
        for i in tl.static_range(4):
            d = tl.where((k == i)[:, None], prior_scale * d_prior[i][None, :], d)
    return d


@triton.jit(do_not_specialize=["B"])
def grid_grad_kernel(
    raw_ptrs, d_ptrs, s_raws, s_ds, Ws, Hs, HWs, strides, scales, obj_scales, state_ptr, true_obj_ptr, kept_ptr,
    bases_ptr, parts_ptr, grad_out_ptr, anchors, gains, prior_gain, shape, box_args, obj_args, B, C,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, OBJ: tl.constexpr, UNIT: tl.constexpr,
    SMOOTH: tl.constexpr, PRIOR: tl.constexpr, MEAN_ROWS: tl.constexpr, MEAN_USED: tl.constexpr,
    FLAT: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr, CHANNELS: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """Gradient of the total, times ``grad_out``, with the grid, the arguments and the leavings of the loss launch.

    ``d_ptrs`` and ``s_ds`` are the gradients and their element strides, one a level.
    """
    pid = tl.program_id(0)
    grad_out = tl.load(grad_out_ptr).to(ACC)
    start = 0
    state_start = 0
    for level in tl.static_range(len(LEVELS)):
        here = B * len(LEVELS[level]) * tl.cdiv(HWs[level], CELLS)
        if (pid >= start) & (pid < start + here):
            b, a, c0, own, own_w, own_h = _place(pid, start, HWs[level], anchors[level], LEVELS, level, CELLS)
            s_raw = s_raws[level]
            s_d = s_ds[level]
            before = state_start + (b * len(LEVELS[level]) + a) * HWs[level]
            tile_true_obj_ptr = true_obj_ptr
            if true_obj_ptr is not None:
                tile_true_obj_ptr = true_obj_ptr + before
            grad_rows = grad_out
            grad_obj = grad_out
            if MEAN_ROWS or MEAN_USED:
                per_row, per_used = tl.split(tl.load(parts_ptr + 3 + 2 * level + tl.arange(0, 2)))
                grad_rows *= per_row
                grad_obj *= per_used
            site = (
                b, Ws[level], Hs[level], tl.cast(strides[level], ACC), own, tl.cast(own_w, ACC), tl.cast(own_h, ACC)
            )  # fmt: skip
            _tile_grad(
                raw_ptrs[level] + b.to(tl.int64) * s_raw[0] + a.to(tl.int64) * s_raw[1],
                d_ptrs[level] + b.to(tl.int64) * s_d[0] + a.to(tl.int64) * s_d[1],
                (s_raw[2], s_raw[3], s_raw[4]), (s_d[2], s_d[3], s_d[4]), HWs[level], tl.cast(scales[level], ACC), c0,
                state_ptr + before, tile_true_obj_ptr, kept_ptr, bases_ptr + pid, (grad_rows, grad_obj), site,
                tl.cast(obj_scales[level], ACC) * gains[2], prior_gain, C, shape, box_args, obj_args,
                AXIS, BOX, OFFSET, OBJ, UNIT, SMOOTH[level], PRIOR, FLAT, ACC, CELLS, CHANNELS,
            )  # fmt: skip
        start += here
        state_start += B * len(LEVELS[level]) * HWs[level]
