"""Decoding, one axis at a time: raw logits to a box's centre and size.

Contract: ``axis(a, b, anchor, stride, scale) -> (centre, size), (dc_da, dc_db, dw_da, dw_db)``. ``a`` and ``b`` are the
raw logits of centre and size; ``centre`` is measured from the cell's origin; ``anchor``, ``stride`` and the results
share one unit of length; ``scale`` is the grid sensitivity. x and y are two calls, so they cannot diverge.
"""

import triton
import triton.language as tl

from ..primitives import logistic


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
    w = anchor * tl.exp(tl.minimum(tl.maximum(b, -60.0), 60.0))
    return (v * stride, w), (dv * stride, 0.0, 0.0, w)


@triton.jit
def sigmoid_square(a, b, anchor, stride, scale):
    """YOLOv5 and Scaled-YOLOv4: size anchor * (2 sigmoid(b))^2."""
    v, dv = scaled_sigmoid(a, scale)
    p, q, _e = logistic(b)
    w = anchor * (4.0 * p * p)
    return (v * stride, w), (dv * stride, 0.0, 0.0, 2.0 * w * q)
