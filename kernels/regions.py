"""Ignored regions: rows of a weight below 0, in which there is no background."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .assign import row_valid
from .rows import load_rows, of_kind

LANES: tl.constexpr = tl.constexpr(32)  # rows that are tested at a time: one a thread of a warp
LAST: tl.constexpr = tl.constexpr(0x7FFFFFFF)


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
def within(edges, x, y):
    """Whether points lie in a box, the left and the upper edge included."""
    x1, y1, x2, y2 = edges
    return (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)


@triton.jit
def around(x, mask):
    """The least and the largest of some numbers."""
    inf = float("inf")
    return tl.min(tl.where(mask, x, inf), axis=0), tl.max(tl.where(mask, x, -inf), axis=0)


@triton.jit
def meets(edges, x, y):
    """Whether boxes may hold a point of a rectangle, ``x`` and ``y`` what :func:`around` has found."""
    x1, y1, x2, y2 = edges
    return (x1 <= x[1]) & (x[0] < x2) & (y1 <= y[1]) & (y[0] < y2)


@triton.jit
def in_regions(points, rows, classes, limit):
    """Which of the points of an image lie in one of its regions; only regions that meet the box around all points are
    held against each.
    """
    x, y, mask, size = points
    width, height = size
    across = around(x, mask)
    along = around(y, mask)
    found = mask & (x != x)
    for g0 in range(rows.first, rows.last, LANES):
        g = g0 + tl.arange(0, LANES)
        row = of_kind(load_rows(rows.ptr, g, g < rows.last, LANES), g, g < rows.last, rows.weights_ptr, "region")
        edges = edges_of(row.cx, row.cy, row.w, row.h, width, height)
        left = row_valid(row, rows.b, rows.b + 1, classes, limit) & meets(edges, across, along)
        lowest = tl.min(tl.where(left, g, LAST), axis=0)
        while lowest < LAST:
            at = rows.ptr + lowest.to(tl.int64) * 6
            one = edges_of(tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), width, height)
            found = found | (mask & within(one, x, y))
            left = left & (g > lowest)
            lowest = tl.min(tl.where(left, g, LAST), axis=0)
    return found
