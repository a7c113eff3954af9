"""Anchor-grid losses: the twin of ``kernels/grid.py``; ``docs/design.md``, "Contracts", says what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import GridHead
from .terms import BOX_TERMS, DECODE, LABEL_TERMS, OFFSET_TERMS, _area, _constants, _iou, bce

IGNORE_CHUNK = 1 << 18  # (row, prediction) pairs of the ignore test that are in memory at a time


# ---- assignment


@dataclass(frozen=True)
class Match:
    """Which predictions each of the M rows is assigned to, over all T = len(head.anchors) anchors."""

    valid: Tensor  # [M] bool
    image: Tensor  # [M] int64, some legal image where the row is invalid
    label: Tensor  # [M] int64, likewise
    assigned: Tensor  # [M, T] bool; False for an anchor of no level
    x: Tensor  # [M, T] int64, column of the row's cell on the map of the anchor's level
    y: Tensor  # [M, T] int64
    index: Tensor  # [M, T] int64 by (level, image, anchor of the level, y, x), meaningful where assigned


def assign(
    rows: Tensor, head: GridHead, maps: Sequence[tuple[int, int]], batch_size: int, dtype: torch.dtype = torch.float32
) -> Match:
    """Match target rows [M, 6] to anchors; ``maps`` holds (H, W) for each level.

    The IoU of widths and heights is taken in ``dtype``, the cell in float32. Ties: of equal anchors the first is best;
    an IoU equal to iou_thresh does not exceed it.
    """
    image, label, cx, cy, w, h = rows.unbind(1)
    valid = rows.isfinite().all(1) & (w > 0) & (h > 0)
    valid = valid & (image >= 0) & (image < batch_size) & (label >= 0) & (label < head.num_classes)
    valid = valid & (cx >= 0) & (cx < 1) & (cy >= 0) & (cy < 1)
    image, label, cx, cy, w, h = torch.where(valid[:, None], rows, 0.5).unbind(1)  # a legal row for the invalid ones
    image, label = image.long(), label.long()

    w = w.to(dtype)[:, None] * (maps[0][1] * head.strides[0])
    h = h.to(dtype)[:, None] * (maps[0][0] * head.strides[0])
    aw = _constants([a[0] for a in head.anchors], w)
    ah = _constants([a[1] for a in head.anchors], h)
    inter = torch.minimum(w, aw) * torch.minimum(h, ah)
    shape_iou = inter / (w * h + aw * ah - inter)
    best = shape_iou.argmax(1, keepdim=True)
    taken = (torch.arange(len(head.anchors), device=rows.device) == best) & (shape_iou > 0)
    if head.iou_thresh < 1:
        taken = taken | (shape_iou > head.iou_thresh)

    nowhere = torch.zeros_like(image)
    columns = [(nowhere.bool(), nowhere, nowhere, nowhere)] * len(head.anchors)
    start = 0
    for own, (H, W) in zip(head.levels, maps, strict=True):
        x, y = (cx * W).long(), (cy * H).long()  # a float32 below 1 times W rounds to less than W
        for a, t in enumerate(own):
            columns[t] = (taken[:, t] & valid, x, y, start + ((image * len(own) + a) * H + y) * W + x)
        start += batch_size * len(own) * H * W
    assigned, xs, ys, index = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return Match(valid, image, label, assigned, xs, ys, index)


# ---- the anchor-grid loss


def grid_view(pred: Tensor, anchors: int) -> Tensor:
    """``[B, A (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]`` as a view ``[B, A, H, W, 5 + C]``."""
    return pred if pred.ndim == 5 else pred.unflatten(1, (anchors, -1)).permute(0, 1, 3, 4, 2)


def grid_loss(
    preds: Sequence[Tensor], rows: Tensor, head: GridHead, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of prediction maps [B, A, H, W, 5 + C] against target rows [M, 6]; computed in float64 for float64 maps,
    else in float32.

    Returns the total, differentiable by ``preds``; its parts (box, objectness, classes), detached; and counts, int32,
    of assigned predictions and of invalid rows. ``class_weights`` [C] are the m of the contract.
    """
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in preds) else torch.float32
    match = assign(rows, head, [(p.shape[2], p.shape[3]) for p in preds], preds[0].shape[0], dtype)
    boxes = torch.where(match.valid[:, None], rows[:, 2:], 0.5).to(dtype)
    weights = None if class_weights is None else class_weights.detach().to(dtype)
    levels = [_level_loss(p.to(dtype), level, boxes, match, head, weights) for level, p in enumerate(preds)]
    parts = torch.stack([torch.stack(part).sum() for part in list(zip(*levels, strict=True))[:3]])
    positives = torch.stack([level[3] for level in levels]).sum()
    counts = torch.stack([positives, (~match.valid).sum()]).to(torch.int32)
    return parts.sum(), parts.detach(), counts


