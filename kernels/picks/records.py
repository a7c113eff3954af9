"""The records that kernels of picked cells take.

A prediction's index n counts levels, rows, columns, as in the reference. ``odd`` integers are those that
:func:`~fusedyolo.kernels.primitives.plain` takes.
"""

from typing import Any, NamedTuple


class Part(NamedTuple):
    """One of box, objectness and class of all levels: tensors as they came, where in each the part begins, in elements,
    and its strides; ``image``, ``row``, ``column`` and ``channel`` of a :class:`~fusedyolo.kernels.levels.Strides`.
    A tensor that holds several levels, or parts, comes several times.
    """

    ptrs: Any  # one a level
    starts: Any  # odd
    by: Any  # Strides, odd


class Predictions(NamedTuple):
    """What is predicted, or a gradient of it; ``obj`` is None without objectness."""

    box: Any
    obj: Any
    cls: Any


class Levels(NamedTuple):
    """Of the maps one entry a level."""

    widths: Any  # odd
    heights: Any  # odd
    strides: Any  # floats, pixels per cell


class Targets(NamedTuple):
    """The rows of a batch, and if known where those of each image begin, and class weights [C]."""

    ptr: Any
    offsets_ptr: Any
    weights_ptr: Any


class Numbers(NamedTuple):
    """The numbers of a head: see :class:`fusedyolo.heads.PickHead`."""

    limit: float  # centres of valid rows lie below it
    alpha: Any  # as ``wish.power`` makes them
    beta: Any
    small: float
    radius: float
    overlap_args: tuple[float, ...]
    box_args: tuple[float, ...]
    label_args: tuple[float, ...]


class Terms(NamedTuple):
    """JIT functions of a head, as ``fusedyolo.terms`` has them: they travel in no constexpr record."""

    overlap: Any
    box: Any
    label: Any


class Spec(NamedTuple):
    """The structure of a head and of a launch; kernels are compiled for each."""

    C: int
    REG_MAX: int
    DECODE: str  # "dfl", "distance" or "exp"
    OBJECTNESS: bool
    ASSIGNER: str  # "aligned" or "simota"
    INSIDE: bool
    TOPK: int
    TOPK2: Any  # None: all
    DISTANCE: str  # "dfl", "image" or "raw"
    SOFT: bool
    ACC: Any
    K: int  # TOPK, a power of two


class Decoded(NamedTuple):
    """What ``decode`` leaves of each prediction, and later launches change.

    ``boxes_ptr`` [B, N, 4] ACC: corners in pixels from the middle of the cell. ``row_ptr`` [B, N] int32: the row that
    an object's cell goes to, at first M, none; after ``pick`` the first row that picked it; after ``settle`` the row
    that has it, M where there is none. ``claim_ptr`` [B, N] int64: 0, 1 where several rows picked it, and then the
    largest claim. ``score_ptr`` [B, N] ACC: soft scores, written by ``settle`` where there is a row, else never.
    ``cost_ptr`` [B, N] ACC, of SimOTA: what costs share, infinite where the cell is no candidate, or a logit is NaN.
    ``list_ptr`` [B, N] int32, of SimOTA: cells of each image that are candidates, in no order.
    """

    boxes_ptr: Any
    row_ptr: Any
    claim_ptr: Any
    score_ptr: Any
    cost_ptr: Any
    list_ptr: Any


class Picked(NamedTuple):
    """``index_ptr`` [M, K] int32: what each row picked, flat b * N + n, best first, -1 behind the last, of no meaning
    for rows that are not valid. ``clash_ptr`` [M * K] int32: cells, flat, that several rows picked, each once, in no
    order.
    """

    index_ptr: Any
    clash_ptr: Any


class Tally(NamedTuple):
    """What programs add up, of integers, so that no order shows; zeros at first, and after ``settle``.

    ``done_ptr`` int32 [3]: programs that are done; cells in the list of clashes; whether a NaN was seen. ``sum_ptr``
    int64: soft scores, times SCORE_UNIT. ``found_ptr`` int32 [2 + B]: predictions with a row, invalid rows; candidates
    of each image.
    """

    done_ptr: Any
    sum_ptr: Any
    found_ptr: Any


class Settled(NamedTuple):
    """``norm_ptr`` ACC, 0-dim: max(1, sum of weights). ``counts_ptr`` int32 [2]: predictions with a row, invalid rows.
    ``nans_ptr`` ACC, 0-dim: NaN if one was seen where a row had to look, else 0.
    """

    norm_ptr: Any
    counts_ptr: Any
    nans_ptr: Any
