"""Operators of ``fusedyolo.functional``: one label or box term, its gradient, and their launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels import pointwise
from ..kernels.launch import POINTWISE_BLOCK, POINTWISE_THREADS
from ..terms import find_term
from .launch import Launch, accumulator, done_counter, float_parts, refuse_double_backward, run_all


def _pointwise(
    kernel: Any,
    inputs: tuple[Tensor, Tensor],
    n: int,
    term: dict[str, Any],
    args: list[float],
    reduction: str,
    loss: Tensor | None,
    grad_out: Tensor | None,
    grads: tuple[Tensor, ...],
    workspace: Tensor | None = None,
) -> Launch:
    """A launch of a pointwise driver over ``n`` items: the loss with ``loss``, the gradient with ``grads``."""
    programs = -(-n // POINTWISE_BLOCK)
    tl_acc, acc = accumulator(inputs[0].dtype)
    reduce = reduction != "none"
    reduce_forward = reduce and loss is not None
    arguments = {
        **dict(zip(_POINTWISE_NAMES[kernel], (*inputs, *(grads or (None, None))), strict=False)),
        "n": n,
        "args": tuple(args),
        "scale": float_parts(1.0 / n if reduction == "mean" else 1.0),
        "loss_ptr": loss,
        "partial_ptr": inputs[0].new_empty(programs, dtype=acc) if reduce_forward else None,
        "done_ptr": done_counter(inputs[0].device, workspace) if reduce_forward else None,
        "grad_out_ptr": grad_out,
        "REDUCE": reduce,
        "WITH_GRAD": loss is None,
        "ACC": tl_acc,
        "BLOCK": POINTWISE_BLOCK,
        **term,
    }
    return Launch(kernel, (programs,), arguments, _THREADS[kernel])


_POINTWISE_NAMES = {
    pointwise.label_kernel: ("x_ptr", "t_ptr", "dx_ptr"),
    pointwise.box_kernel: ("p_ptr", "g_ptr", "dp_ptr", "dg_ptr"),
}


# two boxes a thread: with four, the gradient of the longest terms by both boxes leaves the registers
_THREADS = {pointwise.label_kernel: POINTWISE_THREADS, pointwise.box_kernel: POINTWISE_BLOCK // 2}


def _pointwise_loss(
    kernel: Any, a: Tensor, b: Tensor, shape, term: dict[str, Any], args, reduction: str, workspace: Tensor | None
) -> Tensor:
    loss = a.new_empty(shape if reduction == "none" else (), dtype=accumulator(a.dtype)[1])
    n = math.prod(shape)
    if n == 0:
        return loss.zero_()
    inputs = (a.contiguous(), b.contiguous())
    run_all([_pointwise(kernel, inputs, n, term, args, reduction, loss, None, (), workspace)], a.device)
    return loss


def _pointwise_grad(kernel: Any, grad_out: Tensor, a: Tensor, b: Tensor, n: int, term, args, reduction, grads) -> None:
    if n > 0:
        inputs = (a.contiguous(), b.contiguous())
        launch = _pointwise(kernel, inputs, n, term, args, reduction, None, grad_out.contiguous(), grads)
        run_all([launch], a.device)


def _label(kind: str) -> dict[str, Any]:
    term = find_term("kind", kind, "class", "objectness")
    if not term.elementwise:
        checks.fail("kind", repr(kind), "a label term that is elementwise")
    return {"LABEL": term.kernel}


@torch.library.custom_op("fusedyolo::label_loss", mutates_args=())
def label_loss(
    inputs: Tensor,
    targets: Tensor,
    kind: str,
    args: list[float],
    reduction: str,
    workspace: Tensor | None = None,
) -> Tensor:
    """An elementwise label term of ``inputs`` (logits) against ``targets`` of the same shape.

    float64 for float64, else float32. A compiled graph brings its ``workspace``.
    """
    term = _label(kind)
    return _pointwise_loss(pointwise.label_kernel, inputs, targets, inputs.shape, term, args, reduction, workspace)


@label_loss.register_fake
def _(inputs, targets, kind, args, reduction, workspace=None):
    return inputs.new_empty(inputs.shape if reduction == "none" else (), dtype=accumulator(inputs.dtype)[1])


@torch.library.custom_op("fusedyolo::label_loss_grad", mutates_args=())
def label_loss_grad(
    grad_out: Tensor, inputs: Tensor, targets: Tensor, kind: str, args: list[float], reduction: str
) -> Tensor:
    """Gradient of :func:`label_loss` by ``inputs``."""
    grad = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    _pointwise_grad(
        pointwise.label_kernel, grad_out, inputs, targets, inputs.numel(), _label(kind), args, reduction, (grad,)
    )
    return grad


@label_loss_grad.register_fake
def _(grad_out, inputs, targets, kind, args, reduction):
    return torch.empty_like(inputs, memory_format=torch.contiguous_format)


def _box(kind: str, extent: list[float] | None) -> dict[str, Any]:
    return {"BOX": find_term("kind", kind, "iou").kernel, "extent": (None, None) if extent is None else tuple(extent)}


@torch.library.custom_op("fusedyolo::box_loss", mutates_args=())
def box_loss(
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    args: list[float],
    reduction: str,
    extent: list[float] | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """A box term of pairs of boxes ``[..., 4]`` (xyxy); float64 for float64, else float32.

    ``extent`` is the width and height of the image, for a term that needs them. A compiled graph brings its
    ``workspace``.
    """
    shape, term = boxes1.shape[:-1], _box(kind, extent)
    return _pointwise_loss(pointwise.box_kernel, boxes1, boxes2, shape, term, args, reduction, workspace)


@box_loss.register_fake
def _(boxes1, boxes2, kind, args, reduction, extent=None, workspace=None):
    return boxes1.new_empty(boxes1.shape[:-1] if reduction == "none" else (), dtype=accumulator(boxes1.dtype)[1])


@torch.library.custom_op("fusedyolo::box_loss_grad", mutates_args=())
def box_loss_grad(
    grad_out: Tensor,
    boxes1: Tensor,
    boxes2: Tensor,
    kind: str,
    args: list[float],
    reduction: str,
    extent: list[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of :func:`box_loss` by both sets of boxes."""
    grads = (
        torch.empty_like(boxes1, memory_format=torch.contiguous_format),
        torch.empty_like(boxes2, memory_format=torch.contiguous_format),
    )
    n = boxes1.numel() // 4
    _pointwise_grad(pointwise.box_kernel, grad_out, boxes1, boxes2, n, _box(kind, extent), args, reduction, grads)
    return grads


@box_loss_grad.register_fake
def _(grad_out, boxes1, boxes2, kind, args, reduction, extent=None):
    return (
        torch.empty_like(boxes1, memory_format=torch.contiguous_format),
        torch.empty_like(boxes2, memory_format=torch.contiguous_format),
    )


def _save_pair(ctx, inputs, output):
    a, b, ctx.kind, ctx.args, ctx.reduction, *ctx.extent, _workspace = inputs
    ctx.save_for_backward(a, b)


def _label_backward(ctx, grad_out):
    grad = label_loss_grad(grad_out, *ctx.saved_tensors, ctx.kind, ctx.args, ctx.reduction)
    return grad, None, None, None, None, None


def _box_backward(ctx, grad_out):
    grads = box_loss_grad(grad_out, *ctx.saved_tensors, ctx.kind, ctx.args, ctx.reduction, *ctx.extent)
    return *grads, None, None, None, None, None


label_loss.register_autograd(_label_backward, setup_context=_save_pair)
box_loss.register_autograd(_box_backward, setup_context=_save_pair)
for _op in (label_loss_grad, box_loss_grad):
    _op.register_autograd(refuse_double_backward(_op._qualname))
