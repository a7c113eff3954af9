"""The driver of heads that predict one object a cell: loads and stores their predictions.

Each of the S x S cells of an image predicts N boxes (x, y, a, b), each with a confidence, and C class scores of its
own. Channels are counted N times x, y, a, b, confidence, then the class scores; where a channel lies in memory is said
by three strided views. Every term is a gain times the squared error of a channel, so a program holds CELLS consecutive
cells of the batch as one tile, loaded once (confidences of all cells, the rest of cells with an object) and, as a
gradient, stored once.

A tile is [HIGH, cells, LOW], channel k = high * LOW + low: with LOW channels and 32 / LOW cells side by side in a warp,
accesses still fill sectors, and what is computed once a cell is not computed by 32 threads.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order. WITH_GRAD leaves the
gradient times ``grad_out``, 1 without a pointer to it. SKIP_ONE, of a gradient that is already there for a ``grad_out``
of 1: a program returns at once if it is 1, and overwrites the gradient otherwise.
"""

import triton
import triton.language as tl

from .assign import row_cell
from .primitives import larger, smaller
from .rows import held_range, rows_end, wrong_offsets
from .sums import column, column_sums, is_last
from .terms.box import similarity
from .terms.records import axis_of_sizes

LOW: tl.constexpr = tl.constexpr(4)
N_PARTS: tl.constexpr = tl.constexpr(8)  # box, confidence, class, cells with an object, valid rows; the rest is empty


