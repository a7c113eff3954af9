"""The drivers, one object each: what they share is in :mod:`fusedyolo.drivers.protocol`, found by :func:`of`.

They call the reference, the checks and, when asked for launches, the operators; none of them imports Triton by itself.
"""

from __future__ import annotations

from typing import Any

from .. import checks
from ..heads import CellHead, DenseHead, GridHead
from .cells import CellDriver
from .dense import DenseDriver
from .grid import GridDriver
from .protocol import Driver

_DRIVERS: dict[type, Driver] = {GridHead: GridDriver(), CellHead: CellDriver(), DenseHead: DenseDriver()}


def of(criterion: Any) -> Driver:
    """The driver of a loss.

    Raises:
        ValueError: ``criterion`` is no loss with a head.
    """
    found = _DRIVERS.get(type(getattr(criterion, "head", None)))
    if found is None:
        checks.fail("criterion", checks.describe(criterion), "a loss of fusedyolo, such as YOLOv4Loss")
    return found


__all__ = ["Driver", "of"]
