"""``python -m bench sweep``: how the cost of a step grows with objects, batch, classes, type and layout.

On a GPU milliseconds, elsewhere bytes and launches, counted; one quantity is varied at a time.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from fusedyolo.tools.environment import environment
from fusedyolo.tools.registry import DTYPES, Case, Workload, add_loss, select

from . import peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .rows import Row, index, rows, write, write_failures
from .work import Task, run_all

LOSSES = ("YOLOv4/paper", "YOLOv5", "RetinaNet", "SSD", "FCOS")
NUMBERS: dict[str, tuple[int, ...]] = {
    "objects": (1, 8, 64, 512),  # an image
    "batch": (1, 4, 16, 64, 128),
    "classes": (1, 20, 80, 365),
}
INTERPRETED = {**NUMBERS, "objects": (1, 8, 64), "batch": (1, 4, 16)}  # more takes Triton's interpreter too long
AXES = (*NUMBERS, "dtype", "layout")
BASE = {True: Workload(), False: Workload(batch=4, size=320)}  # on a GPU, without one


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench sweep", description=__doc__.splitlines()[0])
    add_loss(parser, ", ".join(LOSSES))
    parser.add_argument("--axis", action="append", choices=AXES, help="what is varied; repeat for more (all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time, without a GPU")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder for JSON, CSV and pictures")
    options = parser.parse_args(argv)
    options.axis = options.axis or list(AXES)
    try:
        options.cases = select(options.loss or list(LOSSES))
    except ValueError as error:
        parser.error(str(error))
    return options


def workloads(case: Case, axis: str, gpu: bool) -> dict[Any, Workload]:
    """What is measured along an axis, by the value there."""
    base, numbers = BASE[gpu], NUMBERS if gpu else INTERPRETED
    if axis == "objects":
        return {n: replace(base, objects=f"crowded:{n}") for n in numbers[axis]}
    if axis == "dtype":
        return {name: replace(base, dtype=name) for name in DTYPES if name != "float64"}
    if axis == "layout":
        return {name: replace(base, layout=name) for name in case.layouts}
    return {n: replace(base, **{axis: n}) for n in numbers[axis]}


def main(argv: Sequence[str]) -> int:
    """Measure and draw: 0, or 1 if a loss failed parity or a measurement of ours broke."""
    options, console = parse(argv), Console()
    host, failures = environment(), []
    found: list[Row] = []
    gpu = host["gpu"] is not None
    base, device = BASE[gpu], "cuda" if gpu else "cpu"
    console.print(report.headline(base, host), highlight=False)
    wanted = {(case, axis): workloads(case, axis, gpu) for case in options.cases for axis in options.axis}

    checked = {(case.name, w.dtype, w.layout): w for (case, _), each in wanted.items() for w in each.values()}
    gate = [Task("parity", name, replace(w, objects="coco"), device=device) for (name, *_), w in checked.items()]
    parity = run_all(list(dict.fromkeys(gate)), 1 if gpu else options.jobs, console, "parity", failures)
    bad = [task.label for task in gate if task not in parity or not parity[task]["ok"]]
    if bad:
        console.print(f"[bold red]parity failed:[/] {', '.join(bad)}; nothing else was measured")
        write_failures(options.out, failures)
        return 1

    kind = "quick time" if gpu else "count"
    tasks = [
        Task(kind, case.name, work, provider, device)
        for (case, _), each in wanted.items()
        for provider in (*(peer.name for peer in peers.of(case)), EAGER, *[COMPILE] * gpu, FUSED)
        for work in each.values()
    ]
    differing = {(task.case, name) for task, found in parity.items() for name in found["failed"]}
    tasks = [task for task in dict.fromkeys(tasks) if not gpu or (task.case, task.provider) not in differing]
    results: dict[Task, Any] = {}
    for case in options.cases:  # what was measured is kept, should the rest be cut
        own = [task for task in tasks if task.case == case.name]
        title = f"{'timing' if gpu else 'counting'} {case.name}"
        measured = run_all(own, 1 if gpu else options.jobs, console, title, failures)
        results |= measured
        for work in dict.fromkeys(task.work for task in measured):
            own_rows = rows({task: result for task, result in measured.items() if task.work == work}, work, host)
            found += own_rows
            report.print_remarks(console, index(own_rows), [case])
        write(options.out, found, host, "sweep")
    curves = {
        (case.name, axis, provider): {
            value: results.get(Task(kind, case.name, work, provider, device)) for value, work in each.items()
        }
        for (case, axis), each in wanted.items()
        for provider in (*(peer.name for peer in peers.of(case)), EAGER, COMPILE, FUSED)
    }
    pictures = plots.sweep(options.out, curves, gpu, base)
    for path in [*write(options.out, found, host, "sweep"), *pictures, *write_failures(options.out, failures)]:
        console.print(f"wrote {path}", highlight=False)
    return int(any(task not in results for task in tasks if task.provider == FUSED))
