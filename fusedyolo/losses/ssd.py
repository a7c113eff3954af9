"""SSD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..heads import DenseHead
from .dense import DenseLoss, box_fields, delta_weights


class SSDLoss(DenseLoss):
    """Training loss of SSD (Liu et al. 2016, arXiv 1512.02325), that of torchvision: the MultiBox loss.

    An anchor with an IoU of ``iou_thresh`` or more takes the object that it overlaps most; beside that, the best anchor
    of every object takes that object, the last one of several. Of the anchors left, ``neg_to_pos_ratio`` times as many
    as an image has with an object count, those of the largest cross-entropy. With n the anchors of the batch that have
    an object, at least 1,

        sum over anchors that count of cross-entropy(class logits, class or background) / n
        + sum over anchors with an object of loss_type(box) / n

    Should an image not have that many anchors left, some with an object count twice, as in torchvision; which ones
    torchvision leaves open, here the first. Of equal cross-entropies the first anchors count, too.

    Args:
        num_classes: C, counting the background, which is class 0, as in torchvision.
        iou_thresh: IoU of a match, from there on.
        neg_to_pos_ratio: negatives that count for each positive.
        loss_type: as in :class:`RetinaNetLoss`.
        beta: as in :class:`RetinaNetLoss`.
        weights: as in :class:`RetinaNetLoss`.
        class_weights: C numbers, one a class, the background the first: what the cross-entropy of an anchor of that
            class is multiplied by.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        image_size: (height, width) in pixels; needed where targets are relative to the image.
        unit: of boxes in targets, as in :class:`RetinaNetLoss`.
        boxes: in targets, likewise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes, output and errors are those of :class:`RetinaNetLoss`. Labels are 1 ... C - 1, in every form of targets;
    rows of class 0 are skipped and counted in ``num_invalid``.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        iou_thresh: float = 0.5,
        neg_to_pos_ratio: float = 3.0,
        loss_type: str = "smooth_l1",
        beta: float = 1.0,
        weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),
        class_weights: Any = None,
        reduction: str = "sum",
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        thresh = checks.number("iou_thresh", iou_thresh, 0, 1)
        num_classes = checks.count("num_classes", num_classes, 2)
        head = DenseHead(
            num_classes=num_classes,
            background=True,
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
            matcher="iou",
            band=(thresh, thresh),
            rescue="best",
            decode="delta",
            weights=delta_weights(weights),
            label="softmax_ce",
            label_args=(),
            negatives=checks.number("neg_to_pos_ratio", neg_to_pos_ratio, 0, open_low=True),
            mean="batch",
            **box_fields(loss_type, beta, "delta", "iou"),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)
