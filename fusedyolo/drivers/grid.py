"""The driver of anchor grids: maps of cells, each with a prediction for every anchor of its level."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks, reference
from ..heads import GridHead
from ..reference.select import decode_grid
from ..targets import as_targets, without_spare
from . import shared
from .assignments import Assignment, LevelAssignment
from .protocol import Driver, Frame, Known, Piece, Predictions

if TYPE_CHECKING:
    from ..ops import Launch


class GridCall(NamedTuple):
    """The arguments of a call."""

    preds: Sequence[Tensor]
    rows: Tensor  # [M, 6]
    offsets: Tensor | None
    size: tuple[float, float]  # (height, width) of the image
    class_weights: Tensor | None
    weights: Tensor | None = None  # [M], of the rows
    lead: Sequence[Tensor] = ()  # maps by whose cost rows pick, in place of preds


class GridDriver(Driver):
    """See :class:`~fusedyolo.drivers.protocol.Driver`."""

    head = GridHead
    kind = "grid"
    layouts = ("nchw", "channels_last")
    scans = True

    # ---- a call of a loss

    def read(self, criterion: Any, preds: Any, targets: Any, **geometry: Any) -> GridCall:
        shared.refuse(geometry)
        maps, batch, size = self.maps_of(criterion, criterion.own(preds))
        rows, offsets, weights = as_targets(targets, batch, size, maps[0].device, criterion.form)
        return GridCall(maps, rows, offsets, size, criterion.class_weights, weights)

    def maps_of(self, criterion: Any, preds: Any) -> tuple[list[Tensor], int, tuple[float, float]]:
        """Checked predictions, the number of images, and their (height, width)."""
        head = criterion.head
        maps, anchors = _maps(preds, head), tuple(map(len, head.levels))
        batch, size = checks.grid_predictions(maps, anchors, head.strides, head.num_classes, criterion.image_size, True)
        return checks.grid_views(maps, anchors, head.num_classes), batch, size

    def reference_loss(self, head: GridHead, call: GridCall) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, spare = without_spare(call.rows, call.offsets)
        preds, lead = _views(call.preds, head), _views(call.lead, head)
        total, parts, counts = reference.grid_loss(preds, rows, head, call.class_weights, call.weights, lead)
        return total, parts, shared.counts_without_spare(counts, spare), None

    def launches(self, head: GridHead, call: GridCall) -> dict[str, Launch]:
        from .. import ops

        preds = list(call.preds)
        outputs = ops.grid_outputs(preds, call.rows, head, True)
        grads, one = [torch.empty_like(pred) for pred in preds], torch.ones((), device=preds[0].device)
        given = preds, call.rows, call.offsets, call.class_weights, head, outputs, True, call.weights, call.lead
        grad = ops.grid_grad_launch(preds, grads, one, head, outputs, call.weights)
        return ops.grid_launches(*given) | {"grad": grad}

    def assign(self, head: GridHead, call: GridCall) -> Assignment:
        rows, _ = without_spare(call.rows, call.offsets)
        with torch.no_grad():
            views = [view.to(shared.wide(view.dtype)) for view in _views(call.preds, head)]
            read = reference.read_rows(rows, head, len(views[0]), call.weights)
            found = reference.assigned(views, read, head)
            levels = tuple(_level(view, level, read, found[level], head) for level, view in enumerate(views))
        anchors = tuple(tuple(head.anchors[t] for t in own) for own in head.levels)
        return Assignment(levels, rows, read.valid, head.strides, anchors, call.weights)

    # ---- predictions alone

    def view(self, criterion: Any, preds: Any, image_size: Any, anchors: Any) -> Predictions:
        head = criterion.head
        size = shared.image_size(criterion, image_size)
        shared.own_anchors(anchors)
        own = criterion.own(preds)
        maps = _maps(own, head) if len(head.levels) == 1 else own
        strides = tuple(int(s) if s.is_integer() else s for s in head.strides)
        anchors_of = tuple(map(len, head.levels))
        checks.grid_predictions(maps, anchors_of, strides, head.num_classes, size, True)
        return Predictions(checks.grid_views(maps, anchors_of, head.num_classes))

    def decode(self, head: GridHead, seen: Predictions) -> tuple[Tensor, Tensor]:
        return decode_grid(seen.preds, head)

    # ---- what a network with such a head looks like

    def pieces(self, head: GridHead, frame: Frame) -> list[Piece]:
        width = 5 + head.num_classes
        return [
            Piece((frame.batch, count, width, *sides), width, (level,), low=(2, 4, width - 4), rare=(4,))
            for level, (count, sides) in enumerate(zip(frame.cell, frame.maps, strict=True))
        ]

    def arrange(self, values: Tensor, piece: Piece, frame: Frame) -> list[Tensor]:
        values = values.flatten(1, 2)
        last = frame.layout == "channels_last"
        return [values.contiguous(memory_format=torch.channels_last) if last else values]

    def pack(self, preds: list[Tensor], frame: Frame) -> Any:
        return preds if len(preds) > 1 else preds[0]

    # ---- what is measured

    def floor(self, head: GridHead) -> float:
        """Write the gradient; read objectness, and boxes where there is an ignore mask or a prior."""
        boxes = head.ignore_thresh is not None or head.prior_gain > 0 or any(head.smooth)
        return 1 + (5 if boxes else 1) / (5 + head.num_classes)

    def candidates(self, head: GridHead, layout: str) -> Iterable[dict[str, int]]:
        if layout == "channels_last":
            yield from shared.products(cells=(128, 256, 512), channels=(16, 32, 64), threads=(64, 128))
            yield from shared.products(stages=(1, 2, 4))
            yield from shared.products(max_registers=(128, 168))
            return
        for cells, channels, each in itertools.product((256, 512, 1024), (4, 8, 16), (16, 8, 4)):
            yield {"cells": cells, "channels": channels, "threads": cells // each}
        yield from shared.products(stages=(1, 2, 4))
        yield from shared.products(max_registers=(96, 168, 255))

    def kinds(self, kernel: str, programs: int, arguments: Mapping[str, Any]) -> Sequence[int]:
        if kernel not in _BY_TILE:  # of rows, which look at what all others have left: each is run
            return range(programs)
        most, parts = arguments["SPEC"].CELLS, self.together(kernel, arguments)
        return [
            (level * (most + 1) + min(cells, size - tile * cells)) * parts + part
            for level, size, cells, anchors in _by_level(arguments)
            for _ in range(shared.even(arguments["levels"].batch) * anchors)
            for tile in range(-(-size // cells))
            for part in range(parts)
        ]

    def efforts(
        self, kernel: str, kinds: Sequence[int], arguments: Mapping[str, Any], known: Known
    ) -> tuple[Sequence[Any], list[float]]:
        """By the rows of a tile, whether some share a prediction, and the rows of its image."""
        if kernel not in _BY_TILE:
            return super().efforts(kernel, kinds, arguments, known)
        counts = [
            (int(tile.sum()), min(int(tile.max()), 2), known.rows[image])
            for level, _, cells, _ in _by_level(arguments)
            for image, planes in enumerate(_rows_of(known.assignment.levels[level]))
            for plane in planes
            for tile in plane.split(cells)
            for _ in range(self.together(kernel, arguments))
        ]
        finer = [(kind, most) for kind, (_, most, _) in zip(kinds, counts, strict=True)]
        return finer, [4.0 * assigned + rows for assigned, _, rows in counts]

    def together(self, kernel: str, arguments: Mapping[str, Any]) -> int:
        return int(arguments["SPEC"].PARTS) if kernel == "grid_grad_kernel" else 1


GRID = GridDriver()

_BY_TILE = ("grid_kernel", "grid_grad_kernel")
"""Kernels whose programs are tiles of the maps, or parts of one, level by level, image by image, anchor by anchor."""


def _by_level(arguments: Mapping[str, Any]) -> list[tuple[int, int, int, int]]:
    """Number, cells, those of a program, and anchors of each level, the last one first, as programs take them."""
    levels = arguments["levels"]
    numbers = [[shared.even(n) for n in each] for each in (levels.widths, levels.heights, levels.tiles)]
    anchors = arguments["SPEC"].ANCHORS
    return [(level, w * h, tile, anchors[level]) for level, (w, h, tile) in enumerate(zip(*numbers, strict=True))][::-1]


def _rows_of(level: LevelAssignment) -> Tensor:
    """How many rows each prediction of a map is assigned to, ``[B, A, H * W]``."""
    counts = torch.bincount(level.pairs[1], minlength=level.row.numel() + 1)[:-1]
    return counts.view(level.row.shape).flatten(2)


def _views(preds: Sequence[Tensor], head: GridHead) -> list[Tensor]:
    """Maps as [B, A, H, W, 5 + C], if there are some."""
    return [reference.grid_view(pred, len(head.levels[level])) for level, pred in enumerate(preds)]


def _maps(preds: Any, head: GridHead) -> Any:
    """A list of maps; of one level the map itself will do."""
    return [preds] if isinstance(preds, Tensor) else preds


def _level(
    pred: Tensor, level: int, rows: reference.Rows, found: reference.Candidates, head: GridHead
) -> LevelAssignment:
    B, A, H, W, _ = shape = pred.shape
    N, stride, scale = B * A * H * W, head.strides[level], head.scale_x_y[level]
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
    origin = torch.stack((index % W, index // W % H), -1).to(pred.dtype) * stride
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
