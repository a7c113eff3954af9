"""A detector is a row: which terms its loss is made of, and the numbers they take.

Both backends read the same row, so neither the kernels nor the eager reference know a detector's name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

IOU_KINDS = ("iou", "giou", "diou", "ciou")
OFFSET_KINDS = ("mse", "bce_mse")
LABEL_KINDS = ("bce", "focal")
DECODE_KINDS = ("exp", "sigmoid_square")


@dataclass(frozen=True)
class GridHead:
    """One anchor-grid loss.

    Geometry. ``anchors`` are all (width, height) pairs in pixels that compete for an object; ``levels[l]`` holds, for
    the ``l``-th prediction map, the indices of its own anchors in ``anchors``. ``strides`` are in pixels per cell and
    ``scale_x_y`` is the grid sensitivity, one a level. ``relative`` says that box terms see boxes in units of the image
    (width and height both 1, as darknet does) rather than in pixels; it matters on images that are not square.

    Structure. ``box`` names an IoU term (on decoded boxes) or an offset term (on raw logits), ``label`` the class term;
    objectness is always BCE. ``class_gate`` limits the ignore mask to predictions with some class logit above it.
    ``average_box`` divides the box term of a prediction with several objects by its number of pushed-up classes.

    Numbers. ``area_weight`` w turns the offset term's weight into ``1 + w * (1 - gw * gh)``, gw and gh relative to the
    image. ``class_targets`` are the positive and negative class targets. ``first_weight`` multiplies the positive
    class of the first object on a prediction when class weights are given.
    """

    num_classes: int
    anchors: tuple[tuple[float, float], ...]
    levels: tuple[tuple[int, ...], ...]
    strides: tuple[float, ...]
    scale_x_y: tuple[float, ...]
    decode: str = "exp"
    box: str = "ciou"
    label: str = "bce"
    relative: bool = False
    class_gate: float | None = None
    average_box: bool = False
    ignore_thresh: float = 0.5
    iou_thresh: float = 1.0
    box_gain: float = 1.0
    obj_gain: float = 1.0
    noobj_gain: float = 1.0
    cls_gain: float = 1.0
    area_weight: float = 0.0
    class_targets: tuple[float, float] = (1.0, 0.0)
    first_weight: float = 1.0
    box_args: tuple[float, ...] = (0.0, 1e-7)
    label_args: tuple[float, ...] = ()

    @cached_property
    def key(self) -> str:
        """This row as text, the form in which it passes through the PyTorch dispatcher."""
        return json.dumps(asdict(self), separators=(",", ":"))


@lru_cache(maxsize=256)
def head_from_key(key: str) -> GridHead:
    """The row that :attr:`GridHead.key` was made from."""

    def freeze(value):
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return GridHead(**{name: freeze(value) for name, value in json.loads(key).items()})
