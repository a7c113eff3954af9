"""Half precision is as good as eager PyTorch's; autocast and a GradScaler change nothing; no NaN of finite numbers."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from trust.cases import ALL, BACKENDS, OF_EACH_DRIVER, RECIPES, Problem, Result, step

from fusedyolo.drivers.protocol import POSITIVE, UNIT

SCALE = 2.0**16  # a GradScaler's first one
BEYOND = 1e-5  # of the largest gradient, what a sum in another order may add to the eager reference's own error


def spread(problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Logits to 120 either way, and boxes from a thousandth of a pixel to 1e5 pixels, as far as their type goes."""
    preds = problem.predictions(torch.float64)
    generator = torch.Generator().manual_seed(7)
    found = []
    for pred in preds:
        far = 120 * torch.rand(pred.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        rare = torch.rand(pred.shape, generator=generator).to(DEVICE) < 0.2
        sizes = pred.detach()
        found.append(torch.where(rare, sizes.sign() * far, sizes))
    return [_tamed(problem, i, pred).to(dtype).requires_grad_() for i, pred in enumerate(found)]


def _tamed(problem: Problem, at: int, pred: Tensor) -> Tensor:
    """Sizes whose logarithms are predicted end at 1e5 pixels; distances are positive, fractions at most 1."""
    case, driver = problem.case, problem.case.driver
    head = problem.criterion("torch").head
    pieces = driver.pieces(head, problem.frame) * max(1, len(case.branches))
    each = len(problem.predictions()) // len(pieces)
    values = pieces[at // max(1, each)].values
    if values in (POSITIVE, UNIT):
        return pred.abs() if values == POSITIVE else pred.abs() % 1
    if driver.kind == "grid":
        pred = pred.clone()
        for anchor in range(pred.shape[1] // (5 + head.num_classes)):
            sizes = pred[:, anchor * (5 + head.num_classes) + 2 :][:, :2]
            sizes.clamp_(-9, 9)
    elif head.decode in ("exp", "delta") and pred.shape[1 if driver.kind == "pick" else -1] == 4:
        pred = pred.clamp(-9, 9)
    return pred


def error(got: Result, want: Result, scale: float = 1.0) -> float:
    """Of gradients, relative to the largest entry; where the type overflows, both do."""
    largest = max(float(grad.abs().max()) for grad in want.grads)
    worst = 0.0
    for a, b in zip(got.grads, want.grads, strict=True):
        over = b.abs() * scale > torch.finfo(a.dtype).max
        assert bool((a.isfinite() | over).all())
        worst = max(worst, float(torch.where(over, 0.0, a.double() / scale - b).abs().max()))
    return worst / largest


@RECIPES
def test_float16_under_autocast_and_a_scaler(case):
    """The scale reaches the gradient before it is rounded; the total is float32, and as good as eager's."""
    problem = Problem(case)
    preds, rows = spread(problem, torch.float16), problem.rows(3)
    exact = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        fused = step(problem.bind("triton"), preds, rows, SCALE)
    eager = step(problem.bind("torch"), preds, rows, SCALE)
    assert fused.total.dtype == torch.float32
    assert error(fused, exact, SCALE) <= error(eager, exact, SCALE) + BEYOND
    torch.testing.assert_close(fused.total.double(), exact.total, rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)
def test_bfloat16(case):
    problem = Problem(case)
    preds, rows = spread(problem, torch.bfloat16), problem.rows(3)
    exact = step(problem.bind("torch"), [pred.detach().double() for pred in preds], rows)
    fused, eager = (step(problem.bind(backend), preds, rows) for backend in ("triton", "torch"))
    cut = torch.finfo(torch.bfloat16).eps if DEVICE == "cpu" else 0.0  # the interpreter cuts off what GPUs round
    assert error(fused, exact) <= error(eager, exact) + BEYOND + cut


@BACKENDS
@RECIPES
def test_finite_predictions_have_finite_gradients(case, backend):
    """Numbers of 1e36 among ordinary ones, either way: a total may overflow, but it is no NaN. Beyond a tenth of the
    largest float a box's two distances add up to infinity.
    """
    problem = Problem(case)
    preds, rows = problem.predictions(), problem.rows(3)
    generator = torch.Generator().manual_seed(3)
    head = problem.criterion("torch").head
    pieces = case.driver.pieces(head, problem.frame) * max(1, len(case.branches))
    for pred in preds:
        far = (torch.rand(pred.shape, generator=generator) < 0.15).to(DEVICE)
        huge = torch.where(pred.detach() > 0, 1e36, -1e36)
        if pieces[0].values == UNIT:
            huge = huge.abs()
        pred.data = torch.where(far, huge, pred.data)
    got = step(problem.bind(backend), preds, rows)
    assert not got.total.isnan()
    assert all(bool(grad.isfinite().all()) for grad in got.grads)


@ALL
def test_autocast_leaves_the_reference_alone(case):
    problem = Problem(case)
    preds, rows = problem.predictions(torch.float16), problem.rows(3)
    want = step(problem.bind("torch"), preds, rows)
    with torch.autocast(DEVICE, dtype=torch.float16 if DEVICE == "cuda" else torch.bfloat16):
        got = step(problem.bind("torch"), preds, rows)
    assert torch.equal(got.total, want.total)
    assert all(map(torch.equal, got.grads, want.grads))
