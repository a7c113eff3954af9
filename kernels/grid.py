"""The driver of anchor-grid heads: the only place that loads and stores their predictions.

A prediction map is ``[B, A, H, W, 5 + C]`` by strides, channels x, y, w, h, objectness, classes. A program owns CELLS
consecutive cells of one image, level and anchor; all levels are one launch. It meets every target row of its image:
as a whole tile for the ignore mask, and again, in the few tiles that hold assigned predictions, one prediction at a
time. Class logits are read only there.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order, and, if asked, one byte
a prediction (BACKGROUND, IGNORED, ASSIGNED or SHARED) and the range of rows of each image. WITH_GRAD leaves the
gradient; without WITH_LOSS it takes these in place of the box logits, the ignore mask and the search for rows. Every
prediction's gradient is written by one program.
"""

import triton
import triton.language as tl

from .assign import anchor_assigned, row_cell, row_valid
from .reduce import column_sum, is_last
from .terms.label import bce

BACKGROUND: tl.constexpr = tl.constexpr(0)
IGNORED: tl.constexpr = tl.constexpr(1)
ASSIGNED: tl.constexpr = tl.constexpr(2)  # to one row
SHARED: tl.constexpr = tl.constexpr(3)  # to several
N_PARTS: tl.constexpr = tl.constexpr(4)  # box, objectness, class, assigned predictions


@triton.jit
def _load_row(rows_ptr, g):
    """Image, class, cx, cy, w, h of row g, in three accesses of two."""
    at = rows_ptr + g * 6 + tl.arange(0, 2)
    image, label = tl.split(tl.load(at))
    cx, cy = tl.split(tl.load(at + 2))
    w, h = tl.split(tl.load(at + 4))
    return image, label, cx, cy, w, h


@triton.jit
def _load_rows(rows_ptr, g, mask):
    """The same of a block of rows; rows masked out are of no image."""
    at = (rows_ptr + g * 6)[:, None] + tl.arange(0, 2)[None, :]
    image, label = tl.split(tl.load(at, mask=mask[:, None], other=-1.0))
    cx, cy = tl.split(tl.load(at + 2, mask=mask[:, None], other=-1.0))
    w, h = tl.split(tl.load(at + 4, mask=mask[:, None], other=-1.0))
    return image, label, cx, cy, w, h


@triton.jit
def _image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G: tl.constexpr):
    """The range that holds all rows of image b: exact with offsets, else from its first to its last row."""
    if offsets_ptr is not None:
        first = tl.load(offsets_ptr + b)
        last = tl.load(offsets_ptr + b + 1)
    else:
        g = tl.arange(0, BLOCK_G)
        lowest = g * 0 + M
        highest = g * 0
        for g0 in range(0, M, BLOCK_G):
            image = tl.load(rows_ptr + (g0 + g) * 6, mask=g0 + g < M, other=-1.0)
            here = (image >= b) & (image < b + 1)
            lowest = tl.where(here, tl.minimum(lowest, g0 + g), lowest)
            highest = tl.where(here, g0 + g + 1, highest)
        first = tl.min(lowest, axis=0)
        last = tl.max(highest, axis=0)
    return first, last


@triton.jit
def _next_row(rows_ptr, after, last, cell, site, rule, BLOCK_G: tl.constexpr, ACC: tl.constexpr):
    """The first row behind ``after`` assigned to the same prediction, or ``last``."""
    b, W, H, stride, own = site
    anchors, iou_thresh, C = rule
    found = last
    g0 = after + 1
    while (g0 < last) & (found == last):
        g = g0 + tl.arange(0, BLOCK_G)
        row = _load_rows(rows_ptr, g, g < last)
        here = (row_cell(row, b, W, H, C) == cell) & anchor_assigned(
            row[4].to(ACC) * (W * stride), row[5].to(ACC) * (H * stride), own, anchors, iou_thresh
        )
        found = tl.min(tl.where(here, g, last), axis=0)
        g0 += BLOCK_G
    return found


