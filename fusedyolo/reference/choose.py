"""Which candidates of anchor grids are assigned, and to whom, where rows pick among those of their image: the twin of
``kernels/grid/offer.py`` and ``kernels/grid/choose.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import GridHead
from .candidates import Candidates, level_anchors
from .overlap import Corners, area, corner_areas, corners_of, iou
from .pairs import chunks
from .picks import IOU_EPS, IOU_WEIGHT, NONE, class_costs, largest_of
from .primitives import at_hand
from .rows import Rows
from .terms import DECODE


class _Offers(NamedTuple):
    """E candidates, level by level; those that are no pair of a row and a prediction are of image -1."""

    image: Tensor  # [E] int64
    origin: Tensor  # [E, 2] the corner of its cell, in pixels
    boxes: Tensor  # [E, 4] x1, y1, x2, y2 from there
    shared: Tensor  # [E] what a class costs, whichever it is
    apart: Tensor  # [E, C] and the true one, beside that


def choose(found: Sequence[Candidates], preds: Sequence[Tensor], rows: Rows, head: GridHead) -> list[Candidates]:
    """Of the candidates ``found`` on each level those that rows pick, each with the row that has it; the slot of all
    others is that of no prediction.

    Simplified optimal transport (Ge et al. 2021, arXiv 2107.08430) as YOLOv7 trains: a row may pick any candidate of
    its image, whoever offers it, and one that several rows offer counts as many times. True boxes are relative to the
    *height* of the image on both axes. Of equal costs the first candidate is picked; what several rows pick goes to the
    row of the image that it costs least, of equals the first. ``preds``, which they are priced by, are
    [B, A, H, W, 5 + C].
    """
    with torch.no_grad():
        amounts = [pred[..., 0].numel() for pred in preds]
        pairs = [_pairs_among(each.slot, amount) for each, amount in zip(found, amounts, strict=True)]
        levels = [
            _offers(each.slot[now], pred.detach(), level, head)
            for level, (each, pred, now) in enumerate(zip(found, preds, pairs, strict=True))
        ]
        offers = _Offers(*(torch.cat(parts) for parts in zip(*levels, strict=True)))
        boxes = rows.boxes.to(offers.boxes.dtype) * (preds[0].shape[2] * head.strides[0])
        owner = torch.full_like(offers.image, len(boxes))
        for own, now in _meetings(rows, offers, preds[0].shape[0]):
            who = _owners(own, boxes, rows, _Offers(*(part[now] for part in offers)), head.topk)
            owner = owner.index_put((now,), who)  # not in place, which vmap knows nothing of
        return [
            _chosen(each, now, who, len(boxes), amount)
            for each, now, who, amount in zip(found, pairs, owner.split(list(map(len, pairs))), amounts, strict=True)
        ]


def _chosen(found: Candidates, pairs: Tensor, who: Tensor, M: int, amount: int) -> Candidates:
    """Of candidates those ``pairs`` that a row ``who`` has, one of M; the slot ``amount`` is none."""
    slot = torch.where(who < M, found.slot[pairs], amount)
    return Candidates(
        found.row.index_put((pairs,), torch.where(who < M, who, 0)),
        torch.full_like(found.slot, amount).index_put((pairs,), slot),
    )


def _pairs_among(slot: Tensor, amount: int) -> Tensor:
    """Indices of candidates that are a pair of a row and one of so many predictions; all, if values are not at hand."""
    return (slot < amount).nonzero()[:, 0] if at_hand(slot) else torch.arange(len(slot), device=slot.device)


def _offers(slot: Tensor, pred: Tensor, level: int, head: GridHead) -> _Offers:
    _, A, H, W, _ = pred.shape
    there = slot < pred[..., 0].numel()
    place = torch.where(there, slot, 0)
    image, anchor, y, x = place // (A * H * W), place // (H * W) % A, place // W % H, place % W
    raw, stride = pred[image, anchor, y, x], head.strides[level]
    anchors = level_anchors(head, level, raw)[anchor]
    centre, size = DECODE[head.decode](raw[:, :2], raw[:, 2:4], anchors, stride, head.scale_x_y[level])
    apart, shared = class_costs(raw[None, :, 5:].transpose(1, 2), raw[None, :, 4])
    return _Offers(
        torch.where(there, image, -1),
        torch.stack((x, y), 1).to(raw.dtype) * stride,
        corners_of(centre, size),
        shared[0],
        apart[0].T,
    )


def _meetings(rows: Rows, offers: _Offers, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and candidates that may meet, by their indices: image by image, or where values are not at hand all."""
    if not at_hand(offers.image):
        yield tuple(torch.arange(len(each), device=each.device) for each in (rows.valid, offers.image))  # type: ignore[misc]
        return
    for b in range(batch_size):
        own = ((rows.image == b) & rows.valid).nonzero()[:, 0]
        now = (offers.image == b).nonzero()[:, 0]
        if len(own) and len(now):
            yield own, now


def _owners(own: Tensor, boxes: Tensor, rows: Rows, offers: _Offers, most: int) -> Tensor:
    """[E]: of the rows ``own``, which pick so many at ``most``, the one that has each candidate; the number of all rows
    where none has. ``boxes`` of all rows, by centre and size in pixels.
    """
    M, E = len(boxes), len(offers.image)
    picks, picker = own.new_zeros(E + 1), own.new_full((E + 1,), M)
    least, claimant = offers.shared.new_full((E,), NONE), own.new_full((E,), M)
    # what is compiled has all at once: a symbol of rows beside one of candidates, no chunk of which has a size
    for now in (slice(0, len(own)),) if torch.compiler.is_compiling() else chunks(len(own), max(1, E)):
        row = own[now]
        overlap, worth = _pairs(boxes[row], rows.label[row], offers)
        possible = (offers.image == rows.image[row, None]) & rows.valid[row, None] & ~worth.isnan()
        worth = torch.where(possible, worth, NONE)
        largest = torch.where(possible, overlap, 0.0).topk(min(most, E), 1).values
        index, value = largest_of(worth, min(most, E))
        order = torch.arange(index.shape[1], device=index.device)
        chosen = (value > NONE) & (order < largest.sum(1).long().clamp(min=1)[:, None])
        place = torch.where(chosen, index, E).flatten()
        picks = picks.scatter_add(0, place, torch.ones_like(place))
        picker = picker.scatter_reduce(0, place, row[:, None].expand_as(index).flatten(), "amin")
        if len(row):
            top = worth.amax(0)
            first = torch.where(worth == top, row[:, None], M).amin(0)
            claimant = torch.where(top > least, first, claimant)
            least = torch.maximum(top, least)
    return torch.where(picks[:-1] > 1, claimant, picker[:-1])


def _pairs(boxes: Tensor, label: Tensor, offers: _Offers) -> tuple[Tensor, Tensor]:
    """IoU of rows with candidates, 0 where it is NaN, and less what these cost them, both [R, E]."""
    true = Corners(*corners_of(boxes[:, None, :2] - offers.origin, boxes[:, None, 2:]).unbind(-1))
    areas = corner_areas(offers.boxes), area(boxes[:, 2:])[:, None]
    overlap = iou(Corners(*offers.boxes.unbind(-1)), true, *areas)
    overlap = torch.where(overlap > 0, overlap, 0.0)
    return overlap, IOU_WEIGHT * (overlap + IOU_EPS).log() - offers.shared - offers.apart.T[label]
