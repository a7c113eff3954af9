"""The loss launch."""

import triton
import triton.language as tl

from ..assign import row_valid
from ..levels import pointer_of, strides_of
from ..primitives import plain, weigh
from ..regions import Candidates, Points, in_regions
from ..rows import image_rows, in_its_range, load_rows, of_kind, rows_end, wrong_offsets
from ..sums import column, column_sums, finish, is_last, leave_counts
from .assign import assigned
from .box import prior_term
from .ignore import ignored
from .positives import box_losses, class_losses
from .records import Lists, Plane, Rows, View
from .site import load_logits, means_of, programs_of, site_of, store_plane, store_state

BACKGROUND: tl.constexpr = tl.constexpr(0)
IGNORED: tl.constexpr = tl.constexpr(1)
ASSIGNED: tl.constexpr = tl.constexpr(2)
HIDDEN: tl.constexpr = tl.constexpr(3)  # by a region, of heads with a smooth level: on others they are IGNORED
# columns of the partial sums: box, objectness, class, assigned predictions; what means are divided by: rows in use, and
# predictions whose objectness counts where that is asked for; two to spare
N_PARTS: tl.constexpr = tl.constexpr(8)


@triton.jit
def _count_invalid(targets, M, B, head, SPEC: tl.constexpr):
    """Rows that no program will use, padding behind the last row is none; and offsets that are wrong."""
    ROWS: tl.constexpr = SPEC.ROWS
    end = rows_end(targets.offsets_ptr, M, B)
    n = tl.zeros([ROWS], tl.int32)
    for g0 in range(0, end, SPEC.ROWS):
        g = g0 + tl.arange(0, SPEC.ROWS)
        row = of_kind(load_rows(targets.ptr, g, g < end, SPEC.ROWS), g, g < end, targets.row_weights_ptr, "any")
        used = in_its_range(row.image, g, row_valid(row, 0, B, head.C, head.limit), targets.offsets_ptr)
        n += tl.where((g < end) & ~used, 1, 0)
    return tl.sum(n, axis=0) + wrong_offsets(targets.offsets_ptr, M, B, SPEC.ROWS)


@triton.jit
def _lists(lists_ptr, partial_ptr, pid, M, near_places, SPEC: tl.constexpr):
    """Where a program finds its lists in the memory of all."""
    room = M * SPEC.PLACES
    more = 2 * tl.num_programs(0) * SPEC.ROWS  # the first block of each list, the only one that may be all but empty
    pool = room + M * near_places + more
    order_ptr = lists_ptr + 2 * pool
    near = tl.cdiv(M, SPEC.ROWS)
    marks_ptr = order_ptr + 6 * room
    blocks_ptr = marks_ptr + tl.num_programs(0) * SPEC.CELLS + pid * (tl.cdiv(M * SPEC.KINDS, SPEC.ROWS) + near)
    spread_ptr = partial_ptr + tl.num_programs(0) * N_PARTS
    decoded_ptr = spread_ptr + pid * (5 * (SPEC.ROWS + SPEC.CELLS))
    if SPEC.IGNORES:
        spread_ptr += tl.num_programs(0) * (5 * (SPEC.ROWS + SPEC.CELLS))
    return Lists(
        cell_ptr=lists_ptr,
        row_ptr=lists_ptr + pool,
        order_ptr=order_ptr,
        pick_ptr=order_ptr + room,
        first_ptr=order_ptr + 2 * room,
        pushed_ptr=order_ptr + 3 * room,
        at_ptr=order_ptr + 4 * room,
        any_ptr=order_ptr + 5 * room,
        spread_ptr=spread_ptr,
        near_ptr=blocks_ptr,
        blocks_ptr=blocks_ptr + near,
        marks_ptr=marks_ptr + pid * SPEC.CELLS,
        decoded_ptr=decoded_ptr,
        boxes_ptr=decoded_ptr + 5 * SPEC.CELLS,
        listed=2 * pid * SPEC.ROWS,
        near=(2 * pid + 1) * SPEC.ROWS,
        more=more,
    )


@triton.jit
def _store_partial(at, box, obj, cls, assigned_to, in_use, counted):
    """The sums of a program, as one access of a sector."""
    i = tl.arange(0, 8)
    values = tl.where(i == 0, box, 0.0)
    values = tl.where(i == 1, obj, values)
    values = tl.where(i == 2, cls, values)
    values = tl.where(i == 3, assigned_to, values)
    values = tl.where(i == 4, in_use, values)
    values = tl.where(i == 5, counted, values)
    tl.store(at + i, values)


