"""What each row picks: the best cells of its region, kept as these go by; of SimOTA, where its own are not enough, of
all candidates.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .region import cells_reached, reached
from .site import all_cells, cells_at, load_boxes, load_object, offsets
from .views import tiles_of
from .wish import LAST, bits_of, claim_of, is_own, look_at, none_of, overlap_of

SEVERAL: tl.constexpr = tl.constexpr(-1)  # rows picked a cell
WARP: tl.constexpr = tl.constexpr(32)  # tiles, and candidates of a tile, that are looked at at a time


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
def _first_of(key, n):
    """The largest key, of equals the first cell."""
    top = tl.max(key, axis=0)
    return top, tl.min(tl.where(key == top, n, LAST), axis=0)


@triton.jit
def keep(kept, key, n, overlap, none):
    """The best of those kept and of a block of others, of which equals come by their index: one after the other, until
    one is no better than the worst of those kept, for then none of the rest is.
    """
    kept_key = kept.key
    kept_n = kept.n
    kept_overlap = kept.overlap
    worst = worst_of(kept)
    worst_key = worst.key
    worst_n = worst.n
    top, first = _first_of(key, n)
    more = (top > none) & beats(top, first, worst)
    while more:
        place = (kept_key == worst_key) & (kept_n == worst_n)
        taken = (n == first) & (key == top)
        kept_key = tl.where(place, top, kept_key)
        kept_n = tl.where(place, first, kept_n)
        kept_overlap = tl.where(place, tl.max(tl.where(taken, bits_of(overlap), 0), axis=0), kept_overlap)
        least = worst_of(Kept(kept_key, kept_n, kept_overlap))
        worst_key = least.key
        worst_n = least.n
        key = tl.where(taken, none, key)
        top, first = _first_of(key, n)
        more = (top > none) & beats(top, first, least)
    return Kept(kept_key, kept_n, kept_overlap)


@triton.jit
def keys_of(kept, none, COUNT):
    """Keys of those kept, of other places none."""
    return tl.where(tl.arange(0, kept.key.shape[0]) < COUNT, kept.key, none)


@triton.jit
def _best_of(key, n, count, none):
    """Which are the best of those kept, so many."""
    chosen = key != key
    while count > 0:
        top, first = _first_of(key, n)
        taken = (key == top) & (n == first) & (key > none)
        chosen = chosen | taken
        key = tl.where(taken, none, key)
        count -= 1
    return chosen


@triton.jit
def _claim(one, g, cells, look, mask, problem, decoded):
    """Claims to cells, whoever picks them: the largest counts where several do."""
    at = one.image * all_cells(problem.levels) + cells.n
    tl.atomic_max(decoded.claim_ptr + at, claim_of(look.strength, g), mask=mask, sem="relaxed")


@triton.jit
def _best_reached(one, g, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The best cells of a region, all of which are claimed; of SimOTA those of its own."""
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    total = reached(one, problem, SPEC)
    for i0 in range(0, total, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        cells = cells_reached(one, i, problem, SPEC)
        look = look_at(one, cells, i < total, problem, decoded, SPEC)
        wanted = look.key
        can = look.can
        if SPEC.ASSIGNER == "simota":
            can = can & is_own(look)
            wanted = tl.where(can, wanted, none)
        _claim(one, g, cells, look, can, problem, decoded)
        kept = keep(Kept(key, n, overlap), wanted, cells.n, look.overlap, none)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
    return Kept(key, n, overlap)


# ---------------------------------------------------------------------------------------------------- SimOTA: the rest


@triton.jit
def _listed(one, tile, j0, problem, decoded, tiles, SPEC: tl.constexpr):
    """A block of the candidates of a tile: entries of its list, which of the block there are, and the cells."""
    record = decoded.tiles_ptr + (one.image * tiles + tile).to(tl.int64) * 2
    j = j0 + tl.arange(0, WARP)
    there = j < tl.load(record + 1)
    at = one.image.to(tl.int64) * all_cells(problem.levels) + tl.load(record)
    entry = tl.load(decoded.list_ptr + at + j, mask=there, other=0)
    return entry, there, cells_at(tl.where(entry < 0, -1 - entry, entry), problem.levels, SPEC)


@triton.jit
def _candidates_of(one, tile, decoded, tiles):
    """How many candidates a tile has."""
    return tl.load(decoded.tiles_ptr + (one.image * tiles + tile).to(tl.int64) * 2 + 1)


@triton.jit
def _met(one, t, tiles, problem, decoded):
    """Whether the boxes of candidates of these tiles may overlap an object."""
    there = t < tiles
    at = (one.image * tiles + t).to(tl.int64)
    count = tl.load(decoded.tiles_ptr + at * 2 + 1, mask=there, other=0)
    bounds = load_boxes(decoded.bounds_ptr, at, there & (count > 0))
    x = one.cx * problem.frame.width
    y = one.cy * problem.frame.height
    across = (bounds.x1 < x + 0.5 * one.width) & (bounds.x2 > x - 0.5 * one.width)
    along = (bounds.y1 < y + 0.5 * one.height) & (bounds.y2 > y - 0.5 * one.height)
    return (count > 0) & across & along


@triton.jit
def _how_many(one, problem, decoded, SPEC: tl.constexpr, CELLS: tl.constexpr):
    """How many cells an object picks: the sum of its largest IoUs with candidates, rounded down, at least one."""
    none = none_of(tl.zeros([], SPEC.ACC))
    most = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = most.key
    n = most.n
    overlap = most.overlap
    tiles = tiles_of(problem.levels, CELLS)
    for t0 in range(0, tiles, WARP):
        t = t0 + tl.arange(0, WARP)
        left = _met(one, t, tiles, problem, decoded)
        tile = tl.min(tl.where(left, t, LAST), axis=0)
        while tile < LAST:
            for j0 in range(0, _candidates_of(one, tile, decoded, tiles), WARP):
                _entry, there, cells = _listed(one, tile, j0, problem, decoded, tiles, SPEC)
                off_x, off_y = offsets(one, cells, problem.frame, SPEC)
                at = one.image.to(tl.int64) * all_cells(problem.levels) + cells.n
                there = there & (tl.load(decoded.cost_ptr + at, mask=there, other=0.0) < float("inf"))
                iou = overlap_of(one, off_x, off_y, load_boxes(decoded.boxes_ptr, at, there), problem, SPEC)
                bits = tl.where(there & (iou > 0), bits_of(iou), none)
                most = keep(Kept(key, n, overlap), bits, cells.n, iou, none)
                key = most.key
                n = most.n
                overlap = most.overlap
            left = left & (t > tile)
            tile = tl.min(tl.where(left, t, LAST), axis=0)
    largest = tl.where(keys_of(most, none, SPEC.TOPK) > none, overlap, 0).to(SPEC.ACC, bitcast=True)
    return tl.maximum(tl.sum(largest, axis=0).to(tl.int32), 1)


@triton.jit
def _with_others(kept, one, g, short, problem, decoded, SPEC: tl.constexpr, CELLS: tl.constexpr):
    """The best of those kept and of candidates that are not the object's own, if it is ``short`` of these. It claims
    those that are no object's own.
    """
    none = none_of(tl.zeros([], SPEC.ACC))
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    tiles = tiles_of(problem.levels, CELLS)
    for tile in range(0, tiles):
        for j0 in range(0, _candidates_of(one, tile, decoded, tiles), WARP):
            entry, there, cells = _listed(one, tile, j0, problem, decoded, tiles, SPEC)
            look = look_at(one, cells, there & (short | (entry < 0)), problem, decoded, SPEC)
            other = look.can & ~is_own(look)
            _claim(one, g, cells, look, other & (entry < 0), problem, decoded)
            wanted = tl.where(other, look.key, none)
            kept = keep(Kept(key, n, overlap), wanted, cells.n, look.overlap, none)
            key = kept.key
            n = kept.n
            overlap = kept.overlap
    return Kept(key, n, overlap)


@triton.jit
def _best_candidates(one, g, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """The best candidates, and how many an object picks. All of its own come before any other, so that these are looked
    at where there are not enough, and where some cell may be no object's own.
    """
    own = _best_reached(one, g, problem, decoded, SPEC, BLOCK)
    key = own.key
    n = own.n
    overlap = own.overlap
    picks = _how_many(one, problem, decoded, SPEC, CELLS)
    none = none_of(tl.zeros([], SPEC.ACC))
    short = tl.sum((keys_of(own, none, SPEC.TOPK) > none).to(tl.int32), axis=0) < picks
    look = short
    if SPEC.INSIDE:
        look = picks > 0
    if look:
        kept = _with_others(Kept(key, n, overlap), one, g, short, problem, decoded, SPEC, CELLS)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
    return Kept(key, n, overlap), picks


# ------------------------------------------------------------------------------------------------------------- both


@triton.jit
def _note_clashes(one, cell, again, picked, tally, decoded, SPEC: tl.constexpr):
    """Marks cells that another row has picked before. Of SimOTA they are listed, of others their image is noted."""
    marked = tl.atomic_min(decoded.picker_ptr + cell, cell * 0 + SEVERAL, mask=again, sem="relaxed")
    if SPEC.ASSIGNER == "aligned":
        tl.atomic_max(tally.found_ptr + 2 + one.image, 1, sem="relaxed")
    else:
        new = (again & (marked != SEVERAL)).to(tl.int32)
        count = tl.sum(new, axis=0)
        if count > 0:
            place = tl.cumsum(new, axis=0) - new + tl.atomic_add(tally.done_ptr + 1, count, sem="relaxed")
            tl.store(picked.clash_ptr + place, cell, mask=new > 0)


@triton.jit(do_not_specialize=["M"])
def pick_kernel(
    problem, targets, M, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr
):
    """Picks and claims of a row, a program each: see :class:`.records.Picked`. CELLS as of ``decode``."""
    g = tl.program_id(0)
    one = load_object(targets, g, M, problem.frame, SPEC)
    if one.valid:
        none = none_of(tl.zeros([], SPEC.ACC))
        if SPEC.ASSIGNER == "aligned":
            kept = _best_reached(one, g, problem, decoded, SPEC, BLOCK)
            key = keys_of(kept, none, SPEC.TOPK)
            chosen = key > none
        else:
            kept, picks = _best_candidates(one, g, problem, decoded, SPEC, BLOCK, CELLS)
            key = keys_of(kept, none, SPEC.TOPK)
            chosen = _best_of(key, kept.n, picks, none)
        cell = one.image * all_cells(problem.levels) + kept.n
        place = tl.arange(0, key.shape[0])
        at = g.to(tl.int64) * SPEC.K + place
        stored = place < SPEC.K
        tl.store(picked.index_ptr + at, tl.where(chosen, cell, -1), mask=stored)
        tl.store(picked.overlap_ptr + at, kept.overlap.to(SPEC.ACC, bitcast=True), mask=stored)
        if SPEC.ASSIGNER == "aligned":
            tl.store(picked.worth_ptr + at, key.to(SPEC.ACC, bitcast=True), mask=stored)
        before = tl.atomic_min(decoded.picker_ptr + cell, g, mask=chosen, sem="relaxed")
        again = chosen & (before != M)
        if tl.max(again.to(tl.int32), axis=0) > 0:
            _note_clashes(one, cell, again, picked, tally, decoded, SPEC)
