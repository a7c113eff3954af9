"""Graphs: what is compiled or exported is what runs eagerly, once for all sizes; and nothing waits, or lives on.

Kernels are left out where they have no part in what is asked, which is how often something is traced.
"""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from conftest import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode
from trust.cases import ALL, BACKENDS, CASES, OF_EACH_DRIVER, RECIPES, Problem, Result, same_bits, step

from bench.count import count
from fusedyolo import ops
from fusedyolo.ops.launch import shared_zeros
from fusedyolo.ops.steps import Steps
from fusedyolo.targets import Targets

EACH = pytest.mark.parametrize("case", OF_EACH_DRIVER, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def no_kernels(monkeypatch):
    """Launches do nothing."""
    monkeypatch.setattr(Steps, "run", lambda self, device, M, **given: None)


def compiled_step(problem: Problem, compiled: Any, rows: Any) -> Result:
    return step(
        lambda preds, targets: compiled(problem.pack(preds), targets, **problem.geometry), _preds(problem), rows
    )


def _preds(problem: Problem) -> list[torch.Tensor]:
    return problem.predictions(seed=1)


def _run(problem: Problem, compiled: Any, objects: int) -> None:
    compiled(problem.pack(problem.predictions()), problem.rows(objects), **problem.geometry)


@RECIPES
def test_compiled_equals_eager_and_compiles_once(case, monkeypatch):
    """For any number of objects and any maps: the ninth of each is not refused. No two sizes are equal at first, which
    PyTorch would take for the same.
    """
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = Problem(case)
    if not case.grid:
        problem = replace(problem, maps=tuple((h * 7 // 2, w * 13 // 2) for h, w in problem.maps))
    rows = problem.rows(11)
    compiled = torch.compile(problem.criterion("triton").eval(), fullgraph=True, dynamic=True, backend=counter)
    got, want = compiled_step(problem, compiled, rows), step(problem.bind("triton"), _preds(problem), rows)
    assert same_bits(got, want)
    monkeypatch.setattr(Steps, "run", lambda self, device, M, **given: None)
    for objects in range(2, 14):
        _run(problem, compiled, objects)
    for k in range(2, 12) if not case.grid else ():
        _run(replace(problem, maps=tuple((h * k, w * (k + 1)) for h, w in problem.maps)), compiled, 11)
    assert counter.frame_count <= 2


@pytest.mark.long
@ALL
def test_sizes_become_symbols_when_they_change(case, no_kernels):
    """Once for each of objects and maps, and for no and for one object. Most losses have the number of images as a
    constant, a graph each.
    """
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = Problem(case)
    compiled = torch.compile(problem.criterion("triton").eval(), fullgraph=True, backend=counter)
    for objects in (5, 2, 3, 4, 6, 7, 8, 9, 10, 11):
        _run(problem, compiled, objects)
    assert counter.frame_count <= 2
    for k in range(2, 12) if not case.grid else ():
        _run(replace(problem, maps=tuple((h * k, w * (k + 1)) for h, w in problem.maps)), compiled, 4)
    assert counter.frame_count <= 3
    _run(replace(problem, batch=3), compiled, 4)
    assert counter.frame_count <= 5
    for objects in (0, 1):
        _run(problem, compiled, objects)
    assert counter.frame_count <= 7


@RECIPES
def test_opcheck(case, no_kernels, monkeypatch):
    """Schema, fake and traces of the operator that a loss calls, as it calls it; memory comes as zeros."""
    for owner, name, cleared in (
        (torch.Tensor, "new_empty", torch.Tensor.new_zeros),
        (torch, "empty_like", torch.zeros_like),
    ):
        monkeypatch.setattr(owner, name, cleared)
    called: list[Any] = []
    through = ops.call

    def watched(op: Any, *given: Any, **options: Any) -> Any:
        called.append((op, given))
        return through(op, *given, **options)

    monkeypatch.setattr(ops, "call", watched)
    problem = Problem(case)
    problem.bind("triton")(_preds(problem), problem.rows(4))
    assert len(called) == 1
    op, given = called[-1]
    tests = "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    assert set(torch.library.opcheck(op, given, test_utils=tests).values()) == {"SUCCESS"}


@EACH
def test_exports(case, no_kernels):
    """Of one operator, beside what makes its arguments; of ordinary sizes, and again of others."""

    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = problem.criterion("triton")

        def forward(self, preds, targets):
            return self.criterion(problem.pack(preds), targets, **problem.geometry).total

    problem = Problem(case)
    preds = [pred.detach() for pred in _preds(problem)]
    exported = torch.export.export(Module(), (preds, problem.rows(4)), strict=False)
    called = [str(node.target) for node in exported.graph.nodes if "fusedyolo" in str(node.target)]
    assert len(called) == 1
    assert called[0].endswith("_loss.default")
    assert exported.module()(preds, problem.rows(4, seed=1)).shape == ()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["torch", "triton"])
@EACH
def test_inductor(case, backend):
    problem = Problem(case, batch=1)
    compiled = torch.compile(problem.criterion(backend), fullgraph=True)
    for objects in (3, 5, 2):
        rows = problem.rows(objects)
        got, want = compiled_step(problem, compiled, rows), step(problem.bind(backend), _preds(problem), rows)
        assert got.counts == want.counts
        for a, b in zip(got.tensors, want.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@RECIPES
def test_the_reference_compiles_once(case):
    """For nine numbers of objects."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    problem = Problem(case)
    compiled = torch.compile(problem.criterion("torch").eval(), fullgraph=True, backend=counter)
    for objects in (5, 2, 3, 4, 6, 7, 8, 9, 10, 11):
        rows = problem.rows(objects)
        got, want = compiled_step(problem, compiled, rows), step(problem.bind("torch"), _preds(problem), rows)
        assert got.counts == want.counts
        for a, b in zip(got.tensors, want.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count <= 2


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@ALL
def test_reduce_overhead(case):
    problem = Problem(case)
    compiled = torch.compile(problem.criterion("triton"), fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        targets = Targets.from_packed(problem.rows(4, seed), problem.batch, capacity=16)
        got, want = compiled_step(problem, compiled, targets), step(problem.bind("triton"), _preds(problem), targets)
        assert same_bits(got, want)


class _Allocated(TorchDispatchMode):
    """Sizes of all that operators return, and what of it is still there."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[str, tuple[int, ...]]] = []
        self.made: list[weakref.ref] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.sizes.append((str(func), tuple(tensor.shape)))
                self.made.append(weakref.ref(tensor))
        return out


@BACKENDS
@ALL
def test_nothing_waits(case, backend, no_kernels, monkeypatch):
    """No ``.item()``, no copy to the host, no shape that depends on data: on a meta device there is none to look at."""
    problem = Problem(case)
    targets = Targets.from_packed(problem.rows(6), problem.batch)
    loss = problem.bind(backend)
    preds = _preds(problem)
    if backend == "triton":
        counts = count(lambda: loss(preds, targets).total.backward())
        assert counts.syncs == 0
        return
    meta = [pred.detach().to("meta").requires_grad_() for pred in preds]
    targets = Targets(targets.rows.to("meta"), targets.offsets.to("meta"), problem.batch)
    geometry = {name: value.to("meta") if name == "anchors" else value for name, value in problem.geometry.items()}
    loss = problem.criterion(backend)
    out = loss(problem.pack(meta), targets, **geometry)
    out.total.backward()
    assert all(pred.grad.shape == pred.shape for pred in meta)


@ALL
def test_nothing_is_allocated_by_data_or_lives_on(case, no_kernels):
    """Of rows with room for as many, whatever they say, the same sizes; and all are gone but the counters' zeros."""
    problem = Problem(case)
    found = []
    for objects in (0, 12):
        targets = Targets.from_packed(problem.rows(objects), problem.batch, capacity=16)
        loss, preds, mode = problem.bind("triton"), _preds(problem), _Allocated()
        with mode:
            out = loss(preds, targets)
            torch.autograd.grad(out.total, preds)
        del out, preds, loss, targets
        gc.collect()
        kept = {id(zeros) for zeros in shared_zeros()}
        assert all(ref() is None or id(ref()) in kept for ref in mode.made)
        found.append(mode.sizes)
    assert found[0] == found[1]


def test_each_driver_is_asked():
    assert {case.driver.kind for case in OF_EACH_DRIVER} == {case.driver.kind for case in CASES.values()}
