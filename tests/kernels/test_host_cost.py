"""What a step costs the host, launches aside, in Python calls into files of ours: their number is the same on a loaded
machine.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.compiler import CompiledKernel

import fusedyolo
from fusedyolo import ops, tuned
from fusedyolo.ops import launch
from fusedyolo.ops.launch import Launch, Layout, layout, layouts, planned
from fusedyolo.tools.registry import CASES, FORMS, Workload, first_recipes

OURS = str(Path(fusedyolo.__file__).parent)
STEPS = [(case.name, form, way) for case in first_recipes() for form in FORMS for way in case.layouts[:2]]

# Python calls of a step in files of ours, and what each tensor of predictions may add
CALLS = {"YOLOv1": 44, "YOLOv2": 66, "YOLOv3": 62, "YOLOv4": 62, "ScaledYOLOv4": 63, "YOLOv5": 63}
CALLS |= {"RetinaNet": 102, "SSD": 107, "FCOS": 98, "YOLOX": 163, "YOLOv8": 154, "E2E": 309}
A_TENSOR = 2


def _step(loss: Callable[[Any, Any], Tensor], preds: list[Tensor], targets: Any) -> Callable[[], None]:
    def run() -> None:
        for pred in preds:
            pred.grad = None
        loss(preds, targets).backward()

    return run


def steps(name: str, form: str = "packed", way: str = "") -> tuple[Callable[[], None], int]:
    """A step of a loss, and the number of its predictions."""
    case, work = CASES[name], Workload(batch=2, size=64, classes=20, form=form, layout=way)
    loss = case.bind(case.build(work.classes, "triton"), work)
    preds, targets = case.predictions(work), case.targets(work)
    mine = _step(lambda preds, targets: loss(preds, targets).total, preds, targets)
    return mine, len(preds)


def calls(run: Callable[[], None]) -> int:
    """Python calls into files of ours, once everything has been seen."""
    for _ in range(3):
        run()
    found = 0

    def profile(frame: Any, event: str, _argument: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(OURS)

    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return found


def allowed(name: str, tensors: int) -> int:
    """Python calls."""
    return CALLS[name.partition("/")[0]] + A_TENSOR * tensors


@pytest.fixture
def stubbed(monkeypatch):
    """Launches do nothing; Triton's own launcher does not count."""
    monkeypatch.setattr(Launch, "run", lambda self: None)


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
@pytest.mark.parametrize(("name", "form", "way"), STEPS)
def test_a_step_makes_few_calls(name, form, way, stubbed):
    mine, tensors = steps(name, form, way)
    assert calls(mine) <= allowed(name, tensors)


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
@pytest.mark.parametrize("name", [case.name for case in first_recipes()])
def test_calls_show_what_is_computed_anew(name, stubbed):
    """A step that makes its plans again is one that the test above refuses."""
    mine, tensors = steps(name)

    def forgetful() -> None:
        ops.forget_plans()
        mine()

    assert calls(forgetful) > allowed(name, tensors)


# ---- plans


def test_a_plan_is_made_once_and_again_when_measurements_change():
    made = []

    @planned
    def plan(key: str, at: Layout) -> Launch:
        made.append(key)
        return Launch(None, (1,), {"shape": at.shape}, 32)

    a, b = torch.empty(2, 3), torch.empty(2, 3)
    first = plan("a", layout(a))
    assert plan("a", layout(b)) is first
    assert plan("b", layout(a)) is not first
    assert plan("a", layout(a.t())) is not first
    assert plan("a", layout(a.double())) is not first
    assert plan("a", layout(a.to("meta"))) is not first
    assert len(made) == 5
    with tuned.forced((("threads", 64),)):
        assert plan("a", layout(a)) is not first
    again = plan("a", layout(a))
    assert again is plan("a", layout(b))
    tuned.forget()
    assert plan("a", layout(a)) is not again
    ops.forget_plans()
    assert len(made) == 8


def test_a_launch_is_filled_apart_from_its_plan():
    plan = Launch("kernel", (4,), {"n": 1}, 64, 96, exact=True, stages=2)
    filled = plan.filled({"ptr": "a"})
    assert filled.arguments == {"n": 1, "ptr": "a"}
    assert plan.arguments == {"n": 1}
    same = ("kernel", "grid", "threads", "max_registers", "exact", "stages")
    assert all(getattr(filled, name) == getattr(plan, name) for name in same)


class Compiled(CompiledKernel):
    """Stands for what a kernel was compiled to."""

    def __init__(self, calls: list[Any]):
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append((grid, arguments))


class Kernel:
    """Stands for a kernel: what goes through Triton's launcher, and what is launched without it."""

    arg_names = ("ptr", "M", "record", "SPEC")

    def __init__(self) -> None:
        self.bound: list[dict[str, Any]] = []
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(**arguments: Any) -> Compiled:
            self.bound.append(arguments)
            return Compiled(self.calls)

        return run


def test_a_kernel_is_bound_once_for_what_it_is_compiled_for(monkeypatch):
    kernel, memory = Kernel(), torch.zeros(64)
    plan = Launch(kernel, (4, 2), {"SPEC": 7}, 32)

    def bound(plan: Launch = plan, **change: Any) -> int:
        """How often, of two launches of a call, the kernel is bound by Triton."""
        before = len(kernel.bound)
        for _ in range(2):
            plan.filled({"ptr": memory, "M": 5, "record": (memory[4:], None, 0.5), **change}).run()
        return len(kernel.bound) - before

    assert bound() == 1
    assert kernel.calls == [((4, 2, 1), (memory.data_ptr(), 5, (memory.data_ptr() + 16, None, 0.5), 7))]
    assert bound(M=7, record=(memory[8:], None, 0.25)) == 0  # the same code
    for change in (
        {"ptr": memory[1:]},
        {"ptr": memory.double()},
        {"M": 1},
        {"M": 16},
        {"M": 2**31 + 1},
        {"record": (memory, memory, 0.5)},
    ):
        assert (bound(**change), bound(**change)) == (1, 0), change
    assert bound(replace(plan, grid=(9,))) == 0
    assert kernel.calls[-1][0] == (9, 1, 1)
    assert bound(replace(plan, arguments={"SPEC": 8}, compiled={})) == 1
    monkeypatch.setattr(torch.version, "hip", "7")  # code hangs on more there
    assert bound() == 2


def test_a_layout_is_that_of_its_tensor():
    view = torch.empty(4, 6, 8).permute(2, 0, 1)[::2]
    at = layout(view)
    assert (at.meta().shape, at.meta().stride(), at.meta().dtype) == (view.shape, view.stride(), view.dtype)
    assert layouts([view, view]) == (at, at)


def _tensors(root: Any) -> list[Tensor]:
    """Those that are held by what is kept in a cache."""
    seen, found, todo = set(), [], [root]
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple | Launch) or "lru" in type(item).__name__:
            todo += gc.get_referents(item)
    return found


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
def test_plans_hold_no_tensor(stubbed):
    """They outlive a step, and so would its memory, or that of a graph that was captured meanwhile."""
    ops.forget_plans()
    for name in ("YOLOv1/paper", "YOLOv5", "SSD"):
        steps(name)[0]()
    kept = [plans for plans in launch._plans if plans.cache_info().currsize]
    assert kept
    assert not any(_tensors(plans) for plans in kept)
    holding = lru_cache(maxsize=4)(lambda n: Launch(None, (1,), {"ptr": torch.zeros(n)}, 32))
    holding(1)
    assert len(_tensors(holding)) == 1
