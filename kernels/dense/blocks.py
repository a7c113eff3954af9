"""What matches read and leave: blocks of anchors, rows as lanes, and the records of both."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..boxes import load_corners
from ..overlap import Corners
from ..primitives import WARP_LANES, of_lane, plain
from ..rows import load_rows, of_kind, row_corners

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
    :func:`.taken.row_below` finds the row that it overlaps most, if any.
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
def load_anchors(ptr, n, mask, ACC: tl.constexpr):
    """Some anchors; 0 where masked out."""
    box = load_corners(ptr, n, mask)
    return Corners(box.x1.to(ACC), box.y1.to(ACC), box.x2.to(ACC), box.y2.to(ACC))


@triton.jit
def place_of(N, SPEC: tl.constexpr):
    """The image of a program, the positions of its anchors, and a mask; those of an image the last first.

    Anchors of coarse maps have the largest IoU with more of the rows, so that few of the others raise it in between.
    """
    blocks = tl.cdiv(N, SPEC.BLOCK)
    position = (blocks - 1 - tl.program_id(0) % blocks) * SPEC.BLOCK + tl.arange(0, SPEC.BLOCK)
    return tl.program_id(0) // blocks, position, position < N


@triton.jit
def load_block(anchors_ptr, N, levels, SPEC: tl.constexpr):
    """The anchors of a program."""
    b, position, mask = place_of(N, SPEC)
    n = anchor_at(position, levels, SPEC.PLANES)
    box = load_anchors(anchors_ptr, n, mask, SPEC.ACC)
    inf = float("inf")
    around = Corners(
        tl.min(tl.where(mask, box.x1, inf), axis=0),
        tl.min(tl.where(mask, box.y1, inf), axis=0),
        tl.max(tl.where(mask, box.x2, -inf), axis=0),
        tl.max(tl.where(mask, box.y2, -inf), axis=0),
    )
    return Block(b, n, mask, box, around)


@triton.jit
def area(box):
    """Of boxes by their corners."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


@triton.jit
def lanes_of(rows, g0, b, frame, SPEC: tl.constexpr):
    """The indices of LANES rows from ``g0`` on, whether they are valid ones of image b, and their corners."""
    g = g0 + tl.arange(0, LANES)
    row = of_kind(load_rows(rows.ptr, g, g < rows.last, LANES), g, g < rows.last, rows.row_weights_ptr, "object")
    valid, _label, box = row_corners(row, b, b + 1, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
    return g, valid, Corners(box[0], box[1], box[2], box[3])


@triton.jit
def corners_of_lane(row, lane, frame, SPEC: tl.constexpr):
    """The corners of one of LANES rows, known to be valid."""
    own = tl.arange(0, LANES) == lane
    cx = of_lane(row.cx, own)
    one = (cx, cx, cx, of_lane(row.cy, own), of_lane(row.w, own), of_lane(row.h, own))  # image and label do not matter
    _valid, _label, box = row_corners(one, 0, 1, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
    return Corners(box[0], box[1], box[2], box[3])


@triton.jit
def load_corners_of_row(rows, g, frame, SPEC: tl.constexpr):
    """The corners of a row that is known to be valid."""
    at = rows.ptr + g * 6
    first = tl.load(at + 2)
    row = (first, first, first, tl.load(at + 3), tl.load(at + 4), tl.load(at + 5))  # image and label do not matter
    _valid, _label, box = row_corners(row, 0, 1, frame.classes, frame.size, SPEC.CORNERS, SPEC.ACC)
    return Corners(box[0], box[1], box[2], box[3])
