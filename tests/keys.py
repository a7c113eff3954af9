"""For tests/kernels/test_contracts.py: what kernels are given, and what they are compiled for.

In a process without Triton's interpreter. Kernels are what the compiler takes, and are not run.
"""

import ast
import inspect
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

import fusedyolo
from fusedyolo.emulator import Device
from fusedyolo.ops.launch import Launch
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

SMALL = Workload(batch=2, size=64, classes=3)
SIDES = (320, 352, 416, 640, 736, 960)
PICKS = {"YOLOX": fusedyolo.YOLOXLoss, "YOLOv8": fusedyolo.YOLOv8Loss}
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
Place = tuple[Any, ...]


# ---- launches, not run


def recorded(run) -> list[Launch]:
    """The launches that ``run()`` would make."""
    found: list[Launch] = []
    with Device(90, checks=()), mock.patch.object(Launch, "run", lambda launch: found.append(launch)):
        run()
    return found


def of_case(name: str, work: Workload, rows: torch.Tensor | None = None) -> list[Launch]:
    """Those of a training step."""
    case = CASES[name]
    preds, targets = case.predictions(work, empty=True), case.targets(work) if rows is None else rows
    loss = case.bind(case.build(work.classes, "triton"), work)
    return recorded(lambda: step(loss, preds, targets, torch.ones(())))


