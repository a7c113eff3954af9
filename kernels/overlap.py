"""The overlap of two boxes, wherever a decision hangs on it: matching, ignoring, suppression."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Corners(NamedTuple):
    """Boxes by their edges, in any one unit."""

    x1: Any
    y1: Any
    x2: Any
    y2: Any


@triton.jit
def intersection(p, q):
    """The area that two boxes share, 0 where they do not meet."""
    ow = tl.minimum(p.x2, q.x2) - tl.maximum(p.x1, q.x1)
    oh = tl.minimum(p.y2, q.y2) - tl.maximum(p.y1, q.y1)
    return tl.maximum(ow, 0.0) * tl.maximum(oh, 0.0)


@triton.jit
def iou(p, q, p_area, q_area, QUOTIENT: tl.constexpr):
    """IoU of two boxes of these areas. The areas are those that the peer takes: of a box given by centre and size they
    are not those of its corners. ``QUOTIENT(a, b)`` is the division: :func:`~.primitives.divide` and its like.
    """
    shared = intersection(p, q)
    return QUOTIENT(shared, p_area + q_area - shared)
