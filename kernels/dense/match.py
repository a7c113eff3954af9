"""Matching anchors with target rows: which row of its image an anchor takes, if any.

``overlap_kernel`` finds, for every row, the largest IoU that any anchor has with it, and what each anchor overlaps
most; ``match_kernel`` settles every anchor and stores what it takes, which is all that later launches look at. A
program owns a block of anchors. It tests the rows of its image 32 at a time, as lanes, against the box around all its
anchors, and then meets one after the other, in their order, only those that can matter: a crowd costs what its overlaps
cost, and memory is that of the anchors, however many rows there are. Of the rows that a block has met in the first
kernel it meets in the second only those of which none had a larger IoU before: few, for they may claim an anchor of it.

Decisions are made by comparing floats, some for equality, so both kernels are to be compiled without contraction of
products and sums, and divide with rounding: each operation then has the one result that IEEE 754 says, in float32 the
very bits that PyTorch's operators see. So the IoU of a row and an anchor is the same number in both kernels although
each computes it, which ``rescue="equal"`` rests on.

An anchor's *position* is its place in the order in which class logits lie in memory: anchors of a cell next to each
other (n, the order of the anchors themselves), or with PLANES, for maps whose cells are next to each other, those of a
level one after the other, each with all its cells.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..overlap import Corners, iou
from ..primitives import WARP_LANES, divide, exact, lane_bits, lowest_bit, ordered_bits, plain
from ..regions import Candidates, Points, in_regions
from ..rows import held_range, image_rows, in_its_range, load_rows, of_kind, row_corners, rows_end, wrong_offsets
from ..sums import column, column_sums, is_last
from .place import centreness, relative

BACKGROUND: tl.constexpr = tl.constexpr(-1)
IGNORED: tl.constexpr = tl.constexpr(-2)
LANES: tl.constexpr = WARP_LANES  # rows that a program tests at a time


class MatchSpec(NamedTuple):
    """The structure of a match: kernels are compiled for each."""

    CENTRE: Any  # by centres, else by IoU
    RESCUE: Any  # None, "equal", "own", "best" or "best_first"
    MEAN: Any  # what sums are divided by, see DenseHead
    PLANES: Any
    CORNERS: Any  # rows hold corners in pixels
    ACC: Any
    BLOCK: Any  # anchors of a program
    BLOCK_G: Any  # rows searched at a time for those of an image


class Frame(NamedTuple):
    """What rows are read with: width and height of the image; the first class and the number of logits."""

    size: Any
    classes: Any


class Targets(NamedTuple):
    """The rows of a batch and, if known, where those of each image begin, and their weights."""

    ptr: Any
    offsets_ptr: Any
    row_weights_ptr: Any


class Rule(NamedTuple):
    """The numbers of a matcher; ``band`` and ``radius`` as :func:`exact` takes them."""

    band: Any
    radius: Any
    ranges: Any
    ends: Any  # anchors of the first and of the last level, as :func:`plain` takes them


class Levels(NamedTuple):
    """Anchors of a cell and cells of each level, as :func:`plain` takes them."""

    anchors: Any
    cells: Any


class Claims(NamedTuple):
    """What ``overlap_kernel`` leaves for ``match_kernel``.

    ``best_ptr`` [M], int64: 0 of an invalid row, 1 of one that meets no anchor, else a key that orders the largest IoU
    of each row; zeros before and after. ``bits_ptr``: of each block of anchors so many ``words``, as :func:`plain`
    takes them, whose bits tell rows of the image that may claim an anchor of the block; rows beyond these may.
    ``ranges_ptr`` [B, 2]: the range of each image's rows, where they are not told.
    """

    best_ptr: Any
    bits_ptr: Any
    words: Any
    ranges_ptr: Any


class Matched(NamedTuple):
    """What a match leaves.

    Of an anchor it is the row that it takes, or what is negative: odd, as BACKGROUND, or even, as IGNORED. There
    :func:`row_below` finds the row that it overlaps most, if any.
    """

    match_ptr: Any  # [B, N], int32, by position
    found_ptr: Any  # [B + 1], int32: anchors with a row, of each image; and what sums over the batch are divided by
    counts_ptr: Any  # int32: those of all; invalid rows
    tally_ptr: Any  # [B + 1], int32, zeros at first and in the end: where programs add them up
    done_ptr: Any
    weights_ptr: Any  # [programs]: sums of centreness, None where boxes are not weighed by it
    norm_ptr: Any  # that of all, at least 1e-6


class Block(NamedTuple):
    """The anchors of a program."""

    b: Any  # the image
    n: Any  # their indices
    mask: Any
    corners: Corners
    around: Corners  # the box around them


class Range(NamedTuple):
    """The rows of an image, ``first`` to ``last`` of all."""

    ptr: Any
    first: Any
    last: Any
    row_weights_ptr: Any


@triton.jit
def anchor_at(position, levels, PLANES: tl.constexpr):
    """Index of the anchor at a position."""
    n = position
    if PLANES:
        start = 0
        for level in tl.static_range(len(levels.anchors)):
            A = plain(levels.anchors[level])
            HW = plain(levels.cells[level])
            size = A * HW
            own = position - start
            here = (own >= 0) & (own < size)
            n = tl.where(here, start + (own % HW) * A + own // HW, n)
            start += size
    return n


@triton.jit
def load_corners(ptr, n, mask, ACC: tl.constexpr):
    """Some boxes, in one access; 0 where masked out."""
    corner = tl.arange(0, 4)[None, :]
    tile = tl.load(ptr + n[:, None] * 4 + corner, mask=mask[:, None], other=0.0).to(ACC)
    even, odd = tl.split(tl.reshape(tile, (n.shape[0], 2, 2)))
    x1, x2 = tl.split(even)
    y1, y2 = tl.split(odd)
    return Corners(x1, y1, x2, y2)


@triton.jit
def _place(N, SPEC: tl.constexpr):
    """The image of a program, the positions of its anchors, and a mask; those of an image the last first.

    Anchors of coarse maps have the largest IoU with more of the rows, so that few of the others raise it in between.
    """
    blocks = tl.cdiv(N, SPEC.BLOCK)
    position = (blocks - 1 - tl.program_id(0) % blocks) * SPEC.BLOCK + tl.arange(0, SPEC.BLOCK)
    return tl.program_id(0) // blocks, position, position < N


@triton.jit
def _load_block(anchors_ptr, N, levels, SPEC: tl.constexpr):
    """The anchors of a program."""
    b, position, mask = _place(N, SPEC)
    n = anchor_at(position, levels, SPEC.PLANES)
    box = load_corners(anchors_ptr, n, mask, SPEC.ACC)
    inf = float("inf")
    around = Corners(
        tl.min(tl.where(mask, box.x1, inf), axis=0),
        tl.min(tl.where(mask, box.y1, inf), axis=0),
        tl.max(tl.where(mask, box.x2, -inf), axis=0),
        tl.max(tl.where(mask, box.y2, -inf), axis=0),
    )
    return Block(b, n, mask, box, around)


@triton.jit
def _area(box):
    """Of boxes by their corners."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


