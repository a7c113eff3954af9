"""Who is assigned to a tile: decided here, once, and listed; all that follows reads the lists.

Rows lie in lanes. Of each block of candidates a tile keeps those that fall into it; a list that is empty says that all
of the tile is background, so there is nothing that could be assigned and then not be found again. Launches of this code
are compiled without contraction of products and sums, see ``assign.py`` of the kernels.
"""

import triton
import triton.language as tl

from ..assign import row_cell, row_valid
from ..overlap import Corners, iou
from ..primitives import near_divide
from ..rows import load_row, load_rows, of_kind
from .records import Found
from .site import places_before

ABOVE: tl.constexpr = tl.constexpr(1.1)  # lines of cells above a centre, and below it, beyond REACH: a row in none of
BELOW: tl.constexpr = tl.constexpr(0.1)  # which a tile has a part cannot have a cell of it


@triton.jit
def _true_sides(row, site, ACC: tl.constexpr):
    """Width and height of the box of a row, in pixels."""
    return row.w.to(ACC) * (site.W * site.side), row.h.to(ACC) * (site.H * site.side)


@triton.jit
def true_corners(row, site, ACC: tl.constexpr):
    """The box of a row by its edges, in pixels, and its area."""
    gw, gh = _true_sides(row, site, ACC)
    gx = row.cx.to(ACC) * (site.W * site.side)
    gy = row.cy.to(ACC) * (site.H * site.side)
    return Corners(gx - 0.5 * gw, gy - 0.5 * gh, gx + 0.5 * gw, gy + 0.5 * gh), gw * gh


@triton.jit
def matches(row, site, head, terms, SPEC: tl.constexpr):
    """Whether the shapes of rows are such that the anchor of the tile answers for them."""
    gw, gh = _true_sides(row, site, SPEC.ACC)
    return terms.match(gw, gh, site, head.thresh, SPEC.PER_LEVEL)


@triton.jit
def _take(done_ptr, rows, picks):
    """Room for so many rows and predictions of a tile: two counters in one integer."""
    both_ptr = (done_ptr + 2).to(tl.pointer_type(tl.int64), bitcast=True)
    taken = tl.atomic_add(both_ptr, (rows.to(tl.int64) << 32) + picks, sem="relaxed")
    return (taken >> 32).to(tl.int32), taken.to(tl.int32)


@triton.jit
def _places(taken, amount, found, block, blocks_ptr, lists, done_ptr, SPEC: tl.constexpr):
    """Where those that are taken go in a list of blocks of ROWS, only the last of which is not full; and that block.

    The first is the program's own; others are found in ``blocks_ptr``.
    """
    filled = tl.where(found > 0, (found + SPEC.ROWS - 1) % SPEC.ROWS + 1, 0)
    following = block
    if filled + amount > SPEC.ROWS:
        following = lists.more + tl.atomic_add(done_ptr + 1, SPEC.ROWS, sem="relaxed")
        tl.store(blocks_ptr + tl.cdiv(found, SPEC.ROWS), following)
    place = filled + tl.cumsum(taken, axis=0) - 1
    return tl.where(place < SPEC.ROWS, block, following) + place % SPEC.ROWS, following


@triton.jit
def _near_rows(rows, held, site, lists, done_ptr, head, terms, SPEC: tl.constexpr):
    """The rows that match and may have a cell in the lines of cells that the tile has a part of: how many.

    They are listed; or if lanes have ``held`` all rows of the image there are all, each in as many lanes as there is
    room for, with its centre and whether it is such a row.
    """
    first_line = site.first_cell // site.W
    last_line = (site.end_cell - 1) // site.W
    lane = tl.arange(0, SPEC.ROWS)
    every = rows.last - rows.first
    found = site.pid * 0
    block = lists.near
    g = lane
    cx = lane.to(tl.float32)
    cy = cx
    taken = lane < 0
    for g0 in range(rows.first, rows.last, SPEC.ROWS):
        g = g0 + tl.where(held, lane % every, lane)
        row = load_rows(rows.ptr, g, g < rows.last, SPEC.ROWS)
        row = of_kind(row, g, g < rows.last, rows.row_weights_ptr, "object")
        cx = row.cx
        cy = row.cy
        # lines from REACH above the centre to REACH below it, and some more: what is taken is decided later
        y = cy * site.H
        taken = (last_line > y - (ABOVE + SPEC.REACH)) & (first_line < y + (BELOW + SPEC.REACH))
        taken = taken & row_valid(row, site.b, site.b + 1, head.C, head.limit)
        taken = taken & matches(row, site, head, terms, SPEC)
        if not held:
            amount = tl.sum(taken.to(tl.int32), axis=0)
            if amount > 0:
                at, block = _places(taken.to(tl.int32), amount, found, block, lists.near_ptr, lists, done_ptr, SPEC)
                tl.store(lists.row_ptr + at, g, mask=taken)
                found += amount
    return tl.where(held, every, found), g, cx, cy, taken


