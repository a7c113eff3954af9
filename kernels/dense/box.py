"""Box and centreness loss of anchors that have taken a row, and the gradient of all."""

import triton
import triton.language as tl

from ..boxes import Raw, apart, together
from ..primitives import near_divide, weigh
from ..rows import load_rows
from ..terms.decode import chain
from ..terms.records import axis_of_sizes
from .blocks import IGNORED, load_anchors
from .place import centreness, relative
from .site import anchors_at, site_of, tiles_of
from .taken import own_weights, share


@triton.jit
def _load_raw(at, by_channel, mask, ACC: tl.constexpr):
    """The four numbers of some boxes, in one access."""
    k = tl.arange(0, 4)[None, :]
    tile = tl.load(at[:, None] + k * by_channel, mask=mask[:, None], other=0.0).to(ACC)
    x, y, w, h = apart(tile)
    return Raw(x, y, w, h)


@triton.jit
def _box_term(raw, place, terms, numbers):
    """Box loss of anchors, and its gradient by the four raw numbers."""
    weights = numbers.weights
    sides, shift, true = place
    if terms.offset is not None:
        least = 1.1754944e-38  # of the quotient of sides, whose logarithm is to be finite
        tw = weights[2] * tl.log(tl.maximum(near_divide(true.x, sides.x), least))
        th = weights[3] * tl.log(tl.maximum(near_divide(true.y, sides.y), least))
        loss_x, dx, dw = terms.offset(raw.x, raw.w, weights[0] * shift.x / sides.x, tw, numbers.beta)
        loss_y, dy, dh = terms.offset(raw.y, raw.h, weights[1] * shift.y / sides.y, th, numbers.beta)
        loss = loss_x + loss_y
    else:
        x, jx = terms.axis(raw.x, raw.w, sides.x, sides.x / weights[0], 1.0 / weights[2])
        y, jy = terms.axis(raw.y, raw.h, sides.y, sides.y / weights[1], 1.0 / weights[3])
        pair_x = axis_of_sizes(x.size, true.x, x.centre - shift.x)
        pair_y = axis_of_sizes(y.size, true.y, y.centre - shift.y)
        loss, by_x, by_y = terms.box(pair_x, pair_y, numbers.box_args, numbers.size)
        dx, dw = chain(by_x.centre, by_x.size, jx)
        dy, dh = chain(by_y.centre, by_y.size, jy)
    return loss, Raw(dx, dy, dw, dh)


@triton.jit
def box_program(local, boxes, centres, level, batch, matched, terms, numbers, grads, SPEC: tl.constexpr):
    """Box and centreness loss of a program of a level, and the gradient."""
    ANCHORS: tl.constexpr = SPEC.ANCHORS
    if SPEC.REPEATS:
        tiles = batch.B * tiles_of(level, True, ANCHORS)
        box = tl.cast(0.0, SPEC.ACC)
        centre = tl.cast(0.0, SPEC.ACC)
        for tile in tl.range(local * batch.steps, tl.minimum((local + 1) * batch.steps, tiles), loop_unroll_factor=1):
            site = site_of(tile, level, True, ANCHORS)
            box += _box_tile(
                site, boxes, centres, level, batch, matched, terms, numbers=numbers, grads=grads, SPEC=SPEC
            )[0]
    else:
        site = site_of(local, level, SPEC.FLAT, ANCHORS)
        box, centre = _box_tile(
            site, boxes, centres, level, batch, matched, terms, numbers=numbers, grads=grads, SPEC=SPEC
        )
    return box, centre


@triton.jit
def _box_tile(site, boxes, centres, level, batch, matched, terms, numbers, grads, SPEC: tl.constexpr):
    """Box and centreness loss of some anchors, and the gradient."""
    ANCHORS: tl.constexpr = SPEC.ANCHORS
    position = site.position
    if SPEC.RANKED:
        position = site.n
    match = tl.load(matched.match_ptr + site.b.to(tl.int64) * batch.N + position, mask=site.mask, other=IGNORED)
    box = tl.cast(0.0, SPEC.ACC)
    centre = tl.cast(0.0, SPEC.ACC)
    has = site.mask & (match >= 0)
    d = tl.zeros([ANCHORS, 4], SPEC.ACC)
    d_centre = tl.zeros([ANCHORS], SPEC.ACC)
    if tl.max(has.to(tl.int32), axis=0) > 0:
        weight = share(matched.found_ptr, site.b, batch.B, SPEC.BY_IMAGE, SPEC.ACC)
        of_box = weight
        if matched.norm_ptr is not None:
            of_box = 1.0 / tl.load(matched.norm_ptr).to(SPEC.ACC)
        if numbers.box_gain is not None:
            of_box *= numbers.box_gain
        anchor = load_anchors(matched.anchors_ptr, site.n, has, SPEC.ACC)
        row = load_rows(matched.rows_ptr, match, has, ANCHORS)
        place = relative(anchor, row, has, numbers.size, SPEC.CORNERS, SPEC.ACC)
        at, by_channel = anchors_at(boxes.ptr, boxes.by, site, level, 4, SPEC)
        loss, d_raw = _box_term(_load_raw(at, by_channel, has, SPEC.ACC), place, terms, numbers)
        own = tl.full([ANCHORS], 1.0, SPEC.ACC)
        if matched.row_weights_ptr is not None:
            own = own_weights(matched, match, SPEC.ACC)
        own_box = own
        if matched.norm_ptr is not None:
            own_box *= centreness(place.shift, place.true)
        if matched.norm_ptr is not None or matched.row_weights_ptr is not None:
            loss = weigh(own_box, loss)
            dx = weigh(own_box, d_raw.x)
            dy = weigh(own_box, d_raw.y)
            d_raw = Raw(dx, dy, weigh(own_box, d_raw.w), weigh(own_box, d_raw.h))
        box = of_box * tl.sum(tl.where(has, loss, 0.0), axis=0)
        if SPEC.WITH_GRAD:
            d = grads.boxes * of_box * together(d_raw.x, d_raw.y, d_raw.w, d_raw.h)
            d = tl.where(has[:, None], d, 0.0)
        if terms.centre is not None:
            at, _by_channel = anchors_at(centres.ptr, centres.by, site, level, 1, SPEC)
            x = tl.load(at, mask=has, other=0.0).to(SPEC.ACC)
            loss, d_x = terms.centre(x, centreness(place.shift, place.true), ())
            if matched.row_weights_ptr is not None:
                loss = weigh(own, loss)
                d_x *= own
            centre = weight * tl.sum(tl.where(has, loss, 0.0), axis=0)
            if SPEC.WITH_GRAD:
                d_centre = tl.where(has, grads.centres * weight * d_x, 0.0)
    if SPEC.WITH_GRAD:
        at, by_channel = anchors_at(boxes.d_ptr, boxes.d_by, site, level, 4, SPEC)
        at = at[:, None] + tl.arange(0, 4)[None, :] * by_channel
        tl.store(at, d.to(boxes.d_ptr.dtype.element_ty), mask=site.mask[:, None])
        if terms.centre is not None:
            at, _by_channel = anchors_at(centres.d_ptr, centres.d_by, site, level, 1, SPEC)
            tl.store(at, d_centre.to(centres.d_ptr.dtype.element_ty), mask=site.mask)
    return box, centre
