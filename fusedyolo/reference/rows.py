"""Target rows: the twin of ``kernels/rows.py``. Which of them can be is said here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import CENTRE_LIMIT, EDGE_LIMIT, CellHead, DenseHead, GridHead, PickHead
from .overlap import corners_of
from .primitives import constants


@dataclass(frozen=True)
class Rows:
    """Target rows, made safe: an invalid one holds a legal row, and is False in ``valid``."""

    valid: Tensor  # [M] bool
    image: Tensor  # [M] int64
    label: Tensor  # [M] int64
    boxes: Tensor  # [M, 4]: of grids cx, cy, w, h, relative to the image, float32; else x1, y1, x2, y2 in pixels


@dataclass(frozen=True)
class BoxRows(Rows):
    """Target rows of which ``boxes`` are corners in pixels, and with them what corners have lost."""

    centres: Tensor | None  # [M, 2] in pixels, float64; None where rows came as corners
    sides: Tensor  # [M, 2] in pixels


def _valid(
    rows: Tensor, box: tuple[Tensor, Tensor, Tensor, Tensor], batch_size: int, labels: range, limit: float
) -> Tensor:
    """[M] bool: rows [M, 6] that can be, by what they say of the ``box``: its centre, relative to the image, and sides.

    Classes are among ``labels``, and centres in [0, limit).
    """
    image, label = rows[:, 0], rows[:, 1]
    cx, cy, w, h = box
    possible = rows.isfinite().all(1) & (w > 0) & (h > 0) & w.isfinite() & h.isfinite()
    known = (image >= 0) & (image < batch_size) & (label >= labels.start) & (label < labels.stop)
    return possible & known & (cx >= 0) & (cx < limit) & (cy >= 0) & (cy < limit)


def read_rows(rows: Tensor, head: GridHead | CellHead | PickHead, batch_size: int) -> Rows:
    """Target rows [M, 6] of centres and sizes relative to the image."""
    cx, cy, w, h = rows[:, 2:].unbind(1)
    edge = head.edge if isinstance(head, GridHead) else isinstance(head, PickHead)
    limit = EDGE_LIMIT if edge else CENTRE_LIMIT  # Dynamo knows no property of a head
    valid = _valid(rows, (cx, cy, w, h), batch_size, range(head.num_classes), limit)
    safe = torch.where(valid[:, None], rows, 0.5)
    return Rows(valid, safe[:, 0].long(), safe[:, 1].long(), safe[:, 2:])


def read_corners(
    rows: Tensor, head: DenseHead, batch_size: int, size: tuple[float, float] | None, corners: bool, dtype: torch.dtype
) -> BoxRows:
    """Target rows [M, 6] as boxes in pixels.

    They are their ``corners`` in pixels, or centre and size relative to an image of ``size`` (height, width), which for
    corners may be None: unknown.
    """
    height, width = (math.inf, math.inf) if size is None else size
    if corners:
        x1, y1, x2, y2 = rows[:, 2:].unbind(1)
        cx, cy, w, h = 0.5 * (x1 + x2) / width, 0.5 * (y1 + y2) / height, x2 - x1, y2 - y1
    else:
        cx, cy, w, h = rows[:, 2:].unbind(1)
    labels = range(1 if head.background else 0, head.num_classes)
    valid = _valid(rows, (cx, cy, w, h), batch_size, labels, CENTRE_LIMIT)
    safe = torch.where(valid[:, None], rows, 0.5)
    boxes = safe[:, 2:].to(dtype)
    image, label = safe[:, 0].long(), safe[:, 1].long()
    if corners:
        return BoxRows(valid, image, label, boxes, None, boxes[:, 2:] - boxes[:, :2])
    pixels = constants((width, height) * 2, boxes)
    centres = safe[:, 2:4].double() * constants((width, height), safe.double())
    edges = corners_of(boxes[:, :2], boxes[:, 2:]) * pixels
    return BoxRows(valid, image, label, edges, centres, (boxes * pixels)[:, 2:])
