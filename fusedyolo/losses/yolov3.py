"""YOLOv3 and YOLOv4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from .. import checks
from ..heads import GridHead
from ..terms import TERMS, find_term
from .anchor_recipes import RECIPES, Given, counted_weights
from .base import GridLoss, hyper_parameters, of_repository

ASSIGNERS = ("best_anchor", "shape_iou", "ratio", "iou_band")
Own = TypeVar("Own", bound="_AnchorLoss")

REDUCTIONS = ("sum", "mean", "level", "none")


class _AnchorLoss(GridLoss):
    """What YOLOv3 and YOLOv4 share; a subclass is a name in :data:`RECIPES`."""

    detector: ClassVar[str]

    def __init__(
        self,
        anchors: Any,
        strides: Sequence[float],
        num_classes: int,
        recipe: str = "paper",
        *,
        all_anchors: Any = None,
        assigner: str | None = None,
        iou_loss: str | None = None,
        scale_x_y: float | Sequence[float] | None = None,
        iou_thresh: float | None = None,
        ignore_thresh: float | None = None,
        class_weights: Any = None,
        reduction: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
        **hyp: Any,
    ):
        names = [name for detector, name in RECIPES if detector == self.detector]
        recipe = checks.one_of("recipe", recipe, names)
        row = RECIPES[self.detector, recipe]
        hyp = hyper_parameters(hyp, row.hyp, f"recipe {recipe!r}")
        reduction = checks.one_of("reduction", row.reduction if reduction is None else reduction, REDUCTIONS)
        levels = checks.level_anchors(anchors)
        pool = sum(levels, ()) if all_anchors is None else checks.all_anchors(all_anchors)
        num_classes = checks.count("num_classes", num_classes)
        usual = iou_loss is None
        box = TERMS[row.iou_loss] if usual else find_term("iou_loss", iou_loss, "iou", "offset", users=True)
        if "iou_t" in hyp and iou_thresh is not None:
            checks.fail("iou_thresh", f"{iou_thresh} with recipe {recipe!r}", "iou_t in its place")
        iou_thresh = checks.number("iou_thresh", row.iou_thresh if iou_thresh is None else iou_thresh, 0, 1)
        if ignore_thresh is None:
            ignore_thresh = row.ignore_thresh
        if ignore_thresh is not None:
            ignore_thresh = checks.number("ignore_thresh", ignore_thresh, 0, 1)
        size = None if image_size is None else checks.size("image_size", image_size)
        strides = checks.strides(strides, len(levels))
        weights = checks.class_weights(class_weights, num_classes)
        of_rows = counted_weights(hyp, num_classes)
        if weights is not None and of_rows is not None:
            checks.fail("class_weights", "beside counters_per_class", "one of the two")
        by_level = "level" in (reduction, row.reduction if reduction == "none" else None)
        fields: dict[str, Any] = {
            "num_classes": num_classes,
            "anchors": pool,
            "levels": checks.locate(levels, pool),
            "strides": strides,
            "scale_x_y": checks.per_level("scale_x_y", row.scale_x_y if scale_x_y is None else scale_x_y, len(levels)),
            "assigner": checks.one_of("assigner", row.assigner if assigner is None else assigner, ASSIGNERS),
            "iou_thresh": iou_thresh,
            "band": checks.band("iou_band", hyp["iou_band"]),
            "anchor_t": checks.number("anchor_t", hyp["anchor_t"], 1),
            "neighbours": checks.neighbours(hyp["neighbours"]),
            "box": row.offset if box.is_offset else box.name,
            "ignore_thresh": ignore_thresh,
            "mean_rows": by_level,
            "obj_mean": "used" if by_level else None,
            "weigh_classes": weights is not None,
            "by_image": reduction == "none",
        }
        fields |= row.fixed | row.make(hyp, Given(box, num_classes, strides, iou_thresh, size))
        super().__init__(
            GridHead(**fields),
            hyp,
            row.hyp,
            image_size,
            backend,
            batch_power=-1 if reduction == "mean" else 0,
            class_weights=of_rows if weights is None else weights,
            form=checks.box_form(unit, boxes),
        )
        self.recipe, self.iou_loss, self.reduction = recipe, row.iou_loss if usual else box.name, reduction

    @classmethod
    def from_hyp(
        cls: type[Own],
        hyp: Mapping[str, Any],
        anchors: Any,
        strides: Sequence[float],
        num_classes: int,
        recipe: str = "paper",
        **options: Any,
    ) -> Own:
        """The loss of a repository's own hyper-parameters, as :meth:`YOLOv5Loss.from_hyp`, by those of the recipe."""
        names = [name for detector, name in RECIPES if detector == cls.detector]
        known = RECIPES[cls.detector, checks.one_of("recipe", recipe, names)].hyp
        taken, unused = of_repository(hyp, known, cls.__name__)
        loss = cls(anchors, strides, num_classes, recipe, **(taken | options))
        loss.unused = unused
        return loss

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        own = {"recipe": self.recipe, "iou_loss": self.iou_loss, "reduction": self.reduction}
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in own.items())


