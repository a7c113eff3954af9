"""Box terms on raw logits, one axis at a time.

Contract: ``offset(a, b, ta, tb, scale) -> loss, d_a, d_b``. ``a`` and ``b`` are the raw logits of centre and size,
``ta`` the target of the scaled sigmoid (the true centre from the cell's origin, in cells), ``tb`` that of b,
log(true size / anchor); ``scale`` is the grid sensitivity. Smooth, no ties.
"""

import triton
import triton.language as tl  # noqa: F401  the interpreter asks for it

from .decode import scaled_sigmoid
from .label import bce


@triton.jit
def mse(a, b, ta, tb, scale):
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    v, dv = scaled_sigmoid(a, scale)
    return (v - ta) * (v - ta) + (b - tb) * (b - tb), 2.0 * (v - ta) * dv, 2.0 * (b - tb)


@triton.jit
def bce_mse(a, b, ta, tb, scale):
    """scale * BCE(sigmoid(a), (ta + (scale - 1) / 2) / scale) + (b - tb)^2 / 2: darknet's delta is its gradient."""
    loss, d_a = bce(a, (ta + 0.5 * (scale - 1.0)) / scale, ())
    return scale * loss + 0.5 * (b - tb) * (b - tb), scale * d_a, b - tb
