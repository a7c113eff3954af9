"""What rows offer to all rows of their image, where predictions are picked by cost. Which ones is decided here, once;
they are listed with what all rows pay for them.
"""

import triton
import triton.language as tl

from ..assign import row_cell, row_valid
from ..levels import pointer_of, strides_of
from ..picks.costs import class_costs
from ..primitives import plain
from ..rows import in_its_range, load_rows, of_kind, rows_end
from .assign import matches
from .records import Plane
from .site import cells_at, channel_step, level_site, places_before


@triton.jit
def _level_of(place, SPEC: tl.constexpr):
    """The level of a table."""
    level = place * 0
    end = level
    for i in tl.static_range(len(SPEC.ANCHORS) - 1):
        end += SPEC.ANCHORS[i] * SPEC.KINDS
        level += (place >= end).to(tl.int32)
    return level


@triton.jit
def taken_apart(place, SPEC: tl.constexpr):
    """Level, kind of cell and anchor of a table, or of some."""
    level = _level_of(place, SPEC)
    before, anchors = places_before(level, SPEC)
    kind = (place - before) // anchors
    return level, kind, place - before - kind * anchors


@triton.jit
def _store_boxes(ptr, at, x, y, mask):
    """Corners of boxes, in one access, from their centres and sizes."""
    x1 = x.centre - 0.5 * x.size
    y1 = y.centre - 0.5 * y.size
    boxes = tl.join(tl.join(x1, x.centre + 0.5 * x.size), tl.join(y1, y.centre + 0.5 * y.size))
    boxes = tl.reshape(boxes, (at.shape[0], 4))
    tl.store(ptr + at.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :], boxes, mask=mask[:, None])


@triton.jit(do_not_specialize=["M"])
def offer_kernel(maps, levels, targets, M, offers, head, terms, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Fills the tables, see :class:`.records.Offers`; grid: of each table a program for BLOCK rows, one at least."""
    blocks = tl.maximum(tl.cdiv(M, BLOCK), 1)
    place = tl.program_id(0) // blocks
    g = (tl.program_id(0) - place * blocks) * BLOCK + tl.arange(0, BLOCK)
    B = plain(levels.batch)
    there = g < rows_end(targets.offsets_ptr, M, B)
    row = of_kind(load_rows(targets.ptr, g, there, BLOCK), g, there, targets.row_weights_ptr, "object")
    valid = in_its_range(row.image, g, row_valid(row, 0, B, head.C, head.limit), targets.offsets_ptr)
    level, kind, anchor = taken_apart(place, SPEC)
    image = tl.where(valid, row.image, 0.0).to(tl.int32)
    site = level_site(place, image, level, anchor, g * 0, levels, SPEC)
    valid = valid & matches(row, site, head, terms, SPEC)
    cell = row_cell(row.cx, row.cy, valid, kind, site.W, site.H, SPEC.REACH)
    known = cell >= 0
    at = place * M + g
    tl.store(offers.cell_ptr + at, tl.where(known, image * site.HW + cell, -1), mask=g < M)
    tl.store(offers.row_ptr + at, g * 0 + M, mask=g < M)
    if tl.program_id(0) == 0:
        tl.store(offers.count_ptr, 0)
    if tl.max(known.to(tl.int32), axis=0) > 0:
        plane = Plane(pointer_of(maps, level), strides_of(levels.by, level))
        step = channel_step(plane.by, SPEC)
        first = cells_at(plane, tl.where(known, cell, 0), site, SPEC)
        tx = tl.load(first, mask=known, other=0.0).to(SPEC.ACC)
        ty = tl.load(first + step, mask=known, other=0.0).to(SPEC.ACC)
        tw = tl.load(first + 2 * step, mask=known, other=0.0).to(SPEC.ACC)
        th = tl.load(first + 3 * step, mask=known, other=0.0).to(SPEC.ACC)
        obj = tl.load(first + 4 * step, mask=known, other=0.0).to(SPEC.ACC)
        x, _jx = terms.axis(tx, tw, site.own_w, site.side, site.scale)
        y, _jy = terms.axis(ty, th, site.own_h, site.side, site.scale)
        _store_boxes(offers.boxes_ptr, at, x, y, known)
        tl.store(offers.obj_ptr + at, obj, mask=known)
        shared = class_costs((first + 5 * step)[None, :], obj[None, :], known, step, head.C, SPEC.ACC)
        tl.store(offers.cost_ptr + at, tl.where(shared == shared, shared, float("inf")), mask=known)
