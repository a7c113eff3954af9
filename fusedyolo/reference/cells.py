"""Losses of squared errors on cells that hold one object each: the twin of ``kernels/cells.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..heads import CellHead
from .terms import _area, _iou, _pair

LARGEST_SIZE = 2.0**60  # of a predicted box, in images: its square stays finite in float32


def cell_views(pred: Tensor, head: CellHead) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``[B, S, S, n, 4]``, confidences ``[B, S, S, n]`` and class scores ``[B, S, S, C]`` as views.

    ``pred`` is ``[B, S, S, 5n + C]``, a cell's channels n times x, y, a, b, confidence and then its class scores; or
    darknet's ``[B, S * S * (5n + C)]``: all class scores, all confidences, all boxes, each by cell, row by row.
    """
    S, n, C = head.grid_size, head.num_boxes, head.num_classes
    if pred.ndim == 4:
        boxes = pred[..., : 5 * n].unflatten(-1, (n, 5))
        return boxes[..., :4], boxes[..., 4], pred[..., 5 * n :]
    scores, cells = S * S * C, S * S * n
    return (
        pred[:, scores + cells :].unflatten(1, (S, S, n, 4)),
        pred[:, scores : scores + cells].unflatten(1, (S, S, n)),
        pred[:, :scores].unflatten(1, (S, S, C)),
    )


def cell_loss(pred: Tensor, rows: Tensor, head: CellHead) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of predictions, in either form of :func:`cell_views`, against target rows [M, 6]; computed in float64 for
    float64 predictions, else in float32.

    Of the rows in one cell the first counts. Every term is a gain times a squared error; which box answers for an
    object, and its IoU where that is a target, are constants. Returns the total, differentiable by ``pred``; its parts
    (box, confidence, class), detached; and counts, int32, of cells with an object and of invalid rows.
    """
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    boxes, confidence, scores = cell_views(pred.to(dtype), head)
    row, valid = _first_rows(rows, head, pred.shape[0])
    has = row[..., 0] >= 0
    label, centre, size = row[..., 1].long(), row[..., 2:4].to(dtype), row[..., 4:].to(dtype)
    cell = torch.arange(head.grid_size, device=pred.device)
    origin = torch.stack(torch.meshgrid(cell, cell, indexing="xy"), -1)
    offset = centre * head.grid_size - origin

    boxes = torch.where(has[..., None, None], boxes, 0.0)  # no NaN from cells that are not asked
    with torch.no_grad():
        overlap, distance = _overlap(boxes, offset, size, head)
        chosen = overlap.argmax(-1)  # the first of equals
        if head.nearest:
            chosen = torch.where(overlap.amax(-1) > 0, chosen, distance.argmin(-1))
        mine = (torch.arange(head.num_boxes, device=pred.device) == chosen[..., None]) & has[..., None]
        answer = overlap if head.rescore else torch.ones_like(overlap)

    target = torch.cat((offset, size.sqrt() if head.root else size), -1)[..., None, :]
    box = head.box_gain * torch.where(mine[..., None], boxes, target).sub(target).square().sum()
    gain = torch.where(mine, torch.full_like(overlap, head.obj_gain), head.noobj_gain)
    obj = (gain * (confidence - torch.where(mine, answer, 0.0)).square()).sum()
    one_hot = (torch.arange(head.num_classes, device=pred.device) == label[..., None]).to(dtype)
    cls = head.cls_gain * torch.where(has[..., None], scores, one_hot).sub(one_hot).square().sum()

    # a NaN among the boxes that were compared shows in the total, whether or not that box answers
    box = box + torch.zeros_like(box.detach()).masked_fill(boxes.detach().isnan().any(), math.nan)
    parts = torch.stack((box, obj, cls))
    counts = torch.stack((has.sum(), (~valid).sum())).to(torch.int32)
    return parts.sum(), parts.detach(), counts


def _first_rows(rows: Tensor, head: CellHead, batch_size: int) -> tuple[Tensor, Tensor]:
    """The first valid row [B, S, S, 6] in each cell, of image -1 where there is none; and which rows [M] are valid."""
    image, label, cx, cy, w, h = rows.unbind(1)
    valid = rows.isfinite().all(1) & (w > 0) & (h > 0)
    valid = valid & (image >= 0) & (image < batch_size) & (label >= 0) & (label < head.num_classes)
    valid = valid & (cx >= 0) & (cx < 1) & (cy >= 0) & (cy < 1)
    S, M = head.grid_size, rows.shape[0]
    image, _, cx, cy, _, _ = torch.where(valid[:, None], rows, 0.0).unbind(1)
    cell = (image.long() * S + (cy * S).long()) * S + (cx * S).long()  # in float32: below 1 times S is below S
    slot = torch.where(valid, cell, batch_size * S * S)
    order = torch.arange(M, device=rows.device)
    first = order.new_full((batch_size * S * S + 1,), M).scatter_reduce(0, slot, order, "amin")[:-1]
    none = torch.cat((rows.new_full((1, 1), -1.0), rows.new_zeros(1, 5)), 1)
    return torch.cat((rows, none))[first].unflatten(0, (batch_size, S, S)), valid


def _overlap(boxes: Tensor, offset: Tensor, size: Tensor, head: CellHead) -> tuple[Tensor, Tensor]:
    """IoU [B, S, S, n] of predicted boxes and their cell's object, 0 for a NaN, and the square of their distance, of
    centres and sizes, infinite for a NaN. Lengths are in images.
    """
    p = boxes[..., 2:].square() if head.root else boxes[..., 2:]
    p, g = p.clamp(-LARGEST_SIZE, LARGEST_SIZE), size[..., None, :].expand_as(p)
    distance = (offset[..., None, :] - boxes[..., :2]) / head.grid_size
    # from the centre of the prediction, so that a tiny box keeps its sides
    pair = _pair(torch.cat((-p / 2, p / 2), -1), torch.cat((distance - g / 2, distance + g / 2), -1), 0.0)
    overlap, _ = _iou(_area(pair.overlap), _area(pair.p), _area(pair.g), pair.eps)
    away = distance.square().sum(-1) + (p - g).square().sum(-1)
    return torch.where(overlap > 0, overlap, 0.0), torch.where(away.isnan(), math.inf, away)
