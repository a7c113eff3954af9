"""Boxes of all predictions, and what later launches find ready; of SimOTA also candidates."""

import triton
import triton.language as tl

from ..boxes import store_corners
from ..overlap import Corners
from ..primitives import plain
from ..regions import Candidates, Points, in_regions
from ..rows import image_rows, load_rows
from ..terms.decode import exp, ltrb
from .region import reach
from .site import Cells, Object, object_of, offsets, stride_of
from .views import as_wide, cells_in, entry_of, is_of_branch, is_wide, step_of, tile_of, tiles_of, view_of, wide_mask
from .wish import LAST, near_and_own

SEARCHED: tl.constexpr = tl.constexpr(256)  # rows that are searched at a time for those of an image
ROWS: tl.constexpr = tl.constexpr(32)  # rows that are tested at a time: one a thread of a warp


# ----------------------------------------------------------------------------------------------------------- boxes


@triton.jit
def _side(view, tile, side, mask, SPEC: tl.constexpr, BINS: tl.constexpr, LAYOUT: tl.constexpr):
    """A distance, or another number of a box."""
    at = cells_in(view, tile.cells, tile, LAYOUT)
    step = step_of(view, LAYOUT)
    if SPEC.REG_MAX == 1:
        value = tl.load(at + side * step, mask=mask, other=0.0).to(SPEC.ACC)
    else:
        bins = tl.arange(0, BINS)[:, None]
        ptrs = at[None, :] + (side * SPEC.REG_MAX + bins) * step
        keep = mask[None, :]
        if SPEC.REG_MAX < BINS:
            keep = keep & (bins < SPEC.REG_MAX)
        logits = tl.load(ptrs, mask=keep, other=0.0).to(SPEC.ACC)
        if SPEC.REG_MAX < BINS:
            logits = tl.where(bins < SPEC.REG_MAX, logits, -float("inf"))
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
def _decode_boxes(view, tile, mask, stride, ptr, SPEC: tl.constexpr, BINS: tl.constexpr, LAYOUT: tl.constexpr):
    """Corners in pixels, from the middles of cells."""
    left = _side(view, tile, 0, mask, SPEC, BINS, LAYOUT)
    right = _side(view, tile, 2, mask, SPEC, BINS, LAYOUT)
    x, width = _axis(left, right, SPEC)
    upper = _side(view, tile, 1, mask, SPEC, BINS, LAYOUT)
    lower = _side(view, tile, 3, mask, SPEC, BINS, LAYOUT)
    y, height = _axis(upper, lower, SPEC)
    x1 = (x - 0.5 * width) * stride
    y1 = (y - 0.5 * height) * stride
    x2 = (x + 0.5 * width) * stride
    y2 = (y + 0.5 * height) * stride
    boxes = Corners(x1, y1, x2, y2)
    store_corners(ptr, tile.b.to(tl.int64) * tile.N + tile.first + tile.cells, boxes, mask)
    return boxes


# ------------------------------------------------------------------------------------------------- SimOTA: candidates


@triton.jit
def _candidates(tile, cells, targets, M, frame, numbers, SPEC: tl.constexpr):
    """Which cells of the tile an object makes candidates; only rows that reach the lines of the tile are held against
    each cell, until all are candidates.
    """
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, tile.b, SEARCHED)
    found = tile.mask & (cells.n < 0)
    lines = tl.where(tile.mask, cells.line, tl.min(cells.line, axis=0))
    top = tl.min(lines, axis=0).to(SPEC.ACC) * cells.stride
    bottom = (tl.max(lines, axis=0) + 1).to(SPEC.ACC) * cells.stride
    g0 = first
    while g0 < last:
        g = g0 + tl.arange(0, ROWS)
        rows = object_of(load_rows(targets.ptr, g, g < last, ROWS), g, g < last, targets, frame, SPEC, "object")
        _reach_x, reach_y = reach(rows, cells.stride, numbers, SPEC)
        if SPEC.INSIDE:
            reach_y = tl.maximum(reach_y, 0.5 * rows.height)
        y = rows.cy * frame.height
        left = rows.valid & (rows.image == tile.b) & (y + reach_y > top) & (y - reach_y < bottom)
        lowest = tl.min(tl.where(left, g, LAST), axis=0)
        while lowest < LAST:
            one = _valid_object(targets, lowest, tile, frame, SPEC)
            off_x, off_y = offsets(one, cells, frame, SPEC)
            near, _own = near_and_own(one, off_x, off_y, cells.stride, numbers, SPEC)
            found = found | (near & tile.mask)
            left = left & (g > lowest)
            lowest = tl.min(tl.where(left, g, LAST), axis=0)
        complete = tl.min((found | ~tile.mask).to(tl.int32), axis=0) > 0
        g0 = tl.where(complete, last, g0 + ROWS)
    return found


