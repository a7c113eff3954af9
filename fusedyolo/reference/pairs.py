"""Overlaps of many boxes with target rows, a chunk of pairs at a time: memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .overlap import Corners, iou

if TYPE_CHECKING:
    from .rows import Rows

PAIRS_CHUNK = 1 << 18  # (row, box) pairs that are computed at a time
PAIRS_KEPT = 1 << 22  # and of which the overlaps are kept for whoever asks again


def chunks(rows: int, boxes: int) -> Iterator[slice]:
    """Slices of the rows, so many that their pairs with all boxes of an image fit a chunk."""
    step = max(1, PAIRS_CHUNK // boxes)
    for start in range(0, rows, step):
        yield slice(start, start + step)


class PairIoU:
    """IoU of the N boxes of an image with its rows.

    ``edges`` [., N, 4] and ``areas`` [., N] are of all images, or of each; ``true_edges`` [M, 4] and ``true_areas`` [M]
    of the rows; x1, y1, x2, y2, all in one unit. Areas are given, for they need not be rounded as edges are.
    """

    def __init__(self, edges: Tensor, areas: Tensor, true_edges: Tensor, true_areas: Tensor, rows: Rows):
        self.edges = edges.permute(2, 0, 1).contiguous()
        self.areas = areas
        self.true_edges = true_edges[..., None]
        self.true_areas = true_areas[:, None]
        self.rows = rows
        self.kept: list[tuple[slice, Tensor]] | None = None

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their IoU [rows, N] with the boxes of their image, 0 for an invalid row."""
        if self.kept is None:
            made = self._made()
            if len(self.true_areas) * self.areas.shape[1] > PAIRS_KEPT:
                return made
            self.kept = list(made)
        return iter(self.kept)

    def _made(self) -> Iterator[tuple[slice, Tensor]]:
        for now in chunks(len(self.true_areas), self.areas.shape[1]):
            boxes, areas = Corners(*self.edges), self.areas
            if len(areas) > 1:
                image = self.rows.image[now]
                boxes, areas = Corners(*(edge.index_select(0, image) for edge in boxes)), areas.index_select(0, image)
            overlap = iou(boxes, Corners(*self.true_edges[now].unbind(1)), areas, self.true_areas[now])
            yield now, torch.where(self.rows.valid[now, None], overlap, 0.0)

    def best(self, batch_size: int) -> Tensor:
        """[B, N]: the largest IoU of each box with a row of its image."""
        best = self.areas.new_zeros(batch_size, self.areas.shape[1])
        for now, overlap in self._chunks():
            best.scatter_reduce_(0, self.rows.image[now, None].expand_as(overlap), overlap, "amax")
        return best

    def first(self, best: Tensor) -> Tensor:
        """[B, N]: the first row that has the largest IoU; M where there is none."""
        m = len(self.true_areas)
        match = torch.full(best.shape, m, device=best.device)
        for now, overlap in self._chunks():
            image = self.rows.image[now]
            row = torch.arange(now.start, now.start + len(image), device=best.device)[:, None]
            row = torch.where(self.rows.valid[now, None] & (overlap == best.index_select(0, image)), row, m)
            match.scatter_reduce_(0, image[:, None].expand_as(row), row, "amin")
        return match

    def best_of_a_row(self, batch_size: int) -> Tensor:
        """[B, N] bool: some row of the image has no larger IoU than with this box, which may be 0."""
        found = torch.zeros(batch_size, self.areas.shape[1], dtype=torch.uint8, device=self.areas.device)
        for now, overlap in self._chunks():
            equal = (overlap == overlap.amax(1, keepdim=True)) & self.rows.valid[now, None]
            found.scatter_reduce_(
                0, self.rows.image[now, None].expand_as(overlap), equal.to(torch.uint8), "amax", include_self=True
            )
        return found > 0

    def last_row_of_equals(self, batch_size: int) -> Tensor:
        """[B, N]: the last row that has no larger IoU than with this box, which may be 0; -1 where there is none."""
        wanted = torch.full((batch_size, self.areas.shape[1]), -1, device=self.areas.device)
        for now, overlap in self._chunks():
            equal = (overlap == overlap.amax(1, keepdim=True)) & self.rows.valid[now, None]
            row = torch.arange(now.start, now.start + len(overlap), device=wanted.device)[:, None]
            row = torch.where(equal, row, -1)
            wanted.scatter_reduce_(0, self.rows.image[now, None].expand_as(row), row, "amax")
        return wanted

    def row_that_wants(self, batch_size: int, first: bool = False) -> Tensor:
        """[B, N]: the last row, or the ``first``, whose first best box this is; -1 where there is none."""
        N, M = self.areas.shape[1], len(self.true_areas)
        wanted = torch.full((batch_size * N + 1,), M if first else -1, device=self.areas.device)
        index = torch.arange(N, device=self.areas.device)
        for now, overlap in self._chunks():
            box = torch.where(overlap == overlap.amax(1, keepdim=True), index, N).amin(1)
            slot = torch.where(self.rows.valid[now], self.rows.image[now] * N + box, batch_size * N)
            row = torch.arange(now.start, now.start + len(slot), device=slot.device)
            wanted.scatter_reduce_(0, slot, row, "amin" if first else "amax")
        wanted = wanted[:-1].view(batch_size, N)
        return torch.where(wanted < M, wanted, -1) if first else wanted
