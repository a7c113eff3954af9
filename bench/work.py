"""Pieces of work, and running them in processes of their own behind a progress bar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape

from fusedyolo.tools import processes
from fusedyolo.tools.registry import CASES, Workload
from fusedyolo.tools.terminal import bars

from . import peers


@dataclass(frozen=True)
class Task:
    """What is done, for which loss, on what, by which provider (or for which compile target)."""

    kind: str
    case: str
    work: Workload
    provider: str = ""
    device: str = "cpu"

    @property
    def label(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.kind, self.case, self.provider)))


def do(task: Task) -> Any:
    """The work of a task, in a process for its kind of work."""
    from fusedyolo.tools import codegen, timing
    from fusedyolo.tools.parity import parity

    from . import measure, predict

    if task.kind == "bandwidth":
        return timing.copy_bandwidth()
    case = CASES[task.case]
    if task.kind == "parity":
        others = [peer.name for peer in peers.of(case)]
        others += [measure.COMPILE] * (task.device != "cpu")  # what is to be timed
        return parity(case, task.work, task.device, {name: partial(measure.provide, case, name) for name in others})
    if task.kind in ("count", "count exactly"):
        return measure.count_step(case, task.work, task.provider, exact=task.kind == "count exactly").as_dict()
    if task.kind == "compile":
        return measure.count_compiled(case, task.work)
    if task.kind == "execute":
        return predict.execute_step(case, task.work, task.provider)
    if task.kind == "codegen":
        compiled = codegen.compile_step(case, task.work, task.provider)
        return {launch: resources.as_dict() for launch, resources in compiled.items()}
    return measure.time_step(case, task.work, task.provider, quick=task.kind == "quick time")


def run_all(tasks: Sequence[Task], jobs: int, console: Console, title: str, failures: list[str]) -> dict[Task, Any]:
    """Run tasks in ``jobs`` processes at a time; the results there are, what the others said appended to ``failures``.

    What is timed at length has a process of its own: memory and compiled code of one must not be in the way of another,
    and the first step is to be a first step.
    """
    calls = {
        task: processes.Call(
            partial(do, task),
            interpreted=task.kind in ("parity", "count", "count exactly") and task.device == "cpu",
            alone=task.kind in ("time", "bandwidth"),
        )
        for task in tasks
    }
    results: dict[Task, Any] = {}
    start = time.monotonic()
    with bars(console, transient=True) as progress:
        bar = progress.add_task(title, total=len(tasks))

        def done(task: Task, result: Any) -> None:
            progress.advance(bar)
            if isinstance(result, processes.Failed):
                causes = [line for line in result.why.splitlines() if "Error" in line] or result.why.splitlines()
                console.print(f"[yellow]no {task.label}:[/] {escape(causes[-1])}", highlight=False)
                failures.append(f"{task.label}\n\n{result.why}\n")
            else:
                results[task] = result
                if not console.is_terminal:
                    console.print(f"{time.monotonic() - start:.0f} s: {task.label}", highlight=False)

        processes.run_all(calls, jobs, done)
    return results
