"""The contract of ``GridHead`` once more: one object, one prediction at a time, in Python loops on float64 scalars.

Slow, and written from the text and from what the peers are said to compute, without looking at either backend: what
they are compared with. Only gradients come from autograd. Boxes are (centre x, centre y, width, height), never corners.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from formulas import ZERO, box_term, class_terms, decoded, label_term, offset_term, plain_iou
from torch import Tensor

from fusedyolo.heads import GridHead

Place = tuple[int, ...]  # image, anchor of the level, y, x
Pairs = list[tuple[Place, int]]  # predictions, each with a row


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


def is_valid(row: list[float], batch: int, head: GridHead) -> bool:
    image, label, cx, cy, w, h = row
    if not all(math.isfinite(value) for value in row):
        return False
    inside = all(0 <= c < 1 or (head.edge and c == 1) for c in (cx, cy))
    return inside and 0 <= image < batch and 0 <= label < head.num_classes and w > 0 and h > 0


# ---- assignment


def winners(w: float, h: float, head: GridHead, level: int) -> list[int]:
    """Anchors of a level that a box of w x h pixels is assigned to, as indices among those of the level."""
    own = head.levels[level]
    if head.assigner == "ratio":
        sides = [(w / head.anchors[t][0], h / head.anchors[t][1]) for t in own]
        return [a for a, ratios in enumerate(sides) if all(max(r, 1 / r) < head.anchor_t for r in ratios)]
    pool = list(own) if head.per_level or head.assigner == "shape_iou" else list(range(len(head.anchors)))
    ious = []
    for t in pool:
        aw, ah = head.anchors[t]
        inter = min(w, aw) * min(h, ah)
        ious.append(inter / (w * h + aw * ah - inter))
    if head.assigner == "shape_iou":
        return [a for a, value in enumerate(ious) if value > head.iou_thresh]
    best = ious.index(max(ious))
    taken = [pool[best]] if ious[best] > 0 else []
    if head.iou_thresh < 1:
        taken += [t for n, t in enumerate(pool) if n != best and ious[n] > head.iou_thresh]
    return [a for a, t in enumerate(own) if t in taken]


def cells_of(row: list[float], W: int, H: int, neighbours: int) -> list[tuple[int, int] | None]:
    """(y, x) of the cell of a centre and, with 2 or 4 neighbours, of the left, upper, right and lower one, with 2 where
    it is near these.

    All in float32, as the peers have it.
    """
    gx, gy = np.float32(row[2]) * np.float32(W), np.float32(row[3]) * np.float32(H)
    off = np.float32(0.5 if neighbours == 2 else 1)

    def near(border: np.float32) -> bool:
        return bool((border % 1 < 0.5 or neighbours == 4) and border > 1)

    kinds = [(gx, gy, True)]
    if neighbours:
        kinds.append((gx - off, gy, near(gx)))
        kinds.append((gx, gy - off, near(gy)))
        kinds.append((gx + off, gy, near(np.float32(W) - gx)))
        kinds.append((gx, gy + off, near(np.float32(H) - gy)))
    return [(min(int(y), H - 1), min(int(x), W - 1)) if emitted else None for x, y, emitted in kinds]


def owners_by_band(
    listed: list[list[float]], valid: list[bool], head: GridHead, level: int, shape: tuple[int, ...], seen: Counter
) -> tuple[Pairs, set[Place]]:
    """Assigned predictions, each with its row, and those that are neither positive nor negative."""
    batch, anchors, H, W = shape
    stride = head.strides[level]
    owned: Pairs = []
    rows = [r for r in range(len(listed)) if valid[r]]
    left_out = set()
    for b, a, j, i in np.ndindex(batch, anchors, H, W):
        prior = ((i + 0.5) * stride, (j + 0.5) * stride, *head.anchors[head.levels[level][a]])
        best, owner = 0.0, -1
        for r in rows:
            _, _, cx, cy, w, h = listed[r]
            true = (cx * (W * stride), cy * (H * stride), w * (W * stride), h * (H * stride))
            overlap = plain_iou(prior, true) if int(listed[r][0]) == b else 0.0
            if overlap == best and owner >= 0:
                seen["equal overlaps"] += 1
            if overlap > best:
                best, owner = overlap, r
        if best > head.band[1]:
            owned.append(((b, a, j, i), owner))
        elif best >= head.band[0]:
            left_out.add((b, a, j, i))
    return owned, left_out


def pairs_of(
    listed: list[list[float]], valid: list[bool], head: GridHead, level: int, shape: tuple[int, ...], seen: Counter
) -> Pairs:
    """Assigned predictions and their rows, in the order in which they count."""
    _, anchors, H, W = shape
    stride = head.strides[level]
    rows = [r for r in range(len(listed)) if valid[r]]
    pairs: Pairs = []
    neighbours = head.neighbours if head.assigner == "ratio" else 0
    cells = {r: cells_of(listed[r], W, H, neighbours) for r in rows}
    fits = {r: winners(listed[r][4] * (W * stride), listed[r][5] * (H * stride), head, level) for r in rows}
    for kind in range(5 if neighbours else 1):
        for a in range(anchors):
            for r in rows:
                cell = cells[r][kind]
                if cell is not None and a in fits[r]:
                    pairs.append(((int(listed[r][0]), a, *cell), r))
                    seen["neighbour"] += kind > 0
                    seen["border of the image"] += listed[r][2] == 1 or listed[r][3] == 1
    return pairs


def pairs_by_cost(
    offered: list[Pairs], preds: list[Tensor], listed: list[list[float]], head: GridHead, seen: Counter
) -> list[Pairs]:
    """Of the predictions that rows offer on each level those that rows pick, each with the row that has it."""
    owners = [[-1] * len(pairs) for pairs in offered]
    height = preds[0].shape[2] * head.strides[0]  # of the image, by which widths are measured, too
    for b in range(preds[0].shape[0]):
        rows = [r for r, row in enumerate(listed) if is_valid(row, len(preds[0]), head) and int(row[0]) == b]
        offers = [(n, i) for n, pairs in enumerate(offered) for i, (at, _) in enumerate(pairs) if at[0] == b]
        costs, wanted = {}, Counter()
        for g in rows:
            pairs = [_pair(preds[n], n, offered[n][i][0], listed[g], height, head) for n, i in offers]
            costs[g] = dict(zip(offers, (cost for _, cost in pairs), strict=True))
            amount = max(1, int(sum(sorted((overlap for overlap, _ in pairs), reverse=True)[:10])))
            wanted.update((offer, g) for offer in sorted(offers, key=costs[g].get)[:amount])
            seen["several picks"] += amount > 1
        for offer in offers:
            who = [g for g in rows if (offer, g) in wanted]
            seen["picked by several"] += len(who) > 1
            if who:
                n, i = offer
                owners[n][i] = min(rows, key=lambda g: costs[g][offer]) if len(who) > 1 else who[0]
                seen["picked of another"] += owners[n][i] != offered[n][i][1]
    return [
        [(at, who) for (at, _), who in zip(pairs, own, strict=True) if who >= 0]
        for pairs, own in zip(offered, owners, strict=True)
    ]


def _pair(pred: Tensor, level: int, at: Place, row: list[float], height: float, head: GridHead) -> tuple[float, float]:
    """IoU of a prediction with a row, and what it costs it."""
    raw = pred[at].detach()
    stride, anchor = head.strides[level], head.anchors[head.levels[level][at[1]]]
    x, y, w, h = (float(value) for value in decoded(head.decode, list(raw[:4]), anchor, stride, head.scale_x_y[level]))
    true = tuple(value * height for value in row[2:])
    overlap = plain_iou((x + at[3] * stride, y + at[2] * stride, w, h), true)
    cost = -3 * math.log(overlap + 1e-8)
    for c, z in enumerate(raw[5:]):
        log_q = 0.5 * float(torch.nn.functional.logsigmoid(torch.stack((z, raw[4]))).sum())
        log_miss = math.log(-math.expm1(log_q)) if log_q < 0 else -100.0
        cost -= max(-100.0, log_q if c == int(row[1]) else log_miss)
    return overlap, cost


# ---- the loss


def loop_loss(preds: list[Tensor], rows: Tensor, head: GridHead, class_weights: Tensor | None = None) -> LoopLoss:
    """``preds`` are float64 ``[B, A, H, W, 5 + C]``."""
    out = LoopLoss()
    listed = [[float(value) for value in row] for row in rows]
    valid = [is_valid(row, preds[0].shape[0], head) for row in listed]
    out.invalid = valid.count(False)
    shapes = [tuple(pred.shape[:4]) for pred in preds]
    if head.assigner == "iou_band":
        answers = [owners_by_band(listed, valid, head, level, shape, out.seen) for level, shape in enumerate(shapes)]
    else:
        pairs = [pairs_of(listed, valid, head, level, shape, out.seen) for level, shape in enumerate(shapes)]
        if head.by_cost:
            pairs = pairs_by_cost(pairs, preds, listed, head, out.seen)
        answers = [(own, set()) for own in pairs]
    for level, pred in enumerate(preds):
        found = _level(pred, level, listed, answers[level], head, class_weights, out.seen)
        out.assigned += found.assigned
        out.box, out.obj, out.cls = out.box + found.box, out.obj + found.obj, out.cls + found.cls
    return out


def _level(
    pred: Tensor, level: int, listed: list[list[float]], answers: tuple[Pairs, set[Place]],
    head: GridHead, class_weights: Tensor | None, seen: Counter,
) -> LoopLoss:  # fmt: skip
    _, anchors, H, W, channels = pred.shape
    pairs, left_out = answers
    owned: dict[Place, list[int]] = {}
    for place, r in pairs:
        owned.setdefault(place, []).append(r)
    smooth = bool(head.smooth) and head.smooth[level]
    out = LoopLoss(assigned=len(owned), seen=seen)
    rows_used = objectness_used = 0
    scalars = pred.reshape(-1).unbind()
    for at in np.ndindex(*pred.shape[:4]):
        start = int(np.ravel_multi_index((*at, 0), pred.shape))
        one = _Prediction(list(scalars[start : start + channels]), at, (W, H), level, head, seen)
        if any(math.isnan(float(value.detach())) for value in one.raw[:4]):
            out.obj = out.obj + math.nan
        best = one.best_overlap([row for row in listed if is_valid(row, len(pred), head)])
        owners = owned.get(at, [])
        seen["shared"] += len(owners) > 1
        if head.shared == "last":
            owners = owners[-1:]
        named, owners = owners, owners[-1:] if head.shared == "merge" else owners
        rows_used += len(owners)

        gain, target = head.noobj_gain, 0.0
        if owners:
            weighed = class_weights is not None and not head.weigh_classes
            m = [float(class_weights[int(listed[r][1])]) if weighed else 1.0 for r in owners]
            out.cls = out.cls + one.class_loss([int(listed[r][1]) for r in named], class_weights)
            boxes = [one.box_loss(listed[r]) for r in owners]
            out.box = out.box + sum(w * box for w, box in zip(m, boxes, strict=True)) / one.pushed_up(listed, named)
            gain, target = head.obj_gain * m[-1], one.quality(listed[owners[-1]])
        elif head.prior_gain > 0:
            seen["prior"] += 1
            out.box = out.box + head.prior_gain * one.prior_loss()
        if smooth:
            gain, target = head.noobj_gain, best
            seen["smooth"] += best > 0
        elif not owners and (best > 0 or at in left_out):
            seen["ignored"] += best > 0
            seen["left out by the band"] += at in left_out
            continue
        objectness_used += 1
        out.obj = out.obj + gain * label_term(head.objectness, one.raw[4], target, head.obj_args)

    if head.mean_rows:
        out.box, out.cls = out.box / max(1, rows_used), out.cls / max(1, rows_used)
    balance = head.obj_balance[level] if head.obj_balance else 1.0
    if head.obj_mean == "cells":  # of one image: over the images it stays a sum
        balance /= anchors * H * W
    out.obj = float(np.float32(balance)) * out.obj
    if head.obj_mean == "used":
        out.obj = out.obj / max(1, objectness_used)
    return out


@dataclass
class _Prediction:
    raw: list[Tensor]
    at: Place
    cells: tuple[int, int]  # the map's width and height
    level: int
    head: GridHead
    seen: Counter

    def __post_init__(self) -> None:
        self.stride, self.scale = self.head.strides[self.level], self.head.scale_x_y[self.level]
        self.anchor = self.head.anchors[self.head.levels[self.level][self.at[1]]]
        self.image = (self.cells[0] * self.stride, self.cells[1] * self.stride)
        self.p = decoded(self.head.decode, self.raw, self.anchor, self.stride, self.scale)

    def similarity_loss(self, kind: str, args: tuple[float, ...], true: tuple[float, ...]) -> Tensor:
        """``true`` in pixels from the cell's origin."""
        unit = {"pixel": (1.0, 1.0), "cell": (self.stride, self.stride), "image": self.image}[self.head.unit]
        g = tuple(torch.tensor(value / u, dtype=torch.float64) for value, u in zip(true, unit * 2, strict=True))
        p = tuple(value / u for value, u in zip(self.p, unit * 2, strict=True))
        return box_term(kind, p, g, args, (self.image[0] / unit[0], self.image[1] / unit[1]))

    def true_box(self, row: list[float]) -> tuple[float, ...]:
        """In pixels, from the cell's origin."""
        _, _, j, i = self.at
        _, _, cx, cy, w, h = row
        x, y = (cx * self.cells[0] - i) * self.stride, (cy * self.cells[1] - j) * self.stride
        return x, y, w * self.image[0], h * self.image[1]

    def offset_loss(self, true: tuple[float, ...]) -> Tensor:
        axes = (
            offset_term(
                self.head.box,
                self.raw[i],
                self.raw[i + 2],
                true[i] / self.stride,
                math.log(true[i + 2] / self.anchor[i]),
                self.scale,
            )
            for i in (0, 1)
        )
        return sum(axes, ZERO)

    def box_loss(self, row: list[float]) -> Tensor:
        head, true = self.head, self.true_box(row)
        if head.box not in ("mse", "bce_mse"):
            return head.box_gain * self.similarity_loss(head.box, head.box_args, true)
        weight = 1 + head.area_weight * (1 - min(row[4] * row[5], head.area_cap))
        return head.box_gain * weight * self.offset_loss(true)

    def prior_loss(self) -> Tensor:
        middle = (self.stride / 2, self.stride / 2)
        if self.head.box in ("mse", "bce_mse"):
            return self.offset_loss((*middle, *self.anchor))
        return self.similarity_loss(self.head.box, self.head.box_args, (*middle, 0.0, 0.0))

    def quality(self, row: list[float]) -> float:
        """The objectness target that a row leaves."""
        if self.head.quality is None:
            return 1.0
        value = 1 - float(self.similarity_loss(self.head.quality, self.head.quality_args, self.true_box(row)).detach())
        self.seen["similarity below 0"] += value < 0
        return 1 - self.head.quality_ratio + self.head.quality_ratio * max(0.0, value)

    def class_targets(self, labels: list[int]) -> list[float]:
        pos, neg = self.head.class_targets
        return [pos if c in labels else neg for c in range(self.head.num_classes)]

    def pushed_up(self, listed: list[list[float]], owners: list[int]) -> int:
        """By how much the sum over owners of box losses is divided."""
        if not self.head.average_box:
            return 1
        targets = self.class_targets([int(listed[r][1]) for r in owners])
        pushed = [t > float(torch.sigmoid(z.detach())) for z, t in zip(self.raw[5:], targets, strict=True)]
        self.seen["averaged"] += sum(pushed) > 1
        return max(1, sum(pushed))

    def best_overlap(self, rows: list[list[float]]) -> float:
        """The largest IoU with a row of the image, if it is above the threshold and the classes let it pass, else 0."""
        b, _, j, i = self.at
        if self.head.ignore_thresh is None:
            return 0.0
        x, y, w, h = (float(value.detach()) for value in self.p)
        p = (x + i * self.stride, y + j * self.stride, w, h)
        image_w, image_h = self.image
        true = [(r[2] * image_w, r[3] * image_h, r[4] * image_w, r[5] * image_h) for r in rows if int(r[0]) == b]
        best = max((plain_iou(p, g) for g in true), default=0.0)
        if not best > self.head.ignore_thresh:
            return 0.0
        gate = self.head.class_gate
        if gate is not None and not any(float(z.detach()) > gate for z in self.raw[5:]):
            self.seen["kept by the gate"] += 1
            return 0.0
        return best

    def class_loss(self, labels: list[int], class_weights: Tensor | None) -> Tensor:
        head = self.head
        self.seen["repeated class"] += len(set(labels)) < len(labels)
        self.seen["several classes"] += len(set(labels)) > 1
        total = ZERO
        for group in [[label] for label in labels] if head.shared == "each" else [labels]:
            targets = torch.tensor(self.class_targets(group), dtype=torch.float64)
            logits = torch.stack(self.raw[5:])
            if class_weights is not None and head.weigh_classes:
                weights = class_weights.double()
                if head.label == "softmax_ce":
                    terms = class_terms(head.label, logits, weights * targets, head.label_args)
                else:
                    terms = weights * class_terms(head.label, logits, targets, head.label_args)
            else:
                terms = class_terms(head.label, logits, targets, head.label_args)
            for c, term in enumerate(terms):
                w = 1.0
                if class_weights is not None and not head.weigh_classes and c in group:
                    w = float(class_weights[c]) * (head.first_weight if c == group[0] and group.count(c) == 1 else 1.0)
                total = total + head.cls_gain * w * term
        return total
