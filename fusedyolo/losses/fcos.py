"""FCOS."""

from __future__ import annotations

import math
from typing import Any

from .. import checks
from ..heads import DenseHead
from .dense import RECIPES, DenseLoss, box_fields, focal_fields

ANYWHERE = 1e30  # a radius beyond any anchor


class FCOSLoss(DenseLoss):
    """Training loss of FCOS (Tian et al. 2019, arXiv 1904.01355), that of torchvision.

    An anchor takes the smallest object (the first of equals) among those that hold its centre, whose own is less than
    ``center_sampling_radius`` anchor sides away on both axes, and whose farthest side is between 4 and 8 anchor sides
    away; the first level also takes those nearer, the last those farther. With n the anchors of the batch that have an
    object, at least 1, and BCE of the centreness towards sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)),

        (sum over anchors of focal(class logits, one-hot) + sum over anchors with an object of loss_type(box) + BCE) / n

    Areas are compared as torchvision does: in float32 those closer than 8 square pixels are equal.

    With ``recipe="mmdet"`` (``FCOSHead`` of mmdet 3, and of its authors) every anchor whose centre is in an object's
    box may take it, boxes cost ``-ln IoU``, each is weighed by the target of its centreness, and they are divided by
    the sum of these weights. Anchors are squares of the level's stride around the middles of cells; predicted distances
    in pixels are to be divided by it.

    Args:
        num_classes: C.
        recipe: ``"torchvision"`` or ``"mmdet"``.
        center_sampling_radius: see above; ``math.inf`` for any distance. Unless given 1.5, of mmdet ``math.inf``.
        scale_range: in anchor sides, see above; ``(4, 8)`` are the usual ``regress_ranges`` of mmdet.
        loss_type: ``"iou"``, ``"giou"``, ``"ciou"``, ``"iou_log"`` (-ln IoU, of an IoU of at least 1e-6; of anchors
            inside their object, as here, float32 has its digits) or another IoU term for users of
            ``fusedyolo/terms.py``. ``"giou"`` or ``"iou_log"`` unless given.
        box_weight: ``"none"``, or ``"centreness"``, as the recipe says unless given.
        alpha: as in :class:`RetinaNetLoss`.
        gamma: as in :class:`RetinaNetLoss`.
        class_weights: as in :class:`RetinaNetLoss`.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        image_size: (height, width) in pixels; needed where targets are relative to the image.
        unit: of boxes in targets, as in :class:`RetinaNetLoss`.
        boxes: in targets, likewise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes:
        - preds: ``(cls_logits, bbox_regression, bbox_ctrness)``, ``[B, N, C]``, ``[B, N, 4]`` (left, top, right, bottom
          in units of the anchor's side, not negative) and ``[B, N, 1]``; or for each a list of maps. In one piece, the
          call needs ``num_anchors_per_level``.
        - anchors: ``[N, 4]`` squares, x1, y1, x2, y2 in pixels.

    Other shapes, output (with the third part ``bbox_ctrness``) and errors are those of :class:`RetinaNetLoss`.
    """

    def __init__(
        self,
        num_classes: int,
        recipe: str = "torchvision",
        *,
        center_sampling_radius: float | None = None,
        scale_range: tuple[float, float] = (4.0, 8.0),
        loss_type: str | None = None,
        box_weight: str | None = None,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_weights: Any = None,
        reduction: str = "sum",
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        is_mmdet = checks.one_of("recipe", recipe, RECIPES) == "mmdet"
        num_classes = checks.count("num_classes", num_classes)
        if center_sampling_radius is None:
            center_sampling_radius = math.inf if is_mmdet else 1.5
        radius = ANYWHERE if center_sampling_radius == math.inf else center_sampling_radius
        if box_weight is None:
            box_weight = "centreness" if is_mmdet else "none"
        weighed = checks.one_of("box_weight", box_weight, ("none", "centreness")) == "centreness"
        head = DenseHead(
            num_classes=num_classes,
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
            matcher="centre",
            rescue=None,
            radius=checks.number("center_sampling_radius", radius, 0, open_low=True),
            scale_range=checks.ascending_pair("scale_range", scale_range),
            decode="ltrb",
            mean="batch",
            centreness=True,
            box_weight="centreness" if weighed else None,
            **box_fields(("iou_log" if is_mmdet else "giou") if loss_type is None else loss_type, 1.0, "iou", "boxes"),
            **focal_fields(alpha, gamma),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)
