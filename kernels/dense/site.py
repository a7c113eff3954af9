"""Where the anchors of a program lie: in a level, in its maps, among all anchors."""

import triton
import triton.language as tl

from ..levels import pointer_of, strides_of
from ..primitives import plain
from .records import Site, View


@triton.jit
def view_of(maps, level, WITH_GRAD: tl.constexpr):
    """The map of a level known at run time."""
    ptr = pointer_of(maps.ptrs, level)
    by = strides_of(maps.by, level)
    d_ptr = ptr  # not read
    d_by = by
    if WITH_GRAD:
        d_ptr = pointer_of(maps.d_ptrs, level)
        d_by = strides_of(maps.d_by, level)
    return View(ptr, by, d_ptr, d_by)


@triton.jit
def range_of(pid, programs, begin, level, local):
    """Level of a program and its number there, if it is one of so many a level from ``begin`` on; and their end."""
    for i in tl.static_range(len(programs)):
        here = (pid >= begin) & (pid < begin + plain(programs[i]))
        level = tl.where(here, i, level)
        local = tl.where(here, pid - begin, local)
        begin += plain(programs[i])
    return level, local, begin


@triton.jit
def tiles_of(level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """Of how many tiles of CELLS a level of an image is made."""
    if FLAT:
        tiles = tl.cdiv(level.anchors * level.cells, CELLS)
    else:
        tiles = level.anchors * tl.cdiv(level.cells, CELLS)
    return tiles


@triton.jit
def site_of(tile, level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """A tile of a level."""
    tiles = tiles_of(level, FLAT, CELLS)
    return site_in(tile // tiles, tile % tiles, level, FLAT, CELLS)


@triton.jit
def site_in(b, own, level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """A tile of an image's level. With FLAT the cells are all anchors of the level, one a cell."""
    lane = tl.arange(0, CELLS)
    if FLAT:
        a = own * 0
        cells = own * CELLS + lane
        mask = cells < level.anchors * level.cells
        n = level.start + cells
        position = n
    else:
        a = own // tl.cdiv(level.cells, CELLS)
        cells = (own % tl.cdiv(level.cells, CELLS)) * CELLS + lane
        mask = cells < level.cells
        n = level.start + cells * level.anchors + a
        position = level.start + a * level.cells + cells
    return Site(b, a, cells, n, position, mask)


@triton.jit
def cells_at(ptr, by, site, level, NEAR: tl.constexpr):
    """Pointers to the first channel of some cells of an anchor."""
    at = ptr + site.b.to(tl.int64) * by.image + site.a * by.anchor
    if NEAR:
        at = at + site.cells
    else:
        at = at + (site.cells // level.width) * by.row + (site.cells % level.width) * by.column
    return at


@triton.jit
def anchors_at(ptr, by, site, level, K: tl.constexpr, SPEC: tl.constexpr):
    """Pointers to the first of the K channels of some anchors, and elements from channel to channel."""
    NEAR: tl.constexpr = SPEC.NEAR
    if SPEC.FLAT:
        at = ptr + (site.b.to(tl.int64) * (level.anchors * level.cells) + site.cells) * K
        by_channel = 1
    else:
        at = cells_at(ptr, by, site, level, NEAR)
        by_channel = by.channel
    return at, by_channel
