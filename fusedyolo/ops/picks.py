"""Losses over cells that predict a box each, of which every object picks a few: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import PickHead, pick_head_from_key
from ..kernels.launch import pick_config, power_of_two
from ..kernels.picks import loss, records
from ..operator import differentiable, fake, operator
from ..terms import TERMS
from .launch import (
    Launch,
    Layout,
    accumulator,
    done_counter,
    layouts,
    planned,
    refuse_double_backward,
    run_all,
)
from .picking import Maps, fill_parts, levels_of, lies_as, parts_of, pick_launches, tuned_for


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Geometry(NamedTuple):
    """What is known of the levels of a call beside its tensors."""

    form: str  # of the predictions
    maps: Maps
    size: tuple[float, float]  # (height, width) of the image


class Assignment(NamedTuple):
    """What the launches before the last one leave for it; the gradient alone needs no nans."""

    row: Tensor  # int32 [B, N]; the number of rows where there is none
    score: Tensor  # [B, N], of no meaning where there is no row
    norm: Tensor  # 0-dim
    nans: Tensor | None  # [2], of boxes and of classes


class PickOutputs(NamedTuple):
    """What the launches of a loss leave; the last one is empty where no gradient is asked for."""

    total: Tensor  # 0-dim
    parts: list[Tensor]  # 0-dim, in the order of the head's
    counts: Tensor  # int32 [2]: predictions with a row, invalid rows
    row: Tensor  # as in Assignment, like the next two
    score: Tensor
    norm: Tensor
    grads: list[Tensor]  # as the predictions


@lru_cache(maxsize=256)
def _head(key: str, width: float, height: float) -> loss.Head:
    """A head as the kernel takes it, for images of this size."""
    head = pick_head_from_key(key)
    box, label = TERMS[head.box], TERMS[head.label]
    return loss.Head(box.kernel, label.kernel, (width, height), head.box_args, label.kernel_args(head.label_args))


class _Plan(NamedTuple):
    """A launch but for its tensors, and where these lie."""

    launch: Launch
    predictions: records.Predictions
    gradient: records.Predictions
    listed: int  # room for cells that have a row


@planned
def _plan(
    key: str,
    preds: tuple[Layout, ...],
    grads: tuple[Layout, ...] | None,
    geometry: Geometry,
    with_loss: bool,
    skip_one: bool,
) -> _Plan:
    """Of the launch of loss and gradient."""
    head, batch = pick_head_from_key(key), preds[0].shape[0]
    form, maps, (height, width) = geometry
    predictions = parts_of(form, preds, key, maps)
    gradient = predictions if grads is None else parts_of(form, grads, key, maps)
    lies = lies_as((predictions, gradient), maps)
    areas = [rows * columns for rows, columns in maps]
    config = pick_config(max(areas), lies, head.num_classes, tuned_for(head, preds[0], maps, lies))
    spec = loss.HeadSpec(
        C=head.num_classes,
        REG_MAX=head.reg_max,
        BINS=power_of_two(head.reg_max),
        DECODE=head.decode,
        OBJECTNESS=head.objectness,
        DISTANCE=head.distance,
        SOFT=head.soft,
        ACC=accumulator(preds[0].dtype)[0],
        LAYOUT=lies,
        WITH_LOSS=with_loss,
        WITH_GRAD=grads is not None,
        SKIP_ONE=skip_one,
        CELLS=config.cells,
        PLANES=config.planes,
        GROUP=config.group,
        LANES=power_of_two(config.group),
        PICKS=config.picks,
    )
    arguments = {
        "levels": levels_of(maps, head),
        "B": batch,
        "task": loss.Task(_head(key, float(width), float(height)), None, None),
        "SPEC": spec,
    }
    tiles = batch * sum(_ceil(area, config.cells) for area in areas)
    grid = (tiles * (1 + _ceil(head.num_classes, config.group)),)
    launch = Launch(loss.pick_loss_kernel, grid, arguments, config.threads, config.max_registers)
    return _Plan(launch, predictions, gradient, (grid[0] if head.objectness else tiles) * config.cells)


def head_launch(
    preds: Sequence[Tensor],
    rows: Tensor,
    class_weights: Tensor | None,
    head: PickHead,
    geometry: Geometry,
    gains: tuple[float, ...],
    assignment: Assignment,
    results: tuple[Tensor, Sequence[Tensor]] | None,
    grads: Sequence[Tensor] | None = None,
    grad_outs: Sequence[Tensor | None] | None = None,
    skip_one: bool = False,
    workspace: Tensor | None = None,
) -> Launch:
    """A launch of what comes after the assignment: the loss where there are ``results``, total and parts, for it; the
    gradient with ``grads``; or both.

    The gradient is multiplied by ``grad_outs``, of the total and of each part; if ``skip_one`` it is left as it is
    where that is 1.
    """
    d_layouts = None if grads is None else layouts(grads)
    plan = _plan(head.key, layouts(preds), d_layouts, geometry, results is not None, skip_one)
    sums = loss.Sums(None, (), None, None)
    if results is not None:
        total, parts = results
        partial = total.new_empty(plan.launch.grid[0] * loss.N_PARTS.value)
        sums = loss.Sums(total, tuple(parts), partial, done_counter(rows.device, workspace))
    return plan.launch.filled(
        {
            "predictions": fill_parts(plan.predictions, preds),
            "gradient": None if grads is None else fill_parts(plan.gradient, grads),
            "M": rows.shape[0],
            "task": plan.launch.arguments["task"]._replace(
                targets=records.Targets(rows, None, class_weights), assigned=loss.Assigned(*assignment)
            ),
            "weights": loss.Weights(
                tuple(gains), (None,) * (1 + len(gains)) if grad_outs is None else tuple(grad_outs)
            ),
            "list_ptr": rows.new_empty(plan.listed, dtype=torch.int32),
            "sums": sums,
        }
    )


def loss_launches(
    preds: Sequence[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    head: PickHead,
    geometry: Geometry,
    gains: tuple[float, ...],
    with_grad: bool,
    workspace: Tensor | None = None,
) -> tuple[list[Launch], PickOutputs]:
    """All launches of a loss, and what they will leave."""
    form, maps, size = geometry
    launches, decoded, settled = pick_launches(preds, form, maps, rows, offsets, head, size, workspace)
    norm = settled.norm_ptr
    total, *parts = [norm.new_empty(()) for _ in range(1 + len(gains))]
    grads = [torch.empty_like(pred) for pred in preds] if with_grad else []
    found = Assignment(decoded.row_ptr, decoded.score_ptr, norm, settled.nans_ptr)
    results = (total, parts)
    last = head_launch(
        preds, rows, class_weights, head, geometry, gains, found, results, grads or None, workspace=workspace
    )
    outputs = PickOutputs(total, parts, settled.counts_ptr, decoded.row_ptr, decoded.score_ptr, norm, grads)
    return [*launches, last], outputs


def _geometry(form: str, maps: Sequence[int], size: Sequence[float]) -> Geometry:
    """Of the arguments of an operator; ``maps`` are heights and widths, one after the other."""
    return Geometry(form, tuple(zip(maps[::2], maps[1::2], strict=True)), (size[0], size[1]))


@operator
def pick_loss(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Tensor | None,
    key: str,
    form: str,
    maps: list[int],
    size: list[float],
    gains: list[float],
    with_grad: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss of cells that objects pick; returns :class:`PickOutputs`.

    ``preds`` and ``form`` are as :func:`fusedyolo.checks.point_predictions` gives them, ``maps`` height and width of
    each level, ``size`` those of the image. The gradients, if asked for, are those of the total; the first backward
    takes them. A compiled graph brings its ``workspace``, see :func:`.picking.workspace_rows`.
    """
    head, geometry = pick_head_from_key(key), _geometry(form, maps, size)
    launches, outputs = loss_launches(
        preds, rows, offsets, class_weights, head, geometry, tuple(gains), with_grad, workspace
    )
    run_all(launches, rows.device)
    return tuple(outputs)  # type: ignore[return-value]


