"""The ignore mask: which predictions of a tile overlap some true box by more than a threshold."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..assign import row_valid
from ..overlap import Corners, intersection, iou
from ..primitives import near_divide
from ..rows import load_rows, of_kind
from .assign import true_corners
from .site import cells_at, channel_step

WINDOW: tl.constexpr = tl.constexpr(64)  # cells that a row may reach, to look at them itself
MET: tl.constexpr = tl.constexpr(2)  # steps of rows that all look at a cell, for a row that all cells look at
FEW: tl.constexpr = tl.constexpr(48)  # rows of an image that are not worth leaving the predictions for


class Window(NamedTuple):
    """Of rows the cells whose predictions may overlap them so much: a rectangle, as far as the tile has its lines."""

    first: Any  # cell
    width: Any
    cells: Any  # 0 where there are none


@triton.jit
def _span(middle, size, side, scale, head):
    """First and last cell, on one axis, whose predictions may overlap a true box by more than the threshold.

    Their centres are less than ``reach`` sizes of the box from its own, and no further from their cells than the grid
    sensitivity ``scale`` allows. The hundredth of a cell is for what is rounded; what is beyond 65,536 cells is so far.
    """
    FAR: tl.constexpr = 65536.0
    outside = tl.maximum(0.5 * (scale - 1.0), 0.0) + 0.01
    low = (middle - head.reach * size) / side - 1.0 - outside
    high = (middle + head.reach * size) / side + outside
    first = tl.floor(tl.minimum(tl.maximum(low, -FAR), FAR)).to(tl.int32) + 1
    last = tl.ceil(tl.minimum(tl.maximum(high, -FAR), FAR)).to(tl.int32) - 1
    return first, last


@triton.jit
def _window(row, true, site, head, SPEC: tl.constexpr):
    """The :class:`Window` of rows with the boxes ``true``."""
    x0, x1 = _span(0.5 * (true.x1 + true.x2), true.x2 - true.x1, site.side, site.scale, head)
    y0, y1 = _span(0.5 * (true.y1 + true.y2), true.y2 - true.y1, site.side, site.scale, head)
    x0 = tl.maximum(x0, 0)
    y0 = tl.maximum(y0, site.first_cell // site.W)
    width = tl.minimum(x1, site.W - 1) - x0 + 1
    height = tl.minimum(y1, (site.end_cell - 1) // site.W) - y0 + 1
    some = (tl.minimum(width, height) > 0) & row_valid(row, site.b, site.b + 1, head.C, head.limit)
    return Window(y0 * site.W + x0, width, tl.where(some, width * height, 0))


@triton.jit
def _exceeds(p, q, p_area, q_area, head, ACC: tl.constexpr):
    """Whether the IoU of two boxes exceeds the threshold: it does where the quotient, rounded, is nearer to the next
    number, or beyond it.
    """
    shared = intersection(p, q)
    union = p_area + q_area - shared
    return tl.fma(-tl.cast(head.ignore_thresh, ACC), union, shared) > union * head.ignore_margin


@triton.jit
def _meet_in_windows(true, area, window, most, lists, site, head, SPEC: tl.constexpr):
    """Marks which of the predictions that have been left in ``decoded_ptr`` overlap a row, each in its own window, of
    at most so many cells.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    cell = window.first - site.first_cell
    column = cell * 0
    for i in tl.range(0, most, loop_unroll_factor=1):
        inside = (i < window.cells) & (cell >= 0) & (cell < site.end_cell - site.first_cell)
        at = lists.decoded_ptr + cell
        x1 = tl.load(at, mask=inside, other=0.0)
        y1 = tl.load(at + CELLS, mask=inside, other=0.0)
        x2 = tl.load(at + 2 * CELLS, mask=inside, other=0.0)
        y2 = tl.load(at + 3 * CELLS, mask=inside, other=0.0)
        own = tl.load(at + 4 * CELLS, mask=inside, other=0.0)
        over = _exceeds(Corners(x1, y1, x2, y2), true, own, area, head, SPEC.ACC)
        tl.atomic_or(lists.marks_ptr + cell, 1, mask=inside & over, sem="relaxed")
        column += 1
        wraps = column == window.width
        cell += tl.where(wraps, site.W - window.width + 1, 1)
        column = tl.where(wraps, 0, column)


@triton.jit
def _leave_boxes(true, area, these, boxes_ptr, SPEC: tl.constexpr):
    """Leaves these of a block of boxes: ROWS numbers of each kind, one kind behind the other."""
    at = boxes_ptr + tl.cumsum(these, axis=0) - 1
    mask = these > 0
    tl.store(at, true.x1, mask=mask)
    tl.store(at + SPEC.ROWS, true.y1, mask=mask)
    tl.store(at + 2 * SPEC.ROWS, true.x2, mask=mask)
    tl.store(at + 3 * SPEC.ROWS, true.y2, mask=mask)
    tl.store(at + 4 * SPEC.ROWS, area, mask=mask)


