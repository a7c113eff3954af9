"""Which predictions a target row is assigned to: on loaded values, scalars or blocks; nothing is differentiated.

A match rule is ``rule(w, h, site, thresh, PER_LEVEL)``: whether a row of this width and height takes the anchor
``site.own``, which is ``site.own_w`` by ``site.own_h``; all in pixels. It competes with those of ``site.pool``, (w0,
h0, w1, h1, ...), or with PER_LEVEL only with those from ``first`` to ``end`` there.
"""

import triton
import triton.language as tl

from .launch import LARGEST_SIDE
from .primitives import larger, near_divide, smaller

TOO_LARGE: tl.constexpr = tl.constexpr(LARGEST_SIDE)  # for a side


@triton.jit
def row_valid(row, first_image, last_image, classes, limit):
    """All six finite, image, class and sides in range, centre inside the image. NaN compares false.

    ``row`` is image, class, cx, cy, w, h; the image must lie in [first_image, last_image), the class in [0, classes),
    the centre in [0, limit).
    """
    image, label, cx, cy, w, h = row
    known = (image >= first_image) & (image < last_image) & (label < classes)
    area = (smaller(w, h) > 0) & (larger(w, h) < TOO_LARGE)
    return known & area & (smaller(label, smaller(cx, cy)) >= 0) & (larger(cx, cy) < limit)


@triton.jit
def row_cell(cx, cy, valid, kind, W, H, REACH: tl.constexpr):
    """Flat index of the cell that holds the centre of a valid row, -1 for any other row.

    With a REACH above 0, of one of five cells: by ``kind`` its own, or that left, above, right, below, -1 unless the
    centre is less than REACH cells from it: with 0.5 in the half of its cell that is next to it, with 1 anywhere. A
    centre at the far border belongs to the last cell. Centres are multiplied in float32 as the peers do, whatever the
    compute type.
    """
    gx = tl.where(valid, cx, 0.0) * W
    gy = tl.where(valid, cy, 0.0) * H
    if REACH > 0:
        along = tl.where((kind == 1) | (kind == 3), gx, gy)
        far = tl.where(kind == 3, W - gx, H - gy)
        along = tl.where(kind >= 3, far, along)  # distance from the border on the neighbour's side
        valid = valid & ((kind == 0) | ((along - tl.floor(along) < REACH) & (along > 1.0)))
        gx -= tl.where(kind == 1, REACH, tl.where(kind == 3, -REACH, 0.0))
        gy -= tl.where(kind == 2, REACH, tl.where(kind == 4, -REACH, 0.0))
    i = tl.minimum(gx.to(tl.int32), W - 1)
    j = tl.minimum(gy.to(tl.int32), H - 1)
    return tl.where(valid, j * W + i, -1)


@triton.jit
def best_anchor(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    """The row's best anchor (the first of equals, IoU above 0), or one whose IoU exceeds ``thresh``.

    The IoU is that of two boxes with one centre. A threshold of 1 is never exceeded.
    """
    best = w * 0.0
    best_index = (w * 0.0).to(tl.int32) - 1
    own_iou = best
    for t in tl.static_range(len(site.pool.sides) // 2):
        side_w = site.pool.sides[2 * t]
        side_h = site.pool.sides[2 * t + 1]
        inter = tl.minimum(w, side_w) * tl.minimum(h, side_h)
        value = near_divide(inter, w * h + side_w * side_h - inter)
        if PER_LEVEL:
            value = tl.where((t >= site.pool.first) & (t < site.pool.end), value, 0.0)
        best_index = tl.where(value > best, t, best_index)
        best = tl.maximum(best, value)
        own_iou = tl.where(site.own == t, value, own_iou)
    return (best_index == site.own) | (own_iou > thresh)


@triton.jit
def shape_iou(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    """The IoU of two boxes with one centre exceeds ``thresh``, whatever that of other anchors."""
    inter = tl.minimum(w, site.own_w) * tl.minimum(h, site.own_h)
    return near_divide(inter, w * h + site.own_w * site.own_h - inter) > thresh


@triton.jit
def ratio(w, h, site, thresh, PER_LEVEL: tl.constexpr):
    """No side more than ``thresh`` times that of the anchor, nor less than its ``thresh``-th part."""
    rw = near_divide(w, site.own_w)
    rh = near_divide(h, site.own_h)
    return tl.maximum(tl.maximum(rw, near_divide(1.0, rw)), tl.maximum(rh, near_divide(1.0, rh))) < thresh
