"""Losses over anchors that each predict a box and the logits of all classes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from .. import checks
from ..drivers.dense import DENSE, DenseCall
from ..heads import DenseHead
from ..targets import Targets, as_targets, in_corners
from ..terms import find_term
from ..watch import Watch
from .base import WeightedLoss
from .output import Apart, LossOutput, detached, rounded

TERMS = ("classification", "bbox_regression", "bbox_ctrness")
"""Names of the parts, torchvision's."""

RECIPES = ("torchvision", "mmdet")

Maps = Tensor | Sequence[Tensor]
AnyTargets = Tensor | Sequence[dict[str, Tensor]] | Targets


class DenseLoss(WeightedLoss):
    """A module around a :class:`~fusedyolo.heads.DenseHead`; a subclass makes the head of its arguments."""

    head: DenseHead

    def __init__(
        self,
        head: DenseHead,
        image_size: int | tuple[int, int] | None,
        backend: str,
        form: checks.BoxForm = None,
        class_weights: tuple[float, ...] | None = None,
    ):
        super().__init__(class_weights)
        self.form = form
        labels = range(1 if head.background else 0, head.num_classes)
        self._watch = Watch(type(self).__name__, labels)
        # thresholds stay as they are: those of the peer are not rounded where its boxes are float64
        self.head = dataclasses.replace(rounded(head), band=head.band, radius=head.radius)
        self._key = self.head.key
        self._names = ("cls_logits", "bbox_regression", "bbox_ctrness")[: 3 if head.centreness else 2]
        self._channels = (head.num_classes, 4, 1)[: len(self._names)]
        self.backend = checks.one_of("backend", backend, backends.BACKENDS)
        self.image_size = None if image_size is None else checks.size("image_size", image_size)

    def forward(
        self,
        preds: Sequence[Maps],
        targets: AnyTargets,
        anchors: Tensor,
        num_anchors_per_level: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> LossOutput:
        """The loss of one batch.

        Args:
            preds: what the network predicts, as the class says, of any strides; float16, bfloat16, float32 or float64.
            targets: a torchvision list of dicts, of corners in pixels unless the constructor was told otherwise; or,
                with the ``image_size``, packed ``[M, 6]``, padded ``[B, G, 5]``, a list of tensors ``[n, 5]``, relative
                to the image likewise; or :class:`Targets`.
            anchors: ``[N, 4]`` or ``[1, N, 4]``, x1, y1, x2, y2 in pixels, of all images; see :mod:`fusedyolo.anchors`.
            num_anchors_per_level: how many of them each level has; maps tell that themselves.
            image_size: (height, width) of this batch, or one side of a square; that of the constructor without it.

        Raises:
            ValueError: names the argument, what came and what was wanted.
        """
        call = self.read(preds, targets, anchors, num_anchors_per_level, image_size)
        total, terms, counts, _ = self.compute(call, outputs=1)
        num_pos, num_invalid = counts.unbind()
        return LossOutput(total, detached(TERMS, terms), num_pos, num_invalid)

    def terms(
        self,
        preds: Sequence[Maps],
        targets: AnyTargets,
        anchors: Tensor,
        num_anchors_per_level: Sequence[int] | None = None,
        image_size: int | tuple[int, int] | None = None,
    ) -> dict[str, Tensor]:
        """The parts of the loss with a gradient each, as torchvision's detectors return them; to weigh them apart.

        Arguments and errors are those of :meth:`forward`.
        """
        _, terms, _, _ = self.compute(self.read(preds, targets, anchors, num_anchors_per_level, image_size))
        return dict(zip(TERMS, terms, strict=False))

    def apart(self, preds: Any, targets: Any, *arguments: Any, **geometry: Any) -> Apart:
        """The loss in pieces, each divided by numbers of its own; arguments and errors of :meth:`forward`."""
        call = self.read(preds, targets, *arguments, **geometry)
        mean, weighed = self.head.mean, self.head.box_weight is not None
        total, terms, counts, (of_batch, of_boxes) = self.compute(call, outputs=None if weighed else 1)
        num_pos, num_invalid = counts.unbind()
        amount = {"image": total.new_full((), call.levels[0][0].shape[0]), "images": of_batch[-1]}.get(mean, num_pos)
        pieces, amounts = total[None], amount[None].double()
        if of_boxes is not None and weighed:
            cls, box, *middle = terms
            pieces = torch.stack((torch.stack((cls, *middle)).sum(0), box))
            # without objects there is nothing to weigh, and the least that is divided by is not to be added up
            weights = torch.where(num_pos > 0, of_boxes.view(()), 0.0)
            amounts = torch.cat((amounts, weights[None]))
        parts = {name: (term, int(weighed and i == 1)) for i, (name, term) in enumerate(detached(TERMS, terms).items())}
        return Apart(pieces, parts, amounts, partial(_shares, mean), num_pos, num_invalid)

    def read(
        self, preds: Any, targets: Any, anchors: Any, num_anchors_per_level: Any = None, image_size: Any = None
    ) -> DenseCall:
        """The arguments of :meth:`forward`, checked, in the form in which they are used."""
        head = self.head
        if isinstance(anchors, Tensor) and anchors.dim() == 3 and anchors.shape[0] == 1:
            anchors = anchors[0]
        levels, sizes = checks.dense_predictions(preds, self._names, self._channels, anchors)
        pred: Tensor = levels[0][0]
        batch = pred.shape[0]
        ends = checks.level_sizes(num_anchors_per_level, sizes, pred.dim() == 3, head.matcher == "centre")
        size = self.image_size if image_size is None else checks.size("image_size", image_size)
        corners = (self.form is not None or isinstance(targets, list | tuple)) and in_corners(targets, self.form)
        if size is None and (not corners or find_term("box", head.box, "iou", "boxes", "delta").needs_extent):
            what = f"with loss_type={head.box!r}" if corners else "for targets that are not corners in pixels"
            checks.fail("image_size", None, f"(height, width) of the images, {what}")
        rows, offsets, weights = as_targets(targets, batch, size or (1, 1), pred.device, self.form, corners)
        wide = torch.float64 if pred.dtype == torch.float64 else torch.float32
        if anchors.requires_grad:
            anchors = anchors.detach()
        anchors = anchors if anchors.dtype == wide else anchors.to(wide)
        class_weights = None if self._weights is None else self._weights_for(pred)
        return DenseCall(levels, self._channels, anchors, rows, offsets, size, corners, ends, class_weights, weights)

    def compute(
        self, call: DenseCall, outputs: int | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, tuple[Tensor, Tensor | None]]:
        """Total, parts, counts, and what sums are divided by: what ends in that of the batch, and of heads that weigh
        boxes the sum of their weights; with ``outputs`` 1 the parts need have no gradient."""
        pred = call.levels[0][0]
        if backends.resolve(self.backend, pred.device) == "triton":
            from .. import ops

            flat, half, mixed = [p for maps in call.levels for p in maps], False, False
            for each in flat:
                half = half or each.dtype == torch.float16
                mixed = mixed or each.dtype != pred.dtype
            if mixed:  # kinds may differ, the maps of one may not
                flat = [p for maps in call.levels for p in checks.of_one_type(maps)]
            height, width = (math.inf, math.inf) if call.size is None else call.size
            # The first backward changes the gradient that the loss leaves: a compiled graph is better off without. In
            # float16 small gradients would be lost before a GradScaler's factor reaches them.
            own = ops.workspace(pred.device, call.rows.shape[0] + pred.shape[0] + 1)
            asked = torch.is_grad_enabled() and any([p.requires_grad for p in flat])
            with_grad = asked and not half and own is None
            total, cls, box, middle, counts, _, found, weights, *_ = ops.call(
                ops.dense_loss,
                flat,
                call.anchors.contiguous(),
                call.rows,
                call.offsets,
                self._key,
                [float(width), float(height)],
                call.corners,
                list(call.ends),
                with_grad,
                own,
                call.class_weights,
                call.weights,
                outputs=outputs,
            )
            terms, divisors = (cls, box, middle)[: len(call.levels)], (found, weights)
        else:
            total, terms, counts, divisors = DENSE.reference_loss(self.head, call)
        if not torch.compiler.is_compiling():
            self._last.counts = counts
            if self._watch is not None:
                self._watch = self._watch.after(call.rows, call.offsets, counts, call.size, call.corners, call.weights)
        return total, terms, counts, divisors

    def extra_repr(self) -> str:
        """The arguments that tell one loss from another."""
        return f"num_classes={self.head.num_classes}, loss_type={self.head.box!r}, backend={self.backend!r}"


def _shares(mean: str, amounts: Tensor) -> Tensor:
    """What the pieces are multiplied by, of images, anchors with a row, or both counted together, as ``mean`` says, and
    where boxes are weighed of the sum of their weights.
    """
    of_batch, *of_boxes = amounts.unbind()
    of_batch = of_batch + 1 if mean == "one more" else of_batch.clamp(min=1)
    return 1 / torch.stack((of_batch, *[weights.clamp(min=1e-6) for weights in of_boxes]))


def box_fields(loss_type: Any, beta: Any, *roles: str) -> dict[str, Any]:
    """Fields of the head that say what boxes cost."""
    box = find_term("loss_type", loss_type, *roles, users=True)
    return {
        "box": box.name,
        "beta": checks.number("beta", beta, 0),
        "box_args": tuple(box.numbers.values()) if "boxes" in box.roles else (1e-7, 1e-7),
    }


def focal_fields(alpha: Any, gamma: Any) -> dict[str, Any]:
    """Fields of the head that say what classes cost."""
    alpha = checks.number("alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        checks.fail("alpha", alpha, "a number in [0, 1], or -1 for none")
    return {"label": "focal", "label_args": (alpha, checks.number("gamma", gamma, 0))}


def delta_weights(value: Any) -> tuple[float, float, float, float]:
    """What deltas of x, y, w and h are multiplied by."""
    if not isinstance(value, list | tuple) or len(value) != 4:
        checks.fail("weights", checks.describe(value), "four positive numbers, of x, y, w and h")
    x, y, w, h = (checks.number("weights", item, 0, open_low=True) for item in value)
    return x, y, w, h
