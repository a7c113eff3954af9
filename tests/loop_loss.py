"""The contract of docs/design.md once more: one object, one prediction at a time, in Python loops on float64 scalars.

Slow, and written from the text without looking at either backend: what they are compared with. Only gradients come from
autograd. Boxes are (centre x, centre y, width, height) here, never corners.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fusedyolo.heads import GridHead

ZERO = torch.zeros((), dtype=torch.float64)


@dataclass
class LoopLoss:
    box: Tensor = field(default_factory=lambda: ZERO)
    obj: Tensor = field(default_factory=lambda: ZERO)
    cls: Tensor = field(default_factory=lambda: ZERO)
    assigned: int = 0
    invalid: int = 0
    seen: Counter = field(default_factory=Counter)  # how often each situation came up

    @property
    def total(self) -> Tensor:
        return self.box + self.obj + self.cls


def label_term(kind: str, x: Tensor, t: float, args: tuple[float, ...]) -> Tensor:
    log_p, log_q = -torch.logaddexp(ZERO, -x), -torch.logaddexp(ZERO, x)
    loss = -t * log_p - (1 - t) * log_q
    if kind == "focal":
        alpha, gamma = args
        wrong = (1 - t) * torch.exp(log_p) + t * torch.exp(log_q)
        loss = loss * (wrong**gamma if wrong > 0 else float(gamma == 0))
        if alpha >= 0:
            loss = loss * (t * alpha + (1 - t) * (1 - alpha))
    if kind in ("qfl", "sse"):
        miss = (1 - t) * torch.exp(log_p) - t * torch.exp(log_q)
        if kind == "sse":
            return miss * miss
        alpha, gamma = args
        loss = loss * (abs(miss) ** gamma if miss != 0 else float(gamma == 0))
        if alpha >= 0:
            loss = loss * (t * alpha + (1 - t) * (1 - alpha))
    if kind == "varifocal":
        alpha, gamma = args
        p = torch.exp(log_p)
        negative = (p**gamma if p > 0 else float(gamma == 0)) * (alpha if alpha >= 0 else 1.0)
        loss = loss * (t if t > 0 else negative)
    return loss


def box_term(
    kind: str,
    p: tuple[Tensor, ...],
    g: tuple[Tensor, ...],
    args: tuple[float, float],
    extent: tuple[float, float] | None = None,
) -> Tensor:
    """Boxes as (cx, cy, w, h), and so the image's width and height."""
    eps, eps_alpha = args
    low = [torch.maximum(p[i] - p[i + 2] / 2, g[i] - g[i + 2] / 2) for i in (0, 1)]
    high = [torch.minimum(p[i] + p[i + 2] / 2, g[i] + g[i + 2] / 2) for i in (0, 1)]
    hull = [
        torch.maximum(p[i] + p[i + 2] / 2, g[i] + g[i + 2] / 2)
        - torch.minimum(p[i] - p[i + 2] / 2, g[i] - g[i + 2] / 2)
        for i in (0, 1)
    ]
    meets = bool(high[0] > low[0]) and bool(high[1] > low[1])
    inter = (high[0] - low[0]) * (high[1] - low[1]) if meets else ZERO
    union = p[2] * p[3] + g[2] * g[3] - inter
    iou = inter / (union + eps) if float(union.detach()) + eps != 0 else ZERO
    if kind == "iou":
        return 1 - iou
    if kind == "giou":
        area = hull[0] * hull[1]
        return 1 - iou + ((area - union) / (area + eps) if float(area.detach()) + eps != 0 else ZERO)
    if kind == "mpdiou":
        corners = ((p[i] - g[i]) + side * (p[i + 2] - g[i + 2]) / 2 for i in (0, 1) for side in (-1, 1))
        return 1 - iou + sum(d * d for d in corners) / (extent[0] ** 2 + extent[1] ** 2)
    if kind == "siou":
        away = [torch.abs(p[i] - g[i]) for i in (0, 1)]
        sigma = away[0] * away[0] + away[1] * away[1]
        angle = 2 * away[0] * away[1] / sigma if float(sigma.detach()) != 0 else ZERO
        loss = 1 - iou
        for i in (0, 1):
            square = hull[i] * hull[i] + eps
            rho = away[i] * away[i] / square if float(square.detach()) != 0 else ZERO
            longer = torch.maximum(p[i + 2], g[i + 2])
            omega = torch.abs(p[i + 2] - g[i + 2]) / longer if float(longer.detach()) != 0 else ZERO
            loss = loss + (1 - torch.exp((angle - 2) * rho) + (1 - torch.exp(-omega)) ** 4) / 2
        return loss
    diagonal = hull[0] * hull[0] + hull[1] * hull[1] + eps
    away = (p[0] - g[0]) ** 2 + (p[1] - g[1]) ** 2
    loss = 1 - iou + (away / diagonal if float(diagonal.detach()) != 0 else ZERO)
    if kind == "eiou":
        for i in (0, 1):
            square = hull[i] * hull[i] + eps
            loss = loss + ((p[i + 2] - g[i + 2]) ** 2 / square if float(square.detach()) != 0 else ZERO)
    if kind == "ciou":
        v = 4 * (torch.atan2(g[2], g[3]) - torch.atan2(p[2], p[3])) ** 2 / math.pi**2
        below = 1 - float(iou.detach()) + float(v.detach()) + eps_alpha
        loss = loss + (float(v.detach()) / below if below != 0 else 0.0) * v
    return loss


