"""Box, objectness and class loss of the predictions listed for a tile, many at a time.

Of several rows on a prediction SHARING takes the "last", or the box and class loss of "each", or the "sum" of their box
losses and all their classes at once, or with "merge" the last one's box and these; with "one" there are no others. Of
classes lanes are predictions, which meet their rows in order, round by round, all in step; of boxes lanes are rows.
"""

import triton
import triton.language as tl

from ..boxes import together
from ..primitives import logistic, weigh
from ..rows import load_rows, row_weights
from .box import box_term, true_box
from .site import cells_at, channel_step, kept_end, kept_stride


@triton.jit
def _picked(slot, found, lists, site, SPEC: tl.constexpr):
    """Listed predictions: their cells, the first row of each in ``order_ptr``, how many it has; 0 beyond the last."""
    mask = slot < found.picks
    cell = tl.load(lists.pick_ptr + found.pick + slot, mask=mask, other=0)
    cell = tl.where(mask, cell, site.first_cell)
    several = found.picks < found.rows  # on some of them; else nothing need be waited for
    at = lists.first_ptr + found.pick + slot
    first = tl.where(several, tl.load(at, mask=mask & several, other=0), slot)
    end = tl.where(several, tl.load(at + 1, mask=(slot + 1 < found.picks) & several, other=0), slot + 1)
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
def _targets(named, head, SPEC: tl.constexpr):
    """Targets of classes that are named, or not: themselves where these are 1 and 0, of which label terms make use."""
    if SPEC.HARD:
        targets = named
    else:
        targets = tl.where(named, head.positive, head.negative).to(SPEC.ACC)
    return targets


@triton.jit
def _label_across(z, y, head, terms):
    """A label term along the classes; here these come first."""
    loss, d = terms.label(tl.trans(z), tl.trans(y), head.label_args)
    return tl.trans(loss), tl.trans(d)


@triton.jit
def _column_weights(rows, k, is_class, ACC: tl.constexpr):
    """What the terms of classes are multiplied by."""
    return tl.load(rows.columns_ptr + (k - 5), mask=is_class, other=0.0).to(ACC)


@triton.jit
def _weighed(y, rows, k, is_class):
    """Targets of a term that is linear in them, times the weights of their classes."""
    if rows.columns_ptr is not None:
        y = y * _column_weights(rows, k, is_class, y.dtype)
    return y


@triton.jit
def _label(z, named, is_class, rows, k, head, terms, SPEC: tl.constexpr):
    """The label term of logits [channels, predictions] of classes that are ``named``, or not."""
    if SPEC.APART:
        loss, d = terms.label(z, _targets(named, head, SPEC), head.label_args)
    else:
        y = tl.where(is_class, tl.where(named, head.positive, head.negative), 0.0).to(SPEC.ACC)
        loss, d = _label_across(z, _weighed(y, rows, k, is_class), head, terms)
    return loss, d


@triton.jit
def _label_of_each(z, times, is_class, amount, rows, k, head, terms, SPEC: tl.constexpr):
    """The label term added up over the rows of predictions, ``times`` of whose ``amount`` name a class."""
    rest = amount[None, :] - times
    if SPEC.APART:  # there are but two targets: each logit is judged by both
        named, d_named = terms.label(z, _targets(tl.full(z.shape, True, tl.int1), head, SPEC), head.label_args)
        other, d_other = terms.label(z, _targets(tl.full(z.shape, False, tl.int1), head, SPEC), head.label_args)
        ZEROS: tl.constexpr = SPEC.ZEROS or rows.row_weights_ptr is not None
        loss = weigh(times, named, ZEROS) + weigh(rest, other, ZEROS)
        d = times * d_named + rest * d_other
    else:  # linear in its targets
        y = tl.where(is_class, times * head.positive + rest * head.negative, 0.0)
        loss, d = _label_across(z, _weighed(y, rows, k, is_class), head, terms)
    return loss, d


