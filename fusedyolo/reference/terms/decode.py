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

from ..primitives import held


def scaled_sigmoid(a: Tensor, scale: float) -> Tensor:
    """scale sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity")."""
    return scale * a.sigmoid() - (scale - 1) / 2


FARTHEST = 1e8
"""What distances in anchors, or strides, are held within either way: no area made of them leaves float32."""


def exp(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv2 to YOLOv4: size anchor e^b. b is held within [-60, 60], the gradient passes as if it were not."""
    return scaled_sigmoid(a, scale) * stride, anchor * held(b, -60, 60).exp()


def sigmoid_square(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv5 and Scaled-YOLOv4: size anchor (2 sigmoid(b))^2. b is held above -30 as in :func:`exp`."""
    return scaled_sigmoid(a, scale) * stride, anchor * (2 * held(b, -30).sigmoid()) ** 2


LARGEST_DELTA = math.log(1000 / 16)  # of a size; torchvision's


def delta(a: Tensor, b: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """RetinaNet, SSD: an anchor's centre moved by a strides, its size times e^(scale b), held below 1000 / 16.

    a is held within :data:`FARTHEST`, scale b above -60 as in :func:`exp`. A NaN passes, with its gradient, where a
    clamp has none.
    """
    z = b * scale
    z = held(torch.where(z > LARGEST_DELTA, LARGEST_DELTA, z), -60)
    return held(a, -FARTHEST, FARTHEST) * stride, anchor * z.exp()


def ltrb(a: Tensor, b: Tensor, anchor: Tensor, stride: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """FCOS: a anchors before the anchor's centre and b behind it, both held within :data:`FARTHEST`."""
    a, b = held(a, -FARTHEST, FARTHEST), held(b, -FARTHEST, FARTHEST)
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
