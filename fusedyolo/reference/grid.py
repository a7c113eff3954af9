"""Anchor-grid losses: the twin of ``kernels/grid``; ``docs/design.md``, "Contracts", says what it computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..heads import GridHead, obj_scales
from ..terms import TERMS
from .candidates import Candidates, anchors_of, assign, level_anchors, pairs_with
from .choose import choose
from .overlap import area
from .primitives import at_hand, constants, read_weighed, weighed, where_used
from .rows import Rows, read_rows
from .terms import BOX_TERMS, DECODE, LABEL_TERMS, OFFSET_TERMS, label_term
from .terms.box import boxes_of_sizes


def grid_view(pred: Tensor, anchors: int) -> Tensor:
    """``[B, A (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]`` as a view ``[B, A, H, W, 5 + C]``."""
    return pred if pred.ndim == 5 else pred.unflatten(1, (anchors, -1)).permute(0, 1, 3, 4, 2)


def decode_map(raw: Tensor, level: int, head: GridHead) -> tuple[Tensor, Tensor]:
    """Centres and sizes, both [B, A, H, W, 2] in pixels, of the boxes of a whole map [B, A, H, W, >= 4]."""
    (H, W), stride = raw.shape[2:4], head.strides[level]
    x, y = torch.arange(W, device=raw.device), torch.arange(H, device=raw.device)
    origin = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).to(raw.dtype) * stride
    anchors = level_anchors(head, level, raw)[:, None, None]
    centre, size = DECODE[head.decode](raw[..., :2], raw[..., 2:4], anchors, stride, head.scale_x_y[level])
    return centre + origin, size


def grid_loss(
    preds: Sequence[Tensor],
    rows: Tensor,
    head: GridHead,
    class_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    lead: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of prediction maps [B, A, H, W, 5 + C] against target rows [M, 6]; computed in float64 for float64 maps,
    else in float32.

    Returns the total, differentiable by ``preds``; its parts (box, objectness, classes), detached; and counts, int32,
    of assigned predictions and of invalid rows. Total and parts are [B] each where the head asks for a loss of each
    image. Where it asks for those of each level the total is [L, 2], box and classes, and objectness; and instead of
    the parts there are, [L, 6], of each level these, its assigned predictions, and what box and classes, and
    objectness, are divided by where that is at least 1.

    ``class_weights`` [C] are the m of the contract, or weights of the class terms, ``row_weights`` [M] the weights of
    the rows. Where rows pick by cost it is that of the maps ``lead``, if there are some.
    """
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in preds) else torch.float32
    batch_size = preds[0].shape[0]
    read = read_rows(rows, head, batch_size, row_weights)
    weights = None if class_weights is None else class_weights.detach().to(dtype)
    maps = [(p.shape[2], p.shape[3]) for p in preds]
    # of a symbolic size, range makes a number
    cells = tuple(len(own) * len(range(H)) * len(range(W)) for own, (H, W) in zip(head.levels, maps, strict=True))
    scales = _obj_scales(head.obj_balance, head.obj_mean, cells)
    preds = [pred.to(dtype) for pred in preds]
    judged = [pred.to(dtype) for pred in lead] or preds
    levels = [
        _level_loss(pred, level, read, _pairs_alone(found, pred[..., 0].numel()), head, weights, scales[level])
        for level, (pred, found) in enumerate(zip(preds, assigned(judged, read, head), strict=True))
    ]
    positives = torch.stack([level[3] for level in levels]).sum()
    counts = torch.stack([positives, read.invalid]).to(torch.int32)
    if head.by_level:
        table = torch.stack([torch.stack([each.to(dtype) for each in level]) for level in levels])
        return torch.stack((table[:, 0] + table[:, 2], table[:, 1]), 1), table.detach(), counts
    parts = torch.stack([torch.stack(part).sum(0) for part in list(zip(*levels, strict=True))[:3]])
    return parts.sum(0), parts.detach(), counts


