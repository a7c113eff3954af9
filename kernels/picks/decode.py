"""Boxes of all predictions, and what later launches find ready; of SimOTA also candidates, and their shared costs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import integer_of
from ..primitives import plain
from ..rows import image_rows, load_rows
from ..terms.decode import exp, ltrb
from .site import Cells, all_cells, cells_before, load_object, object_of, offsets, stride_of
from .wish import log_miss, near_and_own, reach

ROWS: tl.constexpr = tl.constexpr(32)  # rows that are tested at a time: one a thread of a warp


class Tile(NamedTuple):
    """The cells of a program."""

    b: Any
    cells: Cells
    mask: Any


@triton.jit
def _tile(levels, batch, SPEC: tl.constexpr, CELLS: tl.constexpr):
    """The tile of a program: levels one after the other, in each the tiles of image by image."""
    pid = tl.program_id(0)
    level = pid * 0
    local = pid
    first_n = pid * 0
    start = pid * 0
    for i in tl.static_range(len(levels.widths)):
        programs = batch * tl.cdiv(plain(levels.widths[i]) * plain(levels.heights[i]), CELLS)
        here = pid >= start
        level = tl.where(here, i, level)
        local = tl.where(here, pid - start, local)
        first_n = tl.where(here, cells_before(levels, i), first_n)
        start += programs
    W = integer_of(levels.widths, level)
    HW = W * integer_of(levels.heights, level)
    tiles = tl.cdiv(HW, CELLS)
    b = local // tiles
    cell = (local - b * tiles) * CELLS + tl.arange(0, CELLS)
    line = cell // W
    cells = Cells(first_n + cell, level, line, cell - line * W, stride_of(level, levels, SPEC))
    return Tile(b, cells, cell < HW)


@triton.jit
def _base(part, tile):
    """Where the first channel of each cell lies, and the elements from channel to channel."""
    ptr = part.ptrs[0] + plain(part.starts[0]) + tile.b.to(tl.int64) * plain(part.by[0].image)
    row = plain(part.by[0].row)
    column = plain(part.by[0].column)
    step = plain(part.by[0].channel)
    for i in tl.static_range(1, len(part.ptrs)):
        here = tile.cells.level == i
        own = part.ptrs[i] + plain(part.starts[i]) + tile.b.to(tl.int64) * plain(part.by[i].image)
        ptr = tl.where(here, own, ptr)
        row = tl.where(here, plain(part.by[i].row), row)
        column = tl.where(here, plain(part.by[i].column), column)
        step = tl.where(here, plain(part.by[i].channel), step)
    at = ptr + (tile.cells.line.to(tl.int64) * row + tile.cells.column.to(tl.int64) * column)
    return at, tl.cast(step, tl.int64)


@triton.jit
def _side(at, step, side, mask, SPEC: tl.constexpr, BINS: tl.constexpr):
    """A distance, or another number of a box."""
    if SPEC.REG_MAX == 1:
        value = tl.load(at + side * step, mask=mask, other=0.0).to(SPEC.ACC)
    else:
        bins = tl.arange(0, BINS)[:, None]
        ptrs = (at + side * (SPEC.REG_MAX * step))[None, :] + bins * step
        logits = tl.load(ptrs, mask=mask[None, :] & (bins < SPEC.REG_MAX), other=-float("inf")).to(SPEC.ACC)
        e = tl.exp(logits - tl.max(logits, axis=0)[None, :])  # a NaN stays one
        value = tl.sum(e * bins.to(SPEC.ACC), axis=0) / tl.sum(e, axis=0)
    return value


@triton.jit
def _axis(a, b, SPEC: tl.constexpr):
    """Shift and size on an axis, in cells."""
    one = tl.full([], 1.0, SPEC.ACC)
    if SPEC.DECODE == "exp":
        span, _jacobian = exp(a, b, one, one, one)
        shift = a - 0.5
    else:
        span, _jacobian = ltrb(a, b, one, one, one)
        shift = span.centre
    return shift, span.size


@triton.jit
def _store_boxes(decoded, part, tile, at_cell, SPEC: tl.constexpr, BINS: tl.constexpr):
    """Corners in pixels, from the middles of cells."""
    at, step = _base(part, tile)
    x, width = _axis(_side(at, step, 0, tile.mask, SPEC, BINS), _side(at, step, 2, tile.mask, SPEC, BINS), SPEC)
    y, height = _axis(_side(at, step, 1, tile.mask, SPEC, BINS), _side(at, step, 3, tile.mask, SPEC, BINS), SPEC)
    stride = tile.cells.stride
    to = decoded.boxes_ptr + at_cell * 4
    tl.store(to, (x - 0.5 * width) * stride, mask=tile.mask)
    tl.store(to + 1, (y - 0.5 * height) * stride, mask=tile.mask)
    tl.store(to + 2, (x + 0.5 * width) * stride, mask=tile.mask)
    tl.store(to + 3, (y + 0.5 * height) * stride, mask=tile.mask)


@triton.jit
def _candidates(tile, targets, M, frame, numbers, SPEC: tl.constexpr):
    """Which cells of the tile an object makes candidates, and which are of its own; only rows that reach the lines of
    the tile are held against each cell.
    """
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, tile.b, ROWS)
    cells = tile.cells
    found = tile.mask & (cells.n < 0)
    taken = found
    lines = tl.where(tile.mask, cells.line, tl.min(cells.line, axis=0))
    top = tl.min(lines, axis=0).to(SPEC.ACC) * cells.stride
    bottom = (tl.max(lines, axis=0) + 1).to(SPEC.ACC) * cells.stride
    for g0 in range(first, last, ROWS):
        g = g0 + tl.arange(0, ROWS)
        rows = object_of(load_rows(targets.ptr, g, g < last, ROWS), g, g < last, targets, frame, SPEC)
        _reach_x, reach_y = reach(rows, cells.stride, numbers, SPEC)
        if SPEC.INSIDE:
            reach_y = tl.maximum(reach_y, 0.5 * rows.height)
        y = rows.cy * frame.height
        left = rows.valid & (rows.image == tile.b) & (y + reach_y > top) & (y - reach_y < bottom)
        count = tl.sum(left.to(tl.int32), axis=0)
        while count > 0:
            lowest = tl.min(tl.where(left, g, last), axis=0)
            left = left & (g > lowest)
            count -= 1
            one = load_object(targets, lowest, M, frame, SPEC)
            off_x, off_y = offsets(one, cells, frame, SPEC)
            near, own = near_and_own(one, off_x, off_y, cells.stride, numbers, SPEC)
            found = found | (near & tile.mask)
            taken = taken | own
    return found, taken


@triton.jit
def _shared_costs(predictions, tile, chosen, SPEC: tl.constexpr):
    """What the true class does not change in the costs of chosen cells."""
    CELLS: tl.constexpr = chosen.shape[0]
    at, _step = _base(predictions.obj, tile)
    obj = tl.load(at, mask=chosen, other=0.0).to(SPEC.ACC)
    at, step = _base(predictions.cls, tile)
    total = tl.zeros([CELLS], SPEC.ACC)
    for _c in range(SPEC.C):
        total -= log_miss(tl.load(at, mask=chosen, other=0.0).to(SPEC.ACC), obj)
        at += step
    return total


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    predictions, levels, targets, M, frame, numbers, decoded, tally, SPEC: tl.constexpr, CELLS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Boxes of a tile of CELLS cells of an image and level, a program each; see :class:`.records.Decoded`."""
    tile = _tile(levels, plain(frame.batch), SPEC, CELLS)
    N = all_cells(levels)
    at_cell = tile.b.to(tl.int64) * N + tile.cells.n
    _store_boxes(decoded, predictions.box, tile, at_cell, SPEC, BINS)
    tl.store(decoded.row_ptr + at_cell, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.picker_ptr + at_cell, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.claim_ptr + at_cell, tl.zeros([CELLS], tl.int64), mask=tile.mask)
    if SPEC.ASSIGNER == "simota":
        chosen, taken = _candidates(tile, targets, M, frame, numbers, SPEC)
        costs = tl.zeros([CELLS], SPEC.ACC) + float("inf")
        if tl.max(chosen.to(tl.int32), axis=0) > 0:
            shared = _shared_costs(predictions, tile, chosen, SPEC)
            known = chosen & (shared == shared)
            costs = tl.where(known, shared, costs)
            place = known.to(tl.int32)
            count = tl.sum(place, axis=0)
            place = tl.cumsum(place, axis=0) - place + tl.atomic_add(tally.found_ptr + 2 + tile.b, count, sem="relaxed")
            to = decoded.list_ptr + tile.b.to(tl.int64) * N + place
            tl.store(to, tl.where(taken, tile.cells.n, -1 - tile.cells.n), mask=known)
            if count < tl.sum(chosen.to(tl.int32), axis=0):
                tl.atomic_max(tally.done_ptr + 2, 1, sem="relaxed")
        tl.store(decoded.cost_ptr + at_cell, costs, mask=tile.mask)
