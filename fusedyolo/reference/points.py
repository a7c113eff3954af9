"""Losses over cells that predict a box each, and decoding these.

Boxes of a cell are known by ``shift``, the centre from the middle of the cell, and ``size``, both [..., 2] in cells.
Raw boxes are [..., 4, reg_max, N], as they are predicted: so are all of a distribution's logits known in passes over
planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import PickHead
from .overlap import corners_of
from .pick_pairs import Points, points_of
from .picks import Objects, Picked, Seen, pick, read_objects
from .primitives import constants, held, weighed
from .terms import BOX_TERMS, DECODE, LABEL_TERMS, OFFSET_TERMS
from .terms.box import boxes_of_sizes
from .terms.decode import FARTHEST
from .terms.label import LOW

BELOW_LAST = 0.01  # how far a distance that "dfl" is taught stays below the last number
LOG_EPS = 1e-8  # of the sides that "exp" is taught, ln(side + 1e-8)


class Planes(NamedTuple):
    """Predictions in one piece, N counting levels, rows, columns."""

    box: Tensor  # [B, 4 * reg_max, N]: sides, and of each its numbers
    cls: Tensor  # [B, C, N] logits
    obj: Tensor | None  # [B, 1, N] logits

    def to(self, dtype: torch.dtype) -> Planes:
        """The same in another type."""
        return Planes(self.box.to(dtype), self.cls.to(dtype), None if self.obj is None else self.obj.to(dtype))


def distances(raw: Tensor, head: PickHead) -> Tensor:
    """How far left, upper, right and lower side are from the middle, [..., 4, N] in cells."""
    if head.decode == "distance":
        return raw[..., 0, :]
    bins = torch.arange(head.reg_max, device=raw.device, dtype=raw.dtype)
    return (raw.softmax(-2) * bins[:, None]).sum(-2)


def decode_points(raw: Tensor, head: PickHead) -> tuple[Tensor, Tensor]:
    """Shift and size, [..., N, 2] in cells, of raw boxes [..., 4, reg_max, N]."""
    if head.decode == "exp":
        a, b = raw[..., 0, :].transpose(-1, -2).split(2, -1)
        return held(a, -FARTHEST, FARTHEST) - 0.5, DECODE["exp"](a, b, torch.ones_like(b), 1.0, 1.0)[1]
    before, behind = distances(raw, head).transpose(-1, -2).split(2, -1)
    one = torch.ones_like(before)
    return DECODE["ltrb"](before, behind, one, one, one)


def encode_points(off: Tensor, sides: Tensor, head: PickHead) -> Tensor:
    """What a prediction is to say of a box that is ``off`` its cell's middle with such sides, [..., 4], in cells: the
    raw numbers of ``"exp"``, else distances.
    """
    if head.decode == "exp":
        return torch.cat((off + 0.5, (sides + LOG_EPS).log()), -1)
    return torch.cat((sides / 2 - off, sides / 2 + off), -1)


def _raw(box: Tensor, head: PickHead) -> Tensor:
    """[B, 4, reg_max, N] of [B, 4 * reg_max, N]."""
    return box.unflatten(1, (4, head.reg_max))


def see(planes: Planes, points: Points, head: PickHead) -> Seen:
    """What an assigner sees; corners of boxes in pixels, from the middles of their cells."""
    with torch.no_grad():
        shift, size = decode_points(_raw(planes.box, head), head)
        boxes = corners_of(shift, size) * points.stride.to(shift.dtype)[:, None]
        return Seen(boxes, planes.cls.detach(), None if planes.obj is None else planes.obj.detach()[:, 0], points)


def pick_loss(
    planes: Planes,
    rows: Tensor,
    head: PickHead,
    gains: Sequence[float],
    maps: Sequence[tuple[int, int]],
    size: tuple[float, float],
    class_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Loss of predictions against target rows [M, 6]; in float64 for float64 predictions, else in float32.

    ``gains`` are those of ``head.parts``, ``maps`` the (height, width) of each level, ``size`` that of the image in
    pixels, ``class_weights`` [C] what the class terms of every prediction are multiplied by, ``row_weights`` [M] all
    terms of predictions with a row.

    Returns the parts, in the order of ``head.parts``, differentiable by ``planes``; counts, int32, of predictions with
    a row and of invalid rows; and the sum of weights, [1], by which the parts are divided where it is at least 1. A NaN
    shows in the parts, but for a class logit of heads with objectness that no row may pick.
    """
    dtype = torch.float64 if planes.box.dtype == torch.float64 else torch.float32
    planes = planes.to(dtype)
    points = points_of(maps, head.strides, planes.box.device)
    objects = read_objects(rows, head, len(planes.box), size, dtype, row_weights)
    seen = see(planes, points, head)
    picked = pick(seen, objects, head)
    has = picked.row >= 0
    weight = torch.where(has, picked.score, 0.0) if head.soft else has.to(dtype)
    weights = weight.sum()
    divisor = weights.clamp(min=1)
    label = objects.label[picked.row]  # of -1 it is that of nothing
    places = _places(has, min(has.numel(), len(rows) * head.topk))
    box, distance = _box_losses(planes.box, places, picked, objects, points, head, size)
    weight = torch.where(places.used, weight[places.image, places.cell], 0.0)
    share = None  # [B, N]: what terms of predictions are multiplied by
    if objects.weight is not None:
        share = objects.weight[picked.row]
        share = share if picked.hidden is None else torch.where(picked.hidden, 0.0, share)
        weight = weight * share[places.image, places.cell]

    def total(values: Tensor) -> Tensor:
        """Of all places, or those of each image."""
        if not head.by_image:
            return values.sum()
        return values.new_zeros(len(has)).index_add(0, places.image, values)

    terms = [total(weighed(box, weight)) + _nans(seen.boxes).sum()]
    found, score = (each[places.image, places.cell] for each in (label, picked.score))
    if planes.obj is None:
        terms.append(_class_loss(planes.cls, places, found.clamp(min=0), score, head, class_weights, share))
    else:
        obj = LABEL_TERMS["bce"](planes.obj[:, 0], has.to(dtype))
        terms.append(_sum_of(obj if share is None else weighed(obj, share), head))
        cls = torch.where(places.used[:, None], planes.cls[places.image, :, places.cell], 0.0)
        loss = _class_losses(cls, found, score, head, class_weights)
        loss = loss if share is None else weighed(loss, share[places.image, places.cell])
        terms.append(total(torch.where(places.used, loss, 0.0)) + picked.nans)
    terms.append(total(weighed(distance, weight)))
    known = objects.valid if objects.regions is None else objects.valid | objects.regions.valid
    counts = torch.stack((has.sum(), (~known).sum())).to(torch.int32)
    return tuple(weighed(term / divisor, gain) for gain, term in zip(gains, terms, strict=True)), counts, weights[None]


