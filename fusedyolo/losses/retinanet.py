"""RetinaNet and EfficientDet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import checks
from ..heads import DenseHead
from .dense import RECIPES, DenseLoss, box_fields, delta_weights, focal_fields


class RetinaNetLoss(DenseLoss):
    """Training loss of RetinaNet (Lin et al. 2017, arXiv 1708.02002), that of torchvision.

    An anchor with an IoU of ``fg_iou_thresh`` or more takes the object that it overlaps most, with one from
    ``bg_iou_thresh`` to there it is ignored. With ``allow_low_quality_matches`` every anchor that overlaps some object
    as much as any anchor does takes the object that it overlaps most itself; an object that meets no anchor thus claims
    all anchors that it does not meet, as in torchvision. With n the anchors of an image that have an object, not below
    1,

        mean over images of sum over anchors not ignored of focal(class logits, one-hot) / n
        + mean over images of sum over anchors with an object of loss_type(box) / n

    With ``recipe="mmdet"`` (``RetinaHead`` of mmdet 3) an anchor that overlaps some object as much as any anchor does
    takes that object, of several the last one; and sums over the batch are divided by the sum of n.

    Args:
        num_classes: C.
        recipe: ``"torchvision"`` or ``"mmdet"``.
        normalizer: that of the recipe unless given. ``"image"``, see above, of torchvision; ``"images"``, the sum of n,
            in which an image without an object counts as one, of mmdet; ``"batch"``, the anchors of the batch that have
            an object, not below 1.
        fg_iou_thresh: IoU of a match, from there on.
        bg_iou_thresh: IoU below which an anchor is background.
        allow_low_quality_matches: see above.
        loss_type: ``"l1"`` or ``"smooth_l1"`` on box deltas, or on decoded boxes ``"iou"``, ``"giou"``, ``"ciou"``
            or another IoU term for users in the table of ``fusedyolo/terms.py``.
        beta: of ``"smooth_l1"``, the difference below which it is quadratic.
        alpha: weight of positives in the focal loss, -1 for no weights.
        gamma: exponent of its modulating factor.
        weights: of x, y, w and h, what deltas are multiplied by.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        image_size: (height, width) in pixels; needed where targets are relative to the image.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``. Relative unless given; pixels in a list
            of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes:
        - preds: ``(cls_logits, bbox_regression)``, ``[B, N, C]`` and ``[B, N, 4]`` (dx, dy, dw, dh), N counting levels,
          rows, columns and the anchors of a cell; or for each a list of maps ``[B, A * C, H, W]`` and
          ``[B, A * 4, H, W]``.
        - targets: a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels unless ``unit`` and ``boxes`` say
          otherwise; or, with ``image_size``, ``[M, 6]`` of image, class and box, in any order, ``[B, G, 5]`` of class
          and box, or a list of ``[n, 5]``, one an image, boxes cx, cy, w, h relative to the image, likewise; or
          :class:`~fusedyolo.Targets`. Labels are indices of class logits. Rows may have weights, and be ignored
          regions, see there: of these torchvision knows nothing.
        - anchors: ``[N, 4]``, x1, y1, x2, y2 in pixels.
        - output: :class:`~fusedyolo.LossOutput` with the parts ``classification`` and ``bbox_regression``; ``num_pos``
          is the number of anchors with an object.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image as far as its size
    is known) are skipped and counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    def __init__(
        self,
        num_classes: int,
        recipe: str = "torchvision",
        *,
        normalizer: str | None = None,
        fg_iou_thresh: float = 0.5,
        bg_iou_thresh: float = 0.4,
        allow_low_quality_matches: bool = True,
        loss_type: str = "l1",
        beta: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        class_weights: Any = None,
        reduction: str = "sum",
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        high = checks.number("fg_iou_thresh", fg_iou_thresh, 0, 1)
        low = checks.number("bg_iou_thresh", bg_iou_thresh, 0, 1)
        if low > high:
            checks.fail("bg_iou_thresh", bg_iou_thresh, f"at most fg_iou_thresh, {fg_iou_thresh}")
        is_mmdet = checks.one_of("recipe", recipe, RECIPES) == "mmdet"
        if normalizer is None:
            normalizer = "images" if is_mmdet else "image"
        num_classes = checks.count("num_classes", num_classes)
        low_quality = checks.flag("allow_low_quality_matches", allow_low_quality_matches)
        head = DenseHead(
            num_classes=num_classes,
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
            matcher="iou",
            band=(low, high),
            rescue=("own" if is_mmdet else "equal") if low_quality else None,
            decode="delta",
            weights=delta_weights(weights),
            mean=checks.one_of("normalizer", normalizer, ("image", "images", "batch")),
            **box_fields(loss_type, beta, "delta", "iou"),
            **focal_fields(alpha, gamma),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)


class EfficientDetLoss(DenseLoss):
    """Training loss of EfficientDet (Tan et al. 2020, arXiv 1911.09070), that of automl and of effdet.

    An anchor with an IoU of ``match_threshold`` or more takes the object that it overlaps most; beside that, the best
    anchor of every object takes that object, the first one of several. With n the anchors of the batch that have an
    object, and one more,

        sum over anchors of focal(class logits, one-hot) / n
        + box_loss_weight * sum over anchors with an object of huber(box deltas) / (4 n)

    huber(d) is d^2 / 2 for |d| below ``delta``, beyond it ``delta * (|d| - delta / 2)``. The peer leaves out deltas
    whose target is exactly 0, which count here as all others.

    Args:
        num_classes: C, without the background.
        match_threshold: IoU of a match, from there on.
        alpha: weight of positives in the focal loss, -1 for no weights.
        gamma: exponent of its modulating factor.
        delta: see above; above 0.
        box_loss_weight: see above.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not.
        reduction: ``"sum"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        image_size: (height, width) in pixels; needed where targets are relative to the image.
        unit: of boxes in targets, as in :class:`RetinaNetLoss`.
        boxes: in targets, likewise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Shapes, output and errors are those of :class:`RetinaNetLoss`; box deltas are dx, dy, dw, dh, where the peer has dy,
    dx, dh, dw, and anchors y1, x1, y2, x2: hand in ``[..., [1, 0, 3, 2]]`` of both. Part ``bbox_regression`` has the
    ``box_loss_weight`` in it. Labels are indices of class logits; in the peer's files they count from 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        match_threshold: float = 0.5,
        alpha: float = 0.25,
        gamma: float = 1.5,
        delta: float = 0.1,
        box_loss_weight: float = 50.0,
        class_weights: Any = None,
        reduction: str = "sum",
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
    ):
        num_classes = checks.count("num_classes", num_classes)
        thresh = checks.number("match_threshold", match_threshold, 0, 1)
        delta = checks.number("delta", delta, 0, open_low=True)
        head = DenseHead(
            num_classes=num_classes,
            by_image=checks.one_of("reduction", reduction, ("sum", "none")) == "none",
            matcher="iou",
            band=(thresh, thresh),
            rescue="best_first",
            decode="delta",
            mean="one more",
            box="smooth_l1",  # which times delta is the other's huber
            beta=delta,
            box_args=(1e-7, 1e-7),
            box_gain=checks.number("box_loss_weight", box_loss_weight, 0) * delta / 4,
            **focal_fields(alpha, gamma),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)
