"""The driver of cells that hold one object each, and share their class scores among several boxes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..heads import CellHead
from ..reference.select import decode_cells
from ..targets import as_targets, without_spare
from . import shared
from .assignments import Assignment, LevelAssignment
from .protocol import UNIT, Driver, Frame, Piece, Predictions

if TYPE_CHECKING:
    from ..ops import Launch


class CellCall(NamedTuple):
    """The arguments of a call."""

    pred: Tensor
    rows: Tensor  # [M, 6]
    offsets: Tensor | None
    size: tuple[float, float]  # (height, width) of the image, in pixels if they are known, else 1 each
    class_weights: Tensor | None  # [C] float32
    weights: Tensor | None = None  # [M], of the rows


class CellDriver(Driver):
    """See :class:`~fusedyolo.drivers.protocol.Driver`."""

    head = CellHead
    kind = "cell"
    layouts = ("flat", "channels_last")
    channels_last = True

    # ---- a call of a loss

    def read(self, criterion: Any, preds: Any, targets: Any, **geometry: Any) -> CellCall:
        shared.refuse(geometry)
        head = criterion.head
        batch = checks.cell_predictions(preds, head.grid_size, head.num_boxes, head.num_classes)
        size = checks.target_size(criterion.image_size, targets, criterion.form)
        rows, offsets, weights = as_targets(targets, batch, size, preds.device, criterion.form)
        return CellCall(preds, rows, offsets, size, criterion.class_weights, weights)

    def reference_loss(self, head: CellHead, call: CellCall) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, spare = without_spare(call.rows, call.offsets)
        total, parts, counts = reference.cell_loss(call.pred, rows, head, call.class_weights, call.weights)
        return total, parts, shared.counts_without_spare(counts, spare), None

    def launches(self, head: CellHead, call: CellCall) -> dict[str, Launch]:
        from .. import ops

        pred, rows, key, one = call.pred, call.rows, head.key, torch.ones((), device=call.pred.device)
        left, weights = ops.cell_outputs(pred, key, True), (call.class_weights, call.weights)
        return {
            "loss": ops.cell_launch(pred, rows, call.offsets, key, left, True, *weights),
            "grad": ops.cell_grad_launch(pred, rows, left.taken, key, left.grad, one, True, *weights),
        }

    def assign(self, head: CellHead, call: CellCall) -> Assignment:
        rows, _ = without_spare(call.rows, call.offsets)
        (height, width), S, n = call.size, head.grid_size, head.num_boxes
        with torch.no_grad():
            pred = call.pred.to(shared.wide(call.pred.dtype))
            found = reference.cell_assign(reference.cell_views(pred, head)[0], rows, head, call.weights)
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
            torch.zeros_like(mine) if found.hidden is None else found.hidden[:, None] & ~mine,
            torch.stack((row.clamp(min=0).flatten(), slot)),
        )
        cells = (((width / S, height / S),) * n,)
        return Assignment((level,), rows, found.valid, (width / S,), cells, call.weights)

    # ---- predictions alone

    def view(self, criterion: Any, preds: Any, image_size: Any, anchors: Any) -> Predictions:
        head = criterion.head
        size = shared.image_size(criterion, image_size)
        shared.own_anchors(anchors)
        checks.cell_predictions(preds, head.grid_size, head.num_boxes, head.num_classes)
        return Predictions([preds], size)

    def decode(self, head: CellHead, seen: Predictions) -> tuple[Tensor, Tensor]:
        boxes, scores = decode_cells(seen.preds[0], head)
        return boxes if seen.size is None else boxes * shared.corners_of(seen.size, boxes), scores

    # ---- what a network with such a head looks like

    def pieces(self, head: CellHead, frame: Frame) -> list[Piece]:
        shape = (frame.batch, head.grid_size**2 * head.channels)
        return [Piece(shape, head.channels, (0,), UNIT, rare=range(4, 5 * head.num_boxes, 5))]

    def arrange(self, values: Tensor, piece: Piece, frame: Frame) -> list[Tensor]:
        return [values.view(len(values), *frame.maps[0], -1) if frame.layout == "channels_last" else values]

    def pack(self, preds: list[Tensor], frame: Frame) -> Any:
        return preds[0]

    # ---- what is measured

    def floor(self, head: CellHead) -> float:
        """Write the gradient, read the confidences."""
        return 1 + head.num_boxes / head.channels

    def candidates(self, head: CellHead, layout: str) -> Iterable[dict[str, int]]:
        return shared.products(cells=(16, 32, 64, 128, 256), threads=(128, 256, 512))


CELLS = CellDriver()
