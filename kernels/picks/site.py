"""Where cells lie, in the image, in predictions and in memory of ours; and target rows in pixels."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..assign import row_valid
from ..levels import integer_of, number_of
from ..primitives import plain
from ..rows import Row, in_its_range, of_kind, rows_end


class Frame(NamedTuple):
    """What rows are read with: see :class:`.records.Numbers`; the image in pixels; images, as ``plain`` takes them."""

    limit: Any
    width: Any
    height: Any
    batch: Any


class Cells(NamedTuple):
    """Some cells, of one level or of several."""

    n: Any  # among those of an image
    level: Any
    line: Any
    column: Any
    stride: Any  # pixels


class Object(NamedTuple):
    """A row, or a block of them; of one that is not valid a legal box."""

    valid: Any
    image: Any
    label: Any
    cx: Any  # in images
    cy: Any
    width: Any  # in pixels
    height: Any


@triton.jit
def object_of(row, g, mask, targets, frame, SPEC: tl.constexpr, KIND: tl.constexpr):
    """Rows as objects; those masked out are not valid, nor those that no image will use, nor those of another kind."""
    row = of_kind(row, g, mask, targets.row_weights_ptr, KIND)
    valid = mask & row_valid(row, 0, plain(frame.batch), SPEC.C, frame.limit)
    valid = in_its_range(row.image, g, valid, targets.offsets_ptr)
    return Object(
        valid,
        tl.where(valid, row.image, 0.0).to(tl.int32),
        tl.where(valid, row.label, 0.0).to(tl.int32),
        tl.where(valid, row.cx, 0.5).to(SPEC.ACC),
        tl.where(valid, row.cy, 0.5).to(SPEC.ACC),
        tl.where(valid, row.w, 1.0).to(SPEC.ACC) * frame.width,
        tl.where(valid, row.h, 1.0).to(SPEC.ACC) * frame.height,
    )


@triton.jit
def load_object(targets, g, M, frame, SPEC: tl.constexpr, KIND: tl.constexpr):
    """Row g; not valid where there is none."""
    mask = g < rows_end(targets.offsets_ptr, M, plain(frame.batch))
    at = targets.ptr + tl.cast(g, tl.int64) * 6
    row = Row(
        tl.load(at, mask=mask, other=-1.0),
        tl.load(at + 1, mask=mask, other=-1.0),
        tl.load(at + 2, mask=mask, other=-1.0),
        tl.load(at + 3, mask=mask, other=-1.0),
        tl.load(at + 4, mask=mask, other=-1.0),
        tl.load(at + 5, mask=mask, other=-1.0),
    )
    return object_of(row, g, mask, targets, frame, SPEC, KIND)


@triton.jit
def all_cells(levels):
    """How many cells an image has."""
    return plain(levels.begins[len(levels.widths)])


@triton.jit
def divided(a, b):
    """a // b of a >= 0, b > 0, as long as a is below a million: half a cell keeps the quotient from whole numbers by
    more than its rounding."""
    return ((a.to(tl.float32) + 0.5) * (1.0 / b.to(tl.float32))).to(tl.int32)


@triton.jit
def cells_at(n, levels, SPEC: tl.constexpr):
    """Cells by their index in the image."""
    level = n * 0
    local = n
    for i in tl.static_range(1, len(levels.widths)):
        first = plain(levels.begins[i])
        here = n >= first
        level = tl.where(here, i, level)
        local = tl.where(here, n - first, local)
    W = integer_of(levels.widths, level)
    line = divided(local, W)
    return Cells(n, level, line, local - line * W, stride_of(level, levels, SPEC))


@triton.jit
def stride_of(level, levels, SPEC: tl.constexpr):
    """Pixels per cell."""
    return tl.cast(number_of(levels.strides, level), SPEC.ACC)


@triton.jit
def offsets(one, cells, frame, SPEC: tl.constexpr):
    """An object's centre from the middles of cells, in pixels; a product is not rounded before one is taken off."""
    x = (cells.column.to(SPEC.ACC) + 0.5) * cells.stride
    y = (cells.line.to(SPEC.ACC) + 0.5) * cells.stride
    zero = tl.zeros_like(x)  # a fused operation takes no numbers of different shapes
    return tl.fma(zero + one.cx, zero + frame.width, -x), tl.fma(zero + one.cy, zero + frame.height, -y)


@triton.jit
def channel_at(part, b, channel, cells):
    """Where a channel of a part of the predictions of image b lies, of each cell."""
    at = _channel_of(part, 0, b, channel).to(tl.int64)  # AMD's compiler chooses no pointers by tensors
    row = plain(part.by[0].row)
    column = plain(part.by[0].column)
    for i in tl.static_range(1, len(part.ptrs)):
        here = cells.level == i
        at = tl.where(here, _channel_of(part, i, b, channel).to(tl.int64), at)
        row = tl.where(here, plain(part.by[i].row), row)
        column = tl.where(here, plain(part.by[i].column), column)
    return at.to(part.ptrs[0].dtype) + (
        cells.line * row + cells.column * column
    )  # within a channel, 32 bits are enough


@triton.jit
def load_channel(part, b, channel, cells, mask, SPEC: tl.constexpr):
    """A channel of a part of the predictions at cells of image b, 0 where masked out."""
    return tl.load(channel_at(part, b, channel, cells), mask=mask, other=0.0).to(SPEC.ACC)


@triton.jit
def _channel_of(part, LEVEL: tl.constexpr, b, channel):
    by = part.by[LEVEL]
    ptr = part.ptrs[LEVEL] + plain(part.starts[LEVEL]) + tl.cast(channel, tl.int64) * plain(by.channel)
    return ptr + tl.cast(b, tl.int64) * plain(by.image)
