"""Ranking the anchors without a row by their cross-entropy: which of them count, and what a ranked head's classes cost.

Two launches, each with several programs an image, a PART of its anchors each. The first counts how many of those lie in
each of BINS bins of cross-entropies; the last of its programs finds the bin in which the least of those that count
lies, and how many anchors each part and those before it have there. So every program of the second adds up all above,
and puts its own at their place in the list of the image. The last program of an image picks among these, bit by bit of
their keys; the last of all adds up the images, unless each has a loss of its own. Nothing depends on the order in which
programs run.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..sums import column, column_sums, is_last
from .ranked import rank_key
from .taken import share

BINS: tl.constexpr = tl.constexpr(256)
LEAST: tl.constexpr = tl.constexpr(-16)  # all below two to this are in the first bin, an octave are eight
LISTED: tl.constexpr = tl.constexpr(1024)  # of a list at a time
HELD: tl.constexpr = tl.constexpr(4)  # times as many that are read but once, as it is cut
AT_A_TIME: tl.constexpr = tl.constexpr(8)  # parts whose bins are read
PARTS: tl.constexpr = tl.constexpr(64)  # parts of which one number is read


class RankSpec(NamedTuple):
    """The structure of a ranking: the kernels are compiled for each."""

    BY_IMAGE: Any
    IMAGES: Any  # a loss of each image
    ACC: Any
    KEY: Any  # the integers that keys are, and their bits but the sign
    BITS: Any
    PART: Any  # anchors of a program


class Scratch(NamedTuple):
    """What the programs of a ranking leave for each other."""

    counts_ptr: Any  # int32 [programs, BINS]: anchors without a row, by their bins
    bins_ptr: Any  # int32 [B, 4]: the bin of the least that counts, how many count there, how many there are
    earlier_ptr: Any  # int32 [programs]: how many of these belong to earlier parts
    twice_ptr: Any  # int32 [programs]: the end of the anchors that count twice
    partial_ptr: Any  # [2, programs]: sums over anchors with a row; and over these and those above the least one's bin
    images_ptr: Any  # [B]: sums of images
    index_ptr: Any  # int32 [B, N]: the anchors in the bin of the least that counts, in their order, and
    listed_ptr: Any  # their cross-entropies


class Outcome(NamedTuple):
    """Where the class loss and the total go; the loss launch left the box loss."""

    total_ptr: Any
    class_ptr: Any
    box_ptr: Any
    done_ptr: Any


class Wanted(NamedTuple):
    """How many anchors of an image count."""

    hardest: Any  # of those without a row
    twice: Any  # of those with one, the first, where there are not enough without


class List(NamedTuple):
    """The list of an image."""

    index_ptr: Any
    listed_ptr: Any


class Bin(NamedTuple):
    """The bin of the least that counts."""

    number: Any
    left: Any  # how many count there
    earlier: Any  # anchors there of earlier parts
    all: Any


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
def _find_bin(first_program, parts, wanted, bins_ptr, scratch):
    """Leaves the bin of an image in which the least of those that count lies, and what earlier parts have there.

    Loads are .cg: other programs wrote these, so a line this multiprocessor has cached would be stale.
    """
    row = tl.arange(0, AT_A_TIME)
    at = scratch.counts_ptr + (first_program + row[:, None]) * BINS + tl.arange(0, BINS)[None, :]
    counts = tl.zeros([AT_A_TIME, BINS], tl.int32)
    for i in range(0, parts, AT_A_TIME):
        counts += tl.load(at + i * BINS, mask=(i + row < parts)[:, None], other=0, cache_modifier=".cg")
    number, left = _reached(tl.sum(counts, axis=0), wanted)
    earlier = number * 0
    part = tl.arange(0, PARTS)
    for i in range(0, parts, PARTS):
        there = i + part < parts
        program = first_program + i + part
        own = tl.load(scratch.counts_ptr + program * BINS + number, mask=there, other=0, cache_modifier=".cg")
        tl.store(scratch.earlier_ptr + program, earlier + tl.cumsum(own, axis=0) - own, mask=there)
        earlier += tl.sum(own, axis=0)
    tl.store(bins_ptr, number)
    tl.store(bins_ptr + 1, left)
    tl.store(bins_ptr + 2, earlier)


@triton.jit
def _twice_of_image(first_program, parts, scratch):
    """The end of the anchors that count twice."""
    part = tl.arange(0, PARTS)
    twice = tl.zeros([PARTS], tl.int32)
    for i in range(0, parts, PARTS):
        twice = tl.maximum(twice, tl.load(scratch.twice_ptr + first_program + i + part, mask=i + part < parts, other=0))
    return tl.max(twice, axis=0)


@triton.jit
def _list(ce_ptr, match_ptr, first, N, own_bin, own_list, SPEC: tl.constexpr):
    """Puts the anchors of a part without a row that are in a bin into the image's list; the sum over all above."""
    least = tl.where(own_bin.number > 0, _edge(own_bin.number, SPEC), 0)
    most = tl.where(own_bin.number < BINS - 1, _edge(own_bin.number + 1, SPEC), (1 << SPEC.BITS) - 1)
    n = first + tl.arange(0, SPEC.PART)
    ce, match = _load(ce_ptr, match_ptr, n, N)
    ce = tl.where(match >= 0, -1.0, ce)
    keys = _keys(ce, SPEC.KEY)
    there = (keys >= least) & (keys < most)
    at = own_bin.earlier + tl.cumsum(there.to(tl.int32), axis=0) - 1
    tl.store(own_list.index_ptr + at, n, mask=there)
    tl.store(own_list.listed_ptr + at, ce, mask=there)
    return tl.sum(tl.where(keys >= most, ce, 0.0), axis=0)