def assigned(preds: Sequence[Tensor], rows: Rows, head: GridHead) -> list[Candidates]:
    """Who is assigned to whom on the maps [B, A, H, W, 5 + C] of each level, in the type in which all is computed."""
    maps, batch_size, dtype = [(p.shape[2], p.shape[3]) for p in preds], preds[0].shape[0], preds[0].dtype
    found = [assign(rows, head, level, maps, batch_size, dtype) for level in range(len(preds))]
    return choose(found, preds, rows, head) if head.by_cost else found


def _pairs_alone(found: Candidates, predictions: int) -> Candidates:
    """The candidates without those that are no pair, but for one where there would be none, if values are at hand."""
    if not at_hand(found.slot):
        return found
    pairs = (found.slot < predictions).nonzero()[:, 0]
    pairs = pairs if len(pairs) else torch.arange(min(1, len(found.slot)), device=pairs.device)
    return Candidates(found.row[pairs], found.slot[pairs], found.ignored)


_obj_scales = torch.compiler.assume_constant_result(obj_scales)


def _level_loss(
    pred: Tensor, level: int, rows: Rows, found: Candidates, head: GridHead, weights: Tensor | None, obj_scale: float
) -> tuple[Tensor, ...]:
    """Box, objectness and class loss of one map; the number of its assigned predictions; and, where these are means,
    of rows that count and of predictions whose objectness does, else 0.
    """
    B, A, H, W, channels = pred.shape
    N, C, R = B * A * H * W, channels - 5, len(found.row)
    slot, label = found.slot, rows.label[found.row]
    assigned = slot < N
    place = torch.where(assigned, slot, 0)
    image = place // (A * H * W)
    raw_boxes, raw_obj, raw_classes = _split(pred)
    boxes, logits = (
        where_used(_of_predictions(each, place), assigned[:, None])  # [R, .], no NaN from elsewhere
        for each in (raw_boxes, raw_classes)
    )
    m = pred.new_ones(R) if weights is None or head.weigh_classes else weights[label]
    own = None if rows.weight is None else rows.weight.to(pred.dtype)[found.row]
    if own is not None:
        m = m * own

    # candidates that share a prediction: the leader of each group stands for it; slot N is no prediction
    order = torch.arange(R, device=pred.device)
    first = order.new_full((N + 1,), R).scatter_reduce(0, slot, order, "amin")[slot]
    last = order.new_full((N + 1,), -1).scatter_reduce(0, slot, order, "amax")[slot]
    group = {"sum": first, "last": last, "each": order, "merge": first}[head.shared]
    lead = assigned & (group == order)
    is_last = assigned & (last == order)
    names = is_last if head.shared == "last" else assigned  # a class
    used = is_last if head.shared in ("last", "merge") else assigned

    boxes = where_used(boxes, used[:, None])  # what is not trained has no infinite slope, times 0
    boxes = boxes if weights is None and own is None else read_weighed(boxes, m[:, None])

    # classes, where a candidate leads
    named = torch.where(names, group * C + label, R * C)
    there = named.new_zeros(R * C + 1, dtype=torch.bool).scatter(0, named, True)[:-1].view(R, C)
    target, (one, zero) = there, head.class_targets
    if one != 1 or zero != 0 or not TERMS[head.label].elementwise:
        positive, negative = constants(head.class_targets, pred)
        target = torch.where(there, positive, negative)
    columns = weights if head.weigh_classes else None
    loss = label_term(head.label, logits, target, head.label_args, columns)
    if weights is not None and not head.weigh_classes:
        count = named.new_zeros(R * C + 1).scatter_add_(0, named, torch.ones_like(named))[:-1].view(R, C)
        only = (torch.arange(C, device=pred.device) == label[:, None]) & (count == 1)
        loss = weighed(loss, torch.where(there, torch.where(only, head.first_weight * weights, weights), 1.0))
    if own is not None:
        loss = weighed(loss, _class_shares(own, there, named, order if head.shared == "each" else last))
    cls = weighed(_total(where_used(loss, lead[:, None]), image, B, head), head.cls_gain)

    # boxes, for each candidate in use
    loss, quality = box_loss(boxes if head.box_gain else boxes.detach(), rows, found, level, (H, W), head)
    loss = weighed(loss, m)
    if head.average_box:
        pushed_up = (target > logits.detach().sigmoid()).sum(-1)
        loss = loss / pushed_up.clamp(min=1)[group.clamp(max=R - 1)]
    box = weighed(_total(where_used(loss, used), image, B, head), head.box_gain)
    answers = objectness_targets(pred.detach(), rows, found, quality, level, head)
    if head.prior_gain > 0:
        raw = raw_boxes.permute(0, 1, 3, 4, 2)
        prior = _prior_loss(raw, ~answers.assigned.view(B, A, H, W), level, head)
        box = box + head.prior_gain * _total(prior, None, B, head)
    none = answers.assigned.new_zeros((), dtype=torch.int64)
    in_use, counted = used.sum() if head.mean_rows else none, answers.used.sum() if head.obj_mean == "used" else none
    if head.mean_rows:
        box, cls = (part / in_use.clamp(min=1) for part in (box, cls))

    # objectness, for each prediction
    used = answers.used
    gain, smooth = pred.new_full((), head.noobj_gain), head.smooth and head.smooth[level]
    if not smooth or own is not None:
        owner = torch.where(is_last, slot, N)
        answer = head.obj_gain * m if own is None or not smooth else head.noobj_gain * own
        gain = pred.new_full((N + 1,), head.noobj_gain).scatter(0, owner, answer)[:N]
    term = LABEL_TERMS[head.objectness](where_used(raw_obj.flatten(), used), answers.target, head.obj_args)
    obj = _total(where_used(weighed(term, obj_scale * gain), used), None, B, head)
    if head.obj_mean == "used":
        obj = obj / counted.clamp(min=1)
    # a NaN that is read shows, used or not: of a box it cannot be told whether it is ignored
    read = 0 if head.ignore_thresh is not None or head.prior_gain > 0 else 4
    unknown = pred[..., read:5].detach().isnan()
    unknown = unknown.flatten(1).any(1) if head.by_image else unknown.any()
    obj = obj + torch.zeros_like(obj.detach()).masked_fill(unknown, math.nan)
    return box, obj, cls, answers.assigned.sum(), in_use, counted


