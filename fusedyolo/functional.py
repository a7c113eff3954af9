"""Loss functions on plain tensors, each one kernel: those of ``torchvision.ops``, with its numbers, and their kin.

float16 and bfloat16 inputs are computed in float32, and the loss is float32 (torchvision does so for boxes).
"""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from . import checks, reference
from .backend import resolve
from .terms import find_term

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
    return _label_loss(inputs, targets, "focal", alpha, gamma, reduction, backend)


def quality_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    alpha: float = -1.0,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Quality focal loss of logits (Li et al. 2020, arXiv 2006.04388): ``BCE * |t - p|^gamma``, p the sigmoid.

    ``targets`` are qualities, such as the IoU of a prediction with its object, and 0 elsewhere. With an ``alpha`` there
    is :func:`sigmoid_focal_loss`'s factor of it. The gradient goes through the modulating factor too, whose slope is
    taken for 0 where ``p = t``; next to it, with ``gamma`` below 1, it is finite but large. Arguments and errors are
    otherwise those of :func:`sigmoid_focal_loss`.
    """
    return _label_loss(inputs, targets, "qfl", alpha, gamma, reduction, backend)


def varifocal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.75,
    gamma: float = 2.0,
    reduction: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Varifocal loss of logits (Zhang et al. 2021, arXiv 2008.13367): ``t * BCE`` where the target t is above 0,
    ``alpha * p^gamma * BCE`` where it is 0, p the sigmoid.

    ``alpha`` is any weight of the negatives, or -1 for none. The gradient goes through ``p^gamma`` too. Arguments and
    errors are otherwise those of :func:`sigmoid_focal_loss`.
    """
    return _label_loss(inputs, targets, "varifocal", alpha, gamma, reduction, backend)


def _label_loss(
    inputs: Tensor, targets: Tensor, kind: str, alpha: float, gamma: float, reduction: str, backend: str
) -> Tensor:
    checks.pair("inputs", inputs, "targets", targets)
    if inputs.shape != targets.shape:
        checks.fail("targets", f"shape {tuple(targets.shape)}", f"{tuple(inputs.shape)} as inputs")
    high, want = (math.inf, "a finite number >= 0") if kind == "varifocal" else (1, "a number in [0, 1]")
    if not isinstance(alpha, Real) or (not (0 <= alpha <= high and alpha < math.inf) and alpha != -1):
        checks.fail("alpha", checks.describe(alpha), f"{want}, or -1 for none")
    gamma = checks.number("gamma", gamma, 0)
    checks.one_of("reduction", reduction, REDUCTIONS)
    args = [float(alpha), gamma]
    fused = resolve(backend, inputs.device) == "triton" and not targets.requires_grad and inputs.numel() > 0
    inputs, targets = _together(inputs, targets)
    if fused:
        from . import ops

        own = None if reduction == "none" else ops.workspace(inputs.device)
        return ops.label_loss(inputs, targets, kind, args, reduction, own)
    return _reduce(reference.LABEL_TERMS[kind](_wide(inputs), _wide(targets), args), reduction)


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
    *,
    alpha: float = 1.0,
    gamma: float = 0.0,
    image_size: int | tuple[int, int] | None = None,
) -> Tensor:
    """The IoU loss called ``kind``, with ``eps`` in every denominator.

    Args:
        boxes1: x1, y1, x2, y2, ``[..., 4]``.
        boxes2: the same, of a shape that broadcasts with it.
        kind: ``"iou"``, ``"giou"``, ``"ciou"``, ...: an IoU term for users of the table in ``fusedyolo.terms``, which
            says where each is from.
        reduction: ``"none"`` (``[...]``), ``"mean"`` (0 if there are no boxes) or ``"sum"``.
        eps: added to every denominator that is an area or a squared length of boxes, and to CIoU's alpha's.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        alpha: power of the IoU and of each penalty, above 0 (alpha-IoU, He et al. 2021, arXiv 2110.13675).
        gamma: the loss is multiplied by ``IoU^gamma``, held constant (the focal factor of Focal-EIoU).
        image_size: (height, width) of the image in the unit of the boxes, or one number for both; for a term that needs
            its extent, as ``"mpdiou"``, which divides by its diagonal. The other kinds do not read it.

    Raises:
        ValueError: another shape or device, an unknown ``kind`` or ``reduction``, a number out of range, or no
            ``image_size`` for a term that needs it.
    """
    needs_extent = find_term("kind", kind, "iou", users=True).needs_extent
    alpha = checks.number("alpha", alpha, 0, open_low=True)
    gamma = checks.number("gamma", gamma, 0)
    extent = None
    if needs_extent or image_size is not None:
        height, width = checks.size("image_size", image_size)
        extent = [float(width), float(height)]
    args = (eps, eps) if alpha == 1 and gamma == 0 else (eps, eps, alpha, gamma)
    return _box_loss(boxes1, boxes2, kind, args, reduction, backend, extent if needs_extent else None)


def _box_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    args: tuple[float, ...],
    reduction: str,
    backend: str,
    extent: list[float] | None = None,
) -> Tensor:
    checks.pair("boxes1", boxes1, "boxes2", boxes2)
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.dim() < 1 or boxes.shape[-1] != 4:
            checks.fail(name, f"shape {tuple(boxes.shape)}", "(..., 4)")
    for eps in args[:2]:
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

        own = None if reduction == "none" else ops.workspace(boxes1.device)
        return ops.box_loss(boxes1, boxes2, kind, list(args), reduction, extent, own)
    boxes1, boxes2 = _wide(boxes1), _wide(boxes2)
    sides = None if extent is None else reference.constants(extent, boxes1)
    loss = reference.BOX_TERMS[kind](boxes1, boxes2, args, sides)
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
