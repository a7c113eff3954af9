"""Tiles, and where in memory their numbers lie: views of a level of predictions, with accesses as wide as may be.

Layouts. "planes": all cells of a level follow each other in memory; "channels": the numbers of a cell do; else
"strided". No kernel is compiled for the numbers of a size: whether all runs begin where an access of 16 bytes may is
asked at run time.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import Strides, integer_of, pointer_of, strides_of
from ..primitives import plain


class View(NamedTuple):
    """One of box, objectness and class of a level: where the image of a program begins, and strides."""

    ptr: Any
    start: Any
    by: Any


class Tile(NamedTuple):
    """CELLS consecutive cells of a level of an image."""

    b: Any
    N: Any  # cells of an image
    level: Any
    first: Any  # how many cells of an image come before those of the level
    place: Any  # of the tile among those of its image
    cells: Any  # of the level
    mask: Any
    W: Any
    HW: Any


@triton.constexpr_function
def entry_of(items, branch):
    """What a tuple of constants says of a branch: as an index would, which Triton has of numbers alone."""
    return items[branch]


@triton.jit
def is_of_branch(pid, programs, BRANCHES: tl.constexpr):
    """Whether a program, counted from the first one of a branch, is of this one; each of BRANCHES has as many."""
    here = pid == pid
    if BRANCHES > 1:
        here = (pid >= 0) & (pid < programs)
    return here


@triton.jit
def tiles_of(levels, CELLS: tl.constexpr):
    """Tiles of an image."""
    before = plain(levels.begins[0])
    tiles = before
    for i in tl.static_range(len(levels.widths)):
        end = plain(levels.begins[i + 1])
        tiles += tl.cdiv(end - before, CELLS)
        before = end
    return tiles


@triton.jit
def tile_of(index, levels, B, CELLS: tl.constexpr):
    """The tile of this number: levels one after the other, in each the tiles of image by image."""
    level = index * 0
    local = index
    first = index * 0
    place = index * 0
    begin = index * 0
    before = index * 0
    tiles = index * 0
    for i in tl.static_range(len(levels.widths)):
        end = plain(levels.begins[i + 1])
        here = index >= begin
        level = tl.where(here, i, level)
        local = tl.where(here, index - begin, local)
        first = tl.where(here, before, first)
        place = tl.where(here, tiles, place)
        count = tl.cdiv(end - before, CELLS)
        begin += B * count
        tiles += count
        before = end
    W = integer_of(levels.widths, level)
    HW = W * integer_of(levels.heights, level)
    own = tl.cdiv(HW, CELLS)
    b = local // own
    local -= b * own
    cells = local * CELLS + tl.arange(0, CELLS)
    return Tile(b, before, level, first, place + local, cells, cells < HW, W, HW)


@triton.jit
def view_of(part, level):
    """Box, objectness or class of a level known at run time."""
    return View(pointer_of(part.ptrs, level), integer_of(part.starts, level), strides_of(part.by, level))


@triton.jit
def is_wide(view, tile, LAYOUT: tl.constexpr):
    """Whether all runs of a level begin at multiples of 16 bytes, as the widest accesses need."""
    UNIT: tl.constexpr = 128 // view.ptr.dtype.element_ty.primitive_bitwidth
    by = view.by
    if LAYOUT == "planes":
        wide = (tile.HW % UNIT == 0) & (by.image % UNIT == 0) & (by.channel % UNIT == 0)
    else:
        wide = (by.image % UNIT == 0) & (by.column % UNIT == 0)
    return wide & (view.start % UNIT == 0)


@triton.jit
def as_wide(view, LAYOUT: tl.constexpr):
    """A view of which :func:`is_wide` is so, in a form that tells the compiler."""
    UNIT: tl.constexpr = 128 // view.ptr.dtype.element_ty.primitive_bitwidth
    by = view.by
    if LAYOUT == "planes":
        by = Strides(by.image // UNIT * UNIT, by.row, by.column, 0, by.channel // UNIT * UNIT)
    else:
        by = Strides(by.image // UNIT * UNIT, by.row, by.column // UNIT * UNIT, 0, 1)
    return View(view.ptr, view.start // UNIT * UNIT, by)


@triton.jit
def wide_mask(view, tile, LAYOUT: tl.constexpr):
    """The mask of a tile, likewise."""
    UNIT: tl.constexpr = 128 // view.ptr.dtype.element_ty.primitive_bitwidth
    if LAYOUT == "planes":
        mask = tile.cells < tile.HW // UNIT * UNIT
    else:
        mask = tile.mask
    return mask


@triton.jit
def cells_in(view, cells, tile, LAYOUT: tl.constexpr):
    """Pointers to the first channel of some cells."""
    by = view.by
    at = view.ptr + (tile.b.to(tl.int64) * by.image + view.start)
    if LAYOUT == "planes":
        at = at + cells
    elif LAYOUT == "channels":
        at = at + cells * by.column
    else:
        at = at + (cells // tile.W) * by.row + (cells % tile.W) * by.column
    return at


@triton.jit
def step_of(view, LAYOUT: tl.constexpr):
    """Elements from channel to channel."""
    step = view.by.channel
    if LAYOUT == "channels":
        step = 1
    return step
