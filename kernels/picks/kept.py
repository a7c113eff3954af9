"""The best so far, kept as cells or candidates go by."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .wish import LAST, UNIT, bits_of


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
def best_of(key, n, count, none):
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
def dynamic_k(most, none, COUNT, ACC: tl.constexpr):
    """How many an object picks, of the largest overlaps kept: their sum, rounded down, at least one."""
    # a sum of integers, rounded once: candidates come in any order
    largest = tl.where(keys_of(most, none, COUNT) > none, most.overlap, 0).to(ACC, bitcast=True)
    total = tl.sum((largest * UNIT).to(tl.int64), axis=0).to(ACC) / UNIT
    return tl.maximum(total.to(tl.int32), 1)
