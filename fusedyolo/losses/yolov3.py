"""YOLOv3 and YOLOv4."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from .. import checks
from ..heads import GridHead
from ..terms import TERMS, find_term, term_names
from .base import GridLoss, box_arguments, hyper_parameters


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The defaults of one variant of a detector.

    ``hyp`` are the hyper-parameters that it takes beside the named arguments, ``gains`` the fields of the head that
    hyper-parameters go to unchanged, and ``offset`` the box term that ``iou_loss="mse"`` stands for.
    """

    iou_loss: str
    scale_x_y: float
    iou_thresh: float
    ignore_thresh: float
    hyp: dict[str, Any]
    gains: dict[str, str]
    offset: str
    area_weight: float
    box_args: tuple[float, float]
    unit: str
    class_gate: float | None
    averages: bool


_COMMON_HYP: dict[str, Any] = {
    "label_smooth_eps": 0.0,
    "cls_loss": None,
    "focal_alpha": None,
    "focal_gamma": None,
    "iou_alpha": 1.0,
    "iou_gamma": 0.0,
    "iou_band": (0.3, 0.7),
}

_V3_PAPER = Recipe(
    iou_loss="mse",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.5,
    hyp={"lambda_coord": 5.0, "lambda_noobj": 0.5, **_COMMON_HYP},
    gains={"box_gain": "lambda_coord", "noobj_gain": "lambda_noobj"},
    offset="mse",
    area_weight=0.0,
    box_args=(0.0, 1e-7),
    unit="pixel",
    class_gate=None,
    averages=False,
)
_V3_DARKNET = Recipe(
    iou_loss="mse",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.7,
    hyp={
        "iou_normalizer": 0.75,
        "obj_normalizer": 1.0,
        "cls_normalizer": 1.0,
        "counters_per_class": None,
        "max_delta": None,
        "objectness_smooth": 0,
        "new_coords": 0,
        **_COMMON_HYP,
    },
    gains={
        "box_gain": "iou_normalizer",
        "first_weight": "cls_normalizer",
    },
    offset="bce_mse",
    area_weight=1.0,
    box_args=(0.0, 1e-6),
    unit="image",
    class_gate=math.log(0.25 / 0.75),  # the logit of a probability of .25
    averages=True,
)
_V4: dict[str, Any] = {"iou_loss": "ciou", "scale_x_y": 1.1, "iou_thresh": 0.213}

