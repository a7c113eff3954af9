"""What the functions of the driver hand each other.

Functions and memory travel in plain tuples, what a kernel is compiled for in a :class:`Spec`, a constexpr: Triton
hashes a function there by its name alone, and would keep the code of a term that has changed. Numbers of a size travel
as :func:`~..primitives.plain` takes them.
"""

from typing import Any, NamedTuple


class Terms(NamedTuple):
    """The functions of a head, None where it has none. Of ``box`` and ``offset`` it has one."""

    axis: Any
    box: Any
    offset: Any
    label: Any
    objectness: Any
    quality: Any
    match: Any  # None: cells take the row that they overlap most


class Spec(NamedTuple):
    """The structure of a head and of a launch."""

    KINDS: int  # cells that a row may take on a level
    REACH: float  # to neighbours, in cells; 0 where it has none
    SHARING: str  # of rows on one prediction: "sum", "last", "each", "merge", or "one", where there is but one
    APART: bool  # the label term judges each logit by itself
    HARD: bool  # its targets are 1 and 0
    UNIT: str
    QUALITY_IS_BOX: bool  # the similarity is that of the box term
    IGNORES: bool
    GATED: bool
    AVERAGE: bool
    SMOOTH: bool  # of some level
    PRIOR: bool
    ZEROS: bool  # some gain is 0, or label terms of classes that no row names may be infinite
    MEAN_ROWS: bool
    MEAN_USED: bool
    BY_IMAGE: bool  # a loss of each image
    BY_LEVEL: bool  # losses of each level
    PER_LEVEL: bool  # the anchors of a level compete among themselves
    OWN: Any  # the anchor of each plane among all, level by level; None: as they come
    ANCHORS: tuple[int, ...]  # of each level
    LAYOUT: str  # "planes" of cells that follow each other, cells whose "channels" do, or "strided"
    PLACES: int  # that a row may take on all levels
    TABLES: int  # of what rows offer, one a level, kind of cell and anchor; 0 where they take what they may
    ACC: Any
    CELLS: int  # of a tile, those included of which a program has none
    ROWS: int  # candidates, or listed predictions, looked at at a time
    PICKS: int  # listed predictions whose channels are read at a time
    K_PAD: int  # channels, a power of two
    FIRST: int  # channel of listed predictions that is read with their classes
    GROUPS: int  # lanes that share these out,
    HELD: int  # of which each holds so many,
    LANES: int  # at a time
    REST: int  # of what fills the kept gradient of a prediction, likewise
    CHANNELS: int  # stored at a time
    PARTS: int  # programs that share out the channels of a tile's gradient


class Numbers(NamedTuple):
    """The numbers of a head: see :class:`fusedyolo.heads.GridHead`; those of terms as these take them."""

    C: int
    thresh: float
    limit: float
    box_gain: float
    obj_gain: float
    noobj_gain: float
    cls_gain: float
    prior_gain: float
    band_low: float
    band_high: float
    ignore_thresh: float
    ignore_margin: float  # half of what separates it from the next number
    reach: float  # heights by which centres of boxes that overlap by more than it may differ
    gate: float
    positive: float
    negative: float
    first_weight: float
    quality_ratio: float
    area_weight: float
    area_cap: float
    box_args: tuple[float, ...]
    label_args: tuple[float, ...]
    obj_args: tuple[float, ...]
    quality_args: tuple[float, ...]


class Levels(NamedTuple):
    """Of the prediction maps one entry a level, the number of images, how many tiles a row may be near at most, and the
    sides of all anchors that compete, (w, h, w, h, ...).
    """

    batch: Any
    near_places: Any
    by: Any  # Strides
    widths: Any
    heights: Any
    cell_sides: Any  # in pixels
    scales: Any  # grid sensitivity
    obj_scales: Any
    smooth: Any
    anchors: Any
    tiles: Any  # cells of a program, at most those of a tile


class Targets(NamedTuple):
    """The rows of a batch, and weights: of classes, for rows with their box and objectness or for terms in
    ``columns_ptr``, and of rows.
    """

    ptr: Any
    offsets_ptr: Any
    weights_ptr: Any
    columns_ptr: Any
    row_weights_ptr: Any


class Rows(NamedTuple):
    """Those of an image; ``offers`` is None where they take the predictions that they may."""

    ptr: Any
    first: Any
    last: Any
    weights_ptr: Any
    columns_ptr: Any
    row_weights_ptr: Any
    offers: Any


