"""Decoding, one axis at a time: raw logits to a box's centre and size.

Contract: ``decode(a, b, anchor, stride, scale) -> Span, Jacobian``. ``a`` and ``b`` are the raw outputs, of grids the
logits of centre and size; the centre is measured from the cell's origin, or from the centre of an anchor that has a
place; ``anchor``, ``stride`` and the results share one unit of length; ``scale`` is the grid sensitivity, or what else
:func:`delta` says. x and y are two calls, so they cannot diverge. :func:`chain` leads back to a and b.
"""

import triton
import triton.language as tl

from ..primitives import larger, logistic, near, smaller
from .records import Jacobian, Span


@triton.jit
def chain(by_centre, by_size, jacobian):
    """The chain rule of every driver: derivatives by a and b from those by centre and size."""
    by_a = by_centre * jacobian.centre_by_a + by_size * jacobian.size_by_a
    by_b = by_centre * jacobian.centre_by_b + by_size * jacobian.size_by_b
    return by_a, by_b


@triton.jit
def scaled_sigmoid(a, scale):
    """scale * sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity"), and its derivative."""
    p, q, _e = logistic(a)
    return scale * p - 0.5 * (scale - 1.0), scale * p * q


@triton.jit
def exp(a, b, anchor, stride, scale):
    """YOLOv2 to YOLOv4: size anchor * e^b.

    b is held within [-60, 60], where float32 neither overflows nor vanishes in the products that follow; beyond, the
    derivative goes on as that of the held value, which is the limit of every IoU term's.
    """
    v, dv = scaled_sigmoid(a, scale)
    w = anchor * tl.exp(smaller(larger(b, -60.0), 60.0))
    return Span(v * stride, w), Jacobian(dv * stride, 0.0, 0.0, w)


@triton.jit
def sigmoid_square(a, b, anchor, stride, scale):
    """YOLOv5 and Scaled-YOLOv4: size anchor * (2 sigmoid(b))^2; b held above -30, the derivative as :func:`exp`'s."""
    v, dv = scaled_sigmoid(a, scale)
    p, q, _e = logistic(larger(b, -30.0))
    w = anchor * (4.0 * p * p)
    return Span(v * stride, w), Jacobian(dv * stride, 0.0, 0.0, 2.0 * w * q)


@triton.jit
def delta(a, b, anchor, stride, scale):
    """RetinaNet, SSD: an anchor's centre moved by a strides, its size times e^(scale b).

    a is held as ``near`` says, scale b below ln(1000 / 16), with no derivative beyond, and above -60, with the
    derivative of :func:`exp`.
    """
    z = b * scale
    limit = tl.full([], 4.135166556742356, tl.float64).to(b.dtype)  # a constant alone would be float32
    w = anchor * tl.exp(larger(smaller(z, limit), -60.0))
    return Span(near(a) * stride, w), Jacobian(stride, 0.0, 0.0, tl.where(z <= limit, scale * w, 0.0))


@triton.jit
def ltrb(a, b, anchor, stride, scale):
    """FCOS: a anchors before the anchor's centre and b behind it, held as ``near`` says."""
    a = near(a)
    b = near(b)
    return Span(0.5 * anchor * (b - a), anchor * (a + b)), Jacobian(-0.5 * anchor, 0.5 * anchor, anchor, anchor)