class _Places(NamedTuple):
    """Predictions in a list of a length that depends on shapes alone; others behind those that are ``used``."""

    image: Tensor
    cell: Tensor
    used: Tensor


def _places(has: Tensor, length: int) -> _Places:
    """Those that ``has`` [B, N] says, in their order."""
    place = has.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:length]
    N = has.shape[1]
    return _Places(place // N, place % N, has.flatten()[place])


def _box_losses(
    box: Tensor,
    places: _Places,
    picked: Picked,
    objects: Objects,
    points: Points,
    head: PickHead,
    size: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """The box and the distance loss of each place, of no meaning, but finite, where it is not used."""
    image, cell, used = places
    row, stride = picked.row[image, cell], points.stride[cell].to(box.dtype)[:, None]
    raw = torch.where(used[:, None], box[image, :, cell], 0.0).unflatten(1, (4, head.reg_max))
    off = (objects.centre[row] - points.middle[cell]).to(box.dtype) / stride
    off = torch.where(used[:, None], off, 0.0)
    sides = torch.where(used[:, None], objects.sides[row] / stride, 1.0)
    extent = constants((size[1], size[0]), box) / stride
    shift, sizes = decode_points(raw.permute(1, 2, 0), head)
    loss = BOX_TERMS[head.box](*boxes_of_sizes(sizes, sides, off - shift), head.box_args, extent)
    return loss, _distance_loss(raw, encode_points(off, sides, head), extent, head)


def _distance_loss(raw: Tensor, true: Tensor, extent: Tensor, head: PickHead) -> Tensor:
    """[F]: that of raw boxes [F, 4, reg_max], ``true`` [F, 4] what :func:`encode_points` says, ``extent`` [F, 2] the
    width and height of the image, in cells.
    """
    if head.distance == "dfl":
        true = true.clamp(0, head.reg_max - 1 - BELOW_LAST)
        below = true.floor()
        behind = true - below
        log = raw.log_softmax(-1)
        low, high = (log.gather(-1, (below.long() + step)[..., None])[..., 0] for step in (0, 1))
        return -(weighed(low, 1 - behind) + weighed(high, behind)).mean(-1)
    a, b = raw[..., :2, 0], raw[..., 2:, 0]
    off = OFFSET_TERMS["l1"](a, b, true[..., :2], true[..., 2:], 1.0)
    return (off / extent).sum(-1) / 4 if head.distance == "image" else off.sum(-1)


def _class_loss(
    logits: Tensor,
    places: _Places,
    label: Tensor,
    score: Tensor,
    head: PickHead,
    class_weights: Tensor | None,
    share: Tensor | None,
) -> Tensor:
    """The sum, or those of images, over logits [B, C, N], the targets of which are 0 but for the ``score`` of
    ``label``, both [F], at used ``places``; those of a prediction are multiplied by its ``share`` [B, N].
    """
    term, where = LABEL_TERMS[head.label], (places.image, label, places.cell)
    own = logits[where]
    background = term(logits.index_put(where, torch.where(places.used, LOW, own)), False, head.label_args)
    true = torch.where(places.used, term(torch.where(places.used, own, 0.0), score, head.label_args), 0.0)
    if class_weights is not None:
        class_weights = class_weights.to(logits.dtype)
        background, true = weighed(background, class_weights[:, None]), weighed(true, class_weights[label])
    if share is not None:
        background, true = weighed(background, share[:, None]), weighed(true, share[places.image, places.cell])
    if not head.by_image:
        return background.sum() + true.sum()
    return background.sum((1, 2)).index_add(0, places.image, true)


def _sum_of(values: Tensor, head: PickHead) -> Tensor:
    """Of [B, ...] the sum, or those of each image."""
    return values.flatten(1).sum(1) if head.by_image else values.sum()


def _class_losses(logits: Tensor, label: Tensor, score: Tensor, head: PickHead, class_weights: Tensor | None) -> Tensor:
    """[F]: sums over the classes of logits [F, C]; the target of ``label`` [F] is the ``score``, which is 0 where the
    label is -1, and that of all others 0.
    """
    target = torch.zeros_like(logits).scatter(1, label.clamp(min=0)[:, None], score[:, None])
    loss = LABEL_TERMS[head.label](logits, target, head.label_args)
    return (loss if class_weights is None else weighed(loss, class_weights.to(loss.dtype))).sum(1)


def _nans(values: Tensor) -> Tensor:
    """NaN where they are, else 0."""
    return torch.where(values.isnan(), values, 0.0)


def decode_predictions(planes: Planes, maps: Sequence[tuple[int, int]], head: PickHead) -> tuple[Tensor, Tensor]:
    """Boxes [B, N, 4], x1, y1, x2, y2 in pixels, and scores [B, N, C], in the dtype of predictions: the sigmoid of the
    class logit, times that of objectness where there is one.
    """
    points = points_of(maps, head.strides, planes.box.device)
    shift, size = decode_points(_raw(planes.box, head), head)
    stride = points.stride.to(shift.dtype)[:, None]
    boxes = corners_of(points.middle.to(shift.dtype) + shift * stride, size * stride)
    scores = planes.cls.sigmoid().transpose(1, 2)
    return boxes, scores if planes.obj is None else scores * planes.obj.sigmoid().transpose(1, 2)