@triton.jit
def class_losses(plane, rows, found, lists, kept_ptr, site, head, terms, SPEC: tl.constexpr):
    """The class loss of the listed predictions, its gradient kept.

    A lane holds HELD channels of one prediction, so that what is done once a prediction is not repeated for each. Where
    logits are judged apart GROUPS lanes share out its classes, the next lane having the next class, and few hold none.
    """
    LANES: tl.constexpr = SPEC.LANES
    HELD: tl.constexpr = SPEC.HELD
    step = channel_step(plane.by, SPEC)
    total = tl.zeros([HELD, LANES], SPEC.ACC)
    WEIGHED: tl.constexpr = rows.weights_ptr is not None or rows.columns_ptr is not None
    ZEROS: tl.constexpr = SPEC.ZEROS or WEIGHED or rows.row_weights_ptr is not None
    for lane0 in range(0, found.picks * SPEC.GROUPS, SPEC.LANES):
        lane = lane0 + tl.arange(0, SPEC.LANES)
        slot = lane // SPEC.GROUPS
        k = SPEC.FIRST + tl.arange(0, SPEC.HELD)[:, None] * SPEC.GROUPS
        if SPEC.GROUPS > 1:
            k += (lane % SPEC.GROUPS)[None, :]
        is_class = (k >= 5) & (k < 5 + head.C)
        cell, first, count = _picked(slot, found, lists, site, SPEC)
        at = cells_at(plane, cell, site, SPEC)
        asked = (slot < found.picks)[None, :] & (k < 5 + head.C)
        z = tl.load(at[None, :] + k * step, mask=asked, other=0.0).to(SPEC.ACC)
        here = asked
        whole = asked
        if SPEC.FIRST < 5:  # box terms will find theirs in the cache, and overwrite what is stored of them
            here = asked & is_class
            whole = (slot < found.picks)[None, :] & (k < kept_stride(head.C))
            z = tl.where(is_class, z, -1e30)  # adds nothing to a softmax
        times = tl.zeros([HELD, LANES], SPEC.ACC)
        weight = times + 1.0
        amount = tl.zeros([LANES], SPEC.ACC)  # of rows, by their weights
        other = amount + 1.0  # the weight of classes that no row names
        turns = lane0 * 0 + 1
        if (SPEC.SHARING == "each") | (SPEC.SHARING == "sum") | (SPEC.SHARING == "merge"):
            if found.picks < found.rows:
                turns = tl.max(count, axis=0)
        for i in range(0, turns):
            active = i < count
            g = tl.load(lists.order_ptr + first + i, mask=active, other=0)
            label, m = _labels(g, rows, active, SPEC.ACC)
            own = k == 5 + label[None, :]
            share = tl.full([LANES], 1.0, SPEC.ACC)
            if rows.row_weights_ptr is not None:
                share = tl.where(active, row_weights(rows.row_weights_ptr, g, active, SPEC.ACC), 0.0)
                amount += share
                other = tl.where(active, share, other)
                if SPEC.SHARING != "each":
                    m *= share
            if rows.weights_ptr is not None:
                m *= tl.where(i == 0, head.first_weight, 1.0)
            if rows.weights_ptr is not None or (rows.row_weights_ptr is not None and SPEC.SHARING != "each"):
                weight = tl.where(own, m[None, :], weight)
            if SPEC.SHARING == "each":
                times += tl.where(own, share[None, :], 0.0)
            else:
                times = tl.where(own, 1.0, times)
        if SPEC.SHARING == "each":
            if rows.row_weights_ptr is None:
                amount = count.to(SPEC.ACC)
            loss, d = _label_of_each(z, times, is_class, amount, rows, k, head, terms, SPEC=SPEC)
        else:
            loss, d = _label(z, times > 0, is_class, rows, k, head, terms, SPEC)
            if rows.row_weights_ptr is not None:
                weight = tl.where(times > 0, weight, other[None, :])
        if rows.columns_ptr is not None:
            if SPEC.APART:
                weight *= _column_weights(rows, k, is_class, SPEC.ACC)
        total += tl.where(here, weigh(weight, loss, ZEROS), 0.0)
        if SPEC.AVERAGE:
            p, _q, _e = logistic(z)
            y = tl.where(times > 0, head.positive, head.negative)
            pushed = tl.sum((is_class & (y > p)).to(tl.int32), axis=0)
            tl.store(lists.pushed_ptr + found.pick + slot, pushed, mask=slot < found.picks)
        if kept_ptr is not None:
            at = kept_ptr + (found.pick + slot).to(tl.int64) * kept_stride(head.C)
            tl.store(at[None, :] + k, head.cls_gain * weight * d, mask=whole)
            if SPEC.FIRST > 0:  # what fills the last access is read with it
                rest = 5 + head.C + (lane % SPEC.GROUPS)[None, :] + tl.arange(0, SPEC.REST)[:, None] * SPEC.GROUPS
                left = (slot < found.picks)[None, :] & (rest < kept_end(head.C))
                tl.store(at[None, :] + rest, 0.0, mask=left)
    return weigh(head.cls_gain, tl.sum(tl.sum(total, axis=0), axis=0), SPEC.ZEROS)


