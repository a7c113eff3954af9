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
gradient launch reads the logits of those picked (``ranked.py``). As ranks go by index, matches are by index too, not by
position.
"""

import triton
import triton.language as tl

from ..levels import are_wide, as_wide, integer_of
from ..primitives import plain
from ..sums import column, column_sums, grad_out, is_last
from .box import box_program
from .classes import plane_classes, stream_classes
from .ranked import ranked_classes
from .records import Batch, Grads, Level, View
from .site import range_of, tiles_of, view_of

N_PARTS: tl.constexpr = tl.constexpr(4)  # class, box and centreness loss; one to spare


@triton.jit
def _image_of(of_boxes, local, level, batch, SPEC: tl.constexpr):
    """The image of a program of boxes or of class logits, of a stream the first one."""
    boxes = local // tiles_of(level, SPEC.FLAT, SPEC.ANCHORS)
    if SPEC.RANKED:
        classes = local * batch.steps // tiles_of(level, SPEC.FLAT, SPEC.CELLS)
    elif SPEC.FLAT:
        n = level.anchors * level.cells
        classes = (local.to(tl.int64) * (SPEC.BLOCK * batch.steps) // SPEC.C // n).to(tl.int32)
    else:
        classes = local // tiles_of(level, False, SPEC.CELLS)
    return tl.where(of_boxes, boxes, classes)


@triton.jit
def _class_program(local, view, level, batch, matched, ranked, terms, numbers, grads, SPEC: tl.constexpr):
    """Class loss of a program of a level, and of the image after its own; and the gradient. Of a ranked head
    ``rank.py`` adds the loss up."""
    loss = tl.cast(0.0, SPEC.ACC)
    rest = loss
    grad = grads.classes
    if SPEC.RANKED:
        ranked_classes(local, view, level, batch, matched, ranked, grads, SPEC)
    elif SPEC.FLAT:
        loss, rest = stream_classes(local, view, level, batch, matched, terms, numbers, grads, SPEC)
    else:
        wide = (level.cells % 16 == 0) & are_wide(view.by)
        if SPEC.WITH_GRAD:
            wide = wide & are_wide(view.d_by)
        if SPEC.NEAR and wide:
            same = Level(level.width, level.cells // 16 * 16, level.anchors, level.start)
            known = View(view.ptr, as_wide(view.by), view.d_ptr, as_wide(view.d_by))
            loss = plane_classes(local, known, same, batch, matched, terms, numbers, grad, SPEC)
        else:
            loss = plane_classes(local, view, level, batch, matched, terms, numbers, grad, SPEC)
    return loss, rest


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
    i, local, boxes_end = range_of(pid, levels.box_programs, 0, pid * 0, pid * 0)
    of_boxes = pid < boxes_end
    i, local, _end = range_of(pid, levels.class_programs, boxes_end, i, local)
    start = pid * 0
    for j in tl.static_range(len(levels.cells)):
        start += tl.where(i > j, plain(levels.anchors[j]) * plain(levels.cells[j]), 0)
    level = Level(integer_of(levels.widths, i), integer_of(levels.cells, i), integer_of(levels.anchors, i), start)
    image = pid * 0
    after = tl.cast(1.0, SPEC.ACC)
    if SPEC.IMAGES:
        image = _image_of(of_boxes, local, level, batch, SPEC)
        after = grad_out(grads, 0, tl.minimum(image + 1, B - 1), SPEC.WITH_LOSS, SPEC.IMAGES, SPEC.ACC)
    grad = Grads(
        grad_out(grads, 0, image, SPEC.WITH_LOSS, SPEC.IMAGES, SPEC.ACC),
        grad_out(grads, 1, image, SPEC.WITH_LOSS, SPEC.IMAGES, SPEC.ACC),
        grad_out(grads, 2, image, SPEC.WITH_LOSS, SPEC.IMAGES, SPEC.ACC),
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
        boxes = view_of(predictions.boxes, i, SPEC.WITH_GRAD)
        centres = boxes
        if terms.centre is not None:
            centres = view_of(predictions.centres, i, SPEC.WITH_GRAD)
        box, centre = box_program(
            local, boxes, centres, level, batch, matched, terms, numbers=numbers, grads=grad, SPEC=SPEC
        )
    else:
        view = view_of(predictions.classes, i, SPEC.WITH_GRAD)
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
