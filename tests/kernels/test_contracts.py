"""What every kernel keeps to: names for arguments, records that the compiler understands, nothing left unwritten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from process import call

from fusedyolo.ops.launch import Launch
from fusedyolo.tools.registry import CASES, Workload

ROOT = Path(__file__).parents[2]
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "kernels").rglob("*.py"))}
PARAMETERS = 12
POSITIONAL = 9
UNFORMATTED = 4  # places where ruff's format is refused

# ---- the text of the kernels


def jitted(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions for the compiler."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
            yield node


def faults(text: str) -> Iterator[str]:
    """Lines that break a rule which Triton's interpreter does not know, or make a call that nobody can read."""
    for function in jitted(ast.parse(text)):
        parameters = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        if len(parameters) > PARAMETERS:
            yield f"{function.name}: {len(parameters)} parameters"
        for default in function.args.defaults + [each for each in function.args.kw_defaults if each is not None]:
            if isinstance(default, ast.Constant) and isinstance(default.value, str):
                yield f"{function.name}: {default.value!r} is a default, which Triton 3.6 does not compile"
        records = [p.arg for p in parameters if p.annotation is not None and "constexpr" in ast.unparse(p.annotation)]
        for node in ast.walk(function):
            for fault in _faults(node, records):
                yield f"{function.name}, line {node.lineno}: {fault}"


def _faults(node: ast.AST, records: list[str]) -> Iterator[str]:
    def in_record(part: ast.AST) -> bool:
        return isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id in records

    if isinstance(node, ast.Call):
        if len(node.args) > POSITIONAL:
            yield f"{len(node.args)} positional arguments"
        if in_record(node.func):
            yield f"{ast.unparse(node.func)} is called: its source is not part of what a kernel is found by"
        shapes = [each for argument in node.args for each in getattr(argument, "elts", ())]
        if ast.unparse(node.func) in ("tl.zeros", "tl.full") and any(in_record(each) for each in shapes):
            yield "a shape of a record's field: name it first, N: tl.constexpr = SPEC.N"
    if isinstance(node, ast.Assign) and any(
        isinstance(each, ast.Tuple) for target in node.targets for each in getattr(target, "elts", ())
    ):
        yield "targets within targets"


@pytest.mark.parametrize("name", FILES)
def test_rules_of_the_text(name):
    assert list(faults(FILES[name].read_text())) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("tl.store(ptr, SPEC.term(0.0))", "SPEC.term is called"),
        ("x = tl.zeros([SPEC.N], tl.float32)", "name it first"),
        ("(a, b), c = x", "targets within targets"),
        (f"x = f({', '.join('0' * 10)})", "10 positional"),
    ],
)
def test_a_broken_rule_is_seen(line, fault):
    found = list(faults(f"@triton.jit\ndef kernel(ptr, record, SPEC: tl.constexpr):\n    {line}\n"))
    assert len(found) == 1
    assert fault in found[0]


def test_a_string_as_a_default_is_seen():
    (found,) = faults('@triton.jit\ndef kernel(ptr, KIND: tl.constexpr = "object"):\n    pass\n')
    assert "a default" in found


def test_too_many_parameters_are_seen():
    names = ", ".join(f"p{i}" for i in range(PARAMETERS + 1))
    assert list(faults(f"@triton.jit(do_not_specialize=['p1'])\ndef kernel({names}):\n    pass\n"))


def test_formatted_by_ruff():
    assert sum(path.read_text().count("fmt: skip") for path in FILES.values()) <= UNFORMATTED


# ---- what launches are given, and compiled for


@cache
def found_in_launches() -> dict[str, Any]:
    """Of tests/keys.py, in a process without the interpreter."""
    return call("keys", "everything")


def test_every_kernel_is_launched():
    """Rules of launches hold for all kernels there are."""
    kernels = {
        node.name
        for path in FILES.values()
        for node in jitted(ast.parse(path.read_text()))
        if node.name.endswith("_kernel")
    }
    assert set(found_in_launches()["kernels"]) == kernels


def test_a_changed_term_is_compiled_anew():
    """Both keys of a kernel, that of the process and that on disk, follow the source of every function it is given."""
    found = found_in_launches()
    assert found["tried"] >= len(found["kernels"])
    assert found["unnoticed"] == []


def test_records_hold_what_they_may():
    """Functions are in no constexpr record, flags and strings in nothing else."""
    assert found_in_launches()["misplaced"] == []


def test_misplaced_values_are_seen():
    """A function in a constexpr record may change without the kernel being compiled again: the rule is needed."""
    right, wrong = (found_in_launches()["toy"][kept] for kept in ("True", "False"))
    assert right == [[], []]
    assert wrong == [
        ["toy_kernel: half at ('SPEC', 0)"],
        ["toy_kernel: record at (1,)", "toy_kernel: SPEC at (0,)"],
    ]


@pytest.mark.parametrize("name", CASES)
def test_no_kernel_is_compiled_for_a_size(name):
    """Images from 320 to 960 pixels, some objects or none."""
    assert max(found_in_launches()["variants"][name].values()) <= 2


# ---- memory


@pytest.mark.interpreter("the emulator knows what has been written")
@pytest.mark.parametrize("name", CASES)
def test_what_nobody_writes_is_poison(name):
    """Where no launch does anything, nothing looks like a result."""
    case, work = CASES[name], Workload(batch=2, size=64, classes=3)
    preds = case.predictions(work)
    with mock.patch.object(Launch, "run"):
        out = case.bind(case.build(work.classes, "triton"), work)(preds, case.targets(work))
        grads = torch.autograd.grad(out.total, preds)
    assert all(value.isnan().all() for value in (out.total, *out.parts.values(), *grads))
    poison = torch.tensor(0x7F7F7F7F, dtype=torch.int32)
    assert out.num_invalid == poison
    assert out.num_pos == poison * max(1, len(case.branches))
