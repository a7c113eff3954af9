"""Who gets which of the predictions that the rows of an image offer. Each row picks those that cost it least, as many
as its largest overlaps add up to; what several pick goes to the one of all rows that it costs least.

Costs are those of SimOTA, of picked cells: see ``kernels/picks/wish.py``. A prediction that a row does not overlap
costs it more than FAR. So it looks at what those rows offer whose predictions it may overlap, and at everything only if
it has not enough of these.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..assign import row_valid
from ..boxes import load_corners
from ..levels import integer_of, number_of
from ..overlap import Corners, iou
from ..picks.kept import Kept, best_of, dynamic_k, keep, keys_of, nothing_kept
from ..picks.site import divided
from ..picks.wish import FAR, LAST, bits_of, by_cost, cost, none_of
from ..primitives import divide, plain
from ..rows import image_rows, in_its_range, load_row, load_rows, of_kind, rows_end
from .offer import TOGETHER, prediction_at, taken_apart

SEVERAL: tl.constexpr = tl.constexpr(-1)  # rows picked it
SCANNED: tl.constexpr = tl.constexpr(128)  # rows at a time, for those of an image
ROWS: tl.constexpr = tl.constexpr(4)  # whose offers are looked at at once


class One(NamedTuple):
    """A row, or one a lane; its image and class, its centre relative to the image, and its sides in pixels."""

    image: Any
    label: Any
    cx: Any
    cy: Any
    width: Any
    height: Any


class Look(NamedTuple):
    """What predictions are to a row."""

    overlap: Any
    met: Any  # keys of overlaps
    wanted: Any  # keys of costs


@triton.jit
def _height(levels, ACC: tl.constexpr):
    """Of the image, in pixels: what the peer multiplies widths by, too."""
    return plain(levels.heights[0]).to(ACC) * tl.cast(levels.cell_sides[0], ACC)


@triton.jit
def _one_of(row, valid, levels, ACC: tl.constexpr):
    """Rows as they are compared, of those that are not valid a legal one."""
    height = _height(levels, ACC)
    return One(
        tl.where(valid, row.image, 0.0).to(tl.int32),
        tl.where(valid, row.label, 0.0).to(tl.int32),
        tl.where(valid, row.cx, 0.5).to(ACC),
        tl.where(valid, row.cy, 0.5).to(ACC),
        tl.where(valid, row.w, 1.0).to(ACC) * height,
        tl.where(valid, row.h, 1.0).to(ACC) * height,
    )


@triton.jit
def _look_at(one, at, there, maps, levels, offers, SPEC: tl.constexpr):
    """Predictions offered, ``at`` their places in lists; rows look at those of their image."""
    # all that was left of them at once
    box = load_corners(offers.boxes_ptr, at.to(tl.int64), there)
    shared = tl.load(offers.cost_ptr + at, mask=there, other=float("inf"))
    obj = tl.load(offers.obj_ptr + at, mask=there, other=0.0)
    code = tl.load(offers.code_ptr + at, mask=there, other=-1)
    level, _kind, anchor = taken_apart(tl.load(offers.place_ptr + at, mask=there, other=0), SPEC)
    W = integer_of(levels.widths, level)
    HW = W * integer_of(levels.heights, level)
    cell = code - one.image * HW
    mask = there & (cell >= 0) & (cell < HW)
    cell = tl.where(mask, cell, 0)
    y = divided(cell, W)
    x = cell - y * W
    side = tl.cast(number_of(levels.cell_sides, level), SPEC.ACC)
    zero = tl.zeros_like(side)  # a fused operation takes no numbers of different shapes
    height = zero + _height(levels, SPEC.ACC)
    off_x = tl.fma(zero + one.cx, height, -(x.to(SPEC.ACC) * side))
    off_y = tl.fma(zero + one.cy, height, -(y.to(SPEC.ACC) * side))
    hx = 0.5 * one.width
    hy = 0.5 * one.height
    true = Corners(off_x - hx, off_y - hy, off_x + hx, off_y + hy)
    overlap = iou(box, true, (box.x2 - box.x1) * (box.y2 - box.y1), one.width * one.height, divide)
    overlap = tl.where(mask & (overlap > 0), overlap, 0.0)
    first, step = prediction_at(maps, levels, one.image, level, anchor, x, y)
    cls = tl.load(first + (5 + one.label).to(tl.int64) * step, mask=mask, other=0.0).to(SPEC.ACC)
    can = mask & (shared < float("inf"))
    value = cost(tl.where(can, shared, 0.0), cls, obj, overlap)
    met = tl.where(can & (overlap > 0), bits_of(overlap), none_of(overlap))
    return Look(overlap, met, by_cost(value, can, can))


@triton.jit
def _meets(one, r, mask, levels, offers, ACC: tl.constexpr):
    """Which rows offer predictions that a row may overlap."""
    bounds = load_corners(offers.bounds_ptr, r.to(tl.int64), mask)
    height = _height(levels, ACC)
    x = one.cx * height
    y = one.cy * height
    across = (bounds.x1 < x + 0.5 * one.width) & (bounds.x2 > x - 0.5 * one.width)
    return across & (bounds.y1 < y + 0.5 * one.height) & (bounds.y2 > y - 0.5 * one.height)


@triton.jit
def _best_offered(
    one, first, last, everywhere, maps, levels, offers, SPEC: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr
):
    """How many a row picks, and the keys and entries of least cost: of what rows offer whose predictions it may meet,
    or of everything.
    """
    none = none_of(tl.zeros([], SPEC.ACC))
    most = nothing_kept(none, COUNT, K)
    most_key = most.key
    most_n = most.n
    most_overlap = most.overlap
    key = most.key
    n = most.n
    overlap = most.overlap
    place = tl.arange(0, ROWS * TOGETHER) % TOGETHER
    turn = tl.arange(0, ROWS * TOGETHER) // TOGETHER
    for r0 in range(first, last, TOGETHER):
        r = r0 + tl.arange(0, TOGETHER)
        counts = tl.load(offers.count_ptr + r, mask=r < last, other=0)
        left = (counts > 0) & (_meets(one, r, counts > 0, levels, offers, SPEC.ACC) | everywhere)
        while tl.max(left.to(tl.int32), axis=0) > 0:
            by = turn
            count = turn * 0
            for i in tl.static_range(ROWS):
                next_one = tl.min(tl.where(left, r, LAST), axis=0)
                by = tl.where(turn == i, next_one, by)
                # sooner there than what is loaded
                count = tl.where(turn == i, tl.max(tl.where(r == next_one, counts, 0), axis=0), count)
                left = left & (r > next_one)
            for k0 in range(0, tl.max(count, axis=0), TOGETHER):
                there = k0 + place < count
                at = by * SPEC.TABLES + (k0 + place)
                look = _look_at(one, at, there, maps, levels, offers, SPEC)
                entry = tl.load(offers.place_ptr + at, mask=there, other=0) * offers.M + by
                most = keep(Kept(most_key, most_n, most_overlap), look.met, entry, look.overlap, none)
                most_key = most.key
                most_n = most.n
                most_overlap = most.overlap
                kept = keep(Kept(key, n, overlap), look.wanted, entry, look.overlap, none)
                key = kept.key
                n = kept.n
                overlap = kept.overlap
    picks = dynamic_k(Kept(most_key, most_n, most_overlap), none, COUNT, SPEC.ACC)
    return picks, keys_of(Kept(key, n, overlap), none, COUNT), n


@triton.jit
def _pick(g, chosen, entry, M, offers):
    """Puts the row down where it picks; what another has picked before is listed, once."""
    before = tl.atomic_min(offers.row_ptr + entry, g, mask=chosen, sem="relaxed")
    again = chosen & (before != M)
    if tl.max(again.to(tl.int32), axis=0) > 0:
        marked = tl.atomic_min(offers.row_ptr + entry, entry * 0 + SEVERAL, mask=again, sem="relaxed")
        new = (again & (marked != SEVERAL)).to(tl.int32)
        first = tl.atomic_add(offers.clashes_ptr, tl.sum(new, axis=0), sem="relaxed")
        tl.store(offers.clash_ptr + (first + tl.cumsum(new, axis=0) - new), entry, mask=new > 0)


@triton.jit(do_not_specialize=["M"])
def choose_kernel(maps, levels, targets, M, offers, head, SPEC: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr):
    """What a row picks, COUNT at most; grid: a program a row, one at least. K is the least power of two that is no less
    than COUNT.
    """
    g = tl.program_id(0)
    B = plain(levels.batch)
    there = g < rows_end(targets.offsets_ptr, M, B)
    if there:
        row = of_kind(load_row(targets.ptr, g), g, there, targets.row_weights_ptr, "object")
        if in_its_range(row.image, g, row_valid(row, 0, B, head.C, head.limit), targets.offsets_ptr):
            one = _one_of(row, there, levels, SPEC.ACC)
            first, last = image_rows(targets.ptr, targets.offsets_ptr, M, one.image, SCANNED)
            none = none_of(tl.zeros([], SPEC.ACC))
            near = by_cost(tl.full([], FAR, SPEC.ACC), there, there)
            nothing = nothing_kept(none, COUNT, K)
            key = nothing.key
            n = nothing.n
            picks = g * 0
            everywhere = g < 0
            enough = g < 0
            while ~enough:
                picks, key, n = _best_offered(
                    one, first, last, everywhere, maps, levels, offers, SPEC=SPEC, COUNT=COUNT, K=K
                )
                enough = everywhere | (tl.sum((key > near).to(tl.int32), axis=0) >= picks)
                everywhere = g >= 0
            _pick(g, best_of(key, n, picks, none), n, M, offers)


@triton.jit
def _in_list(entry, M, offers, SPEC: tl.constexpr, WIDTH: tl.constexpr):
    """Where an entry of the tables is in the list of its row."""
    place = entry // M
    first = (entry - place * M) * SPEC.TABLES
    k = tl.arange(0, WIDTH)
    there = k < tl.load(offers.count_ptr + (entry - place * M))
    found = tl.load(offers.place_ptr + first + k, mask=there, other=-1) == place
    return first + tl.sum(tl.where(found, k, 0), axis=0)


@triton.jit(do_not_specialize=["M"])
def award_kernel(maps, levels, targets, M, offers, head, SPEC: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gives what several rows picked to one of all rows of the image, BLOCK at a time; programs share out the list.
    WIDTH as of ``offer``.
    """
    count = tl.load(offers.clashes_ptr)
    for c in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = tl.load(offers.clash_ptr + c)
        at = _in_list(entry, M, offers, SPEC, WIDTH)
        level, _kind, _anchor = taken_apart(entry // M, SPEC)
        image = tl.load(offers.cell_ptr + entry) // (
            integer_of(levels.widths, level) * integer_of(levels.heights, level)
        )
        first, last = image_rows(targets.ptr, targets.offsets_ptr, M, image, SCANNED)
        top = none_of(tl.zeros([], SPEC.ACC))
        who = entry * 0 + M
        for g0 in range(first, last, BLOCK):
            g = g0 + tl.arange(0, BLOCK)
            row = of_kind(load_rows(targets.ptr, g, g < last, BLOCK), g, g < last, targets.row_weights_ptr, "object")
            valid = row_valid(row, image, image + 1, head.C, head.limit)
            one = _one_of(row, valid, levels, SPEC.ACC)
            look = _look_at(one, g * 0 + at, valid, maps, levels, offers, SPEC)
            most = tl.max(look.wanted, axis=0)
            who = tl.where(most > top, tl.min(tl.where(look.wanted == most, g, LAST), axis=0), who)
            top = tl.maximum(top, most)
        tl.store(offers.row_ptr + entry, who)
