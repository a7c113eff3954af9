"""What anchors have taken, as it is read."""

import triton
import triton.language as tl

from ..rows import row_weights
from .blocks import BACKGROUND


@triton.jit
def share(found_ptr, b, B, BY_IMAGE: tl.constexpr, ACC: tl.constexpr):
    """What the sums of image b are multiplied by."""
    if BY_IMAGE:
        result = 1.0 / (tl.maximum(tl.load(found_ptr + b), 1) * B).to(ACC)
    else:
        result = 1.0 / tl.maximum(tl.load(found_ptr + B), 1).to(ACC)
    return result


@triton.jit
def labels_of(rows_ptr, match):
    """Class of the rows that anchors have taken, -1 where they have none."""
    return tl.load(rows_ptr + match * 6 + 1, mask=match >= 0, other=-1.0).to(tl.int32)


@triton.jit
def own_weights(matched, match, ACC: tl.constexpr):
    """Weights of the rows that anchors have taken, 1 where they have none."""
    return row_weights(matched.row_weights_ptr, match, match >= 0, ACC)


@triton.jit
def row_below(match):
    """The row that an anchor overlaps most, whether it takes it or not; below 0 where there is none."""
    return tl.where(match >= 0, match, ((BACKGROUND - match) >> 1) - 1)


@triton.jit
def is_ignored(match):
    """Whether anchors are neither matched nor background."""
    return (match < 0) & ((match & 1) == 0)
