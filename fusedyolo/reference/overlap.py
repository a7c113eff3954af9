"""The overlap of two boxes, wherever a decision hangs on it: the twin of ``kernels/overlap.py``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .primitives import safe_div


class Corners(NamedTuple):
    """Boxes by their edges, in any one unit; of shapes that broadcast."""

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor


def area(sides: Tensor) -> Tensor:
    """Width times height, of [..., 2]."""
    return sides[..., 0] * sides[..., 1]


def corner_areas(boxes: Tensor) -> Tensor:
    """Areas [...] of boxes [..., 4] by their corners."""
    return area(boxes[..., 2:] - boxes[..., :2])


def corners_of(centre: Tensor, size: Tensor) -> Tensor:
    """Boxes [..., 4], x1, y1, x2, y2, of centres and sizes [..., 2]."""
    half = size / 2
    return torch.cat((centre - half, centre + half), -1)


def intersection(p: Corners, q: Corners) -> Tensor:
    """The area that two boxes share, 0 where they do not meet."""
    ow = torch.minimum(p.x2, q.x2).sub_(torch.maximum(p.x1, q.x1))
    oh = torch.minimum(p.y2, q.y2).sub_(torch.maximum(p.y1, q.y1))
    return ow.clamp_(min=0).mul_(oh.clamp_(min=0))


def iou_of_areas(inter: Tensor, p: Tensor, q: Tensor, eps: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU = inter / (union + eps), and the union, from three areas."""
    union = p + q - inter
    return safe_div(inter, union + eps), union


def iou(p: Corners, q: Corners, p_area: Tensor, q_area: Tensor) -> Tensor:
    """IoU of two boxes of these areas, for decisions: it has no gradient. The areas are those that the peer takes: of a
    box given by centre and size they are not those of its corners.
    """
    inter = intersection(p, q)
    union = (p_area + q_area).sub_(inter)
    return torch.where(inter > 0, inter / union, 0.0)
