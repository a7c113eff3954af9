"""Losses over cells that predict a box each, of which every object picks a few: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.types import Number

from ..heads import PickHead, branches_from_key, key_of_branches
from ..kernels.launch import pick_config, power_of_two
from ..kernels.picks import loss, records
from ..operator import call, differentiable, fake, operator
from ..terms import TERMS
from .launch import Launch, Layout, accumulator, alike, done_counter, layouts, planned, refuse_double_backward
from .picking import (
    Maps,
    brought,
    fill_parts,
    in_branches,
    levels_of,
    lies_as,
    parts_of,
    picking,
    share_of,
    shift_for,
    tuned_for,
)
from .steps import Outline, Slot, Steps


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Geometry(NamedTuple):
    """What is known of the levels of a call beside its tensors."""

    form: str  # of the predictions
    maps: Maps
    size: tuple[float, float]  # (height, width) of the image


class Assignment(NamedTuple):
    """What the launches before the last one leave for it, branch by branch; the gradient alone needs no nans."""

    row: Tensor  # int32 [B, N]; the number of rows where there is none
    score: Tensor  # [B, N], of no meaning where there is no row
    norm: Tensor  # [2]: what sums are divided by, and the sum of weights, which that is if it is at least 1
    nans: Tensor | None  # [2], of boxes and of classes


class PickOutputs(NamedTuple):
    """What the launches of a loss leave, but for the total branch by branch; the last one is empty where no gradient is
    asked for.
    """

    total: Tensor  # 0-dim, or [B] of each image
    parts: list[Tensor]  # likewise, in the order of the head's
    counts: Tensor  # int32 [branches * 2]: predictions with a row, invalid rows
    row: Tensor  # as in Assignment, [branches * B, N], like the next one
    score: Tensor
    norm: Tensor  # [branches * 2]
    grads: list[Tensor]  # as the predictions


@lru_cache(maxsize=256)
def _head(key: str, width: float, height: float) -> loss.Head:
    """A head as the kernel takes it, for images of this size."""
    (head, *_) = branches_from_key(key)
    box, label = TERMS[head.box], TERMS[head.label]
    return loss.Head(box.kernel, label.kernel, (width, height), head.box_args, label.kernel_args(head.label_args))


def _head_launch(
    own: Outline,
    key: str,
    preds: tuple[Layout, ...],
    geometry: Geometry,
    assigned: Sequence[loss.Assigned],
    with_loss: bool,
    with_grad: bool,
    skip_one: bool = False,
) -> Launch:
    """What comes after the assignment: the loss, the gradient, or both.

    Calls bring ``preds``, ``rows``, their ``weights``, ``class_weights`` and ``gains``; ``total``, ``parts`` and
    ``done`` for the loss; ``grads`` for the gradient, and ``grad_outs`` for that alone.
    """
    count, batch = len(assigned), preds[0].shape[0]
    head = branches_from_key(key)[0]
    form, maps, (height, width) = geometry
    at = [parts_of(form, each, head.key, maps) for each in in_branches(preds, count)]
    grads_at = [parts_of(form, each, head.key, maps) for each in in_branches(alike(preds), count)] if with_grad else at
    lies = lies_as([*at, *grads_at], maps)
    areas = [rows * columns for rows, columns in maps]
    tuned = tuned_for(head, preds[0], maps, lies)
    config = pick_config(max(areas), lies, head.num_classes, preds[0].dtype.itemsize, tuned)
    triton_acc, acc = accumulator(preds[0].dtype)
    spec = loss.HeadSpec(
        C=head.num_classes,
        REG_MAX=head.reg_max,
        BINS=power_of_two(head.reg_max),
        DECODE=head.decode,
        OBJECTNESS=head.objectness,
        DISTANCE=head.distance,
        SOFT=head.soft,
        BY_IMAGE=head.by_image,
        ACC=triton_acc,
        LAYOUT=lies,
        WITH_LOSS=with_loss,
        WITH_GRAD=with_grad,
        SKIP_ONE=skip_one,
        CELLS=config.cells,
        PLANES=config.planes,
        GROUP=config.group,
        LANES=power_of_two(config.group),
        PICKS=config.picks,
        BOXES=config.boxes(head.reg_max > 1),
    )
    tiles, parts = batch * sum(_ceil(area, config.cells) for area in areas), len(head.parts)
    programs = tiles * (1 + _ceil(head.num_classes, config.group))
    listed = (programs if head.objectness else tiles) * config.cells  # room for cells that have a row
    sums, part_slots = loss.Sums(None, None, None), list[Sequence[Slot]]([()] * count)
    if with_loss:
        partial = own.scratch(acc, (count * programs * loss.N_PARTS.value,))
        sums = loss.Sums(own.tensor("total"), partial, own.tensor("done"))
        part_slots = in_branches(own.tensors("parts", count * parts), count)
    total_out, *part_outs = (None,) * (1 + count * parts) if with_loss else own.tensors("grad_outs", 1 + count * parts)
    class_weights = own.tensors("class_weights", count)
    targets = records.Targets(own.tensor("rows"), None, None, own.tensor("weights"))
    whole = _head(key, float(width), float(height))
    numbers, outs = own.numbers("gains", count * parts), in_branches(part_outs, count)
    filled = [
        in_branches(own.tensors(name, len(preds)), count) for name in ("preds", *(("grads",) if with_grad else ()))
    ]
    branches = [
        loss.Branch(
            fill_parts(at[i], filled[0][i]),
            fill_parts(grads_at[i], filled[1][i]) if with_grad else None,
            loss.Task(whole, targets._replace(weights_ptr=class_weights[i]), assigned[i]),
            loss.Weights(in_branches(numbers, count)[i], (total_out, *outs[i])),
            part_slots[i],
            own.scratch(torch.int32, (listed,)),
        )
        for i in range(count)
    ]
    arguments = {
        "branches": tuple(branches),
        "levels": levels_of(maps, head),
        "M": own.M,
        "B": batch,
        "sums": sums,
        "SPEC": spec,
    }
    return Launch(
        loss.pick_loss_kernel,
        (count * programs,),
        arguments,
        config.threads,
        config.max_registers,
        weights=(*class_weights, targets.row_weights_ptr),
    )


@planned
def _last_plan(
    key: str,
    preds: tuple[Layout, ...],
    geometry: Geometry,
    with_loss: bool,
    with_grad: bool,
    skip_one: bool,
) -> Steps:
    own, count, acc = Outline(), len(branches_from_key(key)), accumulator(preds[0].dtype)[1]
    cells = preds[0].shape[0] * sum(height * width for height, width in geometry.maps)
    assigned = [
        loss.Assigned(
            share_of(own, "row", i, cells, torch.int32),
            share_of(own, "score", i, cells, acc),
            share_of(own, "norm", i, 2, acc),
            share_of(own, "nans", i, 2, acc) if with_loss else None,
        )
        for i in range(count)
    ]
    return own.steps(_head_launch(own, key, preds, geometry, assigned, with_loss, with_grad, skip_one))


@planned
def _plan(key: str, preds: tuple[Layout, ...], geometry: Geometry, with_grad: bool, shift: int) -> Steps:
    """Of all launches of a loss."""
    own = Outline()
    form, maps, size = geometry
    launches, found = picking(own, form, preds, key, maps, size, shift)
    assigned = [
        loss.Assigned(decoded.row_ptr, decoded.score_ptr, settled.norm_ptr, settled.nans_ptr)
        for decoded, settled in found
    ]
    return own.steps(*launches, _head_launch(own, key, preds, geometry, assigned, True, with_grad))


def head_launch(
    preds: Sequence[Tensor],
    rows: Tensor,
    class_weights: Sequence[Tensor],
    heads: Sequence[PickHead],
    geometry: Geometry,
    gains: Sequence[float],
    assignment: Assignment,
    results: tuple[Tensor, Sequence[Tensor]] | None,
    grads: Sequence[Tensor] | None = None,
    grad_outs: Sequence[Tensor | None] | None = None,
    skip_one: bool = False,
    weights: Tensor | None = None,
) -> Launch:
    """A launch of what comes after the assignment, of a head or of the ``heads`` of branches: the loss where there are
    ``results``, total and parts, for it; the gradient with ``grads``; or both.

    ``grads`` lie as ``torch.empty_like`` has them. The gradient is multiplied by ``grad_outs``, of the total and of
    each part; if ``skip_one`` it is left as it is where that is 1.
    """
    given = assignment._asdict() | {"preds": preds, "rows": rows, "gains": gains}
    given["class_weights"] = class_weights or [None] * len(heads)
    given |= {"grads": grads, "grad_outs": grad_outs, "weights": weights}
    if results is not None:
        given |= {"total": results[0], "parts": results[1], "done": done_counter(rows.device)}
    plan = _last_plan(
        key_of_branches(heads), layouts(preds), geometry, results is not None, grads is not None, skip_one
    )
    return plan.launches(rows.device, rows.shape[0], **given)[0]


def _loss_steps(
    preds: Sequence[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Sequence[Tensor],
    key: str,
    geometry: Geometry,
    gains: Sequence[float],
    with_grad: bool,
    workspace: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Steps, dict[str, Any], PickOutputs]:
    """The plan of a loss, what a call brings to it, and what its launches will leave."""
    heads = branches_from_key(key)
    plan = _plan(key, layouts(preds), geometry, with_grad, shift_for(heads[0], rows.shape[0]))
    outputs = _outputs(preds, geometry, heads, with_grad)
    given = brought(preds, rows, offsets, len(heads), workspace, weights) | outputs._asdict()
    given["class_weights"], given["gains"] = class_weights or [None] * len(heads), gains
    return plan, given, outputs


def loss_launches(
    preds: Sequence[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: Sequence[Tensor],
    heads: Sequence[PickHead],
    geometry: Geometry,
    gains: Sequence[float],
    with_grad: bool,
    weights: Tensor | None = None,
) -> tuple[list[Launch], PickOutputs]:
    """All launches of a loss, of a head or of the ``heads`` of branches, and what they will leave."""
    plan, given, outputs = _loss_steps(
        preds, rows, offsets, class_weights, key_of_branches(heads), geometry, gains, with_grad, weights=weights
    )
    return plan.launches(rows.device, rows.shape[0], **given), outputs


def _outputs(preds: Sequence[Tensor], geometry: Geometry, heads: Sequence[PickHead], with_grad: bool) -> PickOutputs:
    """Memory for what a loss leaves."""
    pred, acc, count = preds[0], accumulator(preds[0].dtype)[1], len(heads)
    shape = (pred.shape[0],) if heads[0].by_image else ()
    places = (count * pred.shape[0], sum([height * width for height, width in geometry.maps]))
    return PickOutputs(
        pred.new_empty(shape, dtype=acc),
        [pred.new_empty(shape, dtype=acc) for _ in range(count * len(heads[0].parts))],
        pred.new_empty(count * 2, dtype=torch.int32),
        pred.new_empty(places, dtype=torch.int32),
        pred.new_empty(places, dtype=acc),
        pred.new_empty(count * 2, dtype=acc),
        [torch.empty_like(pred) for pred in preds] if with_grad else [],
    )


def _geometry(form: str, maps: Sequence[int], size: Sequence[float]) -> Geometry:
    """Of the arguments of an operator; ``maps`` are heights and widths, one after the other."""
    return Geometry(form, tuple(zip(maps[::2], maps[1::2], strict=True)), (size[0], size[1]))


@operator
def picked_loss(
    preds: list[Tensor],
    rows: Tensor,
    offsets: Tensor | None,
    class_weights: list[Tensor],
    key: str,
    form: str,
    maps: list[int],
    size: Sequence[Number],
    gains: list[float],
    with_grad: bool,
    workspace: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss of cells that objects pick, of a head or of several branches; returns :class:`PickOutputs`.

    ``preds`` and ``form`` are as :func:`fusedyolo.checks.point_predictions` gives them, branch by branch, of one form
    and of one type; ``class_weights`` none, or those of each branch; ``key`` that of
    :func:`fusedyolo.heads.key_of_branches`; ``maps`` height and width of each level, ``size`` those of the image;
    ``gains`` of all parts. The gradients, if asked for, are those of the total; the first backward takes them. A
    compiled graph brings its ``workspace``, see :func:`.picking.workspace_rows`; ``weights`` are those of the rows.
    """
    geometry = _geometry(form, maps, size)
    plan, given, outputs = _loss_steps(
        preds, rows, offsets, class_weights, key, geometry, gains, with_grad, workspace, weights
    )
    plan.run(rows.device, rows.shape[0], **given)
    return tuple(outputs)  # type: ignore[return-value]