@triton.jit
def _channels(k0, CHANNELS: tl.constexpr):
    """The channels from k0 of a tile, [HIGH, LOW]."""
    return k0 + tl.arange(0, CHANNELS // LOW)[:, None] * LOW + tl.arange(0, LOW)[None, :]


@triton.jit
def _column(tile, k, index):
    """One channel of a tile with the channels k, as a vector."""
    return tl.sum(tl.sum(tl.where((k == index)[:, None, :], tile, 0.0), axis=0), axis=1)


@triton.jit
def _load_rows(rows_ptr, g, mask):
    """Image, class, cx, cy, w, h of a block of rows, in one access: one of few columns would read as many sectors.

    Rows masked out are zero, and so not valid.
    """
    k = _channels(0, 8)
    keep = mask[None, :, None] & (k < 6)[:, None, :]
    tile = tl.load((rows_ptr + g * 6)[None, :, None] + k[:, None, :], mask=keep, other=0.0)
    return (
        _column(tile, k, 0),
        _column(tile, k, 1),
        _column(tile, k, 2),
        _column(tile, k, 3),
        _column(tile, k, 4),
        _column(tile, k, 5),
    )


@triton.jit
def _first_rows(
    rows_ptr, offsets_ptr, M, c0, last_image, B,
    S: tl.constexpr, C: tl.constexpr, CELLS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The first valid row in each of the cells from c0 to those of ``last_image``, M where there is none; and how many
    lie in them all. With offsets each image is searched in its own range, else all rows at once."""
    lane = tl.arange(0, CELLS)
    owner = tl.zeros([CELLS], tl.int32) + M
    valid = tl.zeros([BLOCK_G], tl.int32)
    image = c0 // (S * S)
    while image <= last_image:
        first = M * 0
        last = M
        if offsets_ptr is not None:
            first, last = held_range(offsets_ptr, M, image)
        for g0 in range(first, last, BLOCK_G):
            g = g0 + tl.arange(0, BLOCK_G)
            row = _load_rows(rows_ptr, g, g < last)
            b = tl.where((row[0] >= 0) & (row[0] < B), row[0], 0.0).to(tl.int32)
            cell = row_cell(row, 0, b, S, S, C, 1.0, False)
            at = b * (S * S) + cell - c0
            here = (cell >= 0) & (at >= 0) & (at < CELLS)
            if offsets_ptr is not None:
                here = here & (b == image)
            valid += here.to(tl.int32)
            if tl.max(here.to(tl.int32), axis=0) > 0:
                hit = here[:, None] & (at[:, None] == lane[None, :])
                owner = tl.minimum(owner, tl.min(tl.where(hit, g[:, None], M), axis=0))
        image += 1
        if offsets_ptr is None:
            image = last_image + 1
    return owner, tl.sum(valid, axis=0)


@triton.jit
def _places(views, cells, k, S: tl.constexpr, N: tl.constexpr):
    """Where channels k of the cells lie: elements from the first one, as a tile.

    ``views`` is the stride from image to image, and for boxes (row, column, box, entry), confidences (row, column, box)
    and class scores (row, column, class) their strides with the place of the first element before them.
    """
    image, box, conf, cls = views
    j = k // 5
    e = k % 5
    is_cls = k >= 5 * N
    is_conf = e == 4
    start = tl.where(is_conf, conf[0] + j * conf[3], box[0] + j * box[3] + e * box[4])
    start = tl.where(is_cls, cls[0] + (k - 5 * N) * cls[3], start)
    down = tl.where(is_cls, cls[1], tl.where(is_conf, conf[1], box[1]))
    right = tl.where(is_cls, cls[2], tl.where(is_conf, conf[2], box[2]))
    y = ((cells % (S * S)) // S)[None, :, None]
    x = (cells % S)[None, :, None]
    inside = start[:, None, :] + y * down[:, None, :] + x * right[:, None, :]
    return ((cells // (S * S)).to(tl.int64) * image)[None, :, None] + inside


@triton.jit
def _size(a, ROOT: tl.constexpr):
    """Width or height that a box predicts, held within limits whose squares float32 holds."""
    if ROOT:
        a = a * a
    limit = 1152921504606846976.0  # 2^60
    return smaller(larger(a, -limit), limit)


@triton.jit
def _overlap(x, y, a, b, truth, S: tl.constexpr, ROOT: tl.constexpr):
    """IoU of a predicted box and the object, and the square of their distance: of centres and sizes, in images."""
    tx, ty, tw, th = truth
    w = _size(a, ROOT)
    h = _size(b, ROOT)
    dx = (x - tx) / S
    dy = (y - ty) / S
    ex = 0.5 * (tw - w)
    ey = 0.5 * (th - h)
    iou = similarity(axis_of_sizes(w, tw, dx, None), axis_of_sizes(h, th, dy, None))
    return iou, dx * dx + dy * dy + 4.0 * (ex * ex + ey * ey)


@triton.jit
def _responsible(
    tile, k, truth,
    S: tl.constexpr, N: tl.constexpr, ROOT: tl.constexpr, NEAREST: tl.constexpr, CELLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The box of each cell that answers for its object, and its IoU.

    It is the one of the largest IoU, the first of equals. If all are 0: with NEAREST the one at the smallest distance,
    the first of equals, otherwise the first. A NaN never wins.
    """
    chosen = tl.zeros([CELLS], tl.int32)
    best = tl.zeros([CELLS], ACC)
    nearest = best + float("inf")
    for j in tl.static_range(N):
        iou, distance = _overlap(
            _column(tile, k, 5 * j),
            _column(tile, k, 5 * j + 1),
            _column(tile, k, 5 * j + 2),
            _column(tile, k, 5 * j + 3),
            truth,
            S,
            ROOT,
        )
        better = iou > best
        if NEAREST:
            better = better | ((best == 0) & (iou == 0) & (distance < nearest))
        chosen = tl.where(better, j, chosen)
        nearest = tl.where(better, distance, nearest)
        best = tl.where(better, iou, best)
    return chosen, best


@triton.jit
def _squares(
    tile, k, has, chosen, confidence, truth, label, numbers,
    N: tl.constexpr, ROOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loss of a tile with the channels k, and its gradient.

    ``has`` says which cells hold an object, ``chosen`` which of their boxes answers for it (-1 without one) and
    ``confidence`` that one's target. A NaN that no term takes shows in the loss all the same.
    """
    box_gain, obj_gain, noobj_gain, cls_gain = numbers
    tx, ty, tw, th = truth
    if ROOT:
        tw = tl.sqrt(tw)
        th = tl.sqrt(th)
    e = (k % 5)[:, None, :]
    is_cls = (k >= 5 * N)[:, None, :]
    is_conf = (e == 4) & ~is_cls
    mine = (k // 5)[:, None, :] == chosen[None, :, None]
    one_hot = ((k - 5 * N)[:, None, :] == label[None, :, None]).to(ACC)
    size = tl.where(e == 2, tw[None, :, None], th[None, :, None])
    target = tl.where(e == 0, tx[None, :, None], tl.where(e == 1, ty[None, :, None], size))
    target = tl.where(is_conf, tl.where(mine, confidence[None, :, None], 0.0), target)
    target = tl.where(is_cls, one_hot, target)
    gain = tl.where(is_conf, tl.where(mine, tl.cast(obj_gain, ACC), tl.cast(noobj_gain, ACC)), tl.cast(box_gain, ACC))
    gain = tl.where(is_cls, tl.cast(cls_gain, ACC), gain)
    used = tl.where(is_cls, has[None, :, None], is_conf | mine)
    error = tile - target
    loss = tl.where(used, gain * (error * error), 0.0)
    return tl.where(tile != tile, tile, loss), tl.where(used, 2.0 * gain * error, 0.0)


@triton.jit
def _channel_terms(
    d_ptr, d_views, tile, k, cells, end, has, chosen, confidence, truth, label, numbers, grad_out,
    S: tl.constexpr, N: tl.constexpr, C: tl.constexpr, ROOT: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Box, confidence and class loss of a tile with the channels k; stores its gradient."""
    box = tl.cast(0.0, ACC)
    obj = tl.cast(0.0, ACC)
    cls = tl.cast(0.0, ACC)
    loss, d = _squares(tile, k, has, chosen, confidence, truth, label, numbers, N, ROOT, ACC)
    keep = (cells < end)[None, :, None] & (k < 5 * N + C)[:, None, :]
    if WITH_LOSS:
        sums = tl.sum(tl.where(keep, loss, 0.0), axis=1)
        is_cls = k >= 5 * N
        is_conf = (k % 5 == 4) & ~is_cls
        box = tl.sum(tl.where(is_cls | is_conf, 0.0, sums))
        obj = tl.sum(tl.where(is_conf, sums, 0.0))
        cls = tl.sum(tl.where(is_cls, sums, 0.0))
    if WITH_GRAD:
        to = d_ptr + _places(d_views, cells, k, S, N)
        tl.store(to, (grad_out * d).to(d_ptr.dtype.element_ty), mask=keep)
    return box, obj, cls


@triton.jit(do_not_specialize=["B", "M"])
def cell_kernel(
    pred_ptr, d_ptr, views, d_views, rows_ptr, offsets_ptr, M, grad_out_ptr, numbers, B,
    total_ptr, parts_ptr, counts_ptr, partial_ptr, done_ptr,
    S: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    ROOT: tl.constexpr, NEAREST: tl.constexpr, RESCORE: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, SKIP_ONE: tl.constexpr, ACC: tl.constexpr,
    CELLS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of a head of cells; grid: one program for CELLS of the B * S * S cells, image after image.

    ``views`` and ``d_views`` are the strides of predictions and gradient, see :func:`_places`; CHANNELS of the
    ``5 * N + C`` channels are in a tile, those of all boxes in the first. ``done_ptr`` counts finished programs: 0
    before and after every launch.
    """
    grad_out = tl.cast(1.0, ACC)
    if grad_out_ptr is not None:
        grad_out = tl.load(grad_out_ptr).to(ACC)
    if SKIP_ONE:
        if grad_out == 1.0:
            return
    c0 = tl.program_id(0) * CELLS
    end = B * (S * S)
    last_image = (tl.minimum(c0 + CELLS, end) - 1) // (S * S)
    owner, valid = _first_rows(rows_ptr, offsets_ptr, M, c0, last_image, B, S, C, CELLS, BLOCK_G)
    has = owner < M
    row = _load_rows(rows_ptr, owner, has)
    cells = c0 + tl.arange(0, CELLS)
    # offsets in the cell: the product is not rounded before the cell is taken off
    side = tl.full([CELLS], S, ACC)
    tx = tl.fma(row[2].to(ACC), side, -(cells % S).to(ACC))
    ty = tl.fma(row[3].to(ACC), side, -((cells % (S * S)) // S).to(ACC))
    truth = (tx, ty, row[4].to(ACC), row[5].to(ACC))
    label = row[1].to(tl.int32)

    k = _channels(0, CHANNELS)
    inside = (cells < end)[None, :, None]
    always = ((k < 5 * N) & (k % 5 == 4))[:, None, :]  # confidences
    mask = inside & (k < 5 * N + C)[:, None, :] & (always | has[None, :, None])
    tile = tl.load(pred_ptr + _places(views, cells, k, S, N), mask=mask, other=0.0).to(ACC)
    chosen, iou = _responsible(tile, k, truth, S, N, ROOT, NEAREST, CELLS, ACC)
    chosen = tl.where(has, chosen, -1)
    confidence = iou
    if not RESCORE:
        confidence = tl.full([CELLS], 1.0, ACC)

    box, obj, cls = _channel_terms(
        d_ptr, d_views, tile, k, cells, end, has, chosen, confidence, truth, label, numbers, grad_out,
        S, N, C, ROOT, WITH_LOSS, WITH_GRAD, ACC,
    )  # fmt: skip
    for k0 in tl.range(CHANNELS, 5 * N + C, CHANNELS, loop_unroll_factor=1):  # class scores that are left
        k = _channels(k0, CHANNELS)
        mask = inside & (k < 5 * N + C)[:, None, :] & has[None, :, None]
        tile = tl.load(pred_ptr + _places(views, cells, k, S, N), mask=mask, other=0.0).to(ACC)
        _box, _obj, more = _channel_terms(
            d_ptr, d_views, tile, k, cells, end, has, chosen, confidence, truth, label, numbers, grad_out,
            S, N, C, ROOT, WITH_LOSS, WITH_GRAD, ACC,
        )  # fmt: skip
        cls += more

    if WITH_LOSS:
        part = tl.arange(0, N_PARTS)
        used = tl.sum(has.to(tl.int32), axis=0).to(ACC)
        partial = tl.where(part == 3, used, tl.where(part == 4, valid.to(ACC), 0.0))
        partial = tl.where(part == 0, box, tl.where(part == 1, obj, tl.where(part == 2, cls, partial)))
        tl.store(partial_ptr + tl.program_id(0) * N_PARTS + part, partial)
        programs = tl.num_programs(0)
        if is_last(done_ptr, programs):
            sums = column_sums(partial_ptr, programs, N_PARTS, ACC)
            box = column(sums, 0)
            obj = column(sums, 1)
            cls = column(sums, 2)
            invalid = rows_end(offsets_ptr, M, B) - column(sums, 4).to(tl.int32)
            tl.store(parts_ptr, box)
            tl.store(parts_ptr + 1, obj)
            tl.store(parts_ptr + 2, cls)
            tl.store(total_ptr, box + obj + cls)
            tl.store(counts_ptr, column(sums, 3).to(tl.int32))
            tl.store(counts_ptr + 1, invalid + wrong_offsets(offsets_ptr, M, B, BLOCK_G))
            tl.store(done_ptr, 0)  # ready for the next launch
