"""What a kernel must agree with, and how closely: used on the real terms and, to test the tests, on broken ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from conftest import DEVICE
from torch import Tensor

from fusedyolo import ops, reference
from fusedyolo.heads import GridHead

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


def lattice() -> tuple[Tensor, Tensor]:
    """All pairs of boxes on a 4 x 4 lattice: shared edges, touching, nested, disjoint, identical."""
    spans = list(itertools.combinations(range(4), 2))
    boxes = torch.tensor([(x1, y1, x2, y2) for x1, x2 in spans for y1, y2 in spans], dtype=torch.float64)
    n = len(boxes)
    return boxes.repeat_interleave(n, 0), boxes.repeat(n, 1)


def check_box_term(kind: str, dtype: torch.dtype = torch.float64) -> None:
    """Value and both gradients of a box term on the lattice, on random boxes, and on boxes of extreme sizes."""
    gen = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 200, 2, 2, generator=gen, dtype=torch.float64).sort(2).values.flatten(2)
    extreme = 10.0 ** torch.randint(-8, 9, (2, 100, 2), generator=gen).double()
    shift = torch.rand(2, 100, 2, generator=gen, dtype=torch.float64) * extreme.min(0).values
    extreme = torch.cat((shift, shift + extreme), -1)
    for p, g in (lattice(), tuple(100 * corners), tuple(extreme)):
        p, g = p.to(DEVICE, dtype), g.to(DEVICE, dtype)
        # eps and the truth's inputs as the kernel sees them
        eps = [torch.tensor(1e-7).item(), torch.tensor(1e-6).item()]
        got = value_and_grads(lambda a, b, eps=eps: ops.box_loss(a, b, kind, eps, "none"), p, g)
        want = value_and_grads(lambda a, b, eps=eps: reference.BOX_TERMS[kind](a, b, eps), p.double(), g.double())
        compare(got[0], want[0], TOLERANCE[dtype])
        for a, b, box in zip(got[1:], want[1:], (p, g), strict=True):
            sides = (box[:, 2:] - box[:, :2]).repeat(1, 2)  # a gradient by the logarithm of a size is of order one
            compare(a * sides, b * sides, TOLERANCE[dtype])


def check_label_term(kind: str, args: list[float], dtype: torch.dtype = torch.float64) -> None:
    """Value and gradient of a label term, tails and zero included, relative to each entry's own size."""
    gen = torch.Generator().manual_seed(0)
    tails = torch.tensor([0.0, 17.0, 40.0, 120.0, 1e4])
    x = torch.cat((3 * torch.randn(60, generator=gen), tails, -tails)).to(DEVICE, dtype)
    for t in (torch.zeros_like(x), torch.ones_like(x), torch.rand(x.shape, generator=gen).to(x)):
        got = value_and_grads(lambda a, t=t: ops.label_loss(a, t, kind, args, "none"), x)
        want = value_and_grads(lambda a, t=t: reference.LABEL_TERMS[kind](a, t.double(), args), x.double())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=1e-30)


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
    got_total, got_parts, got_counts, _state = ops.grid_loss(leaves, rows, offsets, class_weights, head.key, True)
    grad_out = torch.tensor(0.5, dtype=got_total.dtype, device=got_total.device)
    got = torch.autograd.grad(got_total, leaves, grad_out)

    assert got_counts.tolist() == counts.tolist()
    compare(got_total.cpu(), total.detach(), tolerance)
    compare(got_parts.cpu(), parts, tolerance)
    largest = max(_largest(w) for w in want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(2 * a.cpu().double(), b, rtol=0, atol=tolerance * largest, equal_nan=True)
