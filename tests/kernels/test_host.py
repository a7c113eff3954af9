"""The host's side of launches: which device they go to, and the zeros that they share."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from conftest import DEVICE
from fusedyolo.kernels import select as kernels
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.compiler import CompiledKernel

import fusedyolo
from fusedyolo import detections, functional, ops, tuned
from fusedyolo.operator import FUNCTIONS
from fusedyolo.ops import launch
from fusedyolo.ops.launch import Launch

ROWS = ((0, 1, 0.4, 0.4, 0.3, 0.4), (0, 2, 0.6, 0.7, 0.2, 0.2), (1, 0, 0.3, 0.6, 0.5, 0.3))


def loss(kind: str, **options: Any) -> Any:
    """A small criterion on Triton."""
    options = {"backend": "triton", **options}
    if kind == "yolov5":
        return fusedyolo.YOLOv5Loss([[(10, 13)], [(30, 61)]], (8, 16), 3, **options)
    if kind == "yolov4":
        return fusedyolo.YOLOv4Loss([[(10, 13)], [(30, 61)]], (8, 16), 3, recipe="darknet", **options)
    if kind == "yolov1":
        return fusedyolo.YOLOv1Loss(3, **options)
    if kind in PICKS:
        return {"yolox": fusedyolo.YOLOXLoss, "yolov8": fusedyolo.YOLOv8Loss}[kind](3, (8, 16), **options)
    make = {"retinanet": fusedyolo.RetinaNetLoss, "ssd": fusedyolo.SSDLoss, "fcos": fusedyolo.FCOSLoss}[kind]
    return make(3, image_size=(64, 64), **options)


DENSE = ["retinanet", "ssd", "fcos"]
PICKS = ["yolox", "yolov8"]
LOSSES = ["yolov5", "yolov4", "yolov1", *DENSE]


def predictions(kind: str, seed: int = 0, device: str = DEVICE) -> list[Tensor]:
    """Of two images, leaves."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "yolov5": [(2, 8, 4, 4), (2, 8, 2, 2)],
        "yolov4": [(2, 8, 8, 8), (2, 8, 4, 4)],
        "yolov1": [(2, 7, 7, 13)],
        "retinanet": [(2, 64, 3), (2, 64, 4)],
        "ssd": [(2, 64, 3), (2, 64, 4)],
        "fcos": [(2, 64, 3), (2, 64, 4), (2, 64, 1)],
        "yolox": [(2, 8, 8, 8), (2, 8, 4, 4)],
        "yolov8": [(2, 67, 8, 8), (2, 67, 4, 4)],
    }
    preds = [torch.randn(shape, generator=generator) for shape in shapes[kind]]
    if kind == "fcos":
        preds[1] = preds[1].abs()
    return [pred.to(device).requires_grad_() for pred in preds]