@triton.jit
def _listed(i, count, own_list, SPEC: tl.constexpr):
    """LISTED anchors of a list from the i-th on: where they are, cross-entropies and keys, -1 where there is none.

    Loads are .cg: other programs wrote these, so a line this multiprocessor has cached would be stale.
    """
    at = i + tl.arange(0, LISTED)
    ce = tl.load(own_list.listed_ptr + at, mask=at < count, other=-1.0, cache_modifier=".cg")
    return at, ce, tl.maximum(_keys(ce, SPEC.KEY), -1)


@triton.jit
def _at_least(keys, key, SPEC: tl.constexpr):
    """-1 of keys that are at least one >= 0, else 0: signs of differences, for AMD keeps a mask of each comparison."""
    return (((key - 1) - keys) >> SPEC.BITS).to(tl.int32)


@triton.jit
def _reaching(held, key, own_bin, own_list, SPEC: tl.constexpr):
    """How many keys of an image's list are at least ``key``; ``held`` are the first of them, in blocks."""
    reached = _at_least(held[0], key, SPEC)
    for i in tl.static_range(1, HELD):
        if i * LISTED < own_bin.all:
            reached += _at_least(held[i], key, SPEC)
    count = tl.sum(reached, axis=0)
    for i in range(HELD * LISTED, own_bin.all, LISTED):
        _at, _ce, others = _listed(i, own_bin.all, own_list, SPEC)
        count += tl.sum(_at_least(others, key, SPEC), axis=0)
    return -count


@triton.jit
def _cut(own_bin, own_list, SPEC: tl.constexpr):
    """The least key that counts of an image's list, and how many of those equal to it do."""
    EXPONENT: tl.constexpr = 8 if SPEC.BITS == 31 else 11
    held = ()
    for i in tl.static_range(HELD):
        _at, _ce, keys = _listed(i * LISTED, own_bin.all, own_list, SPEC)
        held = held + (keys,)  # noqa: RUF005 - as Triton knows it
    inner = (own_bin.number > 0) & (own_bin.number < BINS - 1)
    bit = tl.where(inner, SPEC.BITS - EXPONENT - 3, SPEC.BITS) - 1  # those above are of the bin
    cut = tl.where(inner, _edge(own_bin.number, SPEC), 0).to(SPEC.KEY)
    while bit >= 0:
        higher = cut | (tl.full([], 1, SPEC.KEY) << bit)
        cut = tl.where(_reaching(held, higher, own_bin, own_list, SPEC) >= own_bin.left, higher, cut)
        bit -= 1
    return cut, own_bin.left - _reaching(held, cut + 1, own_bin, own_list, SPEC)


@triton.jit
def _least(own_bin, key, left, own_list, SPEC: tl.constexpr):
    """Of all in an image's list that count the sum, and the end of those equal to the least."""
    total = tl.zeros([LISTED], SPEC.ACC)
    limit = tl.zeros([LISTED], tl.int32)
    equals = own_bin.all * 0
    for i in range(0, own_bin.all, LISTED):
        at, ce, keys = _listed(i, own_bin.all, own_list, SPEC)
        equal = (keys == key).to(tl.int32)
        counted = (keys == key) & (equals + tl.cumsum(equal, axis=0) <= left)
        total += tl.where((keys > key) | counted, ce, 0.0)
        index = tl.load(own_list.index_ptr + at, mask=counted, other=-1, cache_modifier=".cg")
        limit = tl.maximum(limit, index + 1)
        equals += tl.sum(equal, axis=0)
    return tl.sum(total, axis=0), tl.max(limit, axis=0)


