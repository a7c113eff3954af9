"""What a step costs the host, launches aside: Python calls into files of ours, operators of PyTorch, and allocations,
whose number is the same on a loaded machine.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel

import fusedyolo
from fusedyolo import ops, tuned
from fusedyolo.ops import launch
from fusedyolo.ops.launch import Launch, Layout, layout, layouts, planned
from fusedyolo.ops.steps import Outline, Steps
from fusedyolo.tools.registry import CASES, FORMS, Workload, first_recipes

OURS = str(Path(fusedyolo.__file__).parent)
STEPS = [(case.name, form, way) for case in first_recipes() for form in FORMS for way in case.layouts[:2]]

# Python calls of a step in files of ours, what each tensor of predictions may add, and operators of PyTorch and those
# among them that allocate, but for the gradients, of which each tensor has one
CALLS = {"YOLOv1": 52, "YOLOv2": 65, "YOLOv3": 61, "YOLOv4": 61, "ScaledYOLOv4": 62, "YOLOv5": 62, "YOLOv7": 65}
CALLS |= {"RetinaNet": 76, "EfficientDet": 76, "SSD": 77, "FCOS": 76, "YOLOX": 104, "YOLOv8": 101, "E2E": 142}
A_TENSOR = 2
TORCH = dict.fromkeys(("YOLOv2", "YOLOv3", "YOLOv4", "ScaledYOLOv4", "YOLOv5", "YOLOv7"), (10, 7)) | {"YOLOv1": (8, 5)}
TORCH |= dict.fromkeys(("RetinaNet", "EfficientDet", "SSD", "FCOS"), (13, 10))
TORCH |= {"YOLOX": (13, 11), "YOLOv8": (12, 10), "E2E": (15, 13)}
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "zeros", "zeros_like", "new_zeros"}
FUNCTIONS = torch.empty.__self__  # whose methods those are that begin with "torch."
ASK = {"data_ptr", "dim", "size", "stride", "is_contiguous", "numel", "element_size"}  # and launch or make nothing


def _step(loss: Callable[[Any, Any], Tensor], preds: list[Tensor], targets: Any) -> Callable[[], None]:
    def run() -> None:
        for pred in preds:
            pred.grad = None
        loss(preds, targets).backward()

    return run


def steps(name: str, form: str = "packed", way: str = "") -> tuple[Callable[[], None], int]:
    """A step of a loss, and the number of its predictions."""
    case, work = CASES[name], Workload(batch=2, size=64, classes=20, form=form, layout=way)
    loss, geometry = case.build(work.classes, "triton"), case.geometry(work)
    preds, targets = case.predictions(work), case.targets(work)
    packed = case.pack(preds, work)
    mine = _step(lambda _, targets: loss(packed, targets, **geometry).total, preds, targets)
    return mine, len(preds)


def _profiled(run: Callable[[], None], profile: Callable[[Any, str, Any], None]) -> None:
    """A step, once everything has been seen."""
    for _ in range(3):
        run()
    gc.disable()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()


def calls(run: Callable[[], None]) -> int:
    """Python calls into files of ours."""
    found = 0

    def profile(frame: Any, event: str, _argument: Any) -> None:
        nonlocal found
        found += event == "call" and frame.f_code.co_filename.startswith(OURS)

    _profiled(run, profile)
    return found


def operators(run: Callable[[], None]) -> list[str]:
    """Operators of PyTorch that files of ours call, by name."""
    found: list[str] = []

    def profile(frame: Any, event: str, function: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(OURS):
            owner = getattr(function, "__self__", None)
            is_operator = isinstance(owner, Tensor) or owner is FUNCTIONS
            if is_operator and function.__name__ not in ASK:
                found.append(function.__name__)

    _profiled(run, profile)
    return found


def allowed(name: str, tensors: int) -> int:
    """Python calls."""
    return CALLS[name.partition("/")[0]] + A_TENSOR * tensors


class Compiled(CompiledKernel):
    """Stands for what a kernel was compiled to."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, calls: list[Any] | None = None):
        self.calls = calls

    def run(self, x: int, y: int, z: int, *given: Any) -> None:
        if self.calls is not None:
            assert given[:6] == (0, "function", "metadata", None, None, None)  # first the stream, then what hooks want
            self.calls.append(((x, y, z), given[6:]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments: self.calls.append(("by Triton", arguments))


@pytest.fixture
def stubbed(monkeypatch):
    """Kernels are compiled to what does nothing; Triton's own launcher does not count."""
    ops.forget_plans()
    monkeypatch.setattr(Launch, "run", lambda self: Compiled())
    yield
    ops.forget_plans()


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
@pytest.mark.parametrize(("name", "form", "way"), STEPS)
def test_a_step_makes_few_calls(name, form, way, stubbed):
    mine, tensors = steps(name, form, way)
    assert calls(mine) <= allowed(name, tensors)


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
@pytest.mark.parametrize(("name", "form", "way"), STEPS)
def test_a_step_asks_pytorch_for_little(name, form, way, stubbed):
    mine, tensors = steps(name, form, way)
    found = operators(mine)
    most, allocations = TORCH[name.partition("/")[0]]
    assert len(found) <= most + tensors, found
    assert len([each for each in found if each in ALLOCATE]) <= allocations + tensors, found


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


class Kernel:
    """Stands for a kernel: what goes through Triton's launcher, and what is launched without it."""

    arg_names = ("ptr", "M", "record", "left", "SPEC")

    def __init__(self) -> None:
        self.bound: list[dict[str, Any]] = []
        self.calls: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(**arguments: Any) -> Compiled:
            self.bound.append(arguments | {"grid": grid})
            return Compiled(self.calls)

        return run


def plan_of(kernel: Any, grid: Any = (4, 2)) -> Steps:
    """A launch with all that calls may bring."""
    own = Outline()
    several = own.tensors("several", 2)
    record = (several[0], (several[1], own.numbers("gains", 1)), several[0].after(8, torch.int32))
    arguments = {
        "ptr": own.tensor("ptr"),
        "M": own.M,
        "record": record,
        "left": (own.scratch(torch.float32, (3,)), own.scratch_of_rows(torch.int64, 2)),
        "SPEC": 7,
    }
    return own.steps(Launch(kernel, grid, arguments, 32))


def test_a_launch_is_filled_apart_from_its_plan():
    memory, cpu = torch.zeros(64), torch.device("cpu")
    plan = plan_of(Kernel(), lambda M: (M + 1,))
    for M in (5, 6):
        several = [memory, None]
        (filled,) = plan.launches(cpu, M, ptr=memory, several=several, gains=[0.5])
        assert filled.grid == (M + 1,)
        found = filled.arguments
        assert found["ptr"] is memory
        assert (found["M"], found["SPEC"]) == (M, 7)
        assert found["record"][0] is memory
        assert found["record"][1] == (None, (0.5,))
        assert (found["record"][2].data_ptr(), found["record"][2].dtype) == (memory.data_ptr() + 8, torch.int32)
        assert [(each.shape, each.dtype) for each in found["left"]] == [((3,), torch.float32), ((M, 2), torch.int64)]


def test_a_kernel_is_bound_once_for_what_it_is_compiled_for(monkeypatch):
    kernel, memory, cpu = Kernel(), torch.zeros(64), torch.device("cpu")
    plan = plan_of(kernel)

    def bound(plan: Steps = plan, M: int = 5, **change: Any) -> int:
        """How often, of two launches of a call, the kernel is bound by Triton."""
        before = len(kernel.bound)
        for _ in range(2):
            plan.run(cpu, M, **{"ptr": memory, "several": (memory[4:], None), "gains": [0.5], **change})
        return len(kernel.bound) - before

    assert bound() == 1
    ((grid, (ptr, M, record, left, spec)),) = kernel.calls
    assert (grid, ptr, M, spec) == ((4, 2, 1), memory.data_ptr(), 5, 7)
    assert record == (ptr + 16, (None, (0.5,)), ptr + 24)
    assert left[0] % 16 == 0
    assert left[1] - left[0] == 16
    assert bound(M=7, several=(memory[8:], None), gains=[0.25]) == 0  # the same code
    for change in (
        {"ptr": memory[1:]},
        {"ptr": memory.double()},
        {"M": 1},
        {"M": 16},
        {"several": (memory, memory)},
        {"gains": [1]},
        {"gains": [16]},
        {"gains": [2**31 + 1]},
    ):
        assert (bound(**change), bound(**change)) == (1, 0), change
    assert bound(plan_of(kernel, (9,))) == 1
    assert kernel.calls[-1][0] == (9, 1, 1)
    monkeypatch.setattr(torch.version, "hip", "7")  # code hangs on more there
    assert bound() == 2


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_see_every_launch(name, monkeypatch):
    """Those of its profiler, which Triton calls where it launches itself."""
    kernel, memory, hook = Kernel(), torch.zeros(64), lambda metadata: None
    plan, hooks = plan_of(kernel), getattr(knobs.runtime, name)
    ways = []
    for calls in ([hook], []):
        monkeypatch.setattr(hooks, "calls", calls)
        for _ in range(2):
            plan.run(torch.device("cpu"), 5, ptr=memory, several=(memory, None), gains=[0.5])
        ways.append(kernel.calls[-1][0])
    assert ways == ["by Triton", (4, 2, 1)]


@pytest.mark.parametrize("M", [0, 1, 15, 16, 17, 1000])
def test_scratch_is_one_allocation_of_pieces_apart(M):
    own = Outline()
    shapes = [(torch.int32, (3,)), (torch.int64, (5, 7)), (torch.float32, (0, 4))]
    slots = [own.scratch(*each) for each in shapes]
    slots += [
        own.scratch_of_rows(torch.int32),
        own.scratch_of_rows(torch.float64, 3),
        own.scratch_of_rows(torch.int8, 5),
    ]
    slots += [own.scratch(torch.float32, (1,), 3), own.scratch(torch.int8, (1,))]
    plan = own.steps(Launch(Kernel(), (1,), {**dict.fromkeys(Kernel.arg_names), "left": tuple(slots)}, 32))
    memory, places = plan._scratch(torch.device("cpu"), M)
    (filled,) = plan.launches(torch.device("cpu"), M)
    end = memory.data_ptr()
    for start, piece in sorted(zip(places, filled.arguments["left"], strict=True), key=lambda pair: pair[0]):
        assert start >= end or not piece.numel()
        assert start % 16 == memory.data_ptr() % 16
        end = max(end, start + piece.nbytes)
    assert end <= memory.data_ptr() + memory.nbytes


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
        elif isinstance(item, dict | list | tuple | Launch | Steps) or "lru" in type(item).__name__:
            todo += gc.get_referents(item)
        elif (
            isinstance(item, FunctionType) and item.__name__ == "<lambda>"
        ):  # of a grid, or what puts addresses in place
            todo += [item.__globals__.get("constants"), item.__closure__]
        elif isinstance(item, CellType):
            todo.append(item.cell_contents)
    return found


@pytest.mark.interpreter("launches are stubbed: what would run does not matter")
def test_plans_hold_no_tensor(stubbed):
    """They outlive a step, and so would its memory, or that of a graph that was captured meanwhile."""
    ops.forget_plans()
    for name in ("YOLOv1/paper", "YOLOv5", "SSD", "YOLOv8"):
        steps(name)[0]()
    kept = [plans for plans in launch._plans if plans.cache_info().currsize]
    assert kept
    assert not any(_tensors(plans) for plans in kept)
    holding = lru_cache(maxsize=4)(lambda n: Launch(None, (1,), {"ptr": torch.zeros(n)}, 32))
    holding(1)
    assert len(_tensors(holding)) == 1
