"""The terms: twins of ``kernels/terms`` under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, smooth_l1_loss

from .. import checks


def _div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with no gradient where b is 0; the inner where keeps NaN out of the backward."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """[len(values)] of the dtype and device of ``like``, by fill: torch.tensor(..., device="cuda") would wait."""
    return torch.stack([like.new_full((), value) for value in values])


# ---- label terms: (x, t, args) -> loss; logit x, target t in [0, 1] of one dtype. Elementwise but for softmax_ce, and
# smooth but for qfl where p = t. A negative alpha means no factor; a pos_weight multiplies the positive half of BCE.


def bce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-w t log(p) - (1 - t) log(1 - p), p = sigmoid(x), args = () or (w,). The slope is sigmoid(x) - t at 0 too.

    PyTorch's own, (1 - t) x - logsigmoid(x), has no digit left in float32 for a background logit of -17.
    """
    positive = t * args[0] if len(args) == 1 else t
    return -(positive * logsigmoid(x) + (1 - t) * logsigmoid(-x))


def _power(q: Tensor, gamma: float, empty: float = 0.0) -> Tensor:
    """q^gamma of q >= 0; where q underflows, ``empty`` with no gradient: that of q^gamma is inf there for gamma < 1."""
    zero = q < torch.finfo(q.dtype).tiny
    return torch.where(zero, empty, torch.where(zero, 1.0, q) ** gamma)


def _balance(t: Tensor, alpha: float) -> Tensor | float:
    return alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0


def focal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t q^gamma BCE, q = 1 - p_t, args = (alpha, gamma[, pos_weight]); RetinaNet eq. 5.

    Soft targets as torchvision. q is summed from products, not from 1 - p_t, so that it keeps its digits where the
    prediction is right. Where it underflows, so does the BCE, and the loss is 0.
    """
    alpha, gamma = args[:2]
    q = x.sigmoid() * (1 - t) + (-x).sigmoid() * t
    return _power(q, gamma) * _balance(t, alpha) * bce(x, t, args[2:])


def qfl(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t |t - p|^gamma BCE, args = (alpha, gamma); quality focal loss, Li et al. 2020. |.| has no slope at 0."""
    alpha, gamma = args
    miss = _miss(x, t).abs()
    return _power(miss, gamma, 0.0**gamma) * _balance(t, alpha) * bce(x, t)


def varifocal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """t BCE where t > 0, else alpha p^gamma BCE, args = (alpha, gamma); Zhang et al. 2021."""
    alpha, gamma = args
    negative = _power(x.sigmoid(), gamma) * (alpha if alpha >= 0 else 1.0)
    return torch.where(t > 0, t, negative) * bce(x, t)


