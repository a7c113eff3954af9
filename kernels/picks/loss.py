"""Loss and gradient of cells that predict a box each: class logits are read once, boxes where there is an object.

One launch for all levels. One program owns the boxes and objectness of a tile, each of the others GROUP of its
classes. Where an object has a cell, and where a gradient is all zeros but
for these, a program stores zeros of the whole tile and then, behind a barrier, what is none: the cells that have a row
are looked at PICKS at a time. Without objectness the classes are a stream in which every logit is of the background;
those of the classes that objects have are then done again, one a cell.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order. WITH_GRAD leaves the
gradient times ``grads``. SKIP_ONE, of a gradient that is already there for ones: a program returns at once if it is
multiplied by 1, and overwrites the gradient otherwise.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import number_of
from ..primitives import log1p, weigh
from ..rows import load_rows, row_weights
from ..sums import column, column_sums, is_last
from ..terms.decode import chain, exp, ltrb
from ..terms.label import bce, exponentials, softmax_slope
from ..terms.offset import l1
from ..terms.records import Jacobian, Span, axis_of_sizes
from .views import as_wide, cells_in, is_of_branch, is_wide, step_of, tile_of, tiles_of, view_of, wide_mask

N_PARTS: tl.constexpr = tl.constexpr(4)  # room for as many parts as there may be
LOW: tl.constexpr = tl.constexpr(-1e4)  # a logit of which a term, and its derivative, is 0 for the background


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
    PICKS: Any


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


class Site(NamedTuple):
    """The tile of a program, and which rows its cells have; ``first`` is the index of the level's first cell among all
    of the batch."""

    tile: Any
    first: Any
    row: Any
    has: Any


class Picks(NamedTuple):
    """Some cells that have a row: where they are, and their rows."""

    cells: Any
    index: Any  # among all of the batch
    mask: Any
    row: Any


class Scales(NamedTuple):
    """What gradients of the parts are multiplied by."""

    box: Any
    obj: Any
    cls: Any
    distance: Any


class Pair(NamedTuple):
    """A number of each axis."""

    x: Any
    y: Any


class Raw(NamedTuple):
    """The four numbers that say a box: x, y, w, h; or left, upper, right, lower. Or derivatives by these."""

    x: Any
    y: Any
    w: Any
    h: Any


# ----------------------------------------------------------------------------------------------------------- where


@triton.jit
def _site(index, levels, B, M, row_ptr, CELLS: tl.constexpr):
    """The tile of this number."""
    tile = tile_of(index, levels, B, CELLS)
    first = tile.b * tile.N + tile.first
    row = tl.load(row_ptr + first + tile.cells, mask=tile.mask, other=M)
    return Site(tile, first, row, row < M)


@triton.jit
def _keep(mask, k, last, WIDTH: tl.constexpr, PLANES: tl.constexpr):
    """Which channels k of cells are there, of WIDTH in all; ``k < last`` is not asked where it must be so."""
    keep = mask[None, :]
    if WIDTH % PLANES != 0:
        keep = keep & (k < last)
    return keep


@triton.jit
def _list(site, list_ptr):
    """Leaves the cells of the tile that have a row, in their order, and returns how many; readable after a barrier."""
    has = site.has.to(tl.int32)
    tl.store(list_ptr + tl.cumsum(has, axis=0) - 1, site.tile.cells, mask=site.has)
    return tl.sum(has, axis=0)


@triton.jit
def _listed(site, list_ptr, i0, count, row_ptr, PICKS: tl.constexpr):
    """Those from the i0-th on."""
    i = i0 + tl.arange(0, PICKS)
    mask = i < count
    cells = tl.load(list_ptr + i, mask=mask, other=0)
    index = site.first + cells
    return Picks(cells, index, mask, tl.load(row_ptr + index, mask=mask, other=0))


# ----------------------------------------------------------------------------------------------------------- zeros


@triton.jit
def _fill_with_zeros(view, site, mask, first, last, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    CELLS: tl.constexpr = SPEC.CELLS
    PLANES: tl.constexpr = SPEC.PLANES
    at = cells_in(view, site.tile.cells, site.tile, LAYOUT)
    nothing = tl.zeros([PLANES, CELLS], view.ptr.dtype.element_ty)
    for k0 in tl.range(first, last, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = _keep(mask, k, last, WIDTH, PLANES)
        tl.store(at[None, :] + k * step_of(view, LAYOUT), nothing, mask=keep)


@triton.jit
def _store_zeros(view, site, first, last, WIDTH: tl.constexpr, SPEC: tl.constexpr):
    """Zeros in the channels from ``first`` to ``last`` of a tile, of WIDTH in all."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    if LAYOUT == "strided":
        _fill_with_zeros(view, site, site.tile.mask, first, last, WIDTH, SPEC)
    elif is_wide(view, site.tile, LAYOUT):
        wide = as_wide(view, LAYOUT)
        _fill_with_zeros(wide, site, wide_mask(view, site.tile, LAYOUT), first, last, WIDTH, SPEC)
    else:
        _fill_with_zeros(view, site, site.tile.mask, first, last, WIDTH, SPEC)