class Saved(NamedTuple):
    """What the loss launch leaves for the gradient launch, None where none will be asked for.

    ``state_ptr`` (two bits a prediction) and ``true_obj_ptr`` hold a plane of every level, image and anchor, from
    multiples of 16 on.
    ``kept_ptr`` takes :func:`kept_stride` numbers for each assigned prediction: those of one program lie in the order
    of their cells, from the place that it stores at ``bases_ptr``. With SMOOTH ``row_weights_ptr`` is not None where
    predictions may be hidden by a region, and assigned ones keep their objectness.
    """

    state_ptr: Any
    true_obj_ptr: Any
    kept_ptr: Any
    bases_ptr: Any
    row_weights_ptr: Any


class Offers(NamedTuple):
    """What M rows offer to all rows of their image.

    Tables, one of M entries for each level, kind of cell and anchor in turn. ``cell_ptr`` has the cell of the
    prediction on its map, those of an image after those of the one before, -1 of none; ``row_ptr`` the row that has
    picked it, M where none has.

    Lists of the entries that there are, one for each row, with room for an entry of each table: ``count_ptr`` says how
    many, ``place_ptr`` of which table, ``code_ptr`` again their cells. ``boxes_ptr`` has corners from that of the cell,
    in pixels, ``obj_ptr`` objectness logits, ``cost_ptr`` what classes cost whichever is true, infinite where that is
    NaN; ``bounds_ptr`` a box around all boxes of a row.

    ``clash_ptr`` lists the entries that several rows have picked, ``clashes_ptr`` says how many.
    """

    M: Any
    cell_ptr: Any
    row_ptr: Any
    count_ptr: Any
    place_ptr: Any
    code_ptr: Any
    boxes_ptr: Any
    obj_ptr: Any
    cost_ptr: Any
    bounds_ptr: Any
    clash_ptr: Any
    clashes_ptr: Any


class Lists(NamedTuple):
    """Who is assigned to what; of a program each list begins where it has found room.

    The candidates that a tile takes are in ``cell_ptr`` and ``row_ptr``, in blocks of ROWS: the first, its own, at
    ``listed``, others, from ``more`` on, where ``blocks_ptr`` says. So are, in ``row_ptr`` too, the rows that it looks
    at for them where they may take several cells: the first block at ``near``, others where ``near_ptr`` says.
    ``order_ptr`` holds the rows again, by cell, ``at_ptr`` their cells in the tile, ``any_ptr`` for a while their
    places in the list, ``spread_ptr`` four numbers each, the box gradients of those that share a prediction.
    ``pick_ptr`` has each assigned cell, with ``first_ptr``, where its rows begin, and with AVERAGE ``pushed_ptr``, its
    classes.

    Of every program ``marks_ptr`` holds a number a cell, ``decoded_ptr`` edges and area of the predicted box of each,
    and in the end, of rows with weights, its smooth objectness,
    ``boxes_ptr`` those of ROWS true ones.
    """

    cell_ptr: Any
    row_ptr: Any
    order_ptr: Any
    pick_ptr: Any
    first_ptr: Any
    pushed_ptr: Any
    at_ptr: Any
    any_ptr: Any
    spread_ptr: Any
    near_ptr: Any
    blocks_ptr: Any
    marks_ptr: Any
    decoded_ptr: Any
    boxes_ptr: Any
    listed: Any
    near: Any
    more: Any


class Outputs(NamedTuple):
    """``parts_ptr`` takes the parts (with BY_IMAGE of all images, part by part) and behind them, a level, what box and
    class terms and what objectness are multiplied by for their means. ``done_ptr`` counts finished programs, places
    taken in ``row_ptr``, and in ``kept_ptr`` and ``order_ptr``: 0 before and after every launch.
    """

    total_ptr: Any
    parts_ptr: Any
    counts_ptr: Any
    partial_ptr: Any
    done_ptr: Any


class Plane(NamedTuple):
    """A prediction map, and its strides."""

    ptr: Any
    by: Any


class View(NamedTuple):
    """A prediction map, and of the tile of a program the logits of boxes, four, and of objectness."""

    plane: Any
    logits: Any
    logit: Any


class Pool(NamedTuple):
    """Anchors that compete: (w, h, w, h, ...), those of a site from ``first`` to ``end``."""

    sides: Any
    first: Any
    end: Any


class Site(NamedTuple):
    """The tile of a program; lengths in pixels."""

    pid: Any
    b: Any
    level: Any
    anchor: Any  # of the level
    first_cell: Any
    end_cell: Any  # the first that is no longer of it
    W: Any
    H: Any
    HW: Any
    plane: Any  # where its plane begins in state and true_obj
    side: Any  # of a cell
    scale: Any
    obj_scale: Any
    smooth: Any  # whether objectness of its level is
    pool: Pool
    own: Any  # its anchor in the pool
    own_w: Any
    own_h: Any


class Found(NamedTuple):
    """What is assigned to a tile: from ``base`` on its rows, from ``pick`` on its ``picks`` cells."""

    base: Any
    rows: Any
    pick: Any
    picks: Any
