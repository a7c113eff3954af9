"""The driver of heads that predict one object a cell: loads and stores their predictions.

Each of the S x S cells of an image predicts N boxes (x, y, a, b), each with a confidence, and C class scores of its
own. Channels are counted N times x, y, a, b, confidence, then the class scores; where a channel lies in memory is said
by :class:`Places`. Every term is a gain times the squared error of a channel, so a program holds CELLS consecutive
cells of the batch as one tile, loaded once (confidences of all cells, the rest of cells with an object) and, as a
gradient, stored once.

A tile is [HIGH, cells, LOW], channel k = high * LOW + low: with LOW channels and 32 / LOW cells side by side in a warp,
accesses still fill sectors, and what is computed once a cell is not computed by 32 threads.

Two launches. The loss decides which row each cell holds and which of its boxes answers for it, and stores that, a
number a cell; it leaves partial sums, which the last program to finish adds up in a fixed order, and, asked for it, the
gradient for a ``grad_out`` of 1. The gradient launch reads what was decided and decides nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .assign import row_cell, row_valid
from .launch import CELL_GROUPS
from .primitives import larger, smaller, weigh
from .regions import edges_of, within
from .rows import in_its_range, load_rows, of_kind, row_weights, rows_end, wrong_offsets
from .sums import column, column_sums, finish, is_last, leave_counts
from .terms.box import similarity
from .terms.records import axis_of_sizes

LOW: tl.constexpr = tl.constexpr(4)
N_PARTS: tl.constexpr = tl.constexpr(8)  # box, confidence, class, cells with an object, invalid rows; the rest is empty
GROUPS: tl.constexpr = tl.constexpr(CELL_GROUPS)
REGIONS: tl.constexpr = tl.constexpr(16)  # rows at a time, where some may be ignored regions


class Part(NamedTuple):
    """Where numbers of one kind lie in an image: the first one, and elements from row to row, column to column, box to
    box (or class to class), and entry to entry of a box."""

    first: Any
    row: Any
    column: Any
    each: Any
    entry: Any


class Places(NamedTuple):
    """Where predictions, or their gradient, lie: elements from image to image, and the parts of an image."""

    image: Any
    boxes: Part
    confidences: Part
    scores: Part


class Map(NamedTuple):
    """Predictions, or their gradient; without a pointer there is none."""

    ptr: Any
    at: Places


class Gains(NamedTuple):
    """What squared errors are multiplied by: of boxes that answer for an object, their confidences, those of the other
    boxes of their cells (None: as all others), all others, and the class scores of cells with an object, with weights
    of classes where there are some."""

    box: Any
    obj: Any
    other: Any
    noobj: Any
    cls: Any
    columns_ptr: Any


class Targets(NamedTuple):
    """The rows of a batch, and their weights."""

    ptr: Any
    offsets_ptr: Any
    row_weights_ptr: Any


class Outputs(NamedTuple):
    """What the loss launch leaves; ``taken_ptr``, a number a cell: its row times N and the box that answers, or -1; of
    a cell in an ignored region, -3 less this. ``done_ptr`` counts finished programs: 0 before and after every launch.
    """

    total_ptr: Any
    parts_ptr: Any
    counts_ptr: Any
    taken_ptr: Any
    cells_ptr: Any  # with BY_IMAGE box, confidence and class loss of each cell, part by part
    partial_ptr: Any
    done_ptr: Any


class Spec(NamedTuple):
    """The structure of a row and the tile of a launch: a kernel is compiled for each. CHANNELS of the ``5 * N + C``
    channels are in a tile, those of all boxes in the first."""

    S: Any
    N: Any
    C: Any
    ROOT: Any
    NEAREST: Any
    RESCORE: Any
    ZEROS: Any  # among the gains
    BY_IMAGE: Any  # a loss of each image
    ACC: Any
    CELLS: Any
    CHANNELS: Any
    BLOCK_G: Any


class Box(NamedTuple):
    """Boxes: centre from the origin of their cell, in cells, and size; of an object in images, of a prediction as it
    comes."""

    x: Any
    y: Any
    w: Any
    h: Any


class Held(NamedTuple):
    """The objects of some cells: which box answers for it, -1 where there is none, and the target of that one's
    confidence, the true box, the class; where rows have weights, that of its row, and whether its other boxes are
    hidden by a region."""

    chosen: Any
    confidence: Any
    truth: Box
    label: Any
    weight: Any
    hidden: Any


@triton.jit
def _channels(k0, CHANNELS: tl.constexpr):
    """The channels from k0 of a tile, [HIGH, LOW]."""
    return k0 + tl.arange(0, CHANNELS // LOW)[:, None] * LOW + tl.arange(0, LOW)[None, :]


@triton.jit
def _column(tile, k, index):
    """One channel of a tile with the channels k, as a vector; ``index`` is one for all cells, [1], or each its own."""
    return tl.sum(tl.sum(tl.where(k[:, None, :] == index[None, :, None], tile, 0.0), axis=0), axis=1)


@triton.jit
def _box(tile, k, j):
    """The j-th box of each cell; j as ``index`` of :func:`_column`."""
    return Box(
        _column(tile, k, 5 * j), _column(tile, k, 5 * j + 1), _column(tile, k, 5 * j + 2), _column(tile, k, 5 * j + 3)
    )


@triton.jit
def _first_rows(targets, first, last, M, B, SPEC: tl.constexpr):
    """Of rows from ``first`` to ``last`` the first object in each cell of the program, M where there is none; and how
    many rows that can be lie in them, to be added up over lanes.

    Each of GROUPS of the cells looks at all rows, a lane each: where a group is a warp none waits for another.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    BLOCK_G: tl.constexpr = SPEC.BLOCK_G
    EACH: tl.constexpr = SPEC.CELLS // GROUPS
    AREA: tl.constexpr = SPEC.S * SPEC.S
    lane = tl.arange(0, GROUPS * BLOCK_G)
    own = tl.arange(0, EACH)[None, :, None]
    owner = tl.zeros([GROUPS, EACH, BLOCK_G], tl.int32) + M  # the first of each cell is found once, after the loop
    valid = tl.zeros([GROUPS * BLOCK_G], tl.int32)
    c0 = tl.program_id(0) * CELLS + lane // BLOCK_G * EACH
    for g0 in range(first, last, BLOCK_G):
        g = g0 + lane % BLOCK_G
        row = load_rows(targets.ptr, g, g < last, GROUPS * BLOCK_G)
        row = of_kind(row, g, g < last, targets.row_weights_ptr, "any")
        b = tl.where((row.image >= 0) & (row.image < B), row.image, -1.0).to(tl.int32)
        cell = row_cell(row.cx, row.cy, row_valid(row, 0, B, SPEC.C, 1.0), 0, SPEC.S, SPEC.S, 0.0)
        at = b * AREA + cell - c0
        here = (b >= 0) & (cell >= 0) & (at >= 0) & (at < EACH)
        here = in_its_range(b, g, here, targets.offsets_ptr)
        valid += here.to(tl.int32)
        if targets.row_weights_ptr is not None:
            here = here & (of_kind(row, g, g < last, targets.row_weights_ptr, "object").image >= 0)
        at = tl.reshape(tl.where(here, at, -1), (GROUPS, 1, BLOCK_G))
        owner = tl.minimum(owner, tl.where(at == own, tl.reshape(g, (GROUPS, 1, BLOCK_G)), M))
    return tl.min(tl.reshape(owner, (CELLS, BLOCK_G)), axis=1), valid