def sse(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """(sigmoid(x) - t)^2."""
    return _miss(x, t) ** 2


def _miss(x: Tensor, t: Tensor) -> Tensor:
    """sigmoid(x) - t, with all its digits where t is 0 or 1, and its slope's too: sigmoid's own is 0 beyond 40."""
    return logsigmoid(x).exp() * (1 - t) - logsigmoid(-x).exp() * t


def softmax_ce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-t_c log softmax(x)_c over the last axis, one an entry.

    log1p of the other classes' share keeps the digits of a class that is nearly sure, where log_softmax has none.
    """
    top, index = x.max(-1, keepdim=True)
    z = (x - top).scatter(-1, index, 0.0)  # of the top class 0, with no slope of 1 - 1
    rest = z.exp().scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return -t * (z - rest.log1p())


# ---- box terms: (p, g, args, extent) -> loss [...]; predicted and true boxes [..., 4], x1 y1 x2 y2, in one unit of
# length. args = (eps, eps_alpha): eps joins each denominator that is an area or squared length of boxes, eps_alpha that
# of CIoU's alpha. args = (eps, eps_alpha, alpha, gamma): alpha-IoU (He et al. 2021) with a constant focal factor
# (Focal-EIoU, Zhang et al. 2021), see _compose. extent, [2] or broadcastable, is the image's width and height, for
# mpdiou alone. Gradients flow to both boxes. Rules of torchvision: edges that coincide share the gradient half and half
# (torch.maximum, torch.minimum); boxes that only touch do not intersect, and their intersection has no gradient. A
# quotient by 0 is 0.


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


def area(sides: Tensor) -> Tensor:
    """Width times height, of [..., 2]."""
    return sides[..., 0] * sides[..., 1]


def iou_of_areas(inter: Tensor, p: Tensor, g: Tensor, eps: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU = inter / (union + eps), and the union, from three areas."""
    union = p + g - inter
    return _div(inter, union + eps), union


def _overlap_share(b: _Pair) -> Tensor:
    """IoU."""
    return iou_of_areas(area(b.overlap), area(b.p), area(b.g), b.eps)[0]


def _compose(value: Tensor, penalties: Sequence[Tensor], args: Sequence[float]) -> Tensor:
    """1 - IoU + penalties, or IoU^gamma (1 - IoU^alpha + the sum of penalty^alpha) with IoU^gamma held constant.

    IoU^0 is 1 for every IoU. The slope of q^alpha at 0 is 0 for every alpha but 1: for alpha < 1 there is none.
    """
    alpha, gamma = args[2:] if len(args) > 2 else (1.0, 0.0)
    loss = 1 - (value if alpha == 1 else _power(value, alpha))
    for q in penalties:
        loss = loss + (q if alpha == 1 else _power(q, alpha))
    return loss * _power(value.detach(), gamma) if gamma else loss


def iou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU."""
    return _compose(_overlap_share(_pair(p, g, args[0])), (), args)


def giou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + (C - U) / (C + eps), C the area of the enclosing box (Rezatofighi et al. 2019)."""
    b = _pair(p, g, args[0])
    value, union = iou_of_areas(area(b.overlap), area(b.p), area(b.g), b.eps)
    return _compose(value, [_div(area(b.enclosing) - union, area(b.enclosing) + b.eps)], args)


def _spread(b: _Pair) -> Tensor:
    """rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal."""
    return _div((b.distance**2).sum(-1), (b.enclosing**2).sum(-1) + b.eps)


def diou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal (Zheng et al. 2020)."""
    b = _pair(p, g, args[0])
    return _compose(_overlap_share(b), [_spread(b)], args)


def ciou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """DIoU + alpha v, v = 4/pi^2 (atan(wg/hg) - atan(wp/hp))^2, alpha = v / (1 - IoU + v + eps_alpha) held constant."""
    b = _pair(p, g, args[0])
    value = _overlap_share(b)
    v = 4 / math.pi**2 * (_angle(b.g) - _angle(b.p)) ** 2
    alpha = _div(v, 1 - value + v + args[1]).detach()
    return _compose(value, [_spread(b), alpha * v], args)


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
    v = 4 / math.pi**2 * (_angle(sides + taller) - _angle(p[..., 2:] - p[..., :2] + taller)) ** 2
    alpha = _div(v, 1 - value + v).detach()
    return _compose(value, [_spread(b), -alpha * v], args[:2])


def _share(d: Tensor, c: Tensor, eps: Tensor | float) -> Tensor:
    """d^2 / (c^2 + eps) on each axis. In units of c: thin boxes have no c^2 in float32."""
    unit = torch.where(c > 0, c, 1.0).detach()
    eps = eps[..., None] / unit / unit if isinstance(eps, Tensor) else 0.0
    return _div((d / unit) ** 2, (c / unit) ** 2 + eps)


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
    angle = _div(2 * area(far), (far**2).sum(-1))
    distance = 1 - (-(2 - angle[..., None]) * _share(b.distance, b.enclosing, b.eps)).exp()
    own, true = p[..., 2:] - p[..., :2], g[..., 2:] - g[..., :2]  # a thin box beside a large one would lose its width
    shape = (1 - (-_div((own - true).abs(), torch.maximum(own, true))).exp()) ** 4
    return _compose(_overlap_share(b), [(distance + shape).sum(-1) / 2], args)


def mpdiou(p: Tensor, g: Tensor, args: Sequence[float], extent: Tensor | None = None) -> Tensor:
    """1 - IoU + d1^2 / (W^2 + H^2) + d2^2 / (W^2 + H^2): distances of the upper left and of the lower right corners, in
    diagonals of the image (Ma & Xu 2023). The one term that is not bounded: beyond 1e19 images it leaves float32.
    """
    if extent is None:
        checks.fail("extent", None, "the width and height of the image")
    extent = extent.to(p)
    unit = extent.amax(-1, keepdim=True)
    corners = ((p - g) / unit) ** 2
    diagonal = ((extent / unit) ** 2).sum(-1)
    penalties = [corners[..., :2].sum(-1) / diagonal, corners[..., 2:].sum(-1) / diagonal]
    return _compose(_overlap_share(_pair(p, g, args[0])), penalties, args)


def _angle(sides: Tensor) -> Tensor:
    """atan(w / h), pi/2 at h = 0 and 0 at w = h = 0. Smaller side over larger, so that no quotient overflows."""
    w, h = sides.unbind(-1)
    wide = w.abs() > h.abs()
    a = _div(torch.where(wide, h, w), torch.where(wide, w, h)).atan()
    complement = torch.where((w < 0) != (h < 0), -math.pi / 2 - a, math.pi / 2 - a)
    return torch.where(wide, complement, a)


# ---- offset terms: (a, b, ta, tb, scale) -> loss, one axis: raw logits a of the centre and b of the size, target ta of
# the scaled sigmoid (true centre from the cell's origin, in cells), target tb of b, log(true size / anchor); scale is
# the grid sensitivity. Smooth, no ties, but for l1 and smooth_l1.


def _scaled_sigmoid(a: Tensor, scale: float) -> Tensor:
    """scale sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity")."""
    return scale * a.sigmoid() - (scale - 1) / 2


def mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    return (_scaled_sigmoid(a, scale) - ta) ** 2 + (b - tb) ** 2


def bce_mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """scale BCE(sigmoid(a), (ta + (scale - 1) / 2) / scale) + (b - tb)^2 / 2, which darknet's mse delta descends."""
    return scale * bce(a, (ta + (scale - 1) / 2) / scale) + (b - tb) ** 2 / 2


def _abs(d: Tensor) -> Tensor:
    """|d|, of slope 0 at 0, and NaN where d is, where that of torch.abs is 0."""
    return d * torch.where(d > 0, 1.0, torch.where(d < 0, -1.0, d)).detach()


def l1(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """Absolute differences of raw a and b; ta and tb are their targets themselves."""
    return _abs(a - ta) + _abs(b - tb)


def smooth_l1(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """The same, quadratic below ``scale`` (Girshick 2015; torch's beta)."""
    return torch.stack([smooth_l1_loss(raw, t, reduction="none", beta=scale) for raw, t in ((a, ta), (b, tb))]).sum(0)


# ---- decoding: (a, b, anchor, stride, scale) -> centre from the cell's origin, or from the centre of an anchor that
# has a place, and size, one axis, in the unit of anchor and stride; a, b, scale as above.


def _held(b: Tensor, low: float, high: float = math.inf) -> Tensor:
    """b within [low, high], the gradient passes as if it were not: there sizes keep what a gradient by them takes."""
    passed = torch.where(b.isinf(), 0.0, b)  # inf - inf would be NaN
    return b.detach().clamp(low, high) + (passed - passed.detach())


def exp(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv2 to YOLOv4: size anchor e^b. b is held within [-60, 60], the gradient passes as if it were not."""
    return _scaled_sigmoid(a, scale) * stride, anchor * _held(b, -60, 60).exp()


def sigmoid_square(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv5 and Scaled-YOLOv4: size anchor (2 sigmoid(b))^2. b is held above -30 as in :func:`exp`."""
    return _scaled_sigmoid(a, scale) * stride, anchor * (2 * _held(b, -30).sigmoid()) ** 2


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


# ---- encoding: (centre, size, anchor, stride, scale) -> a, b, the outputs that decode to a centre and a size; where
# none does (a centre beyond what the sigmoid reaches, say), the nearest within 1e-6 of its range.


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


Term = Callable[..., Tensor]
LABEL_TERMS: dict[str, Term] = {
    "bce": bce, "focal": focal, "qfl": qfl, "varifocal": varifocal, "sse": sse, "softmax_ce": softmax_ce,
}  # fmt: skip
BOX_TERMS: dict[str, Term] = {
    "iou": iou, "giou": giou, "diou": diou, "ciou": ciou, "eiou": eiou, "siou": siou, "mpdiou": mpdiou,
    "ciou_plus": ciou_plus,
}  # fmt: skip
OFFSET_TERMS: dict[str, Term] = {"mse": mse, "bce_mse": bce_mse, "l1": l1, "smooth_l1": smooth_l1}
DECODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "exp": exp,
    "sigmoid_square": sigmoid_square,
    "delta": delta,
    "ltrb": ltrb,
}
ENCODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "exp": encode_exp,
    "sigmoid_square": encode_sigmoid_square,
    "delta": encode_delta,
    "ltrb": encode_ltrb,
}
