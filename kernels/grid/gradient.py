"""The gradient launch."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import are_wide, pointer_of, strides_of
from .box import prior_term
from .loss import ASSIGNED, BACKGROUND, HIDDEN
from .records import Plane
from .site import (
    as_wide_plane,
    cells_at,
    channel_step,
    kept_end,
    kept_stride,
    load_logits,
    load_plane,
    load_state,
    means_of,
    site_of,
    wide,
)


class Known(NamedTuple):
    """What is known of the tile before anything is stored."""

    state: Any
    d_obj: Any  # of objectness, where nothing is assigned
    d_prior: Any  # of the four box logits, likewise
    per_row: Any  # what kept gradients are multiplied by,
    per_used: Any  # and those of objectness


@triton.jit
def _background(k, d_obj, d_prior, SPEC: tl.constexpr):
    """Gradient of some channels where nothing is assigned."""
    d = tl.where((k == 4)[:, None], d_obj[None, :], 0.0)
    if SPEC.PRIOR:
        for i in tl.static_range(4):
            d = tl.where((k == i)[:, None], d_prior[i][None, :], d)
    return d


@triton.jit
def _share(head, SPEC: tl.constexpr):
    """Of the channels of a tile the first that the program stores, and the first that it does not."""
    share = tl.cdiv(tl.cdiv(5 + head.C, SPEC.CHANNELS), SPEC.PARTS) * SPEC.CHANNELS
    first = tl.program_id(0) % SPEC.PARTS * share
    return first, tl.minimum(first + share, 5 + head.C)


@triton.jit
def _store_tile(plane, end_cell, site, known, saved, head, SPEC: tl.constexpr):
    """The gradient of the tile, of the channels of this program every entry before ``end_cell`` once."""
    state, d_obj, d_prior, per_row, per_used = known
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    mask = cells < end_cell
    step = channel_step(plane.by, SPEC)
    at = cells_at(plane, cells, site, SPEC)
    first, end = _share(head, SPEC)
    is_assigned = state == ASSIGNED
    amount = tl.sum(is_assigned.to(tl.int32), axis=0)
    if amount > 0:  # two loops, so that tiles without an assigned prediction have no loads in theirs
        slot = tl.load(saved.bases_ptr + site.pid) + tl.cumsum(is_assigned.to(tl.int32), axis=0) - 1
        kept_at = saved.kept_ptr + slot.to(tl.int64) * kept_stride(head.C)
        for k0 in range(first, end, SPEC.CHANNELS):
            k = k0 + tl.arange(0, SPEC.CHANNELS)
            here = (k < end)[:, None]
            own = is_assigned[None, :]
            whole = own & here
            if SPEC.LAYOUT == "planes":  # else so wide accesses take too many registers
                whole = own & (k < kept_end(head.C))[:, None]
            kept = tl.load(kept_at[None, :] + k[:, None], mask=whole, other=0.0)
            kept *= tl.where(k == 4, per_used, per_row)[:, None]
            if SPEC.SMOOTH and saved.row_weights_ptr is None:  # objectness takes no notice
                own = own & ~(site.smooth & (k == 4))[:, None]
            d = tl.where(own, kept, _background(k, d_obj, d_prior, SPEC))
            tl.store(at[None, :] + (k * step)[:, None], d.to(plane.ptr.dtype.element_ty), mask=here & mask[None, :])
    else:
        for k0 in range(first, end, SPEC.CHANNELS):
            k = k0 + tl.arange(0, SPEC.CHANNELS)
            here = (k < end)[:, None]
            d = _background(k, d_obj, d_prior, SPEC)
            tl.store(at[None, :] + (k * step)[:, None], d.to(plane.ptr.dtype.element_ty), mask=here & mask[None, :])


@triton.jit
def grid_grad_kernel(
    maps, levels, grads, grads_by, saved, parts_ptr, grad_out_ptr, head, terms, SPEC: tl.constexpr
):  # fmt: skip
    """Gradient of the total, times ``grad_out``, with the tiles, the arguments and the leavings of the loss launch;
    ``grads`` are those of ``maps``, ``grads_by`` their strides. Grid: PARTS programs for each tile, which share out its
    channels.
    """
    site = site_of(tl.program_id(0) // SPEC.PARTS, levels, SPEC)
    if SPEC.BY_IMAGE:
        grad_out_ptr += site.b
    per_row = tl.load(grad_out_ptr).to(SPEC.ACC)
    per_used = per_row
    if SPEC.MEAN_ROWS or SPEC.MEAN_USED:
        means_ptr = means_of(site.level, levels, parts_ptr, SPEC)
        per_row *= tl.load(means_ptr)
        per_used *= tl.load(means_ptr + 1)
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    plane = Plane(pointer_of(maps, site.level), strides_of(levels.by, site.level))
    first, _end = _share(head, SPEC)
    asked = tl.where(first < 5, site.end_cell, 0)  # the others store no gradient of what is read here
    logits, logit = load_logits(plane, site, cells, asked, SPEC.PRIOR, SPEC)
    state = load_state(saved.state_ptr, cells, site)
    true_obj = tl.cast(0.0, SPEC.ACC)
    counts = state == BACKGROUND
    if SPEC.SMOOTH:
        true_obj = load_plane(saved.true_obj_ptr, cells, site)
        if saved.row_weights_ptr is not None:
            counts = counts | (site.smooth & (state != HIDDEN))
        else:
            counts = counts | site.smooth
    _loss, d_obj = terms.objectness(logit, true_obj, head.obj_args)
    d_obj = tl.where(counts, per_used * (site.obj_scale * head.noobj_gain) * d_obj, 0.0)
    d_prior = (d_obj, d_obj, d_obj, d_obj)
    if SPEC.PRIOR:
        _prior, d = prior_term(logits, site, head, terms, SPEC)
        share = per_row * head.prior_gain
        d_prior = (share * d[0], share * d[1], share * d[2], share * d[3])
    plane = Plane(pointer_of(grads, site.level), strides_of(grads_by, site.level))
    known = Known(state, d_obj, d_prior, per_row, per_used)
    if SPEC.LAYOUT == "planes":
        if (site.HW % 16 == 0) & are_wide(plane.by):
            _store_tile(as_wide_plane(plane), wide(site.end_cell), site, known, saved, head, SPEC)
        else:
            _store_tile(plane, site.end_cell, site, known, saved, head, SPEC)
    else:
        _store_tile(plane, site.end_cell, site, known, saved, head, SPEC)