# --------------------------------------------------------------------------------------------------------- classes


@triton.jit
def _class_weight(weights_ptr, k, mask, ACC: tl.constexpr):
    """What the terms of the classes k are multiplied by."""
    return tl.load(weights_ptr + k, mask=mask, other=0.0).to(ACC)


@triton.jit
def _shares(site, task, ACC: tl.constexpr):
    """What the terms of the cells of a tile are multiplied by where rows have weights: by that of their row, or by 0 in
    an ignored region.
    """
    at = task.assigned.score_ptr + site.first + site.tile.cells
    score = tl.load(at, mask=site.tile.mask & ~site.has, other=0.0)
    own = row_weights(task.targets.row_weights_ptr, site.row, site.has, ACC)
    return tl.where(score < 0, 0.0, own)


@triton.jit
def _background(
    view,
    d_view,
    site,
    mask,
    label,
    first,
    last,
    task,
    scale,
    PLANES: tl.constexpr,
    SPEC: tl.constexpr,
):
    """Loss and gradient of some classes of a tile as if there were no objects, PLANES at a time; nothing of the classes
    of these objects."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    CELLS: tl.constexpr = SPEC.CELLS
    at = cells_in(view, site.tile.cells, site.tile, LAYOUT)
    d_at = at
    if SPEC.WITH_GRAD:
        d_at = cells_in(d_view, site.tile.cells, site.tile, LAYOUT)
    nothing = tl.zeros([PLANES, CELLS], tl.int1)
    share = tl.full([CELLS], 1.0, SPEC.ACC)
    if task.targets.row_weights_ptr is not None:
        share = _shares(site, task, SPEC.ACC)
    total = tl.zeros([PLANES, CELLS], SPEC.ACC)
    for k0 in tl.range(first, last, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = _keep(mask, k, last, SPEC.C, PLANES)
        x = tl.load(at[None, :] + k * step_of(view, LAYOUT), mask=keep, other=LOW).to(SPEC.ACC)
        loss, d = task.head.label(x, nothing, task.head.label_args)
        factor = scale
        if task.targets.weights_ptr is not None:
            weight = _class_weight(task.targets.weights_ptr, k, k < last, SPEC.ACC)
            loss = weigh(weight, loss)
            factor = scale * weight
        if task.targets.row_weights_ptr is not None:
            loss = weigh(share[None, :], loss)
            d *= share[None, :]
        if SPEC.WITH_LOSS:
            total += tl.where(label[None, :] == k, 0.0, loss)
        if SPEC.WITH_GRAD:
            d_step = step_of(d_view, LAYOUT)
            tl.store(d_at[None, :] + k * d_step, (factor * d).to(d_view.ptr.dtype.element_ty), mask=keep)
    return tl.sum(tl.sum(total, axis=0), axis=0)


@triton.jit
def _stream(view, d_view, site, label, first, last, task, scale, SPEC: tl.constexpr):
    """:func:`_background`, by accesses as wide as may be."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    wide = site.tile.HW < 0
    if LAYOUT != "strided":
        wide = is_wide(view, site.tile, LAYOUT)
        if SPEC.WITH_GRAD:
            wide = wide & is_wide(d_view, site.tile, LAYOUT)
    if wide:
        own = as_wide(view, LAYOUT)
        d_own = own
        if SPEC.WITH_GRAD:
            d_own = as_wide(d_view, LAYOUT)
        mask = wide_mask(view, site.tile, LAYOUT)
        loss = _background(
            own,
            d_own,
            site,
            mask,
            label,
            first,
            last,
            task,
            scale,
            PLANES=SPEC.PLANES,
            SPEC=SPEC,
        )
    else:  # of another shape, or threads would load as many numbers as there, and regroup them to store
        loss = _background(
            view,
            d_view,
            site,
            site.tile.mask,
            label,
            first,
            last,
            task,
            scale,
            PLANES=SPEC.PLANES // 2,
            SPEC=SPEC,
        )
    return loss


