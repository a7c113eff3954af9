"""What terms take and return, by name."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Span(NamedTuple):
    """An interval by centre and size, or derivatives by these."""

    centre: Any
    size: Any


class Jacobian(NamedTuple):
    """Derivatives of the centre and the size of an axis by its raw outputs a and b."""

    centre_by_a: Any
    centre_by_b: Any
    size_by_a: Any
    size_by_b: Any


class Axis(NamedTuple):
    """The predicted interval p and the true interval g on one axis, by lengths of one unit.

    Differences keep their digits where coordinates would cancel.
    """

    size: Any  # p2 - p1
    true_size: Any  # g2 - g1
    before: Any  # p1 - g1
    behind: Any  # g2 - p2


@triton.jit
def axis_of_edges(p1, p2, g1, g2):
    """Of two intervals by their edges."""
    return Axis(p2 - p1, g2 - g1, p1 - g1, g2 - p2)


@triton.jit
def axis_of_sizes(size, true_size, shift):
    """Of two intervals by their sizes, and ``shift``, the predicted centre less the true one."""
    half = 0.5 * (true_size - size)
    return Axis(size, true_size, shift + half, half - shift)


@triton.jit
def takes(args, PLAIN: tl.constexpr, FULL: tl.constexpr):
    """How many numbers a term takes: so many, or with those that may be left out so many."""
    tl.static_assert(len(args) == PLAIN or len(args) == FULL, "a term takes another number of args")
