"""What rows offer to all rows of their image, where predictions are picked by cost. Which ones is decided here, once;
they are listed with what all rows pay for them.
"""

import triton
import triton.language as tl

from ..assign import row_cell, row_valid
from ..boxes import store_corners
from ..levels import strides_of
from ..overlap import Corners
from ..picks.costs import class_costs
from ..picks.site import divided
from ..primitives import plain
from ..rows import Row, in_its_range, load_row, of_kind, rows_end
from .assign import matches
from .site import level_site, places_before

TOGETHER: tl.constexpr = tl.constexpr(32)  # offers of a row that are looked at at a time
SLACK: tl.constexpr = tl.constexpr(1e-5)  # of bounds, more than coordinates are rounded by


@triton.jit
def _level_of(place, SPEC: tl.constexpr):
    """The level of some tables."""
    level = place * 0
    end = level
    for i in tl.static_range(len(SPEC.ANCHORS) - 1):
        end += SPEC.ANCHORS[i] * SPEC.KINDS
        level += (place >= end).to(tl.int32)
    return level


@triton.jit
def taken_apart(place, SPEC: tl.constexpr):
    """Level, kind of cell and anchor of some tables."""
    level = _level_of(place, SPEC)
    before, anchors = places_before(level, SPEC)
    kind = (place - before) // anchors
    return level, kind, place - before - kind * anchors


@triton.jit
def prediction_at(maps, levels, image, level, anchor, x, y):
    """Where the first channel of predictions of an image lies, on any levels, and how far apart their channels are."""
    base = level.to(tl.int64) * 0 + maps[0].to(tl.int64)  # AMD's compiler chooses no pointers by tensors
    for i in tl.static_range(1, len(maps)):
        base = tl.where(level == i, maps[i].to(tl.int64), base)
    by = strides_of(levels.by, level)
    plane = image.to(tl.int64) * by.image + anchor.to(tl.int64) * by.anchor
    return base.to(maps[0].dtype) + (plane + (y * by.row + x * by.column)), by.channel + level * 0


@triton.jit
def _list_offers(row, g, there, image, levels, offers, head, terms, SPEC: tl.constexpr, WIDTH: tl.constexpr):
    """Enters the cells of a row into the tables, and those that there are into its list: how many."""
    place = tl.arange(0, WIDTH)
    used = place < SPEC.TABLES
    level, kind, anchor = taken_apart(place, SPEC)
    site = level_site(g, image, level, anchor, place * 0, levels, SPEC)
    valid = used & there & matches(row, site, head, terms, SPEC)
    cell = row_cell(row.cx, row.cy, valid, kind, site.W, site.H, SPEC.REACH)
    known = cell >= 0
    code = tl.where(known, image * site.HW + cell, -1)
    tl.store(offers.cell_ptr + (place * offers.M + g), code, mask=used)
    tl.store(offers.row_ptr + (place * offers.M + g), place * 0 + offers.M, mask=used)
    amount = known.to(tl.int32)
    at = g * SPEC.TABLES + tl.cumsum(amount, axis=0) - amount
    tl.store(offers.place_ptr + at, place, mask=known)
    tl.store(offers.code_ptr + at, code, mask=known)
    return tl.sum(amount, axis=0)


