"""Boxes and scores from predictions, and detections from those: :func:`decode` and :func:`select`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backend as backends
from . import checks, drivers
from .drivers.protocol import Predictions
from .drivers.shared import wide
from .heads import head_from_key
from .operator import fake, operator
from .reference import select as reference


class Detections(NamedTuple):
    """What :func:`select` returns, padded to ``max_det`` an image, best first; nothing in it has waited for the device.

    Attributes:
        boxes: ``[B, max_det, 4]``, x1 y1 x2 y2; 0 where there is none. float64 for float64 predictions, else float32.
        scores: ``[B, max_det]``, of the same dtype; 0 where there is none.
        labels: ``[B, max_det]``, int64; -1 where there is none.
        count: ``[B]``, int32: detections of each image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple has a method of that name

    def __repr__(self) -> str:
        images, most = self.scores.shape
        return f"Detections(images={images}, max_det={most}, device={self.boxes.device})"

    def images(self) -> list[dict[str, Tensor]]:
        """The detections of each image as torchvision's detectors return them: ``boxes``, ``scores``, ``labels``.

        Their number is data, so this waits for the device, once.
        """
        return [
            {"boxes": boxes[:n], "scores": scores[:n], "labels": labels[:n]}
            for boxes, scores, labels, n in zip(self.boxes, self.scores, self.labels, self.count.tolist(), strict=True)
        ]


