"""Boxes as four numbers that follow each other in memory, for accesses of all four."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .overlap import Corners


class Pair(NamedTuple):
    """A number of each axis."""

    x: Any
    y: Any


class Raw(NamedTuple):
    """The four numbers that say a box: x, y, w, h; or left, upper, right, lower. Or derivatives by these."""

    x: Any
    y: Any
    w: Any
    h: Any


@triton.jit
def apart(tile):
    """The four columns of [N, 4]."""
    even, odd = tl.split(tl.reshape(tile, (tile.shape[0], 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return zero, one, two, three


@triton.jit
def together(zero, one, two, three):
    """[N, 4] of four columns."""
    return tl.reshape(tl.join(tl.join(zero, two), tl.join(one, three)), (zero.shape[0], 4))


@triton.jit
def load_corners(ptr, at, mask):
    """Corners of some boxes, which ``at`` counts, in one access; 0 where masked out."""
    corner = tl.arange(0, 4)[None, :]
    tile = tl.load(ptr + at[:, None] * 4 + corner, mask=mask[:, None], other=0.0)
    x1, y1, x2, y2 = apart(tile)
    return Corners(x1, y1, x2, y2)


@triton.jit
def store_corners(ptr, at, box, mask):
    """Stores what :func:`load_corners` loads."""
    tile = together(box.x1, box.y1, box.x2, box.y2)
    tl.store(ptr + at[:, None] * 4 + tl.arange(0, 4)[None, :], tile, mask=mask[:, None])
