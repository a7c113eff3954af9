"""Box terms on raw outputs, one axis at a time.

Contract: ``offset(a, b, true_a, true_b, scale) -> loss, d_a, d_b``. ``a`` and ``b`` are the raw outputs for centre and
size. :func:`mse` and :func:`bce_mse` take logits: ``true_a`` is the target of the scaled sigmoid (the true centre from
the cell's origin, in cells), ``true_b`` that of b, log(true size / anchor), ``scale`` the grid sensitivity; they are
smooth. :func:`l1` and :func:`smooth_l1` take the targets of a and b themselves; where they have a kink, the slope is 0.
"""

import triton
import triton.language as tl

from ..primitives import safe_div, sign
from .decode import scaled_sigmoid
from .label import bce


@triton.jit
def mse(a, b, true_a, true_b, scale):
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    v, dv = scaled_sigmoid(a, scale)
    return (v - true_a) * (v - true_a) + (b - true_b) * (b - true_b), 2.0 * (v - true_a) * dv, 2.0 * (b - true_b)


@triton.jit
def bce_mse(a, b, true_a, true_b, scale):
    """scale * BCE(sigmoid(a), (true_a + (scale - 1) / 2) / scale) + (b - true_b)^2 / 2; darknet's delta descends it."""
    loss, d_a = bce(a, (true_a + 0.5 * (scale - 1.0)) / scale, ())
    return scale * loss + 0.5 * (b - true_b) * (b - true_b), scale * d_a, b - true_b


@triton.jit
def _smooth(d, beta):
    """|d| - beta / 2, below beta d^2 / (2 beta); and its derivative."""
    small = tl.abs(d) < beta
    loss = tl.where(small, 0.5 * d * safe_div(d, beta), tl.abs(d) - 0.5 * beta)
    return loss, tl.where(small, safe_div(d, beta), sign(d))


@triton.jit
def l1(a, b, true_a, true_b, scale):
    """Absolute differences."""
    return tl.abs(a - true_a) + tl.abs(b - true_b), sign(a - true_a), sign(b - true_b)


@triton.jit
def smooth_l1(a, b, true_a, true_b, scale):
    """Absolute differences, quadratic below ``scale`` (Girshick 2015; torch's beta)."""
    loss_a, d_a = _smooth(a - true_a, scale)
    loss_b, d_b = _smooth(b - true_b, scale)
    return loss_a + loss_b, d_a, d_b