@triton.jit
def _price(g, count, image, maps, levels, offers, head, terms, SPEC: tl.constexpr, ACROSS: tl.constexpr):
    """Decodes what a row offers, and reckons what its classes cost; returns bounds of the boxes, in pixels."""
    low_x = tl.zeros([], SPEC.ACC) + float("inf")
    low_y = low_x
    high_x = -low_x
    high_y = -low_x
    for k0 in range(0, count, TOGETHER):
        k = k0 + tl.arange(0, TOGETHER)
        mask = k < count
        at = g * SPEC.TABLES + k
        place = tl.load(offers.place_ptr + at, mask=mask, other=0)
        level, _kind, anchor = taken_apart(place, SPEC)
        site = level_site(g, image, level, anchor, k * 0, levels, SPEC)
        cell = tl.where(mask, tl.load(offers.code_ptr + at, mask=mask, other=0) - image * site.HW, 0)
        line = divided(cell, site.W)
        column = cell - line * site.W
        first, step = prediction_at(maps, levels, image, level, anchor, column, line)
        tx = tl.load(first, mask=mask, other=0.0).to(SPEC.ACC)
        ty = tl.load(first + step, mask=mask, other=0.0).to(SPEC.ACC)
        tw = tl.load(first + 2 * step, mask=mask, other=0.0).to(SPEC.ACC)
        th = tl.load(first + 3 * step, mask=mask, other=0.0).to(SPEC.ACC)
        obj = tl.load(first + 4 * step, mask=mask, other=0.0).to(SPEC.ACC)
        x, _jx = terms.axis(tx, tw, site.own_w, site.side, site.scale)
        y, _jy = terms.axis(ty, th, site.own_h, site.side, site.scale)
        x1 = x.centre - 0.5 * x.size
        y1 = y.centre - 0.5 * y.size
        x2 = x.centre + 0.5 * x.size
        y2 = y.centre + 0.5 * y.size
        store_corners(offers.boxes_ptr, at.to(tl.int64), Corners(x1, y1, x2, y2), mask)
        tl.store(offers.obj_ptr + at, obj, mask=mask)
        at_class = (first + 5 * step)[None, :]
        shared = class_costs(at_class, obj[None, :], mask, step[None, :], head.C, ACROSS, SPEC.ACC)
        tl.store(offers.cost_ptr + at, tl.where(shared == shared, shared, float("inf")), mask=mask)
        left = column.to(SPEC.ACC) * site.side
        top = line.to(SPEC.ACC) * site.side
        low_x = tl.minimum(low_x, tl.min(tl.where(mask & (x1 == x1), left + x1, float("inf")), axis=0))
        low_y = tl.minimum(low_y, tl.min(tl.where(mask & (y1 == y1), top + y1, float("inf")), axis=0))
        high_x = tl.maximum(high_x, tl.max(tl.where(mask & (x2 == x2), left + x2, -float("inf")), axis=0))
        high_y = tl.maximum(high_y, tl.max(tl.where(mask & (y2 == y2), top + y2, -float("inf")), axis=0))
    return low_x, low_y, high_x, high_y


@triton.jit(do_not_specialize=["M"])
def offer_kernel(
    maps, levels, targets, M, offers, head, terms, SPEC: tl.constexpr, WIDTH: tl.constexpr, ACROSS: tl.constexpr
):
    """Fills tables and lists, see :class:`.records.Offers`; grid: a program a row, one at least. WIDTH is the least
    power of two that is no less than the number of tables.
    """
    g = tl.program_id(0)
    if g == 0:
        tl.store(offers.clashes_ptr, 0)
    if g < M:
        B = plain(levels.batch)
        there = g < rows_end(targets.offsets_ptr, M, B)
        row = of_kind(load_row(targets.ptr, g), g, there, targets.row_weights_ptr, "object")
        there = there & in_its_range(row.image, g, row_valid(row, 0, B, head.C, head.limit), targets.offsets_ptr)
        image = tl.where(there, row.image, 0.0).to(tl.int32)
        # padding has no sides, by which anchors cannot be divided
        row = Row(image, row.label, row.cx, row.cy, tl.where(there, row.w, 1.0), tl.where(there, row.h, 1.0))
        count = _list_offers(row, g, there, image, levels, offers, head, terms, SPEC=SPEC, WIDTH=WIDTH)
        tl.store(offers.count_ptr + g, count)
        if count > 0:
            tl.debug_barrier()
            x1, y1, x2, y2 = _price(g, count, image, maps, levels, offers, head, terms, SPEC=SPEC, ACROSS=ACROSS)
            slack = SLACK * (tl.abs(x1) + tl.abs(y1) + tl.abs(x2) + tl.abs(y2))
            tl.store(offers.bounds_ptr + g * 4, x1 - slack)
            tl.store(offers.bounds_ptr + g * 4 + 1, y1 - slack)
            tl.store(offers.bounds_ptr + g * 4 + 2, x2 + slack)
            tl.store(offers.bounds_ptr + g * 4 + 3, y2 + slack)
