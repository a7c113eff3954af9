"""Who is assigned to a tile: decided here, once, and listed; all that follows reads the lists.

Rows lie in lanes. Of each block of candidates a tile keeps those that fall into it; a list that is empty says that all
of the tile is background, so there is nothing that could be assigned and then not be found again. Launches of this code
are compiled without contraction of products and sums, see ``assign.py`` of the kernels.
"""

import triton
import triton.language as tl

from ..assign import row_cell
from ..overlap import Corners, iou
from ..primitives import near_divide
from ..rows import load_row, load_rows
from .records import Found

RANKED: tl.constexpr = tl.constexpr(8)  # entries of a block that each of it is compared with at a time


@triton.jit
def true_corners(row, site, ACC: tl.constexpr):
    """The box of a row by its edges, in pixels, and its area."""
    gw = row.w.to(ACC) * (site.W * site.side)
    gh = row.h.to(ACC) * (site.H * site.side)
    gx = row.cx.to(ACC) * (site.W * site.side)
    gy = row.cy.to(ACC) * (site.H * site.side)
    return Corners(gx - 0.5 * gw, gy - 0.5 * gh, gx + 0.5 * gw, gy + 0.5 * gh), gw * gh


@triton.jit
def _block(q, rows, site, head, terms, SPEC: tl.constexpr):
    """Of some candidates the cell and the row, and whether the tile takes them: the one place that decides it."""
    count = rows.last - rows.first
    kind = 0
    g = rows.first + q
    if SPEC.KINDS > 1:
        kind = q // tl.maximum(count, 1)
        g = rows.first + q % tl.maximum(count, 1)
    row = load_rows(rows.ptr, g, q < count * SPEC.KINDS, SPEC.ROWS)
    cell = row_cell(row, kind, site.b, site.W, site.H, head.C, head.limit, SPEC.KINDS > 1)
    gw = row.w.to(SPEC.ACC) * (site.W * site.side)
    gh = row.h.to(SPEC.ACC) * (site.H * site.side)
    taken = terms.match(gw, gh, site, head.thresh, SPEC.PER_LEVEL)
    taken = taken & (cell >= site.first_cell) & (cell < site.first_cell + SPEC.CELLS)
    return cell, g, taken


@triton.jit
def _take(count_ptr, amount):
    """Room for so many in a list."""
    return tl.atomic_add(count_ptr, amount, sem="relaxed")


@triton.jit
def _list_candidates(rows, site, lists, done_ptr, head, terms, SPEC: tl.constexpr):
    """Leaves the candidates that the tile takes, block by block; returns the number of blocks and of candidates."""
    end = (rows.last - rows.first) * SPEC.KINDS
    found = site.pid * 0
    lane = tl.arange(0, SPEC.ROWS)
    for q0 in range(0, end, SPEC.ROWS):
        cell, g, taken = _block(q0 + lane, rows, site, head, terms, SPEC)
        taken = taken.to(tl.int32)
        amount = tl.sum(taken, axis=0)
        at = lists.blocks_ptr + q0 // SPEC.ROWS * 2
        tl.store(at + 1, amount)
        if amount > 0:
            first = _take(done_ptr + 2, amount)
            tl.store(at, first)
            place = first + tl.cumsum(taken, axis=0) - 1
            tl.store(lists.cell_ptr + place, cell - site.first_cell, mask=taken > 0)
            tl.store(lists.row_ptr + place, g, mask=taken > 0)
        found += amount
    return tl.cdiv(end, SPEC.ROWS), found


@triton.jit
def _listed(lists, i, SPEC: tl.constexpr):
    """A block of the list: its cells in the tile, its rows, and a mask."""
    amount = tl.load(lists.blocks_ptr + 2 * i + 1)
    mask = tl.arange(0, SPEC.ROWS) < amount
    first = tl.load(lists.blocks_ptr + 2 * i, mask=amount > 0, other=0)
    at = first + tl.arange(0, SPEC.ROWS)
    cell = tl.load(lists.cell_ptr + at, mask=mask, other=0)
    return amount, first, cell, tl.load(lists.row_ptr + at, mask=mask, other=0), mask


@triton.jit
def _rank(lists, first, amount, cell, SPEC: tl.constexpr):
    """How many of a block come before each of it on the same cell."""
    ROWS: tl.constexpr = SPEC.ROWS
    lane = tl.arange(0, ROWS)
    key = (cell * ROWS + lane)[:, None]  # less another's: of one cell how much further back, else at least ROWS away
    rank = tl.zeros([ROWS], tl.int32)
    for j0 in range(0, amount, RANKED):
        j = j0 + tl.arange(0, RANKED)
        other = tl.load(lists.cell_ptr + first + j, mask=j < amount, other=-1) * ROWS + j
        behind = (key - other[None, :] - 1).to(tl.uint32, bitcast=True)
        rank += tl.sum((behind < lane.to(tl.uint32)[:, None]).to(tl.int32), axis=1)
    return rank


@triton.jit
def _order_rows(lists, blocks, free, shared, SPEC: tl.constexpr):
    """Leaves the listed rows again, cell by cell, those of one cell in order; ``free`` is where each cell's go."""
    for i in range(0, blocks):
        amount, first, cell, g, mask = _listed(lists, i, SPEC)
        if amount > 0:
            at = tl.gather(free, cell, 0)
            if shared:
                at += _rank(lists, first, amount, cell, SPEC)
            tl.store(lists.order_ptr + at, g, mask=mask)
            if i + 1 < blocks:
                free += tl.histogram(cell, SPEC.CELLS, mask=mask)


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
        row = load_row(rows.ptr, g)
        if row_cell(row, 0, site.b, site.W, site.H, head.C, head.limit, False) >= 0:
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
    mask = cells < site.HW
    lane = tl.arange(0, SPEC.CELLS)
    base = site.pid * 0
    pick = site.pid * 0
    first = tl.zeros([CELLS], tl.int32)
    if terms.match is None:
        taken, nearest = _nearest_rows(rows, site, cells, head, SPEC)
        amounts = (mask & (nearest > head.band_high)).to(tl.int32)
        found = tl.sum(amounts, axis=0)
        if found > 0:
            base = _take(done_ptr + 3, found)
            first = tl.cumsum(amounts, axis=0) - amounts
            tl.store(lists.order_ptr + base + first, taken, mask=amounts > 0)
    else:
        amounts = tl.zeros([CELLS], tl.int32)
        blocks, found = _list_candidates(rows, site, lists, done_ptr, head, terms, SPEC)
        if found > 0:
            tl.debug_barrier()
            for i in range(0, blocks):
                amount, _first, cell, _g, listed = _listed(lists, i, SPEC)
                if amount > 0:
                    amounts += tl.histogram(cell, SPEC.CELLS, mask=listed)
            base = _take(done_ptr + 3, found)
            first = tl.cumsum(amounts, axis=0) - amounts
            _order_rows(lists, blocks, base + first, tl.max(amounts, axis=0) > 1, SPEC)
    is_pick = (amounts > 0).to(tl.int32)
    picks = tl.sum(is_pick, axis=0)
    if found > 0:
        pick = _take(done_ptr + 1, picks)
        at = pick + tl.cumsum(is_pick, axis=0) - 1
        tl.store(lists.pick_ptr + at, site.first_cell + lane, mask=amounts > 0)
        tl.store(lists.first_ptr + at, first, mask=amounts > 0)
        tl.debug_barrier()
    if terms.match is None:
        amounts = tl.where((amounts == 0) & (nearest >= head.band_low), -1, amounts)
    return amounts, Found(base, found, pick, picks)
