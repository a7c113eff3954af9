"""Ranking the anchors without a row by their cross-entropy: which of them count, and what a ranked head's classes cost.

Several programs an image, each with PART of its anchors, of which it counts how many lie in each of BINS bins of
cross-entropies. So the last program of an image knows the bin in which the least of those that count lies. It goes
through the image once, for the sum of all above and lists of those in that bin, and picks among these, eight bits of
their keys at a time; the last of all adds up the images. Nothing depends on the order in which programs run.

As the last program has the multiprocessor for itself, it is the longest chain that costs: each of its warps has a
stretch of the image and a list of its own, and no other is waited for.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..sums import column, column_sums, is_last
from .loss import rank_key, share

BINS: tl.constexpr = tl.constexpr(256)
LEAST: tl.constexpr = tl.constexpr(-16)  # all below two to this are in the first bin, an octave are eight
STRETCHES: tl.constexpr = tl.constexpr(16)  # of an image
LANES: tl.constexpr = tl.constexpr(32)  # anchors of a stretch that lie on a warp, four times at a time
LISTED: tl.constexpr = tl.constexpr(64)  # of each list at a time


class RankSpec(NamedTuple):
    """The structure of a ranking: the kernel is compiled for each."""

    BY_IMAGE: Any
    ACC: Any
    KEY: Any  # the integers that keys are, and their bits but the sign
    BITS: Any
    PART: Any  # anchors of a program


class Scratch(NamedTuple):
    """What the programs of a ranking leave for each other."""

    counts_ptr: Any  # int32 [programs, BINS]: anchors without a row, by their bins
    twice_ptr: Any  # int32 [programs]: the end of the anchors that count twice
    partial_ptr: Any  # [programs]: sums over anchors with a row
    images_ptr: Any  # [B]: sums of images
    index_ptr: Any  # int32 [B, N]: of each stretch the anchors in the bin of the least that counts, in their order, and
    listed_ptr: Any  # their cross-entropies


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
def _keys(ce, KEY: tl.constexpr):
    """Integers that order cross-entropies; below 0 where these are, of anchors that do not take part."""
    return rank_key(ce).to(KEY)


@triton.jit
def _edge(own_bin, SPEC: tl.constexpr):
    """The least key of a bin but the first: eight to an octave, for their exponent and three bits more are the same."""
    EXPONENT: tl.constexpr = 8 if SPEC.BITS == 31 else 11
    one: tl.constexpr = (1 << (EXPONENT - 1)) - 1  # the exponent of numbers from 1 to 2
    return (own_bin + 8 * (one + LEAST)).to(SPEC.KEY) << (SPEC.BITS - EXPONENT - 3)


@triton.jit
def _bin(keys, SPEC: tl.constexpr):
    """Which of BINS bins keys are in, the larger the later; of those that do not take part the first."""
    EXPONENT: tl.constexpr = 8 if SPEC.BITS == 31 else 11
    one: tl.constexpr = (1 << (EXPONENT - 1)) - 1
    eighths = (keys >> (SPEC.BITS - EXPONENT - 3)).to(tl.int32)
    return tl.minimum(tl.maximum(eighths - 8 * (one + LEAST), 0), BINS - 1)


@triton.jit
def _reached(counts, left):
    """The bin that the left-th largest is in, by how many each bin has, and of how many there it is the least.

    The first bin may have been counted too large.
    """
    larger = tl.cumsum(counts, axis=0, reverse=True)  # or there
    reached = larger >= left
    return tl.sum(reached.to(tl.int32), axis=0) - 1, left - tl.max(tl.where(reached, 0, larger), axis=0)


@triton.jit
def _load(ce_ptr, match_ptr, n, end):
    """The cross-entropies of some anchors and what they have taken, a row where there is no anchor."""
    return tl.load(ce_ptr + n, mask=n < end, other=0.0), tl.load(match_ptr + n, mask=n < end, other=0)


@triton.jit
def _part(ce_ptr, match_ptr, first, N, wanted, scratch, SPEC: tl.constexpr):
    """Leaves what the last program of the image is to know of the anchors from ``first`` on."""
    PART: tl.constexpr = SPEC.PART
    pid = tl.program_id(0)
    n = first + tl.arange(0, PART)
    ce, match = _load(ce_ptr, match_ptr, n, N)
    has = (match >= 0) & (n < N)
    total = tl.sum(tl.where(has, ce, 0.0), axis=0)
    end = wanted.twice * 0
    if wanted.twice > 0:
        before = end  # earlier anchors with a row
        for i in range(0, first, PART):
            before += tl.sum((tl.load(match_ptr + i + tl.arange(0, PART)) >= 0).to(tl.int32), axis=0)
        again = has & (before + tl.cumsum(has.to(tl.int32), axis=0) <= wanted.twice)
        end = tl.max(tl.where(again, n + 1, 0), axis=0)
        total += tl.sum(tl.where(again, ce, 0.0), axis=0)
    tl.store(scratch.twice_ptr + pid, end)
    tl.store(scratch.partial_ptr + pid, total)
    if wanted.hardest > 0:
        keys = _keys(tl.where(match >= 0, -1.0, ce), SPEC.KEY)
        counts = tl.histogram(_bin(keys, SPEC), BINS)
        tl.store(scratch.counts_ptr + pid * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _bin_of_image(first_program, parts, left, scratch):
    """:func:`_reached` of an image.

    Loads are .cg: other programs wrote these, so a line this multiprocessor has cached would be stale.
    """
    PARTS: tl.constexpr = 16
    part = tl.arange(0, PARTS)[:, None]
    at = scratch.counts_ptr + (first_program + part) * BINS + tl.arange(0, BINS)[None, :]
    counts = tl.zeros([PARTS, BINS], tl.int32)
    for i in range(0, parts, PARTS):
        counts += tl.load(at + i * BINS, mask=i + part < parts, other=0, cache_modifier=".cg")
    return _reached(tl.sum(counts, axis=0), left)


@triton.jit
def _twice_of_image(first_program, parts, scratch):
    """The end of the anchors that count twice."""
    PARTS: tl.constexpr = 16
    part = tl.arange(0, PARTS)
    twice = tl.zeros([PARTS], tl.int32)
    for i in range(0, parts, PARTS):
        at = scratch.twice_ptr + first_program + i + part
        twice = tl.maximum(twice, tl.load(at, mask=i + part < parts, other=0, cache_modifier=".cg"))
    return tl.max(twice, axis=0)


@triton.jit
def _places(there):
    """Of flags [STRETCHES, 4, LANES], in the order of each stretch: how many come up to each, itself among them; and in
    all, [STRETCHES, 1]. The four lie in the bytes of one integer."""
    byte = 8 * tl.arange(0, 4)[None, :, None]
    flags = tl.sum(there.to(tl.int32) << byte, axis=1)
    totals = tl.sum(flags, axis=1, keep_dims=True)
    earlier = (totals << 8) + (totals << 16) + (totals << 24)
    places = (tl.cumsum(flags, axis=1) + earlier)[:, None, :] >> byte
    return places & 255, (earlier >> 24) + (totals >> 24)


@triton.jit
def _list(ce_ptr, match_ptr, N, own_bin, scratch, base, SPEC: tl.constexpr):
    """Lists the anchors of an image without a row that are in a bin; how many of each stretch, [STRETCHES, 1], and the
    sum over all above."""
    least = tl.where(own_bin > 0, _edge(own_bin, SPEC), 0)
    most = tl.where(own_bin < BINS - 1, _edge(own_bin + 1, SPEC), (1 << SPEC.BITS) - 1)
    each = tl.cdiv(N, STRETCHES)
    first = tl.arange(0, STRETCHES)[:, None, None] * each
    end = tl.minimum(first + each, N)
    n = first + (tl.arange(0, 4)[None, :, None] * LANES + tl.arange(0, LANES)[None, None, :])
    listed = tl.zeros([STRETCHES, 1], tl.int32)
    total = tl.zeros([STRETCHES, 4, LANES], SPEC.ACC)
    ce, match = _load(ce_ptr, match_ptr, n, end)
    for _i in range(0, each, 4 * LANES):
        # what the next turn takes is under way during this one
        next_ce, next_match = _load(ce_ptr, match_ptr, n + 4 * LANES, end)
        ce = tl.where(match >= 0, -1.0, ce)
        keys = _keys(ce, SPEC.KEY)
        there = (keys >= least) & (keys < most)
        places, count = _places(there)
        at = first + (listed[:, None, :] + places - 1)
        tl.store(scratch.index_ptr + base + at, n, mask=there)
        tl.store(scratch.listed_ptr + base + at, ce, mask=there)
        listed += count
        total += tl.where(keys >= most, ce, 0.0)
        n += 4 * LANES
        ce = next_ce
        match = next_match
    tl.debug_barrier()  # every thread sees what the others have written
    return listed, tl.sum(tl.sum(tl.sum(total, axis=2), axis=1), axis=0)


@triton.jit
def _listed(N, listed, i, scratch, base, SPEC: tl.constexpr):
    """Of each list LISTED anchors from the i-th on: where they are, cross-entropies and keys."""
    place = i + tl.arange(0, LISTED)[None, :]
    at = base + tl.arange(0, STRETCHES)[:, None] * tl.cdiv(N, STRETCHES) + place
    ce = tl.load(scratch.listed_ptr + at, mask=place < listed, other=-1.0)
    return at, ce, _keys(ce, SPEC.KEY)


@triton.jit
def _cut(N, listed, left, scratch, base, SPEC: tl.constexpr):
    """The left-th largest key of the lists, and how many of those equal to it are in: eight bits at a time."""
    longest = tl.max(tl.max(listed, axis=1), axis=0)
    cut = tl.full([], 0, SPEC.KEY)
    shift = tl.full([], SPEC.BITS - 7, SPEC.KEY)
    while shift >= 0:
        counts = tl.zeros([BINS], tl.int32)
        for i in range(0, longest, LISTED):
            _at, _ce, keys = _listed(N, listed, i, scratch, base, SPEC)
            same = (keys >> shift >> 8) == (cut >> shift >> 8)
            bits = tl.where(same, (keys >> shift) & 255, 0).to(tl.int32)
            counts += tl.histogram(tl.reshape(bits, (STRETCHES * LISTED,), can_reorder=True), BINS)
        bits, left = _reached(counts, left)
        cut = cut | (bits.to(SPEC.KEY) << shift)
        shift -= 8
    return cut, left


@triton.jit
def _least(N, listed, key, left, scratch, base, SPEC: tl.constexpr):
    """Of all in the lists that count the sum, and the end of those equal to the least."""
    longest = tl.max(tl.max(listed, axis=1), axis=0)
    equals = tl.zeros([STRETCHES, 1], tl.int32)
    for i in range(0, longest, LISTED):
        _at, _ce, keys = _listed(N, listed, i, scratch, base, SPEC)
        equals += tl.sum((keys == key).to(tl.int32), axis=1, keep_dims=True)
    equals = tl.cumsum(equals, axis=0) - equals  # of earlier stretches
    total = tl.zeros([STRETCHES, LISTED], SPEC.ACC)
    limit = tl.zeros([STRETCHES, LISTED], tl.int32)
    for i in range(0, longest, LISTED):
        at, ce, keys = _listed(N, listed, i, scratch, base, SPEC)
        equal = (keys == key).to(tl.int32)
        counted = (keys == key) & (equals + tl.cumsum(equal, axis=1) <= left)
        total += tl.where((keys > key) | counted, ce, 0.0)
        limit = tl.maximum(limit, tl.load(scratch.index_ptr + at, mask=counted, other=-1) + 1)
        equals += tl.sum(equal, axis=1, keep_dims=True)
    return tl.sum(tl.sum(total, axis=1), axis=0), tl.max(tl.max(limit, axis=1), axis=0)


@triton.jit
def _pick(ce_ptr, match_ptr, b, parts, N, wanted, scratch, picks_ptr, SPEC: tl.constexpr):
    """Which anchors of an image count; the sum of all that do, those with a row among them."""
    base = b.to(tl.int64) * N
    key = tl.full([], (1 << SPEC.BITS) - 1, SPEC.KEY)  # above any
    limit = wanted.hardest * 0
    total = tl.cast(0.0, SPEC.ACC)
    if wanted.hardest > 0:
        own_bin, left = _bin_of_image(b * parts, parts, wanted.hardest, scratch)
        listed, above = _list(ce_ptr, match_ptr, N, own_bin, scratch, base, SPEC)
        key, left = _cut(N, listed, left, scratch, base, SPEC)
        total, limit = _least(N, listed, key, left, scratch, base, SPEC)
        total += above
    tl.store(picks_ptr, key.to(tl.int64))
    tl.store(picks_ptr + 1, limit.to(tl.int64))
    tl.store(picks_ptr + 2, _twice_of_image(b * parts, parts, scratch).to(tl.int64))
    return total + column(column_sums(scratch.partial_ptr + b * parts, parts, 1, SPEC.ACC), 0)


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
    _part(ce_ptr, match_ptr, part * SPEC.PART, N, wanted, scratch, SPEC)
    if is_last(picks_ptr + 3, parts):
        own = _pick(ce_ptr, match_ptr, b, parts, N, wanted, scratch, picks_ptr, SPEC)
        weight = share(found_ptr, b, B, SPEC.BY_IMAGE, SPEC.ACC)
        tl.store(scratch.images_ptr + b, weight * own)
        if is_last(outcome.done_ptr, B):
            classes = column(column_sums(scratch.images_ptr, B, 1, SPEC.ACC), 0) + tl.load(outcome.class_ptr)
            tl.debug_barrier()  # every thread has read what one of them overwrites
            tl.store(outcome.class_ptr, classes)
            tl.store(outcome.total_ptr, classes + tl.load(outcome.box_ptr))
            tl.store(outcome.done_ptr, 0)