@triton.jit
def _lanes(rows, g0, b, frame, SPEC: tl.constexpr):
    """The indices of LANES rows from ``g0`` on, whether they are valid ones of image b, and their corners."""
    g = g0 + tl.arange(0, LANES)
    row = of_kind(load_rows(rows.ptr, g, g < rows.last, LANES), g, g < rows.last, rows.row_weights_ptr, "object")
    valid, _label, box = row_corners(row, b, b + 1, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
    return g, valid, Corners(box[0], box[1], box[2], box[3])


@triton.jit
def _load_corners_of_row(rows, g, frame, SPEC: tl.constexpr):
    """The corners of a row that is known to be valid."""
    at = rows.ptr + g * 6
    first = tl.load(at + 2)
    row = (first, first, first, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5))  # image and label do not matter
    _valid, _label, box = row_corners(row, 0, 1, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
    return Corners(box[0], box[1], box[2], box[3])


@triton.jit
def _meets(row, around):
    """Whether rows meet a box. With what is in a box that it does not meet, a row has an IoU of exactly 0."""
    return (row.x2 > around.x1) & (row.x1 < around.x2) & (row.y2 > around.y1) & (row.y1 < around.y2)


LOWEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # less an index: of equal IoUs the lowest index has the largest key
MET: tl.constexpr = tl.constexpr(1)  # key of an IoU of 0


@triton.jit
def _quotient(a, b):
    """:func:`divide` for a >= 0, and 0 where a is: of 0 the GPU finds the quotient by a long way, and most boxes that
    are compared share nothing."""
    return tl.where(a > 0, divide(tl.where(a > 0, a, b), b), 0.0)


@triton.jit
def _largest(value):
    """Of numbers >= 0: in float32 by their bits, as integers, whose largest a warp finds in one instruction."""
    if value.dtype == tl.float32:
        largest = tl.max(value.to(tl.int32, bitcast=True), axis=0).to(tl.float32, bitcast=True)
    else:
        largest = tl.max(value, axis=0)
    return largest


@triton.jit
def _key(best, value, n, SPEC: tl.constexpr):
    """Of the largest IoU in a block; where rows claim one anchor also of that, and the IoU is rounded to float32."""
    key = ordered_bits(best) + MET
    if (SPEC.RESCUE == "best") | (SPEC.RESCUE == "best_first"):
        at = tl.min(tl.where(value == best, n, LOWEST), axis=0)
        key = (ordered_bits(best.to(tl.float32)) << 32) | (LOWEST.value - at).to(tl.int64)
    return key


@triton.jit
def best_anchor_of(key):
    """The anchor in a key: the first one if the row meets none."""
    return tl.where(key <= MET, 0, LOWEST.value - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _most_overlap(own, rows, claims, block, rule, frame, SPEC: tl.constexpr):
    """What each anchor takes by IoU, as a :class:`Matched` has it.

    With RESCUE leaves what each row overlaps most, see :class:`Claims`. Rows that do not meet the block have an IoU of
    0 with each of its anchors. The first of all valid rows is taken at 0, as far as the band takes any.
    """
    BLOCK: tl.constexpr = SPEC.BLOCK
    areas = _area(own.corners)
    highest = tl.zeros([BLOCK], SPEC.ACC)
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    earliest = rows.last
    for g0 in range(rows.first, rows.last, LANES):
        lanes, valid, box = _lanes(rows, g0, own.b, frame, SPEC)
        earliest = tl.minimum(earliest, tl.min(tl.where(valid, lanes, rows.last), axis=0))
        bits = lane_bits(valid & _meets(box, own.around))
        keys = tl.where(valid & (block == 0), MET, tl.zeros([LANES], tl.int64))
        while bits != 0:
            i = lowest_bit(bits)
            g = g0 + i
            bits = bits & (bits - 1)
            row = _load_corners_of_row(rows, g, frame, SPEC)
            value = iou(row, own.corners, _area(row), areas, _quotient)
            taken = tl.where(value > highest, g, taken)
            highest = tl.maximum(highest, value)
            if SPEC.RESCUE is not None:
                value = tl.where(own.mask, value, 0.0)
                best = _largest(value)
                lane = tl.where(best > 0, i, LANES)
                keys = tl.where(tl.arange(0, LANES) == lane, _key(best, value, own.n, SPEC), keys)
        if SPEC.RESCUE is not None:
            # of all rows at once, so that the memory's answer is waited for but once
            before = tl.atomic_max(claims.best_ptr + lanes, keys, mask=keys > 0, sem="relaxed")
            claiming = lane_bits((keys > MET) & (before <= keys))
            word = (g0 - rows.first) // LANES
            words = plain(claims.words)
            at = claims.bits_ptr + tl.program_id(0) * words + word
            tl.store(at, claiming.to(tl.int32), mask=word < words)
    any_row = earliest < rows.last
    taken = tl.where((taken < 0) & any_row, earliest, taken)
    highest = tl.where(any_row, highest, -1.0)
    low = exact(rule.band[0]).to(SPEC.ACC)
    high = exact(rule.band[1]).to(SPEC.ACC)
    without = BACKGROUND - 2 * (taken + 1) - ((highest >= low) & (taken >= 0)).to(tl.int32)
    return tl.where((highest >= high) & (taken >= 0), taken, without)


@triton.jit
def row_below(match):
    """The row that an anchor overlaps most, whether it takes it or not; below 0 where there is none."""
    return tl.where(match >= 0, match, ((BACKGROUND - match) >> 1) - 1)


@triton.jit
def is_ignored(match):
    """Whether anchors are neither matched nor background."""
    return (match < 0) & ((match & 1) == 0)


@triton.jit
def _claiming(g0, b, rows, claims):
    """Which of LANES rows may claim an anchor of the block, one of image b, as bits."""
    lane = tl.arange(0, LANES)
    key = tl.load(claims.best_ptr + g0 + lane, mask=g0 + lane < rows.last, other=0)
    # between the rows of an image may lie those of others, of which bits say nothing where they meet no anchor at all
    image = tl.load(rows.ptr + (g0 + lane) * 6, mask=key == MET, other=-1.0)
    alone = (image >= b) & (image < b + 1)
    words = plain(claims.words)
    word = (g0 - rows.first) // LANES
    bits = tl.load(claims.bits_ptr + tl.program_id(0) * words + word, mask=word < words, other=-1)
    return lane_bits(alone | ((((bits >> lane) & 1) != 0) & (key > MET)))


@triton.jit
def _any_claims(b, rows, claims):
    """Whether a row may claim an anchor of the block: of most blocks none does, and nothing else is read."""
    bits = tl.cast(0, tl.int64)
    for g0 in range(rows.first, rows.last, LANES):
        bits |= _claiming(g0, b, rows, claims)
    return bits != 0


@triton.jit
def _claimed(match, own, rows, claims, frame, SPEC: tl.constexpr):
    """The row that claims each anchor, whose best anchor it is; below 0 where none does."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    areas = _area(own.corners)
    saved = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    for g0 in range(rows.first, rows.last, LANES):
        bits = _claiming(g0, own.b, rows, claims)
        while bits != 0:
            g = g0 + lowest_bit(bits)
            bits = bits & (bits - 1)
            best = tl.load(claims.best_ptr + g)
            if (SPEC.RESCUE == "equal") | (SPEC.RESCUE == "own"):
                row = _load_corners_of_row(rows, g, frame, SPEC)
                value = iou(row, own.corners, _area(row), areas, _quotient)
                taken = row_below(match)
                if SPEC.RESCUE == "own":
                    taken = match * 0 + g
                saved = tl.where(ordered_bits(value) + MET == best, taken, saved)
            else:
                claim = own.n == best_anchor_of(best)
                if SPEC.RESCUE == "best_first":
                    claim = claim & (saved < 0)
                saved = tl.where(claim, tl.maximum(saved, g), saved)
    return saved


@triton.jit
def _tally(matched, b, found):
    """Adds to the anchors of an image that have a row."""
    if found != 0:
        tl.atomic_add(matched.tally_ptr + b, found, sem="relaxed")


@triton.jit(do_not_specialize=["N", "M"])
def overlap_kernel(anchors_ptr, targets, N, M, frame, levels, rule, claims, matched, SPEC: tl.constexpr):
    """What each anchor takes by IoU, and the best anchor of every row; the grid and arguments of
    :func:`match_kernel`."""
    b, position, mask = _place(N, SPEC)
    block = tl.program_id(0) % tl.cdiv(N, SPEC.BLOCK)
    own = _load_block(anchors_ptr, N, levels, SPEC)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, b, SPEC.BLOCK_G)
    if targets.offsets_ptr is None:
        if block == 0:
            tl.store(claims.ranges_ptr + 2 * b, first)
            tl.store(claims.ranges_ptr + 2 * b + 1, last)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    match = _most_overlap(own, rows, claims, block, rule, frame, SPEC)
    match = _hide(match, own, rows, frame, SPEC)
    tl.store(matched.match_ptr + b.to(tl.int64) * N + position, match, mask=mask)
    _tally(matched, b, tl.sum((mask & (match >= 0)).to(tl.int32), axis=0))


@triton.jit
def _settle_claims(anchors_ptr, targets, N, M, frame, levels, claims, matched, SPEC: tl.constexpr):
    """Gives anchors to the rows that claim them: few, so that of most programs nothing is read but who may."""
    b, position, mask = _place(N, SPEC)
    if targets.offsets_ptr is None:
        first, last = tl.split(tl.load(claims.ranges_ptr + 2 * b + tl.arange(0, 2)))
    else:
        first, last = held_range(targets.offsets_ptr, M, b)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    if _any_claims(b, rows, claims):
        at = matched.match_ptr + b.to(tl.int64) * N + position
        match = tl.load(at, mask=mask, other=IGNORED)
        saved = _claimed(match, _load_block(anchors_ptr, N, levels, SPEC), rows, claims, frame, SPEC)
        tl.debug_barrier()  # threads that hold the same anchor have all read what one of them overwrites
        tl.store(at, saved, mask=mask & (saved >= 0))
        _tally(matched, b, tl.sum((mask & (saved >= 0) & (match < 0)).to(tl.int32), axis=0))


@triton.jit
def _match_alone(anchors_ptr, targets, N, M, frame, levels, rule, claims, matched, SPEC: tl.constexpr):
    """What each anchor takes where no row claims one."""
    b, position, mask = _place(N, SPEC)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, b, SPEC.BLOCK_G)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    own = _load_block(anchors_ptr, N, levels, SPEC)
    if SPEC.CENTRE:
        match = _smallest_around(own, rows, rule, frame, N, SPEC)
        if matched.weights_ptr is not None:
            tl.store(matched.weights_ptr + tl.program_id(0), _weights(match, own, rows, frame, SPEC))
    else:
        match = _most_overlap(own, rows, claims, 0, rule, frame, SPEC)
    match = _hide(match, own, rows, frame, SPEC)
    tl.store(matched.match_ptr + b.to(tl.int64) * N + position, match, mask=mask)
    _tally(matched, b, tl.sum((mask & (match >= 0)).to(tl.int32), axis=0))


@triton.jit
def _reached(row, around_x, around_y, reach, low, high):
    """Whether rows may take an anchor: they hold a place of the box around the anchors' centres, have their own centre
    at most so far from it, and are as large as the range asks for. Differences of floats are rounded in order, so no
    anchor is missed; a side that is as far away as can be is half of all, or more."""
    x = 0.5 * (row.x1 + row.x2)
    y = 0.5 * (row.y1 + row.y2)
    holds = (row.x1 < around_x[1]) & (row.x2 > around_x[0]) & (row.y1 < around_y[1]) & (row.y2 > around_y[0])
    near_x = (x - around_x[1] < reach) & (around_x[0] - x < reach)
    near_y = (y - around_y[1] < reach) & (around_y[0] - y < reach)
    side = tl.maximum(row.x2 - row.x1, row.y2 - row.y1)
    return holds & near_x & near_y & (side > low) & (0.499 * side < high)


@triton.jit
def _smallest_around(own, rows, rule, frame, N, SPEC: tl.constexpr):
    """The row that each anchor takes by its centre."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    x = 0.5 * (own.corners.x1 + own.corners.x2)
    y = 0.5 * (own.corners.y1 + own.corners.y2)
    side = own.corners.x2 - own.corners.x1
    reach = side * exact(rule.radius).to(SPEC.ACC)
    low = tl.where(own.n < plain(rule.ends[0]), 0.0, side * tl.cast(rule.ranges[0], SPEC.ACC))
    inf = float("inf")
    high = tl.where(own.n >= N - plain(rule.ends[1]), inf, side * tl.cast(rule.ranges[1], SPEC.ACC))
    around_x = (tl.min(tl.where(own.mask, x, inf), axis=0), tl.max(tl.where(own.mask, x, -inf), axis=0))
    around_y = (tl.min(tl.where(own.mask, y, inf), axis=0), tl.max(tl.where(own.mask, y, -inf), axis=0))
    farthest_reach = tl.max(reach, axis=0)  # 0 where masked out
    lowest = tl.min(tl.where(own.mask, low, inf), axis=0)
    highest = tl.max(tl.where(own.mask, high, 0.0), axis=0)
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    best = tl.zeros([BLOCK], SPEC.ACC) + 1e-5  # the peer's bound
    for g0 in range(rows.first, rows.last, LANES):
        _lane, valid, box = _lanes(rows, g0, own.b, frame, SPEC)
        bits = lane_bits(valid & _reached(box, around_x, around_y, farthest_reach, lowest, highest))
        while bits != 0:
            g = g0 + lowest_bit(bits)
            bits = bits & (bits - 1)
            row = _load_corners_of_row(rows, g, frame, SPEC)
            off = tl.maximum(tl.abs(x - 0.5 * (row.x1 + row.x2)), tl.abs(y - 0.5 * (row.y1 + row.y2)))
            nearest = tl.minimum(tl.minimum(x - row.x1, y - row.y1), tl.minimum(row.x2 - x, row.y2 - y))
            farthest = tl.maximum(tl.maximum(x - row.x1, y - row.y1), tl.maximum(row.x2 - x, row.y2 - y))
            fits = (off < reach) & (nearest > 0) & (farthest > low) & (farthest < high)
            value = 1e8 - _area(row)
            taken = tl.where(fits & ((value > best) | ((taken < 0) & (value == best))), g, taken)
            best = tl.where(taken == g, value, best)
    return taken


@triton.jit
def _weights(match, own, rows, frame, SPEC: tl.constexpr):
    """The sum of the centreness of a program's anchors in the rows that they have taken."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    has = own.mask & (match >= 0)
    row = load_rows(rows.ptr, match, has, BLOCK)
    place = relative(own.corners, row, has, frame.size, SPEC.CORNERS, SPEC.ACC)
    return tl.sum(tl.where(has, centreness(place.shift, place.true), 0.0), axis=0)


@triton.jit
def _hide(match, own, rows, frame, SPEC: tl.constexpr):
    """Anchors without a row that have their centre in an ignored region, in float32 whatever the compute type, are
    ignored.
    """
    if rows.row_weights_ptr is not None:
        x = 0.5 * (own.corners.x1.to(tl.float32) + own.corners.x2.to(tl.float32))
        y = 0.5 * (own.corners.y1.to(tl.float32) + own.corners.y2.to(tl.float32))
        candidates = Candidates(rows.ptr, rows.row_weights_ptr, rows.first, rows.last, own.b)
        first, logits = frame.classes
        points = Points(x, y, own.mask, frame.size)
        hidden = in_regions(points, candidates, logits - first, 1.0, first, SPEC.CORNERS)
        match = tl.where(hidden & (match < 0) & ((match & 1) != 0), match - 1, match)
    return match


@triton.jit
def _count_invalid(targets, M, B, frame, SPEC: tl.constexpr):
    """Of the rows that this program looks at those that no image will use, padding behind the last row is none; and, by
    the first program, offsets that are wrong."""
    end = rows_end(targets.offsets_ptr, M, B)
    invalid = tl.zeros([LANES], tl.int32)
    for g0 in range(tl.program_id(0) * LANES, end, tl.num_programs(0) * LANES):
        g = g0 + tl.arange(0, LANES)
        row = of_kind(load_rows(targets.ptr, g, g < end, LANES), g, g < end, targets.row_weights_ptr, "any")
        valid, _label, _box = row_corners(row, 0, B, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
        invalid += ((g < end) & ~in_its_range(row[0], g, valid, targets.offsets_ptr)).to(tl.int32)
    count = tl.sum(invalid, axis=0)
    if tl.program_id(0) == 0:
        count += wrong_offsets(targets.offsets_ptr, M, B, LANES)
    return count


@triton.jit
def _finish(matched, M, B, claims, SPEC: tl.constexpr):
    """What the last program does: counts go where they are read, and shared memory is cleared for the next call."""
    lane = tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.int32)
    least = total
    for b0 in range(0, B, LANES):
        mask = b0 + lane < B
        found = tl.load(matched.tally_ptr + b0 + lane, mask=mask, other=0, cache_modifier=".cg")
        tl.store(matched.found_ptr + b0 + lane, found, mask=mask)
        tl.store(matched.tally_ptr + b0 + lane, lane * 0, mask=mask)
        total += found
        if SPEC.MEAN == "images":
            least += (mask & (found == 0)).to(tl.int32)
    divisor = tl.sum(total, axis=0)
    if SPEC.MEAN == "images":
        divisor += tl.sum(least, axis=0)
    elif SPEC.MEAN == "one more":
        divisor += 1
    tl.store(matched.found_ptr + B, divisor)
    tl.store(matched.counts_ptr, tl.sum(total, axis=0))
    tl.store(matched.counts_ptr + 1, tl.load(matched.tally_ptr + B, cache_modifier=".cg"))
    tl.debug_barrier()  # every thread has read what one of them overwrites
    tl.store(matched.tally_ptr + B, 0)
    if SPEC.RESCUE is not None:
        for g0 in range(0, M, LANES):
            tl.store(claims.best_ptr + g0 + lane, tl.zeros([LANES], tl.int64), mask=g0 + lane < M)
    if matched.weights_ptr is not None:
        weights = column(column_sums(matched.weights_ptr, tl.num_programs(0), 1, SPEC.ACC), 0)
        tl.store(matched.norm_ptr, tl.maximum(weights, 1e-6))
    tl.store(matched.done_ptr, 0)


@triton.jit(do_not_specialize=["N", "M", "B"])
def match_kernel(anchors_ptr, targets, N, M, B, frame, levels, rule, claims, picks_ptr, matched, SPEC: tl.constexpr):
    """The row of every anchor; grid: for each image the blocks of its anchors.

    ``claims`` is what :func:`overlap_kernel` left, as are the matches; the last program clears it. ``picks_ptr``, of a
    ranked head: a counter of each image is set to 0, see :mod:`.rank`.
    """
    pid = tl.program_id(0)
    if SPEC.RESCUE is None:
        _match_alone(anchors_ptr, targets, N, M, frame, levels, rule, claims=claims, matched=matched, SPEC=SPEC)
    else:
        _settle_claims(anchors_ptr, targets, N, M, frame, levels, claims=claims, matched=matched, SPEC=SPEC)
    invalid = _count_invalid(targets, M, B, frame, SPEC)
    if invalid > 0:
        tl.atomic_add(matched.tally_ptr + B, invalid, sem="relaxed")
    if picks_ptr is not None:
        if pid % tl.cdiv(N, SPEC.BLOCK) == 0:
            tl.store(picks_ptr + 4 * (pid // tl.cdiv(N, SPEC.BLOCK)) + 3, 0)
    if is_last(matched.done_ptr, tl.num_programs(0)):
        _finish(matched, M, B, claims, SPEC)