def of_picks(name: str, work: Workload, rows: torch.Tensor | None = None) -> list[Launch]:
    """Those of a training step of a loss that is no case yet."""
    loss, strides = PICKS[name](work.classes, (8, 16, 32), backend="triton"), (8, 16, 32)
    sides = [(work.batch, sum(loss.head.widths), work.size // stride, work.size // stride) for stride in strides]
    preds = [torch.empty(shape, requires_grad=True) for shape in sides]
    return recorded(lambda: loss(preds, torch.rand(3, 6) if rows is None else rows).total.backward())


def of_selection() -> list[Launch]:
    """Those of a selection."""
    case = CASES["YOLOv5"]
    preds = [pred.detach() for pred in case.predictions(SMALL)]
    return recorded(lambda: fusedyolo.select(preds, case.build(SMALL.classes, "triton"), backend="triton"))


def of_functions() -> list[Launch]:
    """Those of a label loss and of a box loss."""
    x = torch.randn(8, requires_grad=True)
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2, requires_grad=True)

    def run():
        label = fusedyolo.functional.sigmoid_focal_loss(x, torch.rand(8), reduction="sum", backend="triton")
        box = fusedyolo.functional.box_iou_loss(boxes, boxes.detach() + 0.5, reduction="sum", backend="triton")
        (label + box).backward()

    return recorded(run)


# ---- what a kernel is compiled for


@lru_cache
def _binder(kernel: JITFunction):
    return create_function_from_signature(kernel.signature, kernel.params, BACKEND)


def keys(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
    """By what a compiled kernel is found again: in the process, and on disk."""
    bound, specialization, rest = _binder(kernel)(**arguments, **options)
    _, signature, constants, attributes = kernel._pack_args(BACKEND, options, bound, specialization, rest)
    source = ASTSource(kernel, signature, constants, attributes)
    return compute_cache_key({}, specialization, rest), source.hash()


# ---- functions among the arguments


def functions(value: Any, path: Place = ()) -> Iterator[tuple[Place, JITFunction]]:
    """The functions in a value, and in the tuples in it."""
    if isinstance(value, JITFunction):
        yield path, value
    elif isinstance(value, tuple | dict):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from functions(value[key], (*path, key))


def put(value: Any, path: Place, new: Any) -> Any:
    """The value with ``new`` at a path."""
    if not path:
        return new
    if isinstance(value, dict):
        return value | {path[0]: put(value[path[0]], path[1:], new)}
    items = [put(each, path[1:], new) if i == path[0] else each for i, each in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def twin(function: JITFunction, folder: str) -> JITFunction:
    """A function of the same name, at the same line, with one statement more."""
    lines, first = inspect.getsourcelines(function.fn)
    body = ast.parse("".join(lines)).body[0].body
    has_doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    at = body[0].end_lineno if has_doc else body[0].lineno - 1
    lines.insert(at, "    _other = 0\n")
    path = Path(folder, f"{function.__name__}.py")
    path.write_text("\n" * (first - 1) + "".join(lines))
    names = dict(function.fn.__globals__)
    exec(compile(path.read_text(), str(path), "exec"), names)
    return names[function.__name__]


def unnoticed(launch: Launch, seen: set[Any]) -> Iterator[str]:
    """Functions of a launch that could be changed without the kernel being compiled again."""
    options = launch.options(True)
    for path, function in functions(launch.arguments):
        what = launch.kernel.__name__, path, function.__name__
        if what in seen:
            continue
        seen.add(what)
        with TemporaryDirectory() as folder:
            changed = put(launch.arguments, path, twin(function, folder))
            before, after = keys(launch.kernel, launch.arguments, options), keys(launch.kernel, changed, options)
        if any(a == b for a, b in zip(before, after, strict=True)):
            yield f"{what[0]}: {function.__name__} at {path}"


# ---- what records may hold


def misplaced(kernel: JITFunction, arguments: dict[str, Any]) -> Iterator[str]:
    """Functions in constexpr records, and flags or strings in others."""
    for parameter in kernel.params:
        value = arguments.get(parameter.name)
        if not isinstance(value, tuple):
            continue
        if parameter.is_constexpr:
            found = [path for path, _ in functions(value)]
        else:
            found = [path for path, each in leaves(value) if isinstance(each, bool | str)]
        yield from (f"{kernel.__name__}: {parameter.name} at {path}" for path in found)


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """The values in a tuple and in the tuples in it."""
    if isinstance(value, tuple):
        for i, each in enumerate(value):
            yield from leaves(each, (*path, i))
    else:
        yield path, value


# ---- the tests tested: a kernel that breaks the rules


class Record(NamedTuple):
    """For arguments that are right and wrong."""

    term: Any
    flag: Any


@triton.jit
def half(x):
    """A term."""
    return 0.5 * x


@triton.jit
def toy_kernel(ptr, record, SPEC: tl.constexpr):
    """Takes a term in either record."""
    if SPEC.term is not None:
        tl.store(ptr, SPEC.term(tl.load(ptr)))
    else:
        tl.store(ptr, record.term(tl.load(ptr)))


def toy(right: bool) -> Launch:
    """A launch that keeps the rules, or breaks them all."""
    plain, constant = Record(half, 0), Record(None, True)
    if not right:
        plain, constant = Record(None, True), Record(half, True)
    return Launch(toy_kernel, (1,), {"ptr": torch.zeros(4), "record": plain, "SPEC": constant}, 32)


# ---- all of it


def variants(name: str) -> dict[str, int]:
    """How often each launch of a training step is compiled for images of many sizes and numbers of objects."""
    found: dict[str, set[str]] = defaultdict(set)
    for size, objects in product(SIDES, (0, 16, 117)):
        seen: Counter[str] = Counter()
        made = of_picks if name in PICKS else of_case
        for launch in made(name, Workload(batch=2, size=size, classes=80), torch.rand(objects, 6)):
            seen[launch.kernel.__name__] += 1
            key, _ = keys(launch.kernel, launch.arguments, launch.options(True))
            found[f"{launch.kernel.__name__} {seen[launch.kernel.__name__]}"].add(key)
    return {launch: len(each) for launch, each in found.items()}


def everything() -> dict[str, Any]:
    """What is found, by name."""
    launches = [launch for name in CASES for launch in of_case(name, SMALL)] + of_selection() + of_functions()
    launches += [launch for name in PICKS for launch in of_picks(name, SMALL)]
    seen: set[Any] = set()
    return {
        "kernels": sorted({launch.kernel.__name__ for launch in launches}),
        "unnoticed": [each for launch in launches for each in unnoticed(launch, seen)],
        "tried": len(seen),
        "misplaced": sorted({each for launch in launches for each in misplaced(launch.kernel, launch.arguments)}),
        "toy": {
            str(right): [list(unnoticed(toy(right), set())), list(misplaced(toy_kernel, toy(right).arguments))]
            for right in (True, False)
        },
        "variants": {name: variants(name) for name in (*CASES, *PICKS)},
    }
