"""What each row keeps, its soft scores, and what sums of losses are divided by."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..boxes import load_corners
from ..primitives import plain
from ..rows import image_rows, load_rows, rows_end, wrong_offsets
from ..sums import is_last
from .kept import Kept, Worst, keep, nothing_kept, worst_of
from .pick import SEVERAL
from .region import cells_reached, reached
from .site import all_cells, cells_at, load_channel, load_object, object_of, offsets
from .views import entry_of, is_of_branch
from .wish import (
    LAST,
    UNIT,
    bits_of,
    by_cost,
    claim_of,
    claimant,
    cost,
    look_at,
    metric,
    none_of,
    overlap_of,
    strength_in,
)

ROWS: tl.constexpr = tl.constexpr(32)
SEARCHED: tl.constexpr = tl.constexpr(256)  # rows that are searched at a time for those of an image


class Owner(NamedTuple):
    """A row."""

    g: Any
    one: Any
    listed: Any  # whether to look at the cells of its image that several rows picked, or at those that it reaches
    end: Any  # how many these are, or 0 if none of them is a further cell of this row


class Further(NamedTuple):
    """Cells: which of them are a row's own although it did not pick them."""

    place: Any  # among those of the batch
    claim: Any
    mask: Any


class Own(NamedTuple):
    """Some cells of a row, before it leaves any."""

    cell: Any  # flat
    mask: Any
    worth: Any
    overlap: Any
    key: Any  # by which it leaves some


class Best(NamedTuple):
    """How much the best cell of a row is wanted, and the largest overlap of its cells."""

    most: Any
    widest: Any


@triton.jit
def _own(cell, mask, worth, overlap):
    return Own(cell, mask, worth, overlap, tl.where(mask, bits_of(worth), none_of(worth)))


@triton.jit
def _of_picks(owner, decoded, picked, SPEC: tl.constexpr):
    """The cells of a row among those that it picked: it alone did, or, not of SimOTA, it has the largest claim."""
    at = owner.g.to(tl.int64) * SPEC.K + tl.arange(0, SPEC.K)
    cell = tl.load(picked.index_ptr + at)
    mask = cell >= 0
    row = tl.load(decoded.picker_ptr + cell, mask=mask, other=0)
    several = mask & (row == SEVERAL)
    mask = mask & (row == owner.g)
    if SPEC.ASSIGNER == "aligned":
        claim = tl.load(decoded.claim_ptr + cell, mask=several, other=0)
        mask = mask | (several & (claimant(claim) == owner.g))
    overlap = tl.load(picked.overlap_ptr + at, mask=mask, other=0.0)
    worth = overlap
    if SPEC.ASSIGNER == "aligned":
        worth = tl.load(picked.worth_ptr + at, mask=mask, other=0.0)
    return _own(cell, mask, worth, overlap)


