"""Operators of ``fusedyolo.functional``: one label or box term, its gradient, and their launches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..kernels import pointwise
from ..kernels.launch import POINTWISE_BLOCK, POINTWISE_THREADS
from ..operator import call, differentiable, fake, operator
from ..terms import find_term
from .launch import Launch, accumulator, done_counter, float_parts, refuse_double_backward, run_all

# two boxes a thread: with four, the gradient of the longest terms by both boxes leaves the registers
_THREADS = {pointwise.label_kernel: POINTWISE_THREADS, pointwise.box_kernel: POINTWISE_BLOCK // 2}


_NO_GRADS = pointwise.Grads(None, None, None)


def _run(
    kernel: Any,
    inputs: tuple[Tensor, Tensor],
    n: int,
    term: pointwise.Term,
    reduction: str,
    *,
    outputs: pointwise.Outputs | None = None,
    grads: pointwise.Grads = _NO_GRADS,
) -> None:
    """Launches a driver over ``n`` items: for the loss with ``outputs``, for the gradient with ``grads``."""
    first, second = inputs
    arguments = dict(zip(kernel.arg_names, (first.contiguous(), second.contiguous(), n), strict=False))
    arguments |= {
        "scale": float_parts(1.0 / n if reduction == "mean" else 1.0),
        "term": term,
        "outputs": outputs,
        "grads": grads,
        "SPEC": pointwise.Spec(reduction != "none", accumulator(first.dtype)[0], POINTWISE_BLOCK),
    }
    run_all([Launch(kernel, (_programs(n),), arguments, _THREADS[kernel])], first.device)


def _programs(n: int) -> int:
    return -(-n // POINTWISE_BLOCK)


def _loss(
    kernel: Any,
    inputs: tuple[Tensor, Tensor],
    shape: tuple[int, ...],
    term: pointwise.Term,
    reduction: str,
    workspace: Tensor | None,
) -> Tensor:
    loss, n = _empty_loss(inputs[0], shape, reduction), math.prod(shape)
    if n == 0:
        return loss.zero_()
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if reduction != "none":
        sums = loss.new_empty(_programs(n)), done_counter(loss.device, workspace)
    _run(kernel, inputs, n, term, reduction, outputs=pointwise.Outputs(loss, *sums))
    return loss


def _empty_loss(like: Tensor, shape: tuple[int, ...], reduction: str) -> Tensor:
    return like.new_empty(shape if reduction == "none" else (), dtype=accumulator(like.dtype)[1])


def _empty_grad(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _label(kind: str, args: list[float]) -> pointwise.Term:
    term = find_term("kind", kind, "class", "objectness")
    if not term.elementwise:
        checks.fail("kind", repr(kind), "a label term that is elementwise")
    return pointwise.Term(term.kernel, term.kernel_args(args), None)


def _box(kind: str, args: list[float], extent: list[float] | None) -> pointwise.Term:
    term = find_term("kind", kind, "iou", "boxes")
    return pointwise.Term(term.kernel, term.kernel_args(args), None if extent is None else tuple(extent))


@operator
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
    pair, term = (inputs, targets), _label(kind, args)
    return _loss(pointwise.label_kernel, pair, inputs.shape, term, reduction, workspace)


@fake(label_loss)
def _(inputs, targets, kind, args, reduction, workspace=None):
    return _empty_loss(inputs, inputs.shape, reduction)


@operator
def label_loss_grad(
    grad_out: Tensor, inputs: Tensor, targets: Tensor, kind: str, args: list[float], reduction: str
) -> Tensor:
    """Gradient of :func:`label_loss` by ``inputs``."""
    grad = _empty_grad(inputs)
    if inputs.numel():
        grads = pointwise.Grads(grad_out.contiguous(), grad, None)
        pair = (inputs, targets)
        _run(pointwise.label_kernel, pair, inputs.numel(), _label(kind, args), reduction, grads=grads)
    return grad


@fake(label_loss_grad)
def _(grad_out, inputs, targets, kind, args, reduction):
    return _empty_grad(inputs)


@operator
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
    pair, term = (boxes1, boxes2), _box(kind, args, extent)
    return _loss(pointwise.box_kernel, pair, boxes1.shape[:-1], term, reduction, workspace)


@fake(box_loss)
def _(boxes1, boxes2, kind, args, reduction, extent=None, workspace=None):
    return _empty_loss(boxes1, boxes1.shape[:-1], reduction)


@operator
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
    found = _empty_grad(boxes1), _empty_grad(boxes2)
    if boxes1.numel():
        grads = pointwise.Grads(grad_out.contiguous(), *found)
        pair, term = (boxes1, boxes2), _box(kind, args, extent)
        _run(pointwise.box_kernel, pair, boxes1.numel() // 4, term, reduction, grads=grads)
    return found


@fake(box_loss_grad)
def _(grad_out, boxes1, boxes2, kind, args, reduction, extent=None):
    return _empty_grad(boxes1), _empty_grad(boxes2)


def _save(ctx, inputs, output):
    first, second, *ctx.others, _workspace = inputs
    ctx.save_for_backward(first, second)


def _label_backward(ctx, grad_out):
    return call(label_loss_grad, grad_out, *ctx.saved_tensors, *ctx.others)


def _box_backward(ctx, grad_out):
    return tuple(call(box_loss_grad, grad_out, *ctx.saved_tensors, *ctx.others))


differentiable(label_loss, _label_backward, _save)
differentiable(box_loss, _box_backward, _save)
for _op in (label_loss_grad, box_loss_grad):
    differentiable(_op, refuse_double_backward(_op))
