"""Losses over anchors that each predict a box and the logits of all classes: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.types import Number

from ..heads import DenseHead, dense_head_from_key
from ..kernels.dense import loss, match, rank
from ..kernels.launch import (
    MATCH_BLOCK,
    MATCH_REGISTERS,
    MATCH_ROWS,
    MOST_CLAIMS,
    RANK_PART,
    RANK_REGISTERS,
    WARP,
    DenseConfig,
    dense_config,
    dense_gradient,
    power_of_two,
)
from ..kernels.levels import Strides
from ..operator import call, differentiable, fake, operator
from ..terms import TERMS
from ..tuned import wishes
from .launch import (
    COUNTERS,
    Launch,
    Layout,
    accumulator,
    alike,
    counters_and_maxima,
    float_parts,
    layouts,
    odd,
    planned,
    refuse_double_backward,
)
from .steps import Outline, Slot, Steps
from .strides import map_strides

import triton.language as tl  # isort: skip

T = TypeVar("T", Tensor, Layout, Slot)

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

    total: Tensor  # 0-dim, or [B] of each image
    cls: Tensor  # likewise
    box: Tensor  # likewise
    centre: Tensor  # likewise, of no meaning without centreness
    counts: Tensor  # int32 [2]: anchors with a row, invalid rows
    match: Tensor  # int32 [B, N], by position, see kernels.dense.match.Matched
    found: Tensor  # int32 [B + 1]: anchors with a row, of each image; and what sums over the batch are divided by
    ce: Tensor  # [B, N] cross-entropies, of a ranked head; of one that weighs boxes [1, 1], the sum of their weights
    picks: Tensor  # int64 [B, 4], of a ranked head
    grads: list[Tensor]  # as the predictions


class _Row(NamedTuple):
    """What the driver takes from the row alone."""

    terms: loss.Terms
    weights: tuple[float, ...]
    beta: float
    box_gain: float | None
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
    gain = None if head.box_gain == 1 else head.box_gain
    return _Row(terms, head.weights, head.beta, gain, head.box_args, label.kernel_args(head.label_args))


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
        boxes.append(_ceil(own, config.steps) if config.repeats else own)
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
    config = dense_config(
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
    return replace(config, repeats=config.repeats and not head.by_image)  # tiles of a program may be of two images


def _maps(own: Outline, at: _Layout, preds: int, with_grad: bool, head: DenseHead) -> loss.Predictions:
    """So many predictions, and gradients, as the kernel takes them."""
    split = _split(own.tensors("preds", preds), head)
    d_split = _split(own.tensors("grads", preds), head) if with_grad else [(None,) * len(split[0])] * len(split)
    maps = [
        loss.Maps(tuple(each), tuple(d_each), by, d_by)
        for each, d_each, by, d_by in zip(split, d_split, at.strides, at.grad_strides, strict=True)
    ]
    return loss.Predictions(maps[0], maps[1], maps[2] if head.centreness else None)


def _dense_launch(
    own: Outline,
    key: str,
    preds: tuple[Layout, ...],
    geometry: Geometry,
    anchors: int,
    with_loss: bool,
    with_grad: bool,
    skip_one: bool = False,
) -> Launch:
    """Of the driver after the match, the loss, the gradient, or both; ``anchors`` in an image. Calls bring what
    :func:`_loss_steps` says, or :func:`_grad_steps`.
    """
    head, config, row, batch = dense_head_from_key(key), _config(key, preds), _row(key), preds[0].shape[0]
    if not with_loss:
        config = dense_gradient(config, head.negatives > 0)
    layout = _layout(key, preds, alike(preds) if with_grad else preds)
    cls_programs, box_programs = _programs(layout, head, batch, config)
    programs, ranked = sum(cls_programs) + sum(box_programs), head.negatives > 0
    triton_acc, acc = accumulator(preds[0].dtype)
    spec = loss.Spec(
        C=head.num_classes,
        RANKED=ranked,
        BY_IMAGE=head.mean == "image",
        IMAGES=head.by_image,
        CORNERS=geometry.corners,
        FLAT=layout.flat,
        REPEATS=config.repeats,
        SUMS=32 if config.threads == WARP else 256,
        NEAR=layout.near,
        WITH_LOSS=with_loss,
        WITH_GRAD=with_grad,
        SKIP_ONE=skip_one,
        ACC=triton_acc,
        BLOCK=config.block,
        GROUP=config.group,
        CELLS=config.cells,
        PLANES=config.planes,
        ANCHORS=config.anchors,
        WIDTH=config.width,
        CHUNKS=_ceil(head.num_classes, config.width),
    )
    sums = loss.Sums(None, (None,) * 3, None, None, None)
    if with_loss:
        sums = loss.Sums(
            total_ptr=own.tensor("total"),
            parts=(own.tensor("cls"), own.tensor("box"), own.tensor("centre")),
            partial_ptr=own.scratch(acc, (programs * loss.N_PARTS.value,)),
            images_ptr=own.scratch(torch.int32, (programs,)) if head.by_image else None,
            done_ptr=own.tensor("done"),
        )
    arguments = {
        "predictions": _maps(own, layout, len(preds), with_grad, head),
        "matched": loss.Matched(
            *[own.tensor(name) for name in ("anchors", "rows", "weights", "match", "found", "class_weights")],
            own.tensor("ce") if head.box_weight else None,
        ),
        "grads": (None,) * 4 if with_loss else own.tensors("grad_outs", 4),
        "ranked": loss.Ranked(own.tensor("ce"), own.tensor("picks")) if ranked else loss.Ranked(None, None),
        "sums": sums,
        "levels": loss.Levels(
            odd(layout.widths), odd(layout.cells), odd(layout.anchors), odd(box_programs), odd(cls_programs)
        ),
        "N": anchors,
        "B": batch,
        "steps": config.steps,
        "terms": row.terms,
        "numbers": loss.Numbers(row.weights, row.beta, row.box_gain, row.box_args, row.label_args, geometry.size),
        "SPEC": spec,
    }
    settings = config.threads, config.max_registers
    return Launch(
        loss.dense_kernel,
        (programs,),
        arguments,
        *settings,
        stages=config.stages,
        weights=(own.tensor("weights"), own.tensor("class_weights")),
    )


def _match_launches(
    own: Outline, key: str, preds: tuple[Layout, ...], geometry: Geometry, anchors: int, words: int
) -> list[Launch]:
    """Those that settle which row each anchor takes; ``anchors`` in an image, ``words`` see :func:`_words`."""
    head, layout, batch, N = dense_head_from_key(key), _layout(key, preds, preds), preds[0].shape[0], anchors
    block = min(MATCH_BLOCK, power_of_two(N))
    grid = (batch * _ceil(N, block),)
    claims = match.Claims(None, None, 3, None)
    if head.rescue is not None:
        bits, ranges = own.scratch(torch.int32, (grid[0] * words,)), own.scratch(torch.int32, (batch, 2))
        claims = match.Claims(own.tensor("maxima"), bits, 2 * words + 3, ranges)
    common = {
        "anchors_ptr": own.tensor("anchors"),
        "targets": match.Targets(own.tensor("rows"), own.tensor("offsets"), own.tensor("weights")),
        "M": own.M,
        "claims": claims,
        "matched": match.Matched(
            own.tensor("match"),
            own.tensor("found"),
            own.tensor("counts"),
            own.tensor("tally").after(COUNTERS * torch.int32.itemsize, torch.int32),
            own.tensor("done"),
            own.scratch(accumulator(preds[0].dtype)[1], grid) if head.box_weight else None,
            own.tensor("ce") if head.box_weight else None,
        ),
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
            MEAN=head.mean,
            PLANES=not layout.flat and not head.negatives,
            CORNERS=geometry.corners,
            ACC=accumulator(preds[0].dtype)[0],
            BLOCK=block,
            BLOCK_G=MATCH_ROWS,
        ),
    }
    settle = {**common, "B": batch, "picks_ptr": own.tensor("picks") if head.negatives else None}
    threads = max(32, block * _config(key, preds).match_threads // MATCH_BLOCK)
    launches = [Launch(match.match_kernel, grid, settle, threads, MATCH_REGISTERS, exact=True)]
    if head.rescue is not None:
        launches.insert(0, Launch(match.overlap_kernel, grid, common, threads, MATCH_REGISTERS, exact=True))
    return launches


def _words(head: DenseHead, rows: int) -> int:
    """Integers of a block of anchors that say which of so many rows it has claimed, of a head that asks."""
    return 0 if head.rescue is None else min(MOST_CLAIMS, -(-rows // match.LANES.value))


def _rank_launches(own: Outline, key: str, preds: tuple[Layout, ...], anchors: int) -> list[Launch]:
    """Those that pick the hardest negatives, and complete the loss."""
    head, batch, threads = dense_head_from_key(key), preds[0].shape[0], _config(key, preds).rank_threads
    triton_acc, acc = accumulator(preds[0].dtype)
    part = min(RANK_PART, power_of_two(anchors))
    programs = batch * _ceil(anchors, part)
    common = {
        "ce_ptr": own.tensor("ce"),
        "match_ptr": own.tensor("match"),
        "found_ptr": own.tensor("found"),
        "picks_ptr": own.tensor("picks"),
        "scratch": rank.Scratch(
            counts_ptr=own.scratch(torch.int32, (programs, rank.BINS.value)),
            bins_ptr=own.scratch(torch.int32, (batch, 4)),
            earlier_ptr=own.scratch(torch.int32, (programs,)),
            twice_ptr=own.scratch(torch.int32, (programs,)),
            partial_ptr=own.scratch(acc, (2, programs)),
            images_ptr=own.scratch(acc, (batch,)),
            index_ptr=own.scratch(torch.int32, (batch, anchors)),
            listed_ptr=own.scratch(acc, (batch, anchors)),
        ),
        "N": anchors,
        "B": batch,
        "ratio": head.negatives,
        "SPEC": rank.RankSpec(
            BY_IMAGE=head.mean == "image",
            IMAGES=head.by_image,
            ACC=triton_acc,
            KEY=KEYS[acc],
            BITS=8 * acc.itemsize - 1,
            PART=part,
        ),
    }
    outcome = rank.Outcome(own.tensor("total"), own.tensor("cls"), own.tensor("box"), own.tensor("done"))
    threads = max(32, part * threads // RANK_PART)
    return [
        Launch(rank.count_kernel, (programs,), common, threads, RANK_REGISTERS),
        Launch(rank.rank_kernel, (programs,), {**common, "outcome": outcome}, threads, RANK_REGISTERS),
    ]


@planned
def _plan(
    key: str,
    preds: tuple[Layout, ...],
    geometry: Geometry,
    anchors: int,
    with_grad: bool,
    words: int,
) -> Steps:
    """Of all launches of a loss, ``with_grad`` of its gradient too."""
    own, ranked = Outline(), dense_head_from_key(key).negatives > 0
    launches = _match_launches(own, key, preds, geometry, anchors, words)
    launches.append(_dense_launch(own, key, preds, geometry, anchors, True, with_grad))
    if ranked:
        launches += _rank_launches(own, key, preds, anchors)
    return own.steps(*launches)


@planned
def _grad_plan(key: str, preds: tuple[Layout, ...], geometry: Geometry, anchors: int, skip_one: bool) -> Steps:
    """Of the gradient alone."""
    own = Outline()
    return own.steps(_dense_launch(own, key, preds, geometry, anchors, False, True, skip_one))


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
    plan = _plan(head.key, layouts(preds), geometry, N, bool(outputs.grads), _words(head, M))
    done, maxima = counters_and_maxima(rows.device, M, workspace, COUNTERS + batch + 1)
    # a counter for each image and one more, behind two others: of a workspace, which these come last in, a maximum
    tally = done if workspace is None else workspace[COUNTERS + M - 1 :].view(torch.int32)
    given = {"preds": preds, "anchors": anchors, "rows": rows, "offsets": offsets, "done": done, "maxima": maxima}
    return plan, given | {"tally": tally, "class_weights": class_weights, "weights": weights} | outputs._asdict()


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
    return _grad_plan(head.key, layouts(preds), geometry, saved[0].shape[0], skip_one), given


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
