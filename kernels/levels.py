"""What a program takes of its level, which is known only when it runs: one body serves all levels.

Tuples hold one entry a level. Numbers travel as :func:`~.primitives.plain` takes them, so that no kernel is compiled
for the sizes of a map.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import plain


class Strides(NamedTuple):
    """Elements from one image, row, column, anchor, channel to the next."""

    image: Any
    row: Any
    column: Any
    anchor: Any
    channel: Any


@triton.jit
def pointer_of(pointers, level):
    """The pointer of a level."""
    chosen = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        chosen = tl.where(level == i, pointers[i], chosen)
    return chosen


@triton.jit
def number_of(numbers, level):
    """The float of a level."""
    chosen = numbers[0]
    for i in tl.static_range(1, len(numbers)):
        chosen = tl.where(level == i, numbers[i], chosen)
    return chosen


@triton.jit
def integer_of(integers, level):
    """The integer of a level."""
    chosen = level * 0 + integers[0]
    for i in tl.static_range(1, len(integers)):
        chosen = tl.where(level == i, integers[i], chosen)
    return plain(chosen)


@triton.jit
def strides_of(strides, level):
    """The :class:`Strides` of a level."""
    image = strides[0].image
    row = strides[0].row
    column = strides[0].column
    anchor = strides[0].anchor
    channel = strides[0].channel
    for i in tl.static_range(1, len(strides)):
        here = level == i
        image = tl.where(here, strides[i].image, image)
        row = tl.where(here, strides[i].row, row)
        column = tl.where(here, strides[i].column, column)
        anchor = tl.where(here, strides[i].anchor, anchor)
        channel = tl.where(here, strides[i].channel, channel)
    return Strides(plain(image), plain(row), plain(column), plain(anchor), plain(channel))


@triton.jit
def are_wide(strides):
    """Whether all planes of a level begin at multiples of 16 elements, as the widest accesses need."""
    return (strides.image % 16 == 0) & (strides.anchor % 16 == 0) & (strides.channel % 16 == 0)


@triton.jit
def as_wide(strides):
    """Strides of which :func:`are_wide` is so, in a form that tells the compiler."""
    image = strides.image // 16 * 16
    anchor = strides.anchor // 16 * 16
    channel = strides.channel // 16 * 16
    return Strides(image, strides.row, strides.column, anchor, channel)
