"""Ranking the anchors without a row by their cross-entropy: which of them count, and what a ranked head's classes cost.

Several programs an image, each with PART of its anchors. Of the hardest of an image no more than all those wanted can
lie in one part, so each program keeps as many of its own as *candidates*, in the order of their indices. The last
program of an image packs the candidates of all its parts and picks among them; the last of all adds up the images.
What is picked depends on the order in which programs run as little as the sums do.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..sums import column, column_sums, is_last
from .loss import rank_key, share

N_NOTES: tl.constexpr = tl.constexpr(2)  # of a part: how many candidates it has; the end of those that count twice


class RankSpec(NamedTuple):
    """The structure of a ranking: the kernel is compiled for each."""

    BY_IMAGE: Any
    ACC: Any
    KEY: Any  # the integers that keys are, and their bits but the sign
    BITS: Any
    PART: Any  # anchors of a program
    BLOCK: Any  # candidates looked at at a time


class Scratch(NamedTuple):
    """What the programs of a ranking leave for each other; an image has as many places as parts hold anchors."""

    index_ptr: Any  # int32: candidates, of each part from its beginning on, in the end one after the other
    packed_ptr: Any  # their cross-entropies, then
    notes_ptr: Any  # int32 [programs, N_NOTES]
    partial_ptr: Any  # [programs]: sums over anchors with a row
    images_ptr: Any  # [B]: sums of images


class Outcome(NamedTuple):
    """Where the class loss and the total go; the loss launch left the box loss, and in place of the other NaN or 0."""

    total_ptr: Any
    class_ptr: Any
    box_ptr: Any
    done_ptr: Any


class Wanted(NamedTuple):
    """How many anchors of an image count."""

    hardest: Any  # of those without a row
    twice: Any  # of those with one, the first, where there are not enough without


@triton.jit
def _wanted(found, N, ratio):
    """Of an image with so many anchors that have a row."""
    wanted = tl.minimum(tl.ceil(found.to(tl.float32) * ratio), N).to(tl.int32)
    hardest = tl.minimum(wanted, N - found)
    return Wanted(hardest, wanted - hardest)


@triton.jit
def _keys(ce, mask, KEY: tl.constexpr):
    """Integers >= 0 that order cross-entropies; -1 where masked out."""
    return tl.where(mask, rank_key(ce), -1).to(KEY)


@triton.jit
def _cut(keys, left, KEY: tl.constexpr, BITS: tl.constexpr):
    """The left-th largest of some keys, or 0 if they are fewer: bit by bit, the highest first."""
    cut = tl.full([], 0, KEY)
    bit = left * 0 + BITS - 1
    while bit >= 0:
        trial = cut | (tl.full([], 1, KEY) << bit.to(KEY))
        above = tl.sum((keys >= trial).to(tl.int32), axis=0)
        cut = tl.where(above >= left, trial, cut)
        bit -= 1
    return cut


@triton.jit
def _packed(scratch, base, i, candidates, SPEC: tl.constexpr):
    """The cross-entropies and keys of BLOCK packed candidates from the i-th on."""
    at = i + tl.arange(0, SPEC.BLOCK)
    ce = tl.load(scratch.packed_ptr + base + at, mask=at < candidates, other=0.0)
    return ce, _keys(ce, at < candidates, SPEC.KEY)


@triton.jit
def _cut_of_packed(scratch, base, candidates, left, SPEC: tl.constexpr):
    """:func:`_cut` of all packed candidates, and how many of those equal to it are in."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    cut = tl.full([], 0, SPEC.KEY)
    bit = left * 0 + SPEC.BITS - 1
    while bit >= 0:
        trial = cut | (tl.full([], 1, SPEC.KEY) << bit.to(SPEC.KEY))
        above = tl.zeros([BLOCK], tl.int32)
        for i in range(0, candidates, BLOCK):
            _ce, keys = _packed(scratch, base, i, candidates, SPEC)
            above += (keys >= trial).to(tl.int32)
        reached = tl.sum(above, axis=0) >= left
        cut = tl.where(reached, trial, cut)
        bit -= 1
    beyond = tl.zeros([BLOCK], tl.int32)
    for i in range(0, candidates, BLOCK):
        _ce, keys = _packed(scratch, base, i, candidates, SPEC)
        beyond += (keys > cut).to(tl.int32)
    return cut, left - tl.sum(beyond, axis=0)


@triton.jit
def _part(ce_ptr, match_ptr, first, N, wanted, scratch, base, SPEC: tl.constexpr):
    """Candidates of the anchors from ``first`` on; leaves what the last program of the image is to know."""
    PART: tl.constexpr = SPEC.PART
    before = wanted.twice * 0  # earlier anchors with a row
    if wanted.twice > 0:
        for i in range(0, first, PART):
            before += tl.sum((tl.load(match_ptr + i + tl.arange(0, PART)) >= 0).to(tl.int32), axis=0)
    n = first + tl.arange(0, PART)
    mask = n < N
    ce = tl.load(ce_ptr + n, mask=mask, other=0.0)
    has = mask & (tl.load(match_ptr + n, mask=mask, other=-1) >= 0)
    again = has & (before + tl.cumsum(has.to(tl.int32), axis=0) <= wanted.twice)
    keys = _keys(ce, mask & ~has, SPEC.KEY)
    candidates = tl.full([], 0, tl.int32)
    if wanted.hardest > 0:
        cut = _cut(keys, wanted.hardest, SPEC.KEY, SPEC.BITS)
        equals = wanted.hardest - tl.sum((keys > cut).to(tl.int32), axis=0)
        equal = (keys == cut).to(tl.int32)
        chosen = (keys > cut) | ((equal == 1) & (tl.cumsum(equal, axis=0) <= equals))
        place = tl.cumsum(chosen.to(tl.int32), axis=0)
        tl.store(scratch.index_ptr + base + first + place - 1, n, mask=chosen)
        candidates = tl.sum(chosen.to(tl.int32), axis=0)
    pid = tl.program_id(0)
    tl.store(scratch.notes_ptr + pid * N_NOTES, candidates)
    tl.store(scratch.notes_ptr + pid * N_NOTES + 1, tl.max(tl.where(again, n + 1, 0), axis=0))
    total = tl.sum(tl.where(has, ce, 0.0) + tl.where(again, ce, 0.0), axis=0)
    tl.store(scratch.partial_ptr + pid, total)