def sensitive(a: Tensor, scale: float) -> Tensor:
    return scale * torch.exp(-torch.logaddexp(ZERO, -a)) - (scale - 1) / 2


def offset_term(kind: str, a: Tensor, b: Tensor, ta: float, tb: float, scale: float) -> Tensor:
    if kind == "mse":
        return (sensitive(a, scale) - ta) ** 2 + (b - tb) ** 2
    return scale * label_term("bce", a, (ta + (scale - 1) / 2) / scale, ()) + (b - tb) ** 2 / 2


def decoded(
    kind: str, raw: list[Tensor], anchor: tuple[float, float], stride: float, scale: float
) -> tuple[Tensor, ...]:
    """Pixels, the centre from the cell's origin."""
    x, y = sensitive(raw[0], scale) * stride, sensitive(raw[1], scale) * stride
    if kind == "exp":  # a value held within e^-60 and e^60 whose relative slope is 1 everywhere
        w, h = (
            side * math.exp(min(max(float(b.detach()), -60.0), 60.0)) * torch.exp(b - b.detach())
            for side, b in zip(anchor, raw[2:4], strict=True)
        )
    else:
        w, h = (side * 4 * torch.exp(-2 * torch.logaddexp(ZERO, -b)) for side, b in zip(anchor, raw[2:4], strict=True))
    return x, y, w, h


def plain_iou(p: tuple[float, ...], g: tuple[float, ...]) -> float:
    sides = [
        min(p[i] + p[i + 2] / 2, g[i] + g[i + 2] / 2) - max(p[i] - p[i + 2] / 2, g[i] - g[i + 2] / 2) for i in (0, 1)
    ]
    inter = sides[0] * sides[1] if sides[0] > 0 and sides[1] > 0 else 0.0
    return inter / (p[2] * p[3] + g[2] * g[3] - inter) if inter else 0.0


def is_valid(row: list[float], batch: int, classes: int) -> bool:
    image, label, cx, cy, w, h = row
    if not all(math.isfinite(value) for value in row):
        return False
    return 0 <= image < batch and 0 <= label < classes and w > 0 and h > 0 and 0 <= cx < 1 and 0 <= cy < 1


def winners(w: float, h: float, head: GridHead) -> list[int]:
    """Anchors that a box of w x h pixels is assigned to."""
    ious = []
    for aw, ah in head.anchors:
        inter = min(w, aw) * min(h, ah)
        ious.append(inter / (w * h + aw * ah - inter))
    best = ious.index(max(ious))
    own = [best] if ious[best] > 0 else []
    if head.iou_thresh < 1:
        own += [t for t, value in enumerate(ious) if t != best and value > head.iou_thresh]
    return own


