"""Cells that several rows picked: every row of the image claims those of its region, whether or not it picked them."""

import triton
import triton.language as tl

from .site import all_cells, cells_at, load_object, offsets
from .wish import NONE, claim_of, in_region, look_at


@triton.jit(do_not_specialize=["M"])
def claim_kernel(problem, targets, M, decoded, picked, tally, SPEC: tl.constexpr, BLOCK: tl.constexpr):
    """Claims of a row, a program each, to cells in the list: see :class:`.records.Decoded`."""
    g = tl.program_id(0)
    count = tl.load(tally.done_ptr + 1)
    if count > 0:
        one = load_object(targets, g, M, problem.frame, SPEC)
        N = all_cells(problem.levels)
        first = one.image * N
        if one.valid:
            for i0 in range(0, count, BLOCK):
                i = i0 + tl.arange(0, BLOCK)
                cell = tl.load(picked.clash_ptr + i, mask=i < count, other=-1)
                mine = (cell >= first) & (cell - first < N)
                cells = cells_at(tl.where(mine, cell - first, 0), problem.levels, SPEC)
                off_x, off_y = offsets(one, cells, problem.frame, SPEC)
                mine = mine & in_region(one, off_x, off_y, cells.stride, problem.numbers, SPEC)
                if tl.max(mine.to(tl.int32), axis=0) > 0:
                    look = look_at(one, cells, mine, problem, decoded, SPEC)
                    claim = claim_of(look.strength, g)
                    tl.atomic_max(decoded.claim_ptr + cell, claim, mask=look.strength > NONE, sem="relaxed")
