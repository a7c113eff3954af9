"""Cross-entropies of anchors of which only the hardest count, and their gradient; see ``rank.py`` for who does.

The classes of an anchor lie on WIDTH threads of one warp, which hold CHUNKS of them each. Of streams a program is one
warp: none waits for another.
"""

import triton
import triton.language as tl

from ..primitives import log1p, ordered_bits, weigh
from ..sums import grad_out
from ..terms.label import exponentials, softmax_slope
from .blocks import IGNORED
from .site import anchors_at, site_in, tiles_of
from .taken import is_ignored, labels_of, own_weights, share


@triton.jit
def rank_key(ce):
    """An integer that orders cross-entropies as they are, NaN as infinity."""
    return ordered_bits(tl.where(ce != ce, float("inf"), ce))


@triton.jit
def _ranked_weight(ce, match, n, picks_ptr):
    """How often the cross-entropy of each anchor counts: see :func:`~.rank.rank_kernel`."""
    own = rank_key(ce)
    key = tl.load(picks_ptr).to(own.dtype)
    hard = (own > key) | ((own == key) & (n < tl.load(picks_ptr + 1).to(tl.int32)))
    twice = n < tl.load(picks_ptr + 2).to(tl.int32)
    return tl.where(match >= 0, tl.where(twice, 2, 1), tl.where(hard, 1, 0))


@triton.jit
def _chunk_mask(mask, i: tl.constexpr, SPEC: tl.constexpr):
    """Which logits of the i-th chunk are there: only the last one is padded."""
    if (i + 1) * SPEC.WIDTH <= SPEC.C:
        keep = mask[:, None]
    else:
        keep = mask[:, None] & (i * SPEC.WIDTH + tl.arange(0, SPEC.WIDTH)[None, :] < SPEC.C)
    return keep


@triton.jit
def _load_chunks(ptr, by_channel, mask, SPEC: tl.constexpr):
    """All logits of some anchors, and the largest of each; what is padding adds nothing to a softmax."""
    CHUNKS: tl.constexpr = SPEC.CHUNKS
    at = ptr[:, None] + tl.arange(0, SPEC.WIDTH)[None, :] * by_channel
    chunks = ()
    for i in tl.static_range(CHUNKS):
        keep = _chunk_mask(mask, i, SPEC)
        chunks = chunks + (tl.load(at + i * SPEC.WIDTH * by_channel, mask=keep, other=-1e30).to(SPEC.ACC),)  # noqa: RUF005 - as Triton knows it
    largest = chunks[0]
    for i in tl.static_range(1, CHUNKS):
        largest = tl.maximum(largest, chunks[i])
    return chunks, tl.max(largest, axis=1, keep_dims=True)


@triton.jit
def _rest(chunks, largest, SPEC: tl.constexpr):
    """Sums of all exponentials but one of the largest, see :func:`~..terms.label.softmax_ce`."""
    CHUNKS: tl.constexpr = SPEC.CHUNKS
    others = tl.zeros_like(chunks[0])
    equals = tl.zeros_like(chunks[0])
    for i in tl.static_range(CHUNKS):
        e, first = exponentials(chunks[i], largest)
        others += tl.where(first, 0.0, e)
        equals += tl.where(first, 1.0, 0.0)
    return tl.sum(others, axis=1, keep_dims=True) + (tl.sum(equals, axis=1, keep_dims=True) - 1.0)


@triton.jit
def _ranked_share(matched, match, ce, ACC: tl.constexpr):
    """What cross-entropies are multiplied by where rows have weights: by these, and by 0 in an ignored region, where
    none but a NaN is hard.
    """
    hidden = is_ignored(match) & (ce == ce)
    return tl.where(hidden, 0.0, own_weights(matched, match, ACC))


@triton.jit
def _ranked_loss(ptr, by_channel, site, label, match, matched, ce_ptr, SPEC: tl.constexpr):
    """Leaves the cross-entropies of some anchors."""
    chunks, largest = _load_chunks(ptr, by_channel, site.mask, SPEC)
    rest = _rest(chunks, largest, SPEC)
    background = tl.where(tl.arange(0, SPEC.WIDTH)[None, :] == 0, chunks[0], 0.0)
    x = tl.load(ptr + label * by_channel, mask=site.mask & (label > 0), other=0.0).to(SPEC.ACC)
    x = tl.where(label > 0, x, tl.sum(background, axis=1))
    ce = log1p(tl.sum(rest, axis=1)) - (x - tl.sum(largest, axis=1))
    if matched.columns_ptr is not None:
        ce = weigh(tl.load(matched.columns_ptr + label).to(SPEC.ACC), ce)
    if matched.row_weights_ptr is not None:
        ce = weigh(_ranked_share(matched, match, ce, SPEC.ACC), ce)
    ce = ce + 0.0  # of -0, too, the bits are to be those of 0
    tl.store(ce_ptr + site.n, ce, mask=site.mask)