def loop_loss(preds: list[Tensor], rows: Tensor, head: GridHead, class_weights: Tensor | None = None) -> LoopLoss:
    """``preds`` are float64 ``[B, A, H, W, 5 + C]``."""
    out = LoopLoss()
    listed = [[float(value) for value in row] for row in rows]
    batch = preds[0].shape[0]
    valid = [is_valid(row, batch, head.num_classes) for row in listed]
    out.invalid = valid.count(False)
    weight = [1.0] * head.num_classes if class_weights is None else [float(m) for m in class_weights]

    for level, pred in enumerate(preds):
        _, _, H, W, channels = pred.shape
        stride, scale = head.strides[level], head.scale_x_y[level]
        image_w, image_h = W * stride, H * stride
        owned: dict[tuple[int, ...], list[int]] = {}
        for r, row in enumerate(listed):
            if valid[r]:
                i, j = int(np.float32(row[2]) * np.float32(W)), int(np.float32(row[3]) * np.float32(H))
                for t in winners(row[4] * image_w, row[5] * image_h, head):
                    if t in head.levels[level]:
                        owned.setdefault((int(row[0]), head.levels[level].index(t), j, i), []).append(r)
        out.assigned += len(owned)

        scalars = pred.reshape(-1).unbind()
        for at in np.ndindex(*pred.shape[:4]):
            b, a, j, i = at
            start = int(np.ravel_multi_index((*at, 0), pred.shape))
            raw = list(scalars[start : start + channels])
            anchor = head.anchors[head.levels[level][a]]
            p = decoded(head.decode, raw, anchor, stride, scale)
            if any(math.isnan(float(value.detach())) for value in raw[:4]):
                out.obj = out.obj + math.nan
            if at in owned:
                _assigned(
                    out,
                    raw,
                    p,
                    owned[at],
                    listed,
                    (i, j),
                    (W, H),
                    anchor,
                    level,
                    head,
                    weight,
                    class_weights is not None,
                )
                continue
            x, y, w, h = (float(value.detach()) for value in p)
            over = any(
                plain_iou(
                    (x + i * stride, y + j * stride, w, h),
                    (row[2] * image_w, row[3] * image_h, row[4] * image_w, row[5] * image_h),
                )
                > head.ignore_thresh
                for r, row in enumerate(listed)
                if valid[r] and int(row[0]) == b
            )
            hot = head.class_gate is None or any(float(z.detach()) > head.class_gate for z in raw[5:])
            if over and hot:
                out.seen["ignored"] += 1
            else:
                out.seen["kept by the gate"] += over
                out.obj = out.obj + head.noobj_gain * label_term("bce", raw[4], 0.0, ())
    return out


def _assigned(
    out: LoopLoss, raw: list[Tensor], p: tuple[Tensor, ...], owners: list[int], listed: list[list[float]],
    cell: tuple[int, int], cells: tuple[int, int], anchor: tuple[float, float], level: int, head: GridHead,
    weight: list[float], weighted: bool,
) -> None:  # fmt: skip
    stride, scale = head.strides[level], head.scale_x_y[level]
    labels = [int(listed[r][1]) for r in owners]
    out.seen["shared"] += len(owners) > 1
    out.seen["repeated class"] += len(set(labels)) < len(labels)
    out.seen["several classes"] += len(set(labels)) > 1

    # classes
    targets = [head.class_targets[0] if c in labels else head.class_targets[1] for c in range(head.num_classes)]
    for c, (z, t) in enumerate(zip(raw[5:], targets, strict=True)):
        w = weight[c] if c in labels else 1.0
        if weighted and c == labels[0] and labels.count(c) == 1:
            w *= head.first_weight
        out.cls = out.cls + head.cls_gain * w * label_term(head.label, z, t, head.label_args)

    # objectness
    out.obj = out.obj + head.obj_gain * weight[labels[-1]] * label_term("bce", raw[4], 1.0, ())

    # box
    K = 1
    if head.average_box:
        pushed = [t > float(torch.sigmoid(z.detach())) for z, t in zip(raw[5:], targets, strict=True)]
        K = max(1, sum(pushed))
    out.seen["averaged"] += K > 1
    for r, label in zip(owners, labels, strict=True):
        _, _, cx, cy, w, h = listed[r]
        tx, ty = cx * cells[0] - cell[0], cy * cells[1] - cell[1]
        image = (cells[0] * stride, cells[1] * stride)
        if head.box in ("mse", "bce_mse"):
            term = offset_term(head.box, raw[0], raw[2], tx, math.log(w * image[0] / anchor[0]), scale)
            term = term + offset_term(head.box, raw[1], raw[3], ty, math.log(h * image[1] / anchor[1]), scale)
            term = term * (1 + head.area_weight * (1 - w * h))
        else:
            unit = (*image, *image) if head.unit == "image" else (1.0,) * 4
            true = (tx * stride, ty * stride, w * image[0], h * image[1])
            g = tuple(torch.tensor(value / u, dtype=torch.float64) for value, u in zip(true, unit, strict=True))
            term = box_term(head.box, tuple(value / u for value, u in zip(p, unit, strict=True)), g, head.box_args)
        out.box = out.box + head.box_gain * weight[label] * term / K
