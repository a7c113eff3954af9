"""What a kernel must agree with, and how closely: used on the real terms and, to test the tests, on broken ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from conftest import DEVICE
from torch import Tensor

from fusedyolo import ops, reference
from fusedyolo.heads import GridHead
from fusedyolo.terms import TERMS

# Absolute, for gradients of order one; the float32 figure is a hundred roundings of the largest entry.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def compare(got: Tensor, want: Tensor, tolerance: float) -> None:
    """Largest difference within ``tolerance`` times the largest entry of ``want`` (at least 1); NaN where NaN is."""
    torch.testing.assert_close(
        got.double(), want.double(), rtol=0, atol=tolerance * max(1.0, _largest(want)), equal_nan=True
    )


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def value_and_grads(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Unreduced loss, and the gradients of its sum weighted unevenly, so that no grad_output is 1."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = loss(*leaves)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)
    return value.detach(), *torch.autograd.grad(value, leaves, weights)


def lattice(points: int = 4, empty: bool = False) -> tuple[Tensor, Tensor]:
    """All pairs of boxes on a lattice: shared edges, touching, nested, disjoint, identical; some ``empty`` if asked."""
    pick = itertools.combinations_with_replacement if empty else itertools.combinations
    spans = list(pick(range(points), 2))
    boxes = torch.tensor([(x1, y1, x2, y2) for x1, x2 in spans for y1, y2 in spans], dtype=torch.float64)
    n = len(boxes)
    return boxes.repeat_interleave(n, 0), boxes.repeat(n, 1)


def random_boxes(n: int = 200) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    p, g = 100 * torch.rand(2, n, 2, 2, generator=gen, dtype=torch.float64).sort(2).values.flatten(2)
    return p, g


def extreme_boxes(n: int = 100) -> tuple[Tensor, Tensor]:
    """Sides from 1e-8 to 1e8, with one corner close together."""
    gen = torch.Generator().manual_seed(1)
    sides = 10.0 ** torch.randint(-8, 9, (2, n, 2), generator=gen).double()
    shift = torch.rand(2, n, 2, generator=gen, dtype=torch.float64) * sides.min(0).values
    p, g = torch.cat((shift, shift + sides), -1)
    return p, g


EXTENT = (640.0, 384.0)
SMALL_EPS = {"ciou_plus": (1e-16, 1e-16), "iou_log": (3e-7,)}
"""Of the terms whose eps is no area, or that take other numbers."""
SOME_NUMBERS = {"alpha": (0.25, -1.0, 0.0), "gamma": (0.0, 0.5, 1.0, 1.25, 1.5, 2.0), "pos_weight": (2.5,)}


def label_numbers(kind: str, some: dict[str, tuple[float, ...]] = SOME_NUMBERS) -> list[list[float]]:
    """All combinations of ``some`` numbers that a label term takes, and of those that may follow."""
    term = TERMS[kind]
    plain = [some.get(name, (usual, usual / 2)) for name, usual in term.numbers.items()]
    more = [some.get(name, (usual, usual / 2)) for name, usual in term.optional.items()]
    taken = [plain, [*([usual] for usual in term.numbers.values()), *more]] if more else [plain]
    return [list(numbers) for values in taken for numbers in itertools.product(*values)]


def extent_of(kind: str) -> list[float] | None:
    """The width and height of the image, for a term that asks for them."""
    return list(EXTENT) if TERMS[kind].needs_extent else None


def box_loss(kind: str, args: list[float], fused: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """A box term over pairs of boxes, of an image of ``EXTENT`` if it asks for that, unreduced."""
    if fused:
        return lambda p, g: ops.box_loss(p, g, kind, args, "none", extent_of(kind))
    return lambda p, g: reference.BOX_TERMS[kind](p, g, args, torch.tensor(EXTENT, device=p.device))


def check_box_term(kind: str, dtype: torch.dtype = torch.float64, shape: tuple[float, ...] = ()) -> None:
    """Value and both gradients of a box term on lattices, on random boxes, and on boxes of extreme sizes.

    ``shape`` is its alpha and gamma. With alpha < 1 there is no slope where a penalty vanishes: random boxes only.
    """
    # as the kernel sees them
    args = torch.tensor((*SMALL_EPS.get(kind, (1e-7, 1e-6)), *shape)).tolist()
    cases = [random_boxes()]
    if not shape or shape[0] >= 1:
        cases += [extreme_boxes(), lattice(), lattice(3, empty=True)]
    for p, g in cases:
        p, g = p.to(DEVICE, dtype), g.to(DEVICE, dtype)
        got = value_and_grads(box_loss(kind, args, True), p, g)
        want = value_and_grads(box_loss(kind, args, False), p.double(), g.double())
        compare(got[0], want[0], TOLERANCE[dtype])
        for a, b, box in zip(got[1:], want[1:], (p, g), strict=True):
            sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)  # a gradient by the logarithm of a size is of order one
            if kind == "ciou_plus" and box is g:  # the reference leaves out what would drown the rest
                a, b = (torch.where(sides > 0, grad, 0.0) for grad in (a, b))
            sides = torch.where(sides > 0, sides, 1.0)
            compare(a * sides, b * sides, TOLERANCE[dtype])


def check_label_term(kind: str, args: list[float], dtype: torch.dtype = torch.float64) -> None:
    """Value and gradient of a label term, tails and zero included, relative to each entry's own size."""
    gen = torch.Generator().manual_seed(0)
    tails = torch.tensor([0.0, 17.0, 40.0, 120.0, 1e4])
    x = torch.cat((3 * torch.randn(60, generator=gen), tails, -tails)).to(DEVICE, dtype)
    soft = torch.rand(x.shape, generator=gen).to(x)
    near = torch.zeros_like(x, dtype=torch.bool)
    if kind in ("qfl", "sse"):  # what the target misses by has fewer digits, the smaller it is
        near = (soft - x.sigmoid()).abs() < 0.05
    elif kind == "focal":  # its gradient is a sum of two parts, which cancel at some target
        _, d_x = value_and_grads(lambda a: reference.LABEL_TERMS[kind](a, soft.double(), args), x.double())
        near = (d_x.abs() < 2e-3) & (x.abs() < 10)
    soft = torch.where(near, (soft + 0.5) % 1.0, soft)
    for t in (torch.zeros_like(x), torch.ones_like(x), soft):
        got = value_and_grads(lambda a, t=t: ops.label_loss(a, t, kind, args, "none"), x)
        want = value_and_grads(lambda a, t=t: reference.LABEL_TERMS[kind](a, t.double(), args), x.double())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=1e-30)


