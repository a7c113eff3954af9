"""What ``fusedyolo.assign`` returns, and what a picture shows of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Panel(NamedTuple):
    """What one map of an assignment has to show of an image, lengths in the pixels of predictions.

    Attributes:
        title: what it is of.
        size: width and height of the image; None where they are those of the picture.
        cell: side of the cells whose predictions answer for something; 0 where there are no cells.
        ignored: middles of predictions that are not trained.
        positive: row, middle, width and height of the anchor of each prediction that answers for one.
        boxes: row, class, left upper corner, width and height of each object.
    """

    title: str
    size: tuple[float, float] | None
    cell: float
    ignored: list[tuple[float, float]]
    positive: list[tuple[int, float, float, float, float]]
    boxes: list[tuple[int, int, float, float, float, float]]


class LevelAssignment(NamedTuple):
    """One prediction map, every tensor ``[B, A, H, W]`` or that and 4.

    Attributes:
        row: int64, the row of :attr:`Assignment.rows` that a prediction answers for, the last one if it has several;
            -1 for none.
        label: int64, the class of that row; -1 for none.
        boxes: x1, y1, x2, y2 of that row, in pixels; 0 where there is none.
        encoded: the four raw outputs that decode to that box (:func:`fusedyolo.decode` is the inverse); where no output
            does, the nearest. 0 where there is none.
        objectness: the target of objectness, in [0, 1]; of heads without it that of the class.
        ignored: bool, objectness is not trained.
        pairs: int64 ``[2, R]``, every row and the flat index (image, anchor, y, x) of a prediction that it is assigned
            to, in the order in which they count; ``B * A * H * W`` stands for no prediction.
        score: the target of the logit of its class, in [0, 1], 0 where there is none; None where that is the loss's.
    """

    row: Tensor
    label: Tensor
    boxes: Tensor
    encoded: Tensor
    objectness: Tensor
    ignored: Tensor
    pairs: Tensor
    score: Tensor | None = None

    def __repr__(self) -> str:
        """In a line; numbers are those of the fields."""
        return f"LevelAssignment(row={list(self.row.shape)}, pairs={self.pairs.shape[1]})"


class Assignment(NamedTuple):
    """The result of :func:`fusedyolo.assign`.

    Attributes:
        levels: one entry for each prediction map.
        rows: float32 ``[M, 6]``, the target rows that the entries speak of, as the loss sees them: packed rows in their
            own order, other targets by image.
        valid: bool ``[M]``; the other rows are assigned to nothing.
        strides: pixels per cell, one a level.
        anchors: (width, height) in pixels, a tuple a level; of heads without anchors those of a cell.
        weights: float32 ``[M]``, of the rows, or None, see :class:`~fusedyolo.Targets`; regions are not ``valid``.
    """

    levels: tuple[LevelAssignment, ...]
    rows: Tensor
    valid: Tensor
    strides: tuple[float, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]
    weights: Tensor | None = None

    def __repr__(self) -> str:
        """In a line; numbers are those of the fields."""
        maps = ", ".join("x".join(map(str, level.row.shape[1:])) for level in self.levels)
        return f"Assignment(images={self.batch}, maps=[{maps}], rows={len(self.rows)}, strides={self.strides})"

    @property
    def batch(self) -> int:
        """Images."""
        return len(self.levels[0].row)

    def panels(self, image: int) -> list[Panel]:
        """What there is to be seen of an image, a panel for each map. Waits for the device."""
        found = []
        for level, stride, anchors in zip(self.levels, self.strides, self.anchors, strict=True):
            width, height = level.row.shape[3] * stride, level.row.shape[2] * stride
            size = torch.tensor((width, height), dtype=self.rows.dtype, device=self.rows.device)
            centre, sides = (part * size for part in self.rows[:, 2:].split(2, 1))
            taken, ignored = (level.row[image] >= 0).nonzero().tolist(), level.ignored[image].any(0).nonzero().tolist()
            found.append(
                Panel(
                    f"stride {stride:g}: " if stride >= 1 else "",  # else lengths are in images
                    (width, height),
                    stride,
                    [((x + 0.5) * stride, (y + 0.5) * stride) for y, x in ignored],
                    [
                        (int(level.row[image, a, y, x]), (x + 0.5) * stride, (y + 0.5) * stride, *anchors[a])
                        for a, y, x in taken
                    ],
                    _boxes(self, image, centre - sides / 2, sides),
                )
            )
        return found


class AnchorAssignment(NamedTuple):
    """The result of :func:`fusedyolo.assign` for a loss over N anchors; every tensor ``[B, N]``, or that and 4.

    Attributes:
        row: int64, the row of ``rows`` that an anchor takes; -1 for none.
        label: int64, the class of that row; -1 for none.
        boxes: x1, y1, x2, y2 of that row, in pixels; 0 where there is none.
        encoded: the four raw outputs that decode to that box; 0 where there is none.
        objectness: 1 for anchors with a row, or the target of their centreness; 0 elsewhere.
        ignored: bool, class logits are not trained. Which negatives SSD leaves out depends on their loss, and is not
            said here.
        rows: float32 ``[M, 6]``, the target rows as the loss sees them: image, class, and a box either by its corners
            in pixels, of a list of dicts, or by centre and size relative to the image.
        valid: bool ``[M]``; the other rows are assigned to nothing.
        true_boxes: ``[M, 4]``, the boxes of the rows, x1, y1, x2, y2 in pixels; of no meaning for invalid ones.
        anchors: ``[N, 4]``, x1, y1, x2, y2 in pixels.
        weights: float32 ``[M]``, of the rows, or None, see :class:`~fusedyolo.Targets`; regions are not ``valid``.
    """

    row: Tensor
    label: Tensor
    boxes: Tensor
    encoded: Tensor
    objectness: Tensor
    ignored: Tensor
    rows: Tensor
    valid: Tensor
    true_boxes: Tensor
    anchors: Tensor
    weights: Tensor | None = None

    def __repr__(self) -> str:
        """In a line; numbers are those of the fields."""
        return f"AnchorAssignment(images={self.batch}, anchors={len(self.anchors)}, rows={len(self.rows)})"

    @property
    def batch(self) -> int:
        """Images."""
        return len(self.row)

    def panels(self, image: int) -> list[Panel]:
        """What there is to be seen of an image, in one panel. Waits for the device."""
        low, high = self.anchors.split(2, 1)
        shapes = torch.cat(((low + high) / 2, high - low), 1)
        taken = (self.row[image] >= 0).nonzero().flatten()
        positive = zip(self.row[image, taken].tolist(), shapes[taken].tolist(), strict=True)
        low, high = self.true_boxes.split(2, 1)
        ignored = [(x, y) for x, y in shapes[self.ignored[image], :2].tolist()]
        boxes = _boxes(self, image, low, high - low)
        return [Panel("", None, 0.0, ignored, [(row, *shape) for row, shape in positive], boxes)]


def _boxes(
    found: Assignment | AnchorAssignment, image: int, corners: Tensor, sides: Tensor
) -> list[tuple[int, int, float, float, float, float]]:
    """The valid rows of an image, for :attr:`Panel.boxes`; of each row its ``corners`` and ``sides``, [M, 2]."""
    own = found.valid & (found.rows[:, 0].nan_to_num(-1).to(torch.int64) == image)
    rows = own.nonzero().flatten().tolist()
    return [(row, int(found.rows[row, 1]), *corners[row].tolist(), *sides[row].tolist()) for row in rows]