@fake(pick_loss)
def _(preds, rows, offsets, class_weights, key, form, maps, size, gains, with_grad, workspace=None):
    pred, acc = preds[0], accumulator(preds[0].dtype)[1]
    places = (pred.shape[0], sum(height * width for height, width in zip(maps[::2], maps[1::2], strict=True)))
    return (
        pred.new_empty((), dtype=acc),
        [pred.new_empty((), dtype=acc) for _ in pick_head_from_key(key).parts],
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty(places, dtype=torch.int32),
        pred.new_empty(places, dtype=acc),
        pred.new_empty((), dtype=acc),
        [torch.empty_like(pred) for pred in preds] if with_grad else [],
    )


def _gradient(
    grads: list[Tensor],
    grad_outs: Sequence[Tensor | None],
    preds: list[Tensor],
    saved: Sequence[Tensor],
    class_weights: Tensor | None,
    key: str,
    geometry: Geometry,
    gains: Sequence[float],
    skip_one: bool,
) -> None:
    rows, row, score, norm = saved
    head, found = pick_head_from_key(key), Assignment(row, score, norm, None)
    outs = grad_outs[: 1 + len(gains)]
    launch = head_launch(preds, rows, class_weights, head, geometry, tuple(gains), found, None, grads, outs, skip_one)
    run_all([launch], rows.device)