@triton.jit
def _in_order(r, slots, found, lists, SPEC: tl.constexpr):
    """Rows of the tile in their order: their cells there, the place of their prediction among those listed, of which
    ``slots`` come before; and whether they are the first and the last on it.
    """
    there = r < found.rows
    at = lists.at_ptr + found.base + r
    cell = tl.load(at, mask=there, other=0)
    opens = there
    closes = there
    slot = r
    if SPEC.SHARING != "one":
        opens = there & (cell != tl.load(at - 1, mask=there & (r > 0), other=-1))
        closes = there & (cell != tl.load(at + 1, mask=r + 1 < found.rows, other=-1))
        slot = slots + tl.cumsum(opens.to(tl.int32), axis=0) - 1
        if found.rows > SPEC.ROWS:  # there are more blocks
            slots += tl.sum(opens.to(tl.int32), axis=0)
    return cell, slot, opens, closes, slots


@triton.jit
def _store_box(at, d0, d1, d2, d3, mask):
    """Store the gradients of four box logits, side by side."""
    tl.store(at[:, None] + tl.arange(0, 4)[None, :], together(d0, d1, d2, d3), mask=mask[:, None])


@triton.jit
def _add_up(found, lists, kept_ptr, site, head, SPEC: tl.constexpr):
    """Keeps the box gradients of predictions with several rows, the sums of what these have left."""
    ROWS: tl.constexpr = SPEC.ROWS
    for slot0 in range(0, found.picks, SPEC.ROWS):
        slot = slot0 + tl.arange(0, SPEC.ROWS)
        _cell, first, count = _picked(slot, found, lists, site, SPEC)
        d0 = tl.zeros([ROWS], SPEC.ACC)
        d1 = d0
        d2 = d0
        d3 = d0
        several = count > 1
        for i in range(0, tl.max(count, axis=0)):
            mask = several & (i < count)
            at = lists.spread_ptr + (first + i) * 4
            d0 += tl.load(at, mask=mask, other=0.0)
            d1 += tl.load(at + 1, mask=mask, other=0.0)
            d2 += tl.load(at + 2, mask=mask, other=0.0)
            d3 += tl.load(at + 3, mask=mask, other=0.0)
        at = kept_ptr + (found.pick + slot).to(tl.int64) * kept_stride(head.C)
        _store_box(at, d0, d1, d2, d3, several)


