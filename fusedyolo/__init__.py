"""Training losses of one-stage detectors in one pass over the predictions.

``import fusedyolo`` loads neither PyTorch nor Triton; the names below load on first use, and Triton when a loss runs on
it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import anchors, functional
    from .assignment import Assignment, assign
    from .counts import Counts, last_counts
    from .detections import Detections, decode, select
    from .losses import (
        E2ELoss,
        EfficientDetLoss,
        FCOSLoss,
        LossOutput,
        RetinaNetLoss,
        ScaledYOLOv4Loss,
        SSDLoss,
        YOLOv1Loss,
        YOLOv2Loss,
        YOLOv3Loss,
        YOLOv4Loss,
        YOLOv5Loss,
        YOLOv7AuxLoss,
        YOLOv7Loss,
        YOLOv8Loss,
        YOLOXLoss,
    )
    from .pictures import draw_assignment
    from .targets import Targets

__version__ = "0.1.0"

_HOMES = {
    "Assignment": "assignment",
    "Counts": "counts",
    "Detections": "detections",
    "E2ELoss": "losses",
    "EfficientDetLoss": "losses",
    "FCOSLoss": "losses",
    "LossOutput": "losses",
    "RetinaNetLoss": "losses",
    "SSDLoss": "losses",
    "ScaledYOLOv4Loss": "losses",
    "Targets": "targets",
    "YOLOXLoss": "losses",
    "YOLOv1Loss": "losses",
    "YOLOv2Loss": "losses",
    "YOLOv3Loss": "losses",
    "YOLOv4Loss": "losses",
    "YOLOv5Loss": "losses",
    "YOLOv7AuxLoss": "losses",
    "YOLOv7Loss": "losses",
    "YOLOv8Loss": "losses",
    "assign": "assignment",
    "decode": "detections",
    "draw_assignment": "pictures",
    "last_counts": "counts",
    "select": "detections",
}

__all__ = [
    "Assignment",
    "Counts",
    "Detections",
    "E2ELoss",
    "EfficientDetLoss",
    "FCOSLoss",
    "LossOutput",
    "RetinaNetLoss",
    "SSDLoss",
    "ScaledYOLOv4Loss",
    "Targets",
    "YOLOXLoss",
    "YOLOv1Loss",
    "YOLOv2Loss",
    "YOLOv3Loss",
    "YOLOv4Loss",
    "YOLOv5Loss",
    "YOLOv7AuxLoss",
    "YOLOv7Loss",
    "YOLOv8Loss",
    "__version__",
    "anchors",
    "assign",
    "decode",
    "draw_assignment",
    "functional",
    "last_counts",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in ("anchors", "functional"):
        return import_module(f".{name}", __name__)
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