@triton.jit
def _valid_object(targets, g, tile, frame, SPEC: tl.constexpr):
    """A row that is valid, and of the image of the tile; its class, which nobody asks for, is 0."""
    at = targets.ptr + tl.cast(g, tl.int64) * 6
    return Object(
        g >= 0,
        tile.b,
        0,
        tl.load(at + 2).to(SPEC.ACC),
        tl.load(at + 3).to(SPEC.ACC),
        tl.load(at + 4).to(SPEC.ACC) * frame.width,
        tl.load(at + 5).to(SPEC.ACC) * frame.height,
    )


@triton.jit
def _store_bounds(tile, cells, boxes, chosen, frame, ptr, SPEC: tl.constexpr):
    """Corners in pixels that hold the boxes of candidates, and what rounding may take off; those without a NaN."""
    x = (cells.column.to(SPEC.ACC) + 0.5) * cells.stride
    y = (cells.line.to(SPEC.ACC) + 0.5) * cells.stride
    far = float("inf")
    x1 = tl.min(tl.where(chosen & (boxes.x1 == boxes.x1), x + boxes.x1, far), axis=0)
    y1 = tl.min(tl.where(chosen & (boxes.y1 == boxes.y1), y + boxes.y1, far), axis=0)
    x2 = tl.max(tl.where(chosen & (boxes.x2 == boxes.x2), x + boxes.x2, -far), axis=0)
    y2 = tl.max(tl.where(chosen & (boxes.y2 == boxes.y2), y + boxes.y2, -far), axis=0)
    tl.store(ptr, x1 - 1e-5 * (tl.abs(x1) + frame.width))
    tl.store(ptr + 1, y1 - 1e-5 * (tl.abs(y1) + frame.height))
    tl.store(ptr + 2, x2 + 1e-5 * (tl.abs(x2) + frame.width))
    tl.store(ptr + 3, y2 + 1e-5 * (tl.abs(y2) + frame.height))


@triton.jit
def _store_candidates(tile, cells, boxes, chosen, tiles, decoded, frame, tally, SPEC: tl.constexpr):
    """Puts the candidates of a tile on the list of their image, and costs that others have."""
    first = tile.b.to(tl.int64) * tile.N
    place = chosen.to(tl.int32)
    count = tl.sum(place, axis=0)
    tile_at = (tile.b * tiles + tile.place).to(tl.int64)
    tl.store(decoded.tiles_ptr + tile_at * 2 + 1, count)
    tl.store(decoded.cost_ptr + first + cells.n, tl.zeros_like(boxes.x1) + float("inf"), mask=tile.mask & ~chosen)
    if count > 0:
        _store_bounds(tile, cells, boxes, chosen, frame, decoded.bounds_ptr + tile_at * 4, SPEC)
        begin = tl.atomic_add(tally.found_ptr + 2 + tile.b, count, sem="relaxed")
        tl.store(decoded.tiles_ptr + tile_at * 2, begin)
        own = decoded.list_ptr + first + begin
        tl.store(own + (tl.cumsum(place, axis=0) - place), cells.n, mask=chosen)


# ------------------------------------------------------------------------------------------------------------- all


