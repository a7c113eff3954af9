"""The formulas of the terms once more, from papers and peers, in float64: what both backends are compared with.

A term that has no formula here is taken from the reference: then the loops of ``loop_loss.py`` judge the drivers alone.
A name that is in no table raises. Boxes are (centre x, centre y, width, height), never corners; gradients by autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedyolo import reference
from fusedyolo.terms import find_term

ZERO = torch.zeros((), dtype=torch.float64)
Box = Sequence[Tensor]


def over(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is."""
    none = b.detach() == 0
    return torch.where(none, 0.0, a / torch.where(none, 1.0, b))


def power(x: Tensor, exponent: float) -> Tensor:
    """x^exponent, without a slope where x is 0."""
    if exponent == 1:
        return x
    some = x > 0
    return torch.where(some, torch.where(some, x, 1.0) ** exponent, float(exponent == 0))


# ---- labels


def _bce(log_p: Tensor, log_q: Tensor, t: Tensor, weight: float = 1.0) -> Tensor:
    return -t * log_p * weight - (1 - t) * log_q


def _focal(log_p, log_q, t, alpha, gamma, weight=1.0):
    wrong = (1 - t) * torch.exp(log_p) + t * torch.exp(log_q)
    return _bce(log_p, log_q, t, weight) * power(wrong, gamma) * _balance(t, alpha)


def _qfl(log_p, log_q, t, alpha, gamma):
    wrong = torch.abs((1 - t) * torch.exp(log_p) - t * torch.exp(log_q))
    return _bce(log_p, log_q, t) * power(wrong, gamma) * _balance(t, alpha)


def _varifocal(log_p, log_q, t, alpha, gamma):
    negative = power(torch.exp(log_p), gamma) * (alpha if alpha >= 0 else 1.0)
    return _bce(log_p, log_q, t) * torch.where(t > 0, t, negative)


def _sse(log_p, log_q, t):
    return (torch.exp(log_p) * (1 - t) - torch.exp(log_q) * t) ** 2


def _balance(t, alpha):
    return t * alpha + (1 - t) * (1 - alpha) if alpha >= 0 else 1.0


LABELS: dict[str, Callable[..., Tensor]] = {
    "bce": _bce, "focal": _focal, "qfl": _qfl, "varifocal": _varifocal, "sse": _sse,
}  # fmt: skip


def label_term(kind: str, x: Tensor, t: float | Tensor, args: Sequence[float]) -> Tensor:
    """Of logits, each by itself."""
    find_term("kind", kind, "objectness")
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if kind not in LABELS:
        return reference.LABEL_TERMS[kind](x, t.expand_as(x), args)
    return LABELS[kind](-torch.logaddexp(ZERO.to(x.device), -x), -torch.logaddexp(ZERO.to(x.device), x), t, *args)


def class_terms(kind: str, logits: Tensor, targets: Tensor, args: Sequence[float]) -> Tensor:
    """[C] of one prediction, one an entry of its classes."""
    if find_term("kind", kind, "class").elementwise:
        return label_term(kind, logits, targets, args)
    if kind == "softmax_ce":
        return -targets * (logits - torch.logsumexp(logits, 0))
    return reference.LABEL_TERMS[kind](logits, targets, args)


# ---- boxes


def plain_iou(p: Sequence[Any], g: Sequence[Any]) -> float:
    """Of two boxes, for loops."""
    p, g = ([float(v.detach()) if isinstance(v, Tensor) else v for v in box] for box in (p, g))
    sides = [
        min(p[i] + p[i + 2] / 2, g[i] + g[i + 2] / 2) - max(p[i] - p[i + 2] / 2, g[i] - g[i + 2] / 2) for i in (0, 1)
    ]
    inter = sides[0] * sides[1] if sides[0] > 0 and sides[1] > 0 else 0.0
    return inter / (p[2] * p[3] + g[2] * g[3] - inter) if inter else 0.0


@dataclass
class Pair:
    """What penalties are made of: sides that boxes have in common, and those of the box around both."""

    p: Box
    g: Box
    eps: float
    eps_alpha: float
    extent: Sequence[float] | None

    def __post_init__(self):
        low, high, self.hull = [], [], []
        for i in (0, 1):
            p1, p2, g1, g2 = (c for b in (self.p, self.g) for c in (b[i] - b[i + 2] / 2, b[i] + b[i + 2] / 2))
            low.append(torch.maximum(p1, g1))
            high.append(torch.minimum(p2, g2))
            self.hull.append(torch.maximum(p2, g2) - torch.minimum(p1, g1))
        meets = (high[0] > low[0]) & (high[1] > low[1])
        inter = torch.where(meets, (high[0] - low[0]) * (high[1] - low[1]), 0.0)
        self.union = self.p[2] * self.p[3] + self.g[2] * self.g[3] - inter
        self.iou = over(inter, self.union + self.eps)

    @property
    def away(self) -> Tensor:
        """Squared distance of the centres, in diagonals of the hull."""
        squared = (self.p[0] - self.g[0]) ** 2 + (self.p[1] - self.g[1]) ** 2
        return over(squared, self.hull[0] ** 2 + self.hull[1] ** 2 + self.eps)

    def aspect(self, taller: float, eps_alpha: float, constant: bool = True) -> Tensor:
        """alpha v of CIoU, alpha constant or not."""
        p, g = self.p, self.g
        v = 4 * (torch.atan2(g[2], g[3] + taller) - torch.atan2(p[2], p[3] + taller)) ** 2 / math.pi**2
        alpha = over(v, 1 - self.iou + v + eps_alpha)
        return (alpha.detach() if constant else alpha) * v


