"""The box term of predictions, and its gradient by their logits."""

import triton
import triton.language as tl

from ..primitives import larger
from ..terms.decode import chain
from ..terms.records import axis_of_sizes


@triton.jit
def true_box(row, cell, mask, site, ACC: tl.constexpr):
    """Centre from the cell's origin, in cells, and size, in images, of rows; a size of 1 where masked out."""
    # the product is not rounded before the cell is taken off
    gx = tl.fma(row.cx.to(ACC), site.W.to(ACC), -(cell % site.W).to(ACC))
    gy = tl.fma(row.cy.to(ACC), site.H.to(ACC), -(cell // site.W).to(ACC))
    return gx, gy, tl.where(mask, row.w, 1.0).to(ACC), tl.where(mask, row.h, 1.0).to(ACC)


@triton.jit
def _units(site, SPEC: tl.constexpr):
    """A cell's side and the anchor's, on both axes, in the unit of the box term."""
    if SPEC.UNIT == "image":
        x = 1.0 / site.W.to(SPEC.ACC)
        y = 1.0 / site.H.to(SPEC.ACC)
        w = site.own_w / (site.W * site.side)
        h = site.own_h / (site.H * site.side)
    elif SPEC.UNIT == "cell":
        x = tl.cast(1.0, SPEC.ACC)
        y = x
        w = site.own_w / site.side
        h = site.own_h / site.side
    else:
        x = site.side
        y = site.side
        w = site.own_w
        h = site.own_h
    return x, y, w, h


@triton.jit
def box_term(logits, true, site, head, terms, QUALITY: tl.constexpr, SPEC: tl.constexpr):
    """Box loss of predictions against true boxes, its gradient by the four logits, and with QUALITY their similarity.

    ``true`` is what :func:`true_box` returns.
    """
    tx, ty, tw, th = logits
    gx, gy, gw, gh = true
    unit_x, unit_y, unit_w, unit_h = _units(site, SPEC)
    x, jx = terms.axis(tx, tw, unit_w, unit_x, site.scale)
    y, jy = terms.axis(ty, th, unit_h, unit_y, site.scale)
    pair_x = axis_of_sizes(x.size, gw * (site.W * unit_x), x.centre - gx * unit_x)
    pair_y = axis_of_sizes(y.size, gh * (site.H * unit_y), y.centre - gy * unit_y)
    extent = (site.W * unit_x, site.H * unit_y)
    if terms.offset is not None:
        loss_x, dx, dw = terms.offset(tx, tw, gx, tl.log(gw * (site.W * site.side) / site.own_w), site.scale)
        loss_y, dy, dh = terms.offset(ty, th, gy, tl.log(gh * (site.H * site.side) / site.own_h), site.scale)
        weight = 1.0 + head.area_weight * (1.0 - tl.minimum(gw * gh, head.area_cap))
        loss = weight * (loss_x + loss_y)
        d = (weight * dx, weight * dy, weight * dw, weight * dh)
    else:
        loss, by_x, by_y = terms.box(pair_x, pair_y, head.box_args, extent)
        dx, dw = chain(by_x.centre, by_x.size, jx)
        dy, dh = chain(by_y.centre, by_y.size, jy)
        d = (dx, dy, dw, dh)
    similarity = tl.zeros_like(loss) + 1.0
    if QUALITY:
        if SPEC.QUALITY_IS_BOX:  # what has just been computed
            similarity = larger(1.0 - loss, 0.0)
        elif terms.quality is not None:
            distance, _by_x, _by_y = terms.quality(pair_x, pair_y, head.quality_args, extent)
            similarity = larger(1.0 - distance, 0.0)
    return loss, d, similarity


@triton.jit
def prior_term(logits, site, head, terms, SPEC: tl.constexpr):
    """Box loss of a tile of predictions towards the middle of their cell, and its gradient.

    An offset term takes the anchor for the true size, an IoU term a true box without size.
    """
    if terms.offset is not None:
        tx, ty, tw, th = logits
        loss_x, dx, dw = terms.offset(tx, tw, 0.5, 0.0, site.scale)
        loss_y, dy, dh = terms.offset(ty, th, 0.5, 0.0, site.scale)
        loss = loss_x + loss_y
        d = (dx, dy, dw, dh)
    else:
        middle = tl.cast(0.5, SPEC.ACC)
        none = tl.cast(0.0, SPEC.ACC)
        loss, d, _similarity = box_term(logits, (middle, middle, none, none), site, head, terms, False, SPEC)
    return loss, d
