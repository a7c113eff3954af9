"""Loading target rows: image, class and four numbers of a box, six floats each."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .assign import row_valid


class Row(NamedTuple):
    """A row, or a block of them: centre and size relative to the image, or where it is told so, two corners."""

    image: Any
    label: Any
    cx: Any
    cy: Any
    w: Any
    h: Any


@triton.jit
def _row_of(values):
    """Of rows of eight numbers [..., 2, 2, 2] the first six."""
    even, odd = tl.split(values)
    zero_four, two_six = tl.split(even)
    one_five, three_seven = tl.split(odd)
    zero, four = tl.split(zero_four)
    one, five = tl.split(one_five)
    two, _spare = tl.split(two_six)
    three, _spare = tl.split(three_seven)
    return Row(zero, one, two, three, four, five)


@triton.jit
def load_row(rows_ptr, g):
    """The six numbers of row g, in one access."""
    i = tl.arange(0, 8)
    return _row_of(tl.reshape(tl.load(rows_ptr + g * 6 + i, mask=i < 6, other=-1.0), (2, 2, 2)))


@triton.jit
def load_rows(rows_ptr, g, mask, BLOCK_G: tl.constexpr):
    """The same of a block of rows; rows masked out are of no image."""
    i = tl.arange(0, 8)[:, None]
    # times 1, which the compiler does not know to be: else several threads would share a row, and repeat its work
    at = (rows_ptr + g * 6)[None, :] + i * tl.num_programs(1)
    values = tl.load(at, mask=mask[None, :] & (i < 6), other=-1.0)
    return _row_of(tl.reshape(tl.trans(values), (BLOCK_G, 2, 2, 2)))


@triton.jit
def of_kind(row, g, mask, weights_ptr, KIND: tl.constexpr):
    """Rows, those of another kind of no image: by their weights "object" (0 or more), "region" (below 0), or "any" that
    is finite. Without weights all are objects.
    """
    image = row.image
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + g, mask=mask, other=float("nan"))
        known = tl.abs(weight) < float("inf")
        if KIND == "object":
            known = known & (weight >= 0)
        elif KIND == "region":
            known = known & (weight < 0)
        image = tl.where(known, image, -1.0)
    return Row(image, row.label, row.cx, row.cy, row.w, row.h)


@triton.jit
def row_weights(weights_ptr, g, mask, ACC: tl.constexpr):
    """The weights of objects, 1 where masked out."""
    return tl.load(weights_ptr + g, mask=mask, other=1.0).to(ACC)


@triton.jit
def _held(offset, M):
    """An offset, as far as there are rows."""
    return tl.minimum(tl.maximum(offset, 0), M)


@triton.jit
def rows_end(offsets_ptr, M, B):
    """Where the rows end: what follows is capacity."""
    end = M
    if offsets_ptr is not None:
        end = _held(tl.load(offsets_ptr + B + 1), M)
    return end


@triton.jit
def held_range(offsets_ptr, M, b):
    """The range of rows that the offsets give image b."""
    return tl.split(_held(tl.load(offsets_ptr + b + tl.arange(0, 2)), M))


@triton.jit
def in_its_range(image, g, mask, offsets_ptr):
    """Whether the rows g lie where the offsets say that those of their ``image`` do: nobody finds them elsewhere."""
    found = mask
    if offsets_ptr is not None:
        at = offsets_ptr + image.to(tl.int32)
        found = (g >= tl.load(at, mask=mask, other=0)) & (g < tl.load(at + 1, mask=mask, other=0))
    return found


@triton.jit
def wrong_offsets(offsets_ptr, M, B, BLOCK_G: tl.constexpr):
    """How many offsets are beyond the rows or below the one before."""
    wrong = tl.zeros([BLOCK_G], tl.int32)
    if offsets_ptr is not None:
        for i0 in range(0, B + 1, BLOCK_G):
            i = i0 + tl.arange(0, BLOCK_G)
            there = i < B + 1
            both = (offsets_ptr + i)[:, None] + tl.arange(0, 2)[None, :]
            before, offset = tl.split(tl.load(both, mask=there[:, None], other=0))
            wrong += (there & ((offset < 0) | (offset > M) | (offset < before))).to(tl.int32)
            wrong += ((i == 0) & ((before < 0) | (before > M))).to(tl.int32)
    return tl.sum(wrong, axis=0)


@triton.jit
def image_rows(rows_ptr, offsets_ptr, M, b, BLOCK_G: tl.constexpr):
    """The range that holds all rows of image b: exact with offsets, else from its first to its last row."""
    if offsets_ptr is not None:
        first, last = held_range(offsets_ptr, M, b)
    else:
        g = tl.arange(0, BLOCK_G)
        before = g * 0 - M  # minus the first
        highest = g * 0
        for g0 in range(0, M, BLOCK_G):
            image = tl.load(rows_ptr + (g0 + g) * 6, mask=g0 + g < M, other=-1.0)
            here = (image >= b) & (image < b + 1)
            before = tl.where(here, tl.maximum(before, -g0 - g), before)
            highest = tl.where(here, g0 + g + 1, highest)
        both = tl.max(tl.join(before, highest), axis=0)  # as one, which takes half the barriers
        before, last = tl.split(both)
        first = -before
    return first, last


@triton.jit
def relative_row(row, first_class, size, CORNERS: tl.constexpr):
    """Rows by their class from 0 and by centre and size relative to the image, whatever they hold.

    The box of a row is two corners in pixels, or its centre and size. ``size`` is the image's width and height;
    infinite where corners are all that is known.
    """
    image, label, c0, c1, c2, c3 = row
    box = (c0, c1, c2, c3)
    if CORNERS:
        width, height = size
        box = (0.5 * (c0 + c2) / width, 0.5 * (c1 + c3) / height, c2 - c0, c3 - c1)
    return Row(image, label - first_class, box[0], box[1], box[2], box[3])


@triton.jit
def row_corners(row, first_image, last_image, classes, size, CORNERS: tl.constexpr, ACC: tl.constexpr):
    """Whether rows are valid and of these images, their class, and x1, y1, x2, y2 in pixels.

    ``size`` and CORNERS as :func:`relative_row` takes them; ``classes`` are the first class and the number of logits.
    """
    _image, label, c0, c1, c2, c3 = row
    width, height = size
    if CORNERS:
        corners = (c0.to(ACC), c1.to(ACC), c2.to(ACC), c3.to(ACC))
    else:
        hx = 0.5 * c2.to(ACC)
        hy = 0.5 * c3.to(ACC)
        cx = c0.to(ACC)
        cy = c1.to(ACC)
        corners = ((cx - hx) * width, (cy - hy) * height, (cx + hx) * width, (cy + hy) * height)
    first_class, logits = classes
    row = relative_row(row, first_class, size, CORNERS)
    valid = row_valid(row, first_image, last_image, logits - first_class, 1.0)
    return valid, label.to(tl.int32), corners
