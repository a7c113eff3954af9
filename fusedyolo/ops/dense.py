"""Losses over anchors that each predict a box and the logits of all classes: operators, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from ..heads import DenseHead, dense_head_from_key
from ..operator import call, differentiable, fake, operator
from .dense_plan import Geometry, grad_plan, plan, words_of
from .launch import (
    COUNTERS,
    Launch,
    accumulator,
    counters_and_maxima,
    layouts,
    refuse_double_backward,
)
from .steps import Steps


class DenseOutputs(NamedTuple):
    """What the launches of a loss leave; the last ones are empty where no gradient is asked for, or none left yet."""

    total: Tensor  # 0-dim, or [B] of each image
    cls: Tensor  # likewise
    box: Tensor  # likewise
    centre: Tensor  # likewise, of no meaning without centreness
    counts: Tensor  # int32 [2]: anchors with a row, invalid rows
    match: Tensor  # int32 [B, N], by position, see kernels.dense.blocks.Matched
    found: Tensor  # int32 [B + 1]: anchors with a row, of each image; and what sums over the batch are divided by
    ce: Tensor  # [B, N] cross-entropies, of a ranked head; of one that weighs boxes [1, 1], the sum of their weights
    picks: Tensor  # int64 [B, 4], of a ranked head
    grads: list[Tensor]  # as the predictions


def _loss_steps(
    preds: Sequence[Tensor],
    anchors: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    head: DenseHead,
    geometry: Geometry,
    outputs: DenseOutputs,
    workspace: Tensor | None = None,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Steps, dict[str, Any]]:
    """The plan of a loss, and of its gradient where ``outputs`` has room for that, and what a call brings to it;
    ``weights`` are those of the rows.
    """
    (batch, N), M = outputs.match.shape, rows.shape[0]
    steps = plan(head.key, layouts(preds), geometry, N, bool(outputs.grads), words_of(head, M))
    done, maxima = counters_and_maxima(rows.device, M, workspace, COUNTERS + batch + 1)
    # a counter for each image and one more, behind two others: of a workspace, which these come last in, a maximum
    tally = done if workspace is None else workspace[COUNTERS + M - 1 :].view(torch.int32)
    given = {"preds": preds, "anchors": anchors, "rows": rows, "offsets": offsets, "done": done, "maxima": maxima}
    return steps, given | {"tally": tally, "class_weights": class_weights, "weights": weights} | outputs._asdict()


def loss_launches(
    preds: Sequence[Tensor],
    anchors: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    head: DenseHead,
    geometry: Geometry,
    outputs: DenseOutputs,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> list[Launch]:
    """All launches of a loss, and of its gradient where ``outputs`` has room for that."""
    plan, given = _loss_steps(preds, anchors, rows, offsets, head, geometry, outputs, None, class_weights, weights)
    return plan.launches(rows.device, rows.shape[0], **given)


def _grad_steps(
    preds: Sequence[Tensor],
    saved: Sequence[Tensor],
    head: DenseHead,
    geometry: Geometry,
    grads: Sequence[Tensor],
    grad_outs: Sequence[Tensor | None],
    skip_one: bool,
    class_weights: Tensor | None,
    weights: Tensor | None,
) -> tuple[Steps, dict[str, Any]]:
    """The plan of a gradient, see :func:`grad_launch`, and what a call brings to it."""
    names = ("anchors", "rows", "match", "found", "ce", "picks")
    given: dict[str, Any] = dict(zip(names, saved, strict=True))
    given |= {"preds": preds, "grads": grads, "grad_outs": grad_outs}
    given |= {"class_weights": class_weights, "weights": weights}
    return grad_plan(head.key, layouts(preds), geometry, saved[0].shape[0], skip_one), given


def grad_launch(
    preds: Sequence[Tensor],
    saved: Sequence[Tensor],
    head: DenseHead,
    geometry: Geometry,
    grads: Sequence[Tensor],
    grad_outs: Sequence[Tensor | None],
    skip_one: bool = False,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> Launch:
    """The launch of the gradient alone, times ``grad_outs``, of the total and of the parts; if ``skip_one`` it is left
    as it is where that is 1. ``grads`` lie as ``torch.empty_like`` has them, ``saved`` is as :func:`dense_loss_grad`
    takes it.
    """
    plan, given = _grad_steps(preds, saved, head, geometry, grads, grad_outs, skip_one, class_weights, weights)
    return plan.launches(saved[1].device, saved[1].shape[0], **given)[0]


def dense_outputs(preds: Sequence[Tensor], anchors: Tensor, head: DenseHead, with_grad: bool) -> DenseOutputs:
    """Memory for what a loss leaves."""
    pred, N = preds[0], anchors.shape[0]
    batch, acc = pred.shape[0], accumulator(pred.dtype)[1]
    ranked = batch if head.negatives else 0
    ce = (batch, N) if head.negatives else (1, 1) if head.box_weight else (0, N)
    shape = (batch,) if head.by_image else ()
    total, cls, box, centre = (pred.new_empty(shape, dtype=acc) for _ in range(4))
    return DenseOutputs(
        total,
        cls,
        box,
        centre,
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty((batch, N), dtype=torch.int32),
        pred.new_empty(batch + 1, dtype=torch.int32),
        pred.new_empty(ce, dtype=acc),
        pred.new_empty((ranked, 4), dtype=torch.int64),
        [torch.empty_like(p) for p in preds] if with_grad and not ranked else [],
    )


@operator
def dense_loss(
    preds: list[Tensor],
    anchors: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    key: str,
    size: Sequence[Number],
    corners: bool,
    ends: list[int],
    with_grad: bool,
    workspace: Tensor | None = None,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss of a dense head; returns :class:`DenseOutputs`.

    ``preds`` are class logits, boxes and centreness, each a tensor a level; ``size``, ``corners`` and ``ends`` what
    :class:`Geometry` says. The gradients, if asked for and not ranked, are those of the total; the first backward
    takes them. A compiled graph brings its ``workspace``, with a place for each row, each image and one more.
    ``weights`` are those of the rows.
    """
    head = dense_head_from_key(key)
    geometry = Geometry((size[0], size[1]), corners, (ends[0], ends[1]))
    outputs = dense_outputs(preds, anchors, head, with_grad)
    own = class_weights, weights
    plan, given = _loss_steps(preds, anchors, rows, offsets, head, geometry, outputs, workspace, *own)
    plan.run(rows.device, rows.shape[0], **given)
    return tuple(outputs)  # type: ignore[return-value]