@triton.jit(do_not_specialize=["N", "B"])
def count_kernel(ce_ptr, match_ptr, found_ptr, N, B, ratio, picks_ptr, scratch, SPEC: tl.constexpr):
    """The bin of the least that counts, and sums over anchors with a row; grid: for each image its parts.

    ``picks_ptr`` [B, 4], int64: the fourth of an image is 0, counts the programs that have finished, and is left at 0.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    parts = programs // B
    b = pid // parts
    first = pid % parts * SPEC.PART
    ce_ptr += b.to(tl.int64) * N
    match_ptr += b.to(tl.int64) * N
    picks_ptr += 4 * b
    wanted = _wanted(tl.load(found_ptr + b), N, ratio)
    n = first + tl.arange(0, SPEC.PART)
    ce, match = _load(ce_ptr, match_ptr, n, N)
    has = (match >= 0) & (n < N)
    total = tl.sum(tl.where(has | ((ce != ce) & (n < N)), ce, 0.0), axis=0)  # a NaN shows, counted or not
    end = wanted.twice * 0
    if wanted.twice > 0:
        before = end  # earlier anchors with a row
        for i in range(0, first, SPEC.PART):
            before += tl.sum((tl.load(match_ptr + i + tl.arange(0, SPEC.PART)) >= 0).to(tl.int32), axis=0)
        again = has & (before + tl.cumsum(has.to(tl.int32), axis=0) <= wanted.twice)
        end = tl.max(tl.where(again, n + 1, 0), axis=0)
        total += tl.sum(tl.where(again, ce, 0.0), axis=0)
    tl.store(scratch.twice_ptr + pid, end)
    tl.store(scratch.partial_ptr + pid, total)
    if wanted.hardest > 0:
        keys = _keys(tl.where(match >= 0, -1.0, ce), SPEC.KEY)
        counts = tl.histogram(_bin(keys, SPEC), BINS)
        others = tl.sum((match >= 0).to(tl.int32), axis=0)  # that do not take part, and are in the first bin
        own = tl.arange(0, BINS)
        tl.store(scratch.counts_ptr + pid * BINS + own, counts - tl.where(own == 0, others, 0))
        if is_last(picks_ptr + 3, parts):
            _find_bin(b * parts, parts, wanted.hardest, scratch.bins_ptr + 4 * b, scratch)
            tl.store(picks_ptr + 3, 0)


@triton.jit(do_not_specialize=["N", "B"])
def rank_kernel(ce_ptr, match_ptr, found_ptr, N, B, ratio, picks_ptr, scratch, outcome, SPEC: tl.constexpr):
    """The hardest of the anchors without a row, ``ratio`` times those with one, and the class loss; grid: for each
    image its parts.

    ``picks_ptr`` [B, 4], int64: anchors without a row count whose key is above the first, or equal to it if their index
    is below the second; should that not be enough, those with a row and an index below the third count twice, as in
    torchvision. Of equals the first anchors count. The fourth is 0 at first: it counts the programs that have finished.
    """
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    parts = programs // B
    b = pid // parts
    part = pid % parts
    base = b.to(tl.int64) * N
    picks_ptr += 4 * b
    # all that is read of earlier launches at once, so that nobody waits for it in the end
    wanted = _wanted(tl.load(found_ptr + b), N, ratio)
    weight = share(found_ptr, b, B, SPEC.BY_IMAGE, SPEC.ACC)
    own_sum = tl.load(scratch.partial_ptr + pid)
    boxes = tl.load(outcome.box_ptr + (b if SPEC.IMAGES else 0))
    own_bin = Bin(part * 0, part * 0, part * 0, part * 0)
    own_list = List(scratch.index_ptr + base, scratch.listed_ptr + base)
    if wanted.hardest > 0:
        bins_ptr = scratch.bins_ptr + 4 * b
        earlier = tl.load(scratch.earlier_ptr + pid)
        own_bin = Bin(tl.load(bins_ptr), tl.load(bins_ptr + 1), earlier, tl.load(bins_ptr + 2))
        own_sum += _list(ce_ptr + base, match_ptr + base, part * SPEC.PART, N, own_bin, own_list, SPEC)
    tl.store(scratch.partial_ptr + programs + pid, own_sum)
    if is_last(picks_ptr + 3, parts):
        key = tl.full([], (1 << SPEC.BITS) - 1, SPEC.KEY)  # above any
        limit = wanted.hardest * 0
        twice = limit
        total = tl.cast(0.0, SPEC.ACC)
        if wanted.hardest > 0:
            key, left = _cut(own_bin, own_list, SPEC)
            total, limit = _least(own_bin, key, left, own_list, SPEC)
        if wanted.twice > 0:
            twice = _twice_of_image(b * parts, parts, scratch)
        tl.store(picks_ptr, key.to(tl.int64))
        tl.store(picks_ptr + 1, limit.to(tl.int64))
        tl.store(picks_ptr + 2, twice.to(tl.int64))
        total += column(column_sums(scratch.partial_ptr + programs + b * parts, parts, 1, SPEC.ACC, 64), 0)
        if SPEC.IMAGES:
            tl.store(outcome.class_ptr + b, weight * total)
            tl.store(outcome.total_ptr + b, weight * total + boxes)
        else:
            tl.store(scratch.images_ptr + b, weight * total)
            if is_last(outcome.done_ptr, B):
                classes = column(column_sums(scratch.images_ptr, B, 1, SPEC.ACC, 64), 0)
                tl.store(outcome.class_ptr, classes)
                tl.store(outcome.total_ptr, classes + boxes)
                tl.store(outcome.done_ptr, 0)
