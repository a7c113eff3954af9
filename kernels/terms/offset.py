"""Box terms on raw outputs, one axis at a time.

Contract: ``offset(a, b, ta, tb, scale) -> loss, d_a, d_b``. ``a`` and ``b`` are the raw outputs for centre and size.
:func:`mse` and :func:`bce_mse` take logits: ``ta`` is the target of the scaled sigmoid (the true centre from the cell's
origin, in cells), ``tb`` that of b, log(true size / anchor), ``scale`` the grid sensitivity; they are smooth.
:func:`l1` and :func:`smooth_l1` take the targets of a and b themselves; where they have a kink, the slope is 0.
"""

import triton
import triton.language as tl

from ..primitives import safe_div, sign
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


@triton.jit
def _smooth(d, beta):
    """|d| - beta / 2, below beta d^2 / (2 beta); and its derivative."""
    small = tl.abs(d) < beta
    return tl.where(small, 0.5 * d * safe_div(d, beta), tl.abs(d) - 0.5 * beta), tl.where(
        small, safe_div(d, beta), sign(d)
    )


@triton.jit
def l1(a, b, ta, tb, scale):
    """Absolute differences."""
    return tl.abs(a - ta) + tl.abs(b - tb), sign(a - ta), sign(b - tb)


@triton.jit
def smooth_l1(a, b, ta, tb, scale):
    """Absolute differences, quadratic below ``scale`` (Girshick 2015; torch's beta)."""
    loss_a, d_a = _smooth(a - ta, scale)
    loss_b, d_b = _smooth(b - tb, scale)
    return loss_a + loss_b, d_a, d_b
