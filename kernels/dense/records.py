"""The records that the loss of dense heads takes, and that its parts hand each other."""

from typing import Any, NamedTuple


class Maps(NamedTuple):
    """Predictions of one kind and their gradient, a tensor a level, and the strides of each."""

    ptrs: Any
    d_ptrs: Any
    by: Any
    d_by: Any


class Predictions(NamedTuple):
    """What a head predicts; ``centres`` is None without centreness."""

    classes: Any
    boxes: Any
    centres: Any


class Levels(NamedTuple):
    """Of each level, as :func:`plain` takes them: columns and cells, anchors of a cell, programs of either kind."""

    widths: Any
    cells: Any
    anchors: Any
    box_programs: Any
    class_programs: Any


class Terms(NamedTuple):
    """The functions of a head, None where it has none."""

    axis: Any
    box: Any
    offset: Any
    label: Any
    centre: Any


class Numbers(NamedTuple):
    """The numbers of a head, and width and height of the images; ``box_gain`` is None where it is 1."""

    weights: Any
    beta: Any
    box_gain: Any
    box_args: Any
    label_args: Any
    size: Any


class Matched(NamedTuple):
    """Anchors, rows, the weights of these, and which of them each anchor has taken; what may be missing is None."""

    anchors_ptr: Any
    rows_ptr: Any
    row_weights_ptr: Any
    match_ptr: Any
    found_ptr: Any  # [B + 1]: anchors with a row, of each image; and what sums over the batch are divided by
    columns_ptr: Any  # [C]: what class terms are multiplied by
    norm_ptr: Any  # what the sum of boxes is divided by that are weighed by their centreness


class Ranked(NamedTuple):
    """What a ranked head leaves between its launches, see ``rank.py``; cross-entropies times what they count."""

    ce_ptr: Any
    picks_ptr: Any


class Sums(NamedTuple):
    """Where the loss goes; ``parts`` are pointers to its three parts."""

    total_ptr: Any
    parts: Any
    partial_ptr: Any
    images_ptr: Any  # of each program its image, or the first of two; None but with IMAGES
    done_ptr: Any


class Spec(NamedTuple):
    """The structure of a head and of a launch: a kernel is compiled for each."""

    C: Any
    RANKED: Any
    BY_IMAGE: Any
    IMAGES: Any  # a loss of each image
    CORNERS: Any
    FLAT: Any
    REPEATS: Any  # with FLAT: programs have several tiles of boxes, too
    SUMS: Any  # that the last program adds up at a time
    NEAR: Any
    WITH_LOSS: Any
    WITH_GRAD: Any
    SKIP_ONE: Any
    ACC: Any
    BLOCK: Any  # numbers of a stream at a time
    GROUP: Any  # of those that are always of one anchor, at most what one access holds
    CELLS: Any
    PLANES: Any
    ANCHORS: Any
    WIDTH: Any
    CHUNKS: Any


class Batch(NamedTuple):
    """Sizes of a batch."""

    N: Any  # anchors
    B: Any  # images
    steps: Any  # tiles of class logits a program, with REPEATS of boxes, too


class Level(NamedTuple):
    """The level of a program."""

    width: Any
    cells: Any
    anchors: Any
    start: Any  # anchors before it


class View(NamedTuple):
    """The map of a level, and its gradient."""

    ptr: Any
    by: Any
    d_ptr: Any
    d_by: Any


class Site(NamedTuple):
    """What a program owns at a time: the image and the anchor of the cell; of each place its cell, the index and the
    position of its anchor, and whether it is there."""

    b: Any
    a: Any
    cells: Any
    n: Any
    position: Any
    mask: Any


class Grads(NamedTuple):
    """What the gradients of the three parts are multiplied by; with IMAGES of the classes of the image after too, and
    where those of all images are."""

    classes: Any
    boxes: Any
    centres: Any
    after: Any
    ptrs: Any
