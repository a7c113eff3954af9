"""``python -m bench qualify``: everything that wants a GPU, in one command of under eight minutes and one folder.

Parity, tests, compute-sanitizer, tuning, benchmark with what was tuned, sweep, profile; each step has its share of the
time and is cut when that is over, so that what comes after it still runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedyolo.tools.environment import ROOT, environment

MINUTES = 7.5
PYTHON = (sys.executable, "-W", "ignore", "-m")
LOSSES = ("YOLOv4/paper", "YOLOv5", "RetinaNet", "SSD", "FCOS")
REQUIRED = {"environment", "check", "tests", "bench"}
KERNELS = "regex:(grid|grid_grad|cell|overlap|match|dense|rank)_kernel"


@dataclass(frozen=True)
class Step:
    """A command, and the seconds it may take; ``needs`` is a program that not every machine has."""

    name: str
    command: tuple[str, ...]
    seconds: float
    needs: str = ""
    variables: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``passed``, ``failed``, ``cut`` or ``left out``."""

    name: str
    verdict: str
    seconds: float
    said: str


def plan(out: Path) -> list[Step]:
    """The steps, in order; their seconds are less than ``MINUTES``."""
    losses = tuple(argument for name in LOSSES for argument in ("--loss", name))
    check = (*PYTHON, "fusedyolo", "check")
    memcheck = ("compute-sanitizer", "--error-exitcode", "1", "--tool", "memcheck", *check, *losses)
    uncached = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # a cached block hides what lies beyond its tensor
    step = (*PYTHON, "bench", "_step", "YOLOv4/paper")
    ncu = ("ncu", "-k", KERNELS, "--launch-count", "4", "--set", "full", "-f", "-o", str(out / "profile"), *step)
    return [
        Step("environment", (*PYTHON, "fusedyolo", "env", "--json"), 15),
        Step("check", (*check, "--dtype", "float32", "--dtype", "bfloat16"), 60),
        Step("tests", (*PYTHON, "pytest", "-q", "-n", "8"), 100),
        Step("memcheck", memcheck, 45, "compute-sanitizer", uncached),
        Step("tune", (*PYTHON, "fusedyolo", "tune", *losses[:4], "--out", str(out / "configs")), 60),
        Step("bench", (*PYTHON, "bench", "--times", *losses, "--out", str(out / "bench")), 110),
        Step("sweep", (*PYTHON, "bench", "sweep", "--axis", "objects", *losses[:4], "--out", str(out / "sweep")), 35),
        Step("profile", ncu, 20, "ncu"),
    ]


Runner = Callable[[Step, Path, Mapping[str, str], float], int | None]


def run_step(step: Step, log: Path, variables: Mapping[str, str], seconds: float) -> int | None:
    """The exit status of a step, its output in ``log``; None if its time was over."""
    with log.open("w") as file:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | variables, stdout=file, stderr=file, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own workers too
            process.wait()


def qualify(
    steps: Sequence[Step], out: Path, minutes: float, console: Console, runner: Runner = run_step
) -> list[Outcome]:
    """Run the steps while there is time."""
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    variables = {"FUSEDYOLO_CONFIG_DIR": str((out / "configs").resolve())}
    outcomes = []
    for number, step in enumerate(steps, 1):
        left = end - time.monotonic()
        if step.needs and shutil.which(step.needs) is None:
            outcomes.append(Outcome(step.name, "left out", 0.0, f"{step.needs} is not installed"))
        elif left < 5:
            outcomes.append(Outcome(step.name, "left out", 0.0, "no time was left"))
        else:
            log = out / f"{number}-{step.name}.log"
            with console.status(f"{step.name}, {left:.0f} s left"):
                start = time.monotonic()
                status = runner(step, log, variables | dict(step.variables), min(step.seconds, left))
            last = (log.read_text().strip() or " ").splitlines()[-1] if log.exists() else ""
            ended = "cut" if status is None else "passed" if status == 0 else "failed"
            outcomes.append(Outcome(step.name, ended, time.monotonic() - start, last))
        console.print(f"{step.name}: {outcomes[-1].verdict}, {outcomes[-1].seconds:.0f} s", highlight=False)
    return outcomes


def main(argv: Sequence[str]) -> int:
    """Qualify this GPU: see :func:`verdict`; 2 without a GPU."""
    parser = argparse.ArgumentParser("python -m bench qualify", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"in all ({MINUTES:g})")
    parser.add_argument("--out", type=Path, default=Path("runs/qualify"), help="folder of all results")
    options, console = parser.parse_args(argv), Console()
    if not torch.cuda.is_available():
        console.print("[red]no GPU: there is nothing to qualify; python -m bench counts what can be counted without")
        return 2
    host = environment()
    outcomes = qualify(plan(options.out.resolve()), options.out, options.minutes, console)
    content = {"environment": host, "steps": [asdict(outcome) for outcome in outcomes]}
    (options.out / "qualify.json").write_text(json.dumps(content, indent=1) + "\n")
    table = Table("step", "", "seconds", "its last line", title=f"{host['gpu']}, commit {host['commit']}")
    colours = {"passed": "green", "failed": "bold red", "cut": "yellow", "left out": "yellow"}
    for each in outcomes:
        coloured = f"[{colours[each.verdict]}]{each.verdict}"
        table.add_row(each.name, coloured, f"{each.seconds:.0f}", escape(each.said[:100]))
    console.print(table, f"wrote {options.out}", highlight=False)
    return verdict(outcomes)


def verdict(outcomes: Sequence[Outcome]) -> int:
    """0 if nothing failed and what is required passed; what was cut or left out has not."""
    failed = any(each.verdict == "failed" for each in outcomes)
    return int(failed or not {each.name for each in outcomes if each.verdict == "passed"} >= REQUIRED)
