"""Which prediction answers for which object, and what it is to say: for people with a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .heads import CellHead, DenseHead, GridHead
from .targets import Targets, as_targets, without_spare

if TYPE_CHECKING:
    from .losses import YOLOv1Loss
    from .losses.base import GridLoss
    from .losses.dense import DenseLoss


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


class AnchorAssignment(NamedTuple):
    """The result of :func:`assign` for a loss over N anchors; every tensor ``[B, N]``, or that and 4.

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


def assign(
    criterion: GridLoss | YOLOv1Loss | DenseLoss,
    preds: Any,
    targets: Tensor | Sequence[dict[str, Tensor]] | Targets,
    **geometry: Any,
) -> Assignment | AnchorAssignment:
    """What ``criterion`` would train each prediction for. Runs on the device of ``preds``, and waits for nothing.

    Args:
        criterion: a loss of this package. :class:`~fusedyolo.YOLOv1Loss` has one level, and boxes where others have
            anchors; without ``image_size`` its lengths are in images.
        preds: as the loss takes them. Matches depend on their shapes alone, but for objectness targets that are an IoU,
            and for what is ignored.
        targets: as the loss takes them.
        **geometry: what a loss over anchors (RetinaNet, SSD, FCOS) takes beside these: ``anchors`` and, where it needs
            them, ``num_anchors_per_level`` and ``image_size``.

    Returns:
        :class:`Assignment`, or :class:`AnchorAssignment` for a loss over anchors.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    head = getattr(criterion, "head", None)
    if isinstance(head, DenseHead):
        return _assign_anchors(criterion, head, preds, targets, geometry)
    for name in geometry:
        checks.fail(name, checks.describe(geometry[name]), "no such argument for this loss")
    if isinstance(head, CellHead):
        return _assign_cells(criterion, head, preds, targets)
    if not isinstance(head, GridHead):
        checks.fail("criterion", checks.describe(criterion), "a loss of this package")
    maps = [preds] if isinstance(preds, Tensor) else preds
    batch, size = checks.grid_predictions(
        maps, tuple(map(len, head.levels)), head.strides, head.num_classes, criterion.image_size
    )
    rows = _rows(targets, batch, size, maps[0].device)
    with torch.no_grad():
        views = [reference.grid_view(pred, len(own)) for pred, own in zip(maps, head.levels, strict=True)]
        read = reference.read_rows(rows, head, batch)
        levels = tuple(_level(views, level, read, head) for level in range(len(views)))
    anchors = tuple(tuple(head.anchors[t] for t in own) for own in head.levels)
    return Assignment(levels, rows, read.valid, head.strides, anchors)


def _rows(targets: Any, batch: int, size: tuple[float, float], device: torch.device) -> Tensor:
    """Rows of any targets; those of capacity are emptied."""
    return without_spare(*as_targets(targets, batch, size, device))[0]


def _assign_anchors(criterion: Any, head: DenseHead, preds: Any, targets: Any, geometry: Any) -> AnchorAssignment:
    if "anchors" not in geometry:
        checks.fail("anchors", None, "a tensor of shape (N, 4)")
    call = criterion.read(preds, targets, **geometry)
    rows, _ = without_spare(call.rows, call.offsets)
    anchors, batch = call.anchors, len(call.levels[0][0])
    with torch.no_grad():
        read = reference.read_corners(rows, head, batch, call.size, call.corners, anchors.dtype)
        match = reference.dense_match(anchors, read, head, batch, call.ends)
        has = match >= 0
        taken = torch.where(has, match, len(read.label))  # a row of nothing behind them
        true = torch.cat((read.boxes, read.boxes.new_zeros(1, 4)))[taken]
        shift, sides = reference.relative(anchors, read, match)
        encoded = reference.encode_anchors(anchors, shift, sides, head)
        target = reference.centreness(shift, sides) if head.centreness else torch.ones_like(sides[..., 0])
    return AnchorAssignment(
        torch.where(has, match, -1),
        torch.cat((read.label, read.label.new_full((1,), -1)))[taken],
        true,
        torch.where(has[..., None], encoded, 0.0),
        torch.where(has, target, 0.0),
        match == reference.IGNORED,
        rows,
        read.valid,
        read.boxes,
        anchors,
    )


def _assign_cells(criterion: Any, head: CellHead, pred: Any, targets: Any) -> Assignment:
    batch = checks.cell_predictions(pred, head.grid_size, head.num_boxes, head.num_classes)
    height, width = size = checks.target_size(criterion.image_size, targets)
    rows = _rows(targets, batch, size, pred.device)
    S, n = head.grid_size, head.num_boxes
    with torch.no_grad():
        pred = pred.to(torch.float64 if pred.dtype == torch.float64 else torch.float32)
        boxes = reference.cell_views(pred, head)[0]
        found = reference.cell_assign(boxes, rows, head)
    image = torch.stack([pred.new_full((), side) for side in (width, height)])
    cell = torch.arange(S, device=pred.device)
    origin = torch.stack(torch.meshgrid(cell, cell, indexing="xy"), -1)
    centre, half = (found.offset + origin) / S * image, found.size * image / 2
    encoded = torch.cat((found.offset, found.size.sqrt() if head.root else found.size), -1)
    mine = found.mine.permute(0, 3, 1, 2)

    def everywhere(value: Tensor, none: float = 0) -> Tensor:
        """[B, S, S, ...] of each cell as [B, n, S, S, ...] of the boxes that answer."""
        answers = mine.view(*mine.shape, *[1] * (value.ndim - 3))
        return torch.where(answers, value[:, None], none)

    order = torch.arange(mine.numel(), device=pred.device).view(mine.shape)
    slot = torch.where(mine, order, mine.numel()).flatten()
    row = everywhere(found.row, -1)
    level = LevelAssignment(
        row,
        everywhere(found.label, -1),
        everywhere(torch.cat((centre - half, centre + half), -1)),
        everywhere(encoded),
        found.answer.permute(0, 3, 1, 2),
        torch.zeros_like(mine),
        torch.stack((row.clamp(min=0).flatten(), slot)),
    )
    return Assignment((level,), rows, found.valid, (width / S,), (((width / S, height / S),) * n,))


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