def _level_loss(
    pred: Tensor, level: int, boxes: Tensor, match: Match, head: GridHead, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Box, objectness and class loss of one map, and the number of its assigned predictions."""
    B, A, H, W, channels = pred.shape
    M, N, C = len(boxes), B * A * H * W, channels - 5
    # one column for each anchor of the level; stacked, since indexing by a list would copy the list to the device
    assigned, x, y = (
        torch.stack([table[:, t] for t in head.levels[level]], 1) for table in (match.assigned, match.x, match.y)
    )
    anchor = torch.arange(A, device=pred.device).expand(M, A)
    image, label = match.image[:, None].expand(M, A), match.label[:, None].expand(M, A)
    raw = torch.where(assigned[..., None], pred[image, anchor, y, x], 0.0)  # [M, A, 5 + C], no NaN from elsewhere
    m = boxes.new_ones(M) if weights is None else weights[match.label]

    # rows that share a prediction: the first one leads, that is, stands for the prediction; slot N is no prediction
    slot = torch.where(assigned, ((image * A + anchor) * H + y) * W + x, N)
    row = torch.arange(M, device=pred.device)[:, None].expand(M, A)
    first = row.new_full((N + 1,), M).scatter_reduce(0, slot.flatten(), row.flatten(), "amin")[slot]
    last = row.new_full((N + 1,), -1).scatter_reduce(0, slot.flatten(), row.flatten(), "amax")[slot]
    lead = assigned & (first == row)

    # classes, where a row leads
    logits = raw[..., 5:]
    count = raw.new_zeros(M, A, C).index_put((first, anchor, label), assigned.to(raw.dtype), accumulate=True)
    positive, negative = _constants(head.class_targets, raw)
    target = torch.where(count > 0, positive, negative)
    loss = LABEL_TERMS[head.label](logits, target, head.label_args)
    if weights is not None:
        only = (torch.arange(C, device=pred.device) == label[..., None]) & (count == 1)
        loss = loss * torch.where(count > 0, torch.where(only, head.first_weight * weights, weights), 1.0)
    cls = head.cls_gain * torch.where(lead[..., None], loss, 0.0).sum()

    # boxes, for each row
    anchors = torch.stack([_constants(head.anchors[t], raw) for t in head.levels[level]])
    cells = _constants((W, H), raw)
    offset = boxes[:, None, :2] * cells - torch.stack((x, y), -1)
    loss = m[:, None] * _box_loss(raw, offset, boxes[:, None, 2:], anchors, cells, level, head)
    if head.average_box:
        pushed_up = (target > logits.detach().sigmoid()).sum(-1)
        loss = loss / pushed_up.clamp(min=1)[first, anchor]
    box = head.box_gain * torch.where(assigned, loss, 0.0).sum()

    # objectness, for each prediction
    owner = torch.where(lead, slot, N).flatten()
    is_assigned = assigned.new_zeros(N + 1).scatter(0, owner, True)[:N].view(B, A, H, W)
    gain = raw.new_full((N + 1,), head.noobj_gain).scatter(0, owner, head.obj_gain * m[last].flatten())
    used = is_assigned | ~_ignored(pred.detach(), boxes, anchors, cells, level, match, head)
    loss = gain[:N].view(B, A, H, W) * bce(torch.where(used, pred[..., 4], 0.0), is_assigned.to(raw.dtype))
    obj = torch.where(used, loss, 0.0).sum()
    # a NaN box cannot be told to be ignored or not: the value says so, the gradients of other predictions stay clean
    unknown = pred[..., :4].detach().isnan().any()
    return box, obj + torch.zeros_like(obj.detach()).masked_fill(unknown, math.nan), cls, lead.sum()


def _box_loss(
    raw: Tensor, offset: Tensor, size: Tensor, anchors: Tensor, cells: Tensor, level: int, head: GridHead
) -> Tensor:
    """Box term [M, A] of each row at each anchor [A, 2] of a level, from raw logits [M, A, 5 + C].

    ``offset`` [M, A, 2] is the true centre from the cell's origin, in cells; ``size`` [M, 1, 2] the true size, relative
    to the image; ``cells`` the map's width and height.
    """
    a, b, stride, scale = raw[..., :2], raw[..., 2:4], head.strides[level], head.scale_x_y[level]
    image = cells * stride
    if head.box in OFFSET_TERMS:
        loss = OFFSET_TERMS[head.box](a, b, offset, (size * image / anchors).log(), scale).sum(-1)
        return loss * (1 + head.area_weight * (1 - _area(size)))
    centre, p = DECODE[head.decode](a, b, anchors, stride, scale)
    unit = image if head.relative else torch.ones_like(image)
    p, g, distance = p / unit, size * image / unit, (offset * stride - centre) / unit
    # from the centre of the prediction, so that a box of 1e-20 pixels keeps its sides
    return BOX_TERMS[head.box](
        torch.cat((-p / 2, p / 2), -1), torch.cat((distance - g / 2, distance + g / 2), -1), head.box_args
    )


def _ignored(
    pred: Tensor, boxes: Tensor, anchors: Tensor, cells: Tensor, level: int, match: Match, head: GridHead
) -> Tensor:
    """[B, A, H, W]: whether the IoU with some valid row of the image exceeds ignore_thresh, and the gate is passed."""
    B, A, H, W, _ = pred.shape
    stride, scale = head.strides[level], head.scale_x_y[level]
    x, y = torch.arange(W, device=pred.device), torch.arange(H, device=pred.device)
    origin = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).to(pred.dtype) * stride
    centre, size = DECODE[head.decode](pred[..., :2], pred[..., 2:4], anchors[:, None, None], stride, scale)
    centre = centre + origin
    edges = torch.cat((centre - size / 2, centre + size / 2, size), -1).view(B, A * H * W, 6)
    x1, y1, x2, y2, w, h = edges.permute(2, 0, 1).contiguous()
    true_centre, true_size = boxes[:, :2] * cells * stride, boxes[:, 2:] * cells * stride
    edges = torch.cat((true_centre - true_size / 2, true_centre + true_size / 2), -1)
    tx1, ty1, tx2, ty2 = edges[..., None].unbind(1)
    area, true_area = w * h, _area(true_size)[:, None]

    hits = torch.zeros(B, A * H * W, dtype=torch.int32, device=pred.device)
    chunk = max(1, IGNORE_CHUNK // (A * H * W))
    for start in range(0, len(boxes), chunk):
        now = slice(start, start + chunk)
        image = match.image[now]
        ow = torch.minimum(x2.index_select(0, image), tx2[now]) - torch.maximum(x1.index_select(0, image), tx1[now])
        oh = torch.minimum(y2.index_select(0, image), ty2[now]) - torch.maximum(y1.index_select(0, image), ty1[now])
        overlap, _ = _iou(ow.clamp(min=0) * oh.clamp(min=0), area.index_select(0, image), true_area[now])
        hits.index_add_(0, image, ((overlap > head.ignore_thresh) & match.valid[now, None]).int())
    ignored = (hits > 0).view(B, A, H, W)
    if head.class_gate is not None:
        ignored = ignored & (pred[..., 5:] > head.class_gate).any(-1)
    return ignored
