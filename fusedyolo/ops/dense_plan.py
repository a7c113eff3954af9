"""The launches of losses over anchors that each predict a box and the logits of all classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..heads import DenseHead, dense_head_from_key
from ..kernels.dense import blocks, loss, match, rank, records
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
from ..terms import TERMS
from ..tuned import wishes
from .launch import (
    COUNTERS,
    Launch,
    Layout,
    accumulator,
    alike,
    float_parts,
    odd,
    planned,
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


class _Row(NamedTuple):
    """What the driver takes from the row alone."""

    terms: records.Terms
    weights: tuple[float, ...]
    beta: float
    box_gain: float | None
    box_args: tuple[float, ...]
    label_args: tuple[Any, ...]


@lru_cache(maxsize=256)
def _row(key: str) -> _Row:
    head = dense_head_from_key(key)
    box, label = TERMS[head.box], TERMS[head.label]
    terms = records.Terms(
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


def _maps(own: Outline, at: _Layout, preds: int, with_grad: bool, head: DenseHead) -> records.Predictions:
    """So many predictions, and gradients, as the kernel takes them."""
    split = _split(own.tensors("preds", preds), head)
    d_split = _split(own.tensors("grads", preds), head) if with_grad else [(None,) * len(split[0])] * len(split)
    maps = [
        records.Maps(tuple(each), tuple(d_each), by, d_by)
        for each, d_each, by, d_by in zip(split, d_split, at.strides, at.grad_strides, strict=True)
    ]
    return records.Predictions(maps[0], maps[1], maps[2] if head.centreness else None)


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
    spec = records.Spec(
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
    sums = records.Sums(None, (None,) * 3, None, None, None)
    if with_loss:
        sums = records.Sums(
            total_ptr=own.tensor("total"),
            parts=(own.tensor("cls"), own.tensor("box"), own.tensor("centre")),
            partial_ptr=own.scratch(acc, (programs * loss.N_PARTS.value,)),
            images_ptr=own.scratch(torch.int32, (programs,)) if head.by_image else None,
            done_ptr=own.tensor("done"),
        )
    arguments = {
        "predictions": _maps(own, layout, len(preds), with_grad, head),
        "matched": records.Matched(
            *[own.tensor(name) for name in ("anchors", "rows", "weights", "match", "found", "class_weights")],
            own.tensor("ce") if head.box_weight else None,
        ),
        "grads": (None,) * 4 if with_loss else own.tensors("grad_outs", 4),
        "ranked": records.Ranked(own.tensor("ce"), own.tensor("picks")) if ranked else records.Ranked(None, None),
        "sums": sums,
        "levels": records.Levels(
            odd(layout.widths), odd(layout.cells), odd(layout.anchors), odd(box_programs), odd(cls_programs)
        ),
        "N": anchors,
        "B": batch,
        "steps": config.steps,
        "terms": row.terms,
        "numbers": records.Numbers(row.weights, row.beta, row.box_gain, row.box_args, row.label_args, geometry.size),
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
    claims = blocks.Claims(None, None, 3, None)
    if head.rescue is not None:
        bits, ranges = own.scratch(torch.int32, (grid[0] * words,)), own.scratch(torch.int32, (batch, 2))
        claims = blocks.Claims(own.tensor("maxima"), bits, 2 * words + 3, ranges)
    common = {
        "anchors_ptr": own.tensor("anchors"),
        "targets": blocks.Targets(own.tensor("rows"), own.tensor("offsets"), own.tensor("weights")),
        "M": own.M,
        "claims": claims,
        "matched": blocks.Matched(
            own.tensor("match"),
            own.tensor("found"),
            own.tensor("counts"),
            own.tensor("tally").after(COUNTERS * torch.int32.itemsize, torch.int32),
            own.tensor("done"),
            own.scratch(accumulator(preds[0].dtype)[1], grid) if head.box_weight else None,
            own.tensor("ce") if head.box_weight else None,
        ),
        "N": N,
        "levels": blocks.Levels(odd(layout.anchors), odd(layout.cells)),
        "rule": blocks.Rule(
            (float_parts(head.band[0]), float_parts(head.band[1])),
            float_parts(head.radius),
            head.scale_range,
            odd(geometry.ends),
        ),
        "frame": blocks.Frame(geometry.size, (1 if head.background else 0, head.num_classes)),
        "SPEC": blocks.MatchSpec(
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


def words_of(head: DenseHead, rows: int) -> int:
    """Integers of a block of anchors that say which of so many rows it has claimed, of a head that asks."""
    return 0 if head.rescue is None else min(MOST_CLAIMS, -(-rows // blocks.LANES.value))


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
def plan(
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
def grad_plan(key: str, preds: tuple[Layout, ...], geometry: Geometry, anchors: int, skip_one: bool) -> Steps:
    """Of the gradient alone."""
    own = Outline()
    return own.steps(_dense_launch(own, key, preds, geometry, anchors, False, True, skip_one))
