"""Which prediction answers for which object, and what it is to say: for people with a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .heads import GridHead
from .targets import Targets, as_targets

if TYPE_CHECKING:
    from .losses.base import GridLoss


class LevelAssignment(NamedTuple):
    """One prediction map, every tensor ``[B, A, H, W]`` or that and 4.

    Attributes:
        row: int64, the row of :attr:`Assignment.rows` that a prediction answers for, the last one if it has several;
            -1 for none.
        label: int64, the class of that row; -1 for none.
        boxes: x1, y1, x2, y2 of that row, in pixels; 0 where there is none.
        encoded: the four raw outputs that decode to that box (:func:`fusedyolo.decode` is the inverse); where no output
            does, the nearest. 0 where there is none.
        objectness: the target of objectness, in [0, 1].
        ignored: bool, objectness is not trained.
        pairs: int64 ``[2, R]``, every row and the flat index (image, anchor, y, x) of a prediction that it is assigned
            to, in the order in which they count; ``B * A * H * W`` stands for no prediction.
    """

    row: Tensor
    label: Tensor
    boxes: Tensor
    encoded: Tensor
    objectness: Tensor
    ignored: Tensor
    pairs: Tensor


class Assignment(NamedTuple):
    """The result of :func:`assign`.

    Attributes:
        levels: one entry for each prediction map.
        rows: float32 ``[M, 6]``, the target rows that the entries speak of, as the loss sees them: packed rows in their
            own order, other targets by image.
        valid: bool ``[M]``; the other rows are assigned to nothing.
        strides: pixels per cell, one a level.
        anchors: (width, height) in pixels, a tuple a level.
    """

    levels: tuple[LevelAssignment, ...]
    rows: Tensor
    valid: Tensor
    strides: tuple[float, ...]
    anchors: tuple[tuple[tuple[float, float], ...], ...]


def assign(
    criterion: GridLoss,
    preds: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[dict[str, Tensor]] | Targets,
) -> Assignment:
    """What ``criterion`` would train each prediction for. Runs on the device of ``preds``, and waits for nothing.

    Args:
        criterion: a loss of an anchor-grid detector.
        preds: as the loss takes them. Matches depend on their shapes alone, but for objectness targets that are an IoU,
            and for what is ignored.
        targets: as the loss takes them.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    head = getattr(criterion, "head", None)
    if not isinstance(head, GridHead):
        checks.fail("criterion", checks.describe(criterion), "a loss of an anchor-grid detector")
    maps = [preds] if isinstance(preds, Tensor) else preds
    batch, size = checks.grid_predictions(
        maps, tuple(map(len, head.levels)), head.strides, head.num_classes, criterion.image_size
    )
    rows, offsets = as_targets(targets, batch, size, maps[0].device)
    if offsets is not None:  # rows beyond the last one are no rows
        spare = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
        rows = rows.masked_fill(spare[:, None], 0.0)
    with torch.no_grad():
        views = [reference.grid_view(pred, len(own)) for pred, own in zip(maps, head.levels, strict=True)]
        read = reference.read_rows(rows, head, batch)
        levels = tuple(_level(views, level, read, head) for level in range(len(views)))
    anchors = tuple(tuple(head.anchors[t] for t in own) for own in head.levels)
    return Assignment(levels, rows, read.valid, head.strides, anchors)


def _level(views: list[Tensor], level: int, rows: reference.Rows, head: GridHead) -> LevelAssignment:
    pred = views[level]
    pred = pred.to(torch.float64 if pred.dtype == torch.float64 else torch.float32)
    B, A, H, W, _ = shape = pred.shape
    N, stride, scale = B * A * H * W, head.strides[level], head.scale_x_y[level]
    found = reference.assign(rows, head, level, [(v.shape[2], v.shape[3]) for v in views], B, pred.dtype)
    place = found.slot.clamp(max=N - 1)
    raw = pred[place // (A * H * W), place // (H * W) % A, place // W % H, place % W]
    _, quality = reference.box_loss(raw, rows, found, level, (H, W), head)
    answers = reference.objectness_targets(pred, rows, found, quality, level, head)

    # the rows' boxes, with one of nothing behind them for predictions that answer for none
    image = torch.stack([pred.new_full((), side * stride) for side in (W, H)])
    boxes = rows.boxes.to(pred.dtype)
    centre, sides = (torch.cat((part * image, part.new_zeros(1, 2)))[answers.row] for part in boxes.split(2, 1))
    label = torch.cat((rows.label, rows.label.new_full((1,), -1)))[answers.row]
    index = torch.arange(N, device=pred.device)
    origin = torch.stack((index % W, index // W % H), -1) * stride
    anchors = reference.level_anchors(head, level, pred)[index // (H * W) % A]
    a, b = reference.ENCODE[head.decode](centre - origin, sides, anchors, stride, scale)
    encoded = torch.where(answers.assigned[:, None], torch.cat((a, b), 1), 0.0)
    return LevelAssignment(
        torch.where(answers.assigned, answers.row, -1).view(shape[:4]),
        label.view(shape[:4]),
        torch.cat((centre - sides / 2, centre + sides / 2), 1).view(*shape[:4], 4),
        encoded.view(*shape[:4], 4),
        answers.target.view(shape[:4]),
        ~answers.used.view(shape[:4]),
        torch.stack((found.row, found.slot)),
    )
