"""Matching anchors with target rows: which row of its image an anchor takes, if any.

``overlap_kernel`` finds, for every row, the largest IoU that any anchor has with it; ``match_kernel`` settles every
anchor. Each streams over the rows of an image once for every block of anchors, so memory is that of the anchors,
however many rows there are.

Decisions are made by comparing floats, some for equality, so both kernels are to be compiled without contraction of
products and sums, and divide with rounding: in float32 they then see the very bits that PyTorch's operators do.

An anchor's *position* is its place in the order in which class logits lie in memory: anchors of a cell next to each
other (n, the order of the anchors themselves), or with PLANES, for maps whose cells are next to each other, those of a
level one after the other, each with all its cells.
"""

import triton
import triton.language as tl

from .primitives import divide, exact, ordered_bits, plain
from .rows import image_rows, in_its_range, load_row, load_rows, row_corners, rows_end, wrong_offsets
from .sums import is_last

BACKGROUND: tl.constexpr = tl.constexpr(-1)
IGNORED: tl.constexpr = tl.constexpr(-2)


@triton.jit
def anchor_at(position, As, HWs, PLANES: tl.constexpr):
    """Index of the anchor at a position."""
    n = position
    if PLANES:
        start = 0
        for level in tl.static_range(len(As)):
            A = plain(As[level])
            HW = plain(HWs[level])
            size = A * HW
            own = position - start
            here = (own >= 0) & (own < size)
            n = tl.where(here, start + (own % HW) * A + own // HW, n)
            start += size
    return n


@triton.jit
def load_corners(ptr, n, mask, ACC: tl.constexpr):
    """x1, y1, x2, y2 of some boxes, in one access; 0 where masked out."""
    corner = tl.arange(0, 4)[None, :]
    tile = tl.load(ptr + n[:, None] * 4 + corner, mask=mask[:, None], other=0.0).to(ACC)
    even, odd = tl.split(tl.reshape(tile, (n.shape[0], 2, 2)))
    x1, x2 = tl.split(even)
    y1, y2 = tl.split(odd)
    return x1, y1, x2, y2


@triton.jit
def _iou(anchor, true):
    """IoU as torchvision's box_iou computes it."""
    ax1, ay1, ax2, ay2 = anchor
    x1, y1, x2, y2 = true
    ow = tl.maximum(tl.minimum(x2, ax2) - tl.maximum(x1, ax1), 0.0)
    oh = tl.maximum(tl.minimum(y2, ay2) - tl.maximum(y1, ay1), 0.0)
    inter = ow * oh
    return divide(inter, (x2 - x1) * (y2 - y1) + (ax2 - ax1) * (ay2 - ay1) - inter)


LOWEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # less an index: of equal IoUs the lowest index has the largest key


@triton.jit(do_not_specialize=["N", "M"])
def overlap_kernel(
    anchors_ptr, N, rows_ptr, offsets_ptr, M, size, classes, best_ptr,
    FIRST: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The best anchor of every row; grid: for each image the blocks of its anchors.

    ``best_ptr`` [M], int64, zeros at first: the bits of the largest IoU, or with FIRST a key for
    :func:`best_anchor_of`, for which an IoU is rounded to float32.
    """
    blocks = tl.cdiv(N, BLOCK)
    b = tl.program_id(0) // blocks
    n = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    anchor = load_corners(anchors_ptr, n, mask, ACC)
    first, last = image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G)
    for g in range(first, last):
        valid, _label, true = row_corners(load_row(rows_ptr, g), b, b + 1, classes, size, CORNERS, ACC)
        if valid:
            value = tl.where(mask, _iou(anchor, true), 0.0)
            best = tl.max(value, axis=0)
            if best > 0:
                key = ordered_bits(best)
                if FIRST:
                    at = tl.min(tl.where(value == best, n, LOWEST), axis=0)
                    key = (ordered_bits(best.to(tl.float32)) << 32) | (LOWEST.value - at).to(tl.int64)
                tl.atomic_max(best_ptr + g, key, sem="relaxed")


@triton.jit
def best_anchor_of(key):
    """The anchor in a key: the first one if the row meets none."""
    return tl.where(key == 0, 0, LOWEST.value - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _most_overlap(
    anchor, mask, n, b, rows_ptr, first, last, best_ptr, size, classes, band,
    RESCUE: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row that each anchor takes by IoU."""
    highest = tl.zeros([BLOCK], ACC) - 1.0
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    saved = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    for g in range(first, last):
        valid, _label, true = row_corners(load_row(rows_ptr, g), b, b + 1, classes, size, CORNERS, ACC)
        if valid:
            value = _iou(anchor, true)
            taken = tl.where(value > highest, g, taken)
            highest = tl.maximum(highest, value)
            if RESCUE == "equal":
                saved = tl.where(ordered_bits(value) == tl.load(best_ptr + g), 1, saved)
            if RESCUE == "best":
                saved = tl.where(n == best_anchor_of(tl.load(best_ptr + g)), g, saved)
    low = exact(band[0]).to(ACC)
    high = exact(band[1]).to(ACC)
    match = tl.where(highest < low, BACKGROUND, tl.where(highest < high, IGNORED, taken))
    if RESCUE == "equal":
        match = tl.where(saved >= 0, taken, match)
    if RESCUE == "best":
        match = tl.where(saved >= 0, saved, match)
    return match


@triton.jit
def _smallest_around(
    anchor, n, b, rows_ptr, first, last, size, classes, radius, ranges, ends, N,
    CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row that each anchor takes by its centre."""
    ax1, ay1, ax2, ay2 = anchor
    x = 0.5 * (ax1 + ax2)
    y = 0.5 * (ay1 + ay2)
    side = ax2 - ax1
    reach = side * exact(radius).to(ACC)
    low = tl.where(n < plain(ends[0]), 0.0, side * tl.cast(ranges[0], ACC))
    high = tl.where(n >= N - plain(ends[1]), float("inf"), side * tl.cast(ranges[1], ACC))
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    best = tl.zeros([BLOCK], ACC) + 1e-5  # the peer's bound
    for g in range(first, last):
        valid, _label, true = row_corners(load_row(rows_ptr, g), b, b + 1, classes, size, CORNERS, ACC)
        if valid:
            x1, y1, x2, y2 = true
            off = tl.maximum(tl.abs(x - 0.5 * (x1 + x2)), tl.abs(y - 0.5 * (y1 + y2)))
            nearest = tl.minimum(tl.minimum(x - x1, y - y1), tl.minimum(x2 - x, y2 - y))
            farthest = tl.maximum(tl.maximum(x - x1, y - y1), tl.maximum(x2 - x, y2 - y))
            fits = (off < reach) & (nearest > 0) & (farthest > low) & (farthest < high)
            value = 1e8 - (x2 - x1) * (y2 - y1)
            taken = tl.where(fits & ((value > best) | ((taken < 0) & (value == best))), g, taken)
            best = tl.where(taken == g, value, best)
    return taken


@triton.jit
def _count_invalid(
    rows_ptr, offsets_ptr, M, B, classes, size, CORNERS: tl.constexpr, ACC: tl.constexpr, BLOCK_G: tl.constexpr
):
    """Rows that no image will use, padding behind the last row is none; and offsets that are wrong."""
    end = rows_end(offsets_ptr, M, B)
    invalid = tl.zeros([BLOCK_G], tl.int32)
    for g0 in range(0, end, BLOCK_G):
        g = g0 + tl.arange(0, BLOCK_G)
        row = load_rows(rows_ptr, g, g < end, BLOCK_G)
        valid, _label, _true = row_corners(row, 0, B, classes, size, CORNERS, ACC)
        invalid += ((g < end) & ~in_its_range(row[0], g, valid, offsets_ptr)).to(tl.int32)
    return tl.sum(invalid, axis=0) + wrong_offsets(offsets_ptr, M, B, BLOCK_G)


@triton.jit(do_not_specialize=["N", "M", "B"])
def match_kernel(
    anchors_ptr, N, As, HWs, rows_ptr, offsets_ptr, M, B, size, classes, band, radius, ranges, ends,
    best_ptr, match_ptr, found_ptr, counts_ptr, done_ptr,
    CENTRE: tl.constexpr, RESCUE: tl.constexpr, PLANES: tl.constexpr, CORNERS: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """The row of every anchor; grid: for each image the blocks of its anchors.

    ``match_ptr`` [B, N], int32, by position: a row, BACKGROUND or IGNORED. ``found_ptr`` [programs]: anchors with a
    row. ``counts_ptr``: its second entry becomes the number of invalid rows. ``ends`` are the anchors of the first and
    of the last level, for CENTRE; ``band`` and ``radius`` hold numbers as :func:`exact` takes them, ``As``, ``HWs`` and
    ``ends`` as :func:`plain` does. ``best_ptr`` is
    what :func:`overlap_kernel` left; the last program clears it.
    """
    blocks = tl.cdiv(N, BLOCK)
    b = tl.program_id(0) // blocks
    position = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = position < N
    n = anchor_at(position, As, HWs, PLANES)
    anchor = load_corners(anchors_ptr, n, mask, ACC)
    first, last = image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G)
    if CENTRE:
        match = _smallest_around(
            anchor, n, b, rows_ptr, first, last, size, classes, radius, ranges, ends, N, CORNERS, ACC, BLOCK
        )
    else:
        match = _most_overlap(
            anchor, mask, n, b, rows_ptr, first, last, best_ptr, size, classes, band, RESCUE, CORNERS, ACC, BLOCK
        )
    tl.store(match_ptr + b.to(tl.int64) * N + position, match, mask=mask)
    tl.store(found_ptr + tl.program_id(0), tl.sum((mask & (match >= 0)).to(tl.int32), axis=0))
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + 1, _count_invalid(rows_ptr, offsets_ptr, M, B, classes, size, CORNERS, ACC, BLOCK_G))
    if RESCUE is not None:
        if is_last(done_ptr, tl.num_programs(0)):
            for g0 in range(0, M, BLOCK):
                g = g0 + tl.arange(0, BLOCK)
                tl.store(best_ptr + g, tl.zeros([BLOCK], tl.int64), mask=g < M)
            tl.store(done_ptr, 0)
