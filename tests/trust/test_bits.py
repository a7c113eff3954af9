"""The same bits: run again, of images in another order, and of rows among which others can be none."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from trust.cases import ALL, CASES, OF_EACH_DRIVER, RECIPES, Problem, Result, same_bits, step

from fusedyolo.targets import Targets

NAN, INF = float("nan"), float("inf")


@lru_cache
def usual(name: str) -> Result:
    """A step by the kernels, once for all tests."""
    problem = Problem(CASES[name])
    return step(problem.bind("triton"), problem.predictions(), problem.rows(3))


@pytest.fixture
def deterministic():
    """PyTorch refuses operators that are not deterministic, and fills memory that is left empty."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@RECIPES
def test_runs_are_bit_identical(case, deterministic):
    problem = Problem(case)
    assert same_bits(step(problem.bind("triton"), problem.predictions(), problem.rows(3)), usual(case.name))


@ALL
def test_runs_of_the_reference_are_bit_identical(case, deterministic):
    problem = Problem(case)
    first, second = (step(problem.bind("torch"), problem.predictions(), problem.rows(3)) for _ in range(2))
    assert same_bits(first, second)


def turned(problem: Problem) -> tuple[list[Tensor], Tensor]:
    """The images in reverse order."""
    preds = [pred.detach().flip(0).requires_grad_() for pred in problem.predictions()]
    rows = problem.rows(3)
    rows[:, 0] = problem.batch - 1 - rows[:, 0]
    return preds, rows


@RECIPES
def test_permuted_batches_have_permuted_gradients(case):
    problem, want = Problem(case), usual(case.name)
    got = step(problem.bind("triton"), *turned(problem))
    assert got.counts == want.counts
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    for a, b in zip(got.grads, want.grads, strict=True):
        assert torch.equal(a.flip(0), b)


@ALL
def test_permuted_batches_of_the_reference(case):
    problem = Problem(case)
    want = step(problem.bind("torch"), problem.predictions(), problem.rows(3))
    got = step(problem.bind("torch"), *turned(problem))
    assert got.counts == want.counts
    torch.testing.assert_close(got.total, want.total, rtol=1e-6, atol=0)
    for a, b in zip(got.grads, want.grads, strict=True):
        torch.testing.assert_close(a.flip(0), b, rtol=1e-5, atol=1e-7)


def faulty(problem: Problem, rows: Tensor) -> tuple[Tensor, int]:
    """The rows, and before, between and behind them such as can be none; and how many of these."""
    first, behind = problem.labels
    every = [(0, NAN), (1, INF), (2, NAN), (3, -INF), (4, INF), (5, NAN), (0, -1.0), (0, float(problem.batch))]
    every += [(0, 1e30), (1, first - 1.0), (1, float(behind)), (2, 1.5), (3, -1e-3), (2, 1e30), (4, 0.0), (5, -1e30)]
    bad = rows[:1].repeat(len(every), 1)
    for i, (column, value) in enumerate(every):
        bad[i, column] = value
    third = len(every) // 3
    return torch.cat((bad[:third], rows[:2], bad[third : 2 * third], rows[2:], bad[2 * third :])), len(every)


@RECIPES
def test_faulty_rows_touch_nothing(case):
    problem, want = Problem(case), usual(case.name)
    rows, count = faulty(problem, problem.rows(3))
    got = step(problem.bind("triton"), problem.predictions(), rows)
    assert got.counts == (want.counts[0], count)
    got.counts = want.counts
    assert same_bits(got, want)


@ALL
def test_faulty_rows_touch_nothing_in_the_reference(case):
    problem = Problem(case)
    rows, count = faulty(problem, problem.rows(3))
    want = step(problem.bind("torch"), problem.predictions(), problem.rows(3))
    for targets in (rows, Targets.from_packed(rows, problem.batch, capacity=len(rows) + 3)):
        got = step(problem.bind("torch"), problem.predictions(), targets)
        assert got.counts == (want.counts[0], count)
        for a, b in zip(got.tensors, want.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)
def test_offsets_that_are_wrong(case):
    """Below 0, far beyond the rows, or unsorted: cut to the rows and counted, by both backends alike."""
    problem = Problem(case)
    targets = Targets.from_packed(problem.rows(3), problem.batch)
    targets.offsets.copy_(torch.tensor([-7, 2**31 - 1, 1, 3], dtype=torch.int32))
    got, want = (step(problem.bind(backend), problem.predictions(), targets) for backend in ("triton", "torch"))
    assert got.counts == want.counts
    assert want.counts[1] > 0
    for a, b in zip(got.tensors, want.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)
def test_images_that_lie_2_to_the_31_numbers_apart(case):
    """Addresses that only fit 64 bits; of memory that is reserved, and touched where there are images alone."""
    problem = Problem(case)
    near, far = [pred.detach() for pred in problem.predictions(torch.float16)], []
    for pred in near:
        try:
            room = torch.empty(2**31 + pred[0].numel(), dtype=pred.dtype, device=pred.device)
        except RuntimeError:
            pytest.skip("cannot reserve 4 GiB of addresses")
        far.append(room.as_strided(pred.shape, (2**31, *pred.stride()[1:])).copy_(pred))
    want, got = (step(problem.bind("triton"), preds, problem.rows(3)) for preds in (near, far))
    assert got.counts == want.counts
    for a, b in zip(got.tensors, want.tensors, strict=True):  # sums of another layout may have another order
        torch.testing.assert_close(a, b, rtol=1e-3 if a.dtype == torch.float16 else 1e-5, atol=1e-7)
