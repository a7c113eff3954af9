"""YOLOX, with the loss of this package in place of that of ``YOLOXHead``."""

from __future__ import annotations

from typing import Any

import yolox
from torch import Tensor
from yolox.models.losses import IOUloss
from yolox.models.yolo_head import YOLOXHead

from .. import YOLOXLoss
from . import decoupled, shared

WANT = "the loss of YOLOX 0.3.0 (PyPI) or of its repository"

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
    with shared.PATCHING:
        if _method.stands(YOLOXHead):
            return
        why = decoupled.differs(YOLOXHead, IOUloss, _numbers)
        if why:
            shared.refuse("yolox", getattr(yolox, "__version__", "of no version"), why, WANT)
        _method.put(YOLOXHead)


def unpatch() -> None:
    """Give ``YOLOXHead`` its own ``forward`` back; nothing happens if that is not :func:`patch`'s."""
    with shared.PATCHING:
        _method.take(YOLOXHead)


def _forward(self: Any, xin: Any, labels: Tensor | None = None, imgs: Tensor | None = None) -> Any:
    """In place of ``YOLOXHead.forward``."""
    criterion = _criterion(self) if self.training else None
    if criterion is None or labels is None:
        return _method.own(YOLOXHead)(self, xin, labels, imgs)
    criterion.use_l1 = self.use_l1
    found = decoupled.losses(criterion, decoupled.maps(self, xin), labels)
    return (*found[:5], found.assigned.clamp(min=1) / found.objects)


_method = shared.Method("forward", _forward)


def _criterion(head: Any) -> YOLOXLoss | None:
    """What stands in for the loss of a head, as this is now; None if it keeps its own."""
    if type(head) is not YOLOXHead:
        return None
    return _criteria.find(head, decoupled.settings_of(head), lambda: decoupled.criterion_of(head, YOLOXHead, IOUloss))


def _numbers(found: Any) -> tuple[Any, ...] | None:
    """The six numbers of a batch."""
    return found if isinstance(found, tuple) and len(found) == 6 else None
