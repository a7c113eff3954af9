"""For tests/kernels/test_decisions.py: where the instructions of compiled kernels come from.

In a process without Triton's interpreter. PTX names for every instruction the line that it was made of, and the calls
that led there. ``launches_of`` says for each launch of a training step whether products and sums may be fused, and for
each function in it the calls through which it was compiled and the sums that were fused with a product.
"""

import ast
import builtins
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

import fusedyolo
from fusedyolo.emulator import Device, Program, compile
from fusedyolo.ops.launch import Launch
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

KERNELS = Path(__file__).parents[1] / "kernels"
WORK = Workload(batch=2, size=128, classes=20)
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', re.MULTILINE)
LOCATION = re.compile(r"\s*\.loc\s+(\d+)")
LINE = re.compile(r"([\w.]+):(\d+):(\d+)")
FUSES_BY_ITSELF = {"tl.fma", "tl.exp", "tl.log"}  # functions of Triton that are written with, or as, a fused product


class Line(NamedTuple):
    """A place in a file."""

    file: str
    line: int
    column: int

    def __str__(self):
        return f"{Path(self.file).name}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Made:
    """An instruction, the lines that it was made of, innermost first, and the functions that these are in."""

    op: tuple[str, ...]
    text: str
    lines: tuple[Line, ...]
    functions: tuple[str, ...]

    @property
    def is_fused(self) -> bool:
        """Whether it is a sum fused with a product that its line does not ask for."""
        return self.op[0] == "fma" and not calls_at(self.lines[0]) & FUSES_BY_ITSELF


@lru_cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


@lru_cache
def _calls(file: str) -> list[tuple[tuple[int, int], tuple[int, int], str]]:
    """Where calls begin and end, and what is called."""
    return [
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset), ast.unparse(node.func))
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.Call)
    ]


@cache
def calls_at(at: Line) -> set[str]:
    """What is called around a place in a file."""
    return {name for first, last, name in _calls(at.file) if first <= (at.line, at.column) < last}


@lru_cache
def _known() -> set[str]:
    """The functions of all kernels."""
    nodes = (node for path in KERNELS.rglob("*.py") for node in ast.walk(_tree(str(path))))
    return {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


@cache
def leads_to(at: Line, callee: str) -> bool:
    """Whether a function is called there, or one that has been handed in."""
    names = {(name.startswith("tl."), name.split(".")[-1]) for name in calls_at(at)}
    own = callee.split(".")[-1]
    known = _known() | set(dir(builtins))
    return any(name == own or not (of_triton or name in known) for of_triton, name in names)


@lru_cache
def _functions(file: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(_tree(file)) if isinstance(node, ast.FunctionDef)]


@cache
def function_at(file: str, line: int) -> str:
    """The innermost function that holds a line, with its module: ``assign._block``."""
    holding = [node for node in _functions(file) if node.lineno <= line <= node.end_lineno]
    return f"{Path(file).stem}.{max(holding, key=lambda node: node.lineno).name if holding else None}"


def made(ptx: str) -> Iterator[Made]:
    """The instructions of a kernel that were made of some line."""
    files = dict(FILE.findall(ptx))
    rooms = frozenset(Path(file).parent for file in files.values())
    of_line, number = [], "0"  # the file that PTX names last before each of its lines
    for line in ptx.splitlines():
        found = LOCATION.match(line)
        number = found[1] if found else number
        of_line.append(files.get(number))
    for segment in Program(ptx).segments:
        for one in segment.code:
            names = LINE.findall(one.place)
            if names and names[0][1] != "0":
                lines = [Line(of_line[one.line], int(names[0][1]), int(names[0][2]))]
                for name, line, column in names[1:]:
                    lines.append(_caller(rooms, name, int(line), int(column), function_at(*lines[-1][:2])))
                functions = tuple(function_at(at.file, at.line) for at in lines)
                yield Made(tuple(one.op), one.text, tuple(lines), functions)


@cache
def _caller(rooms: frozenset[Path], name: str, line: int, column: int, callee: str) -> Line:
    """The place in the one file of this name that calls ``callee`` there, or a function that it has been given: of
    callers PTX does not say which folder they are in, but of a room that is used it names some file.
    """
    named = {str(path) for room in rooms for path in room.glob(name)}
    places = [Line(file, line, column) for file in sorted(named)]
    found = [at for at in places if leads_to(at, callee)]
    if len(found) > 1:  # by its own name, then
        own = callee.split(".")[-1]
        found = [at for at in found if any(each.split(".")[-1] == own for each in calls_at(at))] or found
    if len(found) > 1:
        raise ValueError(f"{name}:{line}:{column}: {callee} is called in {found}, want one file")
    return (found or places)[0]


def by_function(ptx: str) -> dict[str, dict[str, list[str]]]:
    """Of each function the calls through which it was compiled, one entry a copy, and what was fused in it."""
    sites: dict[str, set[str]] = defaultdict(set)
    fused: dict[str, set[str]] = defaultdict(set)
    for one in made(ptx):
        steps = zip(one.lines[1:], one.functions, strict=False)
        whole = all(leads_to(at, callee) for at, callee in steps)
        for depth, function in enumerate(one.functions):
            if whole:
                sites[function].add(" < ".join(map(str, one.lines[depth + 1 :])))
            if one.is_fused:
                fused[function].add(f"{one.lines[0]} {one.text}")
    return {name: {"sites": sorted(sites[name]), "fused": sorted(fused[name])} for name in sites}


def launches(name: str) -> list[Launch]:
    """Those of a training step, not run; ``iou_band`` is no case's own way to assign."""
    case, found = CASES["YOLOv4/paper" if name == "iou_band" else name], []
    loss = case.build(WORK.classes, "triton")
    if name == "iou_band":
        loss = fusedyolo.YOLOv4Loss(case.anchors, case.strides, WORK.classes, assigner=name, backend="triton")
    preds, targets = case.predictions(WORK), case.targets(WORK)
    with Device(90, checks=()), mock.patch.object(Launch, "run", lambda launch: found.append(launch)):
        step(case.bind(loss, WORK), preds, targets, torch.ones(()))
    return found


@triton.jit
def decides(a, b, limit):
    """A comparison that contraction may turn round."""
    return tl.fma(a, a, b) + (a * b - limit) > 0


@triton.jit
def toy_kernel(ptr):
    """Decides the same thing at two places."""
    i = tl.arange(0, 32)
    a = tl.load(ptr + i)
    if tl.max(decides(a, 2.0, 3.0).to(tl.int32), axis=0) > 0:
        tl.store(ptr + 32 + i, decides(a, 2.0, a).to(tl.float32))


def launches_of(what):
    """What is found in the launches of a case; of ``toy``, in those of a kernel that breaks the rules."""
    with (
        TemporaryDirectory() as folder,  # a kept kernel may name files that have moved since
        mock.patch.dict(os.environ, {"FUSEDYOLO_EMULATOR_CACHE": folder}),
        mock.patch.dict(compile._compiled, clear=True),
    ):
        if what == "toy":
            made_of = [(toy_kernel, {"ptr": torch.zeros(64), "enable_fp_fusion": fusion}) for fusion in (True, False)]
        else:
            made_of = [(launch.kernel, launch.arguments | launch.options(True)) for launch in launches(what)]
        compiled = [compile.bind(kernel, (), arguments, 90, None).compiled for kernel, arguments in made_of]
    return [{"kernel": each.name, "fusion": each.fusion, "functions": by_function(each.ptx)} for each in compiled]