@triton.jit
def _ranked_gradient(ptr, by_channel, view, site, own, level, label, weight, SPEC: tl.constexpr):
    """The gradient by the logits of some anchors, of which those with a weight are looked at."""
    CHUNKS: tl.constexpr = SPEC.CHUNKS
    d_ptr, d_by_channel = anchors_at(view.d_ptr, view.d_by, site, level, SPEC.C, SPEC)
    lane = tl.arange(0, SPEC.WIDTH)[None, :]
    at = d_ptr[:, None] + lane * d_by_channel
    used = site.mask & (weight != 0)
    if tl.max(used.to(tl.int32), axis=0) > 0:
        chunks, largest = _load_chunks(ptr, by_channel, used, SPEC)
        rest = _rest(chunks, largest, SPEC)
        for i in tl.static_range(CHUNKS):
            e, first = exponentials(chunks[i], largest)
            hot = label[:, None] == i * SPEC.WIDTH + lane
            d = softmax_slope(e, first, rest, hot.to(SPEC.ACC), 1.0)
            d = tl.where(used[:, None], weight[:, None] * d, 0.0).to(d_ptr.dtype.element_ty)
            tl.store(at + i * SPEC.WIDTH * d_by_channel, d, mask=_chunk_mask(site.mask, i, SPEC))
    elif SPEC.FLAT:
        _zeros_of_stream(view.d_ptr, site.b, own, level, SPEC)
    else:
        d = tl.zeros_like(label[:, None] + lane).to(d_ptr.dtype.element_ty)
        for i in tl.static_range(CHUNKS):
            tl.store(at + i * SPEC.WIDTH * d_by_channel, d, mask=_chunk_mask(site.mask, i, SPEC))


@triton.jit
def _zeros_of_stream(d_ptr, b, own, level, SPEC: tl.constexpr):
    """The gradient of a tile of which no anchor counts, as one stretch of a level's stream [B, n, C]."""
    C: tl.constexpr = SPEC.C
    TILE: tl.constexpr = SPEC.CELLS * SPEC.C
    # numbers that are all of the tile, or none
    UNIT: tl.constexpr = 8 if SPEC.CELLS % 8 == 0 else 4 if SPEC.CELLS % 4 == 0 else 1
    each = level.anchors * level.cells * C
    if each % UNIT == 0:
        left = (each // UNIT - own * (TILE // UNIT)) * UNIT
        start = (b.to(tl.int64) * (each // UNIT) + own * (TILE // UNIT)) * UNIT
        _store_zeros(d_ptr + start, left, TILE)
    else:
        _store_zeros(d_ptr + (b.to(tl.int64) * each + own * TILE), each - own * TILE, TILE)


@triton.jit
def _store_zeros(ptr, left, TILE: tl.constexpr):
    """TILE zeros, but no more than are left."""
    STEP: tl.constexpr = 256
    for i in tl.static_range(0, TILE, STEP):
        k = i + tl.arange(0, STEP)
        zero = tl.zeros([STEP], ptr.dtype.element_ty)
        tl.store(ptr + k, zero, mask=(k < left) & (k < TILE))


@triton.jit
def _load_ranked(site, batch, matched, ranked, SPEC: tl.constexpr):
    """What some anchors have taken, and with the gradient their cross-entropies."""
    CELLS: tl.constexpr = SPEC.CELLS
    at = site.b.to(tl.int64) * batch.N + site.n
    match = tl.load(matched.match_ptr + at, mask=site.mask, other=IGNORED)
    ce = tl.zeros([CELLS], SPEC.ACC)
    if SPEC.WITH_GRAD:
        ce = tl.load(ranked.ce_ptr + at, mask=site.mask, other=0.0)
    return match, ce


@triton.jit
def ranked_classes(local, view, level, batch, matched, ranked, grads, SPEC: tl.constexpr):
    """The cross-entropies of some tiles, or their gradient. What a tile has taken is loaded during the one before."""
    scale = grads.classes
    if SPEC.WITH_GRAD and not SPEC.BY_IMAGE:
        scale *= share(matched.found_ptr, 0, batch.B, False, SPEC.ACC)
    tiles = tiles_of(level, SPEC.FLAT, SPEC.CELLS)
    b = local * batch.steps // tiles
    own = local * batch.steps % tiles
    site = site_in(b, own, level, SPEC.FLAT, SPEC.CELLS)
    match, ce = _load_ranked(site, batch, matched, ranked, SPEC)
    label = tl.maximum(labels_of(matched.rows_ptr, match), 0)  # no row: the background
    count = tl.minimum(batch.steps, batch.B * tiles - local * batch.steps)
    for _i in tl.range(0, count, loop_unroll_factor=1):
        over = own + 1 == tiles
        next_b = tl.where(over, tl.minimum(b + 1, batch.B - 1), b)
        next_own = tl.where(over, 0, own + 1)
        site = site_in(next_b, next_own, level, SPEC.FLAT, SPEC.CELLS)
        next_match, next_ce = _load_ranked(site, batch, matched, ranked, SPEC)
        site = site_in(b, own, level, SPEC.FLAT, SPEC.CELLS)
        ptr, by_channel = anchors_at(view.ptr, view.by, site, level, SPEC.C, SPEC)
        if SPEC.WITH_GRAD:
            if SPEC.BY_IMAGE or SPEC.IMAGES:
                scale = grad_out(grads.ptrs, 0, site.b, SPEC.WITH_LOSS, SPEC.IMAGES, SPEC.ACC)
                scale *= share(matched.found_ptr, site.b, batch.B, SPEC.BY_IMAGE, SPEC.ACC)
            times = _ranked_weight(ce, match, site.n, ranked.picks_ptr + 4 * site.b)
            weight = times.to(SPEC.ACC) * scale
            if matched.columns_ptr is not None:
                weight *= tl.load(matched.columns_ptr + label).to(SPEC.ACC)
            if matched.row_weights_ptr is not None:
                weight *= _ranked_share(matched, match, ce, SPEC.ACC)
            _ranked_gradient(ptr, by_channel, view, site, own, level, label, weight=weight, SPEC=SPEC)
        else:
            ce_ptr = ranked.ce_ptr + site.b.to(tl.int64) * batch.N
            _ranked_loss(ptr, by_channel, site, label, match, matched, ce_ptr, SPEC)
        match = next_match
        ce = next_ce
        label = tl.maximum(labels_of(matched.rows_ptr, match), 0)
        b = next_b
        own = next_own
