"""The ignore mask: which predictions of a tile overlap some true box by more than a threshold."""

import triton
import triton.language as tl

from ..assign import row_valid
from ..overlap import Corners, intersection
from ..primitives import near_divide
from ..rows import load_eight, load_rows
from .assign import true_corners
from .site import cells_at, channel_step


@triton.jit
def _near_boxes(g, rows, boxes_ptr, site, head, SPEC: tl.constexpr):
    """Leaves the boxes of those of a block of rows that the tile can overlap so much in ``boxes_ptr``; their number.

    The centre of a box that overlaps a true one by more than the threshold is less than ``reach`` heights of this away,
    and that of a prediction no further from its cell than the grid sensitivity allows.
    """
    NEAR: tl.constexpr = SPEC.NEAR
    row = load_rows(rows.ptr, g, g < rows.last, SPEC.NEAR)
    true, area = true_corners(row, site, SPEC.ACC)
    middle = 0.5 * (true.y1 + true.y2)
    reach = head.reach * (true.y2 - true.y1) + site.scale * site.side
    last_cell = tl.minimum(site.first_cell + SPEC.CELLS, site.HW) - 1
    near = (middle + reach > site.first_cell // site.W * site.side) & (
        middle - reach < (last_cell // site.W + 1) * site.side
    )
    near = (near & row_valid(row, site.b, site.b + 1, head.C, head.limit)).to(tl.int32)
    at = boxes_ptr + 8 * (tl.cumsum(near, axis=0) - 1)
    none = tl.zeros_like(area)
    even = tl.join(tl.join(true.x1, area), tl.join(true.x2, none))
    odd = tl.join(tl.join(true.y1, none), tl.join(true.y2, none))
    boxes = tl.reshape(tl.join(even, odd), (NEAR, 8))  # a sector each: edges, area, and three to spare
    tl.store(at[:, None] + tl.arange(0, 8)[None, :], boxes, mask=(near > 0)[:, None])
    return tl.sum(near, axis=0)


@triton.jit
def _decoded(logits, cells, site, terms):
    """The predicted boxes by their edges, in pixels, and their areas."""
    tx, ty, tw, th = logits
    x, _jx = terms.axis(tx, tw, site.own_w, site.side, site.scale)
    y, _jy = terms.axis(ty, th, site.own_h, site.side, site.scale)
    cx = x.centre + (cells % site.W) * site.side
    cy = y.centre + (cells // site.W) * site.side
    box = Corners(cx - 0.5 * x.size, cy - 0.5 * y.size, cx + 0.5 * x.size, cy + 0.5 * y.size)
    return box, x.size * y.size


@triton.jit
def _are_hot(plane, over, cells, site, head, SPEC: tl.constexpr):
    """Those of the predictions that are ``over`` that have some class logit above the gate."""
    CELLS: tl.constexpr = SPEC.CELLS
    at = cells_at(plane, cells, site, SPEC)
    hot = tl.zeros([CELLS], tl.int32)
    for k in tl.range(0, head.C, loop_unroll_factor=1):
        z = tl.load(at + (5 + k) * channel_step(plane.by, SPEC), mask=over, other=float("-inf")).to(SPEC.ACC)
        hot = tl.where(z > head.gate, 1, hot)
    return over & (hot == 1)


@triton.jit
def ignored(plane, logits, rows, boxes_ptr, site, head, terms, SPEC: tl.constexpr):
    """Whether the largest IoU of each prediction with a true box exceeds the threshold, and the gate is passed; and
    with SMOOTH this IoU, 0 elsewhere.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    box, area = _decoded(logits, cells, site, terms)
    best = tl.zeros([CELLS], SPEC.ACC)
    over = tl.zeros([CELLS], tl.int32)
    for g0 in range(rows.first, rows.last, SPEC.NEAR):
        near = _near_boxes(g0 + tl.arange(0, SPEC.NEAR), rows, boxes_ptr, site, head, SPEC)
        tl.debug_barrier()
        for i in tl.range(0, near, loop_unroll_factor=1):
            x1, y1, x2, y2, true_area, _spare = load_eight(boxes_ptr + 8 * i)
            shared = intersection(box, Corners(x1, y1, x2, y2))
            union = area + true_area - shared
            if SPEC.SMOOTH:
                best = tl.maximum(best, near_divide(shared, union))
            else:
                # shared / union, rounded, exceeds the threshold where it is nearer to the next number, or beyond it
                rest = tl.fma(-tl.cast(head.ignore_thresh, SPEC.ACC), union, shared)
                over = tl.where(rest > union * head.ignore_margin, 1, over)
        tl.debug_barrier()  # before the next boxes take the place of these
    hit = over > 0
    if SPEC.SMOOTH:
        hit = best > head.ignore_thresh
    hit = hit & (cells < site.HW)
    if SPEC.GATED:
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            hit = _are_hot(plane, hit, cells, site, head, SPEC)
    return hit, tl.where(hit, best, 0.0)