RECIPES = {
    ("YOLOv3Loss", "paper"): _V3_PAPER,
    ("YOLOv3Loss", "darknet"): _V3_DARKNET,
    ("YOLOv4Loss", "paper"): dataclasses.replace(_V3_PAPER, **_V4),
    ("YOLOv4Loss", "darknet"): dataclasses.replace(
        _V3_DARKNET, **_V4, hyp={**_V3_DARKNET.hyp, "iou_normalizer": 0.07, "max_delta": 5.0}
    ),
}
"""A row for each detector and recipe; the first recipe of a detector is its default."""


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
        assigner: str = "best_anchor",
        iou_loss: str | None = None,
        scale_x_y: float | Sequence[float] | None = None,
        iou_thresh: float | None = None,
        ignore_thresh: float | None = None,
        reduction: str = "sum",
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
        reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        levels = checks.level_anchors(anchors)
        pool = sum(levels, ()) if all_anchors is None else checks.all_anchors(all_anchors)
        num_classes = checks.count("num_classes", num_classes)
        iou_loss = row.iou_loss if iou_loss is None else iou_loss
        box = find_term("iou_loss", iou_loss, "iou", "offset", users=True)
        iou_thresh = checks.number("iou_thresh", row.iou_thresh if iou_thresh is None else iou_thresh, 0, 1)
        ignore_thresh = checks.number(
            "ignore_thresh", row.ignore_thresh if ignore_thresh is None else ignore_thresh, 0, 1
        )
        smooth = checks.number("label_smooth_eps", hyp["label_smooth_eps"], 0, 1)
        label, label_args = _label(hyp)
        gains: dict[str, Any] = {field: checks.number(name, hyp[name], 0) for field, name in row.gains.items()}
        head = GridHead(
            num_classes=num_classes,
            anchors=pool,
            levels=checks.locate(levels, pool),
            strides=checks.strides(strides, len(levels)),
            scale_x_y=checks.per_level("scale_x_y", row.scale_x_y if scale_x_y is None else scale_x_y, len(levels)),
            unit=row.unit,
            assigner=checks.one_of("assigner", assigner, ("best_anchor", "iou_band")),
            iou_thresh=iou_thresh,
            band=checks.band("iou_band", hyp["iou_band"]),
            box=row.offset if box.is_offset else box.name,
            label=label,
            class_gate=row.class_gate,
            average_box=row.averages and iou_thresh < 1,
            ignore_thresh=ignore_thresh,
            area_weight=row.area_weight,
            area_cap=1.0,  # beyond an image there is no box in darknet; a weight below 0 would push it away
            class_targets=(1.0 - smooth / 2, smooth / 2),
            box_args=box_arguments(row.box_args, hyp["iou_alpha"], hyp["iou_gamma"]),
            label_args=label_args,
            **gains,
        )
        super().__init__(
            _darknet(head, hyp) if recipe == "darknet" else head,
            hyp,
            row.hyp,
            image_size,
            backend,
            batch_power=-1 if reduction == "mean" else 0,
            class_weights=_class_weights(hyp, num_classes),
            form=checks.box_form(unit, boxes),
        )
        self.recipe, self.iou_loss, self.reduction = recipe, iou_loss, reduction

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        own = {"recipe": self.recipe, "iou_loss": self.iou_loss, "reduction": self.reduction}
        return super().extra_repr() + "".join(f", {name}={value!r}" for name, value in own.items())


def _label(hyp: dict[str, Any]) -> tuple[str, tuple[float, ...]]:
    """The class term and its arguments."""
    kind, alpha, gamma = hyp["cls_loss"], hyp["focal_alpha"], hyp["focal_gamma"]
    if gamma is None:
        gamma = 0.0 if kind is None else 2.0
    gamma = checks.number("focal_gamma", gamma, 0)
    if kind is None:
        kind = "bce" if alpha is None and gamma == 0 else "focal"
    usual = find_term("cls_loss", kind, "class", users=True).numbers
    if "alpha" not in usual:
        return kind, tuple({**usual, "gamma": gamma}[name] for name in usual)
    if alpha is None:
        alpha = -1.0 if kind == "focal" else usual["alpha"]
    if alpha != -1.0:
        alpha = checks.number("focal_alpha", alpha, 0, 1)
    return kind, tuple({**usual, "alpha": alpha, "gamma": gamma}[name] for name in usual)


def _class_weights(hyp: dict[str, Any], num_classes: int) -> tuple[float, ...] | None:
    if hyp.get("max_delta") is not None:
        limit = checks.number("max_delta", hyp["max_delta"], 0, open_low=True)
    else:
        limit = math.inf
    if hyp.get("counters_per_class") is None:
        return None
    if hyp["cls_loss"] is not None and not TERMS[hyp["cls_loss"]].elementwise:
        checks.fail(
            "cls_loss", f"{hyp['cls_loss']!r} with counters_per_class", "a term that judges each class by itself"
        )
    counts = checks.class_counts(hyp["counters_per_class"], num_classes)
    return tuple(min(max(counts) / count, limit) for count in counts)