def _total(values: Tensor, image: Tensor | None, batch_size: int, head: GridHead) -> Tensor:
    """The sum of values [R, ...], or [B] those of the images that they are of: ``image`` [R], None for one after the
    other.
    """
    if not head.by_image:
        return values.sum()
    if image is None:
        return values.reshape(batch_size, -1).sum(1)
    return values.new_zeros(batch_size).index_add(0, image, values.flatten(1).sum(1) if values.ndim > 1 else values)


def _class_shares(own: Tensor, there: Tensor, named: Tensor, trains: Tensor) -> Tensor:
    """[R, C]: what the class terms are multiplied by where a candidate leads its group: those of a class that rows
    name by the weight of the last of these, all others by that of the candidate that ``trains`` the prediction.

    ``own`` [R] are weights, ``there`` [R, C] says which classes rows name, ``named`` [R] where among these.
    """
    R, C = there.shape
    order = torch.arange(R, device=own.device)
    naming = order.new_full((R * C + 1,), 0).scatter_reduce(0, named, order, "amax")[:-1].view(R, C)
    return torch.where(there, own[naming], own[trains][:, None])


def _split(pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, objectness and classes [B, A, ., H, W] of a map [B, A, H, W, 5 + C].

    Once, for the gradient of each is put into one that lies as the map does; those of several views would be added up.
    """
    sizes = [4, 1, pred.shape[-1] - 5]
    if not torch.compiler.is_compiling() and pred.stride(-1) == 1:  # to a graph a stride may be a symbol
        return tuple(part.permute(0, 1, 4, 2, 3) for part in pred.split(sizes, -1))
    return pred.permute(0, 1, 4, 2, 3).split(sizes, 2)


def _of_predictions(part: Tensor, place: Tensor) -> Tensor:
    """[R, .]: what a part [B, A, ., H, W] of a map says at places [R] by (image, anchor, y, x)."""
    B, A, _, H, W = part.shape
    if at_hand(part) and len(place) > B * A * H * W:  # each several times: channels side by side are read quicker
        return part.permute(0, 1, 3, 4, 2).flatten(0, 3).index_select(0, place)
    return part[place // (A * H * W), place // (H * W) % A, :, place // W % H, place % W]


@dataclass(frozen=True)
class Answers:
    """What the N = B * A * H * W predictions of a level are to say of objects, in flat order."""

    row: Tensor  # [N] int64: the row it answers for, the last of several; M where none
    assigned: Tensor  # [N] bool
    target: Tensor  # [N]: objectness
    used: Tensor  # [N] bool: its objectness is trained


def objectness_targets(
    pred: Tensor, rows: Rows, found: Candidates, quality: Tensor, level: int, head: GridHead
) -> Answers:
    """Who answers for what on one map [B, A, H, W, 5 + C], and with what objectness.

    ``quality`` [R] is the objectness target that each candidate leaves.
    """
    N, M = pred[..., 0].numel(), len(rows.label)
    order = torch.arange(len(found.slot), device=pred.device)
    last = order.new_full((N + 1,), -1).scatter_reduce(0, found.slot, order, "amax")[:N]
    assigned = last >= 0
    place = last.clamp(min=0)
    row = torch.where(assigned, found.row[place] if M else M, M)
    overlap = _overlap(pred, rows, level, head)
    hidden = _in_regions(pred, rows)
    if head.smooth and head.smooth[level]:
        return Answers(row, assigned, overlap, torch.ones_like(assigned) if hidden is None else assigned | ~hidden)
    target = torch.where(assigned, quality[place] if M else 0.0, 0.0)
    left_out = overlap > 0 if found.ignored is None else (overlap > 0) | found.ignored
    if hidden is not None:
        left_out = left_out | hidden
    return Answers(row, assigned, target, assigned | ~left_out)


def _in_regions(pred: Tensor, rows: Rows) -> Tensor | None:
    """[N] bool: predictions whose cell has its middle in an ignored region, in cells and float32; None where there are
    no weights.
    """
    B, A, H, W, _ = pred.shape
    if rows.regions is None:
        return None
    x, y = (torch.arange(n, device=pred.device, dtype=torch.float32) + 0.5 for n in (W, H))
    middles = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).flatten(0, 1)
    hidden = rows.regions.scaled(W, H).of_points(middles, B)
    return hidden[:, None].expand(B, A, H * W).flatten()


def box_loss(
    raw: Tensor, rows: Rows, found: Candidates, level: int, size: tuple[int, int], head: GridHead
) -> tuple[Tensor, Tensor]:
    """Box term [R] of candidates on a map of ``size`` (H, W), from raw logits [R, >= 4], and the objectness target [R]
    that each leaves.
    """
    boxes = rows.boxes.to(raw.dtype)[found.row]
    offset, anchors = locate(rows, found, level, size, head, raw.dtype)
    return _box_term(raw, offset, boxes[:, 2:], anchors, level, size, head)


def locate(
    rows: Rows, found: Candidates, level: int, size: tuple[int, int], head: GridHead, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Of candidates, the true centre [R, 2] from the cell's origin, in cells, and the anchor [R, 2], in pixels."""
    (H, W), own = size, head.levels[level]
    boxes = rows.boxes.to(dtype)[found.row]
    place = found.slot % (len(own) * H * W)
    cell = torch.stack((place % W, place // W % H), -1)
    return boxes[:, :2] * constants((W, H), boxes) - cell, anchors_of(head, own, boxes)[place // (H * W)]


def _box_term(
    raw: Tensor, offset: Tensor, size: Tensor, anchors: Tensor, level: int, cells: tuple[int, int], head: GridHead
) -> tuple[Tensor, Tensor]:
    """Box term [...] and objectness target [...] from logits [..., >= 4] and, all [..., 2], the true centre from the
    cell's origin in cells, the true size relative to the image, and the anchors in pixels; ``cells`` is (H, W).
    """
    a, b, stride, scale = raw[..., :2], raw[..., 2:4], head.strides[level], head.scale_x_y[level]
    image = constants((cells[1] * stride, cells[0] * stride), raw)
    centre, p = DECODE[head.decode](a, b, anchors, stride, scale)
    lengths = p, size * image, offset * stride - centre
    unit = {"pixel": torch.ones_like(image), "cell": torch.full_like(image, stride), "image": image}[head.unit]
    pair = boxes_of_sizes(*(lengths if head.unit == "pixel" else [each / unit for each in lengths]))
    if head.box in OFFSET_TERMS:
        loss = OFFSET_TERMS[head.box](a, b, offset, (size * image / anchors).log(), scale).sum(-1)
        loss = loss * (1 + head.area_weight * (1 - area(size).clamp(max=head.area_cap)))
    else:
        loss = BOX_TERMS[head.box](*pair, head.box_args, image / unit)
    quality = torch.ones_like(loss.detach())
    if head.quality is not None:
        if head.quality == head.box and head.quality_args == head.box_args:
            value = 1 - loss.detach()
        else:
            value = 1 - BOX_TERMS[head.quality](*(side.detach() for side in pair), head.quality_args, image / unit)
        quality = 1 - head.quality_ratio + head.quality_ratio * value.clamp(min=0)
    return loss, quality


def _prior_loss(raw: Tensor, free: Tensor, level: int, head: GridHead) -> Tensor:
    """Box terms [B, A, H, W] of the predictions ``raw`` [B, A, H, W, 4] that are ``free`` [B, A, H, W] of an object,
    towards the middle of their cell; 0 of others.

    An offset term takes the anchor for the true size, an IoU term a true box without size.
    """
    raw = torch.where(free[..., None], raw, 0.0)
    middle = torch.full_like(raw[..., :2], 0.5)
    if head.box in OFFSET_TERMS:
        a, b = raw[..., :2], raw[..., 2:]
        loss = OFFSET_TERMS[head.box](a, b, middle, torch.zeros_like(b), head.scale_x_y[level]).sum(-1)
    else:
        anchors = anchors_of(head, head.levels[level], raw)[:, None, None].expand_as(middle)
        size = (raw.shape[2], raw.shape[3])
        loss, _ = _box_term(raw, middle, torch.zeros_like(middle), anchors, level, size, head)
    return torch.where(free, loss, 0.0)


def _overlap(pred: Tensor, rows: Rows, level: int, head: GridHead) -> Tensor:
    """[N]: the largest IoU of a decoded box with a valid row of its image, 0 if not above ignore_thresh or gated."""
    B, _, H, W, _ = pred.shape
    if head.ignore_thresh is None:
        return pred.new_zeros(pred[..., 0].numel())
    boxes = rows.boxes.to(pred.dtype) * constants((W, H, W, H), pred) * head.strides[level]
    best = pairs_with(*decode_map(pred, level, head), boxes, rows).best(B)
    passed = best > head.ignore_thresh
    if head.class_gate is not None:
        passed = passed & (pred[..., 5:] > head.class_gate).any(-1).view_as(best)
    return torch.where(passed, best, 0.0).flatten()
