"""Training losses of one-stage detectors in one pass over the predictions.

``import fusedyolo`` loads neither PyTorch nor Triton; the names below load on first use, and Triton when a loss runs on
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import functional
    from .losses import LossOutput, YOLOv3Loss, YOLOv4Loss
    from .targets import Targets

__version__ = "0.1.0"

__all__ = ["LossOutput", "Targets", "YOLOv3Loss", "YOLOv4Loss", "__version__", "functional"]

_HOMES = {"LossOutput": "losses", "Targets": "targets", "YOLOv3Loss": "losses", "YOLOv4Loss": "losses"}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return import_module(".functional", __name__)
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