def decode(
    preds: Any,
    criterion: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    anchors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes and scores of every prediction, in eager PyTorch; nothing waits for the device.

    Args:
        preds: what ``criterion`` takes, of any strides: a list of maps ``[B, A * (5 + C), H, W]`` or
            ``[B, A, H, W, 5 + C]``, one a level, or the map itself where there is one level; of YOLOv1
            ``[B, S, S, 5n + C]`` or darknet's flat ``[B, S * S * (5n + C)]``; of RetinaNet, SSD and FCOS the pair, or
            triple, of class logits, boxes and centreness.
        criterion: the loss the predictions are trained with; what it needs to know of them it has.
        image_size: (height, width) in pixels, or one side of a square: what the boxes of YOLOv1 are scaled to, relative
            to the image without it; what those of RetinaNet, SSD and FCOS are clipped to, if it is known; elsewhere
            checked against the maps.
        anchors: ``[N, 4]``, x1 y1 x2 y2 in pixels, for RetinaNet, SSD and FCOS.

    Returns:
        Boxes ``[B, N, 4]``, x1 y1 x2 y2 in pixels, and scores ``[B, N, C]``; float64 for float64 predictions, else
        float32. N counts levels, their anchors, rows and columns, the last of them fastest (YOLOv1: rows, columns,
        boxes of a cell; RetinaNet, SSD, FCOS: as ``anchors``). A score is the probability of an object times that of
        the class: sigmoids, or a softmax over classes where the loss is one; of YOLOv1 the confidence times the class
        score, both as they are; of FCOS the root of the sigmoids' product. SSD's background, class 0, scores 0.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    return _decode(criterion, drivers.of(criterion).view(criterion, preds, image_size, anchors))


def select(
    preds: Any,
    criterion: nn.Module,
    conf: float = 0.25,
    iou: float = 0.45,
    max_det: int = 300,
    class_agnostic: bool = False,
    *,
    candidates: int = 16384,
    image_size: int | tuple[int, int] | None = None,
    anchors: Tensor | None = None,
    backend: str = "auto",
) -> Detections:
    """Detections: predictions decoded, scored, thresholded, and thinned out by non-maximum suppression class by class.

    The result is that of ``torchvision.ops.batched_nms`` on boxes and scores decoded in float64: every pair of a
    prediction and a class with a score above ``conf`` is a candidate; the best candidate is kept and suppresses all
    others of its class with an IoU above ``iou``, and so on with those left. Of equal scores the lower (prediction,
    class) comes first. A prediction with a NaN in its box or its score is no candidate. Not differentiable.

    Nothing waits for the device, and the result is the same bits from run to run. Anchor grids on Triton take four
    launches, a fill and a sort; class scores are read only where the objectness alone exceeds ``conf``; memory grows
    with ``candidates``. YOLOv1, RetinaNet, SSD and FCOS are decoded in eager PyTorch.

    Args:
        preds: as in :func:`decode`.
        criterion: the loss the predictions are trained with.
        conf: scores of detections lie above it; in [0, 1].
        iou: overlap above which the lower score of two boxes is dropped; in [0, 1].
        max_det: most detections of an image; the best ones.
        class_agnostic: boxes suppress those of all classes.
        candidates: most candidates of an image that compete. Where there are more, the best ones do; scores are then
            told apart to 1 part in 128 only, equals by (prediction, class).
        image_size: as in :func:`decode`.
        anchors: as in :func:`decode`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: names the argument, what came and what was wanted.
    """
    conf, iou = checks.number("conf", conf, 0, 1), checks.number("iou", iou, 0, 1)
    max_det, candidates = checks.count("max_det", max_det), checks.count("candidates", candidates)
    class_agnostic = checks.flag("class_agnostic", class_agnostic)
    driver = drivers.of(criterion)
    seen = driver.view(criterion, preds, image_size, anchors)
    seen = seen._replace(preds=[pred.detach() for pred in seen.preds])
    backend = backends.resolve(backend, seen.preds[0].device)
    settings = conf, iou, max_det, class_agnostic, candidates
    if backend == "triton" and driver.scans:
        head: Any = criterion.head
        return Detections(*select_maps(checks.of_one_type(seen.preds), head.key, *settings))
    dtype = wide(seen.preds[0].dtype)
    exact = _decode(criterion, seen._replace(preds=[pred.double() for pred in seen.preds]))
    boxes, scores, labels, count = select_decoded(*exact, *settings, backend)
    return Detections(boxes.to(dtype), scores.to(dtype), labels, count)


# Operators, so that torch.compile need not trace what launches kernels, nor the hundreds of steps of the eager NMS.


@operator
def select_decoded(
    boxes: Tensor,
    scores: Tensor,
    conf: float,
    iou: float,
    max_det: int,
    class_agnostic: bool,
    candidates: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :class:`Detections` holds, of boxes [B, N, 4] and scores [B, N, C] of any detector, both float64.

    ``backend`` is ``"triton"`` or ``"torch"``.
    """
    found, near, index = reference.candidates(boxes, scores, conf, candidates)
    if backend == "torch":
        return reference.nms(found, near, index % scores.shape[2], iou, max_det, class_agnostic)
    from .ops import run_all
    from .ops import select as ops

    outputs = _outputs(boxes, max_det)
    order = torch.arange(found.shape[1], device=found.device).expand_as(found).contiguous()
    slots = ops.Candidates(found, near, index.to(torch.int32))
    run_all([ops.nms_launch(slots, order, outputs, scores.shape[2], iou, class_agnostic)], found.device)
    return outputs


@fake(select_decoded)
def _(boxes, scores, conf, iou, max_det, class_agnostic, candidates, backend):
    return _outputs(boxes, max_det)


@operator
def select_maps(
    preds: list[Tensor], key: str, conf: float, iou: float, max_det: int, class_agnostic: bool, candidates: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :class:`Detections` holds, of the maps of an anchor grid, ``key`` its row, on Triton."""
    from .ops import run_all
    from .ops import select as ops

    head = head_from_key(key)
    outputs = _outputs(preds[0], max_det)
    found, order = ops.scan(preds, head, conf, candidates)
    nms = ops.nms_launch(found, order, outputs, head.num_classes, iou, class_agnostic)
    run_all([nms], order.device)
    return outputs


@fake(select_maps)
def _(preds, key, conf, iou, max_det, class_agnostic, candidates):
    return _outputs(preds[0], max_det)


def _outputs(like: Tensor, max_det: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Memory for what :class:`Detections` holds."""
    batch, dtype = like.shape[0], wide(like.dtype)
    return (
        like.new_empty((batch, max_det, 4), dtype=dtype),
        like.new_empty((batch, max_det), dtype=dtype),
        like.new_empty((batch, max_det), dtype=torch.int64),
        like.new_empty(batch, dtype=torch.int32),
    )


def _decode(criterion: Any, seen: Predictions) -> tuple[Tensor, Tensor]:
    """Boxes and scores in float64 for float64 predictions, else in float32."""
    preds = [pred.to(wide(pred.dtype)) for pred in seen.preds]
    return drivers.of(criterion).decode(criterion.head, seen._replace(preds=preds))
