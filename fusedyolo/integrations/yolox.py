"""YOLOX, with the loss of this package in place of that of ``YOLOXHead``."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import torch
import yolox
from torch import Tensor, nn
from yolox.models.losses import IOUloss
from yolox.models.yolo_head import YOLOXHead

from .. import YOLOXLoss, checks
from . import shared

_kept: dict[type, Any] = {}  # the methods that were replaced
_criteria: shared.Criteria[YOLOXLoss] = shared.Criteria()


def patch() -> None:
    """Replace the loss of every ``YOLOXHead``; training stays what it was.

    The method ``forward`` of the class is replaced, and nothing else; models that are there already take part. In
    training it hands the maps of its convolutions to :class:`~fusedyolo.YOLOXLoss` as they are, and returns the six
    numbers that it returned, the last one as a tensor, so that nothing waits. ``use_l1`` is read at each call. In
    evaluation it does what it did. Both packages that call themselves 0.3.0 are supported, each with its own rule.

    Heads of derived classes stay as they are, so does one with another loss of boxes, classes or L1: then a warning
    says why. Nothing is stored in a model, so that it can be saved and loaded where this package is not installed.
    Boxes whose centre is left of or above the image are skipped.

    Raises:
        ValueError: the installed YOLOX computes something else than :class:`~fusedyolo.YOLOXLoss`, which is found by
            trying it; nothing is changed.
    """
    if YOLOXHead.forward is _forward:
        return
    _probe()
    _kept[YOLOXHead] = YOLOXHead.forward
    YOLOXHead.forward = _forward


def unpatch() -> None:
    """Give ``YOLOXHead`` its own ``forward`` back; nothing happens if that is not :func:`patch`'s."""
    if YOLOXHead.forward is _forward:
        YOLOXHead.forward = _kept.pop(YOLOXHead)


def _forward(self: Any, xin: Any, labels: Tensor | None = None, imgs: Tensor | None = None) -> Any:
    """In place of ``YOLOXHead.forward``."""
    criterion = _criterion(self) if self.training else None
    if criterion is None or labels is None:
        return _kept[YOLOXHead](self, xin, labels, imgs)
    criterion.use_l1 = self.use_l1
    return _losses(criterion, _maps(self, xin), labels)


def _maps(head: Any, features: Any) -> dict[str, list[Tensor]]:
    """What a head predicts in training, level by level."""
    boxes, objectness, scores = [], [], []
    for level, feature in enumerate(features):
        stem = head.stems[level](feature)
        box = head.reg_convs[level](stem)
        scores.append(head.cls_preds[level](head.cls_convs[level](stem)))
        boxes.append(head.reg_preds[level](box))
        objectness.append(head.obj_preds[level](box))
    return {"boxes": boxes, "objectness": objectness, "scores": scores}


def _losses(criterion: YOLOXLoss, preds: dict[str, list[Tensor]], labels: Tensor) -> tuple[Any, ...]:
    """Total, box, objectness, class and L1 loss, and cells with an object per object, of ``labels`` [B, G, 5]: class,
    cx, cy, w, h in pixels, of zeros where there is none.
    """
    height, width = preds["boxes"][0].shape[2:]
    # Centres and sides are relative to a power of two, so that pixels come back as they were.
    side = 2.0 ** math.ceil(math.log2(max(height, width) * criterion.head.strides[0]))
    labels = labels.detach().float()
    rows = torch.cat((labels[..., :1], labels[..., 1:5] / side), 2)
    call = criterion.read(preds, rows)._replace(size=(side, side))
    total, (box, objectness, classes, l1), counts = criterion.compute(call)
    objects = (labels.sum(2) > 0).sum().clamp(min=1)
    return total, box, objectness, classes, l1 if criterion.use_l1 else 0.0, counts[0].clamp(min=1) / objects


def _criterion(head: Any) -> YOLOXLoss | None:
    """What stands in for the loss of a head, as this is now; None if it keeps its own."""
    if type(head) is not YOLOXHead:
        return None
    parts = head.iou_loss, head.bcewithlog_loss, head.l1_loss  # modules are compared by identity, and held
    settings = head.num_classes, tuple(head.strides), *parts
    return _criteria.find(head, settings, lambda: _of(head))


def _of(head: Any, backend: str = "auto") -> YOLOXLoss:
    """The criterion with the settings of a head.

    Raises:
        ValueError: it computes something else.
    """
    shared.plain("head", head, YOLOXHead)
    shared.plain("head.iou_loss", head.iou_loss, IOUloss)
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


# ---- does it compute what is expected?

CLASSES, WIDTH, SIDE = 3, 1 / 32, 64
WANT = "the loss of YOLOX 0.3.0 (PyPI) or of its repository"
LABELS = (
    ((1, 30, 32, 40, 44), (2, 20, 45, 7, 9), (0, 46, 19, 11, 20)),
    ((0, 0, 0, 0, 0),) * 3,
    ((0, 33, 26, 60, 33), (1, 34, 27, 9, 9), (0, 0, 0, 0, 0)),
)  # of three images: class, cx, cy, w, h in pixels


def _probe() -> None:
    """YOLOX computes what we do, whatever it calls itself: a small head, with L1.

    Raises:
        ValueError: it does not; why, as far as that can be told.
    """
    with shared.probing():
        labels = torch.tensor(LABELS, dtype=torch.float32)
        try:
            head = YOLOXHead(CLASSES, WIDTH, in_channels=[8 / WIDTH] * 3)
            head.use_l1 = True
            features = [
                torch.randn(3, 8, SIDE // stride, SIDE // stride, requires_grad=True) for stride in head.strides
            ]
            found = head(features, labels, torch.zeros(3, 3, SIDE, SIDE))
        except Exception as error:  # whatever other code does with what it does not know
            _refuse(f"YOLOXHead stops in training: {type(error).__name__}: {error}".splitlines()[0])
        if not isinstance(found, tuple) or len(found) != 6:
            _refuse("YOLOXHead returns something else than six numbers in training")
        criterion = _of(head, "torch")
        criterion.use_l1 = True
        own = _losses(criterion, _maps(head, features), labels)
        theirs, ours = (
            [torch.as_tensor(each).detach() for each in losses] + list(torch.autograd.grad(losses[0], features))
            for losses in (found, own)
        )
        why = shared.apart(theirs, ours)
        if why:
            _refuse(f"YOLOXHead computes something else: {why}")


def _refuse(got: str) -> NoReturn:
    shared.refuse("yolox", getattr(yolox, "__version__", "of no version"), got, WANT)
