"""What the swaps of YOLOX's head share, which is in more packages than one; and how pixels are read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import YOLOXLoss, checks
from . import shared


class Losses(NamedTuple):
    """Of a batch; what follows the total are its parts. ``l1`` is 0.0 where it is not used."""

    total: Tensor
    box: Tensor
    objectness: Tensor
    classes: Tensor
    l1: Tensor | float
    assigned: Tensor  # cells with an object
    objects: Tensor  # at least 1


def maps(head: Any, features: Any) -> dict[str, list[Tensor]]:
    """What a head predicts in training, level by level."""
    boxes, objectness, scores = [], [], []
    for level, feature in enumerate(features):
        stem = head.stems[level](feature)
        box = head.reg_convs[level](stem)
        scores.append(head.cls_preds[level](head.cls_convs[level](stem)))
        boxes.append(head.reg_preds[level](box))
        objectness.append(head.obj_preds[level](box))
    return {"boxes": boxes, "objectness": objectness, "scores": scores}


def read_pixels(criterion: Any, preds: Any, rows: Tensor, side: float) -> Any:
    """A call of a loss with ``rows`` [B, G, 5] of class, cx, cy, w, h in pixels of an image of at most this side.

    Centres and sides are made relative to a power of two, so that pixels come back as they were.
    """
    side = 2.0 ** math.ceil(math.log2(side))
    return criterion.read(preds, torch.cat((rows[..., :1], rows[..., 1:5] / side), 2))._replace(size=(side, side))


def losses(criterion: YOLOXLoss, preds: dict[str, list[Tensor]], labels: Tensor) -> Losses:
    """Of ``labels`` [B, G, 5]: class, cx, cy, w, h in pixels, of zeros where there is none."""
    height, width = preds["boxes"][0].shape[2:]
    labels = labels.detach().float()
    call = read_pixels(criterion, preds, labels, max(height, width) * criterion.head.strides[0])
    total, (box, objectness, classes, l1), counts, _ = criterion.compute(call)
    objects = (labels.sum(2) > 0).sum().clamp(min=1)
    return Losses(total, box, objectness, classes, l1 if criterion.use_l1 else 0.0, counts[0], objects)


def criterion_of(head: Any, kind: type, iou: type, backend: str = "auto") -> YOLOXLoss:
    """The criterion with the settings of a head, of the class ``kind`` with a box loss of the class ``iou``.

    Raises:
        ValueError: it computes something else.
    """
    shared.plain("head", head, kind)
    shared.plain("head.iou_loss", head.iou_loss, iou)
    shared.bce("head.bcewithlog_loss", head.bcewithlog_loss, "none")
    shared.plain("head.l1_loss", head.l1_loss, nn.L1Loss)
    for name, part, field, want in (
        ("iou_loss", head.iou_loss, "loss_type", "iou"),
        ("iou_loss", head.iou_loss, "reduction", "none"),
        ("l1_loss", head.l1_loss, "reduction", "none"),
    ):
        if getattr(part, field) != want:
            checks.fail(f"head.{name}.{field}", repr(getattr(part, field)), repr(want))
    if getattr(head, "n_anchors", 1) != 1:
        checks.fail("head.n_anchors", head.n_anchors, 1)
    rule = "main" if hasattr(head, "get_geometry_constraint") else "0.3.0"
    return YOLOXLoss(head.num_classes, head.strides, rule=rule, backend=backend)


def settings_of(head: Any) -> list[Any]:
    """What a criterion hangs on."""
    numbers = head.num_classes, getattr(head, "n_anchors", 1), *head.strides
    return [*numbers, *shared.methods(head), *shared.state(head.iou_loss, head.bcewithlog_loss, head.l1_loss)]


# ---- a probe

CLASSES, WIDTH, SIDE = 3, 1 / 32, 64
LABELS = (
    ((1, 30, 32, 40, 44), (2, 20, 45, 7, 9), (0, 46, 19, 11, 20)),
    ((0, 0, 0, 0, 0),) * 3,
    ((0, 33, 26, 60, 33), (1, 34, 27, 9, 9), (0, 0, 0, 0, 0)),
)  # of three images: class, cx, cy, w, h in pixels


def differs(kind: type, iou: type, numbers: Callable[[Any], tuple[Any, ...] | None]) -> str:
    """How a head of the class ``kind``, with a box loss of the class ``iou``, computes something else than we do; empty
    if it does not.

    ``numbers`` are the six of what the head returns, total, parts and cells an object; None where it has no such.
    """
    with shared.probing():
        try:
            made = _probe(kind)
            found = made.head(made.features, made.labels, made.images)
        except Exception as error:  # whatever other code does with what it does not know
            return f"YOLOXHead stops in training: {type(error).__name__}: {error}".splitlines()[0]
        theirs = numbers(found)
        if theirs is None:
            return "YOLOXHead returns something else than six numbers in training"
        why = _apart(made, theirs, criterion_of(made.head, kind, iou, "torch"))
    return f"YOLOXHead computes something else: {why}" if why else ""


class _Probe(NamedTuple):
    """A small head, with L1, and what it is given."""

    head: Any
    features: list[Tensor]
    labels: Tensor
    images: Tensor


def _probe(kind: type) -> _Probe:
    """Of a head of this class."""
    head: Any = kind(CLASSES, WIDTH, in_channels=[8 / WIDTH] * 3)
    head.use_l1 = True
    features = [torch.randn(3, 8, SIDE // stride, SIDE // stride, requires_grad=True) for stride in head.strides]
    return _Probe(head, features, torch.tensor(LABELS, dtype=torch.float32), torch.zeros(3, 3, SIDE, SIDE))


def _apart(probe: _Probe, theirs: Any, criterion: YOLOXLoss) -> str:
    """How their total and parts, and the gradients of the total, differ from ours; empty if they do not."""
    criterion.use_l1 = True
    own = losses(criterion, maps(probe.head, probe.features), probe.labels)
    ours = (*own[:5], own.assigned.clamp(min=1) / own.objects)
    values = (
        [torch.as_tensor(each).detach() for each in found] + list(torch.autograd.grad(found[0], probe.features))
        for found in (theirs, ours)
    )
    return shared.apart(*values)
