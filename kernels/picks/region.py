"""Which cells an object may want: a rectangle of cells of each level."""

import triton
import triton.language as tl

from ..primitives import plain
from .site import Cells, divided, stride_of

BEYOND: tl.constexpr = tl.constexpr(1.01)  # the reference's


@triton.jit
def reach(one, stride, numbers, SPEC: tl.constexpr):
    """How far the middles of cells may be from an object that wants them, on both axes, in pixels."""
    if SPEC.REGION == "range":
        far = (SPEC.REG_MAX - BEYOND) * stride
        x = tl.minimum(0.5 * one.width, far - 0.5 * one.width)
        y = tl.minimum(0.5 * one.height, far - 0.5 * one.height)
    elif SPEC.ASSIGNER == "aligned":
        small = tl.cast(numbers.small, SPEC.ACC)
        x = 0.5 * tl.where(one.width < small, small, one.width)
        y = 0.5 * tl.where(one.height < small, small, one.height)
    else:
        x = tl.cast(numbers.radius, SPEC.ACC) * stride
        y = x
    return x, y


@triton.jit
def _span(centre, far, stride, count):
    """The first of ``count`` cells whose middle may be so far from a centre, and how many there are."""
    inverse = 1.0 / stride
    first = tl.maximum(tl.ceil((centre - far) * inverse - 0.625), 0.0)  # a cell's half and a margin
    last = tl.minimum(tl.floor((centre + far) * inverse - 0.375), tl.cast(count - 1, centre.dtype))
    number = tl.maximum(last - first + 1.0, 0.0)
    return tl.minimum(first, tl.cast(count, centre.dtype)).to(tl.int32), number.to(tl.int32)


@triton.jit
def _rectangle(one, problem, LEVEL: tl.constexpr, SPEC: tl.constexpr):
    """The first column and line of a level that an object reaches, and how many of each."""
    levels = problem.levels
    stride = tl.cast(levels.strides[LEVEL], SPEC.ACC)
    far_x, far_y = reach(one, stride, problem.numbers, SPEC)
    x, columns = _span(one.cx * problem.frame.width, far_x, stride, plain(levels.widths[LEVEL]))
    y, lines = _span(one.cy * problem.frame.height, far_y, stride, plain(levels.heights[LEVEL]))
    return x, columns, y, lines


@triton.jit
def reached(one, problem, SPEC: tl.constexpr):
    """How many cells an object reaches, on all levels."""
    total = plain(problem.levels.widths[0]) * 0
    for i in tl.static_range(len(problem.levels.widths)):
        _x, columns, _y, lines = _rectangle(one, problem, i, SPEC)
        total += columns * lines
    return total


@triton.jit
def reached_at_most(width, height, numbers):
    """No fewer than :func:`reached` of a box of so many pixels, by three numbers: what a cell's area, and its side, are
    of a pixel's, and a margin, see :func:`_span`; all levels taken together.
    """
    x = tl.where(width < numbers.small, numbers.small, width)
    y = tl.where(height < numbers.small, numbers.small, height)
    return x * y * numbers.reach[0] + (x + y) * numbers.reach[1] + numbers.reach[2]


@triton.jit
def cells_reached(one, i, problem, SPEC: tl.constexpr):
    """Those cells, by their place among them: level by level, line by line."""
    levels = problem.levels
    level = i * 0
    local = i
    width = level + 1
    first_x = level
    first_y = level
    first_n = level
    W = level
    start = plain(levels.widths[0]) * 0
    for k in tl.static_range(len(levels.widths)):
        x, columns, y, lines = _rectangle(one, problem, k, SPEC)
        here = (i >= start) & (columns * lines > 0)
        level = tl.where(here, k, level)
        local = tl.where(here, i - start, local)
        width = tl.where(here, columns, width)
        first_x = tl.where(here, x, first_x)
        first_y = tl.where(here, y, first_y)
        first_n = tl.where(here, plain(levels.begins[k]), first_n)
        W = tl.where(here, plain(levels.widths[k]), W)
        start += columns * lines
    line = divided(local, width)
    column = first_x + local - line * width
    line += first_y
    return Cells(first_n + line * W + column, level, line, column, stride_of(level, levels, SPEC))
