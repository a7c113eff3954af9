"""What each row picks: the best cells of its region, kept as these go by; of SimOTA, where its own are not enough, of
all candidates.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..boxes import load_corners
from ..sums import is_last
from .kept import Kept, best_of, dynamic_k, keep, keys_of, nothing_kept
from .region import cells_reached, reached, reached_at_most
from .site import all_cells, cells_at, divided, load_object, offsets
from .views import entry_of, is_of_branch, tiles_of
from .wish import FAR, LAST, bits_of, claim_of, is_own, key_of_other, look_at, none_of, overlap_of

SEVERAL: tl.constexpr = tl.constexpr(-1)  # rows picked a cell
TILES: tl.constexpr = tl.constexpr(32)  # that are looked at at a time
FEW: tl.constexpr = tl.constexpr(1024)  # candidates of an image that are all looked at, wherever their boxes are
MERGED: tl.constexpr = tl.constexpr(256)  # cells that programs of a row have left, at a time


class Share(NamedTuple):
    """Which of the cells that a row reaches are a program's, and how many programs have some."""

    first: Any
    last: Any
    used: Any


@triton.jit
def _claim(one, g, n, strength, mask, problem, decoded):
    """Claims to cells, whoever picks them: the largest counts where several do."""
    at = one.image * all_cells(problem.levels) + n
    tl.atomic_max(decoded.claim_ptr + at, claim_of(strength, g), mask=mask, sem="relaxed")


