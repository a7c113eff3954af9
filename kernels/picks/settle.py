"""What each row keeps, its soft scores, and what sums of losses are divided by."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives import plain
from ..rows import rows_end, wrong_offsets
from ..sums import is_last
from .pick import Kept, Worst, keep, nothing_kept, worst_of
from .site import all_cells, cells_at, load_object
from .wish import bits_of, claimant, look_at, none_of

SCORE_UNIT: tl.constexpr = tl.constexpr(1099511627776.0)  # 2^40 to a soft score of 1, so that sums are of integers
ROWS: tl.constexpr = tl.constexpr(32)


class Owner(NamedTuple):
    """A row, and what it picked."""

    g: Any
    one: Any
    clashes: Any  # how many cells several rows picked, of all images


class Own(NamedTuple):
    """Cells of a block that a row has, before it leaves some."""

    cell: Any  # flat
    n: Any
    mask: Any
    look: Any
    key: Any  # of how much it wants them, 0 being something


@triton.jit
def _own(owner, i0, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """The cells that a row alone picked, for ``i0`` below 0; else those of a block of the list that it claimed."""
    N = all_cells(problem.levels)
    first = owner.one.image * N
    lane = tl.arange(0, BLOCK)
    picks = i0 < 0
    at = tl.where(picks, owner.g.to(tl.int64) * SPEC.K, tl.cast(i0, tl.int64)) + lane
    mask = tl.where(picks, lane < SPEC.K, i0 + lane < owner.clashes)
    ptr = tl.where(picks, picked.index_ptr, picked.clash_ptr)
    cell = tl.load(ptr + at, mask=mask, other=-1)
    mask = (cell >= first) & (cell - first < N)
    claim = tl.load(decoded.claim_ptr + cell, mask=mask, other=1)
    mask = mask & tl.where(picks, claim == 0, (claim > 1) & (claimant(claim) == owner.g))
    return cell, mask


@triton.jit
def _looked(owner, cell, mask, problem, decoded, SPEC: tl.constexpr):
    """These cells as the row sees them."""
    n = tl.where(mask, cell - owner.one.image * all_cells(problem.levels), 0)
    look = look_at(owner.one, cells_at(n, problem.levels, SPEC), mask, problem, decoded, SPEC)
    return Own(cell, n, mask, look, tl.where(mask, bits_of(look.worth), none_of(look.worth)))


@triton.jit
def _left(owner, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """The worst of the TOPK2 cells that a row keeps."""
    none = none_of(tl.zeros([], SPEC.ACC))
    kept = nothing_kept(none, SPEC.TOPK2, K2)
    key = kept.key
    n = kept.n
    for i0 in range(-BLOCK, owner.clashes, BLOCK):
        cell, mask = _own(owner, i0, problem, decoded, picked, SPEC, BLOCK)
        if tl.max(mask.to(tl.int32), axis=0) > 0:
            own = _looked(owner, cell, mask, problem, decoded, SPEC)
            kept = keep(Kept(key, n), own.key, own.n, none)
            key = kept.key
            n = kept.n
    return worst_of(Kept(key, n))


@triton.jit
def _kept(own, worst):
    """Which cells a row keeps."""
    return own.mask & ((own.key > worst.key) | ((own.key == worst.key) & (own.n <= worst.n)))


@triton.jit
def _largest(owner, worst, problem, decoded, picked, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """How much the best cell that a row keeps is wanted, and the largest overlap of these cells."""
    most = tl.zeros([], SPEC.ACC)
    widest = tl.zeros([], SPEC.ACC)
    for i0 in range(-BLOCK, owner.clashes, BLOCK):
        cell, mask = _own(owner, i0, problem, decoded, picked, SPEC, BLOCK)
        if tl.max(mask.to(tl.int32), axis=0) > 0:
            own = _looked(owner, cell, mask, problem, decoded, SPEC)
            kept = _kept(own, worst)
            most = tl.maximum(most, tl.max(tl.where(kept, own.look.worth, 0.0), axis=0))
            widest = tl.maximum(widest, tl.max(tl.where(kept, own.look.overlap, 0.0), axis=0))
    return most, widest


@triton.jit
def _settle(owner, M, problem, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr):
    """The cells of a row, and what they add to the sums."""
    none = none_of(tl.zeros([], SPEC.ACC))
    worst = Worst(none, owner.g * 0)
    if K2 > 0:
        worst = _left(owner, problem, decoded, picked, SPEC, BLOCK, K2)
    if SPEC.ASSIGNER == "aligned":
        most, widest = _largest(owner, worst, problem, decoded, picked, SPEC, BLOCK)
    found = owner.g * 0
    total = (owner.g * 0).to(tl.int64)
    for i0 in range(-BLOCK, owner.clashes, BLOCK):
        cell, mask = _own(owner, i0, problem, decoded, picked, SPEC, BLOCK)
        if tl.max(mask.to(tl.int32), axis=0) > 0:
            own = _looked(owner, cell, mask, problem, decoded, SPEC)
            kept = _kept(own, worst)
            if SPEC.ASSIGNER == "aligned":
                score = own.look.worth * widest / (most + 1e-9)
            else:
                score = own.look.overlap
            tl.store(decoded.score_ptr + cell, score, mask=kept)
            tl.store(decoded.row_ptr + cell, tl.where(kept, owner.g, M), mask=mask)
            found += tl.sum(kept.to(tl.int32), axis=0)
            total += tl.sum(tl.where(kept, score * SCORE_UNIT, 0.0).to(tl.int64), axis=0)
    if found > 0:
        tl.atomic_add(tally.found_ptr, found, sem="relaxed")
        tl.atomic_add(tally.sum_ptr, total, sem="relaxed")


@triton.jit
def _finish(settled, tally, batch, SPEC: tl.constexpr):
    """What the last program does: sums go where they are read, and are cleared for the next call."""
    found = tl.load(tally.found_ptr, cache_modifier=".cg")
    invalid = tl.load(tally.found_ptr + 1, cache_modifier=".cg")
    weights = found.to(SPEC.ACC)
    if SPEC.SOFT:
        weights = tl.load(tally.sum_ptr, cache_modifier=".cg").to(SPEC.ACC) / SCORE_UNIT
    nans = tl.load(tally.done_ptr + 2, cache_modifier=".cg")
    tl.store(settled.norm_ptr, tl.maximum(weights, 1.0))
    tl.store(settled.counts_ptr, found)
    tl.store(settled.counts_ptr + 1, invalid)
    tl.store(settled.nans_ptr, tl.where(nans > 0, float("nan"), 0.0))
    tl.debug_barrier()  # every thread has read what some of them overwrite
    lane = tl.arange(0, ROWS)
    tl.store(tally.sum_ptr, tl.zeros([], tl.int64))
    for i0 in range(0, 2 + batch, ROWS):
        tl.store(tally.found_ptr + i0 + lane, lane * 0, mask=i0 + lane < 2 + batch)
    tl.store(tally.done_ptr + lane, lane * 0, mask=lane < 4)


@triton.jit(do_not_specialize=["M"])
def settle_kernel(
    problem, targets, M, decoded, picked, tally, settled, SPEC: tl.constexpr, BLOCK: tl.constexpr, K2: tl.constexpr
):
    """The cells of a row, a program each: see :class:`.records.Decoded` and :class:`.records.Settled`.

    ``K2``: of a row that leaves all but TOPK2 cells, this, a power of two; else 0.
    """
    g = tl.program_id(0)
    batch = plain(problem.frame.batch)
    one = load_object(targets, g, M, problem.frame, SPEC)
    invalid = ((g < rows_end(targets.offsets_ptr, M, batch)) & ~one.valid).to(tl.int32)
    if g == 0:
        invalid += wrong_offsets(targets.offsets_ptr, M, batch, ROWS)
    if invalid > 0:
        tl.atomic_add(tally.found_ptr + 1, invalid, sem="relaxed")
    if one.valid:
        owner = Owner(g, one, tl.load(tally.done_ptr + 1))
        _settle(owner, M, problem, decoded, picked, tally, SPEC, BLOCK, K2)
    if is_last(tally.done_ptr, tl.num_programs(0)):
        _finish(settled, tally, batch, SPEC)
