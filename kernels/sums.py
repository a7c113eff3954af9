"""Sums without atomics on floats: a partial per program, added up in a fixed order by the last program to finish."""

import triton
import triton.language as tl


@triton.jit
def is_last(done_ptr, programs):
    """Whether all other programs of this launch have finished and their partial sums can be read."""
    tl.debug_barrier()  # this program's own partial sums come first
    return tl.atomic_add(done_ptr, 1, sem="acq_rel") == programs - 1


@triton.jit
def column_sums(partial_ptr, programs, COLUMNS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr = 256):
    """Sums of all columns of ``partial[programs, COLUMNS]`` (a power of two), in an order that depends on nothing but
    ``programs`` and ROWS, of which four times as many are under way at a time.
    """
    lane = tl.arange(0, ROWS)[:, None]
    at = partial_ptr + lane * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for i in range(0, programs, 4 * ROWS):
        # four at a time, so that they do not wait for each other
        # .cg: other programs wrote these, so a line this multiprocessor has cached would be stale
        a = tl.load(at + i * COLUMNS, mask=i + lane < programs, other=0.0, cache_modifier=".cg")
        b = tl.load(at + (i + ROWS) * COLUMNS, mask=i + ROWS + lane < programs, other=0.0, cache_modifier=".cg")
        c = tl.load(at + (i + 2 * ROWS) * COLUMNS, mask=i + 2 * ROWS + lane < programs, other=0.0, cache_modifier=".cg")
        d = tl.load(at + (i + 3 * ROWS) * COLUMNS, mask=i + 3 * ROWS + lane < programs, other=0.0, cache_modifier=".cg")
        total = total + a + b + c + d
    return tl.sum(total, axis=0)


@triton.jit
def column(sums, k):
    """One of the sums."""
    return tl.sum(tl.where(tl.arange(0, sums.shape[0]) == k, sums, 0.0), axis=0)


@triton.jit
def finish(box, obj, cls, assigned, outputs):
    """The end of a loss: the three parts, the total, the count of assigned predictions; counters are 0 again.

    ``outputs`` has ``parts_ptr``, ``total_ptr``, ``counts_ptr`` and ``done_ptr``, of four integers.
    """
    tl.store(outputs.parts_ptr, box)
    tl.store(outputs.parts_ptr + 1, obj)
    tl.store(outputs.parts_ptr + 2, cls)
    tl.store(outputs.total_ptr, box + obj + cls)
    leave_counts(assigned, outputs)


@triton.jit
def leave_counts(assigned, outputs):
    """The count of assigned predictions; counters are 0 again."""
    tl.store(outputs.counts_ptr, assigned.to(tl.int32))
    tl.store(outputs.done_ptr + tl.arange(0, 4), tl.zeros([4], tl.int32))  # ready for the next launch


@triton.jit
def grad_out(grads, part: tl.constexpr, b, WITH_LOSS: tl.constexpr, BY_IMAGE: tl.constexpr, ACC: tl.constexpr):
    """What the gradient of a part is multiplied by: that of the total, whose pointer is the first of ``grads``, and its
    own; 1 with the loss. With BY_IMAGE those of image b.
    """
    grad = tl.cast(1.0 if WITH_LOSS else 0.0, ACC)
    if grads[0] is not None:
        grad += _load_grad(grads[0], b, BY_IMAGE, ACC)
    if grads[1 + part] is not None:
        grad += _load_grad(grads[1 + part], b, BY_IMAGE, ACC)
    return grad


@triton.jit
def _load_grad(ptr, b, BY_IMAGE: tl.constexpr, ACC: tl.constexpr):
    if BY_IMAGE:
        ptr += b
    return tl.load(ptr).to(ACC)
