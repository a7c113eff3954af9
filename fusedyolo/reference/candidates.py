"""Who may be assigned to whom on anchor grids: the twin of ``kernels/assign.py`` and ``kernels/grid/assign.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import GridHead
from .overlap import area, corners_of, iou_of_areas
from .pairs import PairIoU
from .primitives import constants
from .rows import Rows

NEIGHBOURS = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))
"""Of the ratio assigner: what is taken off a centre, times its reach, for its own cell and the left, upper, right,
lower.
"""


def neighbour_reach(head: GridHead) -> float:
    """Cells within which a centre is from the neighbours that it takes; 0 where it takes none."""
    return {0: 0.0, 2: 0.5, 4: 1.0}[head.neighbours] if head.assigner == "ratio" else 0.0


@dataclass(frozen=True)
class Candidates:
    """Who may be assigned to whom on one level: R pairs of a row and a prediction, in the order in which they count.

    ``slot`` is the prediction's flat index by (image, anchor, y, x), N = B * A * H * W where there is no pair.
    """

    row: Tensor  # [R] int64
    slot: Tensor  # [R] int64
    ignored: Tensor | None = None  # [N] bool: neither positive nor negative


def assign(
    rows: Rows, head: GridHead, level: int, maps: Sequence[tuple[int, int]], batch_size: int, dtype: torch.dtype
) -> Candidates:
    """Candidates of one level; ``maps`` holds (H, W) for each level.

    Shapes are compared in ``dtype``, the cell is found in float32. Ties: of equal anchors, or rows, the first is best;
    an IoU or ratio equal to its threshold does not pass it.
    """
    own, (H, W) = head.levels[level], maps[level]
    if head.assigner == "iou_band":
        return _band(rows, head, level, (H, W), batch_size, dtype)
    image = constants((W * head.strides[level], H * head.strides[level]), rows.boxes)
    size = rows.boxes[:, None, 2:].to(dtype) * image
    if head.assigner == "ratio":
        ratio = size / anchors_of(head, own, size)
        fits = torch.maximum(ratio, 1 / ratio).amax(-1) < head.anchor_t  # [M, A]
    elif head.assigner == "shape_iou":
        fits = _shape_iou(size, anchors_of(head, own, size)) > head.iou_thresh
    else:
        fits = _best_anchor(size, head, own)
    fits = fits & rows.valid[:, None]

    centre = rows.boxes[:, :2] * constants((W, H), rows.boxes)  # in float32, as every peer does
    reach = neighbour_reach(head)
    kinds = NEIGHBOURS if reach else NEIGHBOURS[:1]
    far = constants((W, H), rows.boxes) - centre
    before, behind = (centre % 1 < reach) & (centre > 1), (far % 1 < reach) & (far > 1)
    emitted = torch.stack((torch.ones_like(rows.valid), *before.unbind(1), *behind.unbind(1)), 0)[: len(kinds)]
    off = constants(kinds, rows.boxes) * reach
    x, y = (centre - off[:, None]).long().unbind(-1)  # [K, M]
    x, y = x.clamp(0, W - 1), y.clamp(0, H - 1)

    anchor = torch.arange(len(own), device=x.device)[:, None]
    slot = ((rows.image * len(own) + anchor) * H + y[:, None]) * W + x[:, None]  # [K, A, M]
    slot = torch.where(fits.T & emitted[:, None], slot, batch_size * len(own) * H * W)
    row = torch.arange(len(centre), device=x.device).expand(slot.shape)
    return Candidates(row.flatten(), slot.flatten())


def level_anchors(head: GridHead, level: int, like: Tensor) -> Tensor:
    """[A, 2] width and height of the anchors of a level, in pixels."""
    return anchors_of(head, head.levels[level], like)


def anchors_of(head: GridHead, own: Sequence[int], like: Tensor) -> Tensor:
    """[len(own), 2] width and height of anchors."""
    return constants([head.anchors[t] for t in own], like)


def _shape_iou(size: Tensor, anchors: Tensor) -> Tensor:
    """[M, A] of rows of ``size`` [M, 1, 2] and ``anchors`` [A, 2] that share a centre."""
    return iou_of_areas(area(torch.minimum(size, anchors)), area(size), area(anchors))[0]


def _best_anchor(size: Tensor, head: GridHead, own: Sequence[int]) -> Tensor:
    """[M, A]: whether an anchor of the level is the best for a row of ``size`` [M, 1, 2], or good enough."""
    pool = own if head.per_level else range(len(head.anchors))
    shape_iou = _shape_iou(size, anchors_of(head, pool, size))
    best = shape_iou.argmax(1, keepdim=True)
    fits = (torch.arange(len(pool), device=size.device) == best) & (shape_iou > 0)
    if head.iou_thresh < 1:
        fits = fits | (shape_iou > head.iou_thresh)
    return torch.stack([fits[:, pool.index(t)] for t in own], 1)


def _band(
    rows: Rows, head: GridHead, level: int, size: tuple[int, int], batch_size: int, dtype: torch.dtype
) -> Candidates:
    """Every prediction against the row that its anchor, at the middle of its cell, overlaps most."""
    (H, W), own, stride = size, head.levels[level], head.strides[level]
    boxes = rows.boxes.to(dtype)
    x, y = torch.arange(W, device=boxes.device), torch.arange(H, device=boxes.device)
    centre = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).to(dtype) * stride + 0.5 * stride
    sides = anchors_of(head, own, boxes)[:, None, None].expand(-1, H, W, -1)
    pairs = pairs_with(centre.expand_as(sides), sides, boxes * constants((W, H, W, H), boxes) * stride, rows)
    best, match = pairs.matches(batch_size, of_rows=False, keep=False)
    positive = best > head.band[1]
    index = torch.arange(best.numel(), device=best.device)
    ignored = ~positive & (best >= head.band[0])
    if len(boxes) == 0:  # a candidate must name a row
        return Candidates(index[:0], index[:0], ignored.flatten())
    slot = torch.where(positive.flatten(), index, best.numel())
    return Candidates(torch.where(positive, match, 0).flatten(), slot, ignored.flatten())


def pairs_with(centre: Tensor, size: Tensor, boxes: Tensor, rows: Rows) -> PairIoU:
    """Pairs of rows with predictions, or anchors, [A, H, W, 2] for all images or [B, A, H, W, 2]; ``boxes`` [M, 4] are
    the rows'; all by centre and size in pixels.
    """
    shape = (-1, math.prod(centre.shape[-4:-1]))
    edges, true_edges = corners_of(centre, size).reshape(*shape, 4), corners_of(boxes[:, :2], boxes[:, 2:])
    return PairIoU(edges, area(size).reshape(shape), true_edges, area(boxes[:, 2:]), rows)
