"""The losses, as modules."""

from .dense import FCOSLoss, RetinaNetLoss, SSDLoss
from .output import LossOutput, rounded
from .yolov1 import CELL_RECIPES, YOLOv1Loss
from .yolov2 import YOLOv2Loss
from .yolov3 import RECIPES, YOLOv3Loss, YOLOv4Loss
from .yolov5 import ScaledYOLOv4Loss, YOLOv5Loss

__all__ = [
    "CELL_RECIPES",
    "RECIPES",
    "FCOSLoss",
    "LossOutput",
    "RetinaNetLoss",
    "SSDLoss",
    "ScaledYOLOv4Loss",
    "YOLOv1Loss",
    "YOLOv2Loss",
    "YOLOv3Loss",
    "YOLOv4Loss",
    "YOLOv5Loss",
    "rounded",
]
