"""Loss and gradient of cells that predict a box each: class logits are read once, boxes where there is an object.

One launch for all levels. One program owns the boxes and objectness of a tile, each of the others GROUP of its
classes. Where an object has a cell, and where a gradient is all zeros but for these, a program stores zeros of the
whole tile and then, behind a barrier, what is none: of the cells that have a row BOXES are looked at at a time, or the
classes of PICKS. Without objectness the classes are a stream in which every logit is of the background; those of the
classes that objects have are then done again, one a cell.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order. WITH_GRAD leaves the
gradient times ``grads``. SKIP_ONE, of a gradient that is already there for ones: a program returns at once if it is
multiplied by 1, and overwrites the gradient otherwise.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import number_of
from ..sums import column, column_sums, grad_out, is_last
from .box import box_program
from .classes import class_program, objectness
from .listed import site_of
from .views import is_of_branch, tile_of, tiles_of, view_of

N_PARTS: tl.constexpr = tl.constexpr(4)  # room for as many parts as there may be


class HeadSpec(NamedTuple):
    """The structure of a head and of a launch: a kernel is compiled for each."""

    C: Any
    REG_MAX: Any
    BINS: Any  # REG_MAX, a power of two
    DECODE: Any
    OBJECTNESS: Any
    DISTANCE: Any
    SOFT: Any
    BY_IMAGE: Any  # a loss of each image
    ACC: Any
    LAYOUT: Any
    WITH_LOSS: Any
    WITH_GRAD: Any
    SKIP_ONE: Any
    CELLS: Any
    PLANES: Any  # channels at a time
    GROUP: Any  # classes of a program, some times PLANES
    LANES: Any  # GROUP, a power of two
    PICKS: Any  # cells with a row at a time, whose classes are looked at
    BOXES: Any  # likewise boxes


class Head(NamedTuple):
    """The functions of a head and their numbers, and width and height of the images."""

    box: Any
    label: Any
    size: Any
    box_args: Any
    label_args: Any


class Weights(NamedTuple):
    """What the parts are multiplied by, ``gains``, and pointers to what the gradients of the total and of each part
    are, ``grads``."""

    gains: Any
    grads: Any


class Assigned(NamedTuple):
    """What the launches before this one have settled, see ``records.py``: of ``Decoded`` and of ``Settled``."""

    row_ptr: Any
    score_ptr: Any
    norm_ptr: Any
    nans_ptr: Any


class Task(NamedTuple):
    """What is asked of all cells: by which head, of which rows, who has been assigned to these."""

    head: Any
    targets: Any
    assigned: Any


class Sums(NamedTuple):
    """Where the loss goes, that of all branches; with BY_IMAGE as many numbers as images. ``partial_ptr`` is room for
    N_PARTS numbers a program."""

    total_ptr: Any
    partial_ptr: Any
    done_ptr: Any


class Branch(NamedTuple):
    """Of a head with several sets of predictions one of these. ``predictions`` and ``gradient`` are as in
    ``records.py``; ``parts`` pointers to the parts of the loss, in the order of the head's, of each, with BY_IMAGE, as
    many numbers as images. ``list_ptr`` is room for CELLS numbers a program, with objectness of all, else of those that
    own boxes.
    """

    predictions: Any
    gradient: Any
    task: Any
    weights: Any
    parts: Any
    list_ptr: Any


class Scales(NamedTuple):
    """What gradients of the parts are multiplied by."""

    box: Any
    obj: Any
    cls: Any
    distance: Any


@triton.jit
def _finish(branches, sums, programs, B, SPEC: tl.constexpr):
    """The loss from the partial sums of all branches, each of so many programs, or of each image from those that follow
    each other."""
    if SPEC.BY_IMAGE:
        for b in range(0, B):
            _add_up(b, b * (programs // B), programs // B, branches, sums, programs, SPEC)
    else:
        _add_up(0, 0, programs, branches, sums, programs, SPEC)
    tl.store(sums.done_ptr, 0)  # ready for the next launch


@triton.jit
def _add_up(b, first, count, branches, sums, programs, SPEC: tl.constexpr):
    """The b-th loss, from the partial sums of so many programs of each branch, from the ``first`` on."""
    total = _total_of(b, first, count, branches[0], sums, SPEC)
    for i in tl.static_range(1, len(branches)):
        total += _total_of(b, i * programs + first, count, branches[i], sums, SPEC)
    tl.store(sums.total_ptr + b, total)


@triton.jit
def _total_of(b, first, count, branch, sums, SPEC: tl.constexpr):
    """The b-th loss of a branch, of whose parts each is stored. A NaN among boxes is in all of them."""
    gains = branch.weights.gains
    totals = column_sums(sums.partial_ptr + first * N_PARTS, count, N_PARTS, SPEC.ACC)
    norm = tl.load(branch.task.assigned.norm_ptr)
    total = tl.cast(0.0, SPEC.ACC)
    for i in tl.static_range(len(branch.parts)):
        part = column(totals, i)
        if i == 0:
            part += tl.load(branch.task.assigned.nans_ptr)
        elif i == len(branch.parts) - 2:  # that of classes
            part += tl.load(branch.task.assigned.nans_ptr + 1)
        part = tl.where((gains[i] == 0) & (part == float("inf")), 0.0, part)  # whose product would be NaN
        part = tl.cast(gains[i], SPEC.ACC) * (part / norm)
        tl.store(branch.parts[i] + b, part)
        total += part
    return total


@triton.jit
def _grads_out(weights, image, SPEC: tl.constexpr):
    """What the gradients of the parts are multiplied by, before gains."""
    CLS: tl.constexpr = 2 if SPEC.OBJECTNESS else 1  # places of parts
    return Scales(
        grad_out(weights.grads, 0, image, SPEC.WITH_LOSS, SPEC.BY_IMAGE, SPEC.ACC),
        grad_out(weights.grads, 1, image, SPEC.WITH_LOSS, SPEC.BY_IMAGE, SPEC.ACC),
        grad_out(weights.grads, CLS, image, SPEC.WITH_LOSS, SPEC.BY_IMAGE, SPEC.ACC),
        grad_out(weights.grads, CLS + 1, image, SPEC.WITH_LOSS, SPEC.BY_IMAGE, SPEC.ACC),
    )


@triton.jit
def _is_done(grad, kind, SPEC: tl.constexpr):
    """Whether a gradient that is there for ones is that already, of a program of this kind."""
    same = kind != kind
    if SPEC.SKIP_ONE:
        same = (grad.box == 1.0) & (grad.distance == 1.0)
        if SPEC.OBJECTNESS:
            same = same & (grad.obj == 1.0)
        same = tl.where(kind == 0, same, grad.cls == 1.0)
    return same


@triton.jit
def _partial(pid, kind, site, branch, levels, grad, SPEC: tl.constexpr):
    """Loss of a program of a branch, by parts [N_PARTS], and the gradient."""
    CLS: tl.constexpr = 2 if SPEC.OBJECTNESS else 1  # places of parts
    predictions = branch.predictions
    gradient = branch.gradient
    gains = branch.weights.gains
    inverse = 1.0 / tl.load(branch.task.assigned.norm_ptr)
    scales = Scales(
        grad.box * (gains[0] * inverse),
        grad.obj * (gains[1] * inverse),
        grad.cls * (gains[CLS] * inverse),
        grad.distance * (gains[CLS + 1] * inverse),
    )
    own_list = branch.list_ptr + pid * SPEC.CELLS
    box = tl.cast(0.0, SPEC.ACC)
    obj = tl.cast(0.0, SPEC.ACC)
    cls = tl.cast(0.0, SPEC.ACC)
    distance = tl.cast(0.0, SPEC.ACC)
    if kind == 0:
        view = view_of(predictions.box, site.tile.level)
        d_view = view
        if SPEC.WITH_GRAD:
            d_view = view_of(gradient.box, site.tile.level)
        stride = tl.cast(number_of(levels.strides, site.tile.level), SPEC.ACC)
        box, distance = box_program(view, d_view, site, own_list, stride, branch.task, scales, SPEC)
        if SPEC.OBJECTNESS:
            view = view_of(predictions.obj, site.tile.level)
            d_view = view
            if SPEC.WITH_GRAD:
                d_view = view_of(gradient.obj, site.tile.level)
            obj = objectness(view, d_view, site, branch.task, scales.obj, SPEC)
    else:
        view = view_of(predictions.cls, site.tile.level)
        d_view = view
        if SPEC.WITH_GRAD:
            d_view = view_of(gradient.cls, site.tile.level)
        first = (kind - 1) * SPEC.GROUP
        cls = class_program(view, d_view, site, own_list, first, branch.task, scales.cls, SPEC)
    part = tl.arange(0, N_PARTS)
    if SPEC.OBJECTNESS:
        partial = tl.where(part == 0, box, tl.where(part == 1, obj, tl.where(part == 2, cls, distance)))
    else:
        partial = tl.where(part == 0, box, tl.where(part == 1, cls, tl.where(part == 2, distance, 0.0)))
    return partial


@triton.jit
def _program(pid, programs, before, branch, levels, M, B, sums, SPEC: tl.constexpr):
    """What a program of a branch does, which has so many, and those ``before`` it."""
    tiles = B * tiles_of(levels, SPEC.CELLS)
    kind = pid // tiles
    image = pid * 0
    if SPEC.BY_IMAGE:
        image = tile_of(pid - kind * tiles, levels, B, SPEC.CELLS).b
    grad = _grads_out(branch.weights, image, SPEC)
    if ~_is_done(grad, kind, SPEC):
        site = site_of(pid - kind * tiles, levels, B, M, branch.task.assigned.row_ptr, SPEC.CELLS)
        partial = _partial(pid, kind, site, branch, levels, grad, SPEC)
        if SPEC.WITH_LOSS:
            place = pid
            if SPEC.BY_IMAGE:
                place = site.tile.b * (programs // B) + kind * (tiles // B) + site.tile.place
            tl.store(sums.partial_ptr + (before + place) * N_PARTS + tl.arange(0, N_PARTS), partial)


@triton.jit(do_not_specialize=["M", "B"])
def pick_loss_kernel(branches, levels, M, B, sums, SPEC: tl.constexpr):
    """Loss and gradient of picked cells of B images with M rows, branch by branch: all tiles for their boxes, then for
    each GROUP of classes. ``levels`` are as in ``records.py``.
    """
    BRANCHES: tl.constexpr = len(branches)
    programs = tl.num_programs(0) // BRANCHES
    for i in tl.static_range(BRANCHES):
        pid = tl.program_id(0) - i * programs
        if is_of_branch(pid, programs, BRANCHES):
            _program(pid, programs, i * programs, branches[i], levels, M, B, sums, SPEC)
    if SPEC.WITH_LOSS:
        if is_last(sums.done_ptr, tl.num_programs(0)):
            _finish(branches, sums, programs, B, SPEC)
