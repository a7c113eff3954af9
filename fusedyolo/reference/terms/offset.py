"""Box terms on raw outputs, one axis at a time: the twin of ``kernels/terms/offset.py``.

``offset(a, b, true_a, true_b, scale) -> loss`` of the raw outputs a of the centre and b of the size. :func:`mse` and
:func:`bce_mse` take logits: ``true_a`` is the target of the scaled sigmoid (true centre from the cell's origin, in
cells), ``true_b`` that of b, log(true size / anchor), ``scale`` the grid sensitivity; they are smooth. :func:`l1` and
:func:`smooth_l1` take the targets of a and b themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from ..primitives import distance
from .decode import scaled_sigmoid
from .label import bce


def mse(a: Tensor, b: Tensor, true_a: Tensor, true_b: Tensor, scale: float) -> Tensor:
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    return (scaled_sigmoid(a, scale) - true_a) ** 2 + (b - true_b) ** 2


def bce_mse(a: Tensor, b: Tensor, true_a: Tensor, true_b: Tensor, scale: float) -> Tensor:
    """scale BCE(sigmoid(a), (true_a + (scale - 1) / 2) / scale) + (b - true_b)^2 / 2; darknet's delta descends it."""
    return scale * bce(a, (true_a + (scale - 1) / 2) / scale) + (b - true_b) ** 2 / 2


def l1(a: Tensor, b: Tensor, true_a: Tensor, true_b: Tensor, scale: float) -> Tensor:
    """Absolute differences of raw a and b; true_a and true_b are their targets themselves."""
    return distance(a - true_a) + distance(b - true_b)


def smooth_l1(a: Tensor, b: Tensor, true_a: Tensor, true_b: Tensor, scale: float) -> Tensor:
    """The same, quadratic below ``scale`` (Girshick 2015; torch's beta)."""
    axis = ((a, true_a), (b, true_b))
    return torch.stack([smooth_l1_loss(raw, true, reduction="none", beta=scale) for raw, true in axis]).sum(0)
