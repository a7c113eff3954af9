"""Ignored regions: rows of a weight below 0, in which there is no background."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .assign import row_valid
from .primitives import WARP_LANES, lane_bits, lowest_bit
from .rows import load_rows, of_kind, relative_row


class Points(NamedTuple):
    """Points of an image, float32, in the unit of its ``size``, width and height; which of them there are."""

    x: Any
    y: Any
    mask: Any
    size: Any


class Candidates(NamedTuple):
    """The rows of image b, among those from ``first`` to ``last``, and their weights."""

    ptr: Any
    weights_ptr: Any
    first: Any
    last: Any
    b: Any


@triton.jit
def edges_of(cx, cy, w, h, width, height):
    """Left, upper, right and lower edge in the unit of ``width`` and ``height``, the image's sides, in float32 whatever
    the compute type: every backend takes the same steps, so that it finds the same points within.
    """
    width = tl.cast(width, tl.float32)
    height = tl.cast(height, tl.float32)
    x1 = (cx - 0.5 * w) * width
    y1 = (cy - 0.5 * h) * height
    return x1, y1, (cx + 0.5 * w) * width, (cy + 0.5 * h) * height


@triton.jit
def _edges(c0, c1, c2, c3, size, CORNERS: tl.constexpr):
    """The same of rows by the four numbers of their boxes, which with CORNERS are the edges."""
    edges = (c0, c1, c2, c3)
    if not CORNERS:
        edges = edges_of(c0, c1, c2, c3, size[0], size[1])
    return edges


@triton.jit
def within(edges, x, y):
    """Whether points lie in a box, the left and the upper edge included."""
    x1, y1, x2, y2 = edges
    return (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)


@triton.jit
def _around(x, mask):
    """The least and the largest of some numbers."""
    inf = float("inf")
    return tl.min(tl.where(mask, x, inf), axis=0), tl.max(tl.where(mask, x, -inf), axis=0)


@triton.jit
def _meets(edges, x, y):
    """Whether boxes may hold a point of a rectangle, ``x`` and ``y`` what :func:`_around` has found."""
    x1, y1, x2, y2 = edges
    return (x1 <= x[1]) & (x[0] < x2) & (y1 <= y[1]) & (y[0] < y2)


@triton.jit
def in_regions(points, rows, classes, limit, first_class=0, CORNERS: tl.constexpr = False):
    """Which of the points of an image lie in one of its regions; only regions that meet the box around all points are
    held against each. Rows have so many ``classes`` from ``first_class`` on; with CORNERS their boxes are two corners
    in pixels, see :func:`.rows.relative_row`.
    """
    x, y, mask, size = points
    across = _around(x, mask)
    along = _around(y, mask)
    found = mask & (x != x)
    for g0 in range(rows.first, rows.last, WARP_LANES):
        g = g0 + tl.arange(0, WARP_LANES)
        there = g < rows.last
        row = of_kind(load_rows(rows.ptr, g, there, WARP_LANES), g, there, rows.weights_ptr, "region")
        edges = _edges(row.cx, row.cy, row.w, row.h, size, CORNERS)
        row = relative_row(row, first_class, size, CORNERS)
        valid = row_valid(row, rows.b, rows.b + 1, classes, limit)
        bits = lane_bits(valid & _meets(edges, across, along))
        while bits != 0:
            at = rows.ptr + (g0 + lowest_bit(bits)).to(tl.int64) * 6
            bits = bits & (bits - 1)
            one = _edges(tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), size, CORNERS)
            found = found | (mask & within(one, x, y))
    return found
