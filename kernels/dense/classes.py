"""Class loss of anchors, and its gradient: streams of logits, or planes."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..boxes import Pair
from ..primitives import weigh
from ..terms.label import LOW
from .blocks import IGNORED
from .site import cells_at, site_of
from .taken import is_ignored, labels_of, own_weights, share


@triton.jit
def _class_terms(x, is_label, columns_ptr, k, keep, terms, numbers):
    """Loss of some logits of the classes k, and its derivative by them."""
    loss, d = terms.label(x, is_label, numbers.label_args)
    if columns_ptr is not None:
        column = tl.load(columns_ptr + k, mask=keep, other=0.0).to(x.dtype)
        loss = weigh(column, loss)
        d *= column
    return loss, d


class Stream(NamedTuple):
    """A chunk of a level's logits [B, n, C]; it meets at most two images."""

    x_ptr: Any  # its first logit, and the gradient of that
    d_ptr: Any
    left: Any  # logits
    skipped: Any  # classes of its first anchor
    edge: Any  # anchors from there on are of the next image
    match_ptr: Any  # of its first anchor
    gap: Any  # anchors of other levels between the two images
    shares: Any  # of either image


@triton.jit
def _stream_of(chunk, view, level, batch, matched, SPEC: tl.constexpr):
    """The chunk of a program."""
    C: tl.constexpr = SPEC.C
    n = level.anchors * level.cells
    e0 = chunk.to(tl.int64) * (SPEC.BLOCK * batch.steps)
    left = tl.minimum(batch.B.to(tl.int64) * n * C - e0, SPEC.BLOCK * batch.steps).to(tl.int32)
    first = e0 // C  # anchor of the batch
    skipped = (e0 - first * C).to(tl.int32)
    b = (first // n).to(tl.int32)
    edge = ((b + 1).to(tl.int64) * n - first).to(tl.int32)
    match_ptr = matched.match_ptr + first + b.to(tl.int64) * (batch.N - n) + level.start
    own_share = share(matched.found_ptr, b, batch.B, SPEC.BY_IMAGE, SPEC.ACC)
    next_share = share(matched.found_ptr, tl.minimum(b + 1, batch.B - 1), batch.B, SPEC.BY_IMAGE, SPEC.ACC)
    shares = Pair(own_share, next_share)
    return Stream(view.ptr + e0, view.d_ptr + e0, left, skipped, edge, match_ptr, batch.N - n, shares)


@triton.jit
def _load_stream(stream, e, SPEC: tl.constexpr):
    """Of the groups from the numbers e of a chunk on: logits; what their anchors have taken; weight and first class;
    whether they are of the second image."""
    mask = e < stream.left
    anchor = (stream.skipped + e) // SPEC.C
    after = anchor >= stream.edge
    at = stream.match_ptr + (anchor + tl.where(after, stream.gap, 0))
    match = tl.load(at, mask=mask, other=IGNORED)
    x = tl.load(stream.x_ptr + (e[:, None] + tl.arange(0, SPEC.GROUP)[None, :]), mask=mask[:, None], other=0.0)
    return x, match, tl.where(after, stream.shares.y, stream.shares.x), stream.skipped + e - anchor * SPEC.C, after


@triton.jit
def stream_classes(chunk, view, level, batch, matched, terms, numbers, grads, SPEC: tl.constexpr):
    """Class loss of a chunk of a level's logits, with IMAGES of the first image and of the second, and their gradient.
    The loss of ignored anchors is multiplied by 0, so that one that is not finite shows; their gradient is 0.

    While a warp waits for memory others compute: the fewer registers it takes, the more of them. To load a turn ahead
    is of no use, for the compiler puts these loads off to the end of the turn.
    """
    GROUP: tl.constexpr = SPEC.GROUP
    GROUPS: tl.constexpr = SPEC.BLOCK // SPEC.GROUP
    stream = _stream_of(chunk, view, level, batch, matched, SPEC)
    total = tl.zeros([GROUPS, GROUP], SPEC.ACC)
    second = total
    k = tl.arange(0, GROUP)[None, :]
    lane = tl.arange(0, GROUPS) * GROUP
    for i in tl.range(0, batch.steps, loop_unroll_factor=1):
        e = i * SPEC.BLOCK + lane
        x, match, weight, k0, after = _load_stream(stream, e, SPEC)
        label = labels_of(matched.rows_ptr, match) - k0  # from the group's first class on
        used = ~is_ignored(match)
        weight = tl.where(used, weight, 0.0)
        if matched.row_weights_ptr is not None:
            weight *= own_weights(matched, match, SPEC.ACC)
        keep = (e < stream.left)[:, None]
        is_label = label[:, None] == k
        loss, d = _class_terms(
            x.to(SPEC.ACC), is_label, matched.columns_ptr, k0[:, None] + k, keep, terms, numbers=numbers
        )
        if SPEC.WITH_LOSS:
            loss = weigh(weight[:, None], loss, matched.row_weights_ptr is not None)
            if SPEC.IMAGES:
                total += tl.where(after[:, None], 0.0, loss)
                second += tl.where(after[:, None], loss, 0.0)
            else:
                total += loss
        if SPEC.WITH_GRAD:
            if SPEC.IMAGES:
                weight *= tl.where(after, grads.after, grads.classes)
            else:
                weight *= grads.classes
            d = (weight[:, None] * d).to(view.d_ptr.dtype.element_ty)
            at = stream.d_ptr + (e[:, None] + k)
            tl.store(at, d, mask=keep & used[:, None])
            tl.store(at, tl.zeros_like(d), mask=keep & ~used[:, None])  # for fewer instructions than d is chosen by
    rest = tl.cast(0.0, SPEC.ACC)
    if SPEC.IMAGES:
        rest = tl.sum(tl.sum(second, axis=1), axis=0)
    return tl.sum(tl.sum(total, axis=1), axis=0), rest


@triton.jit
def plane_classes(local, view, level, batch, matched, terms, numbers, grad, SPEC: tl.constexpr):
    """Class loss of one anchor of some cells, PLANES classes at a time, and their gradient."""
    NEAR: tl.constexpr = SPEC.NEAR
    CELLS: tl.constexpr = SPEC.CELLS
    PLANES: tl.constexpr = SPEC.PLANES
    site = site_of(local, level, False, CELLS)
    x_ptr = cells_at(view.ptr, view.by, site, level, NEAR)
    d_ptr = x_ptr
    if SPEC.WITH_GRAD:
        d_ptr = cells_at(view.d_ptr, view.d_by, site, level, NEAR)
    at = matched.match_ptr + site.b.to(tl.int64) * batch.N + site.position
    match = tl.load(at, mask=site.mask, other=IGNORED)
    label = labels_of(matched.rows_ptr, match)[None, :]
    used = ~is_ignored(match)[None, :]
    once = tl.where(used, 1.0, 0.0).to(SPEC.ACC)  # of 0 times a loss that is not finite a NaN shows
    weight = share(matched.found_ptr, site.b, batch.B, SPEC.BY_IMAGE, SPEC.ACC)
    total = tl.zeros([PLANES, CELLS], SPEC.ACC)
    if matched.row_weights_ptr is not None:
        own = own_weights(matched, match, SPEC.ACC)[None, :]
    for k0 in tl.range(0, SPEC.C, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = site.mask[None, :] & (k < SPEC.C)
        x = tl.load(x_ptr[None, :] + k * view.by.channel, mask=keep, other=LOW).to(SPEC.ACC)
        loss, d = _class_terms(x, label == k, matched.columns_ptr, k, k < SPEC.C, terms, numbers=numbers)
        if matched.row_weights_ptr is not None:
            loss = weigh(own, loss)
            d *= own
        if SPEC.WITH_LOSS:
            total += once * loss
        if SPEC.WITH_GRAD:
            d = tl.where(used, (grad * weight) * d, 0.0).to(view.d_ptr.dtype.element_ty)
            tl.store(d_ptr[None, :] + k * view.d_by.channel, d, mask=keep)
    return weight * tl.sum(tl.sum(total, axis=0), axis=0)