@triton.jit
def _share_of(total, part, shift, BLOCK: tl.constexpr):
    """Of as many cells those of a program, whole blocks of them, shared out over 1 << ``shift``; of none the first
    program has them.
    """
    blocks = tl.maximum((total + BLOCK - 1) // BLOCK, 1)
    each = (blocks + (1 << shift) - 1) >> shift
    first = part * each * BLOCK
    return Share(first, tl.minimum(first + each * BLOCK, total), divided(blocks + each - 1, each))


@triton.jit
def _has_share(targets, g, M, part, problem, BLOCK: tl.constexpr):
    """Whether a program may have a share, if the row is valid: told from the sides of the box alone, for most have
    none.
    """
    at = targets.ptr + tl.cast(g, tl.int64) * 6
    width = tl.load(at + 4, mask=g < M, other=0.0) * problem.frame.width
    height = tl.load(at + 5, mask=g < M, other=0.0) * problem.frame.height
    return (part * BLOCK).to(tl.float32) < reached_at_most(width, height, problem.numbers)


@triton.jit
def _best_reached(one, g, first, last, anywhere, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The best cells of a part of a region, or ``anywhere`` in the image; all are claimed but with "range", where those
    that are picked will be. Of SimOTA those of its own.
    """
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    for i0 in range(first, last, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        cells = cells_reached(one, i, problem, SPEC)
        if SPEC.REGION == "range":
            cells = cells_at(tl.where(anywhere, i, cells.n), problem.levels, SPEC)
        look = look_at(one, cells, i < last, anywhere, problem, decoded, SPEC)
        wanted = look.key
        can = look.can
        if SPEC.ASSIGNER == "simota":
            can = can & is_own(look)
            wanted = tl.where(can, wanted, none)
        if SPEC.REGION == "box":
            _claim(one, g, cells.n, look.strength, can, problem, decoded)
        kept = keep(Kept(key, n, overlap), wanted, cells.n, look.overlap, none)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
    return Kept(key, n, overlap)


# ------------------------------------------------------------------------------------------- rows of several programs


@triton.jit
def _leave(kept, at, picked, SPEC: tl.constexpr):
    """Puts down what a program has found, for the last one of its row."""
    none = none_of(tl.zeros([], SPEC.ACC))
    place = tl.arange(0, kept.key.shape[0])
    mask = place < SPEC.K
    tl.store(picked.part_key_ptr + (at + place), keys_of(kept, none, SPEC.TOPK), mask=mask)
    tl.store(picked.part_cell_ptr + (at + place), kept.n, mask=mask)
    tl.store(picked.part_overlap_ptr + (at + place), kept.overlap, mask=mask)


@triton.jit
def _best_left(kept, at, count, picked, SPEC: tl.constexpr):
    """The best of as many cells that the programs of a row have left; those kept where there are none."""
    none = none_of(tl.zeros([], SPEC.ACC))
    nothing = nothing_kept(none, SPEC.TOPK, SPEC.K)
    key = tl.where(count > 0, nothing.key, kept.key)
    n = tl.where(count > 0, nothing.n, kept.n)
    overlap = kept.overlap
    for i0 in range(0, count, MERGED):
        i = i0 + tl.arange(0, MERGED)
        mask = i < count
        # .cg: other programs wrote these, so a line this multiprocessor has cached would be stale
        left_key = tl.load(picked.part_key_ptr + (at + i), mask=mask, other=none, cache_modifier=".cg")
        left_n = tl.load(picked.part_cell_ptr + (at + i), mask=mask, other=0, cache_modifier=".cg")
        left_overlap = tl.load(picked.part_overlap_ptr + (at + i), mask=mask, other=0, cache_modifier=".cg")
        left = left_overlap.to(SPEC.ACC, bitcast=True)
        kept = keep(Kept(key, n, overlap), left_key, left_n, left, none)
        key = kept.key
        n = kept.n
        overlap = kept.overlap
    return Kept(key, n, overlap)


@triton.jit
def _best_of_region(
    one, g, part, share, shift, anywhere, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """The best cells of a row's region, and whether this program is to take them: the last one of the row, which finds
    what the others have left.
    """
    kept = _best_reached(one, g, share.first, share.last, anywhere, problem, decoded, SPEC, BLOCK)
    first = (g.to(tl.int64) * SPEC.K) << shift
    final = share.used == 1
    if share.used > 1:
        _leave(kept, first + part * SPEC.K, picked, SPEC)
        final = is_last(decoded.done_ptr + g, share.used)
        if final:
            tl.store(decoded.done_ptr + g, 0)  # ready for the next launch
    count = tl.where(final & (share.used > 1), share.used * SPEC.K, 0)
    return _best_left(kept, first, count, picked, SPEC), final


@triton.jit
def _taken(kept, one, g, anywhere, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """With "range", those kept and which of them a row picks, and claims: if there are none, the best of all cells."""
    none = none_of(tl.zeros([], SPEC.ACC))
    key = keys_of(kept, none, SPEC.TOPK)
    n = kept.n
    overlap = kept.overlap
    if ~anywhere & (tl.max(key, axis=0) == none):
        best = _best_reached(one, g, 0, all_cells(problem.levels), True, problem, decoded, SPEC, BLOCK)
        key = keys_of(best, none, SPEC.TOPK)
        n = best.n
        overlap = best.overlap
        anywhere = True
    chosen = (key > none) & (~anywhere | best_of(key, n, g * 0 + 1, none))
    strength = bits_of(overlap.to(SPEC.ACC, bitcast=True).to(tl.float32))
    _claim(one, g, n, strength, chosen, problem, decoded)
    return Kept(key, n, overlap), chosen


# ---------------------------------------------------------------------------------------------------- SimOTA: the rest


@triton.jit
def _listed(one, i, end, problem, decoded, SPEC: tl.constexpr):
    """Candidates of an image by their places in its list: which there are, and the cells."""
    there = i < end
    at = one.image.to(tl.int64) * all_cells(problem.levels) + i
    return there, cells_at(tl.load(decoded.list_ptr + at, mask=there, other=0), problem.levels, SPEC)


@triton.jit
def _met(one, t, there, tiles, problem, decoded):
    """Whether the boxes of candidates of these tiles may overlap an object."""
    at = (one.image * tiles + t).to(tl.int64)
    count = tl.load(decoded.tiles_ptr + at * 2 + 1, mask=there, other=0)
    bounds = load_corners(decoded.bounds_ptr, at, there & (count > 0))
    x = one.cx * problem.frame.width
    y = one.cy * problem.frame.height
    across = (bounds.x1 < x + 0.5 * one.width) & (bounds.x2 > x - 0.5 * one.width)
    along = (bounds.y1 < y + 0.5 * one.height) & (bounds.y2 > y - 0.5 * one.height)
    return (count > 0) & across & along


@triton.jit
def _best_listed(
    kept, one, listed, everywhere, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr,
    BY: tl.constexpr,
):  # fmt: skip
    """The best of those kept and of the candidates of an image: all of them, if it is to be ``everywhere``, else those
    of tiles that the object meets. ``BY`` "overlap", or "cost" of those that are not its own.
    """
    acc: tl.constexpr = SPEC.ACC
    LISTED: tl.constexpr = BLOCK if acc == tl.float64 else 2 * BLOCK  # candidates at a time, as registers allow
    none = none_of(tl.zeros([], SPEC.ACC))
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    tiles = tiles_of(problem.levels, CELLS)
    for t0 in range(0, tl.where(everywhere, 1, tiles), TILES):
        t = t0 + tl.arange(0, TILES)
        left = _met(one, t, (t < tiles) & ~everywhere, tiles, problem, decoded) | ((t == 0) & everywhere)
        tile = tl.min(tl.where(left, t, LAST), axis=0)
        while tile < LAST:
            record = decoded.tiles_ptr + (one.image * tiles + tile).to(tl.int64) * 2
            begin = tl.load(record, mask=~everywhere, other=0)
            end = begin + tl.load(record + 1, mask=~everywhere, other=0) + tl.where(everywhere, listed, 0)
            for i0 in range(begin, end, LISTED):
                there, cells = _listed(one, i0 + tl.arange(0, LISTED), end, problem, decoded, SPEC)
                if BY == "overlap":
                    off_x, off_y = offsets(one, cells, problem.frame, SPEC)
                    at = one.image.to(tl.int64) * all_cells(problem.levels) + cells.n
                    cost = tl.load(decoded.cost_ptr + at, mask=there, other=float("inf"))
                    value = overlap_of(one, off_x, off_y, load_corners(decoded.boxes_ptr, at, there), problem, SPEC)
                    wanted = tl.where((cost < float("inf")) & (value > 0), bits_of(value), none)
                else:
                    look = look_at(one, cells, there, False, problem, decoded, SPEC)
                    value = look.overlap
                    wanted = tl.where(look.can & ~is_own(look), look.key, none)
                best = keep(Kept(key, n, overlap), wanted, cells.n, value, none)
                key = best.key
                n = best.n
                overlap = best.overlap
            left = left & (t > tile)
            tile = tl.min(tl.where(left, t, LAST), axis=0)
    return Kept(key, n, overlap)


@triton.jit
def _how_many(one, listed, few, problem, decoded, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """How many cells an object picks: the sum of its largest IoUs with candidates, rounded down, at least one."""
    none = none_of(tl.zeros([], SPEC.ACC))
    most = nothing_kept(none, SPEC.TOPK, SPEC.K)
    most = _best_listed(most, one, listed, few, problem, decoded, SPEC=SPEC, BLOCK=BLOCK, CELLS=CELLS, BY="overlap")
    return dynamic_k(most, none, SPEC.TOPK, SPEC.ACC)


@triton.jit
def _kept_above(kept, key, none, SPEC: tl.constexpr):
    """How many of those kept an object wants more than so."""
    return tl.sum((keys_of(kept, none, SPEC.TOPK) > key).to(tl.int32), axis=0)


@triton.jit
def _best_candidates(one, g, problem, decoded, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """The best candidates, and how many an object picks. All of its own come before any other. Where these are not
    enough it looks at those of tiles that it meets; and at all, if so many do not cost less than one without overlap.
    """
    none = none_of(tl.zeros([], SPEC.ACC))
    listed = tl.load(tally.found_ptr + 2 + one.image)
    everywhere = listed <= FEW
    own = _best_reached(one, g, 0, reached(one, problem, SPEC), False, problem, decoded, SPEC, BLOCK)
    key = own.key
    n = own.n
    overlap = own.overlap
    picks = _how_many(one, listed, everywhere, problem, decoded, SPEC, BLOCK, CELLS)
    enough = _kept_above(own, none, none, SPEC) >= picks
    while ~enough:
        best = _best_listed(
            own, one, listed, everywhere, problem, decoded, SPEC=SPEC, BLOCK=BLOCK, CELLS=CELLS, BY="cost"
        )
        key = best.key
        n = best.n
        overlap = best.overlap
        enough = everywhere | (_kept_above(best, key_of_other(tl.full([], FAR, SPEC.ACC)), none, SPEC) >= picks)
        everywhere = True
    return Kept(key, n, overlap), picks


# ------------------------------------------------------------------------------------------------------------- both


@triton.jit
def _list_clashes(one, cell, again, problem, picked, tally, decoded, SPEC: tl.constexpr):
    """Marks cells that another row has picked before, and lists them: of SimOTA for the batch, of others by image."""
    marked = tl.atomic_min(decoded.picker_ptr + cell, cell * 0 + SEVERAL, mask=again, sem="relaxed")
    new = (again & (marked != SEVERAL)).to(tl.int32)
    count = tl.sum(new, axis=0)
    if count > 0:
        if SPEC.ASSIGNER == "aligned":
            first = one.image * all_cells(problem.levels)
            first += tl.atomic_add(tally.found_ptr + 2 + one.image, count, sem="relaxed")
        else:
            first = tl.atomic_add(tally.done_ptr + 1, count, sem="relaxed")
        tl.store(picked.clash_ptr + (first + tl.cumsum(new, axis=0) - new), cell, mask=new > 0)


@triton.jit
def _pick(one, g, M, key, chosen, kept, problem, decoded, picked, tally, SPEC: tl.constexpr):
    """Stores what a row picks of those kept."""
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
        _list_clashes(one, cell, again, problem, picked, tally, decoded, SPEC)


@triton.jit
def _pick_aligned(one, g, M, part, shift, problem, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """What a program of a row of task-aligned assignment does."""
    none = none_of(tl.zeros([], SPEC.ACC))
    cells = reached(one, problem, SPEC)
    anywhere = False
    if SPEC.REGION == "range":
        anywhere = cells == 0
        cells = tl.where(anywhere, all_cells(problem.levels), cells)
    share = _share_of(cells, part, shift, BLOCK)
    if one.valid & (part < share.used):
        kept, final = _best_of_region(
            one, g, part, share, shift, anywhere, problem, decoded, picked, SPEC=SPEC, BLOCK=BLOCK
        )
        if final:
            key = keys_of(kept, none, SPEC.TOPK)
            chosen = key > none
            if SPEC.REGION == "range":
                kept, chosen = _taken(kept, one, g, anywhere, problem, decoded, SPEC, BLOCK)
                key = kept.key
            _pick(one, g, M, key, chosen, kept, problem, decoded, picked, tally=tally, SPEC=SPEC)


@triton.jit
def _pick_row(pid, branch, targets, M, shift, SPEC: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """What a program of a branch does."""
    g = pid >> shift
    part = pid - (g << shift)
    used = g == g
    if SPEC.ASSIGNER == "aligned":
        if SPEC.REGION == "box":
            used = _has_share(targets, g, M, part, branch.problem, BLOCK)
    if used:
        one = load_object(targets, g, M, branch.problem.frame, SPEC, "object")
        decoded = branch.decoded
        picked = branch.picked
        tally = branch.tally
        if SPEC.ASSIGNER == "aligned":
            _pick_aligned(one, g, M, part, shift, branch.problem, decoded, picked, tally=tally, SPEC=SPEC, BLOCK=BLOCK)
        elif one.valid:
            none = none_of(tl.zeros([], SPEC.ACC))
            kept, picks = _best_candidates(one, g, branch.problem, decoded, tally, SPEC, BLOCK, CELLS)
            key = keys_of(kept, none, SPEC.TOPK)
            chosen = best_of(key, kept.n, picks, none)
            _pick(one, g, M, key, chosen, kept, branch.problem, decoded, picked, tally=tally, SPEC=SPEC)


@triton.jit(do_not_specialize=["M", "shift"])
def pick_kernel(branches, targets, M, shift, SPECS: tl.constexpr, BLOCK: tl.constexpr, CELLS: tl.constexpr):
    """Picks and claims of a row, see :class:`.records.Picked`; branch by branch 1 << ``shift`` programs each, of which
    those have something to do for which there are cells. CELLS as of ``decode``.
    """
    BRANCHES: tl.constexpr = len(branches)
    programs = tl.num_programs(0) // BRANCHES
    for i in tl.static_range(BRANCHES):
        pid = tl.program_id(0) - i * programs
        if is_of_branch(pid, programs, BRANCHES):
            _pick_row(pid, branches[i], targets, M, shift, entry_of(SPECS, i), BLOCK, CELLS)
