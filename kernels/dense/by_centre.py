"""Rows that anchors take by their centres, the smallest of those that hold them."""

import triton
import triton.language as tl

from ..primitives import exact, lane_bits, lowest_bit, plain
from ..rows import load_rows
from .blocks import BACKGROUND, LANES, area, lanes_of, load_corners_of_row
from .place import centreness, relative


@triton.jit
def _reached(row, around_x, around_y, reach, low, high):
    """Whether rows may take an anchor: they hold a place of the box around the anchors' centres, have their own centre
    at most so far from it, and are as large as the range asks for. Differences of floats are rounded in order, so no
    anchor is missed; a side that is as far away as can be is half of all, or more."""
    x = 0.5 * (row.x1 + row.x2)
    y = 0.5 * (row.y1 + row.y2)
    holds = (row.x1 < around_x[1]) & (row.x2 > around_x[0]) & (row.y1 < around_y[1]) & (row.y2 > around_y[0])
    near_x = (x - around_x[1] < reach) & (around_x[0] - x < reach)
    near_y = (y - around_y[1] < reach) & (around_y[0] - y < reach)
    side = tl.maximum(row.x2 - row.x1, row.y2 - row.y1)
    return holds & near_x & near_y & (side > low) & (0.499 * side < high)


@triton.jit
def smallest_around(own, rows, rule, frame, N, SPEC: tl.constexpr):
    """The row that each anchor takes by its centre."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    x = 0.5 * (own.corners.x1 + own.corners.x2)
    y = 0.5 * (own.corners.y1 + own.corners.y2)
    side = own.corners.x2 - own.corners.x1
    reach = side * exact(rule.radius).to(SPEC.ACC)
    low = tl.where(own.n < plain(rule.ends[0]), 0.0, side * tl.cast(rule.ranges[0], SPEC.ACC))
    inf = float("inf")
    high = tl.where(own.n >= N - plain(rule.ends[1]), inf, side * tl.cast(rule.ranges[1], SPEC.ACC))
    around_x = (tl.min(tl.where(own.mask, x, inf), axis=0), tl.max(tl.where(own.mask, x, -inf), axis=0))
    around_y = (tl.min(tl.where(own.mask, y, inf), axis=0), tl.max(tl.where(own.mask, y, -inf), axis=0))
    farthest_reach = tl.max(reach, axis=0)  # 0 where masked out
    lowest = tl.min(tl.where(own.mask, low, inf), axis=0)
    highest = tl.max(tl.where(own.mask, high, 0.0), axis=0)
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    best = tl.zeros([BLOCK], SPEC.ACC) + 1e-5  # the peer's bound
    for g0 in range(rows.first, rows.last, LANES):
        _lane, valid, box = lanes_of(rows, g0, own.b, frame, SPEC)
        bits = lane_bits(valid & _reached(box, around_x, around_y, farthest_reach, lowest, highest))
        while bits != 0:
            g = g0 + lowest_bit(bits)
            bits = bits & (bits - 1)
            row = load_corners_of_row(rows, g, frame, SPEC)
            off = tl.maximum(tl.abs(x - 0.5 * (row.x1 + row.x2)), tl.abs(y - 0.5 * (row.y1 + row.y2)))
            nearest = tl.minimum(tl.minimum(x - row.x1, y - row.y1), tl.minimum(row.x2 - x, row.y2 - y))
            farthest = tl.maximum(tl.maximum(x - row.x1, y - row.y1), tl.maximum(row.x2 - x, row.y2 - y))
            fits = (off < reach) & (nearest > 0) & (farthest > low) & (farthest < high)
            value = 1e8 - area(row)
            taken = tl.where(fits & ((value > best) | ((taken < 0) & (value == best))), g, taken)
            best = tl.where(taken == g, value, best)
    return taken


@triton.jit
def sum_of_weights(match, own, rows, frame, SPEC: tl.constexpr):
    """The sum of the centreness of a program's anchors in the rows that they have taken."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    has = own.mask & (match >= 0)
    row = load_rows(rows.ptr, match, has, BLOCK)
    place = relative(own.corners, row, has, frame.size, SPEC.CORNERS, SPEC.ACC)
    return tl.sum(tl.where(has, centreness(place.shift, place.true), 0.0), axis=0)
