"""YOLOX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..heads import PickHead
from ..terms import find_term
from .base import box_arguments
from .picks import PickLoss

RULES: dict[str, dict[str, Any]] = {
    "main": {"radius": 1.5, "inside": False},
    "0.3.0": {"radius": 2.5, "inside": True},
}
"""What cells an object may take. The first is the default; both call themselves 0.3.0."""


class YOLOXLoss(PickLoss):
    """Training loss of YOLOX (Ge et al. 2021, arXiv 2107.08430).

    Objects pick cells by SimOTA. A cell is near an object if its middle is less than ``center_radius`` strides from the
    object's centre on both axes. With ``rule="main"`` (the repository, 1.5 strides) cells near any object of the image
    are candidates, and an object prefers those near itself; with ``"0.3.0"`` (the package on PyPI, 2.5 strides)
    candidates are cells near or in the box of any object, and an object prefers those near itself and in its own box.
    mmdet's SimOTA is the second. An object takes the candidates of the least cost, those that it prefers before all
    others, with

        cost = sum over classes of BCE(sqrt(sigmoid(class) * sigmoid(objectness)), one-hot) - 3 ln(IoU + 1e-8)

    as many as the sum of its ten largest IoUs, rounded down, at least one. A cell that several took goes to the object
    for which its cost is least; of equal costs the first object, of equal cells the first. With n the cells that have
    an object, at least 1,

        (reg_weight * sum over these of (1 - IoU^2) + sum over all cells of BCE(objectness, has an object)
        + sum over cells with an object of sum over classes of BCE(class, one-hot * IoU)
        + [use_l1] sum over these of |x, y, w, h - those that decode to the object|) / n

    where the IoU in a target is held constant. The peer adds 1e6 (0.3.0: 1e5) to the cost of cells that an object does
    not prefer, beside which float32 tells costs apart by 1/16 (1/128) only; here their order is exact.

    Args:
        num_classes: C.
        strides: pixels per cell, one a level.
        use_l1: with the L1 term, as the peer in its last epochs; an attribute, read at each call.
        rule: see above.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        center_radius: that of the rule unless given.
        reg_weight: of the IoU term; an attribute, read at each call.
        iou_loss: ``"iou"``, or another IoU loss, for the box term alone.
        iou_alpha: power of the IoU in it, see :func:`fusedyolo.functional.box_iou_loss`.
        iou_gamma: power of a constant factor IoU, likewise.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not;
            they have no part in the cost.
        image_size: (height, width) in pixels that targets are relative to; map sizes and strides say it otherwise.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``, which the peer's loaders have. Relative
            unless given; pixels in a list of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes:
        - preds: a list of ``[B, 5 + C, H, W]``, one a level, of x, y, w, h, objectness and classes; or
          ``{"boxes", "objectness", "scores"}`` (the peer's reg, obj and cls), each a list of maps ``[B, 4, H, W]``,
          ``[B, 1, H, W]``, ``[B, C, H, W]``, or in one piece ``[B, 4, N]`` and so on, with ``"feats"`` as in
          :class:`~fusedyolo.YOLOv8Loss`. Any strides; float16, bfloat16, float32 or float64.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput` with the parts ``box``, ``obj``, ``cls``, ``l1``; ``num_pos`` is n.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[float],
        use_l1: bool = False,
        rule: str = "main",
        *,
        reduction: str = "sum",
        center_radius: float | None = None,
        reg_weight: float = 5.0,
        iou_loss: str = "iou",
        iou_alpha: float = 2.0,
        iou_gamma: float = 0.0,
        class_weights: Any = None,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        self.rule = checks.one_of("rule", rule, RULES)
        num_classes = checks.count("num_classes", num_classes)
        fields = dict(RULES[rule])
        if center_radius is not None:
            fields["radius"] = checks.number("center_radius", center_radius, 0, open_low=True)
        head = PickHead(
            num_classes=num_classes,
            strides=checks.own_strides(strides),
            decode="exp",
            reg_max=1,
            objectness=True,
            assigner="simota",
            topk=10,
            box=find_term("iou_loss", iou_loss, "iou", users=True).name,
            box_args=box_arguments((1e-16, 1e-7), iou_alpha, iou_gamma),
            distance="raw",
            soft=False,
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
            **fields,
        )
        self.reg_weight = reg_weight
        self.use_l1 = use_l1
        weights = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, weights, checks.box_form(unit, boxes))

    def gains(self) -> tuple[float, ...]:
        """Of box, objectness, classes and L1."""
        l1 = float(checks.flag("use_l1", self.use_l1))
        return checks.number("reg_weight", self.reg_weight, 0), 1.0, 1.0, l1
