"""The losses, as modules."""

from .grid import RECIPES, YOLOv3Loss, YOLOv4Loss
from .output import LossOutput, rounded

__all__ = ["RECIPES", "LossOutput", "YOLOv3Loss", "YOLOv4Loss", "rounded"]
