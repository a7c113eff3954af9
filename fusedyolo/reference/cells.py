"""Losses of squared errors on cells that hold one object each: the twin of ``kernels/cells.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import CellHead
from .primitives import read_weighed, weighed
from .rows import read_rows
from .terms.box import boxes_of_sizes, similarity

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


def cell_loss(
    pred: Tensor,
    rows: Tensor,
    head: CellHead,
    class_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of predictions, in either form of :func:`cell_views`, against target rows [M, 6]; computed in float64 for
    float64 predictions, else in float32.

    ``class_weights`` [C] multiply the class terms. Of the rows in one cell the first counts. Every term is a gain times
    a squared error; which box answers for an object, and its IoU where that is a target, are constants.
    ``row_weights`` [M] are those of the rows: the terms of the box that answers and of the classes are multiplied by
    them. Returns the total, differentiable by ``pred``; its parts (box, confidence, class), detached; and counts,
    int32, of cells with an object and of invalid rows.
    """
    dtype = torch.float64 if pred.dtype == torch.float64 else torch.float32
    boxes, confidence, scores = cell_views(pred.to(dtype), head)
    found = cell_assign(boxes.detach(), rows, head, row_weights)
    has, mine, offset, size = found.has, found.mine, found.offset, found.size
    boxes = torch.where(has[..., None, None], boxes, 0.0)  # no NaN from cells that are not asked

    target = torch.cat((offset, size.sqrt() if head.root else size), -1)[..., None, :]
    own = torch.where(mine[..., None], _read(boxes, head.box_gain, found.weight), target)
    box = weighed(_total(_weighed(own.sub(target).square(), found.weight), head), head.box_gain)
    gain = torch.where(mine, _weighed(torch.full_like(found.answer, head.obj_gain), found.weight), head.noobj_gain)
    if head.other_gain is not None:
        gain = torch.where(has[..., None] & ~mine, head.other_gain, gain)
    if found.hidden is not None:
        gain = torch.where(found.hidden[..., None] & ~mine, 0.0, gain)
    off = read_weighed(confidence, gain) - torch.where(gain == 0, 0.0, found.answer)
    obj = _total(weighed(off.square(), gain), head)
    one_hot = (torch.arange(head.num_classes, device=pred.device) == found.label[..., None]).to(dtype)
    own = torch.where(has[..., None], _read(scores, head.cls_gain, found.weight), one_hot)
    if class_weights is not None:
        class_weights = class_weights.to(dtype)
        own = read_weighed(own, class_weights)
    scores_off = own.sub(one_hot).square()
    scores_off = scores_off if class_weights is None else weighed(scores_off, class_weights)
    cls = weighed(_total(_weighed(scores_off, found.weight), head), head.cls_gain)

    # a NaN among the boxes that were compared shows in the total, whether or not that box answers
    unknown = boxes.detach().isnan()
    unknown = unknown.flatten(1).any(1) if head.by_image else unknown.any()
    box = box + torch.zeros_like(box.detach()).masked_fill(unknown, math.nan)
    parts = torch.stack((box, obj, cls))
    counts = torch.stack((has.sum(), found.invalid)).to(torch.int32)
    return parts.sum(0), parts.detach(), counts


def _total(values: Tensor, head: CellHead) -> Tensor:
    """The sum of [B, ...], or [B] those of each image."""
    return values.flatten(1).sum(1) if head.by_image else values.sum()


def _weighed(values: Tensor, weight: Tensor | None) -> Tensor:
    """Values [B, S, S, ...] of cells, times their weight [B, S, S]."""
    return values if weight is None else weighed(values, weight.view(*weight.shape, *[1] * (values.ndim - 3)))


def _read(raw: Tensor, gain: float, weight: Tensor | None) -> Tensor:
    """Raw numbers [B, S, S, ...] of cells that have a weight [B, S, S], see :func:`read_weighed`."""
    raw = read_weighed(raw, gain)
    return raw if weight is None else read_weighed(raw, weight.view(*weight.shape, *[1] * (raw.ndim - 3)))


