"""Overlaps of many boxes with target rows, a chunk of pairs at a time: memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .overlap import Corners, iou
from .primitives import at_hand

if TYPE_CHECKING:
    from .rows import Rows

PAIRS_CHUNK = 1 << 18  # (row, box) pairs that are computed at a time
PAIRS_KEPT = 1 << 24  # and of which the overlaps are kept for whoever asks again
PAIRS_NEAR = 1 << 16  # of rows and boxes that may meet, which a cache holds
FEWEST = 256  # boxes of a block


def chunks(rows: int, boxes: int) -> Iterator[slice]:
    """Slices of the rows, so many that their pairs with all boxes of an image fit a chunk."""
    step = max(1, PAIRS_CHUNK // boxes)
    if 0 < rows <= step:  # a range would make a number of a symbol
        yield slice(0, rows)
        return
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _Chunk(NamedTuple):
    """Some rows, and what they are to some boxes of their image."""

    row: Tensor  # [R] int64
    image: Tensor | int  # of each, or of all
    boxes: slice
    overlap: Tensor  # [R, boxes], -1 for an invalid row


class PairIoU:
    """IoU of the N boxes of an image with its rows.

    ``edges`` [., N, 4] and ``areas`` [., N] are of all images, or of each; ``true_edges`` [M, 4] and ``true_areas`` [M]
    of the rows; x1, y1, x2, y2, all in one unit. Areas are given, for they need not be rounded as edges are.

    Where values are :func:`at_hand`, boxes come in blocks, and rows that do not meet the box around a block are left
    out: what is asked below is so put that an IoU of 0 need not be seen.
    """

    def __init__(self, edges: Tensor, areas: Tensor, true_edges: Tensor, true_areas: Tensor, rows: Rows):
        self.edges = edges.permute(2, 0, 1).contiguous()
        self.areas = areas
        self.true_edges = true_edges[..., None]
        self.true_areas = true_areas[:, None]
        self.rows = rows
        self.kept: list[_Chunk] | None = None
        self.most: Tensor | None = None  # [M]: the largest IoU of each row
        self.box: Tensor | None = None  # [M]: the first box that has it

    def _chunks(self, batch_size: int, keep: bool = False) -> Iterator[_Chunk]:
        """All pairs that meet, and others, each once; ``keep``: for whoever asks again."""
        if self.kept is not None:
            yield from self.kept
            return
        kept, pairs = [], 0
        for chunk in self._near(batch_size) if at_hand(self.edges) else self._all():
            pairs += chunk.overlap.numel()
            if keep and pairs <= PAIRS_KEPT:
                kept.append(chunk)
            else:
                kept.clear()
            yield chunk
        if keep and pairs <= PAIRS_KEPT:
            self.kept = kept

    def _all(self) -> Iterator[_Chunk]:
        N = self.areas.shape[1]
        for now in chunks(len(self.true_areas), N):
            boxes, areas, image = Corners(*self.edges), self.areas, self.rows.image[now]
            if len(areas) > 1:
                boxes, areas = Corners(*(edge.index_select(0, image) for edge in boxes)), areas.index_select(0, image)
            overlap = iou(boxes, Corners(*self.true_edges[now].unbind(1)), areas, self.true_areas[now])
            row = torch.arange(now.start, now.start + len(image), device=image.device)
            yield _Chunk(row, image, slice(0, N), torch.where(self.rows.valid[now, None], overlap, -1.0))

    def _near(self, batch_size: int) -> Iterator[_Chunk]:
        """Block by block, the valid rows that meet the box around it. Of few rows blocks are large."""
        N = self.areas.shape[1]
        length = max(FEWEST, min(N, PAIRS_NEAR * batch_size // max(1, len(self.true_areas))))
        blocks = pad(self.edges, (0, -N % length), value=float("nan")).unflatten(2, (-1, length))
        low = torch.where(blocks[:2].isnan(), float("inf"), blocks[:2]).amin(3)
        high = torch.where(blocks[2:].isnan(), -float("inf"), blocks[2:]).amax(3)
        for b in range(batch_size):
            own = (self.rows.valid & (self.rows.image == b)).nonzero()[:, 0]
            true, at = self.true_edges[own], b if len(self.areas) > 1 else 0
            meets = (true[:, :2] < high[:, at]) & (true[:, 2:] > low[:, at])
            meets = meets[:, 0] & meets[:, 1]  # [rows, blocks]
            for k in range(blocks.shape[2]):
                meeting = meets[:, k].nonzero()[:, 0]
                if not len(meeting):
                    continue
                boxes = slice(k * length, min(N, (k + 1) * length))
                edges, areas = Corners(*self.edges[:, at, boxes]), self.areas[at, boxes]
                for now in meeting.split(max(1, PAIRS_NEAR // length)):
                    row = own[now]
                    overlap = iou(edges, Corners(*true[now].unbind(1)), areas, self.true_areas[row])
                    yield _Chunk(row, b, boxes, overlap)

    def _gathered(self, into: Tensor, chunk: _Chunk, values: Tensor, how: str) -> None:
        """Into numbers of boxes ``into`` [B, N] the largest, or least (``how``), of those of a chunk of pairs."""
        if isinstance(chunk.image, int):
            found = values.amax(0) if how == "amax" else values.amin(0)
            own = into[chunk.image, chunk.boxes]
            torch.maximum(own, found, out=own) if how == "amax" else torch.minimum(own, found, out=own)
        else:
            into.scatter_reduce_(0, chunk.image[:, None].expand_as(values), values, how)

    def _first_valid(self, batch_size: int) -> Tensor:
        """[B, 1]: the first valid row of each image; M where there is none."""
        M = len(self.true_areas)
        row = torch.where(self.rows.valid, self._order(), M)
        first = torch.full((batch_size,), M, device=self.areas.device)
        return first.scatter_reduce_(0, self.rows.image, row, "amin")[:, None]

    def _order(self) -> Tensor:
        """The rows, [M]."""
        return torch.arange(len(self.true_areas), device=self.areas.device)

    def best(self, batch_size: int) -> Tensor:
        """[B, N]: the largest IoU of each box with a row of its image."""
        best = self.areas.new_zeros(batch_size, self.areas.shape[1])
        for chunk in self._chunks(batch_size):
            self._gathered(best, chunk, chunk.overlap, "amax")
        return best

    def matches(self, batch_size: int, of_rows: bool, keep: bool) -> tuple[Tensor, Tensor]:
        """[B, N]: the largest IoU of each box with a row of its image, and the first row that has it; M where there is
        none. ``of_rows``: that of each row is kept, and ``keep`` all are, for what is asked of rows below.
        """
        M = len(self.true_areas)
        self.most = self.true_areas.new_zeros(M) if of_rows else None
        if at_hand(self.edges):
            return self._matches_near(batch_size, keep)
        best = self.areas.new_zeros(batch_size, self.areas.shape[1])
        for chunk in self._chunks(batch_size, keep):
            self._gathered(best, chunk, chunk.overlap, "amax")
            if self.most is not None:
                self.most.scatter_reduce_(0, chunk.row, chunk.overlap.amax(1), "amax")
        first = torch.where(best == 0, self._first_valid(batch_size), M)
        for chunk in self._chunks(batch_size, keep):
            assert isinstance(chunk.image, Tensor)
            equal = chunk.overlap == best.index_select(0, chunk.image)
            self._gathered(first, chunk, torch.where(equal, chunk.row[:, None], M), "amin")
        return best, first

    def _matches_near(self, batch_size: int, keep: bool) -> tuple[Tensor, Tensor]:
        """The same in one pass: rows and boxes come in their order, so that of equals the first is there already."""
        best = self.areas.new_zeros(batch_size, self.areas.shape[1])
        first = torch.full_like(best, len(self.true_areas), dtype=torch.int64)
        box = torch.zeros_like(self.rows.image)
        for row, image, boxes, overlap in self._chunks(batch_size, keep):
            _improve(best[image, boxes], first[image, boxes], slice(None), overlap.max(0), row)
            if self.most is not None:
                of_box = torch.arange(boxes.start, boxes.stop, device=box.device)
                _improve(self.most, box, row, overlap.max(1), of_box)
        self.box = box
        return best, torch.where(best == 0, self._first_valid(batch_size), first)

    def best_of_a_row(self, batch_size: int) -> Tensor:
        """[B, N] bool: some row of the image has no larger IoU than with this box, which may be 0."""
        return self.last_row_of_equals(batch_size) >= 0

    def last_row_of_equals(self, batch_size: int) -> Tensor:
        """[B, N]: the last row that has no larger IoU than with this box, which may be 0; -1 where there is none."""
        most, row = self.most, self._order()
        assert most is not None
        alone = torch.full((batch_size,), -1, device=row.device)  # that meet no box: all are equals
        alone.scatter_reduce_(0, self.rows.image, torch.where(self.rows.valid & (most == 0), row, -1), "amax")
        wanted = alone[:, None].repeat(1, self.areas.shape[1])
        for chunk in self._chunks(batch_size):
            equal = chunk.overlap == most[chunk.row, None]
            self._gathered(wanted, chunk, torch.where(equal, chunk.row[:, None], -1), "amax")
        return wanted

    def row_that_wants(self, batch_size: int, first: bool = False) -> Tensor:
        """[B, N]: the last row, or the ``first``, whose first best box this is; -1 where there is none."""
        N, M, device, most = self.areas.shape[1], len(self.true_areas), self.areas.device, self.most
        assert most is not None
        box = self.box
        if box is None:
            box = torch.where(most == 0, 0, N)  # of a row that meets none the first
            index = torch.arange(N, device=device)
            for chunk in self._chunks(batch_size):
                equal = torch.where(chunk.overlap == most[chunk.row, None], index, N).amin(1)
                box.scatter_reduce_(0, chunk.row, equal, "amin")
        wanted = torch.full((batch_size * N + 1,), M if first else -1, device=device)
        slot = torch.where(self.rows.valid, self.rows.image * N + box, batch_size * N)
        wanted.scatter_reduce_(0, slot, torch.arange(M, device=device), "amin" if first else "amax")
        wanted = wanted[:-1].view(batch_size, N)
        return torch.where(wanted < M, wanted, -1) if first else wanted


def _improve(most: Tensor, who: Tensor, at: Tensor | slice, found: tuple[Tensor, Tensor], whose: Tensor) -> None:
    """Where values that were ``found``, and their indices among ``whose``, exceed the ``most`` so far, ``at`` places of
    it, they take theirs.
    """
    values, index = found
    had = most[at]
    more = values > had
    who[at] = torch.where(more, whose[index], who[at])
    most[at] = torch.where(more, values, had)
