"""A detector is a row: which terms its loss is made of, and the numbers they take.

Both backends read the same row, so neither the kernels nor the eager reference know a detector's name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .terms import check_term, find_term


class _Row:
    """What the rows share; a subclass is a frozen dataclass."""

    def __post_init__(self):
        # at once, not when asked for: torch.compile cannot trace through the lock of a cached property
        self.__dict__["_key"] = json.dumps(asdict(self), separators=(",", ":"))

    @property
    def key(self) -> str:
        """This row as text, the form in which it passes through the PyTorch dispatcher."""
        return self.__dict__["_key"]


@dataclass(frozen=True)
class GridHead(_Row):
    """One anchor-grid loss.

    Geometry. ``anchors`` are all (width, height) pairs in pixels that compete for an object; ``levels[l]`` holds, for
    the ``l``-th prediction map, the indices of its own anchors in ``anchors``. ``strides`` are in pixels per cell and
    ``scale_x_y`` is the grid sensitivity, one a level. ``unit`` is the length that box terms take for 1: a ``"pixel"``,
    a ``"cell"`` of the level, or the ``"image"`` (both sides 1); only eps and aspect ratios tell them apart.

    Assignment. ``assigner`` is ``"best_anchor"`` (with ``iou_thresh``), ``"shape_iou"`` (every anchor whose IoU of
    widths and heights exceeds ``iou_thresh``, and no other), ``"ratio"`` (with ``anchor_t`` and ``neighbours``: of a
    cell the 2 nearest, all 4, or 0 for its own cell alone) or ``"iou_band"`` (with ``band``, the IoU below which a
    prediction is negative and that above which it is positive). ``per_level``: the anchors of each level compete among
    themselves. ``by_cost``: rows do not take the predictions that they may be assigned to, but offer them to all rows
    of their image, and each of these picks the ones that cost it least, ``topk`` at most: as many as that many of its
    overlaps add up to. ``shared`` says what becomes of a prediction
    that several rows want: ``"sum"``, ``"last"``, ``"each"`` or ``"merge"`` (the box of the last, the classes of all).
    ``edge``: a centre on the right or lower border of the image belongs to its last cell.

    Structure. ``box`` names an IoU term (on decoded boxes) or an offset term (on raw logits), ``label`` the class term,
    ``objectness`` the label term of objectness. The objectness target of an assigned prediction is 1, or, where
    ``quality`` names an IoU term, ``1 - quality_ratio`` plus ``quality_ratio`` times that similarity. ``ignore_thresh``
    is the IoU above which a background prediction is left out (None: none is), ``class_gate`` limits that to
    predictions with some class logit above it. ``smooth``, one a level: objectness is trained towards that IoU instead,
    assigned or not. ``average_box`` divides the box term of a prediction with several objects by its number of
    pushed-up classes. ``mean_rows``: box and class terms of a level are divided by its number of assignments.
    ``obj_mean``: objectness of a level is divided by its ``"cells"`` times anchors (a sum over images remains), or by
    the number of its ``"used"`` predictions in the batch. ``weigh_classes``: class weights multiply the terms of their
    classes, whether these are there or not, and nothing else. ``"each"`` knows no other class weights and no
    ``average_box``. ``by_image``: the loss is one of each image, which add up to what it is without; ``by_level``, of
    heads with ``mean_rows``, likewise two of each level, of box and classes, and of objectness.

    Numbers. ``area_weight`` w turns the offset term's weight into ``1 + w * (1 - min(gw * gh, area_cap))``, gw and gh
    relative to the image. ``prior_gain`` weighs the box term of predictions without an object, towards the middle of
    their cell and their anchor's size. ``obj_balance`` multiplies objectness, one a level. ``class_targets`` are the
    positive and negative class targets. ``first_weight`` multiplies the positive class of the first object on a
    prediction when class weights are given.
    """

    num_classes: int
    anchors: tuple[tuple[float, float], ...]
    levels: tuple[tuple[int, ...], ...]
    strides: tuple[float, ...]
    scale_x_y: tuple[float, ...]
    unit: str = "pixel"
    assigner: str = "best_anchor"
    iou_thresh: float = 1.0
    anchor_t: float = 4.0
    neighbours: int = 2
    band: tuple[float, float] = (0.3, 0.7)
    per_level: bool = False
    by_cost: bool = False
    topk: int = 10
    shared: str = "sum"
    edge: bool = False
    decode: str = "exp"
    box: str = "ciou"
    label: str = "bce"
    objectness: str = "bce"
    quality: str | None = None
    quality_ratio: float = 1.0
    ignore_thresh: float | None = 0.5
    class_gate: float | None = None
    smooth: tuple[bool, ...] = ()
    average_box: bool = False
    mean_rows: bool = False
    obj_mean: str | None = None
    weigh_classes: bool = False
    by_image: bool = False
    by_level: bool = False
    box_gain: float = 1.0
    obj_gain: float = 1.0
    noobj_gain: float = 1.0
    cls_gain: float = 1.0
    prior_gain: float = 0.0
    obj_balance: tuple[float, ...] = ()
    area_weight: float = 0.0
    area_cap: float = 3.0e38
    class_targets: tuple[float, float] = (1.0, 0.0)
    first_weight: float = 1.0
    box_args: tuple[float, ...] = (0.0, 1e-7)
    label_args: tuple[float, ...] = ()
    obj_args: tuple[float, ...] = ()
    quality_args: tuple[float, ...] = (0.0, 1e-7)

    def __post_init__(self):
        super().__post_init__()
        find_term("decode", self.decode, "grid")
        check_term("box", self.box, self.box_args, "iou", "offset")
        check_term("label", self.label, self.label_args, "class")
        check_term("objectness", self.objectness, self.obj_args, "objectness")
        if self.quality is not None:
            check_term("quality", self.quality, self.quality_args, "iou")

    @property
    def centre_limit(self) -> float:
        """Centres of valid rows lie below this, in images: 1, or the next float32 where 1 itself is valid."""
        return EDGE_LIMIT if self.edge else CENTRE_LIMIT

    @property
    def smooth_levels(self) -> tuple[bool, ...]:
        """``smooth``, one a level."""
        return self.smooth or (False,) * len(self.levels)

    @property
    def places_per_row(self) -> int:
        """At most this many predictions are assigned to one row, or with ``by_cost`` offered by it."""
        own = [t for level in self.levels for t in level]
        if self.assigner == "ratio":
            return 5 * len(own) if self.neighbours else len(own)
        if self.assigner == "shape_iou":
            return len(own)
        if self.assigner == "best_anchor":
            if self.iou_thresh < 1:
                return len(own)
            return len(self.levels) if self.per_level else 1
        steps = zip(self.levels, self.strides, strict=True)
        apart = 2 * reach(self.band[1])
        sides = [tuple(apart * side / stride + 1 for side in self.anchors[a]) for own, stride in steps for a in own]
        return sum(math.ceil(w) * math.ceil(h) for w, h in sides)


def reach(overlap: float) -> float:
    """Sides of a box by which, on each axis, the centre of another lies at most apart whose IoU with it is larger."""
    t = max(overlap, 1e-3)
    return max(1 - t, (1 / t - 1) / 2)


CENTRE_LIMIT, EDGE_LIMIT = 1.0, 1.0 + 2.0**-23
"""Centres of valid rows lie below this, in images, without and with ``edge``: 1, or the next float32."""


def obj_scales(balance: tuple[float, ...], mean: str | None, cells: tuple[int, ...]) -> tuple[float, ...]:
    """What objectness is multiplied by on each level of so many ``cells`` times anchors; numbers that float32 holds.

    ``balance`` and ``mean`` are ``obj_balance`` and ``obj_mean`` of a :class:`GridHead`.
    """
    scales = balance or (1.0,) * len(cells)
    if mean == "cells":
        scales = tuple(scale / n for scale, n in zip(scales, cells, strict=True))
    return tuple(float(np.float32(scale)) for scale in scales)


@lru_cache(maxsize=256)
def head_from_key(key: str) -> GridHead:
    """The row that :attr:`GridHead.key` was made from."""

    def freeze(value):
        return tuple(map(freeze, value)) if isinstance(value, list) else value

    return GridHead(**{name: freeze(value) for name, value in json.loads(key).items()})


@dataclass(frozen=True)
class CellHead(_Row):
    """One loss of squared errors on a grid whose cells hold one object each.

    Geometry. The image is ``grid_size`` times ``grid_size`` cells; a cell predicts ``num_boxes`` boxes (x, y, a, b),
    each with a confidence, and ``num_classes`` class scores that its boxes share. x and y are offsets in the cell.

    Structure. ``root``: a and b are square roots of the width and height relative to the image, else these themselves.
    ``nearest``: where no box of a cell meets the object, the one at the smallest distance answers for it, else the
    first. ``rescore``: the confidence of the box that answers is trained towards its IoU, else towards 1.
    ``by_image``: the loss is one of each image, which add up to what it is without.

    Numbers. Each gain multiplies the plain square of an error: ``box_gain`` and ``obj_gain`` of the boxes that answer
    for an object, ``other_gain`` the confidences of the others of their cells (None: as all others), ``noobj_gain``
    those of all others, ``cls_gain`` the class scores of cells with an object, each times its class weight.
    """

    num_classes: int
    grid_size: int = 7
    num_boxes: int = 2
    root: bool = True
    nearest: bool = False
    rescore: bool = True
    by_image: bool = False
    box_gain: float = 1.0
    obj_gain: float = 1.0
    other_gain: float | None = None
    noobj_gain: float = 1.0
    cls_gain: float = 1.0

    @property
    def channels(self) -> int:
        """Predicted numbers of a cell."""
        return 5 * self.num_boxes + self.num_classes


@lru_cache(maxsize=256)
def cell_head_from_key(key: str) -> CellHead:
    """The row that :attr:`CellHead.key` was made from."""
    return CellHead(**json.loads(key))


@dataclass(frozen=True)
class DenseHead(_Row):
    """One loss over anchors that each predict a box and the logits of all classes.

    Matching. ``"iou"``: an anchor takes the row that it overlaps most (the first of equals) if their IoU is at least
    ``band[1]``, and is ignored from ``band[0]`` to there. ``rescue`` says what becomes of rows that are left out: with
    ``"equal"`` every anchor whose IoU with a row equals the largest that this row has takes the row that it overlaps
    most itself, whatever their IoU, with ``"own"`` that row, the last one of several; with ``"best"`` the best anchor
    of each row (the first of equals) takes that row, the last one of several, with ``"best_first"`` the first one; with
    None, nothing. ``"centre"``: an anchor takes the smallest row (the first of equals) among those that hold its
    centre, have their own less than ``radius`` anchors from it on both axes, and whose farthest side is between
    ``scale_range`` anchors away; on the first level that range has no lower, on the last no upper end.

    Structure. With ``background`` logit 0 is that of no object, and rows are of the classes from 1 on. ``decode`` is
    ``"delta"`` (with ``weights`` of x, y, w, h) or ``"ltrb"``; ``box`` an IoU term on decoded boxes, or a term of
    the role ``"delta"`` on deltas, ``beta`` where it is quadratic. ``label`` is an elementwise term against one-hot
    targets, or ``"softmax_ce"``. ``negatives``: of the anchors without a row that many times the number of those with
    one count, an image's hardest; 0 for all of them. ``centreness``: a third prediction, of the square root of min(l,
    r) / max(l, r) * min(t, b) / max(t, b), distances of an anchor's centre from the sides of its row. ``mean``: sums
    are divided by the anchors with a row of their own ``"image"``, and averaged over images, or by those of the
    ``"batch"``; a count of 0 divides by 1. With ``"images"`` each image without any counts as one, with ``"one more"``
    the batch's number is one larger. ``box_weight``: None, or ``"centreness"``, by which the boxes are weighed; they
    are divided by the sum of these weights, at least 1e-6. ``box_gain`` multiplies them. Class weights multiply the
    class terms, of a softmax those of the true class. ``by_image``: the loss is one of each image, which add up to what
    it is without.
    """

    num_classes: int
    background: bool = False
    matcher: str = "iou"
    band: tuple[float, float] = (0.4, 0.5)
    rescue: str | None = "equal"
    radius: float = 1.5
    scale_range: tuple[float, float] = (4.0, 8.0)
    decode: str = "delta"
    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    box: str = "l1"
    beta: float = 1.0
    label: str = "focal"
    negatives: float = 0.0
    centreness: bool = False
    mean: str = "image"
    box_weight: str | None = None
    box_gain: float = 1.0
    by_image: bool = False
    box_args: tuple[float, ...] = (1e-7, 1e-7)
    label_args: tuple[float, ...] = (0.25, 2.0)

    def __post_init__(self):
        super().__post_init__()
        find_term("decode", self.decode, "anchor")
        check_term("box", self.box, self.box_args, "iou", "boxes", "delta")
        check_term("label", self.label, self.label_args, "class")


@lru_cache(maxsize=256)
def dense_head_from_key(key: str) -> DenseHead:
    """The row that :attr:`DenseHead.key` was made from."""
    fields = json.loads(key).items()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields}
    return DenseHead(**values)


@dataclass(frozen=True)
class PickHead(_Row):
    """One loss over cells that predict a box each, of which every object picks a few by what they predict.

    Geometry. ``strides`` are in pixels per cell, one a level. A prediction belongs to the middle of its cell.

    Predictions. ``decode`` says what four times ``reg_max`` numbers say of a box, in cells: ``"distance"``, how far its
    left, upper, right and lower side are from the middle; ``"dfl"``, of each of these distances the logits of 0 ...
    ``reg_max`` - 1, of which it is the mean; ``"exp"``, the centre from the cell's corner and the logarithms of the
    sides. ``objectness``: a logit of that beside those of the classes, which then are trained where there is an object
    only.

    Assignment, by boxes in pixels.
    - ``"aligned"``: an object wants the cells whose middles lie in its box, a side below ``small`` pixels counting as
      ``small``, with score^``alpha`` IoU^``beta``, the score that of its class, the IoU 1 less the term ``overlap``
      (with ``overlap_args``), not below 0; it picks the ``topk`` that it wants most, none that it wants with 0. A cell
      that several picked goes to the object of the largest IoU, whether or not it was among them. Of the cells that it
      then has it keeps the best ``topk2`` (None: all). The soft score of a cell is how much it is wanted, over how much
      the best cell of the object is, times the largest IoU of these. That is ``region`` ``"box"``. With ``"range"``
      cells are those in its box or on its border from which all its sides are at most ``reg_max`` - 1.01 strides away,
      as the distributions can say them; an object that would pick none picks one, the cell that it wants most of all
      that there are, unless it wants all with 0; and a cell that several picked goes to one of them.
    - ``"simota"``: a cell is near an object if its middle is less than ``radius`` strides from the object's centre, on
      both axes. With ``inside`` those are its own that are near and in its box, and candidates those that are near, or
      in the box of, any object of the image; else cells that are near both. An object wants candidates for the least
      cost, its own before all others: the cross-entropies of all classes, of the root of the product of the
      probabilities of class and object, less 3 ln(IoU + 1e-8). It picks as many as the sum of its ``topk`` largest IoUs
      with candidates, rounded down, at least one. A cell that several picked goes to the object of the least cost,
      whether or not it was among them. The soft score is the IoU.

    Structure. ``box`` names an IoU term, of boxes in cells. ``distance`` is ``"dfl"``, cross-entropies of the two
    numbers next to the true distance; ``"image"``, differences of distances over the sides of the image; ``"raw"``,
    differences of what ``"exp"`` takes. ``label`` is the class term, with soft scores as targets. ``soft``: box and
    distance terms are multiplied by the soft score. Sums are divided by those of these weights, at least 1.
    ``by_image``: the loss is one of each image, which add up to what it is without.

    Gains are no part of the row, for they may change from call to call: one a name in :attr:`parts`, in their order.
    """

    num_classes: int
    strides: tuple[float, ...]
    decode: str = "dfl"
    reg_max: int = 16
    objectness: bool = False
    assigner: str = "aligned"
    topk: int = 10
    topk2: int | None = None
    alpha: float = 0.5
    beta: float = 6.0
    small: float = 0.0
    region: str = "box"
    radius: float = 1.5
    inside: bool = False
    overlap: str = "ciou"
    box: str = "ciou"
    distance: str = "dfl"
    label: str = "bce"
    soft: bool = True
    by_image: bool = False
    overlap_args: tuple[float, ...] = (1e-7, 1e-7)
    box_args: tuple[float, ...] = (1e-7, 1e-7)
    label_args: tuple[float, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        check_term("overlap", self.overlap, self.overlap_args, "iou")
        check_term("box", self.box, self.box_args, "iou")
        check_term("label", self.label, self.label_args, "objectness")  # elementwise
        parts = ("box", *(("obj",) if self.objectness else ()), "cls", "dfl" if self.distance == "dfl" else "l1")
        widths = (4 * self.reg_max, *((1,) if self.objectness else ()), self.num_classes)
        pixels = tuple(int(stride) if stride.is_integer() else stride for stride in map(float, self.strides))
        self.__dict__.update(_parts=parts, _widths=widths, _pixels=pixels)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts of the loss."""
        return self.__dict__["_parts"]

    @property
    def widths(self) -> tuple[int, ...]:
        """Numbers of a prediction, in their order in a map: of its box, its objectness if there is one, its classes."""
        return self.__dict__["_widths"]

    @property
    def pixels(self) -> tuple[float, ...]:
        """The strides, integers where they are whole."""
        return self.__dict__["_pixels"]

    @property
    def centre_limit(self) -> float:
        """Centres of valid rows lie below this, in images: that of ``edge``, for no centre is taken for a cell."""
        return EDGE_LIMIT


@lru_cache(maxsize=256)
def pick_head_from_key(key: str) -> PickHead:
    """The row that :attr:`PickHead.key` was made from."""
    fields = json.loads(key).items()
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields}
    return PickHead(**values)


def key_of_branches(heads: Sequence[PickHead]) -> str:
    """The keys of the heads of several branches as one, which differ only in ``topk`` and ``topk2``."""
    return "\n".join([head.key for head in heads])


@lru_cache(maxsize=256)
def branches_from_key(key: str) -> tuple[PickHead, ...]:
    """The rows that :func:`key_of_branches` was given."""
    return tuple(map(pick_head_from_key, key.split("\n")))
