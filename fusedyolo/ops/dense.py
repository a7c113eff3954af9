"""Losses over anchors that each predict a box and the logits of all classes: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..heads import DenseHead, dense_head_from_key
from ..kernels.dense import loss, match, rank
from ..kernels.launch import (
    MATCH_BLOCK,
    MATCH_REGISTERS,
    MATCH_ROWS,
    MOST_CLAIMS,
    RANK_PART,
    RANK_REGISTERS,
    DenseConfig,
    dense_config,
    dense_gradient,
    power_of_two,
)
from ..kernels.levels import Strides
from ..operator import differentiable, fake, operator
from ..terms import TERMS
from ..tuned import wishes
from .launch import (
    COUNTERS,
    Launch,
    Layout,
    accumulator,
    done_counter,
    float_parts,
    layouts,
    odd,
    planned,
    refuse_double_backward,
    row_maxima,
    run_all,
    zeros,
)
from .strides import map_strides

import triton.language as tl  # isort: skip

T = TypeVar("T", Tensor, Layout)

KEYS = {torch.float32: tl.int32, torch.float64: tl.int64}
"""Integers that hold the bits of a float."""
BOX_CHANNELS, CENTRE_CHANNELS = 4, 1


class Geometry(NamedTuple):
    """What is known of the targets and levels of a call beside the tensors."""

    size: tuple[float, float]  # width and height of the image; infinite where unknown
    corners: bool  # rows hold corners in pixels, not centre and size relative to the image
    ends: tuple[int, int]  # anchors of the first and the last level


class DenseOutputs(NamedTuple):
    """What the launches of a loss leave; the last ones are empty where no gradient is asked for, or none left yet."""

    total: Tensor  # 0-dim
    cls: Tensor  # 0-dim
    box: Tensor  # 0-dim
    centre: Tensor  # 0-dim, of no meaning without centreness
    counts: Tensor  # int32 [2]: anchors with a row, invalid rows
    match: Tensor  # int32 [B, N], by position
    found: Tensor  # int32 [B + 1]: anchors with a row, of each image and of all
    ce: Tensor  # [B, N] cross-entropies, of a ranked head
    picks: Tensor  # int64 [B, 4], of a ranked head
    grads: list[Tensor]  # as the predictions


class _Row(NamedTuple):
    """What the driver takes from the row alone."""

    terms: loss.Terms
    weights: tuple[float, ...]
    beta: float
    box_args: tuple[float, ...]
    label_args: tuple[Any, ...]


@lru_cache(maxsize=256)
def _row(key: str) -> _Row:
    head = dense_head_from_key(key)
    box, label = TERMS[head.box], TERMS[head.label]
    terms = loss.Terms(
        axis=TERMS[head.decode].kernel,
        box=None if box.is_offset else box.kernel,
        offset=box.kernel if box.is_offset else None,
        label=label.kernel,
        centre=TERMS["bce"].kernel if head.centreness else None,
    )
    return _Row(terms, head.weights, head.beta, head.box_args, label.kernel_args(head.label_args))


def _split(preds: Sequence[T], head: DenseHead) -> list[Sequence[T]]:
    """Class logits, boxes and centreness, each a tensor a level, of all of them one after the other."""
    levels = len(preds) // (3 if head.centreness else 2)
    return [preds[i : i + levels] for i in range(0, len(preds), levels)]


def _view(pred: Tensor, channels: int) -> Tensor:
    """``[B, N, channels]`` or a map ``[B, A * channels, H, W]`` as a view ``[B, H, W, A, channels]``."""
    if pred.ndim == 3:
        return pred[:, None, :, None]
    return pred.unflatten(1, (-1, channels)).permute(0, 3, 4, 1, 2)


class _Layout(NamedTuple):
    """Where predictions, and gradients in the strides that they get, lie."""

    flat: bool
    near: bool
    strides: tuple[tuple[Strides, ...], ...]  # of class logits, boxes and centreness, one a level, made odd
    grad_strides: tuple[tuple[Strides, ...], ...]
    widths: tuple[int, ...]
    cells: tuple[int, ...]
    anchors: tuple[int, ...]


@planned
def _layout(key: str, preds: tuple[Layout, ...], grads: tuple[Layout, ...]) -> _Layout:
    head = dense_head_from_key(key)
    channels = (head.num_classes, BOX_CHANNELS, CENTRE_CHANNELS)[: 3 if head.centreness else 2]
    of_both = [list(zip(_split(lie, head), channels, strict=True)) for lie in (preds, grads)]
    views, grad_views = ([[_view(own.meta(), c) for own in maps] for maps, c in kinds] for kinds in of_both)
    strides, grad_strides = (
        tuple(tuple(map_strides(own, c) for own in maps) for maps, c in kinds) for kinds in of_both
    )
    flat = all(view.is_contiguous() for maps in (*views, *grad_views) for view in maps)
    sizes = [view.shape for view in views[0]]
    widths = tuple(shape[2] for shape in sizes)
    near = flat or all(
        (by.row, by.column) == (width, 1)
        for maps in (*strides, *grad_strides)
        for by, width in zip(maps, widths, strict=True)
    )
    if flat:  # a stream has no strides, and no kernel of its own for those of each size
        strides = grad_strides = ((Strides(0, 0, 0, 0, 0),) * len(sizes),) * len(channels)
    return _Layout(
        flat,
        near,
        odd(strides),
        odd(grad_strides),
        widths,
        tuple(shape[1] * shape[2] for shape in sizes),
        tuple(shape[3] for shape in sizes),
    )


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _programs(layout: _Layout, head: DenseHead, batch: int, config: DenseConfig) -> tuple[tuple[int, ...], ...]:
    """Programs of class logits and of boxes, one number a level."""
    cls, boxes = [], []
    for cells, anchors in zip(layout.cells, layout.anchors, strict=True):
        rows, each = (1, cells * anchors) if layout.flat else (anchors, cells)
        tiles = batch * rows * _ceil(each, config.cells)
        if head.negatives:
            tiles = _ceil(tiles, config.steps)
        elif layout.flat:
            tiles = _ceil(batch * each * head.num_classes, config.block * config.steps)
        cls.append(tiles)
        own = batch * rows * _ceil(each, config.anchors)
        boxes.append(_ceil(own, config.steps) if head.negatives and layout.flat else own)
    return tuple(cls), tuple(boxes)


@lru_cache(maxsize=256)
def _family(key: str) -> str:
    """The terms of a row: losses of the same ones share what tuning found."""
    head = dense_head_from_key(key)
    return f"{head.decode} {head.box} {head.label} {head.matcher}" + " ranked" * (head.negatives > 0)


@planned
def _config(key: str, preds: tuple[Layout, ...]) -> DenseConfig:
    """The tiles of a call."""
    head, layout, pred = dense_head_from_key(key), _layout(key, preds, preds), preds[0]
    streams = [n * a * head.num_classes for n, a in zip(layout.cells, layout.anchors, strict=True)]
    largest = max(layout.cells) * (max(layout.anchors) if layout.flat else 1)
    batch = pred.shape[0]
    tuned = wishes("dense", _family(head.key), pred, not layout.near, batch, largest, head.num_classes)
    return dense_config(
        min(streams),
        largest,
        batch * sum(streams),
        head.num_classes,
        pred.dtype.itemsize,
        head.negatives > 0,
        layout.flat,
        "offset" if TERMS[head.box].is_offset else head.box,
        tuned,
    )


class _Plan(NamedTuple):
    """A launch but for its tensors, and the strides that go with them."""

    launch: Launch
    strides: tuple[tuple[Strides, ...], ...]
    grad_strides: tuple[tuple[Strides, ...], ...]


@planned
def _plan(
    key: str,
    preds: tuple[Layout, ...],
    grads: tuple[Layout, ...] | None,
    geometry: Geometry,
    anchors: int,
    with_loss: bool,
    skip_one: bool,
) -> _Plan:
    """Of the driver after the match; ``anchors`` in an image."""
    head, config, row, batch = dense_head_from_key(key), _config(key, preds), _row(key), preds[0].shape[0]
    if not with_loss:
        config = dense_gradient(config, head.negatives > 0)
    layout = _layout(key, preds, preds if grads is None else grads)
    cls_programs, box_programs = _programs(layout, head, batch, config)
    spec = loss.Spec(
        C=head.num_classes,
        RANKED=head.negatives > 0,
        BY_IMAGE=head.mean == "image",
        CORNERS=geometry.corners,
        FLAT=layout.flat,
        NEAR=layout.near,
        WITH_LOSS=with_loss,
        WITH_GRAD=grads is not None,
        SKIP_ONE=skip_one,
        ACC=accumulator(preds[0].dtype)[0],
        BLOCK=config.block,
        GROUP=config.group,
        CELLS=config.cells,
        PLANES=config.planes,
        ANCHORS=config.anchors,
        WIDTH=config.width,
        CHUNKS=_ceil(head.num_classes, config.width),
    )
    arguments = {
        "levels": loss.Levels(
            odd(layout.widths), odd(layout.cells), odd(layout.anchors), odd(box_programs), odd(cls_programs)
        ),
        "N": anchors,
        "B": batch,
        "steps": config.steps,
        "terms": row.terms,
        "numbers": loss.Numbers(row.weights, row.beta, row.box_args, row.label_args, geometry.size),
        "SPEC": spec,
    }
    grid = (sum(cls_programs) + sum(box_programs),)
    launch = Launch(loss.dense_kernel, grid, arguments, config.threads, config.max_registers, stages=config.stages)
    return _Plan(launch, layout.strides, layout.grad_strides)


def _maps(preds: Sequence[Tensor], grads: Sequence[Tensor] | None, plan: _Plan, head: DenseHead) -> loss.Predictions:
    """Predictions and gradients as the kernel takes them."""
    split = _split(preds, head)
    d_split = [(None,) * len(split[0])] * len(split) if grads is None else _split(grads, head)
    maps = [
        loss.Maps(tuple(own), tuple(d_own), by, d_by)
        for own, d_own, by, d_by in zip(split, d_split, plan.strides, plan.grad_strides, strict=True)
    ]
    return loss.Predictions(maps[0], maps[1], maps[2] if head.centreness else None)


def dense_launch(
    preds: Sequence[Tensor],
    anchors: Tensor,
    rows: Tensor,
    head: DenseHead,
    geometry: Geometry,
    outputs: DenseOutputs,
    with_loss: bool,
    grads: Sequence[Tensor] | None = None,
    grad_outs: Sequence[Tensor | None] = (None,) * 4,
    skip_one: bool = False,
    workspace: Tensor | None = None,
) -> Launch:
    """A launch of the driver after the match: the loss, the gradient with ``grads``, or both.

    The gradient is multiplied by ``grad_outs``, of the total and of the parts; if ``skip_one`` it is left as it is
    where that is 1.
    """
    d_layouts = None if grads is None else layouts(grads)
    plan = _plan(head.key, layouts(preds), d_layouts, geometry, outputs.match.shape[1], with_loss, skip_one)
    sums = loss.Sums(None, (None,) * 3, None, None)
    if with_loss:
        sums = loss.Sums(
            total_ptr=outputs.total,
            parts=(outputs.cls, outputs.box, outputs.centre),
            partial_ptr=outputs.total.new_empty(plan.launch.grid[0] * loss.N_PARTS.value),
            done_ptr=done_counter(rows.device, workspace),
        )
    ranked = head.negatives > 0
    return plan.launch.filled(
        {
            "predictions": _maps(preds, grads, plan, head),
            "matched": loss.Matched(anchors, rows, outputs.match, outputs.found),
            "grads": tuple(grad_outs),
            "ranked": loss.Ranked(outputs.ce if ranked else None, outputs.picks if ranked else None),
            "sums": sums,
        }
    )


def _tally(device: torch.device, batch: int, rows: int, own: Tensor | None) -> Tensor:
    """A counter for each image and one more, behind the other ones or behind the rows of a workspace; left at 0."""
    if own is None:
        return zeros(device, COUNTERS + batch + 1, torch.int32)[COUNTERS:]
    return own[COUNTERS + rows :].view(torch.int32)


@planned
def _match_plan(key: str, preds: tuple[Layout, ...], geometry: Geometry, anchors: int) -> list[Launch]:
    """The launches of :func:`match_launches` but for their tensors; ``anchors`` in an image."""
    head, layout, batch, N = dense_head_from_key(key), _layout(key, preds, preds), preds[0].shape[0], anchors
    block = min(MATCH_BLOCK, power_of_two(N))
    common = {
        "N": N,
        "levels": match.Levels(odd(layout.anchors), odd(layout.cells)),
        "rule": match.Rule(
            (float_parts(head.band[0]), float_parts(head.band[1])),
            float_parts(head.radius),
            head.scale_range,
            odd(geometry.ends),
        ),
        "frame": match.Frame(geometry.size, (1 if head.background else 0, head.num_classes)),
        "SPEC": match.MatchSpec(
            CENTRE=head.matcher == "centre",
            RESCUE=head.rescue,
            PLANES=not layout.flat and not head.negatives,
            CORNERS=geometry.corners,
            ACC=accumulator(preds[0].dtype)[0],
            BLOCK=block,
            BLOCK_G=MATCH_ROWS,
        ),
    }
    grid = (batch * _ceil(N, block),)
    threads = max(32, block * _config(key, preds).match_threads // MATCH_BLOCK)
    launches = [Launch(match.match_kernel, grid, {**common, "B": batch}, threads, MATCH_REGISTERS, exact=True)]
    if head.rescue is not None:
        launches.insert(0, Launch(match.overlap_kernel, grid, common, threads, MATCH_REGISTERS, exact=True))
    return launches


def match_launches(
    preds: Sequence[Tensor],
    anchors: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    head: DenseHead,
    geometry: Geometry,
    outputs: DenseOutputs,
    workspace: Tensor | None = None,
) -> list[Launch]:
    """The launches that settle which row each anchor takes."""
    (batch, N), M = outputs.match.shape, rows.shape[0]
    *overlap, last = _match_plan(head.key, layouts(preds), geometry, N)
    claims = match.Claims(None, None, 3)
    if overlap:
        words = min(MOST_CLAIMS, -(-M // match.LANES.value))
        bits = rows.new_empty(last.grid[0] * words, dtype=torch.int32)
        claims = match.Claims(row_maxima(rows.device, M, workspace), bits, 2 * words + 3)
    common = {"anchors_ptr": anchors, "targets": match.Targets(rows, offsets), "M": M, "claims": claims}
    settle = {
        **common,
        "picks_ptr": outputs.picks if head.negatives else None,
        "matched": match.Matched(
            outputs.match,
            outputs.found,
            outputs.counts,
            _tally(rows.device, batch, rows.shape[0], workspace),
            done_counter(rows.device, workspace),
        ),
    }
    return [*(launch.filled({**common, "match_ptr": outputs.match}) for launch in overlap), last.filled(settle)]


class _RankPlan(NamedTuple):
    """The launches that rank but for their tensors, and the programs of each."""

    counting: Launch
    ranking: Launch
    programs: int


@planned
def _rank_plan(key: str, preds: tuple[Layout, ...], anchors: int) -> _RankPlan:
    """Of images of so many anchors."""
    head, batch, threads = dense_head_from_key(key), preds[0].shape[0], _config(key, preds).rank_threads
    triton_acc, acc = accumulator(preds[0].dtype)
    part = min(RANK_PART, power_of_two(anchors))
    programs = batch * _ceil(anchors, part)
    arguments = {
        "N": anchors,
        "B": batch,
        "ratio": head.negatives,
        "SPEC": rank.RankSpec(
            BY_IMAGE=head.mean == "image",
            ACC=triton_acc,
            KEY=KEYS[acc],
            BITS=8 * acc.itemsize - 1,
            PART=part,
        ),
    }
    threads = max(32, part * threads // RANK_PART)
    launches = [
        Launch(kernel, (programs,), arguments, threads, RANK_REGISTERS)
        for kernel in (rank.count_kernel, rank.rank_kernel)
    ]
    return _RankPlan(*launches, programs)


def rank_launches(
    preds: Sequence[Tensor], head: DenseHead, outputs: DenseOutputs, workspace: Tensor | None = None
) -> list[Launch]:
    """The launches that pick the hardest negatives, and complete the loss."""
    batch, N = outputs.match.shape
    plan = _rank_plan(head.key, layouts(preds), N)
    common = {
        "ce_ptr": outputs.ce,
        "match_ptr": outputs.match,
        "found_ptr": outputs.found,
        "picks_ptr": outputs.picks,
        "scratch": rank.Scratch(
            counts_ptr=outputs.match.new_empty(plan.programs, rank.BINS.value),
            bins_ptr=outputs.match.new_empty(batch, 4),
            earlier_ptr=outputs.match.new_empty(plan.programs),
            twice_ptr=outputs.match.new_empty(plan.programs),
            partial_ptr=outputs.total.new_empty(2, plan.programs),
            images_ptr=outputs.total.new_empty(batch),
            index_ptr=torch.empty_like(outputs.match),
            listed_ptr=torch.empty_like(outputs.ce),
        ),
    }
    done = done_counter(outputs.total.device, workspace)
    outcome = rank.Outcome(outputs.total, outputs.cls, outputs.box, done)
    return [plan.counting.filled(common), plan.ranking.filled({**common, "outcome": outcome})]


def loss_launches(
    preds: Sequence[Tensor],
    anchors: Tensor,
    rows: Tensor,
    offsets: Tensor | None,
    head: DenseHead,
    geometry: Geometry,
    outputs: DenseOutputs,
    workspace: Tensor | None = None,
) -> list[Launch]:
    """All launches of a loss, and of its gradient where ``outputs`` has room for that."""
    launches = match_launches(preds, anchors, rows, offsets, head, geometry, outputs, workspace)
    grads = outputs.grads or None
    launches.append(dense_launch(preds, anchors, rows, head, geometry, outputs, True, grads, workspace=workspace))
    if head.negatives:
        launches += rank_launches(preds, head, outputs, workspace)
    return launches


def dense_outputs(preds: Sequence[Tensor], anchors: Tensor, head: DenseHead, with_grad: bool) -> DenseOutputs:
    """Memory for what a loss leaves."""
    pred, N = preds[0], anchors.shape[0]
    batch, acc = pred.shape[0], accumulator(pred.dtype)[1]
    ranked = batch if head.negatives else 0
    total, cls, box, centre = (pred.new_empty((), dtype=acc) for _ in range(4))
    return DenseOutputs(
        total,
        cls,
        box,
        centre,
        pred.new_empty(2, dtype=torch.int32),
        pred.new_empty((batch, N), dtype=torch.int32),
        pred.new_empty(batch + 1, dtype=torch.int32),
        pred.new_empty((ranked, N), dtype=acc),
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
    size: list[float],
    corners: bool,
    ends: list[int],
    with_grad: bool,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss of a dense head; returns :class:`DenseOutputs`.

    ``preds`` are class logits, boxes and centreness, each a tensor a level; ``size``, ``corners`` and ``ends`` what
    :class:`Geometry` says. The gradients, if asked for and not ranked, are those of the total; the first backward
    takes them. A compiled graph brings its ``workspace``, with a place for each row, each image and one more.
    """
    head = dense_head_from_key(key)
    geometry = Geometry((size[0], size[1]), corners, (ends[0], ends[1]))
    outputs = dense_outputs(preds, anchors, head, with_grad)
    run_all(loss_launches(preds, anchors, rows, offsets, head, geometry, outputs, workspace), rows.device)
    return tuple(outputs)  # type: ignore[return-value]


