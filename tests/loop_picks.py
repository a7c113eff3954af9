"""What YOLOX and YOLOv8 do, step by step from a description of these, an image and an object at a time, with a table of
all pairs: slow, and in nothing like the reference. float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EPS = 1e-7


@dataclass
class Found:
    """Parts of the loss, differentiable; of each prediction [B, N] its row, -1 for none, and its class's target."""

    parts: dict[str, Tensor]
    row: Tensor
    score: Tensor


def cells(maps: Any, strides: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Column, row and stride of each cell, level by level."""
    found = [(x, y, s) for (H, W), s in zip(maps, strides, strict=True) for y in range(H) for x in range(W)]
    x, y, s = torch.tensor(found, dtype=torch.float64).unbind(1)
    return x, y, s


def own_rows(rows: Tensor, image: int, width: float, height: float) -> tuple[list[int], Tensor]:
    """Of an image, its rows and their centres and sides [G, 4] in pixels."""
    own = [i for i, row in enumerate(rows.tolist()) if int(row[0]) == image]
    size = torch.tensor([width, height, width, height], dtype=torch.float64)
    return own, rows[own, 2:].double() * size


def ciou(p: Tensor, g: Tensor, taller: float = EPS) -> Tensor:
    """Of boxes x1, y1, x2, y2; of heights, but not of widths, with eps."""
    px1, py1, px2, py2 = p.unbind(-1)
    gx1, gy1, gx2, gy2 = g.unbind(-1)
    pw, ph, gw, gh = px2 - px1, py2 - py1 + taller, gx2 - gx1, gy2 - gy1 + taller
    inter = (torch.minimum(px2, gx2) - torch.maximum(px1, gx1)).clamp(0)
    inter = inter * (torch.minimum(py2, gy2) - torch.maximum(py1, gy1)).clamp(0)
    iou = inter / (pw * ph + gw * gh - inter + EPS)
    cw, ch = torch.maximum(px2, gx2) - torch.minimum(px1, gx1), torch.maximum(py2, gy2) - torch.minimum(py1, gy1)
    diagonal = cw**2 + ch**2 + EPS
    apart = ((gx1 + gx2 - px1 - px2) ** 2 + (gy1 + gy2 - py1 - py2) ** 2) / 4
    v = 4 / math.pi**2 * ((gw / gh).atan() - (pw / ph).atan()) ** 2
    alpha = (v / (v - iou + 1 + EPS)).detach()
    return iou - (apart / diagonal + v * alpha)


def bce(x: Tensor, t: Tensor) -> Tensor:
    return t * torch.nn.functional.softplus(-x) + (1 - t) * torch.nn.functional.softplus(x)


def yolov8(
    boxes: Tensor,
    scores: Tensor,
    rows: Tensor,
    maps: Any,
    strides: Any,
    *,
    reg_max: int = 16,
    topk: int = 10,
    topk2: int | None = None,
    alpha: float = 0.5,
    beta: float = 6.0,
    gains: tuple[float, float, float] = (7.5, 0.5, 1.5),
    class_weights: Tensor | None = None,
    taller: float = EPS,
    rule: str = "ultralytics",
    small: float | None = None,
) -> Found:
    """boxes [B, 4 * reg_max, N], scores [B, C, N]. ``taller`` joins heights in CIoU, in the loss in cells; ``small`` is
    the second stride, or the only one, unless given. By the rule "libreyolo" a cell is an object's if its distributions
    can say all four distances, an object without one takes the best of all, and only who picked a cell may get it.
    """
    B, C, N = scores.shape
    H, W = maps[0][0] * strides[0], maps[0][1] * strides[0]
    x, y, s = cells(maps, strides)
    middle = torch.stack((x + 0.5, y + 0.5), 1)
    each = boxes.view(B, 4, reg_max, N)
    bins = torch.arange(reg_max, dtype=torch.float64).view(1, 1, -1, 1)
    d = (each.softmax(2) * bins).sum(2) if reg_max > 1 else each[:, :, 0]
    left, top, right, bottom = d.unbind(1)
    pred = torch.stack((middle[:, 0] - left, middle[:, 1] - top, middle[:, 0] + right, middle[:, 1] + bottom), 2)
    target, of = torch.zeros(B, N, C, dtype=torch.float64), torch.full((B, N), -1)
    truth = torch.zeros(B, N, 4, dtype=torch.float64)
    small = strides[min(1, len(strides) - 1)] if small is None else small
    reaches = rule == "libreyolo"
    for b in range(B):
        own, xywh = own_rows(rows, b, W, H)
        if not own:
            continue
        corners = torch.cat((xywh[:, :2] - xywh[:, 2:] / 2, xywh[:, :2] + xywh[:, 2:] / 2), 1)
        overlap, metric = torch.full((len(own), N), -1.0).double(), torch.zeros(len(own), N, dtype=torch.float64)
        most = [topk] * len(own)
        for g, (x1, y1, x2, y2) in enumerate(corners):
            cx, cy, w, h = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            w, h = (side if side >= small or reaches else torch.tensor(float(small)) for side in (w, h))
            px, py = middle[:, 0] * s, middle[:, 1] * s
            deep = torch.stack((px - (cx - w / 2), py - (cy - h / 2), cx + w / 2 - px, cy + h / 2 - py))
            inside = deep.amin(0) > 1e-9
            values = ciou(pred[b].detach() * s[:, None], corners[g].expand(N, 4), taller).clamp(min=0)
            score = scores[b, int(rows[own[g], 1])].detach().sigmoid()
            wanted = score**alpha * values**beta
            if reaches:
                inside = (deep.amin(0) >= 0) & ((deep / s).amax(0) <= reg_max - 1.01)
                if not (inside & (wanted > 0)).any():
                    inside, most[g] = torch.ones(N, dtype=torch.bool), 1
            overlap[g] = torch.where(inside, values, -1.0)  # with beta 0 those that do not overlap may have a cell
            metric[g] = torch.where(inside, wanted, 0.0)
        taken = torch.zeros(len(own), N, dtype=torch.bool)
        for g in range(len(own)):
            order = metric[g].sort(descending=True, stable=True).indices[: most[g]].tolist()
            for a in order:
                taken[g, a] = metric[g, a] > 0
        for a in range(N):
            if taken[:, a].sum() > 1:
                of_pickers = torch.where(taken[:, a], overlap[:, a], -1.0)
                taken[:, a] = False
                taken[int((of_pickers if reaches else overlap[:, a]).argmax()), a] = True
        if topk2 is not None and topk2 != topk:
            for g in range(len(own)):
                order = (metric[g] * taken[g]).sort(descending=True, stable=True).indices[topk2:]
                taken[g, order] = False
        for g, row in enumerate(own):
            best, widest = (metric[g] * taken[g]).max(), (overlap[g].clamp(min=0) * taken[g]).max()
            for a in taken[g].nonzero().flatten().tolist():
                target[b, a, int(rows[row, 1])] = metric[g, a] * widest / (best + 1e-9)
                of[b, a], truth[b, a] = row, corners[g] / s[a]
    weight = target.sum(2)
    total = weight.sum().clamp(min=1)
    loss = bce(scores.transpose(1, 2), target)
    cls = (loss if class_weights is None else loss * class_weights).sum() / total
    box, side = boxes.sum() * 0, boxes.sum() * 0
    for b, a in (of >= 0).nonzero().tolist():
        box = box + weight[b, a] * (1 - ciou(pred[b, a], truth[b, a], taller)) / total
        x1, y1, x2, y2 = truth[b, a]
        t = torch.stack((middle[a, 0] - x1, middle[a, 1] - y1, x2 - middle[a, 0], y2 - middle[a, 1]))
        if reg_max > 1:
            t = t.clamp(0, reg_max - 1 - 0.01)
            found = torch.zeros((), dtype=torch.float64)
            for k in range(4):
                low, logits = int(t[k]), each[b, k, :, a]
                ce = logits.logsumexp(0) - logits
                found = found + (ce[low] * (low + 1 - t[k]) + ce[low + 1] * (t[k] - low)) / 4
        else:
            size = torch.tensor([W, H, W, H], dtype=torch.float64)
            found = ((d[b, :, a] * s[a] - t * s[a]) / size).abs().mean()
        side = side + weight[b, a] * found / total
    names = "box", "cls", "dfl" if reg_max > 1 else "l1"
    factor = 1 if reaches else B
    parts = {name: factor * gain * part for name, gain, part in zip(names, gains, (box, cls, side), strict=True)}
    return Found(parts, of, weight)


def plain_iou(p: Tensor, g: Tensor, eps: float) -> Tensor:
    """Of boxes cx, cy, w, h; no overlap unless both sides of it are above 0."""
    low = torch.maximum(p[..., :2] - p[..., 2:] / 2, g[..., :2] - g[..., 2:] / 2)
    high = torch.minimum(p[..., :2] + p[..., 2:] / 2, g[..., :2] + g[..., 2:] / 2)
    inter = (high - low).prod(-1) * (low < high).all(-1)
    return inter / (p[..., 2:].prod(-1) + g[..., 2:].prod(-1) - inter + eps)


def yolox(
    preds: list[Tensor],
    rows: Tensor,
    strides: Any,
    rule: str = "main",
    use_l1: bool = False,
    radius: float | None = None,
) -> Found:
    """preds [B, 5 + C, H, W]."""
    radius = {"main": 1.5, "0.3.0": 2.5}[rule] if radius is None else radius
    maps = [tuple(pred.shape[2:]) for pred in preds]
    H, W = maps[0][0] * strides[0], maps[0][1] * strides[0]
    raw = torch.cat([pred.flatten(2) for pred in preds], 2).transpose(1, 2)  # [B, N, 5 + C]
    (B, N, channels), (x, y, s) = raw.shape, cells(maps, strides)
    corner = torch.stack((x, y), 1)
    pred = torch.cat(((raw[..., :2] + corner) * s[:, None], raw[..., 2:4].exp() * s[:, None]), 2)
    of, score = torch.full((B, N), -1), torch.zeros(B, N, dtype=torch.float64)
    labels = [int(label) for label in rows[:, 1]]
    px, py = ((x + 0.5) * s, (y + 0.5) * s)
    for b in range(B):
        own, xywh = own_rows(rows, b, W, H)
        if not own:
            continue
        G = len(own)
        near, inbox = torch.zeros(G, N, dtype=torch.bool), torch.zeros(G, N, dtype=torch.bool)
        for g, (cx, cy, w, h) in enumerate(xywh):
            near[g] = ((px - cx).abs() < radius * s) & ((py - cy).abs() < radius * s)
            inbox[g] = ((px - cx).abs() < w / 2) & ((py - cy).abs() < h / 2)
        good = near if rule == "main" else near & inbox
        may = (near if rule == "main" else near | inbox).any(0)
        candidates = may.nonzero().flatten()
        q = (raw[b, :, 5:].sigmoid() * raw[b, :, 4:5].sigmoid()).sqrt().detach()
        cost, iou = torch.full((G, N), math.inf, dtype=torch.float64), torch.zeros(G, N, dtype=torch.float64)
        for g in range(G):
            one_hot = torch.zeros(channels - 5, dtype=torch.float64)
            one_hot[labels[own[g]]] = 1
            entropy = torch.nn.functional.binary_cross_entropy(q, one_hot.expand(N, -1), reduction="none").sum(1)
            iou[g] = plain_iou(pred[b].detach(), xywh[g], 0.0)
            penalty = {"main": 1e6, "0.3.0": 1e5}[rule]
            full = entropy + 3 * -(iou[g] + 1e-8).log() + penalty * ~good[g]
            cost[g] = torch.where(may, full, cost[g])
        taken = torch.zeros(G, N, dtype=torch.bool)
        for g in range(G):
            largest = sorted(iou[g, candidates].tolist(), reverse=True)[:10]
            count = max(1, int(sum(largest)))
            taken[g, cost[g].sort(stable=True).indices[:count]] = True
        for a in range(N):
            if taken[:, a].sum() > 1:
                taken[:, a] = False
                taken[int(cost[:, a].argmin()), a] = True
            for g in taken[:, a].nonzero().flatten().tolist():
                of[b, a], score[b, a] = own[g], iou[g, a]
    n = max(1, int((of >= 0).sum()))
    obj = bce(raw[..., 4], (of >= 0).double()).sum() / n
    box, cls, l1 = raw.sum() * 0, raw.sum() * 0, raw.sum() * 0
    size = torch.tensor([W, H, W, H], dtype=torch.float64)
    for b, a in (of >= 0).nonzero().tolist():
        true = rows[of[b, a], 2:].double() * size
        box = box + 5 * (1 - plain_iou(pred[b, a], true, 1e-16) ** 2) / n
        one_hot = torch.zeros(channels - 5, dtype=torch.float64)
        one_hot[labels[of[b, a]]] = score[b, a]
        cls = cls + bce(raw[b, a, 5:], one_hot).sum() / n
        t = torch.cat((true[:2] / s[a] - corner[a], (true[2:] / s[a] + 1e-8).log()))
        l1 = l1 + (raw[b, a, :4] - t).abs().sum() / n * use_l1
    return Found({"box": box, "obj": obj, "cls": cls, "l1": l1}, of, score)


# ---- predictions and objects to try these on


def some_rows(
    seed: int,
    images: int,
    objects: int,
    classes: int,
    smallest: float = 0.05,
    largest: float = 0.6,
    empty: bool = False,
) -> Tensor:
    """[M, 6] float32, some of them reaching past the border; no object in the last image if ``empty``."""
    gen = torch.Generator().manual_seed(seed)
    n = objects * (images - empty)
    side = smallest * (largest / smallest) ** torch.rand(n, 2, generator=gen)
    image = torch.arange(images - empty).repeat_interleave(objects)[torch.randperm(n, generator=gen)]
    label = torch.randint(classes, (n,), generator=gen)
    return torch.cat((image[:, None], label[:, None], torch.rand(n, 2, generator=gen), side), 1).float()


def near_boxes(rows: Tensor, maps: Any, strides: Any, images: int, seed: int, noise: float = 0.3) -> Tensor:
    """[B, N, 4]: for each cell left, upper, right, lower distances in cells that make roughly the nearest object."""
    gen = torch.Generator().manual_seed(seed)
    x, y, s = cells(maps, strides)
    W, H = maps[0][1] * strides[0], maps[0][0] * strides[0]
    found = 3 * torch.rand(images, len(x), 4, generator=gen, dtype=torch.float64)
    for b in range(images):
        own, xywh = own_rows(rows, b, W, H)
        if not own:
            continue
        px, py = (x + 0.5) * s, (y + 0.5) * s
        apart = (px[:, None] - xywh[:, 0]).abs() / xywh[:, 2] + (py[:, None] - xywh[:, 1]).abs() / xywh[:, 3]
        cx, cy, w, h = xywh[(apart + 0.5 * torch.rand(apart.shape, generator=gen)).argmin(1)].unbind(1)
        sides = torch.stack((px - cx + w / 2, py - cy + h / 2, cx + w / 2 - px, cy + h / 2 - py), 1) / s[:, None]
        found[b] = sides + noise * torch.randn(sides.shape, generator=gen, dtype=torch.float64) * (w / s)[
            :, None
        ].clamp(max=2)
    return found


def v8_predictions(
    rows: Tensor, maps: Any, strides: Any, images: int, classes: int, reg_max: int, seed: int
) -> tuple[Tensor, Tensor]:
    """boxes [B, 4 * reg_max, N] and scores [B, C, N], float64 with values of float32."""
    gen = torch.Generator().manual_seed(seed + 1)
    sides = near_boxes(rows, maps, strides, images, seed)
    N = sides.shape[1]
    scores = torch.randn(images, classes, N, generator=gen, dtype=torch.float64) - 1
    if reg_max == 1:
        boxes = sides.transpose(1, 2)
    else:
        bins = torch.arange(reg_max, dtype=torch.float64)
        boxes = -((sides[..., None] - bins) ** 2) + 0.3 * torch.randn(
            images, N, 4, reg_max, generator=gen, dtype=torch.float64
        )
        boxes = boxes.clamp(min=-20).flatten(2).transpose(1, 2)
    return boxes.float().double(), scores.float().double()


def yolox_predictions(rows: Tensor, maps: Any, strides: Any, images: int, classes: int, seed: int) -> list[Tensor]:
    """[B, 5 + C, H, W], one a level, float64 with values of float32."""
    gen = torch.Generator().manual_seed(seed + 1)
    left, top, right, bottom = near_boxes(rows, maps, strides, images, seed).unbind(2)
    centre = 0.5 + (right - left) / 2, 0.5 + (bottom - top) / 2
    sides = (side.abs().clamp(min=0.05).log() for side in (left + right, top + bottom))
    box = torch.stack((*centre, *sides), 1)
    rest = torch.randn(images, 1 + classes, box.shape[2], generator=gen, dtype=torch.float64)
    flat = torch.cat((box, rest), 1).float().double()
    sizes = [h * w for h, w in maps]
    return [part.unflatten(2, sides) for part, sides in zip(flat.split(sizes, 2), maps, strict=True)]