@triton.jit
def _softmax_kernel(x_ptr, t_ptr, loss_ptr, dx_ptr, n, C, LABEL: tl.constexpr, ROWS: tl.constexpr, C_PAD: tl.constexpr):
    """A label term that goes along rows [n, C], in blocks of ROWS rows, or in a block of one axis for each row."""
    k = tl.arange(0, C_PAD)
    if ROWS:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        k = k[None, :]
        mask = (row < n) & (k < C)
    else:
        row = tl.program_id(0)
        mask = k < C
    at = row * C + k
    x = tl.load(x_ptr + at, mask=mask, other=-1e30)
    t = tl.load(t_ptr + at, mask=mask, other=0.0)
    loss, d_x = LABEL(x, t, ())
    # padding adds nothing: what it holds goes to the first class of its row, or of the last row
    loss = tl.where(mask, loss, 0.0) + tl.sum(tl.where(mask, 0.0, tl.abs(loss) + tl.abs(d_x)))
    tl.store(loss_ptr + at, loss, mask=mask)
    tl.store(dx_ptr + at, d_x, mask=mask)


def check_row_term(kind: str = "softmax_ce", dtype: torch.dtype = torch.float64) -> None:
    """Value and gradient of a label term that goes along rows, for hard and soft targets, relative to each entry's own
    size where it has one.
    """
    gen = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(9, 7, generator=gen, dtype=torch.float64)
    x[1], x[2] = 0.0, torch.tensor([5.0, -1.0, 5.0, 5.0, 0.0, -30.0, -1e4])
    for row, sure in enumerate((17.0, -17.0, 40.0, -120.0, 1e4), 3):
        x[row, row - 3] = sure
    x = x.to(DEVICE, dtype)
    index = torch.arange(9) % 7
    index[3:8] = torch.arange(5)
    hard = torch.nn.functional.one_hot(index, 7)
    soft = torch.rand(9, 7, generator=gen, dtype=torch.float64)
    for t in (hard, hard.roll(1, 1), soft, 0.98 * hard + 0.02 / 7, 0 * hard):
        t = t.to(DEVICE, dtype)
        leaf = x.double().requires_grad_()
        want = reference.LABEL_TERMS[kind](leaf, t.double())
        (want_grad,) = torch.autograd.grad(want.sum(), leaf)
        for rows, c_pad in ((0, 8), (4, 8), (4, 16)):
            loss, d_x = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
            grid = (-(-9 // rows) if rows else 9,)
            _softmax_kernel[grid](x, t, loss, d_x, 9, 7, LABEL=TERMS[kind].kernel, ROWS=rows, C_PAD=c_pad)
            torch.testing.assert_close(loss.double(), want.detach(), rtol=TOLERANCE[dtype], atol=1e-30)
            # a soft target's gradient is a difference of probabilities
            floor = 0.1 * TOLERANCE[dtype] if ((t > 0) & (t < 1)).any() else 1e-30
            torch.testing.assert_close(d_x.double(), want_grad, rtol=TOLERANCE[dtype], atol=floor)


def check_grid(
    preds: list[Tensor],
    rows: Tensor,
    head: GridHead,
    class_weights: Tensor | None = None,
    offsets: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Total, parts, counts and gradients of the grid driver against the float64 reference on the same values."""
    tolerance = TOLERANCE[preds[0].dtype] if tolerance is None else tolerance
    truth = [p.detach().cpu().double().requires_grad_() for p in preds]
    views = [reference.grid_view(p, len(level)) for p, level in zip(truth, head.levels, strict=True)]
    weights = None if class_weights is None else class_weights.cpu()
    total, parts, counts = reference.grid_loss(views, rows.cpu(), head, weights)
    want = torch.autograd.grad(total, truth)

    leaves = [p.detach().requires_grad_() for p in preds]
    got_total, got_parts, got_counts, *_ = ops.grid_loss(leaves, rows, offsets, class_weights, head.key, True, [])
    grad_out = torch.tensor(0.5, dtype=got_total.dtype, device=got_total.device)
    got = torch.autograd.grad(got_total, leaves, grad_out)

    assert got_counts.tolist() == counts.tolist()
    compare(got_total.cpu(), total.detach(), tolerance)
    compare(got_parts[:3].cpu(), parts, tolerance)
    largest = max(_largest(w) for w in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(2 * a.cpu().double(), b, rtol=0, atol=tolerance * largest, equal_nan=True)
