"""Losses over cells that predict a box each, of which every object picks a few: operators, autograd, launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..heads import PickHead, pick_head_from_key
from ..kernels.picks import loss, records
from ..terms import TERMS
from .launch import Launch, Layout, accumulator, done_counter, layouts, odd, planned
from .picking import Maps, fill_parts, parts_of


class HeadConfig(NamedTuple):
    """Tile of the launch of loss and gradient: cells of a program, channels at a time, classes of a program, cells with
    a row at a time, threads.
    """

    cells: int
    planes: int
    group: int
    picks: int
    threads: int = 128
    max_registers: int = 128


NUMBERS = 8192  # at most that many a program, of classes


def head_config(largest_map: int, layout: str, classes: int) -> HeadConfig:
    """For maps of at most so many cells. Four planes of a wide tile at a time, or where channels follow each other 16
    of them, of each cell two sectors; classes are shared out evenly.
    """
    cells, planes, picks = (64, 16, 16) if layout == "channels" else (256, 4, 32)
    while cells > 64 and cells >= 2 * largest_map:
        cells //= 2
    tiles = _ceil(classes, planes)
    programs = _ceil(tiles * planes * cells, NUMBERS)
    return HeadConfig(cells, planes, _ceil(tiles, programs) * planes, picks)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


class Geometry(NamedTuple):
    """What is known of the levels of a call beside its tensors."""

    form: str  # of the predictions
    maps: Maps
    size: tuple[float, float]  # (height, width) of the image


class Assignment(NamedTuple):
    """What the launches before the last one leave for it, and for another one of that kind."""

    boxes: Tensor  # [B, N, 4]
    row: Tensor  # int32 [B, N]; the number of rows where there is none
    score: Tensor  # [B, N], of no meaning where there is no row
    norm: Tensor  # 0-dim
    nans: Tensor  # 0-dim


@lru_cache(maxsize=256)
def _terms(key: str) -> tuple[loss.HeadTerms, tuple[float, ...]]:
    """Functions of a head, and the numbers of its class term as this takes them."""
    head = pick_head_from_key(key)
    label = TERMS[head.label]
    return loss.HeadTerms(TERMS[head.box].kernel, label.kernel), label.kernel_args(head.label_args)


def _plain(numbers: tuple[int, ...]) -> list[int]:
    return [(number - 3) // 2 for number in numbers]


def _lies(parts: Sequence[records.Predictions], maps: Maps) -> str:
    """The layout of predictions and gradients, see ``kernels/picks/loss.py``."""
    found = set()
    for each in parts:
        for part in each:
            if part is None:
                continue
            for by, (_, width) in zip(part.by, maps, strict=True):
                _, row, column, _, channel = _plain(by)
                if row != width * column:
                    found.add("strided")
                else:
                    found.add("planes" if column == 1 else "channels" if channel == 1 else "strided")
    return found.pop() if len(found) == 1 else "strided"


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
    head, (terms, label_args), batch = pick_head_from_key(key), _terms(key), preds[0].shape[0]
    form, maps, (height, width) = geometry
    predictions = parts_of(form, preds, key, maps)
    gradient = predictions if grads is None else parts_of(form, grads, key, maps)
    lies = _lies((predictions, gradient), maps)
    areas = [rows * columns for rows, columns in maps]
    config = head_config(max(areas), lies, head.num_classes)
    spec = loss.HeadSpec(
        C=head.num_classes,
        REG_MAX=head.reg_max,
        BINS=1 << (head.reg_max - 1).bit_length(),
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
        LANES=1 << (config.group - 1).bit_length(),
        PICKS=config.picks,
    )
    arguments = {
        "levels": records.Levels(
            odd(tuple(columns for _, columns in maps)), odd(tuple(rows for rows, _ in maps)), tuple(head.strides)
        ),
        "B": batch,
        "terms": terms,
        "numbers": loss.HeadNumbers((float(width), float(height)), head.box_args, label_args),
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
            "targets": records.Targets(rows, None, class_weights),
            "M": rows.shape[0],
            "assigned": loss.Assigned(*assignment),
            "gains": tuple(gains),
            "grads": (None,) * (1 + len(head.parts)) if grad_outs is None else tuple(grad_outs),
            "list_ptr": rows.new_empty(plan.listed, dtype=torch.int32),
            "sums": sums,
        }
    )
