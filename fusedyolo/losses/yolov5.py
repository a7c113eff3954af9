"""YOLOv5 and Scaled-YOLOv4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from .. import checks
from ..heads import GridHead
from ..terms import find_term
from .base import GridLoss, box_arguments, class_targets, focal_bce, hyper_parameters, of_repository

Own = TypeVar("Own", bound="RatioLoss")


class RatioLoss(GridLoss):
    """What losses of the ratio of sides share; a subclass is a handful of constants."""

    gain: ClassVar[str]  # the name of the box gain
    defaults: ClassVar[dict[str, Any]]
    eps: ClassVar[float]
    balances: ClassVar[dict[int, tuple[float, ...]]]  # of objectness, by the number of levels
    batch_gains = ("box_gain", "cls_gain")  # objectness is a mean over the batch, which the factor undoes

    def __init__(
        self,
        anchors: Any,
        strides: Sequence[float],
        num_classes: int,
        *,
        iou_loss: str = "ciou",
        reduction: str = "mean",
        balance: Sequence[float] | None = None,
        class_weights: Any = None,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
        **hyp: Any,
    ):
        hyp = hyper_parameters(hyp, self.defaults, type(self).__name__)
        levels = checks.level_anchors(anchors)
        if balance is not None:
            balance = checks.per_level("balance", balance, len(levels), open_low=False)
        elif len(levels) not in self.balances:
            checks.fail("anchors", f"{len(levels)} levels", f"one of {sorted(self.balances)}, or a balance")
        num_classes = checks.count("num_classes", num_classes)
        iou_loss = find_term("iou_loss", iou_loss, "iou", users=True).name
        weights = checks.class_weights(class_weights, num_classes)
        gamma = checks.number("fl_gamma", hyp["fl_gamma"], 0)
        label, label_args = focal_bce(checks.number("cls_pw", hyp["cls_pw"], 0, open_low=True), gamma)
        _, obj_args = focal_bce(checks.number("obj_pw", hyp["obj_pw"], 0, open_low=True), gamma)
        box, obj, cls = (checks.number(name, hyp[name], 0) for name in (self.gain, "obj", "cls"))
        box_scale, obj_scale, cls_scale = self._scales(len(levels))
        eps = (self.eps, self.eps)
        head = GridHead(
            num_classes=num_classes,
            anchors=sum(levels, ()),
            levels=checks.locate(levels, sum(levels, ())),
            strides=checks.strides(strides, len(levels)),
            scale_x_y=(2.0,) * len(levels),
            unit="cell",
            assigner="ratio",
            anchor_t=checks.number("anchor_t", hyp["anchor_t"], 1),
            neighbours=checks.neighbours(hyp["neighbours"]),
            by_cost=checks.flag("loss_ota", hyp.get("loss_ota", 0)),
            topk=checks.count("topk", hyp.get("topk", 10)),
            shared="each",
            edge=True,
            decode="sigmoid_square",
            box=iou_loss,
            label=label,
            objectness=label,
            quality=iou_loss,
            quality_ratio=checks.number("gr", hyp["gr"], 0, 1),
            ignore_thresh=None,
            mean_rows=True,
            obj_mean="cells",
            weigh_classes=weights is not None,
            by_image=checks.one_of("reduction", reduction, ("mean", "none")) == "none",
            box_gain=box * box_scale,
            obj_gain=obj * obj_scale,
            noobj_gain=obj * obj_scale,
            cls_gain=cls * cls_scale / num_classes if num_classes > 1 else 0.0,
            obj_balance=self.balances[len(levels)] if balance is None else balance,
            class_targets=class_targets(hyp, "label_smoothing", num_classes),
            box_args=box_arguments(eps, hyp["iou_alpha"], hyp["iou_gamma"]),
            label_args=label_args,
            obj_args=obj_args,
            quality_args=eps,
        )
        form = checks.box_form(unit, boxes)
        super().__init__(head, hyp, self.defaults, image_size, backend, batch_power=1, class_weights=weights, form=form)
        self.iou_loss = iou_loss

    @classmethod
    def from_hyp(
        cls: type[Own], hyp: Mapping[str, Any], anchors: Any, strides: Sequence[float], num_classes: int, **options: Any
    ) -> Own:
        """The loss of a repository's own hyper-parameters, a ``hyp`` that also holds what is not of the loss.

        Numbers are taken as they are: the peers' training scripts scale gains before they build a loss.

        Args:
            hyp: names and numbers, as ``yaml.safe_load`` reads them, or ``model.hyp``.
            anchors: as in the constructor, like the next two.
            strides: as there.
            num_classes: as there.
            **options: all others of the constructor, hyper-parameters included, which come before those of ``hyp``.

        Returns:
            The loss. Its attribute ``unused`` names what it took no notice of, and a warning those among them that are
            not of training or augmentation.

        Raises:
            ValueError: what it takes does not fit.
        """
        taken, unused = of_repository(hyp, cls.defaults, cls.__name__)
        loss = cls(anchors, strides, num_classes, **(taken | options))
        loss.unused = unused
        return loss

    @staticmethod
    def _scales(levels: int) -> tuple[float, float, float]:
        """What the box, objectness and class gains are multiplied by."""
        return 1.0, 1.0, 1.0


_HYP: dict[str, Any] = {
    "obj": 1.0,
    "cls": 0.5,
    "cls_pw": 1.0,
    "obj_pw": 1.0,
    "anchor_t": 4.0,
    "neighbours": 2,
    "fl_gamma": 0.0,
    "gr": 1.0,
    "iou_alpha": 1.0,
    "iou_gamma": 0.0,
}


class YOLOv5Loss(RatioLoss):
    """Training loss of YOLOv5: ``batch size * (box + objectness + class)``.

    An object takes, on every level, each anchor of which no side differs from it by a factor of ``anchor_t`` or more,
    in the cell that holds its centre and in the two neighbours nearest to it. With n the assignments of a level,

        box * sum over levels of sum over assignments of (1 - CIoU) / n
        + obj * sum over levels of balance * mean over predictions of BCE(objectness, target)
        + cls * sum over levels of sum over assignments of mean over classes of BCE(class, one-hot) / n

    The target of an assigned prediction's objectness is its CIoU, not below 0 and held constant (mixed with 1 by
    ``gr``), else 0. Where several assignments meet on one prediction, each counts in the box and class terms, and the
    objectness target is that of the last one in the peer's order: own cell, left, upper, right, lower neighbour, and
    rows in the order in which they came; on every run and device. ``balance`` is 4, 1, 0.4 on three levels, else the
    first of 4, 1, 0.25, 0.06, 0.02. The class term is left out for a single class.

    Args:
        anchors: for each level its (width, height) pairs, in pixels; any number of them.
        strides: pixels per cell, one a level; 1 to 5 levels, or more with a ``balance``.
        num_classes: C.
        iou_loss: ``"ciou"``, or another IoU loss, for the box term and the objectness target.
        reduction: ``"mean"``, as above; or ``"none"``, by which total and parts are ``[B]``, one of each image, and add
            up to these.
        balance: weight of each level's objectness, in place of those above; then there may be any number of levels.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not.
        image_size: (height, width) in pixels if it is to be checked; map sizes and strides say it otherwise.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``. Relative unless given; pixels in a list
            of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        **hyp: ``box=0.05``, ``obj=1``, ``cls=0.5``, ``cls_pw=1`` and ``obj_pw=1`` (weights of positives),
            ``anchor_t=4``, ``fl_gamma=0`` (above 0, focal losses with alpha 0.25), ``label_smoothing=0``, ``gr=1``, as
            in the peer's ``hyp``; ``smoothing="binary"`` (targets ``1 - eps / 2`` and ``eps / 2``) or ``"uniform"``
            (``1 - eps + eps / C`` and ``eps / C``); ``neighbours=2``, 0 for an object's own cell alone, or 4 for all
            beside it (as YOLOv7's auxiliary head); ``iou_alpha=1``, ``iou_gamma=0`` (see
            :func:`fusedyolo.functional.box_iou_loss`). The peer scales ``box``, ``cls`` and ``obj`` by levels, classes
            and image size before it builds its loss; so must you. :meth:`from_hyp` takes the whole of a repository's
            ``hyp``.

    Shapes:
        - preds: a list of ``[B, A, H, W, 5 + C]`` or ``[B, A * (5 + C), H, W]``, any strides, float16, bfloat16,
          float32 or float64.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput`; ``parts`` have the factor of the batch size too.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.

    Source: the published description of ``ComputeLoss`` in ultralytics/yolov5 v7.0, and Zheng et al. (CIoU, arXiv
    1911.08287), Lin et al. (focal loss, arXiv 1708.02002).
    """

    gain = "box"
    defaults: ClassVar[dict[str, Any]] = {"box": 0.05, **_HYP, "label_smoothing": 0.0, "smoothing": "binary"}
    eps = 1e-7
    balances: ClassVar[dict[int, tuple[float, ...]]] = {
        n: (4.0, 1.0, 0.4) if n == 3 else (4.0, 1.0, 0.25, 0.06, 0.02)[:n] for n in range(1, 6)
    }


class ScaledYOLOv4Loss(RatioLoss):
    """Training loss of Scaled-YOLOv4 (Wang et al. 2021, arXiv 2011.08036): YOLOv5's with other weights.

    The box gain is called ``giou``; with n levels, the box and class terms are multiplied by ``3 / n``, objectness by
    ``3 / n`` and, above three levels, by 1.4; ``balance`` is 4, 1, 0.4 or 4, 1, 0.4, 0.1 or 4, 1, 0.5, 0.4, 0.1. There
    is no label smoothing. Arguments, shapes and errors are otherwise those of :class:`YOLOv5Loss`.
    """

    gain = "giou"
    defaults: ClassVar[dict[str, Any]] = {"giou": 0.05, **_HYP}
    eps = 1e-16
    balances: ClassVar[dict[int, tuple[float, ...]]] = {
        3: (4.0, 1.0, 0.4),
        4: (4.0, 1.0, 0.4, 0.1),
        5: (4.0, 1.0, 0.5, 0.4, 0.1),
    }

    @staticmethod
    def _scales(levels: int) -> tuple[float, float, float]:
        scale = 3.0 / levels
        return scale, scale * (1.4 if levels >= 4 else 1.0), scale
