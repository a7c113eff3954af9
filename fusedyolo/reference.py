"""Every formula once, in eager PyTorch: the truth (float64) that the kernels are tested against, and the CPU backend.

Plain differentiable operations, gradients by autograd. Shapes depend on shapes only, and no constant is copied from the
host, so nothing here waits for a device. The terms are the twins of ``kernels/terms`` under the same names, and
:func:`grid_loss` is the twin of ``kernels/grid.py``; ``docs/design.md``, "Contracts", says what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .heads import GridHead

IGNORE_CHUNK = 1 << 18  # (row, prediction) pairs of the ignore test that are in memory at a time


def _div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with no gradient where b is 0; the inner where keeps NaN out of the backward."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def _constants(values: Sequence[float], like: Tensor) -> Tensor:
    """[len(values)] of the dtype and device of ``like``, by fill: torch.tensor(..., device="cuda") would wait."""
    return torch.stack([like.new_full((), value) for value in values])


# ---- label terms: (x, t, args) -> loss, elementwise; logit x, target t in [0, 1] of one dtype. Smooth, no ties.


def bce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-t log(p) - (1 - t) log(1 - p), p = sigmoid(x). The derivative is sigmoid(x) - t for every x, 0 included.

    PyTorch's own, (1 - t) x - logsigmoid(x), has no digit left in float32 for a background logit of -17.
    """
    return -(t * logsigmoid(x) + (1 - t) * logsigmoid(-x))


def focal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t q^gamma BCE, q = 1 - p_t, args = (alpha, gamma); RetinaNet eq. 5, soft targets as torchvision.

    A negative alpha means no factor. q is summed from products, not from 1 - p_t, so that it keeps its digits where the
    prediction is right. Where it underflows, so does the BCE, and the loss is 0: the derivative of q^gamma is inf * 0
    there for gamma < 1.
    """
    alpha, gamma = args
    q = x.sigmoid() * (1 - t) + (-x).sigmoid() * t
    zero = q < torch.finfo(q.dtype).tiny
    modulator = torch.where(zero, 0.0, torch.where(zero, 1.0, q) ** gamma)
    if alpha >= 0:
        modulator = modulator * (alpha * t + (1 - alpha) * (1 - t))
    return modulator * bce(x, t)


# ---- box terms: (p, g, args) -> loss [...]; predicted and true boxes [..., 4], x1 y1 x2 y2, in one unit of length.
# args = (eps, eps_alpha): eps joins each denominator, eps_alpha that of CIoU's alpha. Gradients flow to both boxes.
# Rules of torchvision: edges that coincide share the gradient half and half (torch.maximum, torch.minimum); boxes that
# only touch do not intersect, and their intersection has no gradient. A quotient by 0 is 0.


class _Pair(NamedTuple):
    """Lengths [..., 2] of a pair of boxes, in units of the longer side of the enclosing box."""

    p: Tensor
    g: Tensor
    overlap: Tensor  # both entries 0 where the boxes do not meet
    enclosing: Tensor
    distance: Tensor  # between the centres
    eps: Tensor | float  # in that unit, squared


def _pair(p: Tensor, g: Tensor, eps: float) -> _Pair:
    """The family is invariant under scaling; without it an area of 1e28 pixels by 1e28 leaves float32."""
    p1, p2, g1, g2 = p[..., :2], p[..., 2:], g[..., :2], g[..., 2:]
    overlap = torch.minimum(p2, g2) - torch.maximum(p1, g1)
    overlap = torch.where((overlap > 0).all(-1, keepdim=True), overlap, 0.0)
    enclosing = torch.maximum(p2, g2) - torch.minimum(p1, g1)
    unit = enclosing.detach().amax(-1, keepdim=True)
    unit = torch.where(unit > 0, unit, 1.0)
    distance = (g1 + g2) / 2 - (p1 + p2) / 2
    eps_scaled = eps / unit[..., 0] ** 2 if eps else 0.0
    return _Pair((p2 - p1) / unit, (g2 - g1) / unit, overlap / unit, enclosing / unit, distance / unit, eps_scaled)


def _area(sides: Tensor) -> Tensor:
    return sides[..., 0] * sides[..., 1]


def _iou(inter: Tensor, p: Tensor, g: Tensor, eps: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """IoU = inter / (union + eps), and the union, from three areas."""
    union = p + g - inter
    return _div(inter, union + eps), union


def iou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - IoU."""
    b = _pair(p, g, args[0])
    return 1 - _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)[0]


