"""The losses of anchor-grid detectors, as modules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import backend as backends
from .. import checks, reference
from ..heads import IOU_KINDS, GridHead, head_from_key
from ..targets import Targets, as_targets
from .output import LossOutput, rounded

PARTS = ("box", "obj", "cls")


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
    relative: bool
    class_gate: float | None
    averages: bool


_LABEL_HYP = {"label_smooth_eps": 0.0, "focal_alpha": None, "focal_gamma": 0.0}

_V3_PAPER = Recipe(
    iou_loss="mse",
    scale_x_y=1.0,
    iou_thresh=1.0,
    ignore_thresh=0.5,
    hyp={"lambda_coord": 5.0, "lambda_noobj": 0.5, **_LABEL_HYP},
    gains={"box_gain": "lambda_coord", "noobj_gain": "lambda_noobj"},
    offset="mse",
    area_weight=0.0,
    box_args=(0.0, 1e-7),
    relative=False,
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
        **_LABEL_HYP,
    },
    gains={
        "box_gain": "iou_normalizer",
        "obj_gain": "obj_normalizer",
        "noobj_gain": "obj_normalizer",
        "first_weight": "cls_normalizer",
    },
    offset="bce_mse",
    area_weight=1.0,
    box_args=(0.0, 1e-6),
    relative=True,
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


class _GridLoss(nn.Module):
    """What the losses of anchor-grid detectors share; a subclass is a name in :data:`RECIPES`."""

    detector: ClassVar[str]
    class_weights: Tensor | None

    def __init__(
        self,
        anchors: Any,
        strides: Sequence[float],
        num_classes: int,
        recipe: str = "paper",
        *,
        all_anchors: Any = None,
        iou_loss: str | None = None,
        scale_x_y: float | Sequence[float] | None = None,
        iou_thresh: float | None = None,
        ignore_thresh: float | None = None,
        reduction: str = "sum",
        image_size: int | tuple[int, int] | None = None,
        backend: str = "auto",
        **hyp: Any,
    ):
        super().__init__()
        names = [name for detector, name in RECIPES if detector == self.detector]
        self.recipe = checks.one_of("recipe", recipe, names)
        row = RECIPES[self.detector, self.recipe]
        for name in hyp:
            if name not in row.hyp:
                checks.fail(name, f"no hyper-parameter of recipe {recipe!r}", "one of " + ", ".join(row.hyp))
        self.hyp = {**row.hyp, **hyp}
        self.reduction = checks.one_of("reduction", reduction, checks.REDUCTIONS)
        self.backend = checks.one_of("backend", backend, backends.BACKENDS)
        self.image_size = None if image_size is None else checks.size("image_size", image_size)

        levels = checks.level_anchors(anchors)
        pool = sum(levels, ()) if all_anchors is None else checks.all_anchors(all_anchors)
        num_classes = checks.count("num_classes", num_classes)
        self.iou_loss = checks.one_of("iou_loss", row.iou_loss if iou_loss is None else iou_loss, (*IOU_KINDS, "mse"))
        iou_thresh = checks.number("iou_thresh", row.iou_thresh if iou_thresh is None else iou_thresh, 0, 1)
        ignore_thresh = checks.number(
            "ignore_thresh", row.ignore_thresh if ignore_thresh is None else ignore_thresh, 0, 1
        )
        smooth = checks.number("label_smooth_eps", self.hyp["label_smooth_eps"], 0, 1)
        label, label_args = self._label()
        gains: dict[str, Any] = {field: checks.number(name, self.hyp[name], 0) for field, name in row.gains.items()}
        self.head = rounded(
            GridHead(
                num_classes=num_classes,
                anchors=pool,
                levels=checks.locate(levels, pool),
                strides=checks.strides(strides, len(levels)),
                scale_x_y=checks.per_level("scale_x_y", row.scale_x_y if scale_x_y is None else scale_x_y, len(levels)),
                box=row.offset if self.iou_loss == "mse" else self.iou_loss,
                label=label,
                relative=row.relative,
                class_gate=row.class_gate,
                average_box=row.averages and iou_thresh < 1,
                ignore_thresh=ignore_thresh,
                iou_thresh=iou_thresh,
                area_weight=row.area_weight,
                class_targets=(1.0 - smooth / 2, smooth / 2),
                box_args=row.box_args,
                label_args=label_args,
                **gains,
            )
        )
        self._weights = self._class_weights()
        weights = None if self._weights is None else torch.tensor(self._weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)
        # What a call needs, in the form in which it needs it: sizes as integers, and the heads of each batch size.
        self._anchors = tuple(map(len, self.head.levels))
        self._strides = tuple(int(s) if s.is_integer() else s for s in self.head.strides)
        self._key = self.head.key

    def _label(self) -> tuple[str, tuple[float, ...]]:
        alpha, gamma = self.hyp["focal_alpha"], checks.number("focal_gamma", self.hyp["focal_gamma"], 0)
        if alpha is None and gamma == 0:
            return "bce", ()
        return "focal", (-1.0 if alpha is None else checks.number("focal_alpha", alpha, 0, 1), gamma)

    def _class_weights(self) -> tuple[float, ...] | None:
        if self.hyp.get("max_delta") is not None:
            limit = checks.number("max_delta", self.hyp["max_delta"], 0, open_low=True)
        else:
            limit = math.inf
        if self.hyp.get("counters_per_class") is None:
            return None
        counts = checks.class_counts(self.hyp["counters_per_class"], self.head.num_classes)
        return tuple(min(max(counts) / count, limit) for count in counts)

    def forward(self, preds: Sequence[Tensor], targets: Tensor | Sequence[dict[str, Tensor]] | Targets) -> LossOutput:
        """The loss of one batch.

        Args:
            preds: raw outputs, one tensor a level in the order of ``anchors``: ``[B, A * (5 + C), H, W]`` with channels
                anchor by anchor, or ``[B, A, H, W, 5 + C]``; each as x, y, w, h, objectness, classes. Any strides;
                float16, bfloat16, float32 or float64.
            targets: packed ``[M, 6]``, padded ``[B, G, 5]``, a torchvision list of dicts, or :class:`Targets`.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """
        batch, size = checks.grid_predictions(
            preds, self._anchors, self._strides, self.head.num_classes, self.image_size
        )
        device = preds[0].device
        rows, offsets = as_targets(targets, batch, size, device)
        weights = self._weights_on(device)
        head = self.head
        if self.reduction == "mean":
            head = _mean_head(self._key, len(range(batch)))  # of a symbolic size, range makes a number
        if backends.resolve(self.backend, device) == "triton":
            from .. import ops

            with_state = torch.is_grad_enabled() and any([pred.requires_grad for pred in preds])
            total, parts, counts, _ = ops.grid_loss(list(preds), rows, offsets, weights, head.key, with_state)
        else:
            total, parts, counts = _reference_loss(preds, rows, offsets, head, weights)
        terms = dict(zip(PARTS, parts.unbind(), strict=True))
        num_pos, num_invalid = counts.unbind()
        return LossOutput(total, terms, num_pos, num_invalid)

    def _weights_on(self, device: torch.device) -> Tensor | None:
        """The class weights on ``device`` in float32, whatever the module itself was cast or moved to."""
        weights = self.class_weights
        if weights is None or (weights.device == device and weights.dtype == torch.float32):
            return weights
        self.class_weights = torch.tensor(self._weights, dtype=torch.float32, device=device)
        return self.class_weights

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        head = self.head
        default = RECIPES[self.detector, self.recipe].hyp
        hyp = "".join(f", {name}={value!r}" for name, value in self.hyp.items() if value != default[name])
        return (
            f"strides={self._strides}, num_classes={head.num_classes}, recipe={self.recipe!r}, "
            f"iou_loss={self.iou_loss!r}, reduction={self.reduction!r}, backend={self.backend!r}{hyp}"
        )


class YOLOv3Loss(_GridLoss):
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

    Both take ``label_smooth_eps=0`` (targets ``1 - eps / 2`` and ``eps / 2``), and ``focal_alpha=None``,
    ``focal_gamma=0``, which turn the class term into a focal loss.

    Args:
        anchors: for each level its (width, height) pairs, in pixels.
        strides: pixels per cell, one a level.
        num_classes: C.
        recipe: ``"paper"`` or ``"darknet"``.
        all_anchors: the anchors among which the best one of an object is chosen, if more than those of the levels given
            (darknet's ``mask``): an object whose best anchor is on a level not given is not learnt here.
        iou_loss: ``"mse"`` (the default), or of decoded boxes ``"iou"``, ``"giou"``, ``"diou"``, ``"ciou"``.
        scale_x_y: grid sensitivity, ``x = s * sigmoid - (s - 1) / 2``; a number, or one a level. 1 by default.
        iou_thresh: every anchor whose IoU of widths and heights with the object exceeds it is assigned too. 1 (none) by
            default.
        ignore_thresh: see the recipes.
        reduction: ``"sum"`` over the batch, as darknet does, or ``"mean"``, that sum divided by the batch size.
        image_size: (height, width) in pixels if it is to be checked; map sizes and strides say it otherwise.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        **hyp: the recipe's hyper-parameters.

    Shapes:
        - preds: a list of ``[B, A * (5 + C), H, W]`` or ``[B, A, H, W, 5 + C]``, float16, bfloat16, float32 or float64.
        - targets: ``[M, 6]`` of image, class, cx, cy, w, h, normalised, in any order; or ``[B, G, 5]``; or a list of
          ``{"boxes": x1 y1 x2 y2 in pixels, "labels"}``; or :class:`~fusedyolo.Targets`.
        - output: :class:`~fusedyolo.LossOutput`.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    detector = "YOLOv3Loss"


class YOLOv4Loss(_GridLoss):
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


def _reference_loss(
    preds: Sequence[Tensor], rows: Tensor, offsets: Tensor | None, head: GridHead, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The eager loss, which knows no capacity: rows beyond the last one are emptied and taken off the invalid count."""
    views = [reference.grid_view(pred, len(level)) for pred, level in zip(preds, head.levels, strict=True)]
    if offsets is None:
        return reference.grid_loss(views, rows, head, weights)
    spare = torch.arange(rows.shape[0], device=rows.device) >= offsets[-1]
    total, parts, counts = reference.grid_loss(views, rows.masked_fill(spare[:, None], 0.0), head, weights)
    num_pos, num_invalid = counts.unbind()
    return total, parts, torch.stack((num_pos, num_invalid - spare.sum()))


@torch.compiler.assume_constant_result
def _mean_head(key: str, batch: int) -> GridHead:
    """The head whose sums are means over ``batch`` images: a mean costs no launch."""
    return _scaled_head(key, batch)


@lru_cache(maxsize=256)
def _scaled_head(key: str, batch: int) -> GridHead:
    head = head_from_key(key)
    gains = ("box_gain", "obj_gain", "noobj_gain", "cls_gain")
    return rounded(head, **{gain: getattr(head, gain) / batch for gain in gains})