@triton.jit
def _picked_by(q, rows, site, SPEC: tl.constexpr):
    """Who has picked what the rows of the image offer of the plane of a tile, and its cell; -1 of what nobody has."""
    near = rows.last - rows.first
    there = q < near * SPEC.KINDS
    kind = q // near
    before, anchors = places_before(site.level, SPEC)
    at = (before + kind * anchors + site.anchor) * rows.offers.M + rows.first + (q - kind * near)
    g = tl.load(rows.offers.row_ptr + at, mask=there, other=rows.offers.M)
    cell = tl.load(rows.offers.cell_ptr + at, mask=there, other=-1) - site.b * site.HW
    return g, tl.where((g < rows.offers.M) & (cell < site.HW), cell, -1)


@triton.jit
def _candidates(rows, site, lists, done_ptr, head, terms, SPEC: tl.constexpr):
    """The candidates that the tile takes, the one place that decides it: how many.

    Where that is a block at most they are in lanes, with their cells in the tile, rows and a mask; else they are
    listed. Nothing is listed where all candidates of the image are a block.
    """
    lane = tl.arange(0, SPEC.ROWS)
    near = rows.last - rows.first
    alone = near * SPEC.KINDS <= SPEC.ROWS
    step = near * 0 + SPEC.ROWS
    held = alone
    g = lane
    cx = lane.to(tl.float32)
    cy = cx
    known = lane < 0
    if SPEC.KINDS > 1 and rows.offers is None:
        held = near <= SPEC.ROWS
        if held:  # a turn is of as many kinds of cells as there is room for
            step = SPEC.ROWS // tl.maximum(near, 1) * tl.maximum(near, 1)
        near, g, cx, cy, known = _near_rows(rows, held, site, lists, done_ptr, head, terms, SPEC)
        if not held:
            tl.debug_barrier()
    found = site.pid * 0
    block = lists.listed
    local = lane
    taken = lane < 0
    for q0 in range(0, near * SPEC.KINDS, step):
        q = q0 + lane
        if rows.offers is not None:
            g, cell = _picked_by(q, rows, site, SPEC)
        elif SPEC.KINDS > 1:
            kind = q // near
            there = (lane < step) & (q < near * SPEC.KINDS)
            if not held:
                i = q % near
                first = tl.load(lists.near_ptr + i // SPEC.ROWS, mask=there & (i >= SPEC.ROWS), other=lists.near)
                g = tl.load(lists.row_ptr + first + i % SPEC.ROWS, mask=there, other=0)
                cx = tl.load(rows.ptr + g * 6 + 2, mask=there, other=0.0)
                cy = tl.load(rows.ptr + g * 6 + 3, mask=there, other=0.0)
                known = there
            cell = row_cell(cx, cy, known & there, kind, site.W, site.H, SPEC.REACH)
        else:
            g = rows.first + q
            row = load_rows(rows.ptr, g, g < rows.last, SPEC.ROWS)
            row = of_kind(row, g, g < rows.last, rows.row_weights_ptr, "object")
            known = row_valid(row, site.b, site.b + 1, head.C, head.limit) & matches(row, site, head, terms, SPEC)
            cell = row_cell(row.cx, row.cy, known, 0, site.W, site.H, 0.0)
        taken = (cell >= site.first_cell) & (cell < site.end_cell)
        local = tl.where(taken, cell - site.first_cell, 0)
        amount = tl.sum(taken.to(tl.int32), axis=0)
        if not alone:
            if amount > 0:
                at, block = _places(taken.to(tl.int32), amount, found, block, lists.blocks_ptr, lists, done_ptr, SPEC)
                tl.store(lists.cell_ptr + at, local, mask=taken)
                tl.store(lists.row_ptr + at, g, mask=taken)
        found += amount
    if not alone:
        if found > 0:
            tl.debug_barrier()
        if found <= SPEC.ROWS:
            taken = lane < found
            local = tl.load(lists.cell_ptr + lists.listed + lane, mask=taken, other=0)
            g = tl.load(lists.row_ptr + lists.listed + lane, mask=taken, other=0)
    return found, local, g, taken


@triton.jit
def _listed(lists, i, found, SPEC: tl.constexpr):
    """A block of the list: where it begins, its cells in the tile, and a mask."""
    lane = tl.arange(0, SPEC.ROWS)
    mask = i * SPEC.ROWS + lane < found
    first = tl.load(lists.blocks_ptr + i, mask=i > 0, other=lists.listed)
    return first, tl.load(lists.cell_ptr + first + lane, mask=mask, other=0), mask


@triton.jit
def _amounts(lists, found, local, taken, SPEC: tl.constexpr):
    """How many candidates, ``taken`` or listed, each cell of the tile has."""
    CELLS: tl.constexpr = SPEC.CELLS
    if found <= SPEC.ROWS:
        amounts = tl.histogram(local, CELLS, mask=taken)
    else:  # of many a histogram would take longer
        at = lists.marks_ptr + tl.arange(0, CELLS)
        tl.store(at, tl.zeros([CELLS], tl.int32))
        tl.debug_barrier()
        for i in range(0, tl.cdiv(found, SPEC.ROWS)):
            _first, cell, mask = _listed(lists, i, found, SPEC)
            tl.atomic_add(lists.marks_ptr + cell, 1, mask=mask, sem="relaxed")
        tl.debug_barrier()
        amounts = tl.load(at)
    return amounts


@triton.jit
def _store_row(lists, at, g, cell, mask):
    tl.store(lists.order_ptr + at, g, mask=mask)
    tl.store(lists.at_ptr + at, cell, mask=mask)


@triton.jit
def _before(local, taken, SPEC: tl.constexpr):
    """How many candidates in the lanes before have the cell of each: of all pairs at once, none waits for another."""
    lane = tl.arange(0, SPEC.ROWS)
    cell = tl.where(taken, local, -1)
    same = (cell[:, None] == local[None, :]) & (lane[:, None] < lane[None, :])
    return tl.sum(same.to(tl.int32), axis=0)


@triton.jit
def _rank(lists, start, count, place, most):
    """Of rows at a ``place`` in the list how many of the ``count`` of their cell come before."""
    before = place * 0
    for k in tl.range(0, most, loop_unroll_factor=1):
        other = tl.load(lists.any_ptr + start + k, mask=k < count, other=0)
        before += ((k < count) & (other < place)).to(tl.int32)
    return before


@triton.jit
def _order_blocks(lists, found, starts, most, SPEC: tl.constexpr):
    """:func:`_order_rows` of many. Rows find a place among those of their cell in any order; how many of these come
    before it in the list says where it goes.
    """
    blocks = tl.cdiv(found, SPEC.ROWS)
    lane = tl.arange(0, SPEC.ROWS)
    tl.debug_barrier()  # amounts have been read
    tl.store(lists.marks_ptr + tl.arange(0, SPEC.CELLS), starts)
    tl.debug_barrier()
    for i in range(0, blocks):
        _first, cell, mask = _listed(lists, i, found, SPEC)
        at = tl.atomic_add(lists.marks_ptr + cell, 1, mask=mask, sem="relaxed")
        tl.store(lists.any_ptr + at, i * SPEC.ROWS + lane, mask=mask)
    tl.debug_barrier()
    base = tl.min(starts, axis=0)
    for i in range(0, blocks):
        first, cell, mask = _listed(lists, i, found, SPEC)
        g = tl.load(lists.row_ptr + first + lane, mask=mask, other=0)
        start = tl.load(lists.marks_ptr + cell - 1, mask=mask & (cell > 0), other=0)  # where those of the last cell end
        start = tl.where(cell > 0, start, base)
        count = tl.where(mask, tl.load(lists.marks_ptr + cell, mask=mask, other=0) - start, 0)
        rank = _rank(lists, start, count, i * SPEC.ROWS + lane, most)
        _store_row(lists, start + rank, g, cell, mask)


@triton.jit
def _order_rows(lists, found, picks, base, amounts, first, candidates, SPEC: tl.constexpr):
    """Leaves the candidates, cell by cell, those of one cell in order, from ``base`` on, as far from there as ``first``
    says of each cell.
    """
    local, g, taken = candidates
    if found > SPEC.ROWS:
        _order_blocks(lists, found, base + first, tl.max(amounts, axis=0), SPEC)
    else:
        at = tl.gather(first, local, 0)
        if picks < found:  # a cell has several
            at += _before(local, taken, SPEC)
        _store_row(lists, base + at, g, local, taken)


@triton.jit
def _nearest_rows(rows, site, cells, head, SPEC: tl.constexpr):
    """The row that the anchor of each cell overlaps most, -1 for none, and their IoU."""
    CELLS: tl.constexpr = SPEC.CELLS
    ax = ((cells % site.W).to(SPEC.ACC) + 0.5) * site.side
    ay = ((cells // site.W).to(SPEC.ACC) + 0.5) * site.side
    hw = 0.5 * site.own_w
    hh = 0.5 * site.own_h
    anchor = Corners(ax - hw, ay - hh, ax + hw, ay + hh)
    taken = tl.zeros([CELLS], tl.int32) - 1
    nearest = tl.zeros([CELLS], SPEC.ACC)
    for g in range(rows.first, rows.last):
        row = of_kind(load_row(rows.ptr, g), g, g < rows.last, rows.row_weights_ptr, "object")
        if row_valid(row, site.b, site.b + 1, head.C, head.limit):
            true, area = true_corners(row, site, SPEC.ACC)
            value = iou(anchor, true, site.own_w * site.own_h, area, near_divide)
            taken = tl.where(value > nearest, g, taken)
            nearest = tl.maximum(nearest, value)
    return taken, nearest


@triton.jit
def assigned(rows, site, lists, done_ptr, head, terms, SPEC: tl.constexpr):
    """How many rows each cell of the tile is assigned to, and in the band between negative and positive -1; and the
    lists of these rows and cells.
    """
    CELLS: tl.constexpr = SPEC.CELLS
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    mask = cells < site.end_cell
    base = site.pid * 0
    pick = site.pid * 0
    picks = site.pid * 0
    if terms.match is None:
        taken, nearest = _nearest_rows(rows, site, cells, head, SPEC)
        amounts = (mask & (nearest > head.band_high)).to(tl.int32)
        found = tl.sum(amounts, axis=0)
    else:
        amounts = tl.zeros([CELLS], tl.int32)
        found, local, g, own = _candidates(rows, site, lists, done_ptr, head, terms, SPEC)
        if found > 0:
            amounts = _amounts(lists, found, local, own, SPEC)
    if found > 0:
        is_pick = (amounts > 0).to(tl.int32)
        picks = tl.sum(is_pick, axis=0)
        base, pick = _take(done_ptr, found, picks)
        first, place = tl.split(tl.cumsum(tl.join(amounts, is_pick), axis=0))
        first -= amounts
        at = pick + place - 1
        tl.store(lists.pick_ptr + at, cells, mask=amounts > 0)
        tl.store(lists.first_ptr + at, first, mask=amounts > 0)
        if terms.match is None:
            _store_row(lists, base + first, taken, cells - site.first_cell, amounts > 0)
        else:
            _order_rows(lists, found, picks, base, amounts, first, (local, g, own), SPEC)
        tl.debug_barrier()
    if terms.match is None:
        amounts = tl.where((amounts == 0) & (nearest >= head.band_low), -1, amounts)
    return amounts, Found(base, found, pick, picks)