@fake(dense_loss)
def _(
    preds, anchors, rows, offsets, key, size, corners, ends, with_grad, workspace=None, class_weights=None, weights=None
):
    return tuple(dense_outputs(preds, anchors, dense_head_from_key(key), with_grad))


def _gradient(
    grads: list[Tensor],
    grad_outs: list[Tensor | None],
    preds: list[Tensor],
    saved: Sequence[Tensor],
    key: str,
    geometry: tuple[Sequence[Number], bool, list[int]],
    skip_one: bool,
    class_weights: Tensor | None,
    weights: Tensor | None,
) -> None:
    size, corners, ends = geometry
    head, at = dense_head_from_key(key), Geometry((size[0], size[1]), corners, (ends[0], ends[1]))
    plan, given = _grad_steps(preds, saved, head, at, grads, grad_outs, skip_one, class_weights, weights)
    plan.run(saved[1].device, saved[1].shape[0], **given)


@operator
def dense_loss_grad(
    grad_total: Tensor | None,
    grad_cls: Tensor | None,
    grad_box: Tensor | None,
    grad_centre: Tensor | None,
    preds: list[Tensor],
    saved: list[Tensor],
    key: str,
    size: Sequence[Number],
    corners: bool,
    ends: list[int],
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Gradient of :func:`dense_loss`'s total and parts by every prediction, times those given (0-dim), in one launch.

    ``saved`` are the anchors, the rows and, of :class:`DenseOutputs`, ``match``, ``found``, ``ce`` and ``picks``.
    """
    grads = [torch.empty_like(pred) for pred in preds]
    grad_outs = [grad_total, grad_cls, grad_box, grad_centre]
    _gradient(grads, grad_outs, preds, saved, key, (size, corners, ends), False, class_weights, weights)
    return grads


@fake(dense_loss_grad)
def _(grad_total, grad_cls, grad_box, grad_centre, preds, *others, **options):
    return [torch.empty_like(pred) for pred in preds]


@partial(operator, mutates=("grads",))
def dense_loss_rescale(
    grads: list[Tensor],
    grad_total: Tensor | None,
    grad_cls: Tensor | None,
    grad_box: Tensor | None,
    grad_centre: Tensor | None,
    preds: list[Tensor],
    saved: list[Tensor],
    key: str,
    size: Sequence[Number],
    corners: bool,
    ends: list[int],
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Turns ``grads``, the gradients for a total multiplied by 1, into those of :func:`dense_loss_grad`: a launch whose
    programs are over at once where nothing changes, which only the device knows.
    """
    grad_outs = [grad_total, grad_cls, grad_box, grad_centre]
    _gradient(grads, grad_outs, preds, saved, key, (size, corners, ends), True, class_weights, weights)


@fake(dense_loss_rescale)
def _(*arguments, **options):
    return None


def _save(ctx, inputs, output):
    preds, anchors, rows, _offsets, *ctx.settings, _with_grad, _workspace, class_weights, weights = inputs
    outputs = DenseOutputs(*output)
    ctx.set_materialize_grads(False)
    kept = anchors, rows, outputs.match, outputs.found, outputs.ce, outputs.picks
    ctx.save_for_backward(*kept, class_weights, weights, *preds)
    # Not among the saved tensors, which must not change: the first backward changes them and gives them away. Tensors
    # of another type belong to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grads if outputs.grads and type(outputs.grads[0]) is Tensor else None


def _backward(ctx, grad_total, grad_cls=None, grad_box=None, grad_centre=None):
    anchors, rows, match, found, ce, picks, class_weights, weights, *preds = ctx.saved_tensors
    saved = [anchors, rows, match, found, ce, picks]
    grad_outs = (grad_total, grad_cls, grad_box, grad_centre)
    if all([grad is None for grad in grad_outs]):
        return [None] * len(preds)
    if any([grad is not None and grad.dim() > 0 for grad in grad_outs]):  # that of a sum is one number many times
        grad_outs = tuple([None if grad is None else grad.contiguous() for grad in grad_outs])
    grads, ctx.stored = ctx.stored, None
    if grads is None or torch.is_grad_enabled():  # with create_graph, they are to know that they have none themselves
        grads = call(dense_loss_grad, *grad_outs, preds, saved, *ctx.settings, class_weights, weights)
    else:
        call(dense_loss_rescale, grads, *grad_outs, preds, saved, *ctx.settings, class_weights, weights)
    return list(grads)


differentiable(dense_loss, _backward, _save, outputs=4)
differentiable(dense_loss_grad, refuse_double_backward(dense_loss_grad))
