"""A process of its own for tests/kernels/test_decisions.py: where the instructions of compiled kernels come from.

PTX names for every instruction the line that it was made of, and the calls that led there. ``python tests/inlined.py
[fused] CASE...`` prints, as JSON, for each launch of a training step whether products and sums may be fused, and for
each function in it the places at which it was compiled and the sums that were fused with a product.
"""

import ast
import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from unittest import mock

import torch

from fusedyolo.emulator import Device, Program
from fusedyolo.emulator.compile import bind
from fusedyolo.ops.launch import Launch
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

ROOT = Path(__file__).parents[1]
WORK = Workload(batch=2, size=128, classes=20)
FILE = re.compile(r'^\s*\.file\s+\d+\s+"([^"]+)"', re.MULTILINE)
LINE = re.compile(r"([\w.]+):(\d+):(\d+)")
FUSES_BY_ITSELF = ("fma", "exp", "log")  # functions of Triton that are written with, or as, a fused product


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
        return self.op[0] == "fma" and not any(
            (first <= (self.lines[0].line, self.lines[0].column) < last) for first, last in _asked(self.lines[0].file)
        )


@lru_cache
def _tree(file: str) -> ast.Module:
    return ast.parse(Path(file).read_text())


@lru_cache
def _asked(file: str) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    """Where the calls of functions that fuse by themselves begin and end."""
    return tuple(
        ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"tl.{name}" for name in FUSES_BY_ITSELF]
    )


@lru_cache
def function_at(file: str, line: int) -> str:
    """The innermost function that holds a line."""
    holding = [
        node
        for node in ast.walk(_tree(file))
        if isinstance(node, ast.FunctionDef) and node.lineno <= line <= node.end_lineno
    ]
    return max(holding, key=lambda node: node.lineno).name if holding else "<module>"


def made(ptx: str) -> Iterator[Made]:
    """The instructions of a kernel that were made of some line."""
    files: dict[str, set[str]] = defaultdict(set)
    for path in FILE.findall(ptx):
        files[Path(path).name].add(path)
    for segment in Program(ptx).segments:
        for one in segment.code:
            lines = tuple(
                Line(_only(files, name), int(line), int(column)) for name, line, column in LINE.findall(one.place)
            )
            if lines and lines[0].line:
                functions = tuple(function_at(at.file, at.line) for at in lines)
                yield Made(tuple(one.op), one.text, lines, functions)


def _only(files: dict[str, set[str]], name: str) -> str:
    """PTX has the whole name of a file only where it lists all of them."""
    found = files[name] or {str(path) for path in (ROOT / "kernels").rglob(name)}
    if len(found) != 1:
        raise ValueError(f"{name}: {len(found)} files of this name, want one")
    return next(iter(found))


def by_function(ptx: str) -> dict[str, dict[str, list[str]]]:
    """Of each function the calls through which it was compiled, one entry a copy, and what was fused in it."""
    sites: dict[str, set[str]] = defaultdict(set)
    fused: dict[str, set[str]] = defaultdict(set)
    for one in made(ptx):
        for depth, function in enumerate(one.functions):
            sites[function].add(" < ".join(map(str, one.lines[depth + 1 :])))
            if one.is_fused:
                fused[function].add(f"{one.lines[0]} {one.text}")
    return {name: {"sites": sorted(sites[name]), "fused": sorted(fused[name])} for name in sites}


def launches(name: str) -> list[Launch]:
    """Those of a training step, not run."""
    case, found = CASES[name], []
    preds, targets = case.predictions(WORK), case.targets(WORK)
    with Device(90, checks=()), mock.patch.object(Launch, "run", lambda launch: found.append(launch)):
        step(case.bind(case.build(WORK.classes, "triton"), WORK), preds, targets, torch.ones(()))
    return found


def main(names, fused=False):
    """What is found in the launches of some cases, ``fused`` if they are all compiled so."""
    found = {}
    with TemporaryDirectory() as folder:  # a kept kernel may name files that have moved since
        os.environ["FUSEDYOLO_EMULATOR_CACHE"] = folder
        for name in names:
            found[name] = []
            for launch in launches(name):
                options = launch.options(True) | ({"enable_fp_fusion": True} if fused else {})
                compiled = bind(launch.kernel, (), launch.arguments | options, 90, None).compiled
                functions = by_function(compiled.ptx)
                found[name].append({"kernel": compiled.name, "fusion": compiled.fusion, "functions": functions})
    return found


if __name__ == "__main__":
    asked = sys.argv[1:]
    print(json.dumps(main([name for name in asked if name != "fused"], "fused" in asked)))
