"""The terms: twins of ``kernels/terms`` under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def _div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with no gradient where b is 0; the inner where keeps NaN out of the backward."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def _constants(values: Sequence[float], like: Tensor) -> Tensor:
    """[len(values)] of the dtype and device of ``like``, by fill: torch.tensor(..., device="cuda") would wait."""
    return torch.stack([like.new_full((), value) for value in values])


# ---- label terms: (x, t, args) -> loss, elementwise; logit x, target t in [0, 1] of one dtype. Smooth, no ties.


def bce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-t log(p) - (1 - t) log(1 - p), p = sigmoid(x). The derivative is sigmoid(x) - t for every x, 0 included.

    PyTorch's own, (1 - t) x - logsigmoid(x), has no digit left in float32 for a background logit of -17.
    """
    return -(t * logsigmoid(x) + (1 - t) * logsigmoid(-x))


def focal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t q^gamma BCE, q = 1 - p_t, args = (alpha, gamma); RetinaNet eq. 5, soft targets as torchvision.

    A negative alpha means no factor. q is summed from products, not from 1 - p_t, so that it keeps its digits where the
    prediction is right. Where it underflows, so does the BCE, and the loss is 0: the derivative of q^gamma is inf * 0
    there for gamma < 1.
    """
    alpha, gamma = args
    q = x.sigmoid() * (1 - t) + (-x).sigmoid() * t
    zero = q < torch.finfo(q.dtype).tiny
    modulator = torch.where(zero, 0.0, torch.where(zero, 1.0, q) ** gamma)
    if alpha >= 0:
        modulator = modulator * (alpha * t + (1 - alpha) * (1 - t))
    return modulator * bce(x, t)


# ---- box terms: (p, g, args) -> loss [...]; predicted and true boxes [..., 4], x1 y1 x2 y2, in one unit of length.
# args = (eps, eps_alpha): eps joins each denominator, eps_alpha that of CIoU's alpha. Gradients flow to both boxes.
# Rules of torchvision: edges that coincide share the gradient half and half (torch.maximum, torch.minimum); boxes that
# only touch do not intersect, and their intersection has no gradient. A quotient by 0 is 0.


class _Pair(NamedTuple):
    """Lengths [..., 2] of a pair of boxes, in units of the longer side of the enclosing box."""

    p: Tensor
    g: Tensor
    overlap: Tensor  # both entries 0 where the boxes do not meet
    enclosing: Tensor
    distance: Tensor  # between the centres
    eps: Tensor | float  # in that unit, squared


def _pair(p: Tensor, g: Tensor, eps: float) -> _Pair:
    """The family is invariant under scaling; without it an area of 1e28 pixels by 1e28 leaves float32."""
    p1, p2, g1, g2 = p[..., :2], p[..., 2:], g[..., :2], g[..., 2:]
    overlap = torch.minimum(p2, g2) - torch.maximum(p1, g1)
    overlap = torch.where((overlap > 0).all(-1, keepdim=True), overlap, 0.0)
    enclosing = torch.maximum(p2, g2) - torch.minimum(p1, g1)
    unit = enclosing.detach().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    distance = (g1 + g2) / 2 - (p1 + p2) / 2
    eps_scaled = eps / unit[..., 0] ** 2 if eps else 0.0
    return _Pair((p2 - p1) / unit, (g2 - g1) / unit, overlap / unit, enclosing / unit, distance / unit, eps_scaled)


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _iou(inter: Tensor, p: Tensor, g: Tensor, eps: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU = inter / (union + eps), and the union, from three areas."""
    union = p + g - inter
    return _div(inter, union + eps), union


def iou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - IoU."""
    b = _pair(p, g, args[0])
    return 1 - _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)[0]


def giou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - (IoU - (C - U) / (C + eps)), C the area of the enclosing box (Rezatofighi et al. 2019)."""
    b = _pair(p, g, args[0])
    value, union = _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)
    rest = _div(_area(b.enclosing) - union, _area(b.enclosing) + b.eps)
    return 1 - (value - rest)


def diou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - IoU + rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal (Zheng et al. 2020)."""
    b = _pair(p, g, args[0])
    spread = _div((b.distance**2).sum(-1), (b.enclosing**2).sum(-1) + b.eps)
    return 1 - _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)[0] + spread


def ciou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """DIoU + alpha v, v = 4/pi^2 (atan(wg/hg) - atan(wp/hp))^2, alpha = v / (1 - IoU + v + eps_alpha) held constant."""
    b = _pair(p, g, args[0])
    v = 4 / math.pi**2 * (_angle(b.g) - _angle(b.p)) ** 2
    alpha = _div(v, iou(p, g, args) + v + args[1]).detach()
    return diou(p, g, args) + alpha * v


def _angle(sides: Tensor) -> Tensor:
    """atan(w / h), pi/2 at h = 0 and 0 at w = h = 0. Smaller side over larger, so that no quotient overflows."""
    w, h = sides.unbind(-1)
    wide = w.abs() > h.abs()
    a = _div(torch.where(wide, h, w), torch.where(wide, w, h)).atan()
    complement = torch.where((w < 0) != (h < 0), -math.pi / 2 - a, math.pi / 2 - a)
    return torch.where(wide, complement, a)


# ---- offset terms: (a, b, ta, tb, scale) -> loss, one axis: raw logits a of the centre and b of the size, target ta of
# the scaled sigmoid (true centre from the cell's origin, in cells), target tb of b, log(true size / anchor); scale is
# the grid sensitivity. Smooth, no ties.


def _scaled_sigmoid(a: Tensor, scale: float) -> Tensor:
    """scale sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity")."""
    return scale * a.sigmoid() - (scale - 1) / 2


def mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    return (_scaled_sigmoid(a, scale) - ta) ** 2 + (b - tb) ** 2


def bce_mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """scale BCE(sigmoid(a), (ta + (scale - 1) / 2) / scale) + (b - tb)^2 / 2, which darknet's mse delta descends."""
    return scale * bce(a, (ta + (scale - 1) / 2) / scale) + (b - tb) ** 2 / 2


# ---- decoding: (a, b, anchor, stride, scale) -> centre from the cell's origin, size, one axis, in the unit of anchor
# and stride; a, b, scale as above.


def exp(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv2 to YOLOv4: size anchor e^b. b is held within [-60, 60], the gradient passes as if it were not."""
    passed = torch.where(b.isinf(), 0.0, b)  # inf - inf would be NaN
    held = b.detach().clamp(-60, 60) + (passed - passed.detach())
    return _scaled_sigmoid(a, scale) * stride, anchor * held.exp()


def sigmoid_square(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv5 and Scaled-YOLOv4: size anchor (2 sigmoid(b))^2."""
    return _scaled_sigmoid(a, scale) * stride, anchor * (2 * b.sigmoid()) ** 2


Term = Callable[..., Tensor]
LABEL_TERMS: dict[str, Term] = {"bce": bce, "focal": focal}
BOX_TERMS: dict[str, Term] = {"iou": iou, "giou": giou, "diou": diou, "ciou": ciou}
OFFSET_TERMS: dict[str, Term] = {"mse": mse, "bce_mse": bce_mse}
DECODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"exp": exp, "sigmoid_square": sigmoid_square}
