"""The cells of all levels, and pairs of target rows and cells.

Where values are at hand only pairs that can be are there, in a list; elsewhere all are, for shapes are to depend on
shapes only. Either way rows come by the chunk, so that nothing is ever as large as rows times predictions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import chunks
from .primitives import at_hand


class Lines(NamedTuple):
    """The columns of cells of all levels, or the lines; K in all."""

    middle: Tensor  # [K] in pixels, float64
    stride: Tensor  # [K] pixels per cell, float64
    level: Tensor  # [K] int64
    of: Tensor  # [N] int64: the one that each cell lies in


class Points(NamedTuple):
    """The N cells of all levels."""

    middle: Tensor  # [N, 2] in pixels, float64
    stride: Tensor  # [N] pixels per cell, float64
    columns: Lines
    lines: Lines
    before: Tensor  # [lines] int64: what a column of a line adds to is its cell


class Pairs(NamedTuple):
    """P pairs of one of some rows and a prediction of its image, by row, and of a row by prediction."""

    first: int  # row of these; where they end may be a symbol, which a record would make a number
    row: Tensor  # [P] int64
    cell: Tensor  # [P] int64: the prediction
    can: Tensor  # [P] bool: others are here for their shape
    table: Tensor  # [rows, W] int64: the pairs of each row, -1 behind them


def points_of(maps: Sequence[tuple[int, int]], strides: Sequence[float], device: torch.device) -> Points:
    """The cells of maps of such (height, width), level by level, row by row."""
    column, line, before = [], [], []
    cells, high, wide = 0, 0, 0
    for H, W in maps:
        x, y = torch.arange(wide, wide + W, device=device), torch.arange(H, device=device)
        column.append(x.expand(H, W).flatten())
        line.append((y + high)[:, None].expand(H, W).flatten())
        before.append(y * W + (cells - wide))
        cells, high, wide = cells + H * W, high + H, wide + W
    columns = _lines([W for _, W in maps], strides, torch.cat(column))
    lines = _lines([H for H, _ in maps], strides, torch.cat(line))
    middle = torch.stack([each.middle[each.of] for each in (columns, lines)], 1)
    return Points(middle, lines.stride[lines.of], columns, lines, torch.cat(before))


def _lines(counts: Sequence[int], strides: Sequence[float], of: Tensor) -> Lines:
    """So many a level, of which cells lie in those that ``of`` says."""
    middles, each, levels = [], [], []
    for level, (count, stride) in enumerate(zip(counts, strides, strict=True)):
        middles.append((torch.arange(count, device=of.device, dtype=torch.float64) + 0.5) * stride)
        each.append(torch.full_like(middles[-1], stride))
        levels.append(of.new_full((count,), level))
    return Lines(torch.cat(middles), torch.cat(each), torch.cat(levels), of)


def row_chunks(M: int, N: int) -> Iterator[slice]:
    """Those of M rows, without the one behind them."""
    for now in chunks(M, N):
        yield slice(now.start, min(now.stop, M))


def cells(x: Tensor, y: Tensor, points: Points) -> Tensor:
    """[rows, N] bool: those in columns ``x`` [rows, .] and in lines ``y`` [rows, .]."""
    return x.index_select(1, points.columns.of) & y.index_select(1, points.lines.of)


def listed_pairs(rows: slice, row: Tensor, cell: Tensor, k: int) -> Pairs:
    """Pairs of ``rows``, of which ``row`` counts from the first; a place for ``k`` of each at least."""
    count = row.bincount(minlength=rows.stop - rows.start)
    order = torch.arange(len(row), device=row.device)
    table = order.new_full((len(count), max(k, int(count.max()))), -1)
    table[row, order - (count.cumsum(0) - count)[row]] = order
    return Pairs(rows.start, row + rows.start, cell, torch.ones_like(row, dtype=torch.bool), table)


def all_pairs(rows: slice, can: Tensor) -> Pairs:
    """Pairs of ``rows`` and all predictions, [rows, N] of which can be."""
    N = can.shape[1]
    order = torch.arange(can.numel(), device=can.device)
    return Pairs(rows.start, rows.start + order // N, order % N, can.flatten(), order.view_as(can))


def pairs_of(rows: slice, can: Tensor, k: int) -> Pairs:
    """Pairs of ``rows`` and predictions that can be, [rows, N]."""
    if at_hand(can):
        row, cell = can.nonzero(as_tuple=True)
        return listed_pairs(rows, row, cell, k)
    return all_pairs(rows, can)


def pairs_within(rows: slice, x: Tensor, y: Tensor, points: Points, k: int) -> Pairs:
    """Pairs of ``rows`` and the cells in their columns ``x`` [rows, .] and lines ``y`` [rows, .]."""
    if not at_hand(x):
        return all_pairs(rows, cells(x, y, points))
    row, line = y.nonzero(as_tuple=True)  # neither is of as many as there are cells
    at, column = (x[row] & (points.columns.level == points.lines.level[line, None])).nonzero(as_tuple=True)
    return listed_pairs(rows, row[at], points.before[line[at]] + column, k)


def widest(x: Tensor, y: Tensor, points: Points) -> int:
    """How many cells lie in columns ``x`` [rows, .] and lines ``y`` [rows, .] of a row, of the one that has most."""
    levels = int(points.lines.level[-1]) + 1
    wide, high = (
        mask.new_zeros(len(mask), levels, dtype=torch.int32).index_add_(1, lines.level, mask.int())
        for mask, lines in ((x, points.columns), (y, points.lines))
    )
    return int((wide * high).sum(1).max())
