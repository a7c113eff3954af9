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
    begins: Any  # odd; how many cells of an image come before those of the level; at the end, how many there are


class Targets(NamedTuple):
    """The rows of a batch, and if known where those of each image begin, class weights [C], and weights of the rows."""

    ptr: Any
    offsets_ptr: Any
    weights_ptr: Any
    row_weights_ptr: Any


class Numbers(NamedTuple):
    """The numbers of a head: see :class:`fusedyolo.heads.PickHead`."""

    alpha: Any  # as ``wish.power`` makes them
    beta: Any
    small: float
    radius: float
    reach: tuple[float, float, float]  # see ``region.reached_at_most``
    overlap_args: tuple[float, ...]


class Terms(NamedTuple):
    """JIT functions of a head, as ``fusedyolo.terms`` has them: they travel in no constexpr record."""

    overlap: Any


class Spec(NamedTuple):
    """The structure of a head and of a launch; kernels are compiled for each."""

    C: int
    REG_MAX: int
    DECODE: str  # "dfl", "distance" or "exp"
    OBJECTNESS: bool
    ASSIGNER: str  # "aligned" or "simota"
    INSIDE: bool
    REGION: str  # of aligned ones, "box" or "range"
    TOPK: int
    TOPK2: Any  # None: all
    DISTANCE: str  # "dfl", "image" or "raw"
    SOFT: bool
    ACC: Any
    K: int  # TOPK, a power of two


class Branch(NamedTuple):
    """Of a head whose objects pick cells of several sets of predictions, each for itself: what launches know and leave
    of one; None what a launch does not ask for. ``problem`` is a :class:`.wish.Problem`.
    """

    problem: Any
    decoded: Any
    picked: Any
    tally: Any
    settled: Any


class Decoded(NamedTuple):
    """What ``decode`` leaves of each prediction, and of rows, and later launches change.

    ``boxes_ptr`` [B, N, 4] ACC: corners in pixels from the middle of the cell. ``picker_ptr`` [B, N] int32: at first M,
    after ``pick`` the row that picked it, or -1 where several did. ``claim_ptr`` [B, N] int64: at first 0, after
    ``pick`` the largest claim of all rows that may have it, of SimOTA of those whose own it is. ``row_ptr`` [B, N]
    int32: at first M, none, after ``settle`` the row that it goes to. ``score_ptr`` [B, N] ACC: soft scores, 0 where
    there is no row, and there -1 in an ignored region. ``done_ptr`` [M] int32: programs of a row that are done, 0 at
    first and after ``pick``.
    ``cost_ptr`` [B, N] ACC, of SimOTA: what costs share, infinite where the cell is no candidate, or a logit is NaN.
    ``list_ptr`` [B, N] int32, of SimOTA: the cells n of an image that are candidates, those of a tile in their order,
    tiles in any. ``tiles_ptr`` int32 [B, tiles, 2]: where in the list those of a tile begin, unless there are none, and
    how many there are. ``bounds_ptr`` [B, tiles, 4] ACC: corners in pixels that hold the boxes of these.
    """

    boxes_ptr: Any
    picker_ptr: Any
    claim_ptr: Any
    row_ptr: Any
    score_ptr: Any
    done_ptr: Any
    cost_ptr: Any
    list_ptr: Any
    tiles_ptr: Any
    bounds_ptr: Any


class Picked(NamedTuple):
    """``index_ptr`` [M, K] int32: what each row picked, flat b * N + n, -1 where it is less, of no meaning
    for rows that are not valid. ``overlap_ptr`` and ``worth_ptr`` [M, K] ACC: the overlaps of these, and of aligned
    ones their metrics. ``clash_ptr`` int32: cells, flat, that several rows picked, each once, in no order; of SimOTA
    [M * K], of others [B, N], those of each image apart. ``part_key_ptr``, ``part_cell_ptr`` int32 and
    ``part_overlap_ptr`` [M, programs of a row, K]: the best cells of each program, of which there is nothing where rows
    have one; bits as keys have them.
    """

    index_ptr: Any
    overlap_ptr: Any
    worth_ptr: Any
    clash_ptr: Any
    part_key_ptr: Any
    part_cell_ptr: Any
    part_overlap_ptr: Any


class Tally(NamedTuple):
    """What programs add up, of integers, so that no order shows; zeros at first, and after ``settle``.

    ``done_ptr`` int32 [4]: programs that are done; cells in the list of clashes; whether a NaN was seen among what
    candidates share, and among boxes. ``sum_ptr`` int64: soft scores, times UNIT. ``found_ptr`` int32 [2 + B]:
    predictions with a row, invalid rows; of each image the cells that several rows picked, of SimOTA the candidates.
    """

    done_ptr: Any
    sum_ptr: Any
    found_ptr: Any


class Settled(NamedTuple):
    """``norm_ptr`` ACC [2]: max(1, sum of weights), and that sum. ``counts_ptr`` int32 [2]: predictions with a row,
    invalid rows. ``nans_ptr`` ACC [2]: of boxes, and of classes where a row had to look: NaN if one was seen, else 0.
    """

    norm_ptr: Any
    counts_ptr: Any
    nans_ptr: Any
