"""What a row wants a cell for, computed by one function wherever it is asked: picking, claiming and settling compare
the numbers of each other.

A *key* is an integer that orders how much a cell is wanted, of 32 bits for float32, of 64 for float64; NONE is of what
cannot be had.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..boxes import load_corners
from ..overlap import Corners, iou
from ..primitives import divide, larger, log1p_of_share, logistic, pow_pos
from ..terms.label import Power, power_1, power_half
from ..terms.records import Axis
from .region import BEYOND, reach
from .site import all_cells, load_channel, offsets

INSIDE: tl.constexpr = tl.constexpr(1e-9)  # the reference's
IOU_WEIGHT: tl.constexpr = tl.constexpr(3.0)
IOU_EPS: tl.constexpr = tl.constexpr(1e-8)
FAR: tl.constexpr = tl.constexpr(55.0)  # a cost below that of any cell without overlap, which is at least 3 ln 1e8
LOWEST_LOG: tl.constexpr = tl.constexpr(-100.0)
NONE: tl.constexpr = tl.constexpr(-0x80000000)  # of a key, below all others
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # of an index or a row
UNIT: tl.constexpr = tl.constexpr(1099511627776.0)  # 2^40 to a score or an IoU of 1, so that sums are of integers


class Look(NamedTuple):
    """What cells are to an object."""

    can: Any  # whether it may have them
    overlap: Any  # 1 less the term, or the IoU; 0 where that is NaN
    worth: Any  # metric or cost
    key: Any  # of how much it wants them
    strength: Any  # key of its claims to them, of float32


class Problem(NamedTuple):
    """What does not change from row to row: records, see :mod:`.records` and :class:`.site.Frame`."""

    predictions: Any
    levels: Any
    frame: Any
    numbers: Any
    terms: Any


@triton.jit
def _power_0(q, exponent):
    return tl.zeros_like(q) + 1.0  # of NaN too


@triton.jit
def _power_6(q, exponent):
    cube = q * q * q
    return cube * cube


_POWERS = {0.0: _power_0, 0.5: power_half, 1.0: power_1, 6.0: _power_6}


def power(exponent: float) -> Power:
    """An exponent as :func:`metric` takes it; the usual ones without logarithms."""
    return Power(exponent, _POWERS.get(exponent, pow_pos))


@triton.jit
def _holds(centre, side, middle, small):
    """Whether places lie in a region, on one axis. In float32 as the peer takes the steps, whatever the compute type:
    edges of boxes in whole pixels lie on the middles of cells, and which side of these they fall on is a matter of its
    rounding."""
    centre = centre.to(tl.float32)
    half = 0.5 * side.to(tl.float32)
    low = centre - half
    high = centre + half
    centre = 0.5 * (low + high)
    side = high - low
    half = 0.5 * tl.where(side < small, small, side)
    middle = middle.to(tl.float32)
    return (middle - (centre - half) > INSIDE) & ((centre + half) - middle > INSIDE)


@triton.jit
def _says(centre, side, middle, stride, most):
    """Whether distributions at such places can say how far the edges of an object are, on one axis; in float32, too."""
    half = 0.5 * side.to(tl.float32)
    centre = centre.to(tl.float32)
    middle = middle.to(tl.float32)
    before = divide(middle - (centre - half), stride.to(tl.float32))
    behind = divide((centre + half) - middle, stride.to(tl.float32))
    return (tl.minimum(before, behind) >= 0.0) & (tl.maximum(before, behind) <= most)


@triton.jit
def in_region(one, cells, off_x, anywhere, frame, numbers, SPEC: tl.constexpr):
    """Whether cells lie in the region of an object; of SimOTA all do. ``anywhere``: with "range" they need not."""
    can = one.valid & (off_x == off_x)
    if SPEC.REGION == "range":
        x = (cells.column.to(SPEC.ACC) + 0.5) * cells.stride
        y = (cells.line.to(SPEC.ACC) + 0.5) * cells.stride
        most = tl.full([], SPEC.REG_MAX - BEYOND, tl.float32)
        says = _says(one.cx * frame.width, one.width, x, cells.stride, most)
        can = can & (anywhere | (says & _says(one.cy * frame.height, one.height, y, cells.stride, most)))
    elif SPEC.ASSIGNER == "aligned":
        x = (cells.column.to(SPEC.ACC) + 0.5) * cells.stride
        y = (cells.line.to(SPEC.ACC) + 0.5) * cells.stride
        small = tl.cast(numbers.small, tl.float32)
        can = can & _holds(one.cx * frame.width, one.width, x, small)
        can = can & _holds(one.cy * frame.height, one.height, y, small)
    return can


@triton.jit
def overlap_of(one, off_x, off_y, box, problem, SPEC: tl.constexpr):
    """That of an object with boxes, from the middles of cells; 0 where it is NaN."""
    hx = 0.5 * one.width
    hy = 0.5 * one.height
    if SPEC.ASSIGNER == "aligned":
        x = Axis(box.x2 - box.x1, one.width, box.x1 - (off_x - hx), (off_x + hx) - box.x2)
        y = Axis(box.y2 - box.y1, one.height, box.y1 - (off_y - hy), (off_y + hy) - box.y2)
        loss, _by_x, _by_y = problem.terms.overlap(x, y, problem.numbers.overlap_args, None)
        value = 1.0 - loss
    else:
        areas = (box.x2 - box.x1) * (box.y2 - box.y1)
        true = Corners(off_x - hx, off_y - hy, off_x + hx, off_y + hy)
        value = iou(box, true, areas, one.width * one.height, divide)
    return tl.where(value > 0, value, 0.0)


@triton.jit
def near_and_own(one, off_x, off_y, stride, numbers, SPEC: tl.constexpr):
    """Of SimOTA: whether an object makes cells candidates, and whether these are its own."""
    reach_x, reach_y = reach(one, stride, numbers, SPEC)
    near = one.valid & (tl.abs(off_x) < reach_x) & (tl.abs(off_y) < reach_y)
    own = near
    if SPEC.INSIDE:
        inside = one.valid & (tl.abs(off_x) < 0.5 * one.width) & (tl.abs(off_y) < 0.5 * one.height)
        own = near & inside
        near = near | inside
    return near, own


@triton.jit
def metric(logit, overlap, problem):
    """How well predictions are aligned with an object; 0 where that is NaN."""
    score, _miss, _e = logistic(logit)
    value = problem.numbers.alpha.function(score, problem.numbers.alpha.exponent)
    value = value * problem.numbers.beta.function(overlap, problem.numbers.beta.exponent)
    return tl.where(value > 0, value, 0.0)


@triton.jit
def log_sigmoid(x):
    """ln sigmoid(x)."""
    _high, _low, e = logistic(x)
    return tl.minimum(x, 0.0) - log1p_of_share(e)  # a NaN is in e


@triton.jit
def log_miss(cls, obj):
    """ln(1 - q) of q = sqrt(sigmoid(cls) sigmoid(obj)), not below LOWEST_LOG: 1 - q is (1 - q^2) / (1 + q), and 1 - q^2
    a sum of what is positive.
    """
    high, low, _e = logistic(cls)
    high_obj, low_obj, _e = logistic(obj)
    miss = (low + high * low_obj) / (1.0 + tl.sqrt(high * high_obj))
    return larger(tl.log(miss), LOWEST_LOG)


@triton.jit
def cost(shared, cls, obj, overlap):
    """SimOTA's, of what the classes of a cell share and the logit of the true one. Not below 0, as rounding may be."""
    log_q = 0.5 * (log_sigmoid(cls) + log_sigmoid(obj))
    value = shared + (log_miss(cls, obj) - larger(log_q, LOWEST_LOG))
    return larger(value - IOU_WEIGHT * tl.log(overlap + IOU_EPS), 0.0)


