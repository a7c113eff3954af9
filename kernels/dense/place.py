"""Where the rows that anchors have taken lie, seen from these."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..boxes import Pair
from ..primitives import safe_div, scaled_less


class Relative(NamedTuple):
    """Sides of anchors and, of their rows, the centre from theirs and the sides; see :func:`relative`."""

    sides: Pair
    shift: Pair
    true: Pair


@triton.jit
def relative(anchor, row, has, size, CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Anchors and their rows, sides of 1 where there is none.

    Corners of a row are compared with those of the anchor, its centre with the middle of that, and its size is taken as
    it is: of nearby numbers the differences keep their digits, while a size made of corners would not.
    """
    _image, _label, c0, c1, c2, c3 = row
    if CORNERS:
        cx = 0.5 * ((c0.to(ACC) - anchor.x1) + (c2.to(ACC) - anchor.x2))
        cy = 0.5 * ((c1.to(ACC) - anchor.y1) + (c3.to(ACC) - anchor.y2))
        gw = c2.to(ACC) - c0.to(ACC)
        gh = c3.to(ACC) - c1.to(ACC)
    else:
        width = tl.cast(size[0], ACC)
        height = tl.cast(size[1], ACC)
        cx = scaled_less(c0, width, anchor.x1, ACC) - 0.5 * (anchor.x2 - anchor.x1)
        cy = scaled_less(c1, height, anchor.y1, ACC) - 0.5 * (anchor.y2 - anchor.y1)
        gw = c2.to(ACC) * width
        gh = c3.to(ACC) * height
    sides = Pair(tl.where(has, anchor.x2 - anchor.x1, 1.0), tl.where(has, anchor.y2 - anchor.y1, 1.0))
    return Relative(sides, Pair(cx, cy), Pair(tl.where(has, gw, 1.0), tl.where(has, gh, 1.0)))


@triton.jit
def centreness(shift, true):
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of anchors' centres in boxes that hold them."""
    dx = tl.abs(shift.x)
    dy = tl.abs(shift.y)
    hx = 0.5 * true.x
    hy = 0.5 * true.y
    quotient = safe_div(hx - dx, hx + dx) * safe_div(hy - dy, hy + dy)
    return tl.sqrt(tl.maximum(quotient, 0.0))