def giou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - (IoU - (C - U) / (C + eps)), C the area of the enclosing box (Rezatofighi et al. 2019)."""
    b = _pair(p, g, args[0])
    value, union = _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)
    rest = _div(_area(b.enclosing) - union, _area(b.enclosing) + b.eps)
    return 1 - (value - rest)


def diou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """1 - IoU + rho^2 / (c^2 + eps): distance of the centres over the enclosing box's diagonal (Zheng et al. 2020)."""
    b = _pair(p, g, args[0])
    spread = _div((b.distance**2).sum(-1), (b.enclosing**2).sum(-1) + b.eps)
    return 1 - _iou(_area(b.overlap), _area(b.p), _area(b.g), b.eps)[0] + spread


def ciou(p: Tensor, g: Tensor, args: Sequence[float]) -> Tensor:
    """DIoU + alpha v, v = 4/pi^2 (atan(wg/hg) - atan(wp/hp))^2, alpha = v / (1 - IoU + v + eps_alpha) held constant."""
    b = _pair(p, g, args[0])
    v = 4 / math.pi**2 * (_angle(b.g) - _angle(b.p)) ** 2
    alpha = _div(v, iou(p, g, args) + v + args[1]).detach()
    return diou(p, g, args) + alpha * v


def _angle(sides: Tensor) -> Tensor:
    """atan(w / h), pi/2 at h = 0 and 0 at w = h = 0. Smaller side over larger, so that no quotient overflows."""
    w, h = sides.unbind(-1)
    wide = w.abs() > h.abs()
    a = _div(torch.where(wide, h, w), torch.where(wide, w, h)).atan()
    complement = torch.where((w < 0) != (h < 0), -math.pi / 2 - a, math.pi / 2 - a)
    return torch.where(wide, complement, a)


# ---- offset terms: (a, b, ta, tb, scale) -> loss, one axis: raw logits a of the centre and b of the size, target ta of
# the scaled sigmoid (true centre from the cell's origin, in cells), target tb of b, log(true size / anchor); scale is
# the grid sensitivity. Smooth, no ties.


def _scaled_sigmoid(a: Tensor, scale: float) -> Tensor:
    """scale sigmoid(a) - (scale - 1) / 2, in cells (YOLOv4, "eliminate grid sensitivity")."""
    return scale * a.sigmoid() - (scale - 1) / 2


def mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """Squared errors of the scaled sigmoid and of b (YOLOv3)."""
    return (_scaled_sigmoid(a, scale) - ta) ** 2 + (b - tb) ** 2


def bce_mse(a: Tensor, b: Tensor, ta: Tensor, tb: Tensor, scale: float) -> Tensor:
    """scale BCE(sigmoid(a), (ta + (scale - 1) / 2) / scale) + (b - tb)^2 / 2, which darknet's mse delta descends."""
    return scale * bce(a, (ta + (scale - 1) / 2) / scale) + (b - tb) ** 2 / 2


# ---- decoding: (a, b, anchor, stride, scale) -> centre from the cell's origin, size, one axis, in the unit of anchor
# and stride; a, b, scale as above.


