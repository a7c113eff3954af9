"""The losses, as modules."""

from .anchor_recipes import RECIPES
from .fcos import FCOSLoss
from .output import LossOutput, rounded
from .retinanet import EfficientDetLoss, RetinaNetLoss
from .ssd import SSDLoss
from .yolov1 import CELL_RECIPES, YOLOv1Loss
from .yolov2 import YOLOv2Loss
from .yolov3 import YOLOv3Loss, YOLOv4Loss
from .yolov5 import ScaledYOLOv4Loss, YOLOv5Loss
from .yolov7 import YOLOv7AuxLoss, YOLOv7Loss
from .yolov8 import E2ELoss, YOLOv8Loss
from .yolox import YOLOXLoss

__all__ = [
    "CELL_RECIPES",
    "RECIPES",
    "E2ELoss",
    "EfficientDetLoss",
    "FCOSLoss",
    "LossOutput",
    "RetinaNetLoss",
    "SSDLoss",
    "ScaledYOLOv4Loss",
    "YOLOXLoss",
    "YOLOv1Loss",
    "YOLOv2Loss",
    "YOLOv3Loss",
    "YOLOv4Loss",
    "YOLOv5Loss",
    "YOLOv7AuxLoss",
    "YOLOv7Loss",
    "YOLOv8Loss",
    "rounded",
]
