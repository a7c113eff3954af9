"""Box, objectness and class loss of the predictions listed for a tile, many at a time.

Of several rows on a prediction SHARING takes the "last", or the box and class loss of "each", or the "sum" of their box
losses and all their classes at once; with "one" there are no others. A prediction meets its rows in their order, round
by round, all predictions in step.
"""

import triton
import triton.language as tl

from ..primitives import logistic
from ..rows import load_rows
from .box import box_term, true_box
from .site import cells_at, channel_step, kept_stride


@triton.jit
def _picked(slot, found, lists, site, SPEC: tl.constexpr):
    """Listed predictions: their cells, the first row of each in ``order_ptr``, how many it has; 0 beyond the last."""
    mask = slot < found.picks
    cell = tl.load(lists.pick_ptr + found.pick + slot, mask=mask, other=0)
    cell = tl.where(mask, cell, site.first_cell)
    first = tl.load(lists.first_ptr + found.pick + slot, mask=mask, other=0)
    end = tl.load(lists.first_ptr + found.pick + slot + 1, mask=slot + 1 < found.picks, other=0)
    count = tl.where(mask, tl.where(slot + 1 < found.picks, end, found.rows) - first, 0)
    if SPEC.SHARING == "last":
        first += tl.maximum(count - 1, 0)
        count = tl.minimum(count, 1)
    return cell, found.base + first, count


@triton.jit
def _labels(g, rows, mask, ACC: tl.constexpr):
    """Classes of rows, less than -5 where masked out, so that no channel is theirs; and their weights."""
    label = tl.load(rows.ptr + g * 6 + 1, mask=mask, other=-6.0).to(tl.int32)
    weight = tl.zeros_like(label).to(ACC) + 1.0
    if rows.weights_ptr is not None:
        weight = tl.load(rows.weights_ptr + label, mask=mask, other=1.0).to(ACC)
    return label, weight


@triton.jit
def _label(z, y, head, terms, SPEC: tl.constexpr):
    """The label term of logits [channels, predictions]."""
    if SPEC.APART:
        loss, d = terms.label(z, y, head.label_args)
    else:
        across, d_across = terms.label(tl.trans(z), tl.trans(y), head.label_args)
        loss = tl.trans(across)
        d = tl.trans(d_across)
    return loss, d


@triton.jit
def _label_of_each(z, is_class, times, rounds, count, head, terms, SPEC: tl.constexpr):
    """The label term added up over the rows of predictions, of which ``times`` say how many name a class.

    There are but two targets, so each logit is judged by both, or where all rows agree by one of them.
    """
    rest = count.to(SPEC.ACC)[None, :] - times
    negative = tl.where(is_class, head.negative, 0.0).to(SPEC.ACC)
    if SPEC.APART:
        loss, d = terms.label(z, tl.where(rest > 0, negative, head.positive).to(SPEC.ACC), head.label_args)
        share = tl.where(rest > 0, rest, times)
        loss *= share
        d *= share
        if rounds > 1:
            positive, d_positive = terms.label(z, tl.zeros_like(z) + head.positive, head.label_args)
            both = (rest > 0) & (times > 0)
            loss += tl.where(both, times * positive, 0.0)
            d += tl.where(both, times * d_positive, 0.0)
    else:  # linear in its targets
        loss, d = _label(z, tl.where(is_class, times * head.positive + rest * negative, 0.0), head, terms, SPEC)
    return loss, d


@triton.jit
def class_losses(plane, rows, found, lists, kept_ptr, site, head, terms, SPEC: tl.constexpr):
    """The class loss of the listed predictions, its gradient kept.

    Of blocks of channels and predictions a thread holds several channels of one prediction where their logits do not
    follow each other in memory, so that what is done once a prediction is not repeated by others.
    """
    PICKS: tl.constexpr = SPEC.PICKS
    K_PAD: tl.constexpr = SPEC.K_PAD
    step = channel_step(plane.by, SPEC)
    k = tl.arange(0, SPEC.K_PAD)[:, None]  # classes begin at 5
    is_class = (k >= 5) & (k < 5 + head.C)
    total = tl.zeros([K_PAD, PICKS], SPEC.ACC)
    for slot0 in range(0, found.picks, SPEC.PICKS):
        slot = slot0 + tl.arange(0, SPEC.PICKS)
        cell, first, count = _picked(slot, found, lists, site, SPEC)
        here = (slot < found.picks)[None, :] & is_class
        at = cells_at(plane, cell, site, SPEC)
        z = tl.load(at[None, :] + k * step, mask=here, other=0.0).to(SPEC.ACC)
        z = tl.where(is_class, z, -1e30)  # adds nothing to a softmax
        y = tl.where(is_class, tl.zeros([K_PAD, PICKS], SPEC.ACC) + head.negative, 0.0)
        times = tl.zeros([K_PAD, PICKS], SPEC.ACC)
        weight = times + 1.0
        rounds = tl.max(count, axis=0)
        for i in range(0, rounds):
            active = i < count
            g = tl.load(lists.order_ptr + first + i, mask=active, other=0)
            label, m = _labels(g, rows, active, SPEC.ACC)
            own = k == 5 + label[None, :]
            if rows.weights_ptr is not None:
                m *= tl.where(i == 0, head.first_weight, 1.0)
                weight = tl.where(own, m[None, :], weight)
            if SPEC.SHARING == "each":
                times += tl.where(own, 1.0, 0.0)
            else:
                y = tl.where(own, head.positive, y)
        if SPEC.SHARING == "each":
            loss, d = _label_of_each(z, is_class, times, rounds, count, head, terms, SPEC)
        else:
            loss, d = _label(z, y, head, terms, SPEC)
        total += tl.where(here, weight * loss, 0.0)
        if SPEC.AVERAGE:
            p, _q, _e = logistic(z)
            pushed = tl.sum((is_class & (y > p)).to(tl.int32), axis=0)
            tl.store(lists.pushed_ptr + found.pick + slot, pushed, mask=slot < found.picks)
        if kept_ptr is not None:
            at = kept_ptr + (found.pick + slot).to(tl.int64) * kept_stride(head.C)
            tl.store(at[None, :] + k, head.cls_gain * weight * d, mask=here)
    return head.cls_gain * tl.sum(tl.sum(total, axis=0), axis=0)