@operator
def pick_loss_grad(
    grad_total: Tensor | None,
    grad_0: Tensor | None,
    grad_1: Tensor | None,
    grad_2: Tensor | None,
    grad_3: Tensor | None,
    preds: list[Tensor],
    saved: list[Tensor],
    class_weights: Tensor | None,
    key: str,
    form: str,
    maps: list[int],
    size: list[float],
    gains: list[float],
) -> list[Tensor]:
    """Gradient of :func:`pick_loss`'s total and parts by every prediction, times those given (0-dim), in one launch.

    ``saved`` are the rows and, of :class:`PickOutputs`, ``row``, ``score`` and ``norm``.
    """
    grads = [torch.empty_like(pred) for pred in preds]
    grad_outs, geometry = (grad_total, grad_0, grad_1, grad_2, grad_3), _geometry(form, maps, size)
    _gradient(grads, grad_outs, preds, saved, class_weights, key, geometry, gains, False)
    return grads


@fake(pick_loss_grad)
def _(grad_total, grad_0, grad_1, grad_2, grad_3, preds, saved, class_weights, key, form, maps, size, gains):
    return [torch.empty_like(pred) for pred in preds]


@partial(operator, mutates=("grads",))
def pick_loss_rescale(
    grads: list[Tensor],
    grad_total: Tensor | None,
    grad_0: Tensor | None,
    grad_1: Tensor | None,
    grad_2: Tensor | None,
    grad_3: Tensor | None,
    preds: list[Tensor],
    saved: list[Tensor],
    class_weights: Tensor | None,
    key: str,
    form: str,
    maps: list[int],
    size: list[float],
    gains: list[float],
) -> None:
    """Turns ``grads``, the gradients for a total multiplied by 1, into those of :func:`pick_loss_grad`: a launch whose
    programs are over at once where nothing changes, which only the device knows.
    """
    grad_outs, geometry = (grad_total, grad_0, grad_1, grad_2, grad_3), _geometry(form, maps, size)
    _gradient(grads, grad_outs, preds, saved, class_weights, key, geometry, gains, True)


@fake(pick_loss_rescale)
def _(grads, grad_total, grad_0, grad_1, grad_2, grad_3, preds, saved, class_weights, key, form, maps, size, gains):
    return None


def _save(ctx, inputs, output):
    preds, rows, _offsets, class_weights, *ctx.settings, _with_grad, _workspace = inputs
    outputs = PickOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs.counts, outputs.row, outputs.score, outputs.norm, *outputs.grads)
    ctx.save_for_backward(rows, outputs.row, outputs.score, outputs.norm, class_weights, *preds)
    # Not among the saved tensors, which must not change: the first backward changes them and gives them away. Tensors
    # of another type belong to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grads if outputs.grads and type(outputs.grads[0]) is Tensor else None


def _backward(ctx, grad_total, grad_parts, *_rest):
    *saved, class_weights = ctx.saved_tensors[:5]
    preds = list(ctx.saved_tensors[5:])
    grad_outs = (grad_total, *grad_parts, *(None,) * (loss.N_PARTS.value - len(grad_parts)))
    if all([grad is None for grad in grad_outs]):
        return [None] * len(preds)
    grads, ctx.stored = ctx.stored, None
    if grads is None or torch.is_grad_enabled():  # with create_graph, they are to know that they have none themselves
        grads = pick_loss_grad(*grad_outs, preds, saved, class_weights, *ctx.settings)
    else:
        pick_loss_rescale(grads, *grad_outs, preds, saved, class_weights, *ctx.settings)
    return list(grads)


differentiable(pick_loss, _backward, _save)
differentiable(pick_loss_grad, refuse_double_backward(pick_loss_grad))
