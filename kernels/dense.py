"""The driver of heads with many anchors, each with the logits of all classes: loads and stores their predictions.

One launch for all levels. Some of its programs own class logits, the others boxes (and centreness); each reads from
``match`` which row its anchors have taken, see ``match.py``. Class logits are read once and their gradient stored once;
boxes are read where an anchor has a row, and their gradient is stored everywhere.

Layouts. FLAT: ``[B, N, C]`` and ``[B, N, 4]`` without gaps, or maps that lie in memory like that. Class logits are then
one stream, cut without regard to anchors or images. Else a level is read by strides (image, row, column, anchor,
channel), a program owns CELLS consecutive cells of one of its anchors, and NEAR says that all cells of a level follow
each other in memory. No kernel is compiled for the numbers of a size: whether planes begin at multiples of 16 numbers,
which wide accesses need, is asked at run time, level by level.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order. WITH_GRAD leaves the
gradient times ``grads``. SKIP_ONE, of a gradient that is already there for ones: a program returns at once if it is
multiplied by 1, and overwrites the gradient otherwise.

RANKED is for a softmax over classes of which only the hardest negatives count. Who does is known only when every
anchor has been seen: the loss launch leaves the cross-entropy of each (``ce``), ``rank_kernel`` picks, and the gradient
launch reads the logits of those picked. As ranks go by index, matches are by index too, not by position.
"""

import triton
import triton.language as tl

from .match import IGNORED, load_corners
from .primitives import ordered_bits, plain, safe_div, scaled_less
from .rows import load_rows
from .sums import column, column_sums, is_last
from .terms.decode import chain
from .terms.records import axis_of_sizes

N_PARTS: tl.constexpr = tl.constexpr(4)  # class, box and centreness loss; one to spare