def boxes(device: str = DEVICE) -> Tensor:
    """Anchors of the dense losses, a row of 8 a line."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    corner = torch.stack((x, y), -1).view(-1, 2) * 8
    return torch.cat((corner, corner + 20), 1).to(device)


def evaluate(kind: str, preds: list[Tensor], rows: Tensor, anchors: Tensor, criterion: Any = None) -> Tensor:
    """The total of a loss."""
    criterion = loss(kind) if criterion is None else criterion
    if kind in DENSE:
        return criterion(tuple(preds), rows, anchors=anchors, num_anchors_per_level=[64]).total
    return criterion(preds[0] if kind == "yolov1" else preds, rows).total


def step(kind: str, seed: int = 0) -> tuple[Tensor, ...]:
    """A total and the gradients."""
    preds = predictions(kind, seed)
    total = evaluate(kind, preds, torch.tensor(ROWS, device=DEVICE), boxes())
    return total.detach(), *torch.autograd.grad(total, preds)


def pairs(seed: int = 0) -> list[Tensor]:
    """300 boxes and as many others, leaves."""
    corner, side = torch.rand(2, 2, 300, 2, generator=torch.Generator().manual_seed(seed))
    return list(torch.cat((corner, corner + side), -1).to(DEVICE).requires_grad_().unbind())


def pointwise_step(seed: int = 0) -> tuple[Tensor, ...]:
    a, b = (x.detach().requires_grad_() for x in pairs(seed))
    total = functional.complete_box_iou_loss(a, b, "mean", backend="triton")
    total = total + functional.sigmoid_focal_loss(a, b.detach(), reduction="sum", backend="triton")
    return total.detach(), *torch.autograd.grad(total, [a, b])


STEPS: dict[str, Callable[[], tuple[Tensor, ...]]] = {
    **{kind: lambda kind=kind: step(kind) for kind in LOSSES},  # type: ignore[misc]
    "pointwise": pointwise_step,
}


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, got, want))


@pytest.fixture(autouse=True)
def nothing_kept():
    """Each test begins and ends with zeros of its own."""
    launch.forget_zeros()
    yield
    launch.forget_zeros()


# ---- the device of a launch


class Pretend(TorchFunctionMode):
    """Tensors say that they are on the GPU of this number."""

    def __init__(self, index: int):
        super().__init__()
        self.device = torch.device("cuda", index)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.device
        kwargs = dict(kwargs or {})
        if kwargs.get("device") not in (None, "meta"):
            assert torch.device(kwargs["device"]) == self.device
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Driver:
    """What PyTorch says of two GPUs that are not there, and the device each launch went to."""

    def __init__(self, patch: pytest.MonkeyPatch, capturing: tuple[bool, bool] = (False, False)):
        self.current, self.capturing = 0, capturing
        self.asked: list[int] = []
        self.launched: list[tuple[str, int]] = []
        driver = self

        class Guard:
            def __init__(self, device: torch.device):
                self.index = device.index

            def __enter__(self):
                self.before, driver.current = driver.current, self.index

            def __exit__(self, *error):
                driver.current = self.before

        def is_capturing() -> bool:
            self.asked.append(self.current)
            return self.capturing[self.current]

        def run(launch: Launch) -> None:
            self.launched.append((launch.kernel.__name__, self.current))

        patch.setattr(torch.cuda, "device", Guard)
        patch.setattr(torch.cuda, "current_device", lambda: driver.current)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 100 + index, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", is_capturing)
        patch.setattr(tuned, "gpu_name", lambda device: "none")
        patch.setattr(Launch, "run", run)


def inside(operator: Any) -> Callable[..., Any]:
    """What an operator runs."""
    return FUNCTIONS[operator]


def run_operators() -> None:
    """Every operator that launches."""
    rows, one = torch.empty(3, 6), torch.ones(())
    preds = [torch.empty(1, 8, side, side) for side in (8, 4)]
    key = loss("yolov4", backend="torch").head.key
    outputs = inside(ops.grid_loss)(preds, rows, None, None, key, True, [])
    inside(ops.grid_loss_grad)(one, preds, outputs[1], *outputs[3:], key)

    pred, key = torch.empty(1, 7, 7, 13), loss("yolov1", backend="torch").head.key
    taken = inside(ops.cell_loss)(pred, rows, None, key, True)[3]
    inside(ops.cell_loss_grad)(one, pred, rows, taken, key)
    inside(ops.cell_loss_rescale)(pred.clone(), one, pred, rows, taken, key)

    for kind in DENSE:
        preds = [torch.empty(1, 64, c) for c in (3, 4, 1)[: 3 if kind == "fcos" else 2]]
        anchors, at = torch.empty(64, 4), ([64.0, 64.0], False, [64, 64])
        key = loss(kind, backend="torch").head.key
        dense = inside(ops.dense_loss)(preds, anchors, rows, None, key, *at, True)
        saved = [anchors, rows, *dense[5:9]]
        inside(ops.dense_loss_grad)(one, None, None, None, preds, saved, key, *at)
        grads = [pred.clone() for pred in preds]
        inside(ops.dense_loss_rescale)(grads, one, None, None, None, preds, saved, key, *at)

    x = torch.empty(5, 4)
    inside(ops.label_loss)(x, x, "bce", [], "mean")
    inside(ops.label_loss_grad)(one, x, x, "bce", [], "mean")
    inside(ops.box_loss)(x, x, "giou", [0.0, 0.0], "mean")
    inside(ops.box_loss_grad)(one, x, x, "giou", [0.0, 0.0], "mean")

    maps, settings = [torch.zeros(1, 8, 8, 8)], (0.25, 0.5, 10, False, 100)
    head = fusedyolo.YOLOv5Loss([[(10, 13)]], (8,), 3).head
    inside(detections.select_maps)(maps, head.key, *settings)
    decoded = torch.zeros(1, 64, 4, dtype=torch.float64), torch.zeros(1, 64, 3, dtype=torch.float64)
    inside(detections.select_decoded)(*decoded, *settings, "triton")


def test_every_operator_launches_on_the_device_of_its_tensors(monkeypatch):
    driver = Driver(monkeypatch)
    with Pretend(1):
        run_operators()
    assert {device for _, device in driver.launched} == {1}
    assert set(driver.asked) == {1}  # whether a capture is under way
    assert driver.current == 0
    assert {name for name, _ in driver.launched} == {
        "grid_kernel", "grid_grad_kernel", "cell_kernel", "cell_grad_kernel", "overlap_kernel", "match_kernel",
        "dense_kernel", "count_kernel", "rank_kernel", "label_kernel", "box_kernel", "scan_kernel", "nms_kernel",
    }  # fmt: skip


def test_zeros_are_those_of_a_device_and_of_a_capture_on_it(monkeypatch):
    Driver(monkeypatch, capturing=(True, False))
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    with Pretend(0):
        assert launch.zeros(first, 2, torch.int32) is not launch.zeros(first, 2, torch.int32)
        assert launch.done_counter(first).shape == (4,)  # of its own size: all that kernels leave at 0
    assert launch.shared_zeros() == []
    with Pretend(1):
        assert launch.zeros(second, 2, torch.int32) is launch.zeros(second, 2, torch.int32)
    assert len(launch.shared_zeros()) == 1


def test_a_guard_is_left_when_a_launch_fails(monkeypatch):
    driver = Driver(monkeypatch)

    def fail(launch: Launch) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Launch, "run", fail)
    with Pretend(1):
        launch.zeros(torch.device("cuda", 1), 2, torch.int32)
        with pytest.raises(KeyboardInterrupt):
            ops.run_all([Launch(kernels.nms_kernel, (1,), {}, 32)], torch.device("cuda", 1))
    assert driver.current == 0
    assert launch.shared_zeros() == []


# ---- past the dispatcher


class Seen(TorchDispatchMode):
    """The operators of ours that go by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fusedyolo":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