@fake(picked_loss)
def _(preds, rows, offsets, class_weights, key, form, maps, size, gains, with_grad, workspace=None, weights=None):
    return tuple(_outputs(preds, _geometry(form, maps, size), branches_from_key(key), with_grad))


def _gradient(
    grads: list[Tensor],
    grad_outs: Sequence[Tensor],
    places: Sequence[int],
    preds: list[Tensor],
    saved: Sequence[Tensor],
    class_weights: Sequence[Tensor],
    key: str,
    geometry: Geometry,
    gains: Sequence[float],
    skip_one: bool,
    weights: Tensor | None,
) -> None:
    rows, row, score, norm = saved
    outs: list[Tensor | None] = [None] * (1 + len(gains))
    for place, grad in zip(places, grad_outs, strict=True):
        outs[place] = grad
    plan = _last_plan(key, layouts(preds), geometry, False, True, skip_one)
    plan.run(
        rows.device,
        rows.shape[0],
        preds=preds,
        rows=rows,
        weights=weights,
        class_weights=class_weights or [None] * (norm.shape[0] // 2),
        gains=gains,
        row=row,
        score=score,
        norm=norm,
        grads=grads,
        grad_outs=outs,
    )


@operator
def picked_loss_grad(
    grad_outs: list[Tensor],
    places: list[int],
    preds: list[Tensor],
    saved: list[Tensor],
    class_weights: list[Tensor],
    key: str,
    form: str,
    maps: list[int],
    size: Sequence[Number],
    gains: list[float],
    weights: Tensor | None = None,
) -> list[Tensor]:
    """Gradient of :func:`picked_loss`'s total and parts by every prediction, in one launch.

    Times ``grad_outs``, each in one of the ``places`` of the total, which is the first, and of the parts, branch by
    branch; of the others the gradient is 0. ``saved`` are the rows and, of :class:`PickOutputs`, ``row``, ``score`` and
    ``norm``.
    """
    grads, geometry = [torch.empty_like(pred) for pred in preds], _geometry(form, maps, size)
    _gradient(grads, grad_outs, places, preds, saved, class_weights, key, geometry, gains, False, weights)
    return grads


@fake(picked_loss_grad)
def _(grad_outs, places, preds, saved, class_weights, key, form, maps, size, gains, weights=None):
    return [torch.empty_like(pred) for pred in preds]


@partial(operator, mutates=("grads",))
def picked_loss_rescale(
    grads: list[Tensor],
    grad_outs: list[Tensor],
    places: list[int],
    preds: list[Tensor],
    saved: list[Tensor],
    class_weights: list[Tensor],
    key: str,
    form: str,
    maps: list[int],
    size: Sequence[Number],
    gains: list[float],
    weights: Tensor | None = None,
) -> None:
    """Turns ``grads``, the gradients for a total multiplied by 1, into those of :func:`picked_loss_grad`: a launch
    whose programs are over at once where nothing changes, which only the device knows.
    """
    geometry = _geometry(form, maps, size)
    _gradient(grads, grad_outs, places, preds, saved, class_weights, key, geometry, gains, True, weights)


@fake(picked_loss_rescale)
def _(grads, grad_outs, places, preds, saved, class_weights, key, form, maps, size, gains, weights=None):
    return None


def _save(ctx, inputs, output):
    preds, rows, _offsets, class_weights, *ctx.settings, _with_grad, _workspace, weights = inputs
    outputs = PickOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.weighed = len(class_weights)
    ctx.save_for_backward(rows, outputs.row, outputs.score, outputs.norm, weights, *class_weights, *preds)
    # Not among the saved tensors, which must not change: the first backward changes them and gives them away. Tensors
    # of another type belong to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grads if outputs.grads and type(outputs.grads[0]) is Tensor else None


def _backward(ctx, grad_total, grad_parts=()):
    rows, row, score, norm, weights, *others = ctx.saved_tensors
    saved, class_weights, preds = [rows, row, score, norm], others[: ctx.weighed], others[ctx.weighed :]
    outs = (grad_total, *grad_parts)
    places = [place for place, grad in enumerate(outs) if grad is not None]
    if not places:
        return [None] * len(preds)
    gains = ctx.settings[-1]
    # that of a sum is one number many times
    grad_outs = [outs[place] if outs[place].dim() == 0 else outs[place].contiguous() for place in places]
    grads, ctx.stored = ctx.stored, None
    if grads is None or torch.is_grad_enabled():  # with create_graph, they are to know that they have none themselves
        grads = call(picked_loss_grad, grad_outs, places, preds, saved, class_weights, *ctx.settings, weights)
    else:
        call(picked_loss_rescale, grads, grad_outs, places, preds, saved, class_weights, *ctx.settings, weights)
    return list(grads) if places[0] == 0 else _of_branches(grads, places, len(gains), norm.shape[0] // 2)


def _of_branches(grads: list[Tensor], places: Sequence[int], parts: int, count: int) -> list[Tensor | None]:
    """The gradients of those of so many branches, with so many parts in all, of which a part has a gradient: none of a
    branch that nobody asks.
    """
    asked = {(place - 1) // (parts // count) for place in places}
    each = len(grads) // count
    return [grad if i // each in asked else None for i, grad in enumerate(grads)]


differentiable(picked_loss, _backward, _save, outputs=2)
differentiable(picked_loss_grad, refuse_double_backward(picked_loss_grad))