@dataclass(frozen=True)
class CellAnswers:
    """Which box of which cell answers for which row; what a cell without an object holds is of no use."""

    valid: Tensor  # [M] bool: objects
    invalid: Tensor  # 0-dim int64: rows that are neither objects nor regions
    row: Tensor  # [B, S, S] int64: the first valid row in the cell, M where there is none
    has: Tensor  # [B, S, S] bool
    label: Tensor  # [B, S, S] int64
    offset: Tensor  # [B, S, S, 2]: its centre from the cell's origin, in cells
    size: Tensor  # [B, S, S, 2]: relative to the image
    mine: Tensor  # [B, S, S, n] bool: the box that answers for it
    answer: Tensor  # [B, S, S, n]: the target of confidence
    weight: Tensor | None  # [B, S, S] of its row, None where rows have none
    hidden: Tensor | None  # [B, S, S] bool: the middle lies in an ignored region; likewise


def cell_assign(boxes: Tensor, rows: Tensor, head: CellHead, row_weights: Tensor | None = None) -> CellAnswers:
    """The boxes [B, S, S, n, 4] of a prediction, which take no gradient, against target rows [M, 6]."""
    batch_size, S, M = boxes.shape[0], head.grid_size, rows.shape[0]
    read = read_rows(rows, head, batch_size, row_weights)
    x, y = (read.boxes[:, :2] * S).long().unbind(1)  # in float32: below 1 times S is below S
    slot = torch.where(read.valid, (read.image * S + y) * S + x, batch_size * S * S)
    order = torch.arange(M, device=rows.device)
    first = order.new_full((batch_size * S * S + 1,), M).scatter_reduce(0, slot, order, "amin")[:-1]
    row = first.view(batch_size, S, S)
    has = row < M
    label = torch.cat((read.label, read.label.new_zeros(1)))[row]
    centre, size = torch.cat((read.boxes, read.boxes.new_zeros(1, 4))).to(boxes.dtype)[row].split(2, -1)
    cell = torch.arange(S, device=rows.device)
    offset = centre * S - torch.stack(torch.meshgrid(cell, cell, indexing="xy"), -1)

    overlap, distance = _overlap(torch.where(has[..., None, None], boxes, 0.0), offset, size, head)
    chosen = overlap.argmax(-1)  # the first of equals
    if head.nearest:
        chosen = torch.where(overlap.amax(-1) > 0, chosen, distance.argmin(-1))
    mine = (torch.arange(head.num_boxes, device=rows.device) == chosen[..., None]) & has[..., None]
    answer = torch.where(mine, overlap if head.rescore else torch.ones_like(overlap), 0.0)
    weight = hidden = None
    if read.weight is not None and read.regions is not None:
        weight = torch.cat((read.weight, read.weight.new_zeros(1))).to(boxes.dtype)[row]
        middle = torch.arange(S, device=rows.device, dtype=torch.float32) + 0.5
        middles = torch.stack(torch.meshgrid(middle, middle, indexing="xy"), -1).flatten(0, 1)
        hidden = read.regions.scaled(S, S).of_points(middles, batch_size).view(batch_size, S, S)
    return CellAnswers(read.valid, read.invalid, row, has, label, offset, size, mine, answer, weight, hidden)


def _overlap(boxes: Tensor, offset: Tensor, size: Tensor, head: CellHead) -> tuple[Tensor, Tensor]:
    """IoU [B, S, S, n] of predicted boxes and their cell's object, 0 for a NaN, and the square of their distance, of
    centres and sizes, infinite for a NaN. Lengths are in images.
    """
    p = boxes[..., 2:].square() if head.root else boxes[..., 2:]
    p, g = p.clamp(-LARGEST_SIZE, LARGEST_SIZE), size[..., None, :].expand_as(p)
    distance = (offset[..., None, :] - boxes[..., :2]) / head.grid_size
    overlap = similarity(*boxes_of_sizes(p, g, distance))
    away = distance.square().sum(-1) + (p - g).square().sum(-1)
    return torch.where(overlap > 0, overlap, 0.0), torch.where(away.isnan(), math.inf, away)
