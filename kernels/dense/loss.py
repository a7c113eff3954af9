"""Loss and gradient of heads with many anchors, each with the logits of all classes: loads and stores predictions.

One launch for all levels. Some of its programs own boxes (and centreness), the others class logits; each reads from
``match`` which row its anchors have taken, see ``match.py``. Class logits are read once and their gradient stored once;
boxes are read where an anchor has a row, and their gradient is stored everywhere.

Layouts. FLAT: ``[B, N, C]`` and ``[B, N, 4]`` without gaps, or maps that lie in memory like that. Class logits are then
one stream, cut without regard to anchors or images. Else a level is read by strides (image, row, column, anchor,
channel), a program owns CELLS consecutive cells of one of its anchors, and NEAR says that all cells of a level follow
each other in memory. No kernel is compiled for the numbers of a size: whether planes begin at multiples of 16 numbers,
which wide accesses need, is asked at run time, level by level.

Modes. WITH_LOSS leaves partial sums, which the last program to finish adds up in a fixed order. WITH_GRAD leaves the
gradient times ``grads``. SKIP_ONE, of a gradient that is already there for ones: a program returns at once if it is
multiplied by 1, and overwrites the gradient otherwise.

RANKED is for a softmax over classes of which only the hardest negatives count. Who does is known only when every
anchor has been seen: the loss launch leaves the cross-entropy of each (``ce``), ``rank.py`` picks and adds up, and the
gradient launch reads the logits of those picked. As ranks go by index, matches are by index too, not by position. The
classes of an anchor lie on WIDTH threads of one warp, which hold CHUNKS of them each. Of streams a program is one warp:
none waits for another.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..levels import are_wide, as_wide, integer_of, pointer_of, strides_of
from ..primitives import log1p, near_divide, ordered_bits, plain, weigh
from ..rows import load_rows, row_weights
from ..sums import column, column_sums, is_last
from ..terms.decode import chain
from ..terms.label import exponentials, softmax_slope
from ..terms.records import axis_of_sizes
from .match import IGNORED, is_ignored, load_corners
from .place import Pair, centreness, relative

N_PARTS: tl.constexpr = tl.constexpr(4)  # class, box and centreness loss; one to spare


class Maps(NamedTuple):
    """Predictions of one kind and their gradient, a tensor a level, and the strides of each."""

    ptrs: Any
    d_ptrs: Any
    by: Any
    d_by: Any


class Predictions(NamedTuple):
    """What a head predicts; ``centres`` is None without centreness."""

    classes: Any
    boxes: Any
    centres: Any


class Levels(NamedTuple):
    """Of each level, as :func:`plain` takes them: columns and cells, anchors of a cell, programs of either kind."""

    widths: Any
    cells: Any
    anchors: Any
    box_programs: Any
    class_programs: Any


class Terms(NamedTuple):
    """The functions of a head, None where it has none."""

    axis: Any
    box: Any
    offset: Any
    label: Any
    centre: Any


class Numbers(NamedTuple):
    """The numbers of a head, and width and height of the images; ``box_gain`` is None where it is 1."""

    weights: Any
    beta: Any
    box_gain: Any
    box_args: Any
    label_args: Any
    size: Any


class Matched(NamedTuple):
    """Anchors, rows, the weights of these, and which of them each anchor has taken; what may be missing is None."""

    anchors_ptr: Any
    rows_ptr: Any
    row_weights_ptr: Any
    match_ptr: Any
    found_ptr: Any  # [B + 1]: anchors with a row, of each image; and what sums over the batch are divided by
    columns_ptr: Any  # [C]: what class terms are multiplied by
    norm_ptr: Any  # what the sum of boxes is divided by that are weighed by their centreness


class Ranked(NamedTuple):
    """What a ranked head leaves between its launches, see ``rank.py``; cross-entropies times what they count."""

    ce_ptr: Any
    picks_ptr: Any


class Sums(NamedTuple):
    """Where the loss goes; ``parts`` are pointers to its three parts."""

    total_ptr: Any
    parts: Any
    partial_ptr: Any
    images_ptr: Any  # of each program its image, or the first of two; None but with IMAGES
    done_ptr: Any


class Spec(NamedTuple):
    """The structure of a head and of a launch: a kernel is compiled for each."""

    C: Any
    RANKED: Any
    BY_IMAGE: Any
    IMAGES: Any  # a loss of each image
    CORNERS: Any
    FLAT: Any
    REPEATS: Any  # with FLAT: programs have several tiles of boxes, too
    SUMS: Any  # that the last program adds up at a time
    NEAR: Any
    WITH_LOSS: Any
    WITH_GRAD: Any
    SKIP_ONE: Any
    ACC: Any
    BLOCK: Any  # numbers of a stream at a time
    GROUP: Any  # of those that are always of one anchor, at most what one access holds
    CELLS: Any
    PLANES: Any
    ANCHORS: Any
    WIDTH: Any
    CHUNKS: Any


class Batch(NamedTuple):
    """Sizes of a batch."""

    N: Any  # anchors
    B: Any  # images
    steps: Any  # tiles of class logits a program, with REPEATS of boxes, too


class Level(NamedTuple):
    """The level of a program."""

    width: Any
    cells: Any
    anchors: Any
    start: Any  # anchors before it


class View(NamedTuple):
    """The map of a level, and its gradient."""

    ptr: Any
    by: Any
    d_ptr: Any
    d_by: Any


class Site(NamedTuple):
    """What a program owns at a time: the image and the anchor of the cell; of each place its cell, the index and the
    position of its anchor, and whether it is there."""

    b: Any
    a: Any
    cells: Any
    n: Any
    position: Any
    mask: Any


class Grads(NamedTuple):
    """What the gradients of the three parts are multiplied by; with IMAGES of the classes of the image after too, and
    where those of all images are."""

    classes: Any
    boxes: Any
    centres: Any
    after: Any
    ptrs: Any


class Raw(NamedTuple):
    """The four numbers that a box is predicted by, or their derivatives."""

    x: Any
    y: Any
    w: Any
    h: Any


# ----------------------------------------------------------------------------------------------------------- where


@triton.jit
def _view(maps, level, WITH_GRAD: tl.constexpr):
    """The map of a level known at run time."""
    ptr = pointer_of(maps.ptrs, level)
    by = strides_of(maps.by, level)
    d_ptr = ptr  # not read
    d_by = by
    if WITH_GRAD:
        d_ptr = pointer_of(maps.d_ptrs, level)
        d_by = strides_of(maps.d_by, level)
    return View(ptr, by, d_ptr, d_by)


@triton.jit
def _range_of(pid, programs, begin, level, local):
    """Level of a program and its number there, if it is one of so many a level from ``begin`` on; and their end."""
    for i in tl.static_range(len(programs)):
        here = (pid >= begin) & (pid < begin + plain(programs[i]))
        level = tl.where(here, i, level)
        local = tl.where(here, pid - begin, local)
        begin += plain(programs[i])
    return level, local, begin


@triton.jit
def _tiles(level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """Of how many tiles of CELLS a level of an image is made."""
    if FLAT:
        tiles = tl.cdiv(level.anchors * level.cells, CELLS)
    else:
        tiles = level.anchors * tl.cdiv(level.cells, CELLS)
    return tiles


@triton.jit
def _site(tile, level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """A tile of a level."""
    tiles = _tiles(level, FLAT, CELLS)
    return _site_of(tile // tiles, tile % tiles, level, FLAT, CELLS)


@triton.jit
def _site_of(b, own, level, FLAT: tl.constexpr, CELLS: tl.constexpr):
    """A tile of an image's level. With FLAT the cells are all anchors of the level, one a cell."""
    lane = tl.arange(0, CELLS)
    if FLAT:
        a = own * 0
        cells = own * CELLS + lane
        mask = cells < level.anchors * level.cells
        n = level.start + cells
        position = n
    else:
        a = own // tl.cdiv(level.cells, CELLS)
        cells = (own % tl.cdiv(level.cells, CELLS)) * CELLS + lane
        mask = cells < level.cells
        n = level.start + cells * level.anchors + a
        position = level.start + a * level.cells + cells
    return Site(b, a, cells, n, position, mask)


