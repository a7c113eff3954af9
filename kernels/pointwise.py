"""The driver of `fusedyolo.functional`: one label or box term over flat tensors, forward or gradient.

A program owns BLOCK elements (label) or box pairs. REDUCE leaves ``scale``, given as ``exact`` takes it, times the sum,
else one loss an element; a gradient is scaled by ``grad_out``, one an element or, with REDUCE, one in all. A launch has
``outputs`` or ``grads``, whose pointers are None otherwise.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .overlap import Corners
from .primitives import exact
from .sums import column, column_sums, is_last
from .terms.records import axis_of_edges


class Term(NamedTuple):
    """A function of ``terms``, and what it takes beside its inputs."""

    function: Any
    args: Any
    extent: Any  # the image's width and height, or None for a term that does not read them


class Outputs(NamedTuple):
    """Where a loss goes; what sums are made of is None unless REDUCE."""

    loss_ptr: Any
    sums_ptr: Any  # one a program
    done_ptr: Any  # counts finished programs: 0 before and after every launch


class Grads(NamedTuple):
    """Where gradients by the two inputs go; of a label term, by the first alone."""

    grad_out_ptr: Any
    first_ptr: Any
    second_ptr: Any


class Spec(NamedTuple):
    """What a kernel is compiled for."""

    REDUCE: bool
    ACC: Any
    BLOCK: int


@triton.jit
def _finish(loss, mask, at, scale, outputs, SPEC: tl.constexpr):
    if SPEC.REDUCE:
        tl.store(outputs.sums_ptr + tl.program_id(0), tl.sum(tl.where(mask, loss, 0.0), axis=0))
        if is_last(outputs.done_ptr, tl.num_programs(0)):
            sums = column_sums(outputs.sums_ptr, tl.num_programs(0), 1, SPEC.ACC)
            tl.store(outputs.loss_ptr, column(sums, 0) * exact(scale).to(SPEC.ACC))
            tl.store(outputs.done_ptr, 0)
    else:
        tl.store(outputs.loss_ptr + at, loss, mask=mask)


@triton.jit
def _grad_out(ptr, at, mask, scale, SPEC: tl.constexpr):
    if SPEC.REDUCE:
        grad_out = tl.load(ptr).to(SPEC.ACC) * exact(scale).to(SPEC.ACC)
    else:
        grad_out = tl.load(ptr + at, mask=mask, other=0.0).to(SPEC.ACC)
    return grad_out


@triton.jit
def label_kernel(x_ptr, t_ptr, n, scale, term, outputs, grads, SPEC: tl.constexpr):
    """A label term over ``n`` logits and targets."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(SPEC.ACC)
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(SPEC.ACC)
    loss, d_x = term.function(x, t, term.args)
    if grads.grad_out_ptr is not None:
        d_x = d_x * _grad_out(grads.grad_out_ptr, at, mask, scale, SPEC)
        tl.store(grads.first_ptr + at, d_x.to(grads.first_ptr.dtype.element_ty), mask=mask)
    else:
        _finish(loss, mask, at, scale, outputs, SPEC)


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
def _axes(p, g):
    """Both axes of pairs of boxes, as a box term takes them."""
    return axis_of_edges(p.x1, p.x2, g.x1, g.x2), axis_of_edges(p.y1, p.y2, g.y1, g.y2)


@triton.jit
def _store_grad(ptr, at, mask, by_x, by_y, grad_out):
    """By edges, from centre and size."""
    out = ptr.dtype.element_ty
    tl.store(ptr + 4 * at, ((0.5 * by_x.centre - by_x.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 1, ((0.5 * by_y.centre - by_y.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 2, ((0.5 * by_x.centre + by_x.size) * grad_out).to(out), mask=mask)
    tl.store(ptr + 4 * at + 3, ((0.5 * by_y.centre + by_y.size) * grad_out).to(out), mask=mask)


@triton.jit
def box_kernel(p_ptr, g_ptr, n, scale, term, outputs, grads, SPEC: tl.constexpr):
    """A box term over ``n`` pairs of boxes; its gradient by both, for the term is symmetric in them."""
    BLOCK: tl.constexpr = SPEC.BLOCK
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    p = _load_boxes(p_ptr, at, mask, SPEC.ACC)
    g = _load_boxes(g_ptr, at, mask, SPEC.ACC)
    x, y = _axes(p, g)
    loss, by_px, by_py = term.function(x, y, term.args, term.extent)
    if grads.grad_out_ptr is not None:
        grad_out = _grad_out(grads.grad_out_ptr, at, mask, scale, SPEC)
        x, y = _axes(g, p)
        _loss, by_gx, by_gy = term.function(x, y, term.args, term.extent)
        _store_grad(grads.first_ptr, at, mask, by_px, by_py, grad_out)
        _store_grad(grads.second_ptr, at, mask, by_gx, by_gy, grad_out)
    else:
        _finish(loss, mask, at, scale, outputs, SPEC)
