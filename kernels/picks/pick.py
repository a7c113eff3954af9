"""What each row picks: the best cells of its region, or of SimOTA of all candidates, kept as these go by."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives import plain
from .site import Cells, all_cells, cells_at, cells_before, load_object, stride_of
from .wish import LAST, bits_of, claim_of, is_own, look_at, none_of, reach

SEVERAL: tl.constexpr = tl.constexpr(-1)  # rows picked a cell


class Kept(NamedTuple):
    """The best so far, in any order: keys, indices and bits of overlaps, in as many places as a warp has threads or
    more. Places of nothing have the least key, those beyond what is kept one above all.
    """

    key: Any
    n: Any
    overlap: Any


class Worst(NamedTuple):
    """What is to be beaten."""

    key: Any
    n: Any


@triton.jit
def nothing_kept(none, COUNT, K: tl.constexpr):
    """Places for COUNT cells, of K at most."""
    PLACES: tl.constexpr = K if K > 32 else 32
    lane = tl.arange(0, PLACES)
    key = tl.where(lane < COUNT, none, -1 - none)
    return Kept(key, LAST.value - PLACES + lane, tl.zeros_like(key))


@triton.jit
def worst_of(kept):
    """The least key, of equals that of the last cell."""
    key = tl.min(kept.key, axis=0)
    return Worst(key, tl.max(tl.where(kept.key == key, kept.n, -1), axis=0))


@triton.jit
def beats(key, n, worst):
    """Whether cells come before another."""
    return (key > worst.key) | ((key == worst.key) & (n < worst.n))


@triton.jit
def keep(kept, key, n, overlap, none):
    """The best of those kept and of a block of others, of which equals come by their index."""
    kept_key = kept.key
    kept_n = kept.n
    kept_overlap = kept.overlap
    worst = worst_of(kept)
    worst_key = worst.key
    worst_n = worst.n
    better = (key > none) & beats(key, n, worst)
    more = tl.max(better.to(tl.int32), axis=0)
    while more > 0:
        top = tl.max(tl.where(better, key, none), axis=0)
        first = tl.min(tl.where(better & (key == top), n, LAST), axis=0)
        place = (kept_key == worst_key) & (kept_n == worst_n)
        kept_key = tl.where(place, top, kept_key)
        kept_n = tl.where(place, first, kept_n)
        taken = better & (key == top) & (n == first)
        kept_overlap = tl.where(place, tl.max(tl.where(taken, bits_of(overlap), 0), axis=0), kept_overlap)
        least = worst_of(Kept(kept_key, kept_n, kept_overlap))
        worst_key = least.key
        worst_n = least.n
        better = better & beats(key, n, least) & ~taken
        more = tl.max(better.to(tl.int32), axis=0)
    return Kept(kept_key, kept_n, kept_overlap)


@triton.jit
def keys_of(kept, none, COUNT):
    """Keys of those kept, of other places none."""
    return tl.where(tl.arange(0, kept.key.shape[0]) < COUNT, kept.key, none)


@triton.jit
def ranks(kept, key):
    """How many of those kept come before each: 0, 1, ..."""
    n = kept.n[:, None]
    before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (kept.n[None, :] < n))
    return tl.sum(before.to(tl.int32), axis=1)


@triton.jit
def _span(centre, far, stride, count):
    """The first of ``count`` cells whose middle may be so far from a centre, and how many there are."""
    inverse = 1.0 / stride
    first = tl.maximum(tl.ceil((centre - far) * inverse - 0.625), 0.0)  # a cell's half and a margin
    last = tl.minimum(tl.floor((centre + far) * inverse - 0.375), tl.cast(count - 1, centre.dtype))
    number = tl.maximum(last - first + 1.0, 0.0)
    return tl.minimum(first, tl.cast(count, centre.dtype)).to(tl.int32), number.to(tl.int32)


@triton.jit
def _rectangle(one, problem, LEVEL: tl.constexpr, SPEC: tl.constexpr):
    """The first column and line of a level that an object reaches, and how many of each."""
    levels = problem.levels
    stride = tl.cast(levels.strides[LEVEL], SPEC.ACC)
    far_x, far_y = reach(one, stride, problem.numbers, SPEC)
    x, columns = _span(one.cx * problem.frame.width, far_x, stride, plain(levels.widths[LEVEL]))
    y, lines = _span(one.cy * problem.frame.height, far_y, stride, plain(levels.heights[LEVEL]))
    return x, columns, y, lines


@triton.jit
def _reached(one, problem, SPEC: tl.constexpr):
    """How many cells an object reaches, on all levels."""
    total = plain(problem.levels.widths[0]) * 0
    for i in tl.static_range(len(problem.levels.widths)):
        _x, columns, _y, lines = _rectangle(one, problem, i, SPEC)
        total += columns * lines
    return total


@triton.jit
def _cells_reached(one, i, problem, SPEC: tl.constexpr):
    """Those cells, by their place among them: level by level, line by line."""
    levels = problem.levels
    level = i * 0
    local = i
    width = level + 1
    first_x = level
    first_y = level
    first_n = level
    W = level
    start = plain(levels.widths[0]) * 0
    for k in tl.static_range(len(levels.widths)):
        x, columns, y, lines = _rectangle(one, problem, k, SPEC)
        here = (i >= start) & (columns * lines > 0)
        level = tl.where(here, k, level)
        local = tl.where(here, i - start, local)
        width = tl.where(here, columns, width)
        first_x = tl.where(here, x, first_x)
        first_y = tl.where(here, y, first_y)
        first_n = tl.where(here, cells_before(levels, k), first_n)
        W = tl.where(here, plain(levels.widths[k]), W)
        start += columns * lines
    line = local // width
    column = first_x + local - line * width
    line += first_y
    return Cells(first_n + line * W + column, level, line, column, stride_of(level, levels, SPEC))


@triton.jit
def _claim(one, g, cells, look, mask, problem, decoded):
    """Claims to cells, whoever picks them: the largest counts where several do."""
    at = one.image * all_cells(problem.levels) + cells.n
    tl.atomic_max(decoded.claim_ptr + at, claim_of(look.strength, g), mask=mask, sem="relaxed")


@triton.jit
def _best_reached(one, g, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The best cells of a region, all of which are claimed."""
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    total = _reached(one, problem, SPEC)
    for i0 in range(0, total, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        cells = _cells_reached(one, i, problem, SPEC)
        look = look_at(one, cells, i < total, problem, decoded, SPEC)
        _claim(one, g, cells, look, look.can, problem, decoded)
        kept = keep(Kept(key, n, overlap), look.key, cells.n, look.overlap, none)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
    return Kept(key, n, overlap)


@triton.jit
def _best_candidates(one, g, problem, decoded, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The best candidates, and how many an object picks: the sum of its largest IoUs, rounded down, at least one. It
    claims its own, and those that are no object's own.
    """
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    most_key = kept.key
    most_n = kept.n
    most_overlap = kept.overlap
    total = tl.load(tally.found_ptr + 2 + one.image)
    candidates = decoded.list_ptr + one.image.to(tl.int64) * all_cells(problem.levels)
    for i0 in range(0, total, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        entry = tl.load(candidates + i, mask=i < total, other=0)
        cells = cells_at(tl.where(entry < 0, -1 - entry, entry), problem.levels, SPEC)
        look = look_at(one, cells, i < total, problem, decoded, SPEC)
        _claim(one, g, cells, look, look.can & ((entry < 0) | is_own(look)), problem, decoded)
        kept = keep(Kept(key, n, overlap), look.key, cells.n, look.overlap, none)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
        most_of = tl.where(look.can & (look.overlap > 0), bits_of(look.overlap), none)
        most = keep(Kept(most_key, most_n, most_overlap), most_of, cells.n, look.overlap, none)
        most_key = most.key
        most_n = most.n
        most_overlap = most.overlap
    most = Kept(most_key, most_n, most_overlap)
    bits = keys_of(most, none, SPEC.TOPK)
    rank = ranks(most, bits)
    place = tl.arange(0, rank.shape[0])[:, None]
    value = tl.where(bits > none, most_overlap, 0).to(SPEC.ACC, bitcast=True)
    largest = tl.sum(tl.where(rank[None, :] == place, value[None, :], 0.0), axis=1)  # so that no order shows
    picks = tl.maximum(tl.sum(largest, axis=0).to(tl.int32), 1)
    return Kept(key, n, overlap), picks


@triton.jit(do_not_specialize=["M"])
def pick_kernel(problem, targets, M, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Picks and claims of a row, a program each: see :class:`.records.Picked`."""
    g = tl.program_id(0)
    one = load_object(targets, g, M, problem.frame, SPEC)
    if one.valid:
        none = none_of(tl.zeros([], SPEC.ACC))
        if SPEC.ASSIGNER == "aligned":
            kept = _best_reached(one, g, problem, decoded, SPEC, BLOCK)
            key = keys_of(kept, none, SPEC.TOPK)
            rank = tl.arange(0, key.shape[0])  # all of them are picked, in any order
            chosen = key > none
        else:
            kept, picks = _best_candidates(one, g, problem, decoded, tally, SPEC, BLOCK)
            key = keys_of(kept, none, SPEC.TOPK)
            rank = ranks(kept, key)
            chosen = (key > none) & (rank < picks)
        cell = one.image * all_cells(problem.levels) + kept.n
        at = g.to(tl.int64) * SPEC.K + rank
        stored = rank < SPEC.K
        tl.store(picked.index_ptr + at, tl.where(chosen, cell, -1), mask=stored)
        tl.store(picked.overlap_ptr + at, kept.overlap.to(SPEC.ACC, bitcast=True), mask=stored)
        if SPEC.ASSIGNER == "aligned":
            tl.store(picked.worth_ptr + at, key.to(SPEC.ACC, bitcast=True), mask=stored)
        before = tl.atomic_min(decoded.picker_ptr + cell, g, mask=chosen, sem="relaxed")
        again = chosen & (before != M)
        if tl.max(again.to(tl.int32), axis=0) > 0:
            marked = tl.atomic_min(decoded.picker_ptr + cell, cell * 0 + SEVERAL, mask=again, sem="relaxed")
            new = (again & (marked != SEVERAL)).to(tl.int32)
            count = tl.sum(new, axis=0)
            if count > 0:
                place = tl.cumsum(new, axis=0) - new + tl.atomic_add(tally.done_ptr + 1, count, sem="relaxed")
                tl.store(picked.clash_ptr + place, cell, mask=new > 0)