class YOLOv3Loss(_AnchorLoss):
    """Training loss of YOLOv3: one prediction for each object, binary cross-entropy for objectness and classes.

    Recipes:
        ``"paper"`` (the default; Redmon and Farhadi 2018, arXiv 1804.02767): with (x, y) the sigmoids and (w, h) the
        raw outputs of a prediction, and primes for their targets,

            lambda_coord * sum over assigned of (x - x')^2 + (y - y')^2 + (w - w')^2 + (h - h')^2
            + sum over assigned of BCE(objectness, 1)
            + lambda_noobj * sum over the rest of BCE(objectness, 0), but for boxes of an IoU > ignore_thresh
            + sum over assigned of BCE(classes, one-hot)

        ``lambda_coord=5``, ``lambda_noobj=0.5``, ``ignore_thresh=0.5``. ``lambda_obj=1`` and ``lambda_class=1`` weigh
        the other two terms, ``balance=None`` (a number a level) the objectness of each level. ``gr=0``: an assigned
        prediction's objectness is trained towards ``1 - gr + gr * similarity``, that of ``iou_loss`` (of squared errors
        the IoU), not below 0 and held constant. ``obj_loss=None``, ``obj_alpha=None``, ``obj_gamma=None``: the term of
        objectness, as ``cls_loss`` and its numbers are that of classes. ``shared="sum"``: of several objects on one
        prediction box losses are added up and all classes are trained at once; with ``"each"`` the classes of each by
        themselves, with ``"merge"`` all classes and the box of the last alone, with ``"last"`` that one alone.

        ``"darknet"`` (the yolo layer of AlexeyAB/darknet): x and y by BCE against their fractional targets, w and h by
        half their squared errors, the box term times ``2 - w * h`` of the object and ``iou_normalizer=0.75``;
        ``obj_normalizer=1``; ``ignore_thresh=0.7``, only for predictions with a class probability above 0.25.
        ``counters_per_class`` weighs an object by ``min(max(counts) / count, max_delta)``; ``cls_normalizer=1`` acts
        only together with it.

        For all levels or one by one, ``obj_normalizer`` and ``objectness_smooth=0`` (1: objectness is trained towards
        the IoU that the ignore mask looks at, where that is above ``ignore_thresh``, and 0 elsewhere, whether an object
        is assigned or not, as darknet does). ``new_coords=1`` is the layer of yolov4-csp: sizes
        ``anchor * (2 sigmoid)^2``, half squared errors of sigmoids for objectness and classes; predictions are still
        logits.

        ``"archive"`` (the loss of ultralytics/yolov3 before its yolov5 days, kept in WongKinYiu/PyTorch_YOLOv4): every
        anchor of a level whose IoU of widths and heights with an object exceeds ``iou_t=0.2`` takes it, in the object's
        cell. With n the assignments of a level, sums over levels of

            giou * sum over assignments of (1 - GIoU) / n + cls * sum over these of mean over classes of BCE / n
            + obj * mean over all predictions of the batch of BCE(objectness, 1 - gr + gr * GIoU, or 0)

        ``giou=3.54``, ``obj=64.3``, ``cls=37.4`` (its training script multiplies ``cls`` by C / 80; so must you),
        ``gr=1``, ``cls_pw=1``, ``obj_pw=1``, ``fl_gamma=0``, ``label_smoothing=0`` as in :class:`YOLOv5Loss`. Where
        assignments meet on one prediction each counts, and the last one says its objectness. Nothing is ignored, and
        there is no class term for a single class.

        ``"eriklindernoren"`` (eriklindernoren/PyTorch-YOLOv3): likewise, with the CIoU, and anchors of which no side
        differs from the object's by a factor of ``anchor_t=4`` or more; ``box=0.05``, ``obj=1``, ``cls=0.5``.

        ``"bubbliiiing"`` (bubbliiiing/yolo3-pytorch): one anchor for each object, as in the paper; sums over levels of

            box_ratio * mean over assigned of (1 - GIoU) + cls_ratio * mean over assigned and classes of BCE
            + obj_ratio * balance * mean over predictions that are not ignored of BCE(objectness)

        ``box_ratio=0.05``; ``obj_ratio`` and ``cls_ratio`` unless given ``5 * H * W / 416^2`` of ``image_size``, and
        ``C / 80``; ``balance`` 0.4 for the coarsest level, 1 for the next, 4 for finer ones; ``ignore_thresh=0.5``.
        ``focal_loss=0``: with 1, objectness is a focal loss of ``alpha=0.25`` and ``gamma=2``, times 10. Probabilities
        are not clipped to [1e-7, 1 - 1e-7], as they are there.

    The first two take ``label_smooth_eps=0``, with ``smoothing="binary"`` for targets ``1 - eps / 2`` and ``eps / 2``,
    or with ``"uniform"`` ``1 - eps + eps / C`` and ``eps / C``; and ``cls_loss=None``, or ``"bce"``, ``"focal"`` or
    another class term for users in the table of ``fusedyolo/terms.py``, with ``focal_alpha=None`` (0.75 for varifocal)
    and ``focal_gamma=None`` (2 for a named ``cls_loss``; either of them alone asks for a focal loss). All of them take
    ``iou_alpha=1`` and ``iou_gamma=0``, the powers of :func:`fusedyolo.functional.box_iou_loss`; and
    ``iou_band=(0.3, 0.7)``, ``anchor_t=4`` and ``neighbours=0``, the numbers of assigners.

    Args:
        anchors: for each level its (width, height) pairs, in pixels.
        strides: pixels per cell, one a level.
        num_classes: C.
        recipe: see above.
        all_anchors: the anchors among which the best one of an object is chosen, if more than those of the levels given
            (darknet's ``mask``): an object whose best anchor is on a level not given is not learnt here.
        assigner: that of the recipe unless given. ``"best_anchor"``, of paper, darknet and bubbliiiing;
            ``"shape_iou"``: every anchor whose IoU of widths and heights exceeds ``iou_thresh``, and no other;
            ``"ratio"``, that of :class:`YOLOv5Loss`, with ``anchor_t`` and ``neighbours``; or ``"iou_band"``: an anchor
            in the middle of its cell is positive, for the object that it overlaps most, where that IoU exceeds the
            upper end of ``iou_band``; negative where it is below the lower end; and left out between. An object that no
            anchor overlaps so well is not learnt.
        iou_loss: ``"mse"`` (the default of paper and darknet), or of decoded boxes ``"iou"``, ``"giou"``, ``"ciou"`` or
            another IoU term for users in the table of ``fusedyolo/terms.py``.
        scale_x_y: grid sensitivity, ``x = s * sigmoid - (s - 1) / 2``; a number, or one a level. 1 by default.
        iou_thresh: every anchor whose IoU of widths and heights with the object exceeds it is assigned too. 1 (none) by
            default.
        ignore_thresh: see the recipes.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not.
        reduction: ``"sum"`` over the batch, as darknet does; ``"mean"``, that sum divided by the batch size; or
            ``"level"``, a sum of means over each level: box and class terms are divided by the objects assigned there,
            of the whole batch (with ``shared="last"`` or ``"merge"`` the predictions), objectness by the predictions
            that are not ignored. With ``"none"``, total and parts are ``[B]``, one of each image, which add up to those
            of the recipe's own reduction.
        image_size: (height, width) in pixels if it is to be checked; map sizes and strides say it otherwise.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``. Relative unless given; pixels in a list
            of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        **hyp: the recipe's hyper-parameters.

    Shapes:
        - preds: a list of ``[B, A * (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]``, float16, bfloat16, float32 or float64.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput`.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    detector = "YOLOv3Loss"


class YOLOv4Loss(_AnchorLoss):
    """Training loss of YOLOv4: YOLOv3's with an IoU loss for boxes and, if they fit, several anchors for an object.

    Recipes:
        ``"paper"`` (the default; Bochkovskiy et al. 2020, arXiv 2004.10934; CIoU: Zheng et al., arXiv 1911.08287):
        :class:`YOLOv3Loss`'s with ``lambda_coord`` times the CIoU loss of the decoded box, in pixels, as the box term.

        ``"darknet"`` (the yolo layer of AlexeyAB/darknet): objectness and classes as darknet; the box term is
        ``iou_normalizer * (1 - CIoU)`` and its gradient the true one: darknet's box update is the gradient of no
        function, and its clip of that update to ``max_delta`` has no counterpart here. ``iou_normalizer=0.07``,
        ``max_delta=5`` (for class weights). A prediction with objects of K classes divides its box term by K.

        ``"bubbliiiing"`` (bubbliiiing/yolov4-pytorch): that of :class:`YOLOv3Loss`, with a CIoU whose alpha is not held
        constant, a grid sensitivity of 1 and one anchor for each object.

    Defaults that differ from :class:`YOLOv3Loss`: ``iou_loss="ciou"``, ``scale_x_y=1.1``, ``iou_thresh=0.213``.
    Arguments, shapes and errors are those of :class:`YOLOv3Loss`.
    """

    detector = "YOLOv4Loss"
