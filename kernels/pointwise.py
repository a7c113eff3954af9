"""The driver of `fusedyolo.functional`: one label or box term over flat tensors, forward or gradient.

A program owns BLOCK elements (label) or box pairs. REDUCE leaves ``scale``, given as ``exact`` takes it, times the sum,
else one loss an element; a gradient is scaled by ``grad_out``, one an element or, with REDUCE, one in all.
"""

import triton
import triton.language as tl

from .overlap import Corners
from .primitives import exact
from .sums import column, column_sums, is_last
from .terms.records import axis_of_edges


@triton.jit
def _finish(loss, mask, at, loss_ptr, partial_ptr, done_ptr, scale, REDUCE: tl.constexpr, ACC: tl.constexpr):
    if REDUCE:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0), axis=0))
        if is_last(done_ptr, tl.num_programs(0)):
            sums = column_sums(partial_ptr, tl.num_programs(0), 1, ACC)
            tl.store(loss_ptr, column(sums, 0) * exact(scale).to(ACC))
            tl.store(done_ptr, 0)
    else:
        tl.store(loss_ptr + at, loss, mask=mask)


@triton.jit
def _grad_out(grad_out_ptr, at, mask, scale, REDUCE: tl.constexpr, ACC: tl.constexpr):
    if REDUCE:
        grad_out = tl.load(grad_out_ptr).to(ACC) * exact(scale).to(ACC)
    else:
        grad_out = tl.load(grad_out_ptr + at, mask=mask, other=0.0).to(ACC)
    return grad_out


@triton.jit
def label_kernel(
    x_ptr, t_ptr, n, args, scale, loss_ptr, partial_ptr, done_ptr, grad_out_ptr, dx_ptr,
    LABEL: tl.constexpr, REDUCE: tl.constexpr, WITH_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A label term over ``n`` logits and targets."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(ACC)
    loss, d_x = LABEL(x, t, args)
    if WITH_GRAD:
        d_x = d_x * _grad_out(grad_out_ptr, at, mask, scale, REDUCE, ACC)
        tl.store(dx_ptr + at, d_x.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        _finish(loss, mask, at, loss_ptr, partial_ptr, done_ptr, scale, REDUCE, ACC)


@triton.jit
def _load_boxes(ptr, at, mask, ACC: tl.constexpr):
    """Unit boxes where masked out."""
    return Corners(
        tl.load(ptr + 4 * at, mask=mask, other=0.0).to(ACC),
        tl.load(ptr + 4 * at + 1, mask=mask, other=0.0).to(ACC),
        tl.load(ptr + 4 * at + 2, mask=mask, other=1.0).to(ACC),
        tl.load(ptr + 4 * at + 3, mask=mask, other=1.0).to(ACC),
    )


@triton.jit
def _axes(p, g, extent):
    """Both axes of pairs of boxes, as a box term takes them."""
    return axis_of_edges(p.x1, p.x2, g.x1, g.x2, extent[0]), axis_of_edges(p.y1, p.y2, g.y1, g.y2, extent[1])


@triton.jit
def _store_grad(ptr, at, mask, by_x, by_y, grad_out):
    """By edges, from centre and size."""
    out = ptr.dtype.element_ty
    tl.store(ptr + 4 * at, ((0.5 * by_x.centre - by_x.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 1, ((0.5 * by_y.centre - by_y.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 2, ((0.5 * by_x.centre + by_x.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 3, ((0.5 * by_y.centre + by_y.size) * grad_out).to(out), mask=mask)


@triton.jit
def box_kernel(
    p_ptr, g_ptr, n, args, extent, scale, loss_ptr, partial_ptr, done_ptr, grad_out_ptr, dp_ptr, dg_ptr,
    BOX: tl.constexpr, REDUCE: tl.constexpr, WITH_GRAD: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A box term over ``n`` pairs of boxes; its gradient by both, for the term is symmetric in them.

    ``extent`` is the image's width and height, or two Nones for a term that does not read them.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    p = _load_boxes(p_ptr, at, mask, ACC)
    g = _load_boxes(g_ptr, at, mask, ACC)
    x, y = _axes(p, g, extent)
    loss, by_px, by_py = BOX(x, y, args)
    if WITH_GRAD:
        grad_out = _grad_out(grad_out_ptr, at, mask, scale, REDUCE, ACC)
        x, y = _axes(g, p, extent)
        _loss, by_gx, by_gy = BOX(x, y, args)
        _store_grad(dp_ptr, at, mask, by_px, by_py, grad_out)
        _store_grad(dg_ptr, at, mask, by_gx, by_gy, grad_out)
    else:
        _finish(loss, mask, at, loss_ptr, partial_ptr, done_ptr, scale, REDUCE, ACC)