class Own(Tensor):
    """A tensor of somebody else's type, who wants to know what is done with it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", "") == "fusedyolo":
            cls.seen.append(func._opname)
        return super().__torch_function__(func, types, args, kwargs or {})


OPERATORS = {
    "yolov5": ["grid_loss", "grid_loss_grad"],
    "yolov1": ["cell_loss", "cell_loss_rescale"],
    "retinanet": ["dense_loss", "dense_loss_rescale"],
    "ssd": ["dense_loss", "dense_loss_grad"],
    "yolov8": ["picked_loss", "picked_loss_rescale"],
}


@pytest.mark.parametrize("kind", OPERATORS)
def test_who_looks_at_what_is_dispatched_sees_operators(kind):
    want = step(kind)
    with Seen() as seen:
        assert same(step(kind), want)
    assert seen.names == OPERATORS[kind]
    with torch.profiler.profile() as profile:
        assert same(step(kind), want)
    names = {event.key for event in profile.key_averages()}
    assert {f"fusedyolo::{name}" for name in OPERATORS[kind]} <= names
    Own.seen = []
    evaluate(kind, [pred.as_subclass(Own) for pred in predictions(kind)], torch.tensor(ROWS, device=DEVICE), boxes())
    assert Own.seen == OPERATORS[kind][:1]


@pytest.mark.parametrize("kind", OPERATORS)
def test_nobody_else_waits_for_the_dispatcher(kind, monkeypatch):
    want = step(kind)
    monkeypatch.setattr(OpOverload, "__call__", refuse)
    assert same(step(kind), want)
    with torch.no_grad():
        assert torch.equal(evaluate(kind, predictions(kind), torch.tensor(ROWS, device=DEVICE), boxes()), want[0])


@pytest.mark.parametrize("kind", [*DENSE, *PICKS])
def test_parts_have_a_gradient_where_they_are_asked_for(kind):
    """And only there, whether or not the call was dispatched."""
    rows, criterion = torch.tensor(ROWS, device=DEVICE), loss(kind)
    more = {"anchors": boxes(), "num_anchors_per_level": [64]} if kind in DENSE else {}
    found = []
    for watch in (nullcontext, Seen):
        preds = predictions(kind)
        with watch():
            out = criterion(preds if kind in PICKS else tuple(preds), rows, **more)
            assert out.total.requires_grad
            assert not any(part.requires_grad for part in out.parts.values())
            terms = criterion.terms(preds if kind in PICKS else tuple(preds), rows, **more)
            assert list(terms) == list(out.parts)
            assert all(torch.equal(term, part) for term, part in zip(terms.values(), out.parts.values(), strict=True))
            asked = sum((i + 1) * term for i, term in enumerate(terms.values()))
            found.append(torch.autograd.grad(asked, preds))
    assert same(*found)


# ---- compiled kernels, which are given addresses


def at(address: Any, like: Any) -> Any:
    """An argument of a compiled kernel as an interpreted one takes it: what lies at an address as a tensor ``like`` one
    of a call before.
    """
    if isinstance(like, tuple):
        items = [at(*pair) for pair in zip(address, like, strict=True)]
        return type(like)(*items) if hasattr(like, "_fields") else tuple(items)
    if not isinstance(like, Tensor) or not like.numel():
        return like if isinstance(like, Tensor) else address
    assert isinstance(address, int)
    count = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_ubyte * (count * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


class ByAddress(CompiledKernel):
    """Stands for what a kernel was compiled to in a launch; interprets it."""

    count = 0

    def __init__(self, launch: Launch, run: Callable[[Launch], None]):
        self.launch, self.interpret = launch, run

    function = packed_metadata = None

    def run(self, programs: int, _y: int, _z: int, _stream: int, *arguments: Any) -> None:
        names = self.launch.kernel.arg_names
        named = dict(zip(names, arguments[-len(names) :], strict=True))  # behind what is for Triton and for hooks
        placed = {name: at(value, self.launch.arguments[name]) for name, value in named.items()}
        self.interpret(replace(self.launch, grid=(programs,), arguments=placed))
        ByAddress.count += 1


LAUNCHES = {"yolov5": 2, "yolov4": 2, "yolov1": 2, "retinanet": 4, "ssd": 6, "fcos": 3, "yolox": 6, "yolov8": 5}


@pytest.fixture
def by_address(monkeypatch):
    """Kernels that have been launched once are given addresses."""
    run = Launch.run

    def run_and_compile(launch: Launch) -> ByAddress:
        run(launch)
        return ByAddress(launch, run)

    ops.forget_plans()
    monkeypatch.setattr(Launch, "run", run_and_compile)
    monkeypatch.setattr(ByAddress, "count", 0)
    yield
    ops.forget_plans()


@pytest.mark.interpreter("a GPU is always given addresses")
@pytest.mark.parametrize("kind", LAUNCHES)
def test_what_is_at_the_addresses_that_kernels_are_given(kind, by_address):
    """Memory is full of what is no number: pieces of it that overlap, or that one launch seeks elsewhere than another,
    would show.
    """
    want, other = step(kind), step(kind, seed=1)
    assert ByAddress.count == LAUNCHES[kind]
    assert same(step(kind), want)
    assert same(step(kind, seed=1), other)
    assert not same(want, other)
    assert ByAddress.count == 3 * LAUNCHES[kind]


@pytest.mark.interpreter("the interpreter is what is stopped")
def test_an_error_between_compiled_launches_spoils_no_later_call(by_address, monkeypatch):
    want = step("retinanet")

    def stop(self: ByAddress, *arguments: Any) -> None:
        if self.launch.kernel.__name__ == "match_kernel":
            raise RuntimeError("stopped")
        run(self, *arguments)

    with monkeypatch.context() as patch:
        run = ByAddress.run
        patch.setattr(ByAddress, "run", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            step("retinanet", seed=1)
    assert launch.shared_zeros() == []
    assert same(step("retinanet"), want)


# ---- options


@pytest.mark.parametrize("nvidia", [True, False])
def test_contraction_is_always_said(nvidia):
    """Left out, an environment variable of Triton's decides."""
    for exact in (False, True):
        options = Launch(kernels.nms_kernel, (1,), {}, 64, 96, exact=exact).options(nvidia)
        assert options.pop("enable_fp_fusion") is not exact
        assert options == ({"num_warps": 2, "maxnreg": 96} if nvidia else {"num_warps": 1})


