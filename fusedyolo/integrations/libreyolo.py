"""LibreYOLO's YOLOX and YOLOv9, with the losses of this package in place of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import libreyolo
from libreyolo.models.yolo9.loss import YOLO9Loss
from libreyolo.models.yolox.nn import IoULoss, YOLOXHead
from libreyolo.training import distributed
from libreyolo.training.distributed import all_reduce_avg_scalar_tensor
from torch import Tensor

from .. import YOLOXLoss
from . import decoupled, libreyolo_yolo9, shared

WANT = "the losses of LibreYOLO 1.6"
NAMES = ("total_loss", "iou_loss", "obj_loss", "cls_loss", "l1_loss", "num_fg")

_criteria: shared.Criteria[YOLOXLoss] = shared.Criteria()


def patch() -> None:
    """Replace the loss of every ``YOLOXHead`` and every ``YOLO9Loss`` of LibreYOLO; training stays what it was.

    The methods ``YOLOXHead.forward`` and ``YOLO9Loss.__call__`` are replaced, and nothing else; models that are there
    already take part. In training with labels the first hands the maps of its convolutions to
    :class:`~fusedyolo.YOLOXLoss` as they are, and returns the dictionary that it returned, ``num_fg`` as a tensor, so
    that nothing waits. ``use_l1`` is read at each call; under DDP losses are divided by the assigned cells of all
    processes, as LibreYOLO divides them. In evaluation, for a validation loss, and where LibreYOLO captures its
    training as a CUDA graph, which leaves the loss out, it does what it did.

    The second returns the dictionary that it returned, of :class:`~fusedyolo.YOLOv8Loss` with ``rule="libreyolo"``,
    also for a validation loss, divided by the soft scores of all processes where it was; that of YOLOv9 with two
    branches calls it twice.

    Heads and losses of derived classes stay as they are, so does one with another loss of boxes, classes or L1: then a
    warning says why. Nothing is stored in a model, so that it can be saved and loaded where this package is not
    installed. Boxes whose centre is left of or above the image are skipped. Other families, and other tasks of these,
    keep their losses.

    Raises:
        ValueError: the installed LibreYOLO computes something else, which is found by trying it; nothing is changed.
    """
    with shared.PATCHING:
        if _method.stands(YOLOXHead) and libreyolo_yolo9.method.stands(YOLO9Loss):
            return
        with _alone():
            why = decoupled.differs(YOLOXHead, IoULoss, _numbers) or libreyolo_yolo9.differs()
        if why:
            shared.refuse("libreyolo", getattr(libreyolo, "__version__", "of no version"), why, WANT)
        _method.put(YOLOXHead)
        libreyolo_yolo9.method.put(YOLO9Loss)


def unpatch() -> None:
    """Give both classes their own methods back; nothing happens to one that is not :func:`patch`'s."""
    with shared.PATCHING:
        _method.take(YOLOXHead)
        libreyolo_yolo9.method.take(YOLO9Loss)


def _forward(self: Any, xin: Any, labels: Tensor | None = None, imgs: Tensor | None = None) -> Any:
    """In place of ``YOLOXHead.forward``."""
    criterion = _criterion(self) if self.training and labels is not None else None
    if criterion is None or labels is None:
        return _method.own(YOLOXHead)(self, xin, labels, imgs)
    criterion.use_l1 = self.use_l1
    found = decoupled.losses(criterion, decoupled.maps(self, xin), labels)
    divided = all_reduce_avg_scalar_tensor(found.assigned)
    share = found.assigned.clamp(min=1) / divided  # 1 in a process alone
    return dict(zip(NAMES, (*[share * each for each in found[:5]], divided / found.objects), strict=True))


_method = shared.Method("forward", _forward)


def _criterion(head: Any) -> YOLOXLoss | None:
    """What stands in for the loss of a head, as this is now; None if it keeps its own."""
    if type(head) is not YOLOXHead:
        return None
    return _criteria.find(head, decoupled.settings_of(head), lambda: decoupled.criterion_of(head, YOLOXHead, IoULoss))


@contextmanager
def _alone() -> Iterator[None]:
    """Meanwhile losses are of this process alone, where this thread asks for them: a loss that is only tried out would
    wait for processes that do not patch, and has its numbers where no process group takes them.
    """
    thread, is_distributed = get_ident(), distributed.is_distributed
    distributed.is_distributed = lambda: get_ident() != thread and is_distributed()
    try:
        yield
    finally:
        distributed.is_distributed = is_distributed


def _numbers(found: Any) -> tuple[Any, ...] | None:
    """The six numbers of a batch."""
    return tuple(found.values()) if isinstance(found, dict) and tuple(found) == NAMES else None
