"""Which prediction answers for which object, and what it is to say: for people with a loss of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import drivers
from .drivers.assignments import AnchorAssignment, Assignment, LevelAssignment
from .targets import Targets

__all__ = ["AnchorAssignment", "Assignment", "LevelAssignment", "assign"]


def assign(
    criterion: nn.Module,
    preds: Any,
    targets: Tensor | Sequence[dict[str, Tensor]] | Targets,
    **geometry: Any,
) -> Assignment | AnchorAssignment:
    """What ``criterion`` would train each prediction for. Runs on the device of ``preds``, and waits for nothing.

    Args:
        criterion: a loss of this package. :class:`~fusedyolo.YOLOv1Loss` has one level, and boxes where others have
            anchors; without ``image_size`` its lengths are in images.
        preds: as the loss takes them. Matches depend on their shapes alone, but for objectness targets that are an IoU,
            and for what is ignored.
        targets: as the loss takes them.
        **geometry: what a loss over anchors (RetinaNet, SSD, FCOS) takes beside these: ``anchors`` and, where it needs
            them, ``num_anchors_per_level`` and ``image_size``.

    Returns:
        :class:`Assignment`, or :class:`AnchorAssignment` for a loss over anchors.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    driver = drivers.of(criterion)
    return driver.assign(criterion.head, driver.read(criterion, preds, targets, **geometry))
