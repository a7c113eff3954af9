"""Rows that anchors take by IoU, and rows that claim their best anchors."""

import triton
import triton.language as tl

from ..overlap import iou
from ..primitives import divide, exact, lane_bits, lowest_bit, ordered_bits, plain
from ..rows import load_rows
from .blocks import BACKGROUND, LANES, area, corners_of_lane, lanes_of, load_corners_of_row
from .taken import row_below

LOWEST: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # less an index: of equal IoUs the lowest index has the largest key
MET: tl.constexpr = tl.constexpr(1)  # key of an IoU of 0


@triton.jit
def _meets(row, around):
    """Whether rows meet a box. With what is in a box that it does not meet, a row has an IoU of exactly 0."""
    return (row.x2 > around.x1) & (row.x1 < around.x2) & (row.y2 > around.y1) & (row.y1 < around.y2)


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
def most_overlap(own, rows, claims, block, rule, frame, SPEC: tl.constexpr):
    """What each anchor takes by IoU, as a :class:`Matched` has it.

    With RESCUE leaves what each row overlaps most, see :class:`Claims`. Rows that do not meet the block have an IoU of
    0 with each of its anchors. The first of all valid rows is taken at 0, as far as the band takes any.
    """
    BLOCK: tl.constexpr = SPEC.BLOCK
    areas = area(own.corners)
    highest = tl.zeros([BLOCK], SPEC.ACC)
    taken = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    earliest = rows.last
    for g0 in range(rows.first, rows.last, LANES):
        lanes, valid, box = lanes_of(rows, g0, own.b, frame, SPEC)
        earliest = tl.minimum(earliest, tl.min(tl.where(valid, lanes, rows.last), axis=0))
        bits = lane_bits(valid & _meets(box, own.around))
        keys = tl.where(valid & (block == 0), MET, tl.zeros([LANES], tl.int64))
        while bits != 0:
            i = lowest_bit(bits)
            g = g0 + i
            bits = bits & (bits - 1)
            row = load_corners_of_row(rows, g, frame, SPEC)
            value = iou(row, own.corners, area(row), areas, _quotient)
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
def any_claims(b, rows, claims):
    """Whether a row may claim an anchor of the block: of most blocks none does, and nothing else is read."""
    bits = tl.cast(0, tl.int64)
    for g0 in range(rows.first, rows.last, LANES):
        bits |= _claiming(g0, b, rows, claims)
    return bits != 0


@triton.jit
def claimed(match, own, rows, claims, frame, SPEC: tl.constexpr):
    """The row that claims each anchor, whose best anchor it is; below 0 where none does."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    areas = area(own.corners)
    saved = tl.zeros([BLOCK], tl.int32) + BACKGROUND
    for g0 in range(rows.first, rows.last, LANES):
        bits = _claiming(g0, own.b, rows, claims)
        # of all at once: each alone would be waited for
        numbers = load_rows(rows.ptr, g0 + tl.arange(0, LANES), ((bits >> tl.arange(0, LANES)) & 1) != 0, LANES)
        while bits != 0:
            g = g0 + lowest_bit(bits)
            bits = bits & (bits - 1)
            best = tl.load(claims.best_ptr + g)
            if (SPEC.RESCUE == "equal") | (SPEC.RESCUE == "own"):
                row = corners_of_lane(numbers, g - g0, frame, SPEC)
                value = iou(row, own.corners, area(row), areas, _quotient)
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