@fake(dense_loss)
def _(preds, anchors, rows, offsets, key, size, corners, ends, with_grad, workspace=None):
    return tuple(dense_outputs(preds, anchors, dense_head_from_key(key), with_grad))


def _gradient(
    grads: list[Tensor],
    grad_outs: list[Tensor | None],
    preds: list[Tensor],
    saved: Sequence[Tensor],
    key: str,
    geometry: tuple[list[float], bool, list[int]],
    skip_one: bool,
) -> None:
    anchors, rows, match, found, ce, picks = saved
    size, corners, ends = geometry
    none = match  # nothing asks for these
    outputs = DenseOutputs(none, none, none, none, none, match, found, ce, picks, grads)
    head, at = dense_head_from_key(key), Geometry((size[0], size[1]), corners, (ends[0], ends[1]))
    run_all([dense_launch(preds, anchors, rows, head, at, outputs, False, grads, grad_outs, skip_one)], rows.device)


@operator
def dense_loss_grad(
    grad_total: Tensor | None,
    grad_cls: Tensor | None,
    grad_box: Tensor | None,
    grad_centre: Tensor | None,
    preds: list[Tensor],
    saved: list[Tensor],
    key: str,
    size: list[float],
    corners: bool,
    ends: list[int],
) -> list[Tensor]:
    """Gradient of :func:`dense_loss`'s total and parts by every prediction, times those given (0-dim), in one launch.

    ``saved`` are the anchors, the rows and, of :class:`DenseOutputs`, ``match``, ``found``, ``ce`` and ``picks``.
    """
    grads = [torch.empty_like(pred) for pred in preds]
    grad_outs = [grad_total, grad_cls, grad_box, grad_centre]
    _gradient(grads, grad_outs, preds, saved, key, (size, corners, ends), False)
    return grads