@triton.jit
def _count_invalid(rows_ptr, offsets_ptr, M, B, C, BLOCK_G: tl.constexpr):
    """Rows that no program will use; padding behind the last row is none."""
    end = M
    if offsets_ptr is not None:
        end = tl.load(offsets_ptr + B + 1)
    n = tl.zeros([BLOCK_G], tl.int32)
    for g0 in range(0, end, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        row = _load_rows(rows_ptr, g, g < end)
        valid = row_valid(row, 0, B, C)
        n += tl.where((g < end) & ~valid, 1, 0)
    return tl.sum(n, axis=0)


@triton.jit
def _ignore_mask(
    at, s_k, cells, mask, c0, box, scale, own_w, own_h, rows_ptr, first, last, site, rule, ignore_thresh, gate,
    AXIS: tl.constexpr, GATED: tl.constexpr, CELLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BACKGROUND, IGNORED, ASSIGNED or SHARED for every cell of a tile."""
    b, W, H, stride, own = site
    anchors, iou_thresh, C = rule
    x, _jx = AXIS(box[0], box[2], own_w, stride, scale)
    y, _jy = AXIS(box[1], box[3], own_h, stride, scale)
    px = x[0] + (cells % W) * stride
    py = y[0] + (cells // W) * stride
    px1 = px - 0.5 * x[1]
    px2 = px + 0.5 * x[1]
    py1 = py - 0.5 * y[1]
    py2 = py + 0.5 * y[1]
    area = x[1] * y[1]
    best = tl.zeros([CELLS], ACC)
    state = tl.zeros([CELLS], tl.int32) + BACKGROUND
    for g in range(first, last):
        row = _load_row(rows_ptr, g)
        cell = row_cell(row, b, W, H, C)
        if cell >= 0:
            gw = row[4].to(ACC) * (W * stride)
            gh = row[5].to(ACC) * (H * stride)
            gx = row[2].to(ACC) * (W * stride)
            gy = row[3].to(ACC) * (H * stride)
            ow = tl.minimum(px2, gx + 0.5 * gw) - tl.maximum(px1, gx - 0.5 * gw)
            oh = tl.minimum(py2, gy + 0.5 * gh) - tl.maximum(py1, gy - 0.5 * gh)
            inter = tl.maximum(ow, 0.0) * tl.maximum(oh, 0.0)
            best = tl.maximum(best, inter / (area + gw * gh - inter))
            if (cell >= c0) & (cell < c0 + CELLS):
                if anchor_assigned(gw, gh, own, anchors, iou_thresh):
                    state = tl.where(cells == cell, tl.where(state == BACKGROUND, ASSIGNED, SHARED), state)
    over = (best > ignore_thresh) & mask & (state == BACKGROUND)
    if GATED:
        if tl.max(over.to(tl.int32), axis=0) > 0:
            hot = tl.zeros([CELLS], tl.int32)
            for k in tl.range(0, C, loop_unroll_factor=1):
                z = tl.load(at + (5 + k) * s_k, mask=over, other=float("-inf")).to(ACC)
                hot = tl.where(z > gate, 1, hot)
            over = over & (hot == 1)
    return tl.where(over, IGNORED, state)


@triton.jit
def _box_term(
    t, row, cell, scale, own_w, own_h, site, area_weight, box_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, RELATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Box loss of one prediction against one row, and its gradient by the four box logits t."""
    _b, W, H, stride, _own = site
    gw = row[4].to(ACC)
    gh = row[5].to(ACC)
    # true centre from the cell's origin, in cells: the product is not rounded before the cell is taken off
    gx = tl.fma(row[2].to(ACC), W.to(ACC), -(cell % W).to(ACC))
    gy = tl.fma(row[3].to(ACC), H.to(ACC), -(cell // W).to(ACC))
    if OFFSET is not None:
        loss_x, dx, dw = OFFSET(t[0], t[2], gx, tl.log(gw * (W * stride) / own_w), scale)
        loss_y, dy, dh = OFFSET(t[1], t[3], gy, tl.log(gh * (H * stride) / own_h), scale)
        weight = 1.0 + area_weight * (1.0 - gw * gh)
        loss = weight * (loss_x + loss_y)
        d = (weight * dx, weight * dy, weight * dw, weight * dh)
    else:
        if RELATIVE:  # lengths in images
            unit_x = 1.0 / W.to(ACC)
            unit_y = 1.0 / H.to(ACC)
            own_w = own_w / (W * stride)
            own_h = own_h / (H * stride)
        else:  # in pixels
            unit_x = stride
            unit_y = stride
        gw = gw * (W * unit_x)
        gh = gh * (H * unit_y)
        x, jx = AXIS(t[0], t[2], own_w, unit_x, scale)
        y, jy = AXIS(t[1], t[3], own_h, unit_y, scale)
        dcx = x[0] - gx * unit_x
        dcy = y[0] - gy * unit_y
        hx = 0.5 * (gw - x[1])
        hy = 0.5 * (gh - y[1])
        loss, g_x, g_y = BOX((x[1], gw, dcx + hx, hx - dcx), (y[1], gh, dcy + hy, hy - dcy), box_args)
        d = (
            g_x[0] * jx[0] + g_x[1] * jx[2],
            g_y[0] * jy[0] + g_y[1] * jy[2],
            g_x[0] * jx[1] + g_x[1] * jx[3],
            g_y[0] * jy[1] + g_y[1] * jy[3],
        )
    return loss, d


@triton.jit
def _assigned_prediction(
    raw_ptr, d_ptr, s_raw, s_d, cell, shared, g, scale, own_w, own_h, rows_ptr, last, weights_ptr, grad_out, site, rule,
    numbers, box_args, label_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr, RELATIVE: tl.constexpr,
    AVERAGE: tl.constexpr, WITH_GRAD: tl.constexpr, C_PAD: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Box, objectness and class loss of the prediction at a cell; stores its gradient.

    ``g`` is its first row, ``shared`` says that there are others.
    """
    box_gain, obj_gain, _noobj, cls_gain, _ignore, _iou, _gate, area_weight, pos, neg, first_weight = numbers
    C = rule[2]
    # from channel to channel by one stride: multiples of it would be kept in registers across the loop over rows
    k = tl.arange(0, C_PAD)
    at = raw_ptr + (cell // site[1]) * s_raw[0] + (cell % site[1]) * s_raw[1]
    tx = tl.load(at).to(ACC)
    at += s_raw[2]
    ty = tl.load(at).to(ACC)
    at += s_raw[2]
    tw = tl.load(at).to(ACC)
    at += s_raw[2]
    th = tl.load(at).to(ACC)
    at += s_raw[2]
    obj = tl.load(at).to(ACC)
    at += s_raw[2]
    z = tl.load(at + k * s_raw[2], mask=k < C, other=0.0).to(ACC)
    y = tl.zeros([C_PAD], ACC) + neg
    weight = tl.zeros([C_PAD], ACC) + 1.0
    m = tl.cast(1.0, ACC)
    once = tl.cast(first_weight, ACC)
    box = tl.cast(0.0, ACC)
    d0 = box
    d1 = box
    d2 = box
    d3 = box
    while g < last:
        row = _load_row(rows_ptr, g)
        label = row[1].to(tl.int32)
        if weights_ptr is not None:
            m = tl.load(weights_ptr + label).to(ACC)
            weight = tl.where(k == label, m * once, weight)
            once = tl.cast(1.0, ACC)
        y = tl.where(k == label, pos, y)
        loss, d = _box_term(
            (tx, ty, tw, th),
            row,
            cell,
            scale,
            own_w,
            own_h,
            site,
            area_weight,
            box_args,
            AXIS,
            BOX,
            OFFSET,
            RELATIVE,
            ACC,
        )
        box += m * loss
        d0 += m * d[0]
        d1 += m * d[1]
        d2 += m * d[2]
        d3 += m * d[3]
        if shared:
            g = _next_row(rows_ptr, g, last, cell, site, rule, BLOCK_G, ACC)
        else:
            g = last
    box_scale = tl.cast(box_gain, ACC)
    if AVERAGE:
        pushed = tl.sum(tl.where((k < C) & (y > tl.sigmoid(z)), 1, 0), axis=0)
        box_scale = box_scale / tl.maximum(pushed, 1).to(ACC)
    loss_obj, d_obj = bce(obj, 1.0, ())
    loss_cls, d_cls = LABEL(z, y, label_args)
    if WITH_GRAD:
        d_at = d_ptr + (cell // site[1]) * s_d[0] + (cell % site[1]) * s_d[1]
        out = d_ptr.dtype.element_ty
        d_scale = grad_out * box_scale
        tl.store(d_at, (d_scale * d0).to(out))
        d_at += s_d[2]
        tl.store(d_at, (d_scale * d1).to(out))
        d_at += s_d[2]
        tl.store(d_at, (d_scale * d2).to(out))
        d_at += s_d[2]
        tl.store(d_at, (d_scale * d3).to(out))
        d_at += s_d[2]
        tl.store(d_at, (grad_out * obj_gain * m * d_obj).to(out))
        d_at += s_d[2]
        tl.store(d_at + k * s_d[2], (grad_out * cls_gain * weight * d_cls).to(out), mask=k < C)
    cls = tl.sum(tl.where(k < C, weight * loss_cls, 0.0), axis=0)
    return box_scale * box, obj_gain * m * loss_obj, cls_gain * cls


@triton.jit
def _tile(
    raw_ptr, d_ptr, s_raw, s_d, HW, scale, own_w, own_h, c0, state_ptr,
    rows_ptr, first, last, weights_ptr, grad_out, site, rule, numbers, box_args, label_args,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr,
    RELATIVE: tl.constexpr, GATED: tl.constexpr, AVERAGE: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, C_PAD: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """CELLS cells from c0 of one image, level and anchor: partial sums, state and gradient."""
    noobj_gain = numbers[2]
    b, W, H, stride, own = site
    anchors, iou_thresh, C = rule
    K = 5 + C
    cells = c0 + tl.arange(0, CELLS)
    mask = cells < HW
    if FLAT:  # a row of cells follows the one above: one stride serves
        at = raw_ptr + cells * s_raw[1]
        d_at = cells * s_d[1]
    else:
        at = raw_ptr + (cells // W) * s_raw[0] + (cells % W) * s_raw[1]
        d_at = (cells // W) * s_d[0] + (cells % W) * s_d[1]
    obj = tl.load(at + 4 * s_raw[2], mask=mask, other=0.0).to(ACC)
    loss_obj, d_obj = bce(obj, 0.0, ())

    part_box = tl.cast(0.0, ACC)
    part_obj = tl.cast(0.0, ACC)
    part_cls = tl.cast(0.0, ACC)
    assigned = tl.cast(0.0, ACC)
    if WITH_LOSS:
        tx = tl.load(at, mask=mask, other=0.0).to(ACC)
        ty = tl.load(at + s_raw[2], mask=mask, other=0.0).to(ACC)
        tw = tl.load(at + 2 * s_raw[2], mask=mask, other=0.0).to(ACC)
        th = tl.load(at + 3 * s_raw[2], mask=mask, other=0.0).to(ACC)
        # a NaN box logit shows in the total even where no row needs it
        bad = (tx != tx) | (ty != ty) | (tw != tw) | (th != th)
        state = _ignore_mask(
            at, s_raw[2], cells, mask, c0, (tx, ty, tw, th), scale, own_w, own_h, rows_ptr, first, last, site, rule,
            numbers[4], numbers[6], AXIS, GATED, CELLS, ACC,
        )  # fmt: skip
        loss_obj = tl.where(bad, float("nan"), tl.where(state == BACKGROUND, noobj_gain * loss_obj, 0.0))
        part_obj += tl.sum(tl.where(mask, loss_obj, 0.0), axis=0)
        if state_ptr is not None:
            tl.store(state_ptr + cells, state.to(tl.uint8), mask=mask)
    else:
        state = tl.load(state_ptr + cells, mask=mask, other=BACKGROUND).to(tl.int32)

    if WITH_GRAD:
        d_obj = tl.where(state == BACKGROUND, grad_out * noobj_gain * d_obj, 0.0)
        for k0 in range(0, K, CHANNELS):
            k = k0 + tl.arange(0, CHANNELS)
            d = tl.where((k == 4)[:, None], d_obj[None, :], 0.0)
            keep = (k < K)[:, None] & mask[None, :]
            tl.store(d_ptr + (k * s_d[2])[:, None] + d_at[None, :], d.to(d_ptr.dtype.element_ty), mask=keep)

    pending = tl.where((state >= ASSIGNED) & mask, state, 0)
    if tl.max(pending, axis=0) > 0:
        if WITH_GRAD:
            tl.debug_barrier()  # what follows overwrites entries that other threads of this program have just stored
        for g in range(first, last):
            row = _load_row(rows_ptr, g)
            cell = row_cell(row, b, W, H, C)
            if (cell >= c0) & (cell < c0 + CELLS):
                gw = row[4].to(ACC) * (W * stride)
                gh = row[5].to(ACC) * (H * stride)
                kind = tl.max(tl.where(cells == cell, pending, 0), axis=0)
                if (kind > 0) & anchor_assigned(gw, gh, own, anchors, iou_thresh):  # the first row on this prediction
                    pending = tl.where(cells == cell, 0, pending)
                    box, one, cls = _assigned_prediction(
                        raw_ptr, d_ptr, s_raw, s_d, cell, kind == SHARED, g, scale, own_w, own_h, rows_ptr, last,
                        weights_ptr, grad_out, site, rule, numbers, box_args, label_args,
                        AXIS, BOX, OFFSET, LABEL, RELATIVE, AVERAGE, WITH_GRAD, C_PAD, BLOCK_G, ACC,
                    )  # fmt: skip
                    part_box += box
                    part_obj += one
                    part_cls += cls
                    assigned += 1.0
    return part_box, part_obj, part_cls, assigned


@triton.jit(do_not_specialize=["B", "M"])
def grid_kernel(
    raw_ptrs, d_ptrs, s_raws, s_ds, Ws, Hs, HWs, strides, scales, state_ptr, ranges_ptr,
    rows_ptr, offsets_ptr, M, weights_ptr, grad_out_ptr, anchors, numbers, box_args, label_args, B, C,
    total_ptr, parts_ptr, counts_ptr, partial_ptr, done_ptr,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr,
    RELATIVE: tl.constexpr, GATED: tl.constexpr, AVERAGE: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, FLAT: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, C_PAD: tl.constexpr, BLOCK_G: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of an anchor-grid head; grid: one program for each level, image, anchor and CELLS cells.

    Tuples ending in s hold one entry a level: ``raw_ptrs`` and ``d_ptrs`` the maps, ``s_raws`` and ``s_ds`` their
    element strides (image, anchor, row, column, channel). ``LEVELS`` holds, a level, the indices of its anchors in
    ``anchors``. ``done_ptr`` counts finished programs: 0 before and after every launch. H * W is an argument of its own
    because only then does the compiler know that every plane is aligned.
    """
    pid = tl.program_id(0)
    grad_out = tl.cast(0.0, ACC)
    if WITH_GRAD:
        grad_out = tl.load(grad_out_ptr).to(ACC)
    start = 0
    state_start = 0
    for level in tl.static_range(len(LEVELS)):
        tiles = tl.cdiv(HWs[level], CELLS)
        here = B * len(LEVELS[level]) * tiles
        if (pid >= start) & (pid < start + here):
            ba = (pid - start) // tiles
            a = ba % len(LEVELS[level])
            b = ba // len(LEVELS[level])
            own = LEVELS[level][0]
            for t in tl.static_range(1, len(LEVELS[level])):
                own = tl.where(a == t, LEVELS[level][t], own)
            own_w = tl.cast(anchors[0], ACC)
            own_h = tl.cast(anchors[1], ACC)
            for t in tl.static_range(1, len(anchors) // 2):
                own_w = tl.where(own == t, tl.cast(anchors[2 * t], ACC), own_w)
                own_h = tl.where(own == t, tl.cast(anchors[2 * t + 1], ACC), own_h)
            if WITH_LOSS:
                first, last = _image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G)
                if ranges_ptr is not None:
                    if (level == 0) & (a == 0) & (pid == start + ba * tiles):  # one program an image
                        tl.store(ranges_ptr + 2 * b, first)
                        tl.store(ranges_ptr + 2 * b + 1, last)
            else:
                first = tl.load(ranges_ptr + 2 * b)
                last = tl.load(ranges_ptr + 2 * b + 1)
            s_raw = s_raws[level]
            raw_ptr = raw_ptrs[level] + b.to(tl.int64) * s_raw[0] + a.to(tl.int64) * s_raw[1]
            s_d = s_raw
            d_ptr = raw_ptr
            if WITH_GRAD:
                s_d = s_ds[level]
                d_ptr = d_ptrs[level] + b.to(tl.int64) * s_d[0] + a.to(tl.int64) * s_d[1]
            tile_state_ptr = state_ptr
            if state_ptr is not None:
                tile_state_ptr = state_ptr + (state_start + ba * HWs[level])
            site = (b, Ws[level], Hs[level], tl.cast(strides[level], ACC), own)
            rule = (anchors, numbers[5], C)
            box, obj, cls, assigned = _tile(
                raw_ptr, d_ptr, (s_raw[2], s_raw[3], s_raw[4]), (s_d[2], s_d[3], s_d[4]), HWs[level],
                tl.cast(scales[level], ACC), own_w, own_h, ((pid - start) % tiles) * CELLS, tile_state_ptr,
                rows_ptr, first, last, weights_ptr, grad_out, site, rule, numbers, box_args, label_args,
                AXIS, BOX, OFFSET, LABEL, RELATIVE, GATED, AVERAGE, WITH_LOSS, WITH_GRAD, FLAT, ACC,
                CELLS, CHANNELS, C_PAD, BLOCK_G,
            )  # fmt: skip
            if WITH_LOSS:
                tl.store(partial_ptr + pid * N_PARTS, box)
                tl.store(partial_ptr + pid * N_PARTS + 1, obj)
                tl.store(partial_ptr + pid * N_PARTS + 2, cls)
                tl.store(partial_ptr + pid * N_PARTS + 3, assigned)
        start += here
        state_start += B * len(LEVELS[level]) * HWs[level]

    if WITH_LOSS:
        if pid == 0:
            tl.store(counts_ptr + 1, _count_invalid(rows_ptr, offsets_ptr, M, B, C, BLOCK_G))
        if is_last(done_ptr, start):
            box = column_sum(partial_ptr, start, 0, N_PARTS, ACC)
            obj = column_sum(partial_ptr, start, 1, N_PARTS, ACC)
            cls = column_sum(partial_ptr, start, 2, N_PARTS, ACC)
            assigned = column_sum(partial_ptr, start, 3, N_PARTS, ACC)
            tl.store(parts_ptr, box)
            tl.store(parts_ptr + 1, obj)
            tl.store(parts_ptr + 2, cls)
            tl.store(total_ptr, box + obj + cls)
            tl.store(counts_ptr, assigned.to(tl.int32))
            tl.store(done_ptr, 0)  # ready for the next launch