@triton.jit
def _further(owner, i0, decoded, picked, problem, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """A block of the cells that a row looks at, and whether they are the row's although it did not pick them: several
    rows did, and it has not taken them yet.
    """
    i = i0 + tl.arange(0, BLOCK)
    mask = i < owner.end
    first = owner.one.image * all_cells(problem.levels)
    clash = tl.load(picked.clash_ptr + (first + i), mask=mask & owner.listed, other=0)
    place = tl.where(owner.listed, clash, first + cells_reached(owner.one, i, problem, SPEC).n)
    mask = mask & (tl.load(decoded.picker_ptr + place, mask=mask & ~owner.listed, other=SEVERAL) == SEVERAL)
    claim = tl.load(decoded.claim_ptr + place, mask=mask, other=0)
    mask = mask & (claimant(claim) == owner.g)
    row = tl.load(decoded.row_ptr + place, mask=mask, other=0)  # which no other row changes
    return Further(place, claim, mask & (row != owner.g))


@triton.jit
def _looked(owner, further, problem, decoded, SPEC: tl.constexpr):
    """These cells as the row sees them; the strength of its claim is the overlap, but for what float64 has more."""
    mask = further.mask
    n = tl.where(mask, further.place - owner.one.image * all_cells(problem.levels), 0)
    cells = cells_at(n, problem.levels, SPEC)
    if owner.one.width.dtype == tl.float32:
        overlap = tl.where(mask, strength_in(further.claim), 0.0)
        logit = load_channel(problem.predictions.cls, owner.one.image, owner.one.label, cells, mask, SPEC)
        own = _own(further.place, mask, metric(logit, overlap, problem), overlap)
    else:
        look = look_at(owner.one, cells, mask, True, problem, decoded, SPEC)
        own = _own(further.place, mask, look.worth, look.overlap)
    return own


@triton.jit
def _has_further(owner, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Whether a row has cells that it did not pick."""
    found = tl.zeros([BLOCK], tl.int32)
    for i0 in range(0, owner.end, BLOCK):
        found |= _further(owner, i0, decoded, picked, problem, SPEC, BLOCK).mask.to(tl.int32)
    return tl.max(found, axis=0) > 0


@triton.jit
def _worst_left(own, owner, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """The worst of the TOPK2 cells that a row keeps."""
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = keep(nothing_kept(none, SPEC.TOPK2, K2), own.key, own.cell, own.overlap, none)
    key = kept.key
    n = kept.n
    overlap = kept.overlap
    for i0 in range(0, owner.end, BLOCK):
        further = _further(owner, i0, decoded, picked, problem, SPEC, BLOCK)
        if tl.max(further.mask.to(tl.int32), axis=0) > 0:
            more = _looked(owner, further, problem, decoded, SPEC)
            kept = keep(Kept(key, n, overlap), more.key, more.cell, more.overlap, none)
            key = kept.key
            n = kept.n
            overlap = kept.overlap
    return worst_of(Kept(key, n, overlap))


@triton.jit
def _kept(own, worst):
    """Which cells a row keeps."""
    return own.mask & ((own.key > worst.key) | ((own.key == worst.key) & (own.cell <= worst.n)))


@triton.jit
def _better(best, own, worst):
    """The best of some cells and others."""
    kept = _kept(own, worst)
    most = tl.maximum(best.most, tl.max(tl.where(kept, own.worth, 0.0), axis=0))
    return Best(most, tl.maximum(best.widest, tl.max(tl.where(kept, own.overlap, 0.0), axis=0)))


@triton.jit
def _best(own, worst, owner, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The best of all cells that a row keeps."""
    best = _better(Best(tl.zeros([], SPEC.ACC), tl.zeros([], SPEC.ACC)), own, worst)
    most = best.most
    widest = best.widest
    for i0 in range(0, owner.end, BLOCK):
        further = _further(owner, i0, decoded, picked, problem, SPEC, BLOCK)
        if tl.max(further.mask.to(tl.int32), axis=0) > 0:
            more = _better(Best(most, widest), _looked(owner, further, problem, decoded, SPEC), worst)
            most = more.most
            widest = more.widest
    return Best(most, widest)


@triton.jit
def _leave(own, worst, best, g, M, decoded, SPEC: tl.constexpr):
    """Rows and soft scores of cells; how many the row keeps, and the sum of their scores."""
    kept = _kept(own, worst)
    score = own.overlap
    if SPEC.ASSIGNER == "aligned":
        score = own.worth * best.widest / (best.most + 1e-9)
    tl.store(decoded.score_ptr + own.cell, score, mask=kept)
    tl.store(decoded.row_ptr + own.cell, tl.where(kept, g, M), mask=own.mask)
    total = tl.sum(tl.where(kept, score * UNIT, 0.0).to(tl.int64), axis=0)
    return tl.sum(kept.to(tl.int32), axis=0), total


@triton.jit
def _settle(owner, M, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """The cells of a row; how many it keeps, and the sum of their soft scores."""
    own = _of_picks(owner, decoded, picked, SPEC)
    if owner.end > 0:
        tl.store(decoded.row_ptr + own.cell, own.cell * 0 + owner.g, mask=own.mask)
        tl.debug_barrier()
        some = _has_further(owner, problem, decoded, picked, SPEC, BLOCK)
        owner = Owner(owner.g, owner.one, owner.listed, tl.where(some, owner.end, 0))
    worst = Worst(none_of(tl.zeros([], SPEC.ACC)), owner.g * 0)
    if K2 > 0:
        worst = _worst_left(own, owner, problem, decoded, picked, SPEC, BLOCK, K2)
    best = _best(own, worst, owner, problem, decoded, picked, SPEC, BLOCK)
    found = owner.g * 0
    total = found.to(tl.int64)
    for i0 in range(0, owner.end, BLOCK):
        further = _further(owner, i0, decoded, picked, problem, SPEC, BLOCK)
        if tl.max(further.mask.to(tl.int32), axis=0) > 0:
            more = _looked(owner, further, problem, decoded, SPEC)
            tl.debug_barrier()  # rows have been read
            more_found, more_total = _leave(more, worst, best, owner.g, M, decoded, SPEC)
            found += more_found
            total += more_total
    tl.debug_barrier()
    own_found, own_total = _leave(own, worst, best, owner.g, M, decoded, SPEC)
    return found + own_found, total + own_total


@triton.jit
def _strongest(cell, targets, M, problem, decoded, SPEC: tl.constexpr):
    """Of SimOTA, where no object has claimed a cell, for it is none of its own: the largest claim that those of its
    image have to it, whether or not they picked it.
    """
    N = all_cells(problem.levels)
    b = cell // N
    lane = tl.arange(0, ROWS)
    cells = cells_at(lane * 0 + (cell - b * N), problem.levels, SPEC)
    at = lane * 0 + cell
    shared = tl.load(decoded.cost_ptr + at)
    obj = load_channel(problem.predictions.obj, b, 0, cells, lane < ROWS, SPEC)
    box = load_corners(decoded.boxes_ptr, at.to(tl.int64), lane < ROWS)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, b, SEARCHED)
    best = tl.zeros([ROWS], tl.int64)
    for g0 in range(first, last, ROWS):
        g = g0 + lane
        rows = load_rows(targets.ptr, g, g < last, ROWS)
        rows = object_of(rows, g, g < last, targets, problem.frame, SPEC, "object")
        own = rows.valid & (rows.image == b)
        off_x, off_y = offsets(rows, cells, problem.frame, SPEC)
        cls = load_channel(problem.predictions.cls, b, rows.label, cells, own, SPEC)
        value = cost(shared, cls, obj, overlap_of(rows, off_x, off_y, box, problem, SPEC)).to(tl.float32)
        strength = by_cost(value, value != value, own)
        best = tl.maximum(best, tl.where(strength > none_of(value), claim_of(strength, g), 0))
    return tl.max(best, axis=0)


@triton.jit
def _clashes(g, programs, targets, M, problem, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Of SimOTA, where a score hangs on its cell alone: those that several rows picked, shared out over so many
    ``programs``; how many, and the sum of their scores.
    """
    N = all_cells(problem.levels)
    count = tl.load(tally.done_ptr + 1)
    found = g * 0
    total = found.to(tl.int64)
    for i0 in range(g * BLOCK, count, programs * BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mask = i < count
        cell = tl.load(picked.clash_ptr + i, mask=mask, other=0)
        claim = tl.load(decoded.claim_ptr + cell, mask=mask, other=1)
        if SPEC.INSIDE:
            place = tl.min(tl.where(claim == 0, i, LAST), axis=0)
            while place < LAST:
                here = i == place
                of = tl.max(tl.where(here, cell, 0), axis=0)
                claim = tl.where(here, _strongest(of, targets, M, problem, decoded, SPEC), claim)
                place = tl.min(tl.where((claim == 0) & (i > place), i, LAST), axis=0)
        row = tl.where(mask, claimant(claim), 0)
        rows = object_of(load_rows(targets.ptr, row, mask, BLOCK), row, mask, targets, problem.frame, SPEC, "object")
        cells = cells_at(tl.where(mask, cell - rows.image * N, 0), problem.levels, SPEC)
        off_x, off_y = offsets(rows, cells, problem.frame, SPEC)
        box = load_corners(decoded.boxes_ptr, cell.to(tl.int64), mask)
        score = tl.where(mask, overlap_of(rows, off_x, off_y, box, problem, SPEC), 0.0)
        tl.store(decoded.score_ptr + cell, score, mask=mask)
        tl.store(decoded.row_ptr + cell, row, mask=mask)
        found += tl.sum(mask.to(tl.int32), axis=0)
        total += tl.sum((score * UNIT).to(tl.int64), axis=0)
    return found, total


@triton.jit
def _row(g, one, M, problem, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """The cells of a valid row, as :func:`_settle`; of SimOTA those that it alone picked."""
    if SPEC.ASSIGNER == "aligned":
        clashes = tl.load(tally.found_ptr + 2 + one.image)
        cells = reached(one, problem, SPEC)
        end = tl.minimum(clashes, cells)
        if SPEC.REGION == "range":
            end = clashes * 0  # whoever has a cell picked it
        owner = Owner(g, one, clashes <= cells, end)
        found, total = _settle(owner, M, problem, decoded, picked, SPEC, BLOCK, K2)
    else:
        own = _of_picks(Owner(g, one, False, 0), decoded, picked, SPEC)
        worst = Worst(none_of(tl.zeros([], SPEC.ACC)), g * 0)
        found, total = _leave(own, worst, Best(None, None), g, M, decoded, SPEC)
    return found, total


@triton.jit
def _settle_row(g, programs, branch, targets, M, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """What a program of a branch does, which has so many."""
    decoded = branch.decoded
    picked = branch.picked
    tally = branch.tally
    batch = plain(branch.problem.frame.batch)
    one = load_object(targets, g, M, branch.problem.frame, SPEC, "object")
    known = one.valid
    if targets.row_weights_ptr is not None:
        known = load_object(targets, g, M, branch.problem.frame, SPEC, "any").valid
    invalid = ((g < rows_end(targets.offsets_ptr, M, batch)) & ~known).to(tl.int32)
    if g == 0:
        invalid += wrong_offsets(targets.offsets_ptr, M, batch, ROWS)
    if invalid > 0:
        tl.atomic_add(tally.found_ptr + 1, invalid, sem="relaxed")
    found = g * 0
    total = found.to(tl.int64)
    if one.valid:
        found, total = _row(g, one, M, branch.problem, decoded, picked, tally, SPEC=SPEC, BLOCK=BLOCK, K2=K2)
    if SPEC.ASSIGNER == "simota":
        more_found, more_total = _clashes(
            g, programs, targets, M, branch.problem, decoded, picked, tally=tally, SPEC=SPEC, BLOCK=BLOCK
        )
        found += more_found
        total += more_total
    if found > 0:
        tl.atomic_add(tally.found_ptr, found, sem="relaxed")
        tl.atomic_add(tally.sum_ptr, total, sem="relaxed")


@triton.jit
def _finish(branch, SPEC: tl.constexpr):
    """What the last program does: sums of a branch go where they are read, and are cleared for the next call."""
    settled = branch.settled
    tally = branch.tally
    batch = plain(branch.problem.frame.batch)
    found = tl.load(tally.found_ptr, cache_modifier=".cg")
    invalid = tl.load(tally.found_ptr + 1, cache_modifier=".cg")
    weights = found.to(SPEC.ACC)
    if SPEC.SOFT:
        weights = tl.load(tally.sum_ptr, cache_modifier=".cg").to(SPEC.ACC) / UNIT
    class_nans = tl.load(tally.done_ptr + 2, cache_modifier=".cg")
    box_nans = tl.load(tally.done_ptr + 3, cache_modifier=".cg")
    tl.store(settled.norm_ptr, tl.maximum(weights, 1.0))
    tl.store(settled.norm_ptr + 1, weights)
    tl.store(settled.counts_ptr, found)
    tl.store(settled.counts_ptr + 1, invalid)
    tl.store(settled.nans_ptr, tl.where(box_nans > 0, float("nan"), 0.0))
    tl.store(settled.nans_ptr + 1, tl.where(class_nans > 0, float("nan"), 0.0))
    tl.debug_barrier()  # every thread has read what some of them overwrite
    lane = tl.arange(0, ROWS)
    tl.store(tally.sum_ptr, tl.zeros([], tl.int64))
    for i0 in range(0, 2 + batch, ROWS):
        tl.store(tally.found_ptr + i0 + lane, lane * 0, mask=i0 + lane < 2 + batch)
    tl.store(tally.done_ptr + lane, lane * 0, mask=lane < 4)


@triton.jit(do_not_specialize=["M"])
def settle_kernel(branches, targets, M, SPECS: tl.constexpr, BLOCK: tl.constexpr, K2S: tl.constexpr):
    """The cells of a row, a program each, branch by branch: see :class:`.records.Decoded` and
    :class:`.records.Settled`. The first branch counts the programs of all.

    ``K2S``: of a branch whose rows leave all but TOPK2 cells, this, a power of two; else 0.
    """
    BRANCHES: tl.constexpr = len(branches)
    programs = tl.num_programs(0) // BRANCHES
    for i in tl.static_range(BRANCHES):
        g = tl.program_id(0) - i * programs
        if is_of_branch(g, programs, BRANCHES):
            _settle_row(g, programs, branches[i], targets, M, entry_of(SPECS, i), BLOCK, entry_of(K2S, i))
    if is_last(branches[0].tally.done_ptr, tl.num_programs(0)):
        for i in tl.static_range(BRANCHES):
            _finish(branches[i], entry_of(SPECS, i))