def test_registers_are_no_more_than_there_are():
    """Of launches in float64, which are given all there are, too; and a multiprocessor has 65,536 for all threads."""

    def most(limit, generation, weighed, threads=64):
        launch = Launch(kernels.nms_kernel, (1,), {}, threads, limit, weights=(None, weighed or None))
        return launch.options(True, generation)["maxnreg"]

    assert [most(64, generation, weighed) for generation in (9, 10) for weighed in (False, True)] == [64, 88, 88, 112]
    assert {most(255, generation, weighed) for generation in (9, 10) for weighed in (False, True)} == {255}
    assert {most(128, generation, weighed, 512) for generation in (9, 10) for weighed in (False, True)} == {128}


# ---- zeros that launches share


def test_steps_leave_zeros_and_fill_them_once(monkeypatch):
    zeros, made = torch.zeros, []

    def counted(*args: Any, **options: Any) -> Tensor:
        made.append(args[0])
        return zeros(*args, **options)

    monkeypatch.setattr(torch, "zeros", counted)
    for run in STEPS.values():
        run()
    assert made == [launch.LEAST_ZEROS] * 2
    assert len(launch.shared_zeros()) == 2
    assert not any(bool(kept.any()) for kept in launch.shared_zeros())


@pytest.mark.interpreter("the interpreter is what is stopped")
@pytest.mark.parametrize("kind", STEPS)
def test_a_kernel_stopped_half_way_spoils_no_later_call(kind, monkeypatch):
    """After its first atomic operation: a program counted, or a maximum left."""
    builder = triton.runtime.interpreter.InterpreterBuilder
    run, count = STEPS[kind], builder.create_atomic_rmw
    want = run()

    def stop(self, *args):
        count(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(builder, "create_atomic_rmw", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not any(bool(kept.any()) for kept in launch.shared_zeros())
    assert same(run(), want)


def stop_before(patch: pytest.MonkeyPatch, kernel: str) -> None:
    run = Launch.run

    def stop(self: Launch) -> Any:
        if self.kernel.__name__ == kernel:
            raise RuntimeError("stopped")
        return run(self)

    patch.setattr(Launch, "run", stop)
    ops.forget_plans()  # and with them kernels that are compiled, which are not run so


@pytest.mark.parametrize(("kind", "kernel"), [("retinanet", "match_kernel"), ("ssd", "match_kernel")])
def test_an_error_between_launches_spoils_no_later_call(kind, kernel, monkeypatch):
    want = step(kind)
    with monkeypatch.context() as patch:
        stop_before(patch, kernel)
        with pytest.raises(RuntimeError, match="stopped"):
            step(kind, seed=1)
    assert launch.shared_zeros() == []
    assert same(step(kind), want)


@pytest.mark.parametrize("kind", ["retinanet", "ssd"])
def test_two_threads_on_one_stream_share_nothing(kind, monkeypatch):
    """One of them comes between two launches of the other: neither waits, and both are right."""
    want, other = step(kind), step(kind, seed=1)
    run, between, done = Launch.run, threading.Event(), threading.Event()
    got: dict[str, Any] = {}

    def pausing(self: Launch) -> None:
        run(self)
        if self.kernel.__name__ == "overlap_kernel" and threading.current_thread().name == "first":
            between.set()
            got["in time"] = done.wait(20)

    def first() -> None:
        got["first"] = step(kind)

    def second() -> None:
        between.wait(20)
        rows = torch.tensor([[0, 1, 0.5, 0.5, 0.9, 0.9]] * 3, device=DEVICE)  # larger maxima in the same places
        preds = predictions(kind, seed=1)
        evaluate(kind, preds, rows, boxes()).backward()
        got["second"] = step(kind, seed=1)
        got["kept"] = launch.shared_zeros()
        done.set()

    monkeypatch.setattr(Launch, "run", pausing)
    ops.forget_plans()
    threads = [threading.Thread(target=first, name="first"), threading.Thread(target=second, name="second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert got["in time"]
    assert same(got["first"], want)
    assert same(got["second"], other)
    mine = {kept.data_ptr() for kept in launch.shared_zeros()}
    assert mine.isdisjoint(kept.data_ptr() for kept in got["kept"])


# ---- compiled graphs


def refuse(*args: Any) -> Tensor:
    raise AssertionError("memory that outlives a graph was asked for in it")


DRIVERS = ["yolov4", "yolov1", "ssd"]  # with those of pointwise terms all kernels that count or look for maxima
CRITERIA = {kind: loss(kind) for kind in LOSSES}


def everything(preds: dict[str, list[Tensor]], rows: Tensor, anchors: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A loss of each driver, in one graph."""
    totals = [evaluate(kind, preds[kind], rows, anchors, CRITERIA[kind]) for kind in DRIVERS]
    totals.append(functional.generalized_box_iou_loss(a, b, "mean", backend="triton"))
    totals.append(functional.sigmoid_focal_loss(a, b.detach(), reduction="sum", backend="triton"))
    return torch.stack(totals)


def results(function: Callable[..., Tensor], seed: int) -> tuple[Tensor, ...]:
    """Totals, and the gradients of their sum weighted unevenly."""
    a, b = (x.detach().requires_grad_() for x in pairs(seed))
    preds = {kind: predictions(kind, seed) for kind in DRIVERS}
    totals = function(preds, torch.tensor(ROWS, device=DEVICE), boxes(), a, b)
    leaves = [*(pred for maps in preds.values() for pred in maps), a, b]
    return totals.detach(), *torch.autograd.grad(totals, leaves, torch.linspace(0.5, 2.0, len(totals), device=DEVICE))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_graph_asks_for_no_memory_that_outlives_it(backend, monkeypatch):
    """Forward and backward; CUDA-graph trees refuse such memory, or hand it out twice."""
    wanted = [results(everything, seed) for seed in (0, 1)]
    launch.forget_zeros()
    monkeypatch.setattr(launch, "zeros_of_types", refuse)
    torch._dynamo.reset()
    compiled = torch.compile(everything, backend=backend, fullgraph=True)
    for seed, want in enumerate(wanted):
        for mine, theirs in zip(results(compiled, seed), want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert launch.shared_zeros() == []


def test_what_a_graph_fills_is_for_its_rows(monkeypatch):
    """16 bytes of counters, and a place for each row of a loss that looks for the best anchor of each."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    own = ops.workspace(torch.device(DEVICE), 5)
    assert own is not None
    assert own.shape == (7,)
    assert launch.done_counter(own.device, own).data_ptr() == own.data_ptr()
    done, maxima = launch.counters_and_maxima(own.device, 5, own)
    assert (done.data_ptr(), maxima.data_ptr()) == (own.data_ptr(), own.data_ptr() + 16)
    assert maxima.shape == (5,)
    assert launch.shared_zeros() == []


@pytest.fixture
def cleared(monkeypatch):
    """Memory comes as zeros: a launch leaves alone what the gradient will not read, and opcheck compares it all."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)


def test_opcheck_with_a_workspace(cleared):
    """An operator leaves what it is handed as it was."""
    rows, own = torch.tensor(ROWS[:2], device=DEVICE), torch.zeros(6, dtype=torch.int64, device=DEVICE)
    rows[:, 0] = 0
    first = {kind: [pred[:1].detach().requires_grad_() for pred in predictions(kind)] for kind in LOSSES}
    key = CRITERIA["yolov4"].head.key
    torch.library.opcheck(ops.grid_loss, (first["yolov4"], rows, None, None, key, True, [], own))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    key = CRITERIA["yolov1"].head.key
    torch.library.opcheck(ops.cell_loss, (first["yolov1"][0], rows, None, key, False, own), test_utils=tests)
    for kind in ("retinanet", "ssd"):
        at = [64.0, 64.0], False, [64, 64]
        call = (first[kind], boxes(), rows, None, CRITERIA[kind].head.key, *at, False, own)
        torch.library.opcheck(ops.dense_loss, call, test_utils=tests)
    a, b = (x[:9].detach().requires_grad_() for x in pairs())
    torch.library.opcheck(ops.label_loss, (a, b.detach(), "focal", [0.25, 2.0], "mean", own))
    torch.library.opcheck(ops.box_loss, (a, b, "ciou", [1e-7, 1e-7], "mean", None, own))
    assert not own.any()


def test_class_weights_made_in_a_graph_are_not_kept():
    """Of a module that was not moved to where its predictions are: a graph's memory must not become a buffer."""

    def make(counts: list[int]) -> Any:
        options: dict[str, Any] = {"recipe": "darknet", "counters_per_class": counts, "backend": "triton"}
        return fusedyolo.YOLOv4Loss([[(10, 13)], [(30, 61)]], (8, 16), 3, **options).to(torch.float64)

    modules = [make([1, 2, 3]), make([5, 1, 2])]
    before = [module.class_weights for module in modules]
    rows, preds = torch.tensor(ROWS, device=DEVICE), predictions("yolov4")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda preds, rows: torch.stack([module(preds, rows).total for module in modules]),
        backend="aot_eager",
        fullgraph=True,
    )
    got = [compiled(preds, rows) for _ in range(2)]
    assert all(module.class_weights is weights for module, weights in zip(modules, before, strict=True))
    want = torch.stack([module(preds, rows).total for module in modules])
    assert all(torch.equal(each, want) for each in got)
    assert want[0] != want[1]
