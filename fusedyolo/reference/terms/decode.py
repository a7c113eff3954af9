"""Decoding, one axis at a time: the twin of ``kernels/terms/decode.py``; and its inverse.

``decode(a, b, anchor, stride, scale) -> centre, size`` of the raw outputs, of grids the logits a of the centre and b of
the size. The centre is measured from the cell's origin, or from that of an anchor that has a place, in the unit of
anchor and stride; ``scale`` is the grid sensitivity, or what else :func:`delta` says.

``encode_NAME(centre, size, anchor, stride, scale) -> a, b`` are the outputs that NAME decodes to a centre and a size;
where none does (a centre beyond what the sigmoid reaches, say), the nearest within 1e-6 of its range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def scaled_sigmoid(a: Tensor, scale: float) -> Tensor:
    """scale sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity")."""
    return scale * a.sigmoid() - (scale - 1) / 2


def _held(b: Tensor, low: float, high: float = math.inf) -> Tensor:
    """b within [low, high], the gradient passes as if it were not: there sizes keep what a gradient by them takes."""
    passed = torch.where(b.isinf(), 0.0, b)  # inf - inf would be NaN
    return b.detach().clamp(low, high) + (passed - passed.detach())


def exp(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv2 to YOLOv4: size anchor e^b. b is held within [-60, 60], the gradient passes as if it were not."""
    return scaled_sigmoid(a, scale) * stride, anchor * _held(b, -60, 60).exp()


def sigmoid_square(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv5 and Scaled-YOLOv4: size anchor (2 sigmoid(b))^2. b is held above -30 as in :func:`exp`."""
    return scaled_sigmoid(a, scale) * stride, anchor * (2 * _held(b, -30).sigmoid()) ** 2


LARGEST_DELTA = math.log(1000 / 16)  # of a size; torchvision's


def delta(a: Tensor, b: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """RetinaNet, SSD: an anchor's centre moved by a strides, its size times e^(scale b), held below 1000 / 16.

    Below -60 scale b is held as in :func:`exp`. A NaN passes, with its gradient, where a clamp has none.
    """
    z = b * scale
    return a * stride, anchor * _held(torch.where(z > LARGEST_DELTA, LARGEST_DELTA, z), -60).exp()


def ltrb(a: Tensor, b: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """FCOS: a anchors before the anchor's centre and b behind it."""
    return (b - a) * anchor / 2, (a + b) * anchor


def _logit(p: Tensor) -> Tensor:
    return p.clamp(1e-6, 1 - 1e-6).logit()


def encode_exp(centre: Tensor, size: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`exp`."""
    return _logit((centre / stride + (scale - 1) / 2) / scale), (size / anchor).log()


def encode_sigmoid_square(
    centre: Tensor, size: Tensor, anchor: Tensor, stride: float, scale: float
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`sigmoid_square`."""
    return _logit((centre / stride + (scale - 1) / 2) / scale), _logit((size / anchor).sqrt() / 2)


def encode_delta(centre: Tensor, size: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`delta`."""
    return centre / stride, (size / anchor).log() / scale


def encode_ltrb(centre: Tensor, size: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`ltrb`."""
    return (size / 2 - centre) / anchor, (size / 2 + centre) / anchor
