"""Loss of boxes that have a row, by overlap and by distance, and its gradient."""

import triton
import triton.language as tl

from ..boxes import Pair, Raw, apart, together
from ..primitives import log1p, weigh
from ..rows import load_rows, row_weights
from ..terms.decode import chain, exp, ltrb
from ..terms.label import exponentials, softmax_slope
from ..terms.offset import l1
from ..terms.records import Jacobian, Span, axis_of_sizes
from .listed import list_cells, listed, store_zeros
from .views import cells_in, step_of


@triton.jit
def _raw_of(columns):
    """The four numbers of [BOXES, 4]."""
    x, y, w, h = apart(columns)
    return Raw(x, y, w, h)


@triton.jit
def _columns(raw):
    """The other way round."""
    return together(raw.x, raw.y, raw.w, raw.h)


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
    row = load_rows(task.targets.ptr, picks.row, picks.mask, SPEC.BOXES)
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
    """A number of each distance [BOXES, 4] for all its bins: along the last axis, or the first one."""
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
def _kept_bins(picks, AXIS: tl.constexpr, SPEC: tl.constexpr):
    """Which logits of distances are there."""
    keep = _spread(picks.mask[:, None] & (tl.arange(0, 4)[None, :] < 4), AXIS)
    return keep & (_bins(AXIS, SPEC) < SPEC.REG_MAX)


@triton.jit
def _numbers_at(view, picks, site, SPEC: tl.constexpr):
    """Pointers to the four numbers of boxes."""
    LAYOUT: tl.constexpr = SPEC.LAYOUT
    at = cells_in(view, picks.cells, site.tile, LAYOUT)[:, None]
    return at + tl.arange(0, 4)[None, :] * step_of(view, LAYOUT)


@triton.jit
def _load_boxes(view, picks, site, SPEC: tl.constexpr):
    """What is predicted of some boxes: logits of distances, or four numbers.

    Bins come first, for then a thread holds all of a distance, but where they follow each other in memory.
    """
    AXIS: tl.constexpr = 2 if SPEC.LAYOUT == "channels" else 0
    if SPEC.DECODE == "dfl":
        found = tl.load(_bins_at(view, picks, site, AXIS, SPEC), mask=_kept_bins(picks, AXIS, SPEC), other=0.0)
    else:
        found = tl.load(_numbers_at(view, picks, site, SPEC), mask=picks.mask[:, None], other=0.0)
    return found.to(SPEC.ACC)


@triton.jit
def _picked_bins(logits, d_view, site, picks, place, head, weight, scales, SPEC: tl.constexpr):
    """Box and distance loss of some boxes whose distances are made of bins, and the gradient."""
    AXIS: tl.constexpr = 2 if SPEC.LAYOUT == "channels" else 0
    off, sides, extent = place
    bins = _bins(AXIS, SPEC)
    keep = _kept_bins(picks, AXIS, SPEC)
    logits = tl.where(keep, logits, -1e30)  # what is padding adds nothing to a softmax
    largest = tl.max(logits, axis=AXIS, keep_dims=True)
    e, first = exponentials(logits, largest)
    rest = tl.sum(tl.where(first, 0.0, e), axis=AXIS, keep_dims=True)
    rest += tl.sum(first.to(e.dtype), axis=AXIS, keep_dims=True) - 1.0  # equals of the largest
    p = e / (1.0 + rest)
    # not a product and sum in one, which would differ among the threads that add up the same numbers
    distances = tl.sum(tl.where(keep, p * bins, 0.0), axis=AXIS)
    loss_box, d_box = _overlap(_raw_of(distances), off, sides, extent, head, SPEC)
    most = tl.full([], SPEC.REG_MAX - 1 - 0.01, tl.float64).to(SPEC.ACC)  # a constant alone would be float32
    true = tl.minimum(tl.maximum(_columns(_encode(off, sides, SPEC)), 0.0), most)
    below = tl.floor(true)
    behind = _spread(true - below, AXIS)
    low = _spread(below.to(tl.int32), AXIS)
    target = tl.where(bins == low, 1.0 - behind, tl.where(bins == low + 1, behind, 0.0))
    mean = 0.25 * _spread(weight[:, None] + tl.zeros_like(true), AXIS)
    ce = weigh(mean * target, log1p(rest) - (logits - largest))
    distance = tl.sum(tl.where(keep, ce, 0.0), axis=AXIS)
    if SPEC.WITH_GRAD:
        d_sides = _spread(_columns(d_box) * (scales.box * weight)[:, None], AXIS)
        d_ce = softmax_slope(e, first, rest, target, 1.0)
        d = d_sides * p * (bins - _spread(distances, AXIS)) + (scales.distance * mean) * d_ce
        tl.store(_bins_at(d_view, picks, site, AXIS, SPEC), d.to(d_view.ptr.dtype.element_ty), mask=keep)
    return tl.where(picks.mask, weight * loss_box, 0.0), tl.sum(distance, axis=1)


