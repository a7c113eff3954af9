"""Of SimOTA, what all objects pay for a candidate, whichever its true class is."""

import triton
import triton.language as tl

from ..levels import strides_of
from ..primitives import logistic
from .site import all_cells, cells_at, channel_at, load_channel
from .views import entry_of, is_of_branch, tiles_of
from .wish import LOWEST_LOG, log_miss

CHOSEN: tl.constexpr = tl.constexpr(16)  # candidates whose classes are read at a time


@triton.jit
def _split(q):
    """A float32 q > 0 as a number in [1, 2) and a power of two; NaN stays NaN."""
    bits = q.to(tl.int32, bitcast=True)
    return q * (0x7F000000 - (bits & 0x7F800000)).to(tl.float32, bitcast=True), (bits >> 23) - 127


@triton.jit
def class_costs(at, obj, mask, step, C, ACROSS: tl.constexpr, ACC: tl.constexpr):
    """Sums of -:func:`~.wish.log_miss` of all classes of cells, ``at`` pointers [1, cells] to the first, ``step``
    elements to the next, ACROSS of them at a time; ``obj`` likewise.

    In float32 one logarithm of a product does for many: what it grows, or shrinks, by is kept apart.
    """
    CELLS: tl.constexpr = at.shape[1]
    total = tl.zeros([ACROSS, CELLS], ACC)
    product = total + 1.0
    under = total + 1.0
    powers = tl.zeros([ACROSS, CELLS], tl.int32)
    high_obj, low_obj, _e_obj = logistic(obj)
    for c0 in tl.range(0, C, ACROSS, loop_unroll_factor=2):  # loads of both at a time
        c = c0 + tl.arange(0, ACROSS)[:, None]
        used = mask[None, :] & (c < C)
        cls = tl.load(at + c * step, mask=used, other=0.0).to(ACC)
        if obj.dtype == tl.float64:
            total -= tl.where(used, log_miss(cls, obj), 0.0)
        else:
            high, low, _e = logistic(cls)
            miss = tl.where(used, low + high * low_obj, 1.0)
            none = miss == 0.0
            total -= tl.where(none, LOWEST_LOG, 0.0)
            product, more = _split(product * tl.where(none, 1.0, miss))
            under, fewer = _split(under * tl.where(used & ~none, 1.0 + tl.sqrt(high * high_obj), 1.0))
            powers += more - fewer
    if obj.dtype != tl.float64:
        total -= tl.log(product) - tl.log(under) + powers.to(ACC) * 0.6931471805599453
    return tl.sum(total, axis=0)


@triton.jit
def _cost(pid, branch, SPEC: tl.constexpr, CELLS: tl.constexpr, ACROSS: tl.constexpr):
    """What a program of a branch does."""
    decoded = branch.decoded
    levels = branch.problem.levels
    predictions = branch.problem.predictions
    programs = tiles_of(levels, CELLS)
    b = pid // programs
    count = tl.load(branch.tally.found_ptr + 2 + b)
    first = b.to(tl.int64) * all_cells(levels)
    for i0 in range((pid - b * programs) * CHOSEN, count, programs * CHOSEN):
        i = i0 + tl.arange(0, CHOSEN)
        mask = i < count
        cells = cells_at(tl.load(decoded.list_ptr + (first + i), mask=mask, other=0), levels, SPEC)
        obj = load_channel(predictions.obj, b, 0, cells, mask, SPEC)[None, :]
        at = channel_at(predictions.cls, b, 0, cells)[None, :]
        step = strides_of(predictions.cls.by, cells.level).channel + cells.level * 0  # of one level it is a number
        shared = class_costs(at, obj, mask, step[None, :], SPEC.C, ACROSS, SPEC.ACC)
        known = shared == shared
        tl.store(decoded.cost_ptr + (first + cells.n), tl.where(known, shared, float("inf")), mask=mask)
        if tl.max((mask & ~known).to(tl.int32), axis=0) > 0:
            tl.atomic_max(branch.tally.done_ptr + 2, 1, sem="relaxed")


@triton.jit
def cost_kernel(branches, SPECS: tl.constexpr, CELLS: tl.constexpr, ACROSS: tl.constexpr):
    """Of each branch as many programs of an image as tiles of CELLS cells, which share out its list of candidates by
    the block; see :class:`.records.Decoded`.
    """
    BRANCHES: tl.constexpr = len(branches)
    programs = tl.num_programs(0) // BRANCHES
    for i in tl.static_range(BRANCHES):
        pid = tl.program_id(0) - i * programs
        if is_of_branch(pid, programs, BRANCHES):
            _cost(pid, branches[i], entry_of(SPECS, i), CELLS, ACROSS)