@triton.jit
def none_of(value):
    """NONE in the type of the keys of some numbers."""
    if value.dtype == tl.float32:
        none = tl.full([], NONE, tl.int32)
    else:
        none = tl.full([], NONE, tl.int64) << 32
    return none


@triton.jit
def bits_of(value):
    """Integers that order floats >= 0 as they are."""
    if value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True)
    else:
        bits = value.to(tl.int64, bitcast=True)
    return bits


@triton.jit
def key_of_other(value):
    """That of a cost of a cell that is not an object's own."""
    return -1 - bits_of(value)


@triton.jit
def by_cost(value, own, can):
    """Keys of costs: the lower the better, the own cells of an object before all others."""
    top = bits_of(tl.zeros_like(value) + float("inf"))
    key = tl.where(own, top - bits_of(value), key_of_other(value))
    return tl.where(can & (value < float("inf")), key, none_of(value))  # a NaN is no less


@triton.jit
def _by_worth(value, can):
    """Keys of metrics and overlaps: of 0 there is none."""
    return tl.where(can & (value > 0), bits_of(value), none_of(value))


@triton.jit
def look_at(one, cells, mask, anywhere, problem, decoded, SPEC: tl.constexpr):
    """What cells of its image are to an object; ``anywhere`` as of :func:`in_region`."""
    off_x, off_y = offsets(one, cells, problem.frame, SPEC)
    can = mask & in_region(one, cells, off_x, anywhere, problem.frame, problem.numbers, SPEC)
    at = one.image.to(tl.int64) * all_cells(problem.levels) + cells.n
    # whether it will be asked for or not, so that all is waited for at once
    cls = load_channel(problem.predictions.cls, one.image, one.label, cells, can, SPEC)
    if SPEC.ASSIGNER == "aligned":
        overlap = overlap_of(one, off_x, off_y, load_corners(decoded.boxes_ptr, at, can), problem, SPEC)
        overlap = tl.where(can, overlap, 0.0)
        can = can & ((overlap > 0) | (problem.numbers.beta.exponent == 0))  # which asks for no overlap
        worth = metric(cls, overlap, problem)
        key = _by_worth(worth, can)
        strength = _by_worth(overlap.to(tl.float32), can)
    else:
        obj = load_channel(problem.predictions.obj, one.image, 0, cells, can, SPEC)
        shared = tl.load(decoded.cost_ptr + at, mask=can, other=float("inf"))
        overlap = overlap_of(one, off_x, off_y, load_corners(decoded.boxes_ptr, at, can), problem, SPEC)
        overlap = tl.where(can, overlap, 0.0)
        can = can & (shared < float("inf"))
        worth = cost(shared, cls, obj, overlap)
        _near, own = near_and_own(one, off_x, off_y, cells.stride, problem.numbers, SPEC)
        key = by_cost(worth, own, can)
        strength = by_cost(worth.to(tl.float32), own, can)
    return Look(can, overlap, worth, key, strength)


@triton.jit
def is_own(look):
    """Of SimOTA: whether cells are of an object's own."""
    return look.key >= 0


@triton.jit
def claim_of(strength, g):
    """A claim, above 1, by a strength that is not NONE: the stronger one is larger, of equals that of the lower row."""
    return ((strength.to(tl.int64) - NONE) << 31) | (LAST.value - g).to(tl.int64)


@triton.jit
def claimant(claim):
    """The row of a claim."""
    return (LAST.value - (claim & LAST)).to(tl.int32)


@triton.jit
def strength_in(claim):
    """The strength of a claim, as a float32 if it is an overlap's."""
    return ((claim >> 31) + NONE).to(tl.int32).to(tl.float32, bitcast=True)
