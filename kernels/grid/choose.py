"""Who gets which of the predictions that the rows of an image offer. Each row picks those that cost it least, as many
as its largest overlaps add up to; what several pick goes to the one of all rows that it costs least.

Costs are those of SimOTA, of picked cells: see ``kernels/picks/wish.py``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..assign import row_valid
from ..levels import integer_of, number_of, strides_of
from ..overlap import Corners, iou
from ..picks.kept import Kept, best_of, dynamic_k, keep, keys_of, nothing_kept
from ..picks.site import divided, load_boxes
from ..picks.wish import LAST, bits_of, by_cost, cost, none_of
from ..primitives import divide, plain
from ..rows import image_rows, in_its_range, load_row, load_rows, of_kind, rows_end
from .offer import taken_apart

SEVERAL: tl.constexpr = tl.constexpr(-1)  # rows picked it
SCANNED: tl.constexpr = tl.constexpr(128)  # rows at a time, for those of an image


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
def _logit(maps, levels, one, level, anchor, x, y, mask, SPEC: tl.constexpr):
    """The logits of the class of a row, at predictions of several levels."""
    base = level.to(tl.int64) * 0 + maps[0].to(tl.int64)  # AMD's compiler chooses no pointers by tensors
    for i in tl.static_range(1, len(maps)):
        base = tl.where(level == i, maps[i].to(tl.int64), base)
    by = strides_of(levels.by, level)
    plane = one.image.to(tl.int64) * by.image + anchor.to(tl.int64) * by.anchor
    channel = (5 + one.label).to(tl.int64) * by.channel
    at = base.to(maps[0].dtype) + (plane + channel + (y * by.row + x * by.column))
    return tl.load(at, mask=mask, other=0.0).to(SPEC.ACC)


@triton.jit
def _look_at(one, at, there, maps, levels, offers, SPEC: tl.constexpr):
    """Predictions offered, ``at`` their places in the tables; rows look at those of their image."""
    level, _kind, anchor = taken_apart(at // offers.M, SPEC)
    W = integer_of(levels.widths, level)
    HW = W * integer_of(levels.heights, level)
    cell = tl.load(offers.cell_ptr + at, mask=there, other=-1) - one.image * HW
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
    box = load_boxes(offers.boxes_ptr, at.to(tl.int64), mask)
    true = Corners(off_x - hx, off_y - hy, off_x + hx, off_y + hy)
    overlap = iou(box, true, (box.x2 - box.x1) * (box.y2 - box.y1), one.width * one.height, divide)
    overlap = tl.where(mask & (overlap > 0), overlap, 0.0)
    shared = tl.load(offers.cost_ptr + at, mask=mask, other=float("inf"))
    obj = tl.load(offers.obj_ptr + at, mask=mask, other=0.0)
    cls = _logit(maps, levels, one, level, anchor, x, y, mask, SPEC)
    can = mask & (shared < float("inf"))
    value = cost(tl.where(can, shared, 0.0), cls, obj, overlap)
    met = tl.where(can & (overlap > 0), bits_of(overlap), none_of(overlap))
    return Look(overlap, met, by_cost(value, can, can))


@triton.jit
def _pick(g, chosen, at, M, offers):
    """Puts the row down where it picks; what another has picked before is listed, once."""
    before = tl.atomic_min(offers.row_ptr + at, g, mask=chosen, sem="relaxed")
    again = chosen & (before != M)
    if tl.max(again.to(tl.int32), axis=0) > 0:
        marked = tl.atomic_min(offers.row_ptr + at, at * 0 + SEVERAL, mask=again, sem="relaxed")
        new = (again & (marked != SEVERAL)).to(tl.int32)
        first = tl.atomic_add(offers.count_ptr, tl.sum(new, axis=0), sem="relaxed")
        tl.store(offers.clash_ptr + (first + tl.cumsum(new, axis=0) - new), at, mask=new > 0)


@triton.jit(do_not_specialize=["M"])
def choose_kernel(
    maps,
    levels,
    targets,
    M,
    offers,
    head,
    SPEC: tl.constexpr,
    COUNT: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What a row picks, COUNT at most, by BLOCK offers at a time; grid: a program a row, one at least. K is the least
    power of two that is no less than COUNT.
    """
    g = tl.program_id(0)
    B = plain(levels.batch)
    there = g < rows_end(targets.offsets_ptr, M, B)
    if there:
        row = of_kind(load_row(targets.ptr, g), g, there, targets.row_weights_ptr, "object")
        if in_its_range(row.image, g, row_valid(row, 0, B, head.C, head.limit), targets.offsets_ptr):
            one = _one_of(row, there, levels, SPEC.ACC)
            first, last = image_rows(targets.ptr, targets.offsets_ptr, M, one.image, SCANNED)
            near = last - first
            none = none_of(tl.zeros([], SPEC.ACC))
            most = nothing_kept(none, COUNT, K)
            most_key = most.key
            most_n = most.n
            most_overlap = most.overlap
            key = most.key
            n = most.n
            overlap = most.overlap
            for i0 in range(0, near * SPEC.TABLES, BLOCK):
                i = i0 + tl.arange(0, BLOCK)
                place = i // near
                at = place * M + first + (i - place * near)
                look = _look_at(one, at, i < near * SPEC.TABLES, maps, levels, offers, SPEC)
                most = keep(Kept(most_key, most_n, most_overlap), look.met, at, look.overlap, none)
                most_key = most.key
                most_n = most.n
                most_overlap = most.overlap
                kept = keep(Kept(key, n, overlap), look.wanted, at, look.overlap, none)
                key = kept.key
                n = kept.n
                overlap = kept.overlap
            picks = dynamic_k(Kept(most_key, most_n, most_overlap), none, COUNT, SPEC.ACC)
            own = keys_of(Kept(key, n, overlap), none, COUNT)
            _pick(g, best_of(own, n, picks, none), n, M, offers)


@triton.jit(do_not_specialize=["M"])
def award_kernel(maps, levels, targets, M, offers, head, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Gives what several rows picked to one of all rows of the image, BLOCK at a time; programs share out the list."""
    count = tl.load(offers.count_ptr)
    for c in range(tl.program_id(0), count, tl.num_programs(0)):
        at = tl.load(offers.clash_ptr + c)
        level, _kind, _anchor = taken_apart(at // M, SPEC)
        HW = integer_of(levels.widths, level) * integer_of(levels.heights, level)
        image = tl.load(offers.cell_ptr + at) // HW
        first, last = image_rows(targets.ptr, targets.offsets_ptr, M, image, SCANNED)
        top = none_of(tl.zeros([], SPEC.ACC))
        who = at * 0 + M
        for g0 in range(first, last, BLOCK):
            g = g0 + tl.arange(0, BLOCK)
            row = of_kind(load_rows(targets.ptr, g, g < last, BLOCK), g, g < last, targets.row_weights_ptr, "object")
            valid = row_valid(row, image, image + 1, head.C, head.limit)
            one = _one_of(row, valid, levels, SPEC.ACC)
            look = _look_at(one, g * 0 + at, valid, maps, levels, offers, SPEC)
            most = tl.max(look.wanted, axis=0)
            who = tl.where(most > top, tl.min(tl.where(look.wanted == most, g, LAST), axis=0), who)
            top = tl.maximum(top, most)
        tl.store(offers.row_ptr + at, who)
