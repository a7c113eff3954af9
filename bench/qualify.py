"""Everything that wants a GPU, in one command of under eight minutes and one folder.

Parity, tests, compute-sanitizer, tuning, benchmark with what was tuned, sweep, profile; each step has its share of the
time and is cut when that is over, so that what comes after it still runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape

from fusedyolo.tools.env import ROOT, environment
from fusedyolo.tools.registry import SHOWN, RefusedError

MINUTES = 7.5  # in all
PYTHON = (sys.executable, "-W", "ignore", "-m")
REQUIRED = {"environment", "check", "tests", "bench"}
PROFILED = f"from bench.measure import run_fused; run_fused({SHOWN[0].name!r})"
COLOURS = {"passed": "green", "failed": "bold red", "cut": "yellow", "left out": "yellow"}


class Step(NamedTuple):
    """A command, and the seconds it may take."""

    name: str
    seconds: float
    command: tuple[str, ...]
    variables: Mapping[str, str] = {}


class Outcome(NamedTuple):
    """How a step ended: ``passed``, ``failed``, ``cut`` or ``left out``."""

    name: str
    verdict: str
    seconds: float
    said: str


def plan(out: Path) -> list[Step]:
    """The steps, in order; their seconds are less than what all of them have."""
    losses = tuple(argument for case in SHOWN for argument in ("--loss", case.name))
    check = (*PYTHON, "fusedyolo", "check")
    memcheck = ("compute-sanitizer", "--error-exitcode", "1", "--tool", "memcheck", *check, *losses)
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # a cached block hides what lies beyond its tensor
    ncu = ("ncu", "-k", "regex:.*_kernel$", "--launch-count", "4", "--set", "full", "-f", "-o", str(out / "profile"))
    return [
        Step("environment", 15, (*PYTHON, "fusedyolo", "env", "--json")),
        Step("check", 60, (*check, "--dtype", "float32", "--dtype", "bfloat16")),
        Step("tests", 100, (*PYTHON, "pytest", "-q", "-n", "8")),
        Step("memcheck", 45, memcheck, uncached),
        Step("tune", 60, (*PYTHON, "fusedyolo", "tune", *losses[:4], "--out", str(out / "configs"))),
        Step("bench", 110, (*PYTHON, "bench", "--times", *losses, "--out", str(out / "bench"))),
        Step("sweep", 35, (*PYTHON, "bench", "sweep", "--axis", "objects", *losses[:4], "--out", str(out / "sweep"))),
        Step("profile", 20, (*ncu, sys.executable, "-c", PROFILED)),
    ]


def run_step(step: Step, log: Path, left: float) -> Outcome:
    """Run a command, its output in ``log``, for as many seconds as it may take and are ``left``; launches are
    configured by what was tuned beside the log.
    """
    if shutil.which(step.command[0]) is None:
        return Outcome(step.name, "left out", 0.0, f"{step.command[0]} is not installed")
    if left < 5:
        return Outcome(step.name, "left out", 0.0, "no time was left")
    start, most = time.monotonic(), min(step.seconds, left)
    command = ("timeout", "--kill-after=2", str(most), *step.command)  # ends its own workers too
    variables = os.environ | {"FUSEDYOLO_CONFIG_DIR": str(log.resolve().parent / "configs"), **step.variables}
    with log.open("w") as file:
        status = subprocess.call(command, cwd=ROOT, env=variables, stdout=file, stderr=file)
    seconds = time.monotonic() - start
    said = (log.read_text().strip() or " ").splitlines()[-1]
    ended = "cut" if seconds >= most else "failed"
    return Outcome(step.name, ended if status else "passed", seconds, said)


def qualify(steps: Sequence[Step], out: Path, minutes: float, console: Console) -> list[Outcome]:
    """Run the steps while there is time."""
    end = time.monotonic() + 60 * minutes
    outcomes = []
    for number, step in enumerate(steps, 1):
        left = end - time.monotonic()
        with console.status(f"{step.name}, {left:.0f} s left"):
            outcomes.append(run_step(step, out / f"{number}-{step.name}.log", left))
        name, ended, seconds, said = outcomes[-1]
        console.print(f"{name}: [{COLOURS[ended]}]{ended}[/], {seconds:.0f} s  {escape(said[:100])}", highlight=False)
    return outcomes


def run(options: argparse.Namespace) -> int:
    """Qualify this GPU: see :func:`verdict`."""
    console, host = Console(), environment()
    if host["gpu"] is None:
        raise RefusedError("no GPU: there is nothing to qualify; python -m bench counts what can be counted without")
    outcomes = qualify(plan(options.out.resolve()), options.out, MINUTES, console)
    content = {"environment": host, "steps": [outcome._asdict() for outcome in outcomes]}
    (options.out / "qualify.json").write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"wrote {options.out}", highlight=False)
    return verdict(outcomes)


def verdict(outcomes: Sequence[Outcome]) -> int:
    """0 if nothing failed and what is required passed; what was cut or left out has not."""
    failed = any(each.verdict == "failed" for each in outcomes)
    return int(failed or not {each.name for each in outcomes if each.verdict == "passed"} >= REQUIRED)
