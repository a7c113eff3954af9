"""Loss functions with the names, arguments and numbers of ``torchvision.ops``, each one kernel.

float16 and bfloat16 inputs are computed in float32, and the loss is float32 (torchvision does so for boxes).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .backend import resolve
from .heads import IOU_KINDS

REDUCTIONS = ("none", "mean", "sum")


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Focal loss of logits (Lin et al. 2017, arXiv 1708.02002, eq. 5, here for targets between 0 and 1 too).

    ``BCE * (1 - p_t)^gamma * (alpha * t + (1 - alpha) * (1 - t))`` with ``p_t = p * t + (1 - p) * (1 - t)``.

    Args:
        inputs: logits, of any shape.
        targets: of the same shape, in [0, 1]. If they need a gradient, the reference computes it all.
        alpha: weight of the positives in [0, 1], or -1 for no weights.
        gamma: exponent of the modulating factor.
        reduction: ``"none"``, ``"mean"`` (NaN if there is nothing, as in torchvision) or ``"sum"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: another shape, device, ``alpha`` or ``reduction``.
    """
    checks.pair("inputs", inputs, "targets", targets)
    if inputs.shape != targets.shape:
        checks.fail("targets", f"shape {tuple(targets.shape)}", f"{tuple(inputs.shape)} as inputs")
    if not (0 <= alpha <= 1) and alpha != -1:
        checks.fail("alpha", alpha, "a number in [0, 1], or -1 for none")
    gamma = checks.number("gamma", gamma, 0)
    checks.one_of("reduction", reduction, REDUCTIONS)
    args = [float(alpha), gamma]
    fused = resolve(backend, inputs.device) == "triton" and not targets.requires_grad and inputs.numel() > 0
    inputs, targets = _together(inputs, targets)
    if fused:
        from . import ops

        return ops.label_loss(inputs, targets, "focal", args, reduction)
    return _reduce(reference.LABEL_TERMS["focal"](_wide(inputs), _wide(targets), args), reduction)


def generalized_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7, backend: str = "auto"
) -> Tensor:
    """GIoU loss of paired boxes (Rezatofighi et al. 2019, arXiv 1902.09630): ``1 - IoU + (C - union) / C``.

    Args:
        boxes1: x1, y1, x2, y2, ``[..., 4]``.
        boxes2: the same, of a shape that broadcasts with it.
        reduction: ``"none"`` (``[...]``), ``"mean"`` (0 if there are no boxes) or ``"sum"``.
        eps: added to both denominators.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: another shape or device, or an unknown ``reduction``.
    """
    return _box_loss(boxes1, boxes2, "giou", (eps, eps), reduction, backend)


def distance_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7, backend: str = "auto"
) -> Tensor:
    """DIoU loss of paired boxes (Zheng et al. 2019, arXiv 1911.08287): ``1 - IoU + d^2 / c^2``.

    Arguments and errors are those of :func:`generalized_box_iou_loss`.
    """
    return _box_loss(boxes1, boxes2, "diou", (eps, eps), reduction, backend)


def complete_box_iou_loss(
    boxes1: Tensor, boxes2: Tensor, reduction: str = "none", eps: float = 1e-7, backend: str = "auto"
) -> Tensor:
    """CIoU loss of paired boxes (Zheng et al. 2019, arXiv 1911.08287): the DIoU loss and ``alpha * v``, alpha constant.

    As in torchvision, ``eps`` acts in alpha only; the other denominators take 1e-7. Arguments and errors are those of
    :func:`generalized_box_iou_loss`.
    """
    return _box_loss(boxes1, boxes2, "ciou", (1e-7, eps), reduction, backend)


def box_iou_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str = "ciou",
    reduction: str = "none",
    eps: float = 1e-7,
    backend: str = "auto",
) -> Tensor:
    """The IoU loss called ``kind``: ``"iou"``, ``"giou"``, ``"diou"`` or ``"ciou"``, with ``eps`` in every denominator.

    Arguments and errors are otherwise those of :func:`generalized_box_iou_loss`.
    """
    checks.one_of("kind", kind, IOU_KINDS)
    return _box_loss(boxes1, boxes2, kind, (eps, eps), reduction, backend)


def _box_loss(
    boxes1: Tensor, boxes2: Tensor, kind: str, args: tuple[float, float], reduction: str, backend: str
) -> Tensor:
    checks.pair("boxes1", boxes1, "boxes2", boxes2)
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.dim() < 1 or boxes.shape[-1] != 4:
            checks.fail(name, f"shape {tuple(boxes.shape)}", "(..., 4)")
    for eps in args:
        checks.number("eps", eps, 0)
    checks.one_of("reduction", reduction, REDUCTIONS)
    if boxes1.shape != boxes2.shape:
        try:
            boxes1, boxes2 = torch.broadcast_tensors(boxes1, boxes2)
        except RuntimeError:
            checks.fail(
                "boxes2", f"shape {tuple(boxes2.shape)}", f"one that broadcasts with {tuple(boxes1.shape)} of boxes1"
            )
    fused = resolve(backend, boxes1.device) == "triton"
    boxes1, boxes2 = _together(boxes1, boxes2)
    if fused:
        from . import ops

        return ops.box_loss(boxes1, boxes2, kind, list(args), reduction)
    loss = reference.BOX_TERMS[kind](_wide(boxes1), _wide(boxes2), args)
    if reduction == "mean" and not loss.numel():
        return 0.0 * loss.sum()
    return _reduce(loss, reduction)


def _together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Floating tensors, both float64 if one is; a kernel reads float16 and bfloat16 as they are."""
    a = a if a.is_floating_point() else a.float()
    b = b if b.is_floating_point() else b.float()
    if torch.float64 in (a.dtype, b.dtype):
        return a.double(), b.double()
    return a, b


def _wide(value: Tensor) -> Tensor:
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.mean() if reduction == "mean" else loss.sum()
