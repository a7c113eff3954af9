"""Target rows: the twin of ``kernels/rows.py``. Which of them can be is said here alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..heads import CENTRE_LIMIT, EDGE_LIMIT, CellHead, DenseHead, GridHead, PickHead
from ..kernels.launch import LARGEST_SIDE
from .overlap import corners_of
from .pairs import chunks
from .primitives import constants


@dataclass(frozen=True)
class Rows:
    """Target rows, made safe: one that cannot be holds a legal row. Regions are not ``valid``, either."""

    valid: Tensor  # [M] bool: objects
    image: Tensor  # [M] int64
    label: Tensor  # [M] int64
    boxes: Tensor  # [M, 4]: of grids cx, cy, w, h, relative to the image, float32; else x1, y1, x2, y2 in pixels
    invalid: Tensor  # 0-dim int64: how many are neither objects nor regions
    weight: Tensor | None  # [M] float32, of objects; None where all are 1
    regions: Regions | None  # as boxes; None where there are no weights


@dataclass(frozen=True)
class Regions:
    """Rows that are ignored regions, among all: ``valid`` [M] bool and ``image`` [M]; ``edges`` [M, 4], x1, y1, x2, y2
    float32, in the unit of the points that are asked of.
    """

    valid: Tensor
    image: Tensor
    edges: Tensor

    def scaled(self, width: float, height: float) -> Regions:
        """Those relative to the image, of one of this size."""
        return replace(self, edges=self.edges * constants((width, height) * 2, self.edges))

    def of_points(self, points: Tensor, batch_size: int) -> Tensor:
        """[B, N] bool: which of points [N, 2], float32, lie in a region of an image, left and upper edges included."""
        N = len(points)
        found = torch.zeros(batch_size, N, dtype=torch.uint8, device=points.device)
        for now in chunks(len(self.valid), N):
            low, high = self.edges[now, None].split(2, -1)
            inside = ((low <= points) & (points < high)).all(-1) & self.valid[now, None]
            found.scatter_reduce_(0, self.image[now, None].expand_as(inside), inside.to(torch.uint8), "amax")
        return found > 0


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
    possible = rows.isfinite().all(1) & (w > 0) & (h > 0) & (w < LARGEST_SIDE) & (h < LARGEST_SIDE)
    known = (image >= 0) & (image < batch_size) & (label >= labels.start) & (label < labels.stop)
    return possible & known & (cx >= 0) & (cx < limit) & (cy >= 0) & (cy < limit)


def _kinds(possible: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[M] bool, of rows that are ``possible`` as such, which are objects, and which ignored regions; and the weights of
    objects. Without weights the last two are None.
    """
    if weights is None:
        return possible, None, None
    possible = possible & weights.isfinite()
    valid = possible & (weights >= 0)
    return valid, possible & ~valid, torch.where(valid, weights, 0.0)


def read_rows(
    rows: Tensor, head: GridHead | CellHead | PickHead, batch_size: int, weights: Tensor | None = None
) -> Rows:
    """Target rows [M, 6] of centres and sizes relative to the image, and their weights [M]; edges of regions, too, are
    relative to the image.
    """
    cx, cy, w, h = rows[:, 2:].unbind(1)
    edge = head.edge if isinstance(head, GridHead) else isinstance(head, PickHead)
    limit = EDGE_LIMIT if edge else CENTRE_LIMIT  # Dynamo knows no property of a head
    possible = _valid(rows, (cx, cy, w, h), batch_size, range(head.num_classes), limit)
    valid, ignored, weight = _kinds(possible, weights)
    known = valid if ignored is None else valid | ignored
    safe = torch.where(known[:, None], rows, 0.5)
    image, label, boxes = safe[:, 0].long(), safe[:, 1].long(), safe[:, 2:]
    regions = None if ignored is None else Regions(ignored, image, corners_of(boxes[:, :2], boxes[:, 2:]))
    return Rows(valid, image, label, boxes, (~known).sum(), weight, regions)


def read_corners(
    rows: Tensor,
    head: DenseHead,
    batch_size: int,
    size: tuple[float, float] | None,
    corners: bool,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> BoxRows:
    """Target rows [M, 6] as boxes in pixels, and their weights [M].

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
    possible = _valid(rows, (cx, cy, w, h), batch_size, labels, CENTRE_LIMIT)
    valid, ignored, weight = _kinds(possible, weights)
    known = valid if ignored is None else valid | ignored
    safe = torch.where(known[:, None], rows, 0.5)
    boxes = safe[:, 2:].to(dtype)
    image, label = safe[:, 0].long(), safe[:, 1].long()
    centres, edges, sides = None, boxes, boxes[:, 2:] - boxes[:, :2]
    if not corners:
        pixels = constants((width, height) * 2, boxes)
        centres = safe[:, 2:4].double() * constants((width, height), safe.double())
        edges, sides = corners_of(boxes[:, :2], boxes[:, 2:]) * pixels, (boxes * pixels)[:, 2:]
    regions = None
    if ignored is not None:  # in float32, whatever the dtype
        own = safe[:, 2:] if corners else corners_of(safe[:, 2:4], safe[:, 4:]) * constants((width, height) * 2, safe)
        regions = Regions(ignored, image, own)
    return BoxRows(valid, image, label, edges, (~known).sum(), weight, regions, centres, sides)