@triton.jit
def _true_classes(view, d_view, site, label, first, last, task, scale, SPEC):
    """Loss of the class that each cell's object has, if it is one of these, and its gradient."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    own = site.has & (label >= first) & (label < last)
    at = cells_in(view, site.tile.cells, site.tile, LAYOUT) + label * step_of(view, LAYOUT)
    x = tl.load(at, mask=own, other=0.0).to(SPEC.ACC)
    score = tl.load(task.assigned.score_ptr + site.first + site.tile.cells, mask=own, other=0.0)
    loss, d = task.head.label(x, score, task.head.label_args)
    if task.targets.weights_ptr is not None:
        weight = _class_weight(task.targets.weights_ptr, label, own, SPEC.ACC)
        loss = weigh(weight, loss)
        d = weight * d
    if task.targets.row_weights_ptr is not None:
        weight = row_weights(task.targets.row_weights_ptr, site.row, own, SPEC.ACC)
        loss = weigh(weight, loss)
        d *= weight
    if SPEC.WITH_GRAD:
        at = cells_in(d_view, site.tile.cells, site.tile, LAYOUT) + label * step_of(d_view, LAYOUT)
        tl.store(at, (scale * d).to(d_view.ptr.dtype.element_ty), mask=own)
    return tl.sum(tl.where(own, loss, 0.0), axis=0)


@triton.jit
def _listed_classes(view, d_view, site, list_ptr, count, first, last, task, scale, SPEC: tl.constexpr):
    """Loss of some classes of the cells that have a row, and its gradient."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    PICKS: tl.constexpr = SPEC.PICKS
    GROUP: tl.constexpr = SPEC.LANES
    total = tl.zeros([PICKS, GROUP], SPEC.ACC)
    k = (first + tl.arange(0, GROUP))[None, :]
    for i0 in range(0, count, PICKS):
        picks = _listed(site, list_ptr, i0, count, task.assigned.row_ptr, PICKS)
        keep = picks.mask[:, None] & (k < last)
        at = cells_in(view, picks.cells, site.tile, LAYOUT)[:, None] + k * step_of(view, LAYOUT)
        x = tl.load(at, mask=keep, other=0.0).to(SPEC.ACC)
        label = tl.load(task.targets.ptr + picks.row * 6 + 1, mask=picks.mask, other=-1.0).to(tl.int32)
        score = tl.load(task.assigned.score_ptr + picks.index, mask=picks.mask, other=0.0)
        loss, d = task.head.label(x, tl.where(label[:, None] == k, score[:, None], 0.0), task.head.label_args)
        if task.targets.weights_ptr is not None:
            weight = _class_weight(task.targets.weights_ptr, k, k < last, SPEC.ACC)
            loss = weigh(weight, loss)
            d = weight * d
        if task.targets.row_weights_ptr is not None:
            weight = row_weights(task.targets.row_weights_ptr, picks.row, picks.mask, SPEC.ACC)[:, None]
            loss = weigh(weight, loss)
            d *= weight
        total += tl.where(keep, loss, 0.0)
        if SPEC.WITH_GRAD:
            at = cells_in(d_view, picks.cells, site.tile, LAYOUT)[:, None] + k * step_of(d_view, LAYOUT)
            tl.store(at, (scale * d).to(d_view.ptr.dtype.element_ty), mask=keep)
    return tl.sum(tl.sum(total, axis=1), axis=0)