@triton.jit
def _pointer(pointers, level):
    """The pointer of a level known at run time."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(level == i, pointers[i], chosen)
    return chosen


@triton.jit
def _integer(values, level):
    """The number, given as :func:`plain` takes it, of a level known at run time."""
    chosen = level * 0 + values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(level == i, values[i], chosen)
    return plain(chosen)


@triton.jit
def _strides_of(strides, level):
    """Strides of a level: image, row, column, anchor, channel."""
    chosen = strides[0]
    for i in tl.static_range(1, len(strides)):
        here = level == i
        chosen = (
            tl.where(here, strides[i][0], chosen[0]),
            tl.where(here, strides[i][1], chosen[1]),
            tl.where(here, strides[i][2], chosen[2]),
            tl.where(here, strides[i][3], chosen[3]),
            tl.where(here, strides[i][4], chosen[4]),
        )
    return plain(chosen[0]), plain(chosen[1]), plain(chosen[2]), plain(chosen[3]), plain(chosen[4])


@triton.jit
def _cells_at(strides, b, a, cells, W, NEAR: tl.constexpr):
    """Where the cells of an anchor lie, in elements."""
    at = b.to(tl.int64) * strides[0] + a * strides[3]
    if NEAR:
        at = at + cells
    else:
        at = at + (cells // W) * strides[1] + (cells % W) * strides[2]
    return at


@triton.jit
def _are_wide(strides):
    """Whether all planes of a level begin at multiples of 16 numbers."""
    return (strides[0] % 16 == 0) & (strides[3] % 16 == 0) & (strides[4] % 16 == 0)


@triton.jit
def _wide(strides):
    """Strides of which that is so, in a form that tells the compiler."""
    return strides[0] // 16 * 16, strides[1], strides[2], strides[3] // 16 * 16, strides[4] // 16 * 16


@triton.jit
def _count(found_ptr, first, blocks, BLOCK: tl.constexpr):
    """Sum of so many counts from the first."""
    total = tl.zeros([BLOCK], tl.int32)
    for i in range(0, blocks, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(found_ptr + first + at, mask=at < blocks, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _share(found_ptr, b, B, blocks, BY_IMAGE: tl.constexpr, ACC: tl.constexpr):
    """What the sums of image b are multiplied by."""
    if BY_IMAGE:
        found = _count(found_ptr, b * blocks, blocks, 128)
        share = 1.0 / (tl.maximum(found, 1) * B).to(ACC)
    else:
        share = 1.0 / tl.maximum(_count(found_ptr, 0, B * blocks, 256), 1).to(ACC)
    return share


@triton.jit
def _grad_out(grads, part: tl.constexpr, ONES: tl.constexpr, ACC: tl.constexpr):
    """What the gradient of a part is multiplied by: that of the total, the first of ``grads``, and its own."""
    grad = tl.cast(1.0 if ONES else 0.0, ACC)
    if grads[0] is not None:
        grad += tl.load(grads[0]).to(ACC)
    if grads[part] is not None:
        grad += tl.load(grads[part]).to(ACC)
    return grad


@triton.jit
def _labels(rows_ptr, match):
    """Class of the rows that anchors have taken, -1 where they have none."""
    return tl.load(rows_ptr + match * 6 + 1, mask=match >= 0, other=-1.0).to(tl.int32)


@triton.jit
def _stream_classes(
    x_ptr, d_ptr, match_ptr, rows_ptr, found_ptr, chunk, start, n, N, B, blocks, label_args, grad,
    LABEL: tl.constexpr, C: tl.constexpr, BY_IMAGE: tl.constexpr, WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Class loss of a chunk of a level's logits [B, n, C], and their gradient; a chunk meets at most two images."""
    e0 = chunk.to(tl.int64) * (BLOCK * STEPS)
    left = tl.minimum(B.to(tl.int64) * n * C - e0, BLOCK * STEPS).to(tl.int32)
    first = e0 // C  # anchor of the batch
    skipped = (e0 - first * C).to(tl.int32)  # of its classes
    b = (first // n).to(tl.int32)
    edge = ((b + 1).to(tl.int64) * n - first).to(tl.int32)  # anchors from there on are of the next image
    match_ptr += first + b.to(tl.int64) * (N - n) + start
    x_ptr += e0
    if WITH_GRAD:
        d_ptr += e0
    share = _share(found_ptr, b, B, blocks, BY_IMAGE, ACC)
    next_share = share
    if BY_IMAGE:
        if (skipped + left > edge * C) & (b + 1 < B):
            next_share = _share(found_ptr, b + 1, B, blocks, BY_IMAGE, ACC)
    total = tl.zeros([BLOCK], ACC)
    for i in tl.range(0, STEPS, loop_unroll_factor=1):
        e = i * BLOCK + tl.arange(0, BLOCK)
        mask = e < left
        anchor = (skipped + e) // C
        after = anchor >= edge
        match = tl.load(match_ptr + anchor + tl.where(after, N - n, 0), mask=mask, other=IGNORED)
        one_hot = (_labels(rows_ptr, match) == skipped + e - anchor * C).to(ACC)
        x = tl.load(x_ptr + e, mask=mask, other=0.0).to(ACC)
        loss, d = LABEL(x, one_hot, label_args)
        used = match != IGNORED
        weight = tl.where(after, next_share, share)
        if WITH_LOSS:
            total += tl.where(used, weight * loss, tl.where(x != x, x, 0.0))  # a NaN shows, used or not
        if WITH_GRAD:
            tl.store(d_ptr + e, tl.where(used, grad * weight * d, 0.0).to(d_ptr.dtype.element_ty), mask=mask)
    return tl.sum(total, axis=0)


@triton.jit
def _plane_classes(
    x_ptr, d_ptr, match_ptr, rows_ptr, mask, s_x, s_d, label_args, share, grad,
    LABEL: tl.constexpr, C: tl.constexpr, WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr, CELLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Class loss of one anchor of some cells, PLANES classes at a time, and their gradient; all pointers to cells."""
    match = tl.load(match_ptr, mask=mask, other=IGNORED)
    label = _labels(rows_ptr, match)
    used = (match != IGNORED)[None, :]
    total = tl.zeros([PLANES, CELLS], ACC)
    for k0 in tl.range(0, C, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = mask[None, :] & (k < C)
        x = tl.load(x_ptr[None, :] + k * s_x, mask=keep, other=0.0).to(ACC)
        loss, d = LABEL(x, (label[None, :] == k).to(ACC), label_args)
        if WITH_LOSS:
            total += tl.where(used & keep, share * loss, tl.where(x != x, x, 0.0))  # a NaN shows, used or not
        if WITH_GRAD:
            d = tl.where(used, grad * share * d, 0.0)
            tl.store(d_ptr[None, :] + k * s_d, d.to(d_ptr.dtype.element_ty), mask=keep)
    return tl.sum(tl.sum(total, axis=0), axis=0)


@triton.jit
def _key(ce):
    """An integer that orders cross-entropies as they are, NaN as infinity."""
    return ordered_bits(tl.where(ce != ce, float("inf"), ce))


@triton.jit
def _ranked_weight(ce, match, n, picks_ptr):
    """How often the cross-entropy of each anchor counts: see :func:`rank_kernel`."""
    key = tl.load(picks_ptr)
    hard = (_key(ce) > key) | ((_key(ce) == key) & (n < tl.load(picks_ptr + 1)))
    twice = n < tl.load(picks_ptr + 2)
    return tl.where(match >= 0, tl.where(twice, 2, 1), tl.where(hard, 1, 0))


@triton.jit
def _ranked_classes(
    x_ptr, d_ptr, match_ptr, rows_ptr, ce_ptr, picks_ptr, n, mask, s_x, s_d, label_args, scale,
    LABEL: tl.constexpr, C: tl.constexpr, WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr, CELLS: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """The cross-entropy of the anchors n, left in ``ce``, or with WITH_GRAD the gradient by their logits.

    ``match_ptr`` and ``ce_ptr`` are of the image; ``x_ptr`` and ``d_ptr`` point to the anchors. Returns what shows a
    NaN in the total, counted or not: 0 without one.
    """
    unknown = tl.cast(0.0, ACC)
    k = tl.arange(0, K_PAD)[None, :]
    match = tl.load(match_ptr + n, mask=mask, other=IGNORED)
    label = tl.maximum(_labels(rows_ptr, match), 0)  # no row: the background
    used = mask
    weight = tl.zeros([CELLS], tl.int32)
    if WITH_GRAD:
        ce = tl.load(ce_ptr + n, mask=mask, other=0.0)
        weight = tl.where(mask, _ranked_weight(ce, match, n, picks_ptr), 0)
        used = weight > 0
    x = tl.load(x_ptr[:, None] + k * s_x, mask=used[:, None] & (k < C), other=0.0).to(ACC)
    x = tl.where(k < C, x, -1e30)  # adds nothing to a softmax
    loss, d = LABEL(x, (label[:, None] == k).to(ACC), label_args)
    if WITH_GRAD:
        d = tl.where(used[:, None], weight.to(ACC)[:, None] * scale * d, 0.0)
        tl.store(d_ptr[:, None] + k * s_d, d.to(d_ptr.dtype.element_ty), mask=mask[:, None] & (k < C))
    else:
        ce = tl.sum(tl.where(k < C, loss, 0.0), axis=1) + 0.0  # of a sum of -0, too, the bits are to be those of 0
        unknown = tl.sum(tl.where(mask & (ce != ce), ce, 0.0), axis=0)
        tl.store(ce_ptr + n, ce, mask=mask)
    return unknown


@triton.jit
def _load_tile(at, s_k, mask, ACC: tl.constexpr):
    """The four numbers of some boxes, in one access."""
    k = tl.arange(0, 4)[None, :]
    tile = tl.load(at[:, None] + k * s_k, mask=mask[:, None], other=0.0).to(ACC)
    even, odd = tl.split(tl.reshape(tile, (at.shape[0], 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return zero, one, two, three


@triton.jit
def _relative(anchor, row, has, size, CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Sides of anchors and, of their rows, the centre from theirs and the sides; sides of 1 where there is no row.

    Corners of a row are compared with those of the anchor, its centre with the middle of that, and its size is taken as
    it is: of nearby numbers the differences keep their digits, while a size made of corners would not.
    """
    ax1, ay1, ax2, ay2 = anchor
    _image, _label, c0, c1, c2, c3 = row
    if CORNERS:
        cx = 0.5 * ((c0.to(ACC) - ax1) + (c2.to(ACC) - ax2))
        cy = 0.5 * ((c1.to(ACC) - ay1) + (c3.to(ACC) - ay2))
        gw = c2.to(ACC) - c0.to(ACC)
        gh = c3.to(ACC) - c1.to(ACC)
    else:
        width = tl.cast(size[0], ACC)
        height = tl.cast(size[1], ACC)
        cx = scaled_less(c0, width, ax1, ACC) - 0.5 * (ax2 - ax1)
        cy = scaled_less(c1, height, ay1, ACC) - 0.5 * (ay2 - ay1)
        gw = c2.to(ACC) * width
        gh = c3.to(ACC) * height
    aw = tl.where(has, ax2 - ax1, 1.0)
    ah = tl.where(has, ay2 - ay1, 1.0)
    return (aw, ah), (cx, cy), (tl.where(has, gw, 1.0), tl.where(has, gh, 1.0))


@triton.jit
def _box_term(
    raw, sides, shift, true, size, weights, beta, box_args, AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr
):
    """Box loss of anchors, and its gradient by the four raw numbers; see :func:`_relative`."""
    aw, ah = sides
    cx, cy = shift
    gw, gh = true
    if OFFSET is not None:
        least = 1.1754944e-38  # of the quotient of sides, whose logarithm is to be finite
        tw = weights[2] * tl.log(tl.maximum(gw / aw, least))
        th = weights[3] * tl.log(tl.maximum(gh / ah, least))
        loss_x, dx, dw = OFFSET(raw[0], raw[2], weights[0] * cx / aw, tw, beta)
        loss_y, dy, dh = OFFSET(raw[1], raw[3], weights[1] * cy / ah, th, beta)
        loss = loss_x + loss_y
        d = (dx, dy, dw, dh)
    else:
        x, jx = AXIS(raw[0], raw[2], aw, aw / weights[0], 1.0 / weights[2])
        y, jy = AXIS(raw[1], raw[3], ah, ah / weights[1], 1.0 / weights[3])
        pair_x = axis_of_sizes(x.size, gw, x.centre - cx, size[0])
        pair_y = axis_of_sizes(y.size, gh, y.centre - cy, size[1])
        loss, by_x, by_y = BOX(pair_x, pair_y, box_args)
        dx, dw = chain(by_x.centre, by_x.size, jx)
        dy, dh = chain(by_y.centre, by_y.size, jy)
        d = (dx, dy, dw, dh)
    return loss, d


@triton.jit
def _centreness(shift, true):
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of anchors' centres in boxes that hold them."""
    dx = tl.abs(shift[0])
    dy = tl.abs(shift[1])
    hx = 0.5 * true[0]
    hy = 0.5 * true[1]
    share = safe_div(hx - dx, hx + dx) * safe_div(hy - dy, hy + dy)
    return tl.sqrt(tl.maximum(share, 0.0))


@triton.jit
def _boxes(
    raw_ptr, d_ptr, centre_ptr, d_centre_ptr, s_raw, s_d, match, n, mask, anchors_ptr, rows_ptr, size, weights, beta,
    box_args, share, grad, grad_centre,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, CENTRE_LABEL: tl.constexpr, CORNERS: tl.constexpr,
    WITH_GRAD: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Box and centreness loss of some anchors, and their gradient; pointers to anchors."""
    box = tl.cast(0.0, ACC)
    centre = tl.cast(0.0, ACC)
    has = mask & (match >= 0)
    k = tl.arange(0, 4)[None, :]
    d = tl.zeros([CELLS, 4], ACC)
    d_centre = tl.zeros([CELLS], ACC)
    if tl.max(has.to(tl.int32), axis=0) > 0:
        anchor = load_corners(anchors_ptr, n, has, ACC)
        row = load_rows(rows_ptr, match, has, CELLS)
        sides, shift, true = _relative(anchor, row, has, size, CORNERS, ACC)
        raw = _load_tile(raw_ptr, s_raw, has, ACC)
        loss, d_raw = _box_term(raw, sides, shift, true, size, weights, beta, box_args, AXIS, BOX, OFFSET)
        box = share * tl.sum(tl.where(has, loss, 0.0), axis=0)
        if WITH_GRAD:
            even = tl.join(d_raw[0], d_raw[2])
            odd = tl.join(d_raw[1], d_raw[3])
            d = grad * share * tl.reshape(tl.join(even, odd), (CELLS, 4))
            d = tl.where(has[:, None], d, 0.0)
        if CENTRE_LABEL is not None:
            x = tl.load(centre_ptr, mask=has, other=0.0).to(ACC)
            loss, d_x = CENTRE_LABEL(x, _centreness(shift, true), ())
            centre = share * tl.sum(tl.where(has, loss, 0.0), axis=0)
            if WITH_GRAD:
                d_centre = tl.where(has, grad_centre * share * d_x, 0.0)
    if WITH_GRAD:
        tl.store(d_ptr[:, None] + k * s_d, d.to(d_ptr.dtype.element_ty), mask=mask[:, None])
        if CENTRE_LABEL is not None:
            tl.store(d_centre_ptr, d_centre.to(d_centre_ptr.dtype.element_ty), mask=mask)
    return box, centre


@triton.jit
def _range_of(pid, programs, begin, level, local):
    """Level of a program and its number there, if it is one of so many a level from ``begin`` on; and their end."""
    for i in tl.static_range(len(programs)):
        here = (pid >= begin) & (pid < begin + plain(programs[i]))
        level = tl.where(here, i, level)
        local = tl.where(here, pid - begin, local)
        begin += plain(programs[i])
    return level, local, begin


@triton.jit
def _site(local, A, HW, start, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """What a program of a level owns: image, anchor of the cell, cells, index and position of the anchors; a mask.

    With FLAT the cells are all anchors of the level, one a cell.
    """
    lane = tl.arange(0, CELLS)
    if FLAT:
        tiles = tl.cdiv(A * HW, CELLS)
        a = local * 0
        cells = (local % tiles) * CELLS + lane
        mask = cells < A * HW
        n = start + cells
        position = n
    else:
        tiles = A * tl.cdiv(HW, CELLS)
        a = (local % tiles) // tl.cdiv(HW, CELLS)
        cells = (local % tl.cdiv(HW, CELLS)) * CELLS + lane
        mask = cells < HW
        n = start + cells * A + a
        position = start + a * HW + cells
    return local // tiles, a, cells, n, position, mask


@triton.jit
def _anchors_at(ptr, strides, b, a, cells, W, A, HW, K: tl.constexpr, FLAT: tl.constexpr, NEAR: tl.constexpr):
    """Pointers to the first of the K channels of some anchors."""
    if FLAT:
        at = ptr + (b.to(tl.int64) * (A * HW) + cells) * K
    else:
        at = ptr + _cells_at(strides, b, a, cells, W, NEAR)
    return at


@triton.jit
def _channel_stride(strides, FLAT: tl.constexpr):
    """Elements from channel to channel."""
    stride = strides[4]
    if FLAT:
        stride = 1
    return stride


@triton.jit
def _plane_program(
    local, x_ptr, d_ptr, s_x, s_d, W, A, HW, start, match_ptr, rows_ptr, found_ptr, N, B, blocks, label_args, grad,
    C: tl.constexpr, LABEL: tl.constexpr, BY_IMAGE: tl.constexpr, NEAR: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, ACC: tl.constexpr, CELLS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Class loss of a program of a level in planes, and the gradient."""
    b, a, cells, _n, position, mask = _site(local, A, HW, start, False, CELLS)
    at_d = None
    if WITH_GRAD:
        at_d = d_ptr + _cells_at(s_d, b, a, cells, W, NEAR)
    return _plane_classes(
        x_ptr + _cells_at(s_x, b, a, cells, W, NEAR), at_d, match_ptr + b.to(tl.int64) * N + position, rows_ptr, mask,
        s_x[4], s_d[4], label_args, _share(found_ptr, b, B, blocks, BY_IMAGE, ACC), grad,
        LABEL, C, WITH_LOSS, WITH_GRAD, ACC, CELLS, PLANES,
    )  # fmt: skip


@triton.jit
def _class_program(
    local, x_ptr, d_ptr, s_x, s_d, W, A, HW, start, match_ptr, rows_ptr, found_ptr, N, B, blocks, label_args, grad,
    ce_ptr, picks_ptr,
    C: tl.constexpr, LABEL: tl.constexpr, RANKED: tl.constexpr, BY_IMAGE: tl.constexpr,
    FLAT: tl.constexpr, NEAR: tl.constexpr, WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, CELLS: tl.constexpr, PLANES: tl.constexpr, K_PAD: tl.constexpr,
):  # fmt: skip
    """Class loss of a program of a level, and the gradient."""
    cls = tl.cast(0.0, ACC)
    if FLAT and not RANKED:
        cls = _stream_classes(
            x_ptr, d_ptr, match_ptr, rows_ptr, found_ptr, local, start, A * HW, N, B, blocks, label_args, grad,
            LABEL, C, BY_IMAGE, WITH_LOSS, WITH_GRAD, ACC, BLOCK, STEPS,
        )  # fmt: skip
    elif RANKED:
        tiles = B * A * tl.cdiv(HW, CELLS)
        if FLAT:
            tiles = B * tl.cdiv(A * HW, CELLS)
        scale = grad
        if WITH_GRAD and not BY_IMAGE:
            scale = grad * _share(found_ptr, 0, B, blocks, BY_IMAGE, ACC)
        for tile in tl.range(local * STEPS, tl.minimum(local * STEPS + STEPS, tiles), loop_unroll_factor=1):
            b, a, cells, n, _position, mask = _site(tile, A, HW, start, FLAT, CELLS)
            at_d = None
            if WITH_GRAD:
                at_d = _anchors_at(d_ptr, s_d, b, a, cells, W, A, HW, C, FLAT, NEAR)
                if BY_IMAGE:
                    scale = grad * _share(found_ptr, b, B, blocks, BY_IMAGE, ACC)
            image = b.to(tl.int64) * N
            cls += _ranked_classes(
                _anchors_at(x_ptr, s_x, b, a, cells, W, A, HW, C, FLAT, NEAR), at_d, match_ptr + image, rows_ptr,
                ce_ptr + image, picks_ptr + 3 * b, n, mask,
                _channel_stride(s_x, FLAT), _channel_stride(s_d, FLAT), label_args, scale,
                LABEL, C, WITH_GRAD, ACC, CELLS, K_PAD,
            )  # fmt: skip
    else:
        wide = (HW % 16 == 0) & _are_wide(s_x)
        if WITH_GRAD:
            wide = wide & _are_wide(s_d)
        if NEAR and wide:
            cls = _plane_program(
                local, x_ptr, d_ptr, _wide(s_x), _wide(s_d), W, A, HW // 16 * 16, start, match_ptr, rows_ptr, found_ptr,
                N, B, blocks, label_args, grad, C, LABEL, BY_IMAGE, NEAR, WITH_LOSS, WITH_GRAD, ACC, CELLS, PLANES,
            )  # fmt: skip
        else:
            cls = _plane_program(
                local, x_ptr, d_ptr, s_x, s_d, W, A, HW, start, match_ptr, rows_ptr, found_ptr,
                N, B, blocks, label_args, grad, C, LABEL, BY_IMAGE, NEAR, WITH_LOSS, WITH_GRAD, ACC, CELLS, PLANES,
            )  # fmt: skip
    return cls


@triton.jit
def _box_program(
    local, raw_ptr, d_ptr, centre_ptr, d_centre_ptr, s_raw, s_d, s_centre, s_d_centre, W, A, HW, start,
    match_ptr, anchors_ptr, rows_ptr, found_ptr, N, B, blocks, size, weights, beta, box_args, grad, grad_centre,
    AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, CENTRE_LABEL: tl.constexpr, BY_IMAGE: tl.constexpr,
    CORNERS: tl.constexpr, RANKED: tl.constexpr, FLAT: tl.constexpr, NEAR: tl.constexpr, WITH_GRAD: tl.constexpr,
    ACC: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Box and centreness loss of a program of a level, and the gradient."""
    b, a, cells, n, position, mask = _site(local, A, HW, start, FLAT, ANCHORS)
    if RANKED:
        position = n
    match = tl.load(match_ptr + b.to(tl.int64) * N + position, mask=mask, other=IGNORED)
    at = _anchors_at(raw_ptr, s_raw, b, a, cells, W, A, HW, 4, FLAT, NEAR)
    at_d = None
    at_centre = None
    at_d_centre = None
    s_k = _channel_stride(s_raw, FLAT)
    s_d_k = s_k
    if WITH_GRAD:
        at_d = _anchors_at(d_ptr, s_d, b, a, cells, W, A, HW, 4, FLAT, NEAR)
        s_d_k = _channel_stride(s_d, FLAT)
    if CENTRE_LABEL is not None:
        at_centre = _anchors_at(centre_ptr, s_centre, b, a, cells, W, A, HW, 1, FLAT, NEAR)
        if WITH_GRAD:
            at_d_centre = _anchors_at(d_centre_ptr, s_d_centre, b, a, cells, W, A, HW, 1, FLAT, NEAR)
    return _boxes(
        at, at_d, at_centre, at_d_centre, s_k, s_d_k, match, n, mask, anchors_ptr, rows_ptr, size, weights, beta,
        box_args, _share(found_ptr, b, B, blocks, BY_IMAGE, ACC), grad, grad_centre,
        AXIS, BOX, OFFSET, CENTRE_LABEL, CORNERS, WITH_GRAD, ACC, ANCHORS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "B", "blocks"])
def dense_kernel(
    cls_ptrs, d_cls_ptrs, box_ptrs, d_box_ptrs, centre_ptrs, d_centre_ptrs,
    s_cls, s_d_cls, s_box, s_d_box, s_centre, s_d_centre, Ws, HWs, As, cls_programs, box_programs,
    anchors_ptr, match_ptr, rows_ptr, found_ptr, N, B, blocks, size, weights, beta, box_args, label_args, grads,
    total_ptr, parts, counts_ptr, partial_ptr, done_ptr, ce_ptr, picks_ptr,
    C: tl.constexpr, AXIS: tl.constexpr, BOX: tl.constexpr, OFFSET: tl.constexpr, LABEL: tl.constexpr,
    CENTRE_LABEL: tl.constexpr, RANKED: tl.constexpr, BY_IMAGE: tl.constexpr, CORNERS: tl.constexpr,
    FLAT: tl.constexpr, NEAR: tl.constexpr,
    WITH_LOSS: tl.constexpr, WITH_GRAD: tl.constexpr, SKIP_ONE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, CELLS: tl.constexpr, PLANES: tl.constexpr, ANCHORS: tl.constexpr,
    K_PAD: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of a dense head; grid: the programs of class logits, level by level, then those of boxes.

    Tuples ending in s hold one entry a level, numbers as :func:`plain` takes them. ``found_ptr`` holds ``blocks``
    counts of anchors with a row an image. ``grads`` are pointers to what the gradients of the total and of the three
    parts are multiplied by, ``parts`` those to the three parts.
    """
    pid = tl.program_id(0)
    level, local, end = _range_of(pid, cls_programs, 0, pid * 0, pid * 0)
    of_boxes = pid >= end
    level, local, end = _range_of(pid, box_programs, end, level, local)
    A = _integer(As, level)
    HW = _integer(HWs, level)
    W = _integer(Ws, level)
    start = pid * 0
    for i in tl.static_range(len(As)):
        start += tl.where(level > i, plain(As[i]) * plain(HWs[i]), 0)
    ONES: tl.constexpr = WITH_LOSS
    grad_cls = _grad_out(grads, 1, ONES, ACC)
    grad_box = _grad_out(grads, 2, ONES, ACC)
    grad_centre = _grad_out(grads, 3, ONES, ACC)
    if CENTRE_LABEL is None:
        grad_centre = grad_box
    if SKIP_ONE:
        if tl.where(of_boxes, (grad_box == 1.0) & (grad_centre == 1.0), grad_cls == 1.0):
            return

    x_ptr = _pointer(cls_ptrs, level)
    raw_ptr = _pointer(box_ptrs, level)
    s_x = _strides_of(s_cls, level)
    s_raw = _strides_of(s_box, level)
    d_x_ptr = None
    d_raw_ptr = None
    s_d_x = s_x
    s_d_raw = s_raw
    if WITH_GRAD:
        d_x_ptr = _pointer(d_cls_ptrs, level)
        d_raw_ptr = _pointer(d_box_ptrs, level)
        s_d_x = _strides_of(s_d_cls, level)
        s_d_raw = _strides_of(s_d_box, level)
    centre_ptr = None
    d_centre_ptr = None
    s_middle = s_raw
    s_d_middle = s_raw
    if CENTRE_LABEL is not None:
        centre_ptr = _pointer(centre_ptrs, level)
        s_middle = _strides_of(s_centre, level)
        if WITH_GRAD:
            d_centre_ptr = _pointer(d_centre_ptrs, level)
            s_d_middle = _strides_of(s_d_centre, level)

    cls = tl.cast(0.0, ACC)
    box = tl.cast(0.0, ACC)
    centre = tl.cast(0.0, ACC)
    if of_boxes:
        box, centre = _box_program(
            local, raw_ptr, d_raw_ptr, centre_ptr, d_centre_ptr, s_raw, s_d_raw, s_middle, s_d_middle,
            W, A, HW, start, match_ptr, anchors_ptr, rows_ptr, found_ptr, N, B, blocks, size, weights, beta, box_args,
            grad_box, grad_centre,
            AXIS, BOX, OFFSET, CENTRE_LABEL, BY_IMAGE, CORNERS, RANKED, FLAT, NEAR, WITH_GRAD, ACC, ANCHORS,
        )  # fmt: skip
    else:
        cls = _class_program(
            local, x_ptr, d_x_ptr, s_x, s_d_x, W, A, HW, start, match_ptr, rows_ptr, found_ptr, N, B, blocks,
            label_args, grad_cls, ce_ptr, picks_ptr,
            C, LABEL, RANKED, BY_IMAGE, FLAT, NEAR, WITH_LOSS, WITH_GRAD, ACC, BLOCK, STEPS, CELLS, PLANES, K_PAD,
        )  # fmt: skip

    if WITH_LOSS:
        part = tl.arange(0, N_PARTS)
        partial = tl.where(part == 0, cls, tl.where(part == 1, box, tl.where(part == 2, centre, 0.0)))
        tl.store(partial_ptr + pid * N_PARTS + part, partial)
        programs = tl.num_programs(0)
        if is_last(done_ptr, programs):
            sums = column_sums(partial_ptr, programs, N_PARTS, ACC)
            cls = column(sums, 0)
            box = column(sums, 1)
            centre = column(sums, 2)
            tl.store(parts[0], cls)
            tl.store(parts[1], box)
            if CENTRE_LABEL is not None:
                tl.store(parts[2], centre)
            tl.store(total_ptr, cls + box + centre)
            tl.store(counts_ptr, _count(found_ptr, 0, B * blocks, 256))
            tl.store(done_ptr, 0)  # ready for the next launch


DIGIT: tl.constexpr = tl.constexpr(11)  # bits of a key that one pass of rank_kernel settles
BINS: tl.constexpr = tl.constexpr(2048)


@triton.jit
def _cut(ce_ptr, match_ptr, N, left, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The key of the left-th largest cross-entropy of anchors without a row, and how many equals of it are in."""
    lane = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    key = tl.zeros([], tl.int64)
    top = left * 0 + BITS
    while top > 0:
        shift = tl.maximum(top - DIGIT, 0)
        amounts = tl.zeros([BINS], tl.int32)
        for i in range(0, N, BLOCK):
            mask = i + lane < N
            own = _key(tl.load(ce_ptr + i + lane, mask=mask, other=0.0))
            free = mask & (tl.load(match_ptr + i + lane, mask=mask, other=0) < 0)
            digit = ((own >> shift) - ((own >> top) << (top - shift))).to(tl.int32)
            amounts += tl.histogram(digit, BINS, mask=free & ((own >> top) == key))
        above = tl.sum(amounts, axis=0) - tl.cumsum(amounts, axis=0)
        here = (above < left) & (above + amounts >= left)
        key = (key << (top - shift)) + tl.sum(tl.where(here, bins, 0), axis=0)
        left -= tl.sum(tl.where(here, above, 0), axis=0)
        top = shift
    return key, left


@triton.jit(do_not_specialize=["N", "B", "blocks"])
def rank_kernel(
    ce_ptr, match_ptr, found_ptr, N, B, blocks, ratio, picks_ptr, total_ptr, parts, partial_ptr, done_ptr,
    BY_IMAGE: tl.constexpr, ACC: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The hardest of the anchors without a row, ``ratio`` times those with one, and the class loss; grid: images.

    ``picks_ptr`` [B, 3], int64: anchors without a row count whose key is above the first, or equal to it if their index
    is below the second; should that not be enough, those with a row and an index below the third count twice, as in
    torchvision. Of equals the first anchors count.
    """
    b = tl.program_id(0)
    ce_ptr += b.to(tl.int64) * N
    match_ptr += b.to(tl.int64) * N
    found = _count(found_ptr, b * blocks, blocks, 128)
    wanted = tl.minimum(tl.ceil(found.to(tl.float32) * ratio), N).to(tl.int32)
    extra = wanted - tl.minimum(wanted, N - found)
    left = wanted - extra
    key = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)  # above any
    if left > 0:
        key, left = _cut(ce_ptr, match_ptr, N, left, BITS, BLOCK)
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], ACC)
    limit = tl.zeros([BLOCK], tl.int32)
    twice = tl.zeros([BLOCK], tl.int32)
    equals = left * 0
    owners = left * 0
    if found > 0:
        for i in range(0, N, BLOCK):
            mask = i + lane < N
            ce = tl.load(ce_ptr + i + lane, mask=mask, other=0.0)
            has = mask & (tl.load(match_ptr + i + lane, mask=mask, other=-1) >= 0)
            equal = mask & ~has & (_key(ce) == key)
            in_order = equals + tl.cumsum(equal.to(tl.int32), axis=0)
            owner = owners + tl.cumsum(has.to(tl.int32), axis=0)
            hard = mask & ~has & ((_key(ce) > key) | (equal & (in_order <= left)))
            again = has & (owner <= extra)
            total += tl.where(has | hard, ce, 0.0) + tl.where(again, ce, 0.0)
            limit = tl.where(equal & hard, i + lane + 1, limit)
            twice = tl.where(again, i + lane + 1, twice)
            equals += tl.sum(equal.to(tl.int32), axis=0)
            owners += tl.sum(has.to(tl.int32), axis=0)
    tl.store(picks_ptr + 3 * b, key)
    tl.store(picks_ptr + 3 * b + 1, tl.max(limit, axis=0).to(tl.int64))
    tl.store(picks_ptr + 3 * b + 2, tl.max(twice, axis=0).to(tl.int64))
    tl.store(partial_ptr + b, _share(found_ptr, b, B, blocks, BY_IMAGE, ACC) * tl.sum(total, axis=0))
    if is_last(done_ptr, B):
        cls = column(column_sums(partial_ptr, B, 1, ACC), 0) + tl.load(parts[0])  # a NaN of the loss launch, or 0
        tl.debug_barrier()  # every thread has read what one of them overwrites
        tl.store(parts[0], cls)
        tl.store(total_ptr, cls + tl.load(parts[1]))
        tl.store(done_ptr, 0)
