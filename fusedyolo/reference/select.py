"""From predictions to detections: decoding, scores and greedy NMS, the twin of ``kernels/select.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..heads import CellHead, GridHead
from ..terms import TERMS
from .cells import cell_views
from .grid import decode_map, grid_view
from .overlap import Corners, corner_areas, corners_of, iou

SCORE_BINS = 2048
LOWEST_BIN = 0x3F80 - (SCORE_BINS - 1)  # the highest holds 1.0, and what a detector without a sigmoid has above it
_LAST = (1 << 32) - 1


def decode_grid(preds: Sequence[Tensor], head: GridHead) -> tuple[Tensor, Tensor]:
    """Boxes [B, N, 4], x1 y1 x2 y2 in pixels, and scores [B, N, C] of prediction maps, in their dtype.

    Predictions come in the order level, anchor, y, x. The score is the sigmoid of objectness times that of the class,
    or times the softmax over classes where the head learns one.
    """
    boxes, scores = [], []
    for level, (pred, own) in enumerate(zip(preds, head.levels, strict=True)):
        raw = grid_view(pred, len(own))
        centre, size = decode_map(raw, level, head)
        boxes.append(corners_of(centre, size).flatten(1, 3))
        classes = raw[..., 5:].sigmoid() if TERMS[head.label].elementwise else raw[..., 5:].softmax(-1)
        scores.append((raw[..., 4:5].sigmoid() * classes).flatten(1, 3))
    return torch.cat(boxes, 1), torch.cat(scores, 1)


def decode_cells(pred: Tensor, head: CellHead) -> tuple[Tensor, Tensor]:
    """Boxes [B, S * S * n, 4], x1 y1 x2 y2 relative to the image, and scores [B, S * S * n, C], in the dtype of pred.

    Predictions come in the order y, x, box of the cell. The score is the confidence times that of the class, as it is.
    """
    raw, confidence, scores = cell_views(pred, head)
    cell = torch.arange(head.grid_size, device=pred.device)
    origin = torch.stack(torch.meshgrid(cell, cell, indexing="xy"), -1)[:, :, None]
    centre = (raw[..., :2] + origin) / head.grid_size
    size = raw[..., 2:] ** 2 if head.root else raw[..., 2:]
    return corners_of(centre, size).flatten(1, 3), (confidence[..., None] * scores[:, :, :, None]).flatten(1, 3)


def candidates(boxes: Tensor, scores: Tensor, conf: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The (prediction, class) pairs of boxes [B, N, 4] and scores [B, N, C] that score above ``conf``, best first.

    Returns scores [B, K], 0 where there is none, boxes [B, K, 4] and indices prediction * C + class [B, K] of the
    K = min(limit, N * C) best, equals in the order of their index. A box that is not finite is none. Where more than K
    qualify, scores are told apart by the upper half of their float32 alone, equals by their index.
    """
    C, flat = scores.shape[2], scores.flatten(1)
    index = torch.arange(flat.shape[1], device=flat.device)
    passing = (scores > conf) & boxes.isfinite().all(-1, keepdim=True)
    at_bin = ((flat.float().view(torch.int32) >> 16) - LOWEST_BIN).clamp(0, SCORE_BINS - 1).long()
    rank = torch.where(passing.flatten(1), (at_bin << 32) + (_LAST - index), -1)
    best = rank.topk(min(limit, flat.shape[1]), 1).values  # all different, so of equal bins the lowest index is first
    index = torch.where(best >= 0, _LAST - (best & _LAST), 0)
    picked = torch.where(best >= 0, flat.gather(1, index), 0.0)
    picked, order = picked.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    return picked, boxes.gather(1, (index // C)[..., None].expand(-1, -1, 4)), index


def nms(
    scores: Tensor, boxes: Tensor, labels: Tensor, thresh: float, max_det: int, class_agnostic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Greedy non-maximum suppression of boxes [B, K, 4] with scores [B, K] in descending order, 0 where there is none.

    The best box that is left is kept and suppresses those of its class, or of any, with IoU > ``thresh``, until
    ``max_det`` are kept. Two boxes without area do not suppress each other. Returns boxes
    [B, max_det, 4], scores and labels [B, max_det], padded with 0 and -1, and how many there are [B], int32.
    """
    edges, areas = Corners(*boxes.unbind(-1)), corner_areas(boxes)
    left, picks, found = scores > 0, [], []
    for _ in range(min(max_det, scores.shape[1])):
        pick = left.to(torch.uint8).argmax(1, keepdim=True)  # the first one left
        found.append(left.gather(1, pick))
        picks.append(pick)
        own = Corners(*(edge.gather(1, pick) for edge in edges))
        over = iou(edges, own, areas, areas.gather(1, pick)) > thresh
        if not class_agnostic:
            over = over & (labels == labels.gather(1, pick))
        left = (left & ~over).scatter(1, pick, False)
    pick, kept = torch.cat(picks, 1), torch.cat(found, 1)
    spare = max_det - pick.shape[1]
    return (
        pad(torch.where(kept[..., None], boxes.gather(1, pick[..., None].expand(-1, -1, 4)), 0.0), (0, 0, 0, spare)),
        pad(torch.where(kept, scores.gather(1, pick), 0.0), (0, spare)),
        pad(torch.where(kept, labels.gather(1, pick), -1), (0, spare), value=-1),
        kept.sum(1).to(torch.int32),
    )