@triton.jit
def _hidden(tile, stride, targets, M, frame, SPEC: tl.constexpr):
    """Which cells of the tile have their middle in an ignored region, in pixels."""
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, tile.b, SEARCHED)
    line = tile.cells // tile.W
    side = stride.to(tl.float32)
    x = ((tile.cells - line * tile.W).to(tl.float32) + 0.5) * side
    y = (line.to(tl.float32) + 0.5) * side
    points = Points(x, y, tile.mask, (frame.width, frame.height))
    candidates = Candidates(targets.ptr, targets.row_weights_ptr, first, last, tile.b)
    return in_regions(points, candidates, SPEC.C, frame.limit)


@triton.jit
def _decode(
    pid, programs, branch, targets, M, SPEC: tl.constexpr, CELLS: tl.constexpr, BINS: tl.constexpr,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """What a program of a branch does, which has so many."""
    decoded = branch.decoded
    levels = branch.problem.levels
    frame = branch.problem.frame
    tile = tile_of(pid, levels, plain(frame.batch), CELLS)
    stride = stride_of(tile.level, levels, SPEC)
    view = view_of(branch.problem.predictions.box, tile.level)
    wide = tile.HW < 0
    if LAYOUT != "strided":
        wide = is_wide(view, tile, LAYOUT)
    if wide:
        own = as_wide(view, LAYOUT)
        mask = wide_mask(view, tile, LAYOUT)
        boxes = _decode_boxes(own, tile, mask, stride, decoded.boxes_ptr, SPEC, BINS, LAYOUT)
    else:
        boxes = _decode_boxes(view, tile, tile.mask, stride, decoded.boxes_ptr, SPEC, BINS, LAYOUT)
    unknown = (boxes.x1 != boxes.x1) | (boxes.y1 != boxes.y1) | (boxes.x2 != boxes.x2) | (boxes.y2 != boxes.y2)
    if tl.max((unknown & tile.mask).to(tl.int32), axis=0) > 0:
        tl.atomic_max(branch.tally.done_ptr + 3, 1, sem="relaxed")
    for g0 in range(pid * CELLS, M, programs * CELLS):
        g = g0 + tl.arange(0, CELLS)
        tl.store(decoded.done_ptr + g, g * 0, mask=g < M)
    at = tile.b.to(tl.int64) * tile.N + tile.first + tile.cells
    tl.store(decoded.row_ptr + at, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.picker_ptr + at, tl.zeros([CELLS], tl.int32) + M, mask=tile.mask)
    tl.store(decoded.claim_ptr + at, tl.zeros([CELLS], tl.int64), mask=tile.mask)
    score = tl.zeros([CELLS], SPEC.ACC)
    if targets.row_weights_ptr is not None:
        score = tl.where(_hidden(tile, stride, targets, M, frame, SPEC), -1.0, score)
    tl.store(decoded.score_ptr + at, score, mask=tile.mask)
    if SPEC.ASSIGNER == "simota":
        line = tile.cells // tile.W
        cells = Cells(tile.first + tile.cells, tile.level, line, tile.cells - line * tile.W, stride)
        found = _candidates(tile, cells, targets, M, frame, branch.problem.numbers, SPEC)
        tiles = tiles_of(levels, CELLS)
        _store_candidates(tile, cells, boxes, found, tiles, decoded, frame, branch.tally, SPEC=SPEC)


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    branches, targets, M, SPECS: tl.constexpr, CELLS: tl.constexpr, BINS: tl.constexpr, LAYOUT: tl.constexpr
):
    """Boxes of a tile of CELLS cells of an image and level, a program each, branch by branch; see
    :class:`.records.Decoded`.

    ``SPECS``: one a branch; ``BINS``: REG_MAX, a power of two; ``LAYOUT``: of boxes, see :mod:`.views`.
    """
    BRANCHES: tl.constexpr = len(branches)
    programs = tl.num_programs(0) // BRANCHES
    for i in tl.static_range(BRANCHES):
        pid = tl.program_id(0) - i * programs
        if is_of_branch(pid, programs, BRANCHES):
            _decode(pid, programs, branches[i], targets, M, entry_of(SPECS, i), CELLS, BINS=BINS, LAYOUT=LAYOUT)
