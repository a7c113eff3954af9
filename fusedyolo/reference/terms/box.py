"""IoU terms on decoded boxes: the twin of ``kernels/terms/box.py``.

``box(p, g, args, extent) -> loss`` [...] of predicted and true boxes [..., 4], x1 y1 x2 y2, in one unit of length.
``args = (eps, eps_alpha)``: eps joins each denominator that is an area or squared length of boxes, eps_alpha that of
CIoU's alpha. ``args = (eps, eps_alpha, alpha, gamma)``: alpha-IoU (He et al. 2021) with a constant focal factor
(Focal-EIoU, Zhang et al. 2021), see :func:`_compose`. ``extent``, [2] or broadcastable, is the width and height of the
image, for :func:`mpdiou` alone.

Gradients flow to both boxes. Rules of torchvision: edges that coincide share the gradient half and half (torch.maximum,
torch.minimum); boxes that only touch do not intersect, and their intersection has no gradient. A quotient by 0 is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import checks
from ..overlap import area, iou_of_areas
from ..primitives import angle, constants, held, pow_pos, safe_div


def boxes_of_sizes(size: Tensor, true_size: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Predicted and true boxes [..., 4] of sizes [..., 2] and ``shift``, the true centre less the predicted one.

    From the centre of the prediction, so that a tiny box keeps its sides.
    """
    return torch.cat((-size / 2, size / 2), -1), torch.cat((shift - true_size / 2, shift + true_size / 2), -1)


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
    meet = (overlap > 0).unbind(-1)  # of two numbers operators are quicker than reductions
    overlap = torch.where((meet[0] & meet[1])[..., None], overlap, 0.0)
    enclosing = torch.maximum(p2, g2) - torch.minimum(p1, g1)
    unit = torch.maximum(*enclosing.detach().unbind(-1))[..., None]
    unit = torch.where(unit > 0, unit, 1.0)
    distance = (g1 + g2) / 2 - (p1 + p2) / 2
    eps_scaled = eps / unit[..., 0] ** 2 if eps else 0.0
    return _Pair((p2 - p1) / unit, (g2 - g1) / unit, overlap / unit, enclosing / unit, distance / unit, eps_scaled)


def _overlap_share(b: _Pair) -> Tensor:
    """IoU."""
    return iou_of_areas(area(b.overlap), area(b.p), area(b.g), b.eps)[0]


def similarity(p: Tensor, g: Tensor) -> Tensor:
    """IoU of boxes, 0 where both have no area."""
    return _overlap_share(_pair(p, g, 0.0))


def _compose(value: Tensor, penalties: Sequence[Tensor], args: Sequence[float]) -> Tensor:
    """1 - IoU + penalties, or IoU^gamma (1 - IoU^alpha + the sum of penalty^alpha) with IoU^gamma held constant.

    IoU^0 is 1 for every IoU. The slope of q^alpha at 0 is 0 for every alpha but 1: for alpha < 1 there is none.
    """
    alpha, gamma = args[2:] if len(args) > 2 else (1.0, 0.0)
    loss = 1 - (value if alpha == 1 else pow_pos(value, alpha))
    for q in penalties:
        loss = loss + (q if alpha == 1 else pow_pos(q, alpha))
    return loss * pow_pos(value.detach(), gamma) if gamma else loss


def iou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU."""
    return _compose(_overlap_share(_pair(p, g, args[0])), (), args)


def iou_log(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """-ln(max(IoU, floor)), ``args = (floor,)`` (Yu et al. 2016; FCOS)."""
    return -_overlap_share(_pair(p, g, 0.0)).clamp(min=args[0]).log()


def giou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + (C - U) / (C + eps), C the area of the enclosing box (Rezatofighi et al. 2019)."""
    b = _pair(p, g, args[0])
    value, union = iou_of_areas(area(b.overlap), area(b.p), area(b.g), b.eps)
    return _compose(value, [safe_div(area(b.enclosing) - union, area(b.enclosing) + b.eps)], args)


def _spread(b: _Pair) -> Tensor:
    """rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal."""
    (dx, dy), (cx, cy) = (b.distance**2).unbind(-1), (b.enclosing**2).unbind(-1)
    return safe_div(dx + dy, cx + cy + b.eps)


