"""Boxes of all predictions, and what later launches find ready; of SimOTA also candidates, and their shared costs."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import integer_of
from ..primitives import plain
from ..rows import image_rows, load_rows
from ..terms.decode import exp, ltrb
from .site import (
    Cells,
    all_cells,
    cells_before,
    channel_at,
    channel_step,
    load_channel,
    load_object,
    object_of,
    offsets,
    stride_of,
)
from .wish import log_miss, near_and_own, reach

ROWS: tl.constexpr = tl.constexpr(32)  # rows that are tested at a time: one a thread of a warp
CHOSEN: tl.constexpr = tl.constexpr(32)  # candidates whose classes are read at a time


class Tile(NamedTuple):
    """The cells of a program."""

    b: Any
    N: Any  # cells of an image
    first_n: Any  # of the level
    W: Any
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
    return Tile(b, all_cells(levels), first_n, W, cells, cell < HW)


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
    at = channel_at(part, tile.b, 0, tile.cells)
    step = tl.cast(channel_step(part, tile.cells.level), tl.int64)
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
def _shared_costs(predictions, b, cells, mask, SPEC: tl.constexpr, ACROSS: tl.constexpr):
    """What the true class does not change in the costs of cells."""
    obj = load_channel(predictions.obj, b, 0, cells, mask, SPEC)[None, :]
    at = channel_at(predictions.cls, b, 0, cells)[None, :]
    step = tl.cast(channel_step(predictions.cls, tl.max(cells.level, axis=0)), tl.int64)
    total = tl.zeros([ACROSS, cells.n.shape[0]], SPEC.ACC)
    for c0 in range(0, SPEC.C, ACROSS):
        c = c0 + tl.arange(0, ACROSS)[:, None]
        used = mask[None, :] & (c < SPEC.C)
        cls = tl.load(at + c * step, mask=used, other=0.0).to(SPEC.ACC)
        total -= tl.where(used, log_miss(cls, obj), 0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _store_candidates(predictions, tile, chosen, taken, decoded, tally, SPEC: tl.constexpr, ACROSS: tl.constexpr):
    """Lists the candidates of a tile, and stores what they share, which others do not."""
    first = tile.b.to(tl.int64) * tile.N
    place = chosen.to(tl.int32)
    count = tl.sum(place, axis=0)
    if count > 0:
        base = tl.atomic_add(tally.found_ptr + 2 + tile.b, count, sem="relaxed")
        to = decoded.list_ptr + first + base
        n = tile.cells.n
        tl.store(to + (tl.cumsum(place, axis=0) - place), tl.where(taken, n, -1 - n), mask=chosen)
        tl.debug_barrier()  # in this list they are neighbours, so that no thread idles
        for i0 in range(0, count, CHOSEN):
            i = i0 + tl.arange(0, CHOSEN)
            entry = tl.load(to + i, mask=i < count, other=tl.min(n, axis=0))
            n_chosen = tl.where(entry < 0, -1 - entry, entry)
            own = n_chosen - tile.first_n
            line = own // tile.W
            cells = Cells(n_chosen, own * 0 + tile.cells.level, line, own - line * tile.W, tile.cells.stride)
            shared = _shared_costs(predictions, tile.b, cells, i < count, SPEC, ACROSS)
            known = shared == shared
            costs = tl.where(known, shared, float("inf"))
            tl.store(decoded.cost_ptr + first + n_chosen, costs, mask=i < count)
            if tl.max(((i < count) & ~known).to(tl.int32), axis=0) > 0:
                tl.atomic_max(tally.done_ptr + 2, 1, sem="relaxed")


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    predictions, levels, targets, M, frame, numbers, decoded, tally, SPEC: tl.constexpr, CELLS: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Boxes of a tile of CELLS cells of an image and level, a program each; see :class:`.records.Decoded`."""
    tile = _tile(levels, plain(frame.batch), SPEC, CELLS)
    at_cell = tile.b.to(tl.int64) * tile.N + tile.cells.n
    _store_boxes(decoded, predictions.box, tile, at_cell, SPEC, BINS)
    tl.store(decoded.row_ptr + at_cell, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.picker_ptr + at_cell, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.claim_ptr + at_cell, tl.zeros([CELLS], tl.int64), mask=tile.mask)
    tl.store(decoded.score_ptr + at_cell, tl.zeros([CELLS], SPEC.ACC), mask=tile.mask)
    if SPEC.ASSIGNER == "simota":
        chosen, taken = _candidates(tile, targets, M, frame, numbers, SPEC)
        tl.store(decoded.cost_ptr + at_cell, tl.zeros([CELLS], SPEC.ACC) + float("inf"), mask=tile.mask & ~chosen)
        _store_candidates(predictions, tile, chosen, taken, decoded, tally, SPEC, CELLS // CHOSEN)