@triton.jit
def _hidden(targets, first, last, B, cells, SPEC: tl.constexpr):
    """Which of the cells have their middle in an ignored region, of rows from ``first`` to ``last``."""
    CELLS: tl.constexpr = SPEC.CELLS
    covered = tl.zeros([CELLS], tl.int32)
    for g0 in range(first, last, REGIONS):
        g = g0 + tl.arange(0, REGIONS)
        row = of_kind(load_rows(targets.ptr, g, g < last, REGIONS), g, g < last, targets.row_weights_ptr, "region")
        b = tl.where((row.image >= 0) & (row.image < B), row.image, -1.0).to(tl.int32)
        there = in_its_range(b, g, row_valid(row, 0, B, SPEC.C, 1.0), targets.offsets_ptr)
        if tl.max(there.to(tl.int32), axis=0) > 0:
            covers = there[None, :] & _covers(row, b, cells, SPEC)
            covered = tl.maximum(covered, tl.max(covers.to(tl.int32), axis=1))
    return covered > 0


@triton.jit
def _rows_of(targets, M, B, cells, SPEC: tl.constexpr):
    """Where the rows begin and end that the cells' images have."""
    first = M * 0
    last = M
    if targets.offsets_ptr is not None:  # from the first row of any of their images to the last
        ranges = targets.offsets_ptr + tl.minimum(cells // (SPEC.S * SPEC.S), B - 1)
        first = tl.minimum(tl.maximum(tl.min(tl.load(ranges), axis=0), 0), M)
        last = tl.minimum(tl.max(tl.load(ranges + 1), axis=0), M)
    return first, last


@triton.jit
def _covers(rows, b, cells, SPEC: tl.constexpr):
    """[cells, rows]: which rows of the images b have the middles of cells in their box, lengths in cells."""
    x1, y1, x2, y2 = edges_of(rows.cx, rows.cy, rows.w, rows.h, SPEC.S, SPEC.S)
    x = (cells % SPEC.S).to(tl.float32) + 0.5
    y = ((cells % (SPEC.S * SPEC.S)) // SPEC.S).to(tl.float32) + 0.5
    inside = within((x1[None, :], y1[None, :], x2[None, :], y2[None, :]), x[:, None], y[:, None])
    return inside & (b[None, :] == (cells // (SPEC.S * SPEC.S))[:, None])


@triton.jit
def _places(part, cells, k, SPEC: tl.constexpr):
    """Pointers to channels k of the cells, as a tile."""
    N: tl.constexpr = SPEC.N
    S: tl.constexpr = SPEC.S
    boxes = part.at.boxes
    confidences = part.at.confidences
    scores = part.at.scores
    j = k // 5
    e = k % 5
    is_cls = k >= 5 * N
    is_conf = e == 4
    start = tl.where(is_conf, confidences.first + j * confidences.each, boxes.first + j * boxes.each + e * boxes.entry)
    start = tl.where(is_cls, scores.first + (k - 5 * N) * scores.each, start)
    down = tl.where(is_cls, scores.row, tl.where(is_conf, confidences.row, boxes.row))
    right = tl.where(is_cls, scores.column, tl.where(is_conf, confidences.column, boxes.column))
    y = ((cells % (S * S)) // S)[None, :, None]
    x = (cells % S)[None, :, None]
    inside = start[:, None, :] + y * down[:, None, :] + x * right[:, None, :]
    return (part.ptr + (cells // (S * S)).to(tl.int64) * part.at.image)[None, :, None] + inside


@triton.jit
def _load_tile(pred, k, cells, inside, has, SPEC: tl.constexpr):
    """The channels k of the cells that have an object; confidences of all."""
    is_cls = k >= 5 * SPEC.N
    always = ((k % 5 == 4) & ~is_cls)[:, None, :]
    there = inside[None, :, None] & (k < 5 * SPEC.N + SPEC.C)[:, None, :]
    mask = there & (always | has[None, :, None])
    return tl.load(_places(pred, cells, k, SPEC), mask=mask, other=0.0).to(SPEC.ACC)


@triton.jit
def _truth(rows_ptr, owner, has, cells, SPEC: tl.constexpr):
    """The true box of each cell with an object, and its class."""
    CELLS: tl.constexpr = SPEC.CELLS
    row = load_rows(rows_ptr, owner, has, CELLS)
    # offsets in the cell: the product is not rounded before the cell is taken off
    side = tl.full([CELLS], SPEC.S, SPEC.ACC)
    x = tl.fma(row.cx.to(SPEC.ACC), side, -(cells % SPEC.S).to(SPEC.ACC))
    y = tl.fma(row.cy.to(SPEC.ACC), side, -((cells % (SPEC.S * SPEC.S)) // SPEC.S).to(SPEC.ACC))
    w = tl.where(has, row.w, 0.0).to(SPEC.ACC)
    h = tl.where(has, row.h, 0.0).to(SPEC.ACC)
    return Box(x, y, w, h), row.label.to(tl.int32)


@triton.jit
def _size(a, ROOT: tl.constexpr):
    """Width or height that a box predicts, held within limits whose squares float32 holds."""
    if ROOT:
        a = a * a
    limit = 1152921504606846976.0  # 2^60
    return smaller(larger(a, -limit), limit)


@triton.jit
def _overlap(box, truth, SPEC: tl.constexpr):
    """IoU of a predicted box and the object, and the square of their distance: of centres and sizes, in images."""
    w = _size(box.w, SPEC.ROOT)
    h = _size(box.h, SPEC.ROOT)
    dx = (box.x - truth.x) / SPEC.S
    dy = (box.y - truth.y) / SPEC.S
    ex = 0.5 * (truth.w - w)
    ey = 0.5 * (truth.h - h)
    iou = similarity(axis_of_sizes(w, truth.w, dx), axis_of_sizes(h, truth.h, dy))
    return iou, dx * dx + dy * dy + 4.0 * (ex * ex + ey * ey)


@triton.jit
def _responsible(tile, k, truth, SPEC: tl.constexpr):
    """The box of each cell that answers for its object, and its IoU.

    It is the one of the largest IoU, the first of equals. If all are 0: with NEAREST the one at the smallest distance,
    the first of equals, otherwise the first. A NaN never wins.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    chosen = tl.zeros([CELLS], tl.int32)
    best = tl.zeros([CELLS], SPEC.ACC)
    nearest = best + float("inf")
    N: tl.constexpr = SPEC.N
    for j in tl.static_range(N):
        iou, distance = _overlap(_box(tile, k, tl.full([1], j, tl.int32)), truth, SPEC)
        better = iou > best
        if SPEC.NEAREST:
            better = better | ((best == 0) & (iou == 0) & (distance < nearest))
        chosen = tl.where(better, j, chosen)
        nearest = tl.where(better, distance, nearest)
        best = tl.where(better, iou, best)
    return chosen, best


@triton.jit
def _squares(tile, k, held, gains, SPEC: tl.constexpr):
    """Loss of a tile with the channels k, and its gradient. A NaN that no term takes shows in the loss all the same."""
    N: tl.constexpr = SPEC.N
    tw = held.truth.w
    th = held.truth.h
    if SPEC.ROOT:
        tw = tl.sqrt(tw)
        th = tl.sqrt(th)
    e = (k % 5)[:, None, :]
    is_cls = (k >= 5 * N)[:, None, :]
    is_conf = (e == 4) & ~is_cls
    mine = (k // 5)[:, None, :] == held.chosen[None, :, None]
    one_hot = ((k - 5 * N)[:, None, :] == held.label[None, :, None]).to(SPEC.ACC)
    size = tl.where(e == 2, tw[None, :, None], th[None, :, None])
    target = tl.where(e == 0, held.truth.x[None, :, None], tl.where(e == 1, held.truth.y[None, :, None], size))
    target = tl.where(is_conf, tl.where(mine, held.confidence[None, :, None], 0.0), target)
    target = tl.where(is_cls, one_hot, target)
    gain = tl.where(mine, tl.cast(gains.obj, SPEC.ACC), tl.cast(gains.noobj, SPEC.ACC))
    if gains.other is not None:
        has = (held.chosen >= 0)[None, :, None]
        gain = tl.where(has & (mine == 0), tl.cast(gains.other, SPEC.ACC), gain)
    gain = tl.where(is_conf, gain, tl.cast(gains.box, SPEC.ACC))
    gain = tl.where(is_cls, tl.cast(gains.cls, SPEC.ACC), gain)
    if gains.columns_ptr is not None:
        own = (k >= 5 * N) & (k < 5 * N + SPEC.C)
        column = tl.load(gains.columns_ptr + (k - 5 * N), mask=own, other=1.0).to(SPEC.ACC)
        gain *= column[:, None, :]
    if held.weight is not None:
        free = tl.where(held.hidden, 0.0, 1.0).to(SPEC.ACC)[None, :, None]
        gain *= tl.where(is_conf & ~mine, free, held.weight[None, :, None])
    used = tl.where(is_cls, (held.chosen >= 0)[None, :, None], is_conf | mine)
    ZEROS: tl.constexpr = SPEC.ZEROS or held.weight is not None or gains.columns_ptr is not None
    error = tile - target
    loss = tl.where(used, weigh(gain, error * error, ZEROS), 0.0)
    return tl.where(tile != tile, tile, loss), tl.where(used, weigh(2.0 * gain, error, ZEROS), 0.0)


@triton.jit
def _of_cells(tile):
    """Of a tile the sums of each cell."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def _terms(tile, k, cells, inside, held, gains, grad, grad_out, SPEC: tl.constexpr):
    """Box, confidence and class loss of a tile with the channels k, with BY_IMAGE of each of its cells; stores its
    gradient where there is a place.
    """
    loss, d = _squares(tile, k, held, gains, SPEC)
    keep = inside[None, :, None] & (k < 5 * SPEC.N + SPEC.C)[:, None, :]
    is_cls = k >= 5 * SPEC.N
    is_conf = (k % 5 == 4) & ~is_cls
    if SPEC.BY_IMAGE:
        loss = tl.where(keep, loss, 0.0)
        box = _of_cells(tl.where((is_cls | is_conf)[:, None, :], 0.0, loss))
        obj = _of_cells(tl.where(is_conf[:, None, :], loss, 0.0))
        cls = _of_cells(tl.where(is_cls[:, None, :], loss, 0.0))
    else:
        sums = tl.sum(tl.where(keep, loss, 0.0), axis=1)
        box = tl.sum(tl.where(is_cls | is_conf, 0.0, sums))
        obj = tl.sum(tl.where(is_conf, sums, 0.0))
        cls = tl.sum(tl.where(is_cls, sums, 0.0))
    if grad.ptr is not None:
        # plus 0, which the compiler does not know to be: else it would hold on to all places of the loads
        to = _places(grad, cells + (tl.num_programs(1) - 1), k, SPEC)
        tl.store(to, (grad_out * d).to(grad.ptr.dtype.element_ty), mask=keep)
    return box, obj, cls


@triton.jit
def _other_scores(pred, cells, inside, held, gains, grad, grad_out, SPEC: tl.constexpr):
    """Class loss of the scores that the first tile has no room for; stores their gradient."""
    CHANNELS: tl.constexpr = SPEC.CHANNELS
    CELLS: tl.constexpr = SPEC.CELLS
    if SPEC.BY_IMAGE:
        loss = tl.zeros([CELLS], SPEC.ACC)
    else:
        loss = tl.cast(0.0, SPEC.ACC)
    for k0 in tl.range(CHANNELS, 5 * SPEC.N + SPEC.C, CHANNELS, loop_unroll_factor=1):
        k = _channels(k0, CHANNELS)
        tile = _load_tile(pred, k, cells, inside, held.chosen >= 0, SPEC)
        _box_loss, _obj, cls = _terms(tile, k, cells, inside, held, gains, grad, grad_out, SPEC)
        loss += cls
    return loss


@triton.jit
def _add_up_image(b, B, outputs, SPEC: tl.constexpr):
    """The parts and the total of an image, of what all programs have left of its cells."""
    AREA: tl.constexpr = SPEC.S * SPEC.S
    total = tl.cast(0.0, SPEC.ACC)
    for i in tl.static_range(3):
        sums = column_sums(outputs.cells_ptr + (i * B + b) * AREA, AREA, 1, SPEC.ACC, 64)
        part = column(sums, 0)
        tl.store(outputs.parts_ptr + i * B + b, part)
        total += part
    tl.store(outputs.total_ptr + b, total)


@triton.jit(do_not_specialize=["B", "M"])
def cell_kernel(pred_ptr, pred_at, grad_ptr, grad_at, targets, gains, outputs, M, B, SPEC: tl.constexpr):
    """Loss of a head of cells, and its gradient where there is a ``grad_ptr``; grid: one program for CELLS of the
    ``B * S * S`` cells, image after image. ``M`` is the number of rows.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cells < B * (SPEC.S * SPEC.S)
    first, last = _rows_of(targets, M, B, cells, SPEC)
    owner, valid = _first_rows(targets, first, last, M, B, SPEC)
    hidden = cells < 0
    if targets.row_weights_ptr is not None:
        hidden = _hidden(targets, first, last, B, cells, SPEC)
    invalid = -valid  # in all lanes, of the whole batch once all programs are added up
    if tl.program_id(0) == 0:
        all_rows = rows_end(targets.offsets_ptr, M, B) + wrong_offsets(targets.offsets_ptr, M, B, SPEC.BLOCK_G)
        invalid += tl.where(tl.arange(0, invalid.shape[0]) == 0, all_rows, 0)
    has = owner < M
    truth, label = _truth(targets.ptr, owner, has, cells, SPEC)
    k = _channels(0, SPEC.CHANNELS)
    pred = Map(pred_ptr, pred_at)
    tile = _load_tile(pred, k, cells, inside, has, SPEC)
    chosen, iou = _responsible(tile, k, truth, SPEC)
    taken = tl.where(has, owner * SPEC.N + chosen, -1)
    weight = None
    if targets.row_weights_ptr is not None:
        taken = tl.where(hidden, -3 - taken, taken)
        weight = row_weights(targets.row_weights_ptr, owner, has, SPEC.ACC)
    tl.store(outputs.taken_ptr + cells, taken, mask=inside)
    confidence = iou
    if not SPEC.RESCORE:
        confidence = tl.full([CELLS], 1.0, SPEC.ACC)
    chosen = tl.where(has, chosen, -1)
    held = Held(chosen, confidence, truth, label, weight, hidden)
    grad = Map(grad_ptr, pred.at if grad_at is None else grad_at)
    one = tl.cast(1.0, SPEC.ACC)
    box, obj, cls = _terms(tile, k, cells, inside, held, gains, grad, one, SPEC)
    cls += _other_scores(pred, cells, inside, held, gains, grad, one, SPEC)

    if SPEC.BY_IMAGE:
        count = B * (SPEC.S * SPEC.S)
        tl.store(outputs.cells_ptr + cells, box, mask=inside)
        tl.store(outputs.cells_ptr + count + cells, obj, mask=inside)
        tl.store(outputs.cells_ptr + 2 * count + cells, cls, mask=inside)
        box = tl.sum(box, axis=0)
        obj = tl.sum(obj, axis=0)
        cls = tl.sum(cls, axis=0)
    part = tl.arange(0, N_PARTS)
    used = tl.sum((chosen >= 0).to(tl.int32), axis=0).to(SPEC.ACC)
    partial = tl.where(part == 3, used, tl.where(part == 4, tl.sum(invalid, axis=0).to(SPEC.ACC), 0.0))
    partial = tl.where(part == 0, box, tl.where(part == 1, obj, tl.where(part == 2, cls, partial)))
    tl.store(outputs.partial_ptr + tl.program_id(0) * N_PARTS + part, partial)
    programs = tl.num_programs(0)
    if is_last(outputs.done_ptr, programs):
        sums = column_sums(outputs.partial_ptr, programs, N_PARTS, SPEC.ACC)
        tl.store(outputs.counts_ptr + 1, column(sums, 4).to(tl.int32))
        if SPEC.BY_IMAGE:
            for b in range(0, B):
                _add_up_image(b, B, outputs, SPEC)
            leave_counts(column(sums, 3), outputs)
        else:
            finish(column(sums, 0), column(sums, 1), column(sums, 2), column(sums, 3), outputs)


@triton.jit(do_not_specialize=["B"])
def cell_grad_kernel(
    pred_ptr, pred_at, grad_ptr, grad_at, rows_ptr, row_weights_ptr, taken_ptr, gains, grad_out_ptr, B,
    SPEC: tl.constexpr, SKIP_ONE: tl.constexpr,
):  # fmt: skip
    """Gradient of the loss times ``grad_out``, of what the loss launch has decided; grid and tile as there.

    SKIP_ONE: it is already there for a ``grad_out`` of 1, and stays as it is in this case.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    cells = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    inside = cells < B * (SPEC.S * SPEC.S)
    if SPEC.BY_IMAGE:
        of_cells = tl.load(grad_out_ptr + cells // (SPEC.S * SPEC.S), mask=inside, other=1.0).to(SPEC.ACC)
        grad_out = of_cells[None, :, None]
        same = tl.min((of_cells == 1.0).to(tl.int32), axis=0) == 1
    else:
        grad_out = tl.load(grad_out_ptr).to(SPEC.ACC)
        same = grad_out == 1.0
    if SKIP_ONE:
        if same:
            return
    taken = tl.load(taken_ptr + cells, mask=inside, other=-1)
    hidden = taken < -1
    if row_weights_ptr is not None:
        taken = tl.where(hidden, -3 - taken, taken)
    has = taken >= 0
    weight = None
    if row_weights_ptr is not None:
        weight = row_weights(row_weights_ptr, taken // SPEC.N, has, SPEC.ACC)
    truth, label = _truth(rows_ptr, taken // SPEC.N, has, cells, SPEC)
    chosen = tl.where(has, taken % SPEC.N, -1)
    k = _channels(0, SPEC.CHANNELS)
    pred = Map(pred_ptr, pred_at)
    tile = _load_tile(pred, k, cells, inside, has, SPEC)
    confidence = tl.full([CELLS], 1.0, SPEC.ACC)
    if SPEC.RESCORE:
        iou, _distance = _overlap(_box(tile, k, chosen), truth, SPEC)
        confidence = tl.where(iou > 0, iou, 0.0)  # a NaN does not answer for an object
    held = Held(chosen, confidence, truth, label, weight, hidden)
    grad = Map(grad_ptr, pred.at if grad_at is None else grad_at)
    _terms(tile, k, cells, inside, held, gains, grad, grad_out, SPEC)
    _other_scores(pred, cells, inside, held, gains, grad, grad_out, SPEC)