def exp(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv2 to YOLOv4: size anchor e^b. b is held within [-60, 60], the gradient passes as if it were not."""
    passed = torch.where(b.isinf(), 0.0, b)  # inf - inf would be NaN
    held = b.detach().clamp(-60, 60) + (passed - passed.detach())
    return _scaled_sigmoid(a, scale) * stride, anchor * held.exp()


def sigmoid_square(a: Tensor, b: Tensor, anchor: Tensor, stride: float, scale: float) -> tuple[Tensor, Tensor]:
    """YOLOv5 and Scaled-YOLOv4: size anchor (2 sigmoid(b))^2."""
    return _scaled_sigmoid(a, scale) * stride, anchor * (2 * b.sigmoid()) ** 2


Term = Callable[..., Tensor]
LABEL_TERMS: dict[str, Term] = {"bce": bce, "focal": focal}
BOX_TERMS: dict[str, Term] = {"iou": iou, "giou": giou, "diou": diou, "ciou": ciou}
OFFSET_TERMS: dict[str, Term] = {"mse": mse, "bce_mse": bce_mse}
DECODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"exp": exp, "sigmoid_square": sigmoid_square}


# ---- assignment


@dataclass(frozen=True)
class Match:
    """Which predictions each of the M rows is assigned to, over all T = len(head.anchors) anchors."""

    valid: Tensor  # [M] bool
    image: Tensor  # [M] int64, some legal image where the row is invalid
    label: Tensor  # [M] int64, likewise
    assigned: Tensor  # [M, T] bool; False for an anchor of no level
    x: Tensor  # [M, T] int64, column of the row's cell on the map of the anchor's level
    y: Tensor  # [M, T] int64
    index: Tensor  # [M, T] int64 by (level, image, anchor of the level, y, x), meaningful where assigned


def assign(
    rows: Tensor, head: GridHead, maps: Sequence[tuple[int, int]], batch_size: int, dtype: torch.dtype = torch.float32
) -> Match:
    """Match target rows [M, 6] to anchors; ``maps`` holds (H, W) for each level.

    The IoU of widths and heights is taken in ``dtype``, the cell in float32. Ties: of equal anchors the first is best;
    an IoU equal to iou_thresh does not exceed it.
    """
    image, label, cx, cy, w, h = rows.unbind(1)
    valid = rows.isfinite().all(1) & (w > 0) & (h > 0)
    valid = valid & (image >= 0) & (image < batch_size) & (label >= 0) & (label < head.num_classes)
    valid = valid & (cx >= 0) & (cx < 1) & (cy >= 0) & (cy < 1)
    image, label, cx, cy, w, h = torch.where(valid[:, None], rows, 0.5).unbind(1)  # a legal row for the invalid ones
    image, label = image.long(), label.long()

    w = w.to(dtype)[:, None] * (maps[0][1] * head.strides[0])
    h = h.to(dtype)[:, None] * (maps[0][0] * head.strides[0])
    aw = _constants([a[0] for a in head.anchors], w)
    ah = _constants([a[1] for a in head.anchors], h)
    inter = torch.minimum(w, aw) * torch.minimum(h, ah)
    shape_iou = inter / (w * h + aw * ah - inter)
    best = shape_iou.argmax(1, keepdim=True)
    taken = (torch.arange(len(head.anchors), device=rows.device) == best) & (shape_iou > 0)
    if head.iou_thresh < 1:
        taken = taken | (shape_iou > head.iou_thresh)

    nowhere = torch.zeros_like(image)
    columns = [(nowhere.bool(), nowhere, nowhere, nowhere)] * len(head.anchors)
    start = 0
    for own, (H, W) in zip(head.levels, maps, strict=True):
        x, y = (cx * W).long(), (cy * H).long()  # a float32 below 1 times W rounds to less than W
        for a, t in enumerate(own):
            columns[t] = (taken[:, t] & valid, x, y, start + ((image * len(own) + a) * H + y) * W + x)
        start += batch_size * len(own) * H * W
    assigned, xs, ys, index = (torch.stack(column, 1) for column in zip(*columns, strict=True))
    return Match(valid, image, label, assigned, xs, ys, index)


# ---- the anchor-grid loss


def grid_view(pred: Tensor, anchors: int) -> Tensor:
    """``[B, A (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]`` as a view ``[B, A, H, W, 5 + C]``."""
    return pred if pred.ndim == 5 else pred.unflatten(1, (anchors, -1)).permute(0, 1, 3, 4, 2)


def grid_loss(
    preds: Sequence[Tensor], rows: Tensor, head: GridHead, class_weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of prediction maps [B, A, H, W, 5 + C] against target rows [M, 6]; computed in float64 for float64 maps,
    else in float32.

    Returns the total, differentiable by ``preds``; its parts (box, objectness, classes), detached; and counts, int32,
    of assigned predictions and of invalid rows. ``class_weights`` [C] are the m of the contract.
    """
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in preds) else torch.float32
    match = assign(rows, head, [(p.shape[2], p.shape[3]) for p in preds], preds[0].shape[0], dtype)
    boxes = torch.where(match.valid[:, None], rows[:, 2:], 0.5).to(dtype)
    weights = None if class_weights is None else class_weights.detach().to(dtype)
    levels = [_level_loss(p.to(dtype), level, boxes, match, head, weights) for level, p in enumerate(preds)]
    parts = torch.stack([torch.stack(part).sum() for part in list(zip(*levels, strict=True))[:3]])
    positives = torch.stack([level[3] for level in levels]).sum()
    counts = torch.stack([positives, (~match.valid).sum()]).to(torch.int32)
    return parts.sum(), parts.detach(), counts


def _level_loss(
    pred: Tensor, level: int, boxes: Tensor, match: Match, head: GridHead, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Box, objectness and class loss of one map, and the number of its assigned predictions."""
    B, A, H, W, channels = pred.shape
    M, N, C = len(boxes), B * A * H * W, channels - 5
    # one column for each anchor of the level; stacked, since indexing by a list would copy the list to the device
    assigned, x, y = (
        torch.stack([table[:, t] for t in head.levels[level]], 1) for table in (match.assigned, match.x, match.y)
    )
    anchor = torch.arange(A, device=pred.device).expand(M, A)
    image, label = match.image[:, None].expand(M, A), match.label[:, None].expand(M, A)
    raw = torch.where(assigned[..., None], pred[image, anchor, y, x], 0.0)  # [M, A, 5 + C], no NaN from elsewhere
    m = boxes.new_ones(M) if weights is None else weights[match.label]

    # rows that share a prediction: the first one leads, that is, stands for the prediction; slot N is no prediction
    slot = torch.where(assigned, ((image * A + anchor) * H + y) * W + x, N)
    row = torch.arange(M, device=pred.device)[:, None].expand(M, A)
    first = row.new_full((N + 1,), M).scatter_reduce(0, slot.flatten(), row.flatten(), "amin")[slot]
    last = row.new_full((N + 1,), -1).scatter_reduce(0, slot.flatten(), row.flatten(), "amax")[slot]
    lead = assigned & (first == row)

    # classes, where a row leads
    logits = raw[..., 5:]
    count = raw.new_zeros(M, A, C).index_put((first, anchor, label), assigned.to(raw.dtype), accumulate=True)
    positive, negative = _constants(head.class_targets, raw)
    target = torch.where(count > 0, positive, negative)
    loss = LABEL_TERMS[head.label](logits, target, head.label_args)
    if weights is not None:
        only = (torch.arange(C, device=pred.device) == label[..., None]) & (count == 1)
        loss = loss * torch.where(count > 0, torch.where(only, head.first_weight * weights, weights), 1.0)
    cls = head.cls_gain * torch.where(lead[..., None], loss, 0.0).sum()

    # boxes, for each row
    anchors = torch.stack([_constants(head.anchors[t], raw) for t in head.levels[level]])
    cells = _constants((W, H), raw)
    offset = boxes[:, None, :2] * cells - torch.stack((x, y), -1)
    loss = m[:, None] * _box_loss(raw, offset, boxes[:, None, 2:], anchors, cells, level, head)
    if head.average_box:
        pushed_up = (target > logits.detach().sigmoid()).sum(-1)
        loss = loss / pushed_up.clamp(min=1)[first, anchor]
    box = head.box_gain * torch.where(assigned, loss, 0.0).sum()

    # objectness, for each prediction
    owner = torch.where(lead, slot, N).flatten()
    is_assigned = assigned.new_zeros(N + 1).scatter(0, owner, True)[:N].view(B, A, H, W)
    gain = raw.new_full((N + 1,), head.noobj_gain).scatter(0, owner, head.obj_gain * m[last].flatten())
    used = is_assigned | ~_ignored(pred.detach(), boxes, anchors, cells, level, match, head)
    loss = gain[:N].view(B, A, H, W) * bce(torch.where(used, pred[..., 4], 0.0), is_assigned.to(raw.dtype))
    obj = torch.where(used, loss, 0.0).sum()
    # a NaN box cannot be told to be ignored or not: the value says so, the gradients of other predictions stay clean
    unknown = pred[..., :4].detach().isnan().any()
    return box, obj + torch.zeros_like(obj.detach()).masked_fill(unknown, math.nan), cls, lead.sum()


def _box_loss(
    raw: Tensor, offset: Tensor, size: Tensor, anchors: Tensor, cells: Tensor, level: int, head: GridHead
) -> Tensor:
    """Box term [M, A] of each row at each anchor [A, 2] of a level, from raw logits [M, A, 5 + C].

    ``offset`` [M, A, 2] is the true centre from the cell's origin, in cells; ``size`` [M, 1, 2] the true size, relative
    to the image; ``cells`` the map's width and height.
    """
    a, b, stride, scale = raw[..., :2], raw[..., 2:4], head.strides[level], head.scale_x_y[level]
    image = cells * stride
    if head.box in OFFSET_TERMS:
        loss = OFFSET_TERMS[head.box](a, b, offset, (size * image / anchors).log(), scale).sum(-1)
        return loss * (1 + head.area_weight * (1 - _area(size)))
    centre, p = DECODE[head.decode](a, b, anchors, stride, scale)
    unit = image if head.relative else torch.ones_like(image)
    p, g, distance = p / unit, size * image / unit, (offset * stride - centre) / unit
    # from the centre of the prediction, so that a box of 1e-20 pixels keeps its sides
    return BOX_TERMS[head.box](
        torch.cat((-p / 2, p / 2), -1), torch.cat((distance - g / 2, distance + g / 2), -1), head.box_args
    )


def _ignored(
    pred: Tensor, boxes: Tensor, anchors: Tensor, cells: Tensor, level: int, match: Match, head: GridHead
) -> Tensor:
    """[B, A, H, W]: whether the IoU with some valid row of the image exceeds ignore_thresh, and the gate is passed."""
    B, A, H, W, _ = pred.shape
    stride, scale = head.strides[level], head.scale_x_y[level]
    x, y = torch.arange(W, device=pred.device), torch.arange(H, device=pred.device)
    origin = torch.stack((x.expand(H, W), y[:, None].expand(H, W)), -1).to(pred.dtype) * stride
    centre, size = DECODE[head.decode](pred[..., :2], pred[..., 2:4], anchors[:, None, None], stride, scale)
    centre = centre + origin
    edges = torch.cat((centre - size / 2, centre + size / 2, size), -1).view(B, A * H * W, 6)
    x1, y1, x2, y2, w, h = edges.permute(2, 0, 1).contiguous()
    true_centre, true_size = boxes[:, :2] * cells * stride, boxes[:, 2:] * cells * stride
    edges = torch.cat((true_centre - true_size / 2, true_centre + true_size / 2), -1)
    tx1, ty1, tx2, ty2 = edges[..., None].unbind(1)
    area, true_area = w * h, _area(true_size)[:, None]

    hits = torch.zeros(B, A * H * W, dtype=torch.int32, device=pred.device)
    chunk = max(1, IGNORE_CHUNK // (A * H * W))
    for start in range(0, len(boxes), chunk):
        now = slice(start, start + chunk)
        image = match.image[now]
        ow = torch.minimum(x2.index_select(0, image), tx2[now]) - torch.maximum(x1.index_select(0, image), tx1[now])
        oh = torch.minimum(y2.index_select(0, image), ty2[now]) - torch.maximum(y1.index_select(0, image), ty1[now])
        overlap, _ = _iou(ow.clamp(min=0) * oh.clamp(min=0), area.index_select(0, image), true_area[now])
        hits.index_add_(0, image, ((overlap > head.ignore_thresh) & match.valid[now, None]).int())
    ignored = (hits > 0).view(B, A, H, W)
    if head.class_gate is not None:
        ignored = ignored & (pred[..., 5:] > head.class_gate).any(-1)
    return ignored