@fake(dense_loss_grad)
def _(grad_total, grad_cls, grad_box, grad_centre, preds, saved, key, size, corners, ends):
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
    size: list[float],
    corners: bool,
    ends: list[int],
) -> None:
    """Turns ``grads``, the gradients for a total multiplied by 1, into those of :func:`dense_loss_grad`: a launch whose
    programs are over at once where nothing changes, which only the device knows.
    """
    grad_outs = [grad_total, grad_cls, grad_box, grad_centre]
    _gradient(grads, grad_outs, preds, saved, key, (size, corners, ends), True)


@fake(dense_loss_rescale)
def _(grads, grad_total, grad_cls, grad_box, grad_centre, preds, saved, key, size, corners, ends):
    return None


def _save(ctx, inputs, output):
    preds, anchors, rows, _offsets, *ctx.settings, _with_grad, _workspace = inputs
    outputs = DenseOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(outputs.counts, outputs.match, outputs.found, outputs.ce, outputs.picks, *outputs.grads)
    ctx.save_for_backward(anchors, rows, outputs.match, outputs.found, outputs.ce, outputs.picks, *preds)
    # Not among the saved tensors, which must not change: the first backward changes them and gives them away. Tensors
    # of another type belong to a tracer, and a traced graph must not change what its forward returns.
    ctx.stored = outputs.grads if outputs.grads and type(outputs.grads[0]) is Tensor else None


def _backward(ctx, grad_total, grad_cls, grad_box, grad_centre, *_rest):
    saved, preds = list(ctx.saved_tensors[:6]), list(ctx.saved_tensors[6:])
    grad_outs = (grad_total, grad_cls, grad_box, grad_centre)
    if all([grad is None for grad in grad_outs]):
        return [None] * len(preds)
    grads, ctx.stored = ctx.stored, None
    if grads is None or torch.is_grad_enabled():  # with create_graph, they are to know that they have none themselves
        grads = dense_loss_grad(*grad_outs, preds, saved, *ctx.settings)
    else:
        dense_loss_rescale(grads, *grad_outs, preds, saved, *ctx.settings)
    return list(grads)


differentiable(dense_loss, _backward, _save)
differentiable(dense_loss_grad, refuse_double_backward(dense_loss_grad))
