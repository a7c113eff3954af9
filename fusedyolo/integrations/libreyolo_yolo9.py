"""LibreYOLO's YOLOv9, with the loss of this package in place of its ``YOLO9Loss``; :mod:`.libreyolo` puts it there."""

from __future__ import annotations

from typing import Any

import torch
from libreyolo.models.yolo9.loss import BCELoss, BoxLoss, BoxMatcher, DFLoss, YOLO9Loss
from libreyolo.training.distributed import all_reduce_avg_scalar_tensor
from torch import Tensor

from .. import YOLOv8Loss, checks
from . import decoupled, shared

PARTS = ("box", "dfl", "cls")
RULE = ("topk", "cls_factor", "iou_factor", "num_classes", "reg_max")  # of a matcher

criteria: shared.Criteria[YOLOv8Loss] = shared.Criteria()


def _call(self: Any, predictions: Any, targets: Tensor) -> Any:
    """In place of ``YOLO9Loss.__call__``."""
    criterion = None if self.vec2box is None else _criterion(self)
    if criterion is None:
        return method.own(YOLO9Loss)(self, predictions, targets)
    return losses(criterion, self, predictions, targets)


method = shared.Method("__call__", _call)


def losses(criterion: YOLOv8Loss, loss: Any, predictions: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """What a ``YOLO9Loss`` returns, of ``targets`` [B, G, 5]: class, x1, y1, x2, y2 relative to its image."""
    width, height = loss.vec2box.image_size
    label, x1, y1, x2, y2 = targets.detach().float().unbind(2)  # a tensor of the sides would be copied at each call
    x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
    rows = torch.stack((label.clamp(min=0), (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), 2)
    call = decoupled.read_pixels(criterion, predictions, rows, max(width, height))
    total, (box, cls, dfl), counts, weights = criterion.compute(call)
    share: Any = 1.0
    if loss.distributed_normalize:  # 1 in a process alone
        share = weights[-1].clamp(min=1) / all_reduce_avg_scalar_tensor(weights[-1])
    parts = {name: share * part for name, part in zip(PARTS, (box, dfl, cls), strict=True)}
    found = {"total_loss": share * total} | {f"{name}_loss": part for name, part in parts.items()}
    found |= {name: part.detach() for name, part in parts.items()}
    return found | {"num_fg": counts[0] / max(len(targets), 1)}


def _criterion(loss: Any) -> YOLOv8Loss | None:
    """What stands in for a loss, as this is now; None if it keeps its own."""
    if type(loss) is not YOLO9Loss:
        return None
    matcher, parts = loss.matcher, (loss.cls_loss, loss.box_loss, loss.dfl_loss)
    numbers = loss.num_classes, loss.reg_max, *loss.strides, loss.box_weight, loss.cls_weight, loss.dfl_weight
    # there is another matcher for each size of image
    rule = type(matcher), *shared.methods(matcher)[1:], *(getattr(matcher, name, None) for name in RULE)
    bce = getattr(loss.cls_loss, "bce", None)
    settings = [*numbers, *rule, *shared.methods(loss), *shared.state(*parts, bce)]
    return criteria.find(loss, settings, lambda: criterion_of(loss))


def criterion_of(loss: Any, backend: str = "auto") -> YOLOv8Loss:
    """The criterion with the settings of a ``YOLO9Loss``.

    Raises:
        ValueError: it computes something else.
    """
    shared.plain("loss", loss, YOLO9Loss)
    shared.plain("loss.cls_loss", loss.cls_loss, BCELoss)
    shared.bce("loss.cls_loss.bce", loss.cls_loss.bce, "none")
    shared.plain("loss.box_loss", loss.box_loss, BoxLoss)
    shared.plain("loss.dfl_loss", loss.dfl_loss, DFLoss)
    shared.plain("loss.matcher", loss.matcher, BoxMatcher)
    for name in ("num_classes", "reg_max"):
        if getattr(loss.matcher, name) != getattr(loss, name):
            checks.fail(f"loss.matcher.{name}", getattr(loss.matcher, name), f"{getattr(loss, name)} as the loss")
    for stride in loss.strides:
        if stride % 2:
            checks.fail("loss.strides", stride, "even numbers: anchors are the middles of cells")
    return YOLOv8Loss(
        loss.num_classes,
        loss.strides,
        loss.reg_max,
        box=loss.box_weight,
        cls=loss.cls_weight,
        dfl=loss.dfl_weight,
        topk=loss.matcher.topk,
        alpha=loss.matcher.cls_factor,
        beta=loss.matcher.iou_factor,
        rule="libreyolo",
        backend=backend,
    )


# ---- a probe

CLASSES, BINS, STRIDES, SIDE = 3, 3, [8, 16], 64
TARGETS = (
    ((1, 0.15, 0.16, 0.78, 0.84), (2, 0.26, 0.63, 0.37, 0.78), (0, 0.63, 0.14, 0.81, 0.45)),
    ((0, 0, 0, 0, 0),) * 3,
    ((0, 0.03, 0.04, 0.97, 0.96), (1, 0.46, 0.35, 0.61, 0.49), (2, 0.26, 0.26, 0.59, 0.59)),
)  # of three images; the first object of the last one is in no range


def differs() -> str:
    """How ``YOLO9Loss`` computes something else than we do; empty if it does not."""
    with shared.probing():
        try:
            loss = YOLO9Loss(CLASSES, BINS, STRIDES, [SIDE, SIDE], torch.device("cpu"))
            channels = 4 * BINS + CLASSES
            preds = [torch.randn(3, channels, SIDE // s, SIDE // s, requires_grad=True) for s in STRIDES]
            theirs = loss(preds, torch.tensor(TARGETS))
            ours = losses(criterion_of(loss, "torch"), loss, preds, torch.tensor(TARGETS))
            if list(theirs) != list(ours):
                return f"YOLO9Loss returns {', '.join(theirs)}"
            numbers = [
                [torch.as_tensor(each).detach() for each in found.values()]
                + list(torch.autograd.grad(found["total_loss"], preds))
                for found in (theirs, ours)
            ]
        except Exception as error:  # whatever other code does with what it does not know
            return f"YOLO9Loss stops: {type(error).__name__}: {error}".splitlines()[0]
        why = shared.apart(*numbers)
    return f"YOLO9Loss computes something else: {why}" if why else ""
