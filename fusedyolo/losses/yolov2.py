"""YOLOv2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from .. import checks
from ..heads import GridHead
from ..targets import Targets
from .base import GridLoss, hyper_parameters
from .output import LossOutput, rounded
from .resumed import Resumed

RECIPES: dict[str, dict[str, Any]] = {
    "region": {"lambda_coord": 5.0, "lambda_obj": 1.0, "lambda_noobj": 0.5, "lambda_class": 1.0, "thresh": 0.6},
    "darknet": {
        "coord_scale": 1.0,
        "object_scale": 5.0,
        "noobject_scale": 1.0,
        "class_scale": 1.0,
        "thresh": 0.6,
        "rescore": 1,
        "coord_prefill": 12800,
    },
    "lightnet": {
        "coord_scale": 1.0,
        "object_scale": 5.0,
        "noobject_scale": 1.0,
        "class_scale": 1.0,
        "iou_ignore_thresh": 0.6,
        "coord_regression": "mse",
        "coord_grid_sensitivity": 1.0,
        "class_smoothing": 0.0,
        "coord_prefill": 12800,
    },
}
"""The hyper-parameters of each recipe; the first one is the default."""


class YOLOv2Loss(Resumed, GridLoss):
    """Training loss of YOLOv2, the region loss: one anchor of its cell for each object, softmax over the classes.

    An object takes the anchor of its cell that is most like it (the first of equals); of several objects on one
    prediction the last one stays. With (x, y) the sigmoids and (w, h) the raw outputs of a prediction, c the sigmoid of
    its objectness, primes for targets (w' and h' the logarithms of object over anchor), IoU that of the decoded box
    with its object, held constant:

    Recipes:
        ``"region"`` (the default): over the batch, N_obj predictions with an object, and N_conf those and all others
        that overlap every object of their image by an IoU below ``thresh=0.6``,

            lambda_coord / N_obj * sum over assigned of (x - x')^2 + (y - y')^2 + (w - w')^2 + (h - h')^2
            - lambda_class / N_obj * sum over assigned of log softmax(classes)[class]
            + lambda_obj / N_conf * sum over assigned of (IoU - c)^2
            + lambda_noobj / N_conf * sum over the others counted of c^2

        ``lambda_coord=5``, ``lambda_noobj=0.5`` (YOLOv1's), ``lambda_obj=1``, ``lambda_class=1``.

        ``"darknet"`` (the region layer of AlexeyAB/darknet): half those squares and the cross-entropy, not divided by
        anything, times ``coord_scale=1``, ``object_scale=5``, ``noobject_scale=1`` (unless IoU > ``thresh=0.6``) and
        ``class_scale=1``; ``rescore=0`` replaces the target IoU by 1. Up to image ``coord_prefill=12800`` predictions
        without an object are drawn to the middle of their cell and their anchor's size, with weight 0.01.

        ``"lightnet"`` (``RegionLoss`` of lightnet 4.0): darknet's as a mean over images; the box term times
        ``2 - min(w * h, 1.5)`` of the object, or with ``coord_regression="ciou"`` its variant of the CIoU loss, whose
        aspect term has the other sign; ``coord_grid_sensitivity=1``, ``class_smoothing=0``,
        ``iou_ignore_thresh=0.6``, ``coord_prefill=12800`` (weight ``sqrt(0.01 / coord_scale)``). With several strides,
        its ``MultiScaleRegionLoss``: an object is assigned on every scale, and the sum over scales is divided by their
        number less one.

    Args:
        anchors: (width, height) pairs in cells, as YOLOv2's configurations have them; with several strides, a list of
            such lists.
        num_classes: C.
        stride: pixels per cell, or (``"lightnet"``) one number a scale.
        recipe: ``"region"``, ``"darknet"`` or ``"lightnet"``.
        reduction: of ``"darknet"``: ``"sum"`` over the batch or ``"mean"``, that sum divided by the batch size. Of all:
            ``"none"``, by which total and parts are ``[B]``, one of each image, which add up to what they are without.
        class_weights: C numbers that the targets of the softmax are multiplied by, as torch.nn.CrossEntropyLoss does.
        image_size: (height, width) in pixels if it is to be checked; map size and stride say it otherwise.
        unit: of boxes in targets, as in :class:`YOLOv3Loss`.
        boxes: in targets, likewise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        **hyp: the recipe's hyper-parameters.

    Attributes:
        seen: images so far, as a call in training mode counts them before it begins, where there is a warm-up; saved in
            ``state_dict``. Set it to go on with a training run from elsewhere. Replicas of ``torch.nn.DataParallel``
            count for themselves and are dropped after each step: add the batch to ``seen`` of the loss in the training
            loop. Keep the loss out of functions under ``torch.utils.checkpoint``: what these do again counts again.
            Under ``torch.compile`` a number that changes at every step is a recompilation at every step, unless
            ``torch._dynamo.config.allow_unspec_int_on_nn_module = True``, or ``coord_prefill=0``.

    Shapes:
        - pred: ``[B, A * (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]``, any strides, float16, bfloat16, float32 or
          float64; a list of them with several strides.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput`.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    _counter = "seen"

    def __init__(
        self,
        anchors: Any,
        num_classes: int,
        stride: float | Sequence[float] = 32,
        recipe: str = "region",
        *,
        reduction: str | None = None,
        class_weights: Any = None,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
        **hyp: Any,
    ):
        recipe = checks.one_of("recipe", recipe, list(RECIPES))
        hyp = hyper_parameters(hyp, RECIPES[recipe], f"recipe {recipe!r}")
        several = not isinstance(stride, Real)
        if several and recipe != "lightnet":
            checks.fail("stride", checks.describe(stride), f"a number with recipe {recipe!r}")
        levels = checks.level_anchors(anchors if several else [anchors])
        strides = checks.strides(stride if several else [stride], len(levels))
        if several and len(levels) < 2:
            checks.fail("stride", checks.describe(stride), "a number, or at least two")
        checks.in_cells(levels, strides)
        pixels = tuple(
            tuple((w * step, h * step) for w, h in level) for level, step in zip(levels, strides, strict=True)
        )
        if reduction not in (None, "none") and recipe != "darknet":
            want = f"'none', or nothing with recipe {recipe!r}, which has its own"
            checks.fail("reduction", checks.describe(reduction), want)
        reduction = checks.one_of("reduction", reduction or "sum", ("sum", "mean", "none"))
        pool = sum(pixels, ())
        common = {
            "num_classes": checks.count("num_classes", num_classes),
            "anchors": pool,
            "levels": checks.locate(pixels, pool),
            "strides": strides,
            "per_level": True,
            "shared": "last",
            "label": "softmax_ce",
            "objectness": "sse",
            "box": "mse",
            "weigh_classes": class_weights is not None,
            "by_image": reduction == "none",
        }
        make = {"region": _region, "darknet": _darknet, "lightnet": _lightnet}[recipe]
        head, prior_gain = make(common, hyp)
        power = -1 if recipe == "lightnet" or reduction == "mean" else 0
        form = checks.box_form(unit, boxes)
        weights = checks.class_weights(class_weights, head.num_classes)
        super().__init__(
            head, hyp, RECIPES[recipe], image_size, backend, batch_power=power, class_weights=weights, form=form
        )
        self.recipe = recipe
        self.seen = 0
        self._several = several
        self._prefill = checks.count("coord_prefill", hyp.get("coord_prefill", 0), 0)
        self._prior_head = rounded(dataclasses.replace(head, prior_gain=prior_gain))
        self._prior_key = self._prior_head.key

    def forward(
        self,
        pred: Tensor | Sequence[Tensor],
        targets: Tensor | Sequence[dict[str, Tensor]] | Targets,
    ) -> LossOutput:
        """The loss of one batch; see the class for shapes, and :meth:`GridLoss.forward` for errors."""
        if self._several:
            return super().forward(list(pred), targets)
        if not isinstance(pred, Tensor):
            checks.fail("pred", checks.describe(pred), "a tensor")
        return super().forward([pred], targets)

    def _head_of(self, batch: int) -> tuple[GridHead, str]:
        if self.training and self._prefill:
            self.seen += len(range(batch))  # of a symbolic size, range makes a number
            if self.seen < self._prefill:
                return self._for_batch(self._prior_head, self._prior_key, batch)
        return super()._head_of(batch)

    @property
    def _counting(self) -> bool:
        """Whether there is a warm-up."""
        return self._prefill > 0

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        return f"{super().extra_repr()}, recipe={self.recipe!r}, seen={self.seen}"


def _region(common: dict[str, Any], hyp: dict[str, Any]) -> tuple[GridHead, float]:
    """The head, and the weight of the box term of predictions without an object during the warm-up."""
    thresh = checks.number("thresh", hyp["thresh"], 0, 1, open_low=True)
    head = GridHead(
        **common,
        scale_x_y=(1.0,),
        quality="iou",
        quality_args=(0.0, 0.0),
        ignore_thresh=float(np.nextafter(np.float32(thresh), np.float32(-1))),  # counted only below thresh itself
        mean_rows=True,
        obj_mean="used",
        box_gain=checks.number("lambda_coord", hyp["lambda_coord"], 0),
        obj_gain=checks.number("lambda_obj", hyp["lambda_obj"], 0),
        noobj_gain=checks.number("lambda_noobj", hyp["lambda_noobj"], 0),
        cls_gain=checks.number("lambda_class", hyp["lambda_class"], 0),
    )
    return head, 0.0


def _darknet(common: dict[str, Any], hyp: dict[str, Any]) -> tuple[GridHead, float]:
    (rescore,) = checks.flags("rescore", hyp["rescore"], 1)
    head = GridHead(
        **common,
        scale_x_y=(1.0,),
        quality="iou" if rescore else None,
        quality_args=(0.0, 0.0),
        ignore_thresh=checks.number("thresh", hyp["thresh"], 0, 1),
        box_gain=0.5 * checks.number("coord_scale", hyp["coord_scale"], 0),
        obj_gain=0.5 * checks.number("object_scale", hyp["object_scale"], 0),
        noobj_gain=0.5 * checks.number("noobject_scale", hyp["noobject_scale"], 0),
        cls_gain=checks.number("class_scale", hyp["class_scale"], 0),
    )
    return head, 0.5 * 0.01


def _lightnet(common: dict[str, Any], hyp: dict[str, Any]) -> tuple[GridHead, float]:
    levels, classes = len(common["levels"]), common["num_classes"]
    share = 1.0 / max(1, levels - 1)
    coord = checks.number("coord_scale", hyp["coord_scale"], 0, open_low=True)
    smooth = checks.number("class_smoothing", hyp["class_smoothing"], 0, 1)
    sensitivity = checks.number("coord_grid_sensitivity", hyp["coord_grid_sensitivity"], 0, open_low=True)
    regression = checks.one_of("coord_regression", hyp["coord_regression"], ("mse", "ciou"))
    class_gain = checks.number("class_scale", hyp["class_scale"], 0)
    head = GridHead(
        **{**common, "box": "mse" if regression == "mse" else "ciou_plus"},
        unit="cell",
        scale_x_y=(sensitivity,) * levels,
        edge=True,
        quality="iou",
        quality_args=(1e-16, 0.0),
        ignore_thresh=checks.number("iou_ignore_thresh", hyp["iou_ignore_thresh"], 0, 1),
        area_weight=1.0,
        area_cap=1.5,
        box_args=(1e-16, 0.0),
        box_gain=share * coord * (0.5 if regression == "mse" else 1.0),
        obj_gain=share * 0.5 * checks.number("object_scale", hyp["object_scale"], 0),
        noobj_gain=share * 0.5 * checks.number("noobject_scale", hyp["noobject_scale"], 0),
        cls_gain=share * class_gain if classes > 1 else 0.0,
        class_targets=(1.0 - smooth + smooth / classes, smooth / classes),
    )
    return head, head.box_gain * (math.sqrt(0.01 / coord) if regression == "mse" else 1.0)
