"""RetinaNet, EfficientDet, SSD and FCOS: losses over anchors that each predict a box and the logits of all classes."""

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
ANYWHERE = 1e30  # a radius beyond any anchor

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


def _box(loss_type: Any, beta: Any, *roles: str) -> dict[str, Any]:
    """Fields of the head that say what boxes cost."""
    box = find_term("loss_type", loss_type, *roles, users=True)
    return {
        "box": box.name,
        "beta": checks.number("beta", beta, 0),
        "box_args": tuple(box.numbers.values()) if "boxes" in box.roles else (1e-7, 1e-7),
    }


def _focal(alpha: Any, gamma: Any) -> dict[str, Any]:
    """Fields of the head that say what classes cost."""
    alpha = checks.number("alpha", alpha)
    if not 0 <= alpha <= 1 and alpha != -1:
        checks.fail("alpha", alpha, "a number in [0, 1], or -1 for none")
    return {"label": "focal", "label_args": (alpha, checks.number("gamma", gamma, 0))}


def _weights(value: Any) -> tuple[float, float, float, float]:
    if not isinstance(value, list | tuple) or len(value) != 4:
        checks.fail("weights", checks.describe(value), "four positive numbers, of x, y, w and h")
    x, y, w, h = (checks.number("weights", item, 0, open_low=True) for item in value)
    return x, y, w, h


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
            weights=_weights(weights),
            mean=checks.one_of("normalizer", normalizer, ("image", "images", "batch")),
            **_box(loss_type, beta, "delta", "iou"),
            **_focal(alpha, gamma),
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
            **_focal(alpha, gamma),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)


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
            weights=_weights(weights),
            label="softmax_ce",
            label_args=(),
            negatives=checks.number("neg_to_pos_ratio", neg_to_pos_ratio, 0, open_low=True),
            mean="batch",
            **_box(loss_type, beta, "delta", "iou"),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)


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
            **_box(("iou_log" if is_mmdet else "giou") if loss_type is None else loss_type, 1.0, "iou", "boxes"),
            **_focal(alpha, gamma),
        )
        of_classes = checks.class_weights(class_weights, num_classes)
        super().__init__(head, image_size, backend, checks.box_form(unit, boxes), of_classes)