@triton.jit
def _picked_numbers(numbers, d_view, site, picks, place, head, weight, scales, SPEC: tl.constexpr, ZEROS: tl.constexpr):
    """Box and distance loss of some boxes that four numbers say, and the gradient. ZEROS may be among the weights."""
    DISTANCE: tl.constexpr = SPEC.DISTANCE
    off, sides, extent = place
    raw = _raw_of(numbers)
    loss_box, d_box = _overlap(raw, off, sides, extent, head, SPEC)
    loss, d = _differences(raw, _encode(off, sides, SPEC), extent, DISTANCE)
    if SPEC.WITH_GRAD:
        d_box = _columns(d_box)
        by_box = weigh((scales.box * weight)[:, None], d_box, ZEROS)
        by_distance = _columns(d) * (scales.distance * weight)[:, None]
        at = _numbers_at(d_view, picks, site, SPEC)
        tl.store(at, (by_box + by_distance).to(d_view.ptr.dtype.element_ty), mask=picks.mask[:, None])
    box = tl.where(picks.mask, weigh(weight, loss_box, ZEROS), 0.0)
    return box, tl.where(picks.mask, weigh(weight, loss, ZEROS), 0.0)


@triton.jit
def box_program(view, d_view, site, list_ptr, stride, task, scales, SPEC: tl.constexpr):
    """Box and distance loss of a tile, and the gradient."""
    WIDTH: tl.constexpr = 4 * SPEC.REG_MAX
    BOXES: tl.constexpr = SPEC.BOXES
    box = tl.zeros([BOXES], SPEC.ACC)
    distance = tl.zeros([BOXES], SPEC.ACC)
    if SPEC.WITH_GRAD:
        store_zeros(d_view, site, 0, WIDTH, WIDTH, SPEC)
    count = list_cells(site, list_ptr)
    if count > 0:
        tl.debug_barrier()  # zeros, and the list, come first
        for i0 in range(0, count, BOXES):
            picks = listed(site, list_ptr, i0, count, task.assigned.row_ptr, BOXES)
            boxes = _load_boxes(view, picks, site, SPEC)  # under way while rows are
            place = _true_box(picks, site, stride, task, SPEC)
            weight = picks.mask.to(SPEC.ACC)
            if SPEC.SOFT:
                weight = tl.load(task.assigned.score_ptr + picks.index, mask=picks.mask, other=0.0)
            if task.targets.row_weights_ptr is not None:
                weight *= row_weights(task.targets.row_weights_ptr, picks.row, picks.mask, SPEC.ACC)
            if SPEC.DECODE == "dfl":
                more_box, more_distance = _picked_bins(
                    boxes, d_view, site, picks, place, task.head, weight, scales, SPEC=SPEC
                )
            else:
                ZEROS: tl.constexpr = SPEC.SOFT or task.targets.row_weights_ptr is not None
                more_box, more_distance = _picked_numbers(
                    boxes, d_view, site, picks, place, task.head, weight, scales, SPEC=SPEC, ZEROS=ZEROS
                )
            box += more_box
            distance += more_distance
    return tl.sum(box, axis=0), tl.sum(distance, axis=0)
