"""The loss of YOLOv1, as a module."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from .. import checks
from ..drivers.cells import CELLS, CellCall
from ..heads import CellHead, cell_head_from_key
from ..targets import Targets, as_targets
from ..watch import Watch
from .base import PARTS, WeightedLoss, hyper_parameters
from .output import Apart, LossOutput, apart_by_images, rounded

GAINS = ("box_gain", "obj_gain", "other_gain", "noobj_gain", "cls_gain")


@dataclasses.dataclass(frozen=True)
class CellRecipe:
    """The defaults of one variant.

    ``hyp`` are its hyper-parameters, ``gains`` the fields of the head that hyper-parameters go to, ``flags`` likewise
    those that are 0 or 1; ``factor`` multiplies all terms.
    """

    hyp: dict[str, float | None]
    gains: dict[str, str]
    flags: dict[str, str]
    factor: float
    nearest: bool


CELL_RECIPES = {
    "paper": CellRecipe(
        hyp={
            "lambda_coord": 5.0,
            "lambda_noobj": 0.5,
            "lambda_obj": 1.0,
            "lambda_other": None,
            "lambda_class": 1.0,
            "sqrt": 1,
        },
        gains={
            "box_gain": "lambda_coord",
            "obj_gain": "lambda_obj",
            "other_gain": "lambda_other",
            "noobj_gain": "lambda_noobj",
            "cls_gain": "lambda_class",
        },
        flags={"root": "sqrt"},
        factor=1.0,
        nearest=False,
    ),
    "darknet": CellRecipe(
        hyp={
            "object_scale": 1.0,
            "noobject_scale": 0.5,
            "class_scale": 1.0,
            "coord_scale": 5.0,
            "sqrt": 1,
            "rescore": 1,
        },
        gains={
            "box_gain": "coord_scale",
            "obj_gain": "object_scale",
            "noobj_gain": "noobject_scale",
            "cls_gain": "class_scale",
        },
        flags={"root": "sqrt", "rescore": "rescore"},
        factor=0.5,
        nearest=True,
    ),
}
"""A row for each recipe; the first one is the default."""


class YOLOv1Loss(WeightedLoss):
    """Training loss of YOLOv1: squared errors on a grid whose cells hold one object each.

    Recipes:
        ``"paper"`` (the default; Redmon et al. 2016, arXiv 1506.02640): with (x, y) the offsets in a cell, w and h the
        size relative to the image, and primes for the truth,

            lambda_coord * sum over responsible of (x - x')^2 + (y - y')^2
            + lambda_coord * sum over responsible of (sqrt(w) - sqrt(w'))^2 + (sqrt(h) - sqrt(h'))^2
            + sum over responsible of (confidence - IoU)^2
            + lambda_noobj * sum over all other predictors of confidence^2
            + sum over cells with an object of (class scores - one-hot)^2

        ``lambda_coord=5``, ``lambda_noobj=0.5``; ``lambda_obj=1`` and ``lambda_class=1`` weigh the other terms,
        ``lambda_other=None`` the confidences of those predictors of a cell with an object that are not responsible,
        unless None apart from all others (in xiongzihua/pytorch-YOLO-v1 ``lambda_obj=2``, ``lambda_other=1``). sqrt(w)
        and sqrt(h) are what is predicted, with ``sqrt=0`` w and h themselves. Responsible is, of the
        predictors of an object's cell, the one with the highest IoU with the object, the first of equals; that IoU is a
        constant.

        ``"darknet"`` (the detection layer of AlexeyAB/darknet): half of it, so that a gradient is minus the ``delta``
        of darknet; where no predictor meets the object, the one at the smallest distance (root of the summed squares of
        the differences of x / S, y / S, w, h) is responsible. ``coord_scale=5``, ``object_scale=1``,
        ``noobject_scale=0.5``, ``class_scale=1``; ``sqrt=1``, else w and h themselves are predicted; ``rescore=1``,
        else the confidence target is 1. ``softmax``, ``forced`` and ``random`` are off. Where all distances are 20 or
        more, darknet writes to another cell, and this to the nearest still.

    A cell holds one object: of several in a cell the first in row order counts, as in darknet's data loader.

    Args:
        num_classes: C.
        grid_size: S, darknet's ``side``; the image is S x S cells.
        num_boxes: n, the predictors of a cell, darknet's ``num``.
        recipe: ``"paper"`` or ``"darknet"``.
        image_size: (height, width) in pixels; needed for targets in pixels alone.
        unit: of boxes in targets: ``"relative"`` to the image, or ``"pixel"``. Relative unless given; pixels in a list
            of dicts.
        boxes: in targets: ``"cxcywh"``, ``"xyxy"`` (corners) or ``"xywh"`` (left upper corner, width, height). Centre
            and sides unless given; corners in a list of dicts.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        reduction: ``"sum"`` over the batch, as darknet does; ``"mean"``, that sum divided by the batch size; or
            ``"none"``, by which total and parts are ``[B]``, one of each image, and add up to the sum.
        class_weights: C numbers that the class terms are multiplied by, one each, whether the class is there or not.
        **hyp: the recipe's hyper-parameters.

    Shapes:
        - pred: ``[B, S, S, 5n + C]``, of each cell n times x, y, sqrt(w), sqrt(h), confidence, then C class scores; or
          darknet's ``[B, S * S * (5n + C)]``, all class scores, then all confidences, then all boxes (x, y, sqrt(w),
          sqrt(h)), each cell by cell, row by row. float16, bfloat16, float32 or float64; no activation is applied.
        - targets: ``[M, 6]`` of image, class and box, in any order; ``[B, G, 5]`` of class and box; or a list of
          ``[n, 5]``, one an image; boxes cx, cy, w, h relative to it unless ``unit`` and ``boxes`` say otherwise.
          Or a list of ``{"boxes", "labels"}``, boxes x1, y1, x2, y2 in pixels likewise; or :class:`~fusedyolo.Targets`.
          Rows may have weights, and be ignored regions, see there.
        - output: :class:`~fusedyolo.LossOutput`; ``num_pos`` is the number of cells with an object.

    Rows that cannot be (class or image out of range, not finite, no area, centre outside the image) are skipped and
    counted in ``num_invalid``.

    Raises:
        ValueError: an argument of the constructor or of a call does not fit; it says which, what came and what was
            wanted.
    """

    def __init__(
        self,
        num_classes: int,
        grid_size: int = 7,
        num_boxes: int = 2,
        recipe: str = "paper",
        *,
        image_size: int | tuple[int, int] | None = None,
        unit: str | None = None,
        boxes: str | None = None,
        backend: str = "auto",
        reduction: str = "sum",
        class_weights: Any = None,
        **hyp: Any,
    ):
        num_classes = checks.count("num_classes", num_classes)
        super().__init__(checks.class_weights(class_weights, num_classes))
        self.recipe = checks.one_of("recipe", recipe, tuple(CELL_RECIPES))
        row = CELL_RECIPES[self.recipe]
        self.hyp = hyper_parameters(hyp, row.hyp, f"recipe {recipe!r}")
        self.reduction = checks.one_of("reduction", reduction, ("sum", "mean", "none"))
        self.backend = checks.one_of("backend", backend, backends.BACKENDS)
        self.image_size = None if image_size is None else checks.size("image_size", image_size)
        self.form: checks.BoxForm = checks.box_form(unit, boxes)
        gains: dict[str, Any] = {
            field: None if self.hyp[name] is row.hyp[name] is None else checks.number(name, self.hyp[name], 0)
            for field, name in row.gains.items()
        }
        flags: dict[str, Any] = {field: checks.flag(name, self.hyp[name]) for field, name in row.flags.items()}
        head = CellHead(
            num_classes=num_classes,
            grid_size=checks.count("grid_size", grid_size),
            num_boxes=checks.count("num_boxes", num_boxes),
            nearest=row.nearest,
            by_image=self.reduction == "none",
        )
        self.head = _scaled(dataclasses.replace(head, **gains, **flags), row.factor)
        self._key = self.head.key
        self._watch = Watch(type(self).__name__, range(head.num_classes))

    def forward(self, pred: Tensor, targets: Tensor | list[dict[str, Tensor]] | Targets) -> LossOutput:
        """The loss of one batch.

        Args:
            pred: raw output, ``[B, S, S, 5n + C]`` or ``[B, S * S * (5n + C)]``; any strides; float16, bfloat16,
                float32 or float64.
            targets: packed ``[M, 6]``, padded ``[B, G, 5]``, a list of tensors ``[n, 5]``, of boxes relative to the
                image unless the constructor was told otherwise; a torchvision list of dicts, in pixels likewise, which
                need ``image_size``; or :class:`Targets`.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """
        head = self.head
        batch = checks.cell_predictions(pred, head.grid_size, head.num_boxes, head.num_classes)
        size = checks.target_size(self.image_size, targets, self.form)
        rows, offsets, weights = as_targets(targets, batch, size, pred.device, self.form)
        class_weights = None if self._weights is None else self._weights_for(pred)
        if self.reduction == "mean":
            head = _mean_head(self._key, len(range(batch)))  # of a symbolic size, range makes a number
        if backends.resolve(self.backend, pred.device) == "triton":
            from .. import ops

            # The first backward changes the gradient that the loss leaves. A compiled graph is better off without.
            own = ops.workspace(pred.device)
            with_grad = torch.is_grad_enabled() and pred.requires_grad and own is None
            total, parts, counts, *_ = ops.call(
                ops.cell_loss, pred, rows, offsets, head.key, with_grad, own, class_weights, weights
            )
        else:
            total, parts, counts, _ = CELLS.reference_loss(
                head, CellCall(pred, rows, offsets, size, class_weights, weights)
            )
        if not torch.compiler.is_compiling():
            self._last.counts = counts
            if self._watch is not None:
                self._watch = self._watch.after(rows, offsets, counts, self.image_size, weights=weights)
        num_pos, num_invalid = counts.unbind()
        if head.by_image:
            parts = parts.view(3, -1)
        return LossOutput(total, dict(zip(PARTS, parts.unbind(), strict=True)), num_pos, num_invalid)

    def apart(self, pred: Tensor, targets: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        return apart_by_images(self(pred, targets), pred.shape[0], -1 if self.reduction == "mean" else 0)

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        head, default = self.head, CELL_RECIPES[self.recipe].hyp
        hyp = "".join(f", {name}={value!r}" for name, value in self.hyp.items() if value != default[name])
        return (
            f"num_classes={head.num_classes}, grid_size={head.grid_size}, num_boxes={head.num_boxes}, "
            f"recipe={self.recipe!r}, reduction={self.reduction!r}, backend={self.backend!r}{hyp}"
        )


@torch.compiler.assume_constant_result
def _mean_head(key: str, batch: int) -> CellHead:
    """The head whose sums are means over ``batch`` images: a mean costs no launch."""
    return _scaled_head(key, batch)


@lru_cache(maxsize=256)
def _scaled_head(key: str, batch: int) -> CellHead:
    return _scaled(cell_head_from_key(key), 1 / batch)


def _scaled(head: CellHead, factor: float) -> CellHead:
    """The head with all gains times ``factor``."""
    gains: dict[str, Any] = {name: gain * factor for name in GAINS if (gain := getattr(head, name)) is not None}
    return rounded(dataclasses.replace(head, **gains))
