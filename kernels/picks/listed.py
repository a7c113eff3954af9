"""What a program of the loss owns: a tile, and those of its cells that have a row, listed; and zeros of it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .views import as_wide, cells_in, is_wide, step_of, tile_of, wide_mask


class Site(NamedTuple):
    """The tile of a program, and which rows its cells have; ``first`` is the index of the level's first cell among all
    of the batch."""

    tile: Any
    first: Any
    row: Any
    has: Any


class Picks(NamedTuple):
    """Some cells that have a row: where they are, and their rows."""

    cells: Any
    index: Any  # among all of the batch
    mask: Any
    row: Any


@triton.jit
def site_of(index, levels, B, M, row_ptr, CELLS: tl.constexpr):
    """The tile of this number."""
    tile = tile_of(index, levels, B, CELLS)
    first = tile.b * tile.N + tile.first
    row = tl.load(row_ptr + first + tile.cells, mask=tile.mask, other=M)
    return Site(tile, first, row, row < M)


@triton.jit
def keep_of(mask, k, last, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Which channels k of cells are there, of WIDTH in all; ``k < last`` is not asked where it must be so."""
    keep = mask[None, :]
    if WIDTH % PLANES != 0:
        keep = keep & (k < last)
    return keep


@triton.jit
def list_cells(site, list_ptr):
    """Leaves the cells of the tile that have a row, in their order, and returns how many; readable after a barrier."""
    has = site.has.to(tl.int32)
    tl.store(list_ptr + tl.cumsum(has, axis=0) - 1, site.tile.cells, mask=site.has)
    return tl.sum(has, axis=0)


@triton.jit
def listed(site, list_ptr, i0, count, row_ptr, PICKS: tl.constexpr):
    """Those from the i0-th on."""
    i = i0 + tl.arange(0, PICKS)
    mask = i < count
    cells = tl.load(list_ptr + i, mask=mask, other=0)
    index = site.first + cells
    return Picks(cells, index, mask, tl.load(row_ptr + index, mask=mask, other=0))


@triton.jit
def _fill_with_zeros(view, site, mask, first, last, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    CELLS: tl.constexpr = SPEC.CELLS
    PLANES: tl.constexpr = SPEC.PLANES
    at = cells_in(view, site.tile.cells, site.tile, LAYOUT)
    nothing = tl.zeros([PLANES, CELLS], view.ptr.dtype.element_ty)
    for k0 in tl.range(first, last, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = keep_of(mask, k, last, WIDTH, PLANES)
        tl.store(at[None, :] + k * step_of(view, LAYOUT), nothing, mask=keep)


@triton.jit
def store_zeros(view, site, first, last, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Zeros in the channels from ``first`` to ``last`` of a tile, of WIDTH in all."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    if LAYOUT == "strided":
        _fill_with_zeros(view, site, site.tile.mask, first, last, WIDTH, SPEC)
    elif is_wide(view, site.tile, LAYOUT):
        wide = as_wide(view, LAYOUT)
        _fill_with_zeros(wide, site, wide_mask(view, site.tile, LAYOUT), first, last, WIDTH, SPEC)
    else:
        _fill_with_zeros(view, site, site.tile.mask, first, last, WIDTH, SPEC)