def _darknet(head: GridHead, hyp: dict[str, Any]) -> GridHead:
    """With darknet's ``new_coords`` and what it sets for each level."""
    levels = len(head.levels)
    smooth = checks.flags("objectness_smooth", hyp["objectness_smooth"], levels)
    balance = checks.per_level("obj_normalizer", hyp["obj_normalizer"], levels, open_low=False)
    head = dataclasses.replace(head, smooth=smooth if any(smooth) else (), obj_balance=balance)
    (new_coords,) = checks.flags("new_coords", hyp["new_coords"], 1)
    if not new_coords:
        return head
    if TERMS[head.box].is_offset:
        ious = term_names("iou", users=True)
        checks.fail("iou_loss", "'mse' with new_coords", "one of " + ", ".join(map(repr, ious)))
    if head.label != "bce":
        checks.fail("new_coords", "a class term of its own", "no cls_loss, focal_alpha or focal_gamma beside it")
    # the derivative of half a squared error
    halves = {gain: 0.5 * getattr(head, gain) for gain in ("obj_gain", "noobj_gain", "cls_gain")}
    return dataclasses.replace(head, decode="sigmoid_square", objectness="sse", label="sse", **halves)


class YOLOv3Loss(_AnchorLoss):
    """Training loss of YOLOv3: one prediction for each object, binary cross-entropy for objectness and classes.

    Recipes:
        ``"paper"`` (the default; Redmon and Farhadi 2018, arXiv 1804.02767): with (x, y) the sigmoids and (w, h) the
        raw outputs of a prediction, and primes for their targets,

            lambda_coord * sum over assigned of (x - x')^2 + (y - y')^2 + (w - w')^2 + (h - h')^2
            + sum over assigned of BCE(objectness, 1)
            + lambda_noobj * sum over the rest of BCE(objectness, 0), but for boxes of an IoU > ignore_thresh
            + sum over assigned of BCE(classes, one-hot)

        ``lambda_coord=5``, ``lambda_noobj=0.5``, ``ignore_thresh=0.5``.

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

    Both take ``label_smooth_eps=0`` (targets ``1 - eps / 2`` and ``eps / 2``); ``cls_loss=None``, or ``"bce"``,
    ``"focal"`` or another class term for users in the table of ``fusedyolo/terms.py``, with ``focal_alpha=None`` (0.75
    for varifocal) and ``focal_gamma=None`` (2 for a named ``cls_loss``; either of them alone asks for a focal loss);
    ``iou_alpha=1`` and ``iou_gamma=0``, the powers of :func:`fusedyolo.functional.box_iou_loss`; and
    ``iou_band=(0.3, 0.7)``.

    Args:
        anchors: for each level its (width, height) pairs, in pixels.
        strides: pixels per cell, one a level.
        num_classes: C.
        recipe: ``"paper"`` or ``"darknet"``.
        all_anchors: the anchors among which the best one of an object is chosen, if more than those of the levels given
            (darknet's ``mask``): an object whose best anchor is on a level not given is not learnt here.
        assigner: ``"best_anchor"``, or ``"iou_band"``: an anchor in the middle of its cell is positive, for the object
            that it overlaps most, where that IoU exceeds the upper end of ``iou_band``; negative where it is below the
            lower end; and left out between. An object that no anchor overlaps so well is not learnt.
        iou_loss: ``"mse"`` (the default), or of decoded boxes ``"iou"``, ``"giou"``, ``"ciou"`` or another IoU term for
            users in the table of ``fusedyolo/terms.py``.
        scale_x_y: grid sensitivity, ``x = s * sigmoid - (s - 1) / 2``; a number, or one a level. 1 by default.
        iou_thresh: every anchor whose IoU of widths and heights with the object exceeds it is assigned too. 1 (none) by
            default.
        ignore_thresh: see the recipes.
        reduction: ``"sum"`` over the batch, as darknet does, or ``"mean"``, that sum divided by the batch size.
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

    Defaults that differ from :class:`YOLOv3Loss`: ``iou_loss="ciou"``, ``scale_x_y=1.1``, ``iou_thresh=0.213``.
    Arguments, shapes and errors are those of :class:`YOLOv3Loss`.
    """

    detector = "YOLOv4Loss"