@triton.jit
def box_losses(plane, rows, found, lists, kept_ptr, site, head, terms, SPEC: tl.constexpr):
    """Box and objectness loss of the listed predictions, their gradients kept; and how many rows were in use.

    Lanes are rows, each with its prediction, of which the last one trains the objectness. Where a prediction has
    several, their gradients are added up behind.
    """
    ROWS: tl.constexpr = SPEC.ROWS
    step = channel_step(plane.by, SPEC)
    box = tl.zeros([ROWS], SPEC.ACC)
    obj = tl.zeros([ROWS], SPEC.ACC)
    slots = site.pid * 0
    ZEROS: tl.constexpr = SPEC.ZEROS or rows.weights_ptr is not None or rows.row_weights_ptr is not None
    in_use = found.picks
    if (SPEC.SHARING != "last") & (SPEC.SHARING != "merge"):
        in_use = found.rows
    for r0 in range(0, found.rows, SPEC.ROWS):
        r = r0 + tl.arange(0, SPEC.ROWS)
        local, slot, opens, closes, slots = _in_order(r, slots, found, lists, SPEC)
        used = r < found.rows
        alone = opens & closes
        if (SPEC.SHARING == "last") | (SPEC.SHARING == "merge"):
            used = closes
            alone = closes
        g = tl.load(lists.order_ptr + found.base + r, mask=used, other=0)
        row = load_rows(rows.ptr, g, used, SPEC.ROWS)
        cell = site.first_cell + local
        at = cells_at(plane, cell, site, SPEC)
        tx = tl.load(at, mask=used, other=0.0).to(SPEC.ACC)
        ty = tl.load(at + step, mask=used, other=0.0).to(SPEC.ACC)
        tw = tl.load(at + 2 * step, mask=used, other=0.0).to(SPEC.ACC)
        th = tl.load(at + 3 * step, mask=used, other=0.0).to(SPEC.ACC)
        logit = tl.load(at + 4 * step, mask=closes, other=0.0).to(SPEC.ACC)
        true = true_box(row, cell, used, site, SPEC.ACC)
        loss, d, similarity = box_term((tx, ty, tw, th), true, site, head, terms, True, SPEC)
        m = tl.zeros([ROWS], SPEC.ACC) + 1.0
        if rows.weights_ptr is not None:
            _label, m = _labels(g, rows, used, SPEC.ACC)
        share = m
        if rows.row_weights_ptr is not None:
            share = row_weights(rows.row_weights_ptr, g, used, SPEC.ACC)
            m *= share
        scale = tl.zeros([ROWS], SPEC.ACC) + head.box_gain
        if SPEC.AVERAGE:
            pushed = tl.load(lists.pushed_ptr + found.pick + slot, mask=used, other=1)
            scale = scale / tl.maximum(pushed, 1).to(SPEC.ACC)
        box += tl.where(used, weigh(scale * m, loss, ZEROS), 0.0)
        target = 1.0 - head.quality_ratio + head.quality_ratio * similarity
        loss_obj, d_obj = terms.objectness(logit, target, head.obj_args)
        gain = head.obj_gain * site.obj_scale * m
        if SPEC.SMOOTH and rows.row_weights_ptr is not None:
            best = tl.zeros([ROWS], SPEC.ACC)
            if SPEC.IGNORES:
                best = tl.load(lists.decoded_ptr + local, mask=closes, other=0.0)
            smooth_obj, d_smooth = terms.objectness(logit, best, head.obj_args)
            loss_obj = tl.where(site.smooth, smooth_obj, loss_obj)
            d_obj = tl.where(site.smooth, d_smooth, d_obj)
            gain = tl.where(site.smooth, head.noobj_gain * site.obj_scale * share, gain)
        elif SPEC.SMOOTH:  # of the whole tile, assigned or not
            loss_obj = tl.where(site.smooth, 0.0, loss_obj)
            d_obj = tl.where(site.smooth, 0.0, d_obj)
        obj += tl.where(closes, weigh(gain, loss_obj, ZEROS), 0.0)
        if kept_ptr is not None:
            by_box = scale * m
            at = kept_ptr + (found.pick + slot).to(tl.int64) * kept_stride(head.C)
            tl.store(at + 4, gain * d_obj, mask=closes)
            d0 = weigh(by_box, d[0], ZEROS)
            d1 = weigh(by_box, d[1], ZEROS)
            d2 = weigh(by_box, d[2], ZEROS)
            d3 = weigh(by_box, d[3], ZEROS)
            _store_box(at, d0, d1, d2, d3, alone)
            if (SPEC.SHARING == "each") | (SPEC.SHARING == "sum"):
                if found.rows > found.picks:
                    at = lists.spread_ptr + (found.base + r) * 4
                    _store_box(at, d0, d1, d2, d3, used & (alone == 0))
    if kept_ptr is not None:
        if (SPEC.SHARING == "each") | (SPEC.SHARING == "sum"):
            if found.rows > found.picks:
                tl.debug_barrier()
                _add_up(found, lists, kept_ptr, site, head, SPEC)
    box, obj = tl.split(tl.sum(tl.join(box, obj), axis=0))
    return box, obj, in_use