def _giou(b: Pair) -> list[Tensor]:
    area = b.hull[0] * b.hull[1]
    return [over(area - b.union, area + b.eps)]


def _mpdiou(b: Pair) -> list[Tensor]:
    assert b.extent is not None
    corners = [[(b.p[i] - b.g[i]) + side * (b.p[i + 2] - b.g[i + 2]) / 2 for i in (0, 1)] for side in (-1, 1)]
    return [(x * x + y * y) / (b.extent[0] ** 2 + b.extent[1] ** 2) for x, y in corners]


def _siou(b: Pair) -> list[Tensor]:
    way = [torch.abs(b.p[i] - b.g[i]) for i in (0, 1)]
    angle = over(2 * way[0] * way[1], way[0] * way[0] + way[1] * way[1])
    spread = torch.zeros_like(b.iou)
    for i in (0, 1):
        rho = over(way[i] * way[i], b.hull[i] * b.hull[i] + b.eps)
        omega = over(torch.abs(b.p[i + 2] - b.g[i + 2]), torch.maximum(b.p[i + 2], b.g[i + 2]))
        spread = spread + (1 - torch.exp((angle - 2) * rho) + (1 - torch.exp(-omega)) ** 4) / 2
    return [spread]


def _eiou(b: Pair) -> list[Tensor]:
    return [b.away, *(over((b.p[i + 2] - b.g[i + 2]) ** 2, b.hull[i] ** 2 + b.eps) for i in (0, 1))]


PENALTIES: dict[str, Callable[[Pair], list[Tensor]]] = {
    "iou": lambda b: [],
    "giou": _giou,
    "diou": lambda b: [b.away],
    "ciou": lambda b: [b.away, b.aspect(0.0, b.eps_alpha)],
    "ciou_whole": lambda b: [b.away, b.aspect(0.0, b.eps_alpha, constant=False)],
    "eiou": _eiou,
    "siou": _siou,
    "mpdiou": _mpdiou,
    # lightnet's own way to write it, with its clip
    "ciou_plus": lambda b: [b.iou - torch.clamp(b.iou - b.away + b.aspect(b.eps, 0.0), -1, 1)],
}


def box_term(kind: str, p: Box, g: Box, args: Sequence[float], extent: Sequence[float] | None = None) -> Tensor:
    """Of boxes, with the width and height of the image."""
    find_term("kind", kind, "iou")
    if kind not in PENALTIES:
        corners = [torch.stack([b[i] + side * b[i + 2] / 2 for side in (-1, 1) for i in (0, 1)], -1) for b in (p, g)]
        return reference.BOX_TERMS[kind](*corners, args, None if extent is None else torch.as_tensor(extent))
    pair = Pair(p, g, *args[:2], extent)
    alpha, gamma = args[2:] or (1.0, 0.0)
    penalties = [power(penalty, alpha) for penalty in PENALTIES[kind](pair)]
    return (1 - power(pair.iou, alpha) + sum(penalties)) * power(pair.iou.detach(), gamma)


# ---- raw outputs of an axis


def sensitive(a: Tensor, scale: float) -> Tensor:
    return scale * torch.exp(-torch.logaddexp(ZERO, -a)) - (scale - 1) / 2


OFFSETS: dict[str, Callable[..., Tensor]] = {
    "mse": lambda a, b, ta, tb, scale: (sensitive(a, scale) - ta) ** 2 + (b - tb) ** 2,
    "bce_mse": lambda a, b, ta, tb, scale: (
        scale * label_term("bce", a, (ta + (scale - 1) / 2) / scale, ()) + (b - tb) ** 2 / 2
    ),
}


def offset_term(kind: str, a: Tensor, b: Tensor, ta: float, tb: float, scale: float) -> Tensor:
    """Of one axis of a grid's logits."""
    find_term("kind", kind, "offset")
    targets = (torch.as_tensor(t, dtype=a.dtype) for t in (ta, tb))
    return OFFSETS.get(kind, reference.OFFSET_TERMS[kind])(a, b, *targets, scale)


def _sides_exp(b: Tensor) -> Tensor:
    """e^b, a value held within e^-60 and e^60 whose relative slope is 1 everywhere."""
    return b.detach().clamp(-60.0, 60.0).exp() * torch.exp(b - b.detach())


def _sides_sigmoid_square(b: Tensor) -> Tensor:
    return 4 * torch.exp(-2 * torch.logaddexp(ZERO, -b))


SIDES: dict[str, Callable[[Tensor], Tensor]] = {"exp": _sides_exp, "sigmoid_square": _sides_sigmoid_square}


def decoded(kind: str, raw: Box, anchor: Sequence[float], stride: float, scale: float) -> tuple[Tensor, ...]:
    """Box of a grid's logits in pixels, the centre from the cell's origin."""
    find_term("kind", kind, "grid")
    if kind not in SIDES:
        sides = (ZERO + side for side in anchor)
        axes = [reference.DECODE[kind](raw[i], raw[i + 2], side, stride, scale) for i, side in enumerate(sides)]
        return axes[0][0], axes[1][0], axes[0][1], axes[1][1]
    centre = (sensitive(raw[i], scale) * stride for i in (0, 1))
    return *centre, *(side * SIDES[kind](b) for side, b in zip(anchor, raw[2:4], strict=True))