@triton.jit
def box_losses(plane, rows, found, lists, kept_ptr, site, head, terms, SPEC: tl.constexpr):
    """Box and objectness loss of the listed predictions, their gradients kept; and how many rows were in use."""
    ROWS: tl.constexpr = SPEC.ROWS
    step = channel_step(plane.by, SPEC)
    box = tl.zeros([ROWS], SPEC.ACC)
    obj = tl.zeros([ROWS], SPEC.ACC)
    used = tl.zeros([ROWS], tl.int32)
    for slot0 in range(0, found.picks, SPEC.ROWS):
        slot = slot0 + tl.arange(0, SPEC.ROWS)
        mask = slot < found.picks
        cell, first, count = _picked(slot, found, lists, site, SPEC)
        at = cells_at(plane, cell, site, SPEC)
        tx = tl.load(at, mask=mask, other=0.0).to(SPEC.ACC)
        ty = tl.load(at + step, mask=mask, other=0.0).to(SPEC.ACC)
        tw = tl.load(at + 2 * step, mask=mask, other=0.0).to(SPEC.ACC)
        th = tl.load(at + 3 * step, mask=mask, other=0.0).to(SPEC.ACC)
        logit = tl.load(at + 4 * step, mask=mask, other=0.0).to(SPEC.ACC)
        scale = tl.zeros([ROWS], SPEC.ACC) + head.box_gain
        if SPEC.AVERAGE:
            pushed = tl.load(lists.pushed_ptr + found.pick + slot, mask=mask, other=1)
            scale = scale / tl.maximum(pushed, 1).to(SPEC.ACC)
        d0 = tl.zeros([ROWS], SPEC.ACC)
        d1 = d0
        d2 = d0
        d3 = d0
        m = d0 + 1.0
        similarity = d0
        for i in range(0, tl.max(count, axis=0)):
            active = i < count
            g = tl.load(lists.order_ptr + first + i, mask=active, other=0)
            row = load_rows(rows.ptr, g, active, SPEC.ROWS)
            true = true_box(row, cell, active, site, SPEC.ACC)
            loss, d, alike = box_term((tx, ty, tw, th), true, site, head, terms, True, SPEC)
            if rows.weights_ptr is not None:
                _label, weight = _labels(g, rows, active, SPEC.ACC)
                m = tl.where(active, weight, m)
            similarity = tl.where(active, alike, similarity)
            box += tl.where(active, scale * (m * loss), 0.0)
            d0 += tl.where(active, m * d[0], 0.0)
            d1 += tl.where(active, m * d[1], 0.0)
            d2 += tl.where(active, m * d[2], 0.0)
            d3 += tl.where(active, m * d[3], 0.0)
        used += count
        target = 1.0 - head.quality_ratio + head.quality_ratio * similarity
        loss_obj, d_obj = terms.objectness(logit, target, head.obj_args)
        if SPEC.SMOOTH:  # of the whole tile, assigned or not
            loss_obj = tl.where(site.smooth, 0.0, loss_obj)
            d_obj = tl.where(site.smooth, 0.0, d_obj)
        gain = head.obj_gain * site.obj_scale * m
        obj += tl.where(mask, gain * loss_obj, 0.0)
        if kept_ptr is not None:
            at = kept_ptr + (found.pick + slot).to(tl.int64) * kept_stride(head.C)
            d = tl.reshape(tl.join(tl.join(d0, d2), tl.join(d1, d3)), (ROWS, 4))
            tl.store(at[:, None] + tl.arange(0, 4)[None, :], scale[:, None] * d, mask=mask[:, None])
            tl.store(at + 4, gain * d_obj, mask=mask)
    return tl.sum(box, axis=0), tl.sum(obj, axis=0), tl.sum(used, axis=0)