def diou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal (Zheng et al. 2020)."""
    b = _pair(p, g, args[0])
    return _compose(_overlap_share(b), [_spread(b)], args)


def ciou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """DIoU + alpha v, v = 4/pi^2 (atan(wg/hg) - atan(wp/hp))^2, alpha = v / (1 - IoU + v + eps_alpha) held constant."""
    b = _pair(p, g, args[0])
    value = _overlap_share(b)
    v = 4 / math.pi**2 * (angle(b.g) - angle(b.p)) ** 2
    alpha = safe_div(v, 1 - value + v + args[1]).detach()
    return _compose(value, [_spread(b), alpha * v], args)


def ciou_whole(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """CIoU, alpha not held constant: DIoU + v^2 / (1 - IoU + v + eps_alpha), which pulls at the IoU too."""
    b = _pair(p, g, args[0])
    value = _overlap_share(b)
    v = 4 / math.pi**2 * (angle(b.g) - angle(b.p)) ** 2
    return _compose(value, [_spread(b), safe_div(v, 1 - value + v + args[1]) * v], args)


def ciou_plus(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """DIoU - alpha v, lightnet's sign: v of heights + eps, eps = args[0], alpha = v / (1 - IoU + v) held constant.

    Its clip of 1 - loss to [-1, 1] is left out, for no two boxes reach further: v is at most 1 - IoU, rho at most c.
    Sides of g that are 0 take no gradient: theirs, 1 / eps, would drown that of its place.
    """
    b = _pair(p, g, args[0])
    value = _overlap_share(b)
    taller = constants((0.0, args[0]), p)
    sides = g[..., 2:] - g[..., :2]
    sides = torch.where(sides > 0, sides, sides.detach())
    v = 4 / math.pi**2 * (angle(sides + taller) - angle(p[..., 2:] - p[..., :2] + taller)) ** 2
    alpha = safe_div(v, 1 - value + v).detach()
    return _compose(value, [_spread(b), -alpha * v], args[:2])


def _share(d: Tensor, c: Tensor, eps: Tensor | float) -> Tensor:
    """d^2 / (c^2 + eps) on each axis. In units of c: thin boxes have no c^2 in float32."""
    unit = torch.where(c > 0, c, 1.0).detach()
    eps = eps[..., None] / unit / unit if isinstance(eps, Tensor) else 0.0
    return safe_div((d / unit) ** 2, (c / unit) ** 2 + eps)


def eiou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """DIoU + (wp - wg)^2 / (cw^2 + eps) + (hp - hg)^2 / (ch^2 + eps), cw, ch the enclosing sides (Zhang et al.)."""
    b = _pair(p, g, args[0])
    return _compose(_overlap_share(b), [_spread(b), *_share(b.p - b.g, b.enclosing, b.eps).unbind(-1)], args)


def siou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + (distance + shape) / 2, the second a single penalty (Gevorgyan 2022).

    distance = sum over axes of 1 - e^(-(2 - angle) (d / c)^2), d between the centres, c the enclosing side, eps on c^2;
    angle = 2 |dx| |dy| / (dx^2 + dy^2), the paper's 1 - 2 sin^2(arcsin(|dy| / rho) - pi / 4). shape = sum over axes of
    (1 - e^-w)^4, w = |difference of the sides| / the longer one.
    """
    b = _pair(p, g, args[0])
    unit = b.distance.detach().abs().amax(-1, keepdim=True)
    far = b.distance.abs() / torch.where(unit > 0, unit, 1.0)
    turn = safe_div(2 * area(far), (far**2).sum(-1))
    distance = 1 - (-(2 - turn[..., None]) * _share(b.distance, b.enclosing, b.eps)).exp()
    own, true = p[..., 2:] - p[..., :2], g[..., 2:] - g[..., :2]  # a thin box beside a large one would lose its width
    shape = (1 - (-safe_div((own - true).abs(), torch.maximum(own, true))).exp()) ** 4
    return _compose(_overlap_share(b), [(distance + shape).sum(-1) / 2], args)


def mpdiou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + d1^2 / (W^2 + H^2) + d2^2 / (W^2 + H^2): distances of the upper left and of the lower right corners, in
    diagonals of the image (Ma & Xu 2023). The one term that is not bounded: distances are held within 1e6 images.
    """
    if extent is None:
        checks.fail("extent", None, "the width and height of the image")
    extent = extent.to(p)
    unit = extent.amax(-1, keepdim=True)
    corners = held((p - g) / unit, -1e6, 1e6) ** 2
    diagonal = ((extent / unit) ** 2).sum(-1)
    penalties = [corners[..., :2].sum(-1) / diagonal, corners[..., 2:].sum(-1) / diagonal]
    return _compose(_overlap_share(_pair(p, g, args[0])), penalties, args)
