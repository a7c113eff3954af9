"""The drivers, one object each: what they share is in :mod:`fusedyolo.drivers.protocol`, found by :func:`of`.

They call the checks, the reference and, when asked for launches, the operators.
"""

from __future__ import annotations

from typing import Any

from .. import checks
from .protocol import Driver


def of(criterion: Any) -> Driver:
    """The driver of a loss.

    Raises:
        ValueError: ``criterion`` is no loss with a head.
    """
    # The reference loads PyTorch's compiler, that loads Triton, and whoever imports this may have to choose first
    # whether kernels are interpreted.
    from . import cells, dense, grid, picks

    kind = type(getattr(criterion, "head", None))
    for driver in (grid.GRID, cells.CELLS, dense.DENSE, picks.PICKS):
        if kind is driver.head:
            return driver
    want = "its .criterion" if hasattr(criterion, "criterion") else "a loss of fusedyolo, such as YOLOv4Loss"
    checks.fail("criterion", checks.describe(criterion), want)


__all__ = ["Driver", "of"]