@triton.jit
def _class_program(view, d_view, site, list_ptr, first, task, scale, SPEC: tl.constexpr):
    """Class loss of a program, and the gradient."""
    last = tl.minimum(first + SPEC.GROUP, SPEC.C)
    if SPEC.OBJECTNESS:
        loss = tl.cast(0.0, SPEC.ACC)
        if SPEC.WITH_GRAD:
            _store_zeros(d_view, site, first, last, SPEC.C, SPEC)
        count = _list(site, list_ptr)
        if count > 0:
            tl.debug_barrier()  # zeros, and the list, come first
            loss = _listed_classes(view, d_view, site, list_ptr, count, first, last, task, scale, SPEC=SPEC)
    else:
        label = tl.load(task.targets.ptr + site.row * 6 + 1, mask=site.has, other=-1.0).to(tl.int32)
        loss = _stream(view, d_view, site, label, first, last, task, scale, SPEC=SPEC)
        if tl.max(site.has.to(tl.int32), axis=0) > 0:
            tl.debug_barrier()  # the background comes first
            loss += _true_classes(view, d_view, site, label, first, last, task, scale, SPEC)
    return loss


# ----------------------------------------------------------------------------------------------------------- boxes


@triton.jit
def _apart(sides):
    """The four numbers of [PICKS, 4]."""
    even, odd = tl.split(tl.reshape(sides, (sides.shape[0], 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return Raw(zero, one, two, three)


@triton.jit
def _together(raw):
    """The other way round."""
    return tl.reshape(tl.join(tl.join(raw.x, raw.w), tl.join(raw.y, raw.h)), (raw.x.shape[0], 4))


@triton.jit
def _decode(a, b, DECODE: tl.constexpr):
    """One axis of boxes in cells, the centre from the middle of the cell, by the numbers that say it."""
    if DECODE == "exp":
        span, slope = exp(a, b, 1.0, 1.0, 1.0)
        place = Span(a - 0.5, span.size)
        jacobian = Jacobian(1.0, 0.0, 0.0, slope.size_by_b)
    else:
        place, jacobian = ltrb(a, b, 1.0, 1.0, 1.0)
    return place, jacobian


@triton.jit
def _true_box(picks, site, stride, task, SPEC: tl.constexpr):
    """Centres of the rows of some cells from the middles of these, and sides, in cells."""
    row = load_rows(task.targets.ptr, picks.row, picks.mask, SPEC.PICKS)
    x = ((picks.cells % site.tile.W).to(SPEC.ACC) + 0.5) * stride
    y = ((picks.cells // site.tile.W).to(SPEC.ACC) + 0.5) * stride
    width = tl.cast(task.head.size[0], SPEC.ACC)
    height = tl.cast(task.head.size[1], SPEC.ACC)
    # the product is not rounded before the middle is taken off
    off = Pair(tl.fma(row.cx.to(SPEC.ACC), width, -x) / stride, tl.fma(row.cy.to(SPEC.ACC), height, -y) / stride)
    w = tl.where(picks.mask, row.w.to(SPEC.ACC) * width / stride, 1.0)
    h = tl.where(picks.mask, row.h.to(SPEC.ACC) * height / stride, 1.0)
    return off, Pair(w, h), Pair(width / stride, height / stride)


@triton.jit
def _encode(off, sides, SPEC: tl.constexpr):
    """What predictions are to say of such a box."""
    if SPEC.DECODE == "exp":
        true = Raw(off.x + 0.5, off.y + 0.5, tl.log(sides.x + 1e-8), tl.log(sides.y + 1e-8))
    else:
        true = Raw(0.5 * sides.x - off.x, 0.5 * sides.y - off.y, 0.5 * sides.x + off.x, 0.5 * sides.y + off.y)
    return true


@triton.jit
def _overlap(raw, off, sides, extent, head, SPEC: tl.constexpr):
    """Box loss, and its gradient by what says the boxes."""
    DECODE: tl.constexpr = SPEC.DECODE
    x, jx = _decode(raw.x, raw.w, DECODE)
    y, jy = _decode(raw.y, raw.h, DECODE)
    pair_x = axis_of_sizes(x.size, sides.x, x.centre - off.x)
    pair_y = axis_of_sizes(y.size, sides.y, y.centre - off.y)
    loss, by_x, by_y = head.box(pair_x, pair_y, head.box_args, extent)
    dx, dw = chain(by_x.centre, by_x.size, jx)
    dy, dh = chain(by_y.centre, by_y.size, jy)
    return loss, Raw(dx, dy, dw, dh)


@triton.jit
def _differences(raw, true, extent, DISTANCE: tl.constexpr):
    """The L1 loss of what says boxes, and its gradient."""
    loss_x, dx, dw = l1(raw.x, raw.w, true.x, true.w, 1.0)
    loss_y, dy, dh = l1(raw.y, raw.h, true.y, true.h, 1.0)
    if DISTANCE == "image":
        ux = 0.25 / extent.x
        uy = 0.25 / extent.y
        loss = loss_x * ux + loss_y * uy
        d = Raw(dx * ux, dy * uy, dw * ux, dh * uy)
    else:
        loss = loss_x + loss_y
        d = Raw(dx, dy, dw, dh)
    return loss, d


@triton.jit
def _spread(sides, AXIS: tl.constexpr):
    """A number of each distance [PICKS, 4] for all its bins: along the last axis, or the first one."""
    if AXIS == 2:
        result = sides[:, :, None]
    else:
        result = sides[None, :, :]
    return result


@triton.jit
def _bins(AXIS: tl.constexpr, SPEC: tl.constexpr):
    """The bins along this axis."""
    if AXIS == 2:
        bins = tl.arange(0, SPEC.BINS)[None, None, :]
    else:
        bins = tl.arange(0, SPEC.BINS)[:, None, None]
    return bins


@triton.jit
def _bins_at(view, picks, site, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Pointers to the logits of distances."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    step = step_of(view, LAYOUT)
    at = cells_in(view, picks.cells, site.tile, LAYOUT)[:, None] + (tl.arange(0, 4) * SPEC.REG_MAX)[None, :] * step
    return _spread(at, AXIS) + _bins(AXIS, SPEC) * step


@triton.jit
def _picked_bins(view, d_view, site, picks, place, head, weight, scales, SPEC: tl.constexpr):
    """Box and distance loss of some boxes whose distances are made of bins, each a sum, and the gradient.

    Bins come first, for then a thread holds all of a distance, but where they follow each other in memory.
    """
    AXIS: tl.constexpr = 2 if SPEC.LAYOUT == "channels" else 0
    off, sides, extent = place
    bins = _bins(AXIS, SPEC)
    keep = _spread(picks.mask[:, None] & (tl.arange(0, 4)[None, :] < 4), AXIS) & (bins < SPEC.REG_MAX)
    logits = tl.load(_bins_at(view, picks, site, AXIS, SPEC), mask=keep, other=0.0).to(SPEC.ACC)
    logits = tl.where(keep, logits, -1e30)  # what is padding adds nothing to a softmax
    largest = tl.max(logits, axis=AXIS, keep_dims=True)
    e, first = exponentials(logits, largest)
    rest = tl.sum(tl.where(first, 0.0, e), axis=AXIS, keep_dims=True)
    rest += tl.sum(first.to(e.dtype), axis=AXIS, keep_dims=True) - 1.0  # equals of the largest
    p = e / (1.0 + rest)
    # not a product and sum in one, which would differ among the threads that add up the same numbers
    distances = tl.sum(tl.where(keep, p * bins, 0.0), axis=AXIS)
    loss_box, d_box = _overlap(_apart(distances), off, sides, extent, head, SPEC)
    most = tl.full([], SPEC.REG_MAX - 1 - 0.01, tl.float64).to(SPEC.ACC)  # a constant alone would be float32
    true = tl.minimum(tl.maximum(_together(_encode(off, sides, SPEC)), 0.0), most)
    below = tl.floor(true)
    behind = _spread(true - below, AXIS)
    low = _spread(below.to(tl.int32), AXIS)
    target = tl.where(bins == low, 1.0 - behind, tl.where(bins == low + 1, behind, 0.0))
    mean = 0.25 * _spread(weight[:, None] + tl.zeros_like(true), AXIS)
    ce = weigh(mean * target, log1p(rest) - (logits - largest))
    distance = tl.sum(tl.where(keep, ce, 0.0), axis=AXIS)
    if SPEC.WITH_GRAD:
        d_sides = _spread(_together(d_box) * (scales.box * weight)[:, None], AXIS)
        d_ce = softmax_slope(e, first, rest, target, 1.0)
        d = d_sides * p * (bins - _spread(distances, AXIS)) + (scales.distance * mean) * d_ce
        tl.store(_bins_at(d_view, picks, site, AXIS, SPEC), d.to(d_view.ptr.dtype.element_ty), mask=keep)
    box = tl.sum(tl.where(picks.mask, weight * loss_box, 0.0), axis=0)
    return box, tl.sum(tl.sum(distance, axis=1), axis=0)


@triton.jit
def _picked_numbers(view, d_view, site, picks, place, head, weight, scales, SPEC: tl.constexpr, ZEROS: tl.constexpr):
    """Box and distance loss of some boxes that four numbers say, each a sum, and the gradient. ZEROS may be among the
    weights.
    """
    DISTANCE: tl.constexpr = SPEC.DISTANCE
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    off, sides, extent = place
    at = cells_in(view, picks.cells, site.tile, LAYOUT)[:, None]
    at = at + tl.arange(0, 4)[None, :] * step_of(view, LAYOUT)
    raw = _apart(tl.load(at, mask=picks.mask[:, None], other=0.0).to(SPEC.ACC))
    loss_box, d_box = _overlap(raw, off, sides, extent, head, SPEC)
    loss, d = _differences(raw, _encode(off, sides, SPEC), extent, DISTANCE)
    if SPEC.WITH_GRAD:
        d_box = _together(d_box)
        by_box = weigh((scales.box * weight)[:, None], d_box, ZEROS)
        by_distance = _together(d) * (scales.distance * weight)[:, None]
        at = cells_in(d_view, picks.cells, site.tile, LAYOUT)[:, None]
        at = at + tl.arange(0, 4)[None, :] * step_of(d_view, LAYOUT)
        tl.store(at, (by_box + by_distance).to(d_view.ptr.dtype.element_ty), mask=picks.mask[:, None])
    box = tl.sum(tl.where(picks.mask, weigh(weight, loss_box, ZEROS), 0.0), axis=0)
    return box, tl.sum(tl.where(picks.mask, weigh(weight, loss, ZEROS), 0.0), axis=0)


@triton.jit
def _box_program(view, d_view, site, list_ptr, stride, task, scales, SPEC: tl.constexpr):
    """Box and distance loss of a tile, and the gradient."""
    WIDTH: tl.constexpr = 4 * SPEC.REG_MAX
    box = tl.cast(0.0, SPEC.ACC)
    distance = tl.cast(0.0, SPEC.ACC)
    if SPEC.WITH_GRAD:
        _store_zeros(d_view, site, 0, WIDTH, WIDTH, SPEC)
    count = _list(site, list_ptr)
    if count > 0:
        tl.debug_barrier()  # zeros, and the list, come first
        for i0 in range(0, count, SPEC.PICKS):
            picks = _listed(site, list_ptr, i0, count, task.assigned.row_ptr, SPEC.PICKS)
            place = _true_box(picks, site, stride, task, SPEC)
            weight = picks.mask.to(SPEC.ACC)
            if SPEC.SOFT:
                weight = tl.load(task.assigned.score_ptr + picks.index, mask=picks.mask, other=0.0)
            if task.targets.row_weights_ptr is not None:
                weight *= row_weights(task.targets.row_weights_ptr, picks.row, picks.mask, SPEC.ACC)
            if SPEC.DECODE == "dfl":
                more_box, more_distance = _picked_bins(
                    view, d_view, site, picks, place, task.head, weight, scales, SPEC=SPEC
                )
            else:
                ZEROS: tl.constexpr = SPEC.SOFT or task.targets.row_weights_ptr is not None
                more_box, more_distance = _picked_numbers(
                    view, d_view, site, picks, place, task.head, weight, scales, SPEC=SPEC, ZEROS=ZEROS
                )
            box += more_box
            distance += more_distance
    return box, distance


@triton.jit
def _objectness(view, d_view, site, task, scale, SPEC: tl.constexpr):
    """Loss of the objectness of a tile, and its gradient."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    at = cells_in(view, site.tile.cells, site.tile, LAYOUT)
    x = tl.load(at, mask=site.tile.mask, other=LOW).to(SPEC.ACC)
    loss, d = bce(x, site.has, ())
    if task.targets.row_weights_ptr is not None:
        share = _shares(site, task, SPEC.ACC)
        loss = weigh(share, loss)
        d *= share
    if SPEC.WITH_GRAD:
        at = cells_in(d_view, site.tile.cells, site.tile, LAYOUT)
        tl.store(at, (scale * d).to(d_view.ptr.dtype.element_ty), mask=site.tile.mask)
    return tl.sum(loss, axis=0)


# ------------------------------------------------------------------------------------------------------------- all


@triton.jit
def _grad_out(grads, part: tl.constexpr, b, SPEC: tl.constexpr):
    """What the gradient of a part is multiplied by: that of the total, the first of ``grads``, and its own; 1 with the
    loss. With BY_IMAGE those of image b."""
    grad = tl.cast(1.0 if SPEC.WITH_LOSS else 0.0, SPEC.ACC)
    if grads[0] is not None:
        grad += _load_grad(grads[0], b, SPEC)
    if grads[1 + part] is not None:
        grad += _load_grad(grads[1 + part], b, SPEC)
    return grad


@triton.jit
def _load_grad(ptr, b, SPEC: tl.constexpr):
    if SPEC.BY_IMAGE:
        ptr += b
    return tl.load(ptr).to(SPEC.ACC)


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
        _grad_out(weights.grads, 0, image, SPEC),
        _grad_out(weights.grads, 1, image, SPEC),
        _grad_out(weights.grads, CLS, image, SPEC),
        _grad_out(weights.grads, CLS + 1, image, SPEC),
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
        box, distance = _box_program(view, d_view, site, own_list, stride, branch.task, scales, SPEC)
        if SPEC.OBJECTNESS:
            view = view_of(predictions.obj, site.tile.level)
            d_view = view
            if SPEC.WITH_GRAD:
                d_view = view_of(gradient.obj, site.tile.level)
            obj = _objectness(view, d_view, site, branch.task, scales.obj, SPEC)
    else:
        view = view_of(predictions.cls, site.tile.level)
        d_view = view
        if SPEC.WITH_GRAD:
            d_view = view_of(gradient.cls, site.tile.level)
        first = (kind - 1) * SPEC.GROUP
        cls = _class_program(view, d_view, site, own_list, first, branch.task, scales.cls, SPEC)
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
        site = _site(pid - kind * tiles, levels, B, M, branch.task.assigned.row_ptr, SPEC.CELLS)
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
