"""Loss of classes and of objectness, and its gradient."""

import triton
import triton.language as tl

from ..primitives import weigh
from ..rows import row_weights
from ..terms.label import LOW, bce
from .listed import keep_of, list_cells, listed, store_zeros
from .views import as_wide, cells_in, is_wide, step_of, wide_mask


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
        keep = keep_of(mask, k, last, SPEC.C, PLANES)
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
        picks = listed(site, list_ptr, i0, count, task.assigned.row_ptr, PICKS)
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
def class_program(view, d_view, site, list_ptr, first, task, scale, SPEC: tl.constexpr):
    """Class loss of a program, and the gradient."""
    last = tl.minimum(first + SPEC.GROUP, SPEC.C)
    if SPEC.OBJECTNESS:
        loss = tl.cast(0.0, SPEC.ACC)
        if SPEC.WITH_GRAD:
            store_zeros(d_view, site, first, last, SPEC.C, SPEC)
        count = list_cells(site, list_ptr)
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


@triton.jit
def objectness(view, d_view, site, task, scale, SPEC: tl.constexpr):
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
