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

import triton
import triton.language as tl

from ..regions import Candidates, Points, in_regions
from ..rows import held_range, image_rows, in_its_range, load_rows, of_kind, row_corners, rows_end, wrong_offsets
from ..sums import column, column_sums, is_last
from .blocks import IGNORED, LANES, Range, load_block, place_of
from .by_centre import smallest_around, sum_of_weights
from .by_iou import any_claims, claimed, most_overlap


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
def _tally(matched, b, found):
    """Adds to the anchors of an image that have a row."""
    if found != 0:
        tl.atomic_add(matched.tally_ptr + b, found, sem="relaxed")


@triton.jit
def _match_alone(anchors_ptr, targets, N, M, frame, levels, rule, claims, matched, SPEC: tl.constexpr):
    """What each anchor takes where no row claims one."""
    b, position, mask = place_of(N, SPEC)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, b, SPEC.BLOCK_G)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    own = load_block(anchors_ptr, N, levels, SPEC)
    if SPEC.CENTRE:
        match = smallest_around(own, rows, rule, frame, N, SPEC)
        if matched.weights_ptr is not None:
            tl.store(matched.weights_ptr + tl.program_id(0), sum_of_weights(match, own, rows, frame, SPEC))
    else:
        match = most_overlap(own, rows, claims, 0, rule, frame, SPEC)
    match = _hide(match, own, rows, frame, SPEC)
    tl.store(matched.match_ptr + b.to(tl.int64) * N + position, match, mask=mask)
    _tally(matched, b, tl.sum((mask & (match >= 0)).to(tl.int32), axis=0))


@triton.jit
def _settle_claims(anchors_ptr, targets, N, M, frame, levels, claims, matched, SPEC: tl.constexpr):
    """Gives anchors to the rows that claim them: few, so that of most programs nothing is read but who may."""
    b, position, mask = place_of(N, SPEC)
    if targets.offsets_ptr is None:
        first, last = tl.split(tl.load(claims.ranges_ptr + 2 * b + tl.arange(0, 2)))
    else:
        first, last = held_range(targets.offsets_ptr, M, b)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    if any_claims(b, rows, claims):
        at = matched.match_ptr + b.to(tl.int64) * N + position
        match = tl.load(at, mask=mask, other=IGNORED)
        saved = claimed(match, load_block(anchors_ptr, N, levels, SPEC), rows, claims, frame, SPEC)
        tl.debug_barrier()  # threads that hold the same anchor have all read what one of them overwrites
        tl.store(at, saved, mask=mask & (saved >= 0))
        _tally(matched, b, tl.sum((mask & (saved >= 0) & (match < 0)).to(tl.int32), axis=0))


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


@triton.jit(do_not_specialize=["N", "M"])
def overlap_kernel(anchors_ptr, targets, N, M, frame, levels, rule, claims, matched, SPEC: tl.constexpr):
    """What each anchor takes by IoU, and the best anchor of every row; the grid and arguments of
    :func:`match_kernel`."""
    b, position, mask = place_of(N, SPEC)
    block = tl.program_id(0) % tl.cdiv(N, SPEC.BLOCK)
    own = load_block(anchors_ptr, N, levels, SPEC)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, b, SPEC.BLOCK_G)
    if targets.offsets_ptr is None:
        if block == 0:
            tl.store(claims.ranges_ptr + 2 * b, first)
            tl.store(claims.ranges_ptr + 2 * b + 1, last)
    rows = Range(targets.ptr, first, last, targets.row_weights_ptr)
    match = most_overlap(own, rows, claims, block, rule, frame, SPEC)
    match = _hide(match, own, rows, frame, SPEC)
    tl.store(matched.match_ptr + b.to(tl.int64) * N + position, match, mask=mask)
    _tally(matched, b, tl.sum((mask & (match >= 0)).to(tl.int32), axis=0))


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