@triton.jit
def _pack(ce_ptr, first_program, parts, scratch, base, SPEC: tl.constexpr):
    """Puts the candidates of an image one after the other, with their cross-entropies; their number, and the end of the
    anchors that count twice.

    Loads are .cg: other programs wrote these, so a line this multiprocessor has cached would be stale.
    """
    lane = tl.arange(0, SPEC.BLOCK)
    total = parts * 0
    twice = parts * 0
    for part in range(0, parts):
        notes = scratch.notes_ptr + (first_program + part) * N_NOTES
        candidates = tl.load(notes, cache_modifier=".cg")
        twice = tl.maximum(twice, tl.load(notes + 1, cache_modifier=".cg"))
        for i in range(0, candidates, SPEC.BLOCK):
            mask = i + lane < candidates
            at = scratch.index_ptr + base + part * SPEC.PART + i + lane
            n = tl.load(at, mask=mask, other=0, cache_modifier=".cg")
            tl.debug_barrier()  # every thread has read what one of them may overwrite
            tl.store(scratch.index_ptr + base + total + i + lane, n, mask=mask)
            tl.store(scratch.packed_ptr + base + total + i + lane, tl.load(ce_ptr + n, mask=mask), mask=mask)
        total += candidates
    tl.debug_barrier()  # and sees what the others have written
    return total, twice


@triton.jit
def _pick(ce_ptr, b, parts, wanted, scratch, picks_ptr, SPEC: tl.constexpr):
    """Which of the candidates of an image count; the sum of all that do, those with a row among them."""
    base = b.to(tl.int64) * parts * SPEC.PART
    candidates, twice = _pack(ce_ptr, b * parts, parts, scratch, base, SPEC)
    BLOCK: tl.constexpr = SPEC.BLOCK
    key = tl.full([], (1 << SPEC.BITS) - 1, SPEC.KEY)  # above any
    left = wanted.hardest
    if left > 0:
        key, left = _cut_of_packed(scratch, base, candidates, left, SPEC)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], SPEC.ACC)
    limit = tl.zeros([BLOCK], tl.int32)
    equals = left * 0
    for i in range(0, candidates, BLOCK):
        ce, keys = _packed(scratch, base, i, candidates, SPEC)
        equal = keys == key
        counted = equal & (equals + tl.cumsum(equal.to(tl.int32), axis=0) <= left)
        total += tl.where((keys > key) | counted, ce, 0.0)
        n = tl.load(scratch.index_ptr + base + i + lane, mask=counted, other=0)
        limit = tl.where(counted, n + 1, limit)
        equals += tl.sum(equal.to(tl.int32), axis=0)
    tl.store(picks_ptr, key.to(tl.int64))
    tl.store(picks_ptr + 1, tl.max(limit, axis=0).to(tl.int64))
    tl.store(picks_ptr + 2, twice.to(tl.int64))
    return tl.sum(total, axis=0) + column(column_sums(scratch.partial_ptr + b * parts, parts, 1, SPEC.ACC), 0)


@triton.jit(do_not_specialize=["N", "B"])
def rank_kernel(ce_ptr, match_ptr, found_ptr, N, B, ratio, picks_ptr, scratch, outcome, SPEC: tl.constexpr):
    """The hardest of the anchors without a row, ``ratio`` times those with one, and the class loss; grid: for each
    image its parts.

    ``picks_ptr`` [B, 4], int64: anchors without a row count whose key is above the first, or equal to it if their index
    is below the second; should that not be enough, those with a row and an index below the third count twice, as in
    torchvision. Of equals the first anchors count. The fourth is 0 at first: it counts the programs that have finished.
    """
    pid = tl.program_id(0)
    parts = tl.num_programs(0) // B
    b = pid // parts
    part = pid % parts
    ce_ptr += b.to(tl.int64) * N
    match_ptr += b.to(tl.int64) * N
    picks_ptr += 4 * b
    wanted = _wanted(tl.load(found_ptr + b), N, ratio)
    base = b.to(tl.int64) * parts * SPEC.PART
    _part(ce_ptr, match_ptr, part * SPEC.PART, N, wanted, scratch, base, SPEC)
    if is_last(picks_ptr + 3, parts):
        own = _pick(ce_ptr, b, parts, wanted, scratch, picks_ptr, SPEC)
        weight = share(found_ptr, b, B, SPEC.BY_IMAGE, SPEC.ACC)
        tl.store(scratch.images_ptr + b, weight * own)
        if is_last(outcome.done_ptr, B):
            classes = column(column_sums(scratch.images_ptr, B, 1, SPEC.ACC), 0) + tl.load(outcome.class_ptr)
            tl.debug_barrier()  # every thread has read what one of them overwrites
            tl.store(outcome.class_ptr, classes)
            tl.store(outcome.total_ptr, classes + tl.load(outcome.box_ptr))
            tl.store(outcome.done_ptr, 0)