@triton.jit
def _left_box(at, SPEC: tl.constexpr):
    """One of the boxes that :func:`_leave_boxes` has left, and its area."""
    x1 = tl.load(at)
    y1 = tl.load(at + SPEC.ROWS)
    x2 = tl.load(at + 2 * SPEC.ROWS)
    y2 = tl.load(at + 3 * SPEC.ROWS)
    return Corners(x1, y1, x2, y2), tl.load(at + 4 * SPEC.ROWS)


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
def _are_hot(plane, over, lists, site, head, SPEC: tl.constexpr):
    """Those of the predictions that are ``over`` that have some class logit above the gate.

    They are few: listed, so that all classes of several are on their way at a time.
    """
    lane = tl.arange(0, SPEC.CELLS)
    hits = over.to(tl.int32)
    place = tl.cumsum(hits, axis=0) - 1
    count = tl.sum(hits, axis=0)
    tl.store(lists.marks_ptr + place, site.first_cell + lane, mask=over)
    tl.debug_barrier()
    k = tl.arange(0, SPEC.K_PAD)[:, None]
    is_class = (k >= 5) & (k < 5 + head.C)
    for slot0 in tl.range(0, count, SPEC.PICKS, loop_unroll_factor=1):
        slot = slot0 + tl.arange(0, SPEC.PICKS)
        cell = tl.load(lists.marks_ptr + slot, mask=slot < count, other=0)
        at = cells_at(plane, cell, site, SPEC)[None, :] + k * channel_step(plane.by, SPEC)
        z = tl.load(at, mask=(slot < count)[None, :] & is_class, other=float("-inf")).to(SPEC.ACC)
        hot = tl.max((z > head.gate).to(tl.int32), axis=0)
        tl.store(lists.decoded_ptr + slot, hot.to(SPEC.ACC), mask=slot < count)  # the boxes have been met
    tl.debug_barrier()
    hot = tl.load(lists.decoded_ptr + place, mask=over, other=0.0)
    return over & (hot > 0)


@triton.jit
def ignored(plane, logits, rows, lists, site, head, terms, SPEC: tl.constexpr):
    """Whether the largest IoU of each prediction with a true box exceeds the threshold, and the gate is passed; and
    with SMOOTH this IoU, 0 elsewhere.

    Rows lie in lanes. A row that may reach few cells looks at these, where there are many such rows; each of the others
    is met by all of the tile.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    lane = tl.arange(0, SPEC.CELLS)
    cells = site.first_cell + lane
    box, own_area = _decoded(logits, cells, site, terms)
    best = tl.zeros([CELLS], SPEC.ACC)
    over = tl.zeros([CELLS], tl.int32)
    left = site.pid * 0
    for g0 in range(rows.first, rows.last, SPEC.ROWS):
        g = g0 + tl.arange(0, SPEC.ROWS)
        row = load_rows(rows.ptr, g, g < rows.last, SPEC.ROWS)
        row = of_kind(row, g, g < rows.last, rows.row_weights_ptr, "object")
        true, area = true_corners(row, site, SPEC.ACC)
        window = _window(row, true, site, head, SPEC)
        these = (window.cells > 0).to(tl.int32)
        if not SPEC.SMOOTH:
            small = tl.where(window.cells <= WINDOW, window.cells, 0)
            most = site.pid * 0
            some = site.pid * 0
            if rows.last - rows.first > FEW:
                most = tl.max(small, axis=0)
                some = tl.sum((small > 0).to(tl.int32), axis=0)
            if MET * some > most + MET * 2:
                these = tl.where(small > 0, 0, these)
                if left == 0:
                    tl.store(lists.decoded_ptr + lane, box.x1)
                    tl.store(lists.decoded_ptr + CELLS + lane, box.y1)
                    tl.store(lists.decoded_ptr + 2 * CELLS + lane, box.x2)
                    tl.store(lists.decoded_ptr + 3 * CELLS + lane, box.y2)
                    tl.store(lists.decoded_ptr + 4 * CELLS + lane, own_area)
                    tl.store(lists.marks_ptr + lane, tl.zeros([CELLS], tl.int32))
                    tl.debug_barrier()
                    left += 1
                _meet_in_windows(true, area, Window(window.first, window.width, small), most, lists, site, head, SPEC)
        near = tl.sum(these, axis=0)
        if near > 0:
            _leave_boxes(true, area, these, lists.boxes_ptr, SPEC)
            tl.debug_barrier()
            for i in tl.range(0, near, loop_unroll_factor=1):
                met, true_area = _left_box(lists.boxes_ptr + i, SPEC)
                if SPEC.SMOOTH:
                    best = tl.maximum(best, iou(box, met, own_area, true_area, near_divide))
                else:
                    over = tl.where(_exceeds(box, met, own_area, true_area, head, SPEC.ACC), 1, over)
            tl.debug_barrier()  # before the next boxes take the place of these
    if left > 0:
        tl.debug_barrier()
        over = tl.maximum(over, tl.load(lists.marks_ptr + lane))
        tl.debug_barrier()  # before something else is marked
    hit = over > 0
    if SPEC.SMOOTH:
        hit = best > head.ignore_thresh
    hit = hit & (cells < site.end_cell)
    if SPEC.GATED:
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            hit = _are_hot(plane, hit, lists, site, head, SPEC)
    return hit, tl.where(hit, best, 0.0)
