"""Where the tile of a program is, and how to get at its predictions."""

import triton
import triton.language as tl

from ..levels import are_wide, as_wide, integer_of, number_of
from ..primitives import plain
from .records import Plane, Pool, Site


@triton.jit
def padded(HW):
    """Numbers that a plane takes where each begins at a multiple of 16."""
    return (HW + 15) // 16 * 16


@triton.jit
def programs_of(level, levels, SPEC: tl.constexpr):
    """Programs of a level known when compiled."""
    HW = plain(levels.widths[level]) * plain(levels.heights[level])
    return plain(levels.batch) * SPEC.ANCHORS[level] * tl.cdiv(HW, plain(levels.tiles[level]))


@triton.jit
def places_before(level, SPEC: tl.constexpr):
    """Of the tables of offers those of the levels before one, and anchors of that level; a number, or some."""
    before = level * 0
    anchors = level * 0 + SPEC.ANCHORS[0]
    for i in tl.static_range(1, len(SPEC.ANCHORS)):
        before += tl.where(level >= i, SPEC.ANCHORS[i - 1] * SPEC.KINDS, 0)
        anchors = tl.where(level == i, SPEC.ANCHORS[i], anchors)
    return before, anchors


@triton.jit
def _anchor_sides(sides, own):
    """Width and height of an anchor."""
    w = sides[0]
    h = sides[1]
    for t in tl.static_range(1, len(sides) // 2):
        w = tl.where(own == t, sides[2 * t], w)
        h = tl.where(own == t, sides[2 * t + 1], h)
    return w, h


@triton.jit
def site_of(pid, levels, SPEC: tl.constexpr):
    """The tile of a program, the last level first: objects are the fewer tiles' the coarser a map, and the programs
    that have the most to do should not begin last."""
    COUNT: tl.constexpr = len(SPEC.ANCHORS)
    level = pid * 0
    local = pid
    start = pid * 0
    for i in tl.static_range(COUNT):
        programs = programs_of(COUNT - 1 - i, levels, SPEC)
        here = (pid >= start) & (pid < start + programs)
        level = tl.where(here, COUNT - 1 - i, level)
        local = tl.where(here, pid - start, local)
        start += programs
    cells = wide(integer_of(levels.tiles, level))
    tiles = tl.cdiv(integer_of(levels.widths, level) * integer_of(levels.heights, level), cells)
    anchors = level * 0
    for i in tl.static_range(COUNT):
        anchors = tl.where(level == i, SPEC.ANCHORS[i], anchors)
    b = local // tiles // anchors
    return level_site(pid, b, level, local // tiles % anchors, local % tiles * cells, levels, SPEC)


@triton.jit
def level_site(pid, b, level, anchor, first_cell, levels, SPEC: tl.constexpr):
    """The tile of a program, or of each of some images ``b``, that begins at a cell of a plane of a level."""
    before = level * 0
    begin = level * 0
    anchors = level * 0 + 1
    first_plane = level * 0
    plane = level * 0
    for i in tl.static_range(len(SPEC.ANCHORS)):
        HW = plain(levels.widths[i]) * plain(levels.heights[i])
        first_plane = tl.where(level == i, before, first_plane)
        anchors = tl.where(level == i, SPEC.ANCHORS[i], anchors)
        plane = tl.where(level == i, begin, plane)
        before += SPEC.ANCHORS[i]
        begin += plain(levels.batch) * SPEC.ANCHORS[i] * padded(HW)
    W = integer_of(levels.widths, level)
    H = integer_of(levels.heights, level)
    own = first_plane + anchor
    if SPEC.OWN is not None:
        known = own
        for i in tl.static_range(len(SPEC.OWN)):
            own = tl.where(known == i, SPEC.OWN[i], own)
    own_w, own_h = _anchor_sides(levels.anchors, own)
    return Site(
        pid=pid,
        b=b,
        level=level,
        anchor=anchor,
        first_cell=first_cell,
        end_cell=tl.minimum(first_cell + integer_of(levels.tiles, level), W * H),
        W=W,
        H=H,
        HW=W * H,
        plane=plane + (b * anchors + anchor) * padded(W * H),
        side=tl.cast(number_of(levels.cell_sides, level), SPEC.ACC),
        scale=tl.cast(number_of(levels.scales, level), SPEC.ACC),
        obj_scale=tl.cast(number_of(levels.obj_scales, level), SPEC.ACC),
        smooth=integer_of(levels.smooth, level) != 0,
        pool=Pool(levels.anchors, first_plane, first_plane + anchors),
        own=own,
        own_w=tl.cast(own_w, SPEC.ACC),
        own_h=tl.cast(own_h, SPEC.ACC),
    )


@triton.jit
def plane_of(plane, site):
    """Where the plane of a site begins in a map."""
    return plane.ptr + site.b.to(tl.int64) * plane.by.image + site.anchor.to(tl.int64) * plane.by.anchor


@triton.jit
def cells_at(plane, cells, site, SPEC: tl.constexpr):
    """Where cells of a site lie in a map."""
    ptr = plane_of(plane, site)
    if SPEC.LAYOUT == "planes":
        at = ptr + cells
    elif SPEC.LAYOUT == "channels":
        at = ptr + cells * plane.by.column
    else:
        at = ptr + (cells // site.W) * plane.by.row + (cells % site.W) * plane.by.column
    return at


@triton.jit
def channel_step(by, SPEC: tl.constexpr):
    """Elements from channel to channel."""
    step = by.channel
    if SPEC.LAYOUT == "channels":
        step = 1
    return step


@triton.jit
def as_wide_plane(plane):
    """A map whose planes begin at multiples of 16 elements, in a form that tells the compiler."""
    return Plane(plane.ptr, as_wide(plane.by))


@triton.jit
def _load(plane, cells, HW, site, FROM: tl.constexpr, SPEC: tl.constexpr):
    """Channels from FROM to objectness of some cells, 0 from cell HW on; those before it are not read."""
    at = cells_at(plane, cells, site, SPEC)
    step = channel_step(plane.by, SPEC)
    mask = cells < HW
    obj = tl.load(at + 4 * step, mask=mask, other=0.0)
    tx = obj
    ty = obj
    tw = obj
    th = obj
    if FROM == 0:
        tx = tl.load(at, mask=mask, other=0.0)
        ty = tl.load(at + step, mask=mask, other=0.0)
        tw = tl.load(at + 2 * step, mask=mask, other=0.0)
        th = tl.load(at + 3 * step, mask=mask, other=0.0)
    return tx, ty, tw, th, obj


@triton.jit
def load_logits(plane, site, cells, end, BOX: tl.constexpr, SPEC: tl.constexpr):
    """x, y, w, h (of which only BOX makes use) and objectness of the tile, up to cell ``end``: HW, or 0 for none."""
    FROM: tl.constexpr = 0 if BOX else 4
    if SPEC.LAYOUT == "planes":
        if (site.HW % 16 == 0) & are_wide(plane.by):
            tx, ty, tw, th, obj = _load(as_wide_plane(plane), cells, wide(end), site, FROM, SPEC)
        else:
            tx, ty, tw, th, obj = _load(plane, cells, end, site, FROM, SPEC)
    else:
        tx, ty, tw, th, obj = _load(plane, cells, end, site, FROM, SPEC)
    return (tx.to(SPEC.ACC), ty.to(SPEC.ACC), tw.to(SPEC.ACC), th.to(SPEC.ACC)), obj.to(SPEC.ACC)


@triton.jit
def wide(number):
    """A multiple of 16, in a form that tells the compiler."""
    return number // 16 * 16


@triton.jit
def store_plane(ptr, values, cells, site):
    """Store a number for each cell of the tile in ``ptr``, planes from multiples of 16 on."""
    at = ptr + wide(site.plane) + cells
    if site.HW % 16 == 0:
        tl.store(at, values, mask=cells < wide(site.end_cell))
    else:
        tl.store(at, values, mask=cells < site.end_cell)


@triton.jit
def store_state(ptr, state, site, SPEC: tl.constexpr):
    """Store the states of the tile, two bits each, sixteen in an integer."""
    SIXTEENTH: tl.constexpr = SPEC.CELLS // 16
    bits = tl.reshape(state, (SIXTEENTH, 16)) << (2 * tl.arange(0, 16))[None, :]
    word = site.first_cell // 16 + tl.arange(0, SIXTEENTH)
    tl.store(ptr + site.plane // 16 + word, tl.sum(bits, axis=1), mask=word * 16 < site.end_cell)


@triton.jit
def load_state(ptr, cells, site):
    """The states that :func:`store_state` has stored, BACKGROUND beyond the map."""
    words = tl.load(ptr + site.plane // 16 + cells // 16, mask=cells < site.end_cell, other=0)
    return (words >> (2 * (cells % 16))) & 3


@triton.jit
def load_plane(ptr, cells, site):
    """What :func:`store_plane` has stored, 0 beyond the map."""
    at = ptr + wide(site.plane) + cells
    if site.HW % 16 == 0:
        values = tl.load(at, mask=cells < wide(site.end_cell), other=0)
    else:
        values = tl.load(at, mask=cells < site.end_cell, other=0)
    return values


@triton.jit
def kept_stride(C):
    """Numbers between the kept gradients of two predictions: 5 + C, and what makes them begin with a sector."""
    return (5 + C + 7) // 8 * 8


@triton.jit
def kept_end(C):
    """Numbers that are read of the kept gradient of a prediction, 5 + C and what fills the last access, four."""
    return (5 + C + 3) // 4 * 4


@triton.jit
def means_of(level, levels, parts_ptr, SPEC: tl.constexpr):
    """Where it stands what box and class terms of a level, and its objectness, are multiplied by for their means."""
    at = parts_ptr + 3 + 2 * level
    if SPEC.BY_IMAGE:
        at += 3 * (plain(levels.batch) - 1)
    return at