@triton.jit
def _cells_at(ptr, by, site, level, NEAR: tl.constexpr):
    """Pointers to the first channel of some cells of an anchor."""
    at = ptr + site.b.to(tl.int64) * by.image + site.a * by.anchor
    if NEAR:
        at = at + site.cells
    else:
        at = at + (site.cells // level.width) * by.row + (site.cells % level.width) * by.column
    return at


@triton.jit
def _anchors_at(ptr, by, site, level, K: tl.constexpr, SPEC: tl.constexpr):
    """Pointers to the first of the K channels of some anchors, and elements from channel to channel."""
    NEAR: tl.constexpr = SPEC.NEAR
    if SPEC.FLAT:
        at = ptr + (site.b.to(tl.int64) * (level.anchors * level.cells) + site.cells) * K
        by_channel = 1
    else:
        at = _cells_at(ptr, by, site, level, NEAR)
        by_channel = by.channel
    return at, by_channel


# -------------------------------------------------------------------------------------------------------- how much


@triton.jit
def share(found_ptr, b, B, BY_IMAGE: tl.constexpr, ACC: tl.constexpr):
    """What the sums of image b are multiplied by."""
    if BY_IMAGE:
        result = 1.0 / (tl.maximum(tl.load(found_ptr + b), 1) * B).to(ACC)
    else:
        result = 1.0 / tl.maximum(tl.load(found_ptr + B), 1).to(ACC)
    return result


@triton.jit
def _grad_out(grads, part: tl.constexpr, b, SPEC: tl.constexpr):
    """What the gradient of a part is multiplied by: that of the total, the first of ``grads``, and its own; 1 with the
    loss. With IMAGES those of image b."""
    grad = tl.cast(1.0 if SPEC.WITH_LOSS else 0.0, SPEC.ACC)
    if grads[0] is not None:
        grad += _load_grad(grads[0], b, SPEC)
    if grads[part] is not None:
        grad += _load_grad(grads[part], b, SPEC)
    return grad


@triton.jit
def _load_grad(ptr, b, SPEC: tl.constexpr):
    if SPEC.IMAGES:
        ptr += b
    return tl.load(ptr).to(SPEC.ACC)


@triton.jit
def _image_of(of_boxes, local, level, batch, SPEC: tl.constexpr):
    """The image of a program of boxes or of class logits, of a stream the first one."""
    boxes = local // _tiles(level, SPEC.FLAT, SPEC.ANCHORS)
    if SPEC.RANKED:
        classes = local * batch.steps // _tiles(level, SPEC.FLAT, SPEC.CELLS)
    elif SPEC.FLAT:
        n = level.anchors * level.cells
        classes = (local.to(tl.int64) * (SPEC.BLOCK * batch.steps) // SPEC.C // n).to(tl.int32)
    else:
        classes = local // _tiles(level, False, SPEC.CELLS)
    return tl.where(of_boxes, boxes, classes)


# --------------------------------------------------------------------------------------------------------- classes


@triton.jit
def _labels(rows_ptr, match):
    """Class of the rows that anchors have taken, -1 where they have none."""
    return tl.load(rows_ptr + match * 6 + 1, mask=match >= 0, other=-1.0).to(tl.int32)


@triton.jit
def _own_weights(matched, match, ACC: tl.constexpr):
    """Weights of the rows that anchors have taken, 1 where they have none."""
    return row_weights(matched.row_weights_ptr, match, match >= 0, ACC)


@triton.jit
def _class_terms(x, is_label, columns_ptr, k, keep, used, terms, numbers):
    """Loss of some logits of the classes k, 0 where they are not used, and its derivative by them."""
    loss, d = terms.label(x, is_label, numbers.label_args)
    if columns_ptr is not None:
        column = tl.load(columns_ptr + k, mask=keep, other=0.0).to(x.dtype)
        loss = weigh(column, loss)
        d *= column
    return tl.where(used | (x != x), loss, 0.0), tl.where(used, d, 0.0)  # a NaN shows, used or not


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
    at = stream.match_ptr + anchor + tl.where(after, stream.gap, 0)
    match = tl.load(at, mask=mask, other=IGNORED)
    x = tl.load(stream.x_ptr + (e[:, None] + tl.arange(0, SPEC.GROUP)[None, :]), mask=mask[:, None], other=0.0)
    return x, match, tl.where(after, stream.shares.y, stream.shares.x), stream.skipped + e - anchor * SPEC.C, after


@triton.jit
def _stream_classes(chunk, view, level, batch, matched, terms, numbers, grads, SPEC: tl.constexpr):
    """Class loss of a chunk of a level's logits, with IMAGES of the first image and of the second, and their gradient.

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
        label = _labels(matched.rows_ptr, match) - k0  # from the group's first class on
        used = ~is_ignored(match)[:, None]
        if matched.row_weights_ptr is not None:
            weight *= _own_weights(matched, match, SPEC.ACC)
        keep = (e < stream.left)[:, None]
        is_label = label[:, None] == k
        loss, d = _class_terms(
            x.to(SPEC.ACC), is_label, matched.columns_ptr, k0[:, None] + k, keep, used, terms, numbers=numbers
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
            d = weight[:, None] * d
            at = e[:, None] + k
            tl.store(stream.d_ptr + at, d.to(view.d_ptr.dtype.element_ty), mask=(e < stream.left)[:, None])
    rest = tl.cast(0.0, SPEC.ACC)
    if SPEC.IMAGES:
        rest = tl.sum(tl.sum(second, axis=1), axis=0)
    return tl.sum(tl.sum(total, axis=1), axis=0), rest


@triton.jit
def _plane_classes(local, view, level, batch, matched, terms, numbers, grad, SPEC: tl.constexpr):
    """Class loss of one anchor of some cells, PLANES classes at a time, and their gradient."""
    NEAR: tl.constexpr = SPEC.NEAR
    CELLS: tl.constexpr = SPEC.CELLS
    PLANES: tl.constexpr = SPEC.PLANES
    site = _site(local, level, False, CELLS)
    x_ptr = _cells_at(view.ptr, view.by, site, level, NEAR)
    d_ptr = x_ptr
    if SPEC.WITH_GRAD:
        d_ptr = _cells_at(view.d_ptr, view.d_by, site, level, NEAR)
    at = matched.match_ptr + site.b.to(tl.int64) * batch.N + site.position
    match = tl.load(at, mask=site.mask, other=IGNORED)
    label = _labels(matched.rows_ptr, match)[None, :]
    used = ~is_ignored(match)[None, :]
    weight = share(matched.found_ptr, site.b, batch.B, SPEC.BY_IMAGE, SPEC.ACC)
    total = tl.zeros([PLANES, CELLS], SPEC.ACC)
    if matched.row_weights_ptr is not None:
        own = _own_weights(matched, match, SPEC.ACC)[None, :]
    for k0 in tl.range(0, SPEC.C, PLANES, loop_unroll_factor=1):
        k = k0 + tl.arange(0, PLANES)[:, None]
        keep = site.mask[None, :] & (k < SPEC.C)
        x = tl.load(x_ptr[None, :] + k * view.by.channel, mask=keep, other=0.0).to(SPEC.ACC)
        loss, d = _class_terms(x, label == k, matched.columns_ptr, k, k < SPEC.C, used & keep, terms, numbers=numbers)
        if matched.row_weights_ptr is not None:
            loss = weigh(own, loss)
            d *= own
        if SPEC.WITH_LOSS:
            total += loss
        if SPEC.WITH_GRAD:
            d = ((grad * weight) * d).to(view.d_ptr.dtype.element_ty)
            tl.store(d_ptr[None, :] + k * view.d_by.channel, d, mask=keep)
    return weight * tl.sum(tl.sum(total, axis=0), axis=0)


# ---------------------------------------------------------------------------------------------------------- ranked


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
    return tl.where(hidden, 0.0, _own_weights(matched, match, ACC))


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
    d_ptr, d_by_channel = _anchors_at(view.d_ptr, view.d_by, site, level, SPEC.C, SPEC)
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
def _ranked_classes(local, view, level, batch, matched, ranked, grads, SPEC: tl.constexpr):
    """The cross-entropies of some tiles, or their gradient. What a tile has taken is loaded during the one before."""
    scale = grads.classes
    if SPEC.WITH_GRAD and not SPEC.BY_IMAGE:
        scale *= share(matched.found_ptr, 0, batch.B, False, SPEC.ACC)
    tiles = _tiles(level, SPEC.FLAT, SPEC.CELLS)
    b = local * batch.steps // tiles
    own = local * batch.steps % tiles
    site = _site_of(b, own, level, SPEC.FLAT, SPEC.CELLS)
    match, ce = _load_ranked(site, batch, matched, ranked, SPEC)
    label = tl.maximum(_labels(matched.rows_ptr, match), 0)  # no row: the background
    count = tl.minimum(batch.steps, batch.B * tiles - local * batch.steps)
    for _i in tl.range(0, count, loop_unroll_factor=1):
        over = own + 1 == tiles
        next_b = tl.where(over, tl.minimum(b + 1, batch.B - 1), b)
        next_own = tl.where(over, 0, own + 1)
        site = _site_of(next_b, next_own, level, SPEC.FLAT, SPEC.CELLS)
        next_match, next_ce = _load_ranked(site, batch, matched, ranked, SPEC)
        site = _site_of(b, own, level, SPEC.FLAT, SPEC.CELLS)
        ptr, by_channel = _anchors_at(view.ptr, view.by, site, level, SPEC.C, SPEC)
        if SPEC.WITH_GRAD:
            if SPEC.BY_IMAGE or SPEC.IMAGES:
                scale = _grad_out(grads.ptrs, 1, site.b, SPEC)
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
        label = tl.maximum(_labels(matched.rows_ptr, match), 0)
        b = next_b
        own = next_own


@triton.jit
def _class_program(local, view, level, batch, matched, ranked, terms, numbers, grads, SPEC: tl.constexpr):
    """Class loss of a program of a level, and of the image after its own; and the gradient. Of a ranked head
    ``rank.py`` adds the loss up."""
    loss = tl.cast(0.0, SPEC.ACC)
    rest = loss
    grad = grads.classes
    if SPEC.RANKED:
        _ranked_classes(local, view, level, batch, matched, ranked, grads, SPEC)
    elif SPEC.FLAT:
        loss, rest = _stream_classes(local, view, level, batch, matched, terms, numbers, grads, SPEC)
    else:
        wide = (level.cells % 16 == 0) & are_wide(view.by)
        if SPEC.WITH_GRAD:
            wide = wide & are_wide(view.d_by)
        if SPEC.NEAR and wide:
            same = Level(level.width, level.cells // 16 * 16, level.anchors, level.start)
            known = View(view.ptr, as_wide(view.by), view.d_ptr, as_wide(view.d_by))
            loss = _plane_classes(local, known, same, batch, matched, terms, numbers, grad, SPEC)
        else:
            loss = _plane_classes(local, view, level, batch, matched, terms, numbers, grad, SPEC)
    return loss, rest


# ----------------------------------------------------------------------------------------------------------- boxes


@triton.jit
def _load_raw(at, by_channel, mask, ACC: tl.constexpr):
    """The four numbers of some boxes, in one access."""
    k = tl.arange(0, 4)[None, :]
    tile = tl.load(at[:, None] + k * by_channel, mask=mask[:, None], other=0.0).to(ACC)
    even, odd = tl.split(tl.reshape(tile, (at.shape[0], 2, 2)))
    zero, two = tl.split(even)
    one, three = tl.split(odd)
    return Raw(zero, one, two, three)


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
def _box_program(local, boxes, centres, level, batch, matched, terms, numbers, grads, SPEC: tl.constexpr):
    """Box and centreness loss of a program of a level, and the gradient."""
    ANCHORS: tl.constexpr = SPEC.ANCHORS
    if SPEC.REPEATS:
        tiles = batch.B * _tiles(level, True, ANCHORS)
        box = tl.cast(0.0, SPEC.ACC)
        centre = tl.cast(0.0, SPEC.ACC)
        for tile in tl.range(local * batch.steps, tl.minimum((local + 1) * batch.steps, tiles), loop_unroll_factor=1):
            site = _site(tile, level, True, ANCHORS)
            box += _box_tile(
                site, boxes, centres, level, batch, matched, terms, numbers=numbers, grads=grads, SPEC=SPEC
            )[0]
    else:
        site = _site(local, level, SPEC.FLAT, ANCHORS)
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
        anchor = load_corners(matched.anchors_ptr, site.n, has, SPEC.ACC)
        row = load_rows(matched.rows_ptr, match, has, ANCHORS)
        place = relative(anchor, row, has, numbers.size, SPEC.CORNERS, SPEC.ACC)
        at, by_channel = _anchors_at(boxes.ptr, boxes.by, site, level, 4, SPEC)
        loss, d_raw = _box_term(_load_raw(at, by_channel, has, SPEC.ACC), place, terms, numbers)
        own = tl.full([ANCHORS], 1.0, SPEC.ACC)
        if matched.row_weights_ptr is not None:
            own = _own_weights(matched, match, SPEC.ACC)
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
            even = tl.join(d_raw.x, d_raw.w)
            odd = tl.join(d_raw.y, d_raw.h)
            d = grads.boxes * of_box * tl.reshape(tl.join(even, odd), (ANCHORS, 4))
            d = tl.where(has[:, None], d, 0.0)
        if terms.centre is not None:
            at, _by_channel = _anchors_at(centres.ptr, centres.by, site, level, 1, SPEC)
            x = tl.load(at, mask=has, other=0.0).to(SPEC.ACC)
            loss, d_x = terms.centre(x, centreness(place.shift, place.true), ())
            if matched.row_weights_ptr is not None:
                loss = weigh(own, loss)
                d_x *= own
            centre = weight * tl.sum(tl.where(has, loss, 0.0), axis=0)
            if SPEC.WITH_GRAD:
                d_centre = tl.where(has, grads.centres * weight * d_x, 0.0)
    if SPEC.WITH_GRAD:
        at, by_channel = _anchors_at(boxes.d_ptr, boxes.d_by, site, level, 4, SPEC)
        at = at[:, None] + tl.arange(0, 4)[None, :] * by_channel
        tl.store(at, d.to(boxes.d_ptr.dtype.element_ty), mask=site.mask[:, None])
        if terms.centre is not None:
            at, _by_channel = _anchors_at(centres.d_ptr, centres.d_by, site, level, 1, SPEC)
            tl.store(at, d_centre.to(centres.d_ptr.dtype.element_ty), mask=site.mask)
    return box, centre


@triton.jit
def _finish(sums, programs, B, SPEC: tl.constexpr, WITH_CENTRES: tl.constexpr):
    """The loss from the partial sums of all programs."""
    if SPEC.IMAGES:
        for b in range(0, B):
            _leave(b, _sums_of_image(b, sums, programs, SPEC), sums, WITH_CENTRES)
    else:
        _leave(0, column_sums(sums.partial_ptr, programs, N_PARTS, SPEC.ACC, SPEC.SUMS), sums, WITH_CENTRES)
    tl.store(sums.done_ptr, 0)  # ready for the next launch


@triton.jit
def _leave(b, totals, sums, WITH_CENTRES: tl.constexpr):
    """Stores the b-th loss."""
    classes = column(totals, 0)
    boxes = column(totals, 1)
    centres = column(totals, 2)
    tl.store(sums.parts[0] + b, classes)
    tl.store(sums.parts[1] + b, boxes)
    if WITH_CENTRES:
        tl.store(sums.parts[2] + b, centres)
    tl.store(sums.total_ptr + b, classes + boxes + centres)


@triton.jit
def _sums_of_image(b, sums, programs, SPEC: tl.constexpr):
    """Those of its own programs, and of streams that begin in the image before what they have of this one."""
    ROWS: tl.constexpr = SPEC.SUMS
    lane = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, N_PARTS)[None, :]
    total = tl.zeros([ROWS, N_PARTS], SPEC.ACC)
    for i in range(0, programs, ROWS):
        there = i + lane < programs
        image = tl.load(sums.images_ptr + i + lane, mask=there, other=-2, cache_modifier=".cg")
        value = tl.load(sums.partial_ptr + (i + lane) * N_PARTS + k, mask=there, other=0.0, cache_modifier=".cg")
        total += tl.where(image == tl.where(k == 3, b - 1, b), value, 0.0)
    found = tl.sum(total, axis=0)
    return tl.where(tl.arange(0, N_PARTS) == 0, found + column(found, 3), found)


@triton.jit
def _add_up(found, pid, programs, image, B, sums, SPEC: tl.constexpr, WITH_CENTRES: tl.constexpr):
    """Leaves the partial sums of one of so many programs; the last of them adds up."""
    part = tl.arange(0, N_PARTS)
    cls, box, centre, rest = found
    partial = tl.where(part == 0, cls, tl.where(part == 1, box, tl.where(part == 2, centre, rest)))
    tl.store(sums.partial_ptr + pid * N_PARTS + part, partial)
    if SPEC.IMAGES:
        tl.store(sums.images_ptr + pid, image)
    if is_last(sums.done_ptr, programs):
        _finish(sums, programs, B, SPEC, WITH_CENTRES)


@triton.jit(do_not_specialize=["N", "B", "steps"])
def dense_kernel(predictions, levels, N, B, steps, matched, terms, numbers, grads, ranked, sums, SPEC: tl.constexpr):
    """Loss and gradient of a dense head; grid: the programs of boxes, level by level, then those of class logits.

    ``grads`` are pointers to what the gradients of the total and of the three parts are multiplied by.
    """
    pid = tl.program_id(0)
    batch = Batch(N, B, steps)
    i, local, boxes_end = _range_of(pid, levels.box_programs, 0, pid * 0, pid * 0)
    of_boxes = pid < boxes_end
    i, local, _end = _range_of(pid, levels.class_programs, boxes_end, i, local)
    start = pid * 0
    for j in tl.static_range(len(levels.cells)):
        start += tl.where(i > j, plain(levels.anchors[j]) * plain(levels.cells[j]), 0)
    level = Level(integer_of(levels.widths, i), integer_of(levels.cells, i), integer_of(levels.anchors, i), start)
    image = pid * 0
    after = tl.cast(1.0, SPEC.ACC)
    if SPEC.IMAGES:
        image = _image_of(of_boxes, local, level, batch, SPEC)
        after = _grad_out(grads, 1, tl.minimum(image + 1, B - 1), SPEC)
    grad = Grads(
        _grad_out(grads, 1, image, SPEC),
        _grad_out(grads, 2, image, SPEC),
        _grad_out(grads, 3, image, SPEC),
        after,
        grads,
    )
    if SPEC.SKIP_ONE:
        skip_boxes = grad.boxes == 1.0
        if terms.centre is not None:
            skip_boxes = skip_boxes & (grad.centres == 1.0)
        skip_classes = grad.classes == 1.0
        if SPEC.IMAGES:
            skip_classes = skip_classes & (after == 1.0)
        if tl.where(of_boxes, skip_boxes, skip_classes):
            return

    cls = tl.cast(0.0, SPEC.ACC)
    box = tl.cast(0.0, SPEC.ACC)
    centre = tl.cast(0.0, SPEC.ACC)
    rest = tl.cast(0.0, SPEC.ACC)
    if of_boxes:
        boxes = _view(predictions.boxes, i, SPEC.WITH_GRAD)
        centres = boxes
        if terms.centre is not None:
            centres = _view(predictions.centres, i, SPEC.WITH_GRAD)
        box, centre = _box_program(
            local, boxes, centres, level, batch, matched, terms, numbers=numbers, grads=grad, SPEC=SPEC
        )
    else:
        view = _view(predictions.classes, i, SPEC.WITH_GRAD)
        cls, rest = _class_program(
            local, view, level, batch, matched, ranked, terms, numbers=numbers, grads=grad, SPEC=SPEC
        )

    if SPEC.WITH_LOSS:
        if not SPEC.RANKED:
            found = (cls, box, centre, rest)
            _add_up(found, pid, tl.num_programs(0), image, B, sums, SPEC, terms.centre is not None)
        elif of_boxes:
            found = (cls, box, centre, rest)
            _add_up(found, pid, boxes_end, image, B, sums, SPEC, terms.centre is not None)
