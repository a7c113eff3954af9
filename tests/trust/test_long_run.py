"""Many steps: nothing grows, and the weights that kernels and reference train stay together. And crowds."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from test_crowds import Watch
from torch import Tensor, nn
from trust.cases import ALL, OF_EACH_DRIVER, RECIPES, Problem, step

from fusedyolo.ops import launch
from fusedyolo.ops.launch import shared_zeros
from fusedyolo.ops.steps import Steps
from fusedyolo.reference.pairs import PAIRS_CHUNK
from fusedyolo.targets import Targets

SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2)]  # of maps, times those of a small problem


def batches(problem: Problem, steps: int, most: int):
    """Images of random sizes with 0 to ``most`` objects, as packed rows or with room for 300."""
    generator = torch.Generator().manual_seed(5)

    def draw(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    for i in range(steps):
        tall, wide = SIZES[draw(len(SIZES))]
        maps = problem.maps if problem.case.grid else tuple((h * tall, w * wide) for h, w in problem.maps)
        now = replace(problem, maps=maps)
        rows = now.rows(draw(most + 1), seed=i)
        yield now, Targets.from_packed(rows, now.batch, capacity=300) if i % 2 else rows


class Weights(nn.Module):
    """A factor and a summand for each channel of predictions, which are otherwise random."""

    def __init__(self, problem: Problem):
        super().__init__()
        self.channel = [_channel(problem, pred) for pred in problem.predictions()]
        wide = [pred.shape[c] for c, pred in zip(self.channel, problem.predictions(), strict=True)]
        self.factor = nn.ParameterList(nn.Parameter(torch.ones(n, device=DEVICE)) for n in wide)
        self.summand = nn.ParameterList(nn.Parameter(torch.zeros(n, device=DEVICE)) for n in wide)

    def forward(self, preds: list[Tensor]) -> list[Tensor]:
        found = []
        for channel, pred, a, b in zip(self.channel, preds, self.factor, self.summand, strict=True):
            shape = [-1 if i == channel else 1 for i in range(pred.dim())]
            found.append(pred.detach() * a.view(shape) + b.view(shape))
        return found


def _channel(problem: Problem, pred: Tensor) -> int:
    """The axis of channels."""
    return -1 % pred.dim() if problem.case.driver.kind in ("dense", "cell") else 1


def trained(problem: Problem, backend: str, steps: int, most: int) -> list[Tensor]:
    """The weights after so many steps of gradient descent."""
    weights, criterion = Weights(problem), problem.criterion(backend)
    optimizer = torch.optim.SGD(weights.parameters(), lr=1e-4, momentum=0.9)
    for i, (now, targets) in enumerate(batches(problem, steps, most)):
        preds = weights(now.predictions(seed=i))
        out = criterion(now.pack(preds), targets, **now.geometry)
        optimizer.zero_grad()
        out.total.backward()
        nn.utils.clip_grad_norm_(weights.parameters(), 10.0)
        optimizer.step()
    return [parameter.detach() for parameter in weights.parameters()]


def together(case, steps: int, most: int) -> None:
    problem = Problem(case, batch=1)
    found = [trained(problem, backend, steps, most) for backend in ("triton", "torch")]
    moved = max(float((b - round(float(b.mean()))).abs().max()) for b in found[1])
    assert moved > 1e-5
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3 * moved)


@pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)
def test_weights_stay_together(case):
    together(case, 2, 3)


@pytest.mark.long
@ALL
def test_weights_stay_together_in_a_long_run(case, request):
    together(case, request.config.getoption("--steps"), 300)


def _alive() -> int:
    gc.collect()
    return sum(isinstance(each, Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)
def test_nothing_grows(case, monkeypatch):
    """Over sixty steps, the last forty of which meet no map that is new: no tensor, no shared memory. Of plans there
    are so many for each size of maps, with more for each 32 objects where anchors keep who claims them.
    """
    monkeypatch.setattr(Steps, "run", lambda self, device, M, **given: None)
    launch.forget_plans()
    problem = Problem(case)
    criterion = problem.criterion("triton")
    found = []
    for i, (now, targets) in enumerate(batches(problem, 60, 300)):
        leaves = now.predictions()
        criterion(now.pack(leaves), targets, **now.geometry).total.backward()
        del leaves, targets
        if i in (19, 59):
            found.append((_alive(), [zeros.numel() for zeros in shared_zeros()]))
    assert found[0] == found[1]
    branches = max(1, len(case.branches))
    assert sum(find.cache_info().currsize for find in launch._plans) <= 16 * len(SIZES) * branches


@RECIPES
def test_crowds_take_memory_of_the_predictions(case):
    """The reference of 5,000 objects in an image: pairs of these and predictions are looked at in chunks, of which the
    largest has four numbers a pair.
    """
    problem, scale = Problem(case, batch=1), 4 if case.grid else 8
    problem = replace(problem, maps=tuple((h * scale, w * scale) for h, w in problem.maps))
    rows, preds = problem.rows(5000), problem.predictions()
    assert len(rows) * 256 > 4 * PAIRS_CHUNK
    with Watch() as watch:
        got = step(problem.bind("torch"), preds, rows)
    assert got.total.isfinite()
    assert got.counts[0] > 0
    assert watch.largest <= 4 * PAIRS_CHUNK