@triton.jit
def _hidden(cells, mask, site, rows, head):
    """Which cells of the tile have their middle in an ignored region, in cells."""
    x = (cells % site.W).to(tl.float32) + 0.5
    y = (cells // site.W).to(tl.float32) + 0.5
    candidates = Candidates(rows.ptr, rows.row_weights_ptr, rows.first, rows.last, site.b)
    return in_regions(Points(x, y, mask, (site.W, site.H)), candidates, head.C, head.limit)


@triton.jit
def _tile(view, site, rows, lists, saved, outputs, head, terms, SPEC: tl.constexpr):
    """The tile of a program: its partial sums, and what the gradient needs."""
    CELLS: tl.constexpr = SPEC.CELLS
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    mask = cells < site.end_cell
    plane, logits, logit = view
    bad = logit != logit  # a NaN that was read shows in the total even where nothing asks for it
    for i in tl.static_range(4):
        bad = bad | (logits[i] != logits[i])
    if SPEC.IGNORES:
        over, best = ignored(plane, logits, rows, lists, site, head, terms, SPEC)
    amounts, found = assigned(rows, site, lists, outputs.done_ptr, head, terms, SPEC)
    state = tl.where(amounts > 0, ASSIGNED, tl.where(amounts < 0, IGNORED, BACKGROUND))
    true_obj = tl.zeros([CELLS], SPEC.ACC)
    if SPEC.IGNORES:
        state = tl.where(over & (state == BACKGROUND), IGNORED, state)
        if SPEC.SMOOTH:
            true_obj = tl.where(site.smooth, best, 0.0)
    if rows.row_weights_ptr is not None:
        hidden = _hidden(cells, mask, site, rows, head) & (state < ASSIGNED)
        state = tl.where(hidden, HIDDEN if SPEC.SMOOTH else IGNORED, state)
    if saved.true_obj_ptr is not None:
        store_plane(saved.true_obj_ptr, true_obj, cells, site)
    if saved.state_ptr is not None:
        store_state(saved.state_ptr, state, site, SPEC)
    counts = mask & (state == BACKGROUND)
    if SPEC.SMOOTH:
        counts = mask & (site.smooth | (state == BACKGROUND))
        if rows.row_weights_ptr is not None:  # those of rows take their weight
            counts = counts & (state < ASSIGNED)
    loss_obj, _d_obj = terms.objectness(logit, true_obj, head.obj_args)
    loss_obj = weigh(site.obj_scale * head.noobj_gain, loss_obj, SPEC.ZEROS)
    loss_obj = tl.where(bad, float("nan"), tl.where(counts, loss_obj, 0.0))
    obj = tl.sum(tl.where(mask, loss_obj, 0.0), axis=0)
    box = tl.cast(0.0, SPEC.ACC)
    cls = tl.cast(0.0, SPEC.ACC)
    in_use = site.pid * 0
    counted = site.pid * 0
    if SPEC.MEAN_USED:
        counted += tl.sum(counts.to(tl.int32), axis=0)
    if SPEC.PRIOR:
        prior, _d_prior = prior_term(logits, site, head, terms, SPEC)
        box += head.prior_gain * tl.sum(tl.where(mask & (state != ASSIGNED), prior, 0.0), axis=0)
    if found.picks > 0:
        if saved.bases_ptr is not None:
            tl.store(saved.bases_ptr + site.pid, found.pick)
        if SPEC.SMOOTH and SPEC.IGNORES and rows.row_weights_ptr is not None:
            tl.debug_barrier()  # boxes, and classes, have been met
            tl.store(lists.decoded_ptr + tl.arange(0, SPEC.CELLS), true_obj)
        cls = class_losses(plane, rows, found, lists, saved.kept_ptr, site, head, terms, SPEC)
        tl.debug_barrier()
        own_box, own_obj, in_use = box_losses(plane, rows, found, lists, saved.kept_ptr, site, head, terms, SPEC)
        box += own_box
        obj += own_obj
    if SPEC.MEAN_USED:
        if SPEC.SMOOTH and rows.row_weights_ptr is None:
            counted += tl.where(site.smooth, 0, found.picks)
        else:
            counted += found.picks
    at = outputs.partial_ptr + site.pid * N_PARTS
    _store_partial(at, box, obj, cls, found.picks.to(SPEC.ACC), in_use.to(SPEC.ACC), counted.to(SPEC.ACC))


@triton.jit
def _sum_up(levels, outputs, SPEC: tl.constexpr):
    """The parts and the total, from the partial sums of all programs."""
    if SPEC.MEAN_ROWS or SPEC.MEAN_USED:
        k = tl.arange(0, N_PARTS)
        total = tl.zeros([N_PARTS], SPEC.ACC)
        at = outputs.partial_ptr
        for i in tl.range(0, len(SPEC.ANCHORS), loop_unroll_factor=1):
            level = len(SPEC.ANCHORS) - 1 - i
            programs = _programs(level, levels, SPEC)
            sums = column_sums(at, programs, N_PARTS, SPEC.ACC, 2 * SPEC.ROWS)
            per_row = tl.cast(1.0, SPEC.ACC)
            per_used = tl.cast(1.0, SPEC.ACC)
            if SPEC.MEAN_ROWS:
                per_row = 1.0 / tl.maximum(column(sums, 4), 1.0)
            if SPEC.MEAN_USED:
                per_used = 1.0 / tl.maximum(column(sums, 5), 1.0)
            sums *= tl.where(k == 1, per_used, tl.where(k >= 3, 1.0, per_row))
            total += sums
            means_ptr = means_of(level, levels, outputs.parts_ptr, SPEC)
            tl.store(means_ptr, per_row)
            tl.store(means_ptr + 1, per_used)
            if SPEC.BY_LEVEL:
                tl.store(outputs.total_ptr + 2 * level, column(sums, 0) + column(sums, 2))
                tl.store(outputs.total_ptr + 2 * level + 1, column(sums, 1))
                tl.store(means_of(len(SPEC.ANCHORS), levels, outputs.parts_ptr, SPEC) + level * N_PARTS + k, sums)
            at += programs * N_PARTS
    else:
        total = column_sums(outputs.partial_ptr, tl.num_programs(0), N_PARTS, SPEC.ACC, 2 * SPEC.ROWS)
    if SPEC.BY_IMAGE:
        tl.debug_barrier()  # means have been left
        for b in range(0, plain(levels.batch)):
            _sum_up_image(b, levels, outputs, SPEC)
        leave_counts(column(total, 3), outputs)
    elif SPEC.BY_LEVEL:
        leave_counts(column(total, 3), outputs)
    else:
        finish(column(total, 0), column(total, 1), column(total, 2), column(total, 3), outputs)


@triton.jit
def _sum_up_image(b, levels, outputs, SPEC: tl.constexpr):
    """The parts and the total of an image, whose programs follow each other on each level."""
    B = plain(levels.batch)
    k = tl.arange(0, N_PARTS)
    total = tl.zeros([N_PARTS], SPEC.ACC)
    at = outputs.partial_ptr
    for i in tl.range(0, len(SPEC.ANCHORS), loop_unroll_factor=1):
        level = len(SPEC.ANCHORS) - 1 - i
        own = _programs(level, levels, SPEC) // B
        sums = column_sums(at + b * own * N_PARTS, own, N_PARTS, SPEC.ACC, 2 * SPEC.ROWS)
        if SPEC.MEAN_ROWS or SPEC.MEAN_USED:
            means_ptr = means_of(level, levels, outputs.parts_ptr, SPEC)
            sums *= tl.where(k == 1, tl.load(means_ptr + 1), tl.load(means_ptr))
        total += sums
        at += B * own * N_PARTS
    tl.store(outputs.parts_ptr + b + k * B, total, mask=k < 3)
    tl.store(outputs.total_ptr + b, column(total, 0) + column(total, 1) + column(total, 2))


@triton.jit
def _programs(level, levels, SPEC: tl.constexpr):
    """Programs of a level known at run time."""
    chosen = level * 0
    for i in tl.static_range(len(SPEC.ANCHORS)):
        chosen = tl.where(level == i, programs_of(i, levels, SPEC), chosen)
    return chosen


@triton.jit(do_not_specialize=["M"])
def grid_kernel(maps, levels, targets, M, lists_ptr, offers, saved, outputs, head, terms, SPEC: tl.constexpr):
    """Loss of an anchor-grid head; grid: one program for each level, image, anchor and CELLS cells."""
    pid = tl.program_id(0)
    site = site_of(pid, levels, SPEC)
    plane = Plane(pointer_of(maps, site.level), strides_of(levels.by, site.level))
    # on their way while the rows of the image are looked for
    cells = site.first_cell + tl.arange(0, SPEC.CELLS)
    logits, logit = load_logits(plane, site, cells, site.end_cell, SPEC.IGNORES or SPEC.PRIOR, SPEC)
    first, last = image_rows(targets.ptr, targets.offsets_ptr, M, site.b, SPEC.ROWS)
    rows = Rows(targets.ptr, first, last, targets.weights_ptr, targets.columns_ptr, targets.row_weights_ptr, offers)
    lists = _lists(lists_ptr, outputs.partial_ptr, pid, M, plain(levels.near_places), SPEC)
    _tile(View(plane, logits, logit), site, rows, lists, saved, outputs, head, terms, SPEC)
    if pid == tl.num_programs(0) - 1:  # the first ones have the most to do
        tl.store(outputs.counts_ptr + 1, _count_invalid(targets, M, plain(levels.batch), head, SPEC))
    if is_last(outputs.done_ptr, tl.num_programs(0)):
        _sum_up(levels, outputs, SPEC)
