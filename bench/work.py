"""Pieces of work, and running them in processes of their own behind a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from fusedyolo.tools import codegen, processes, timing
from fusedyolo.tools.parity import parity
from fusedyolo.tools.registry import CASES, Workload

from . import measure, peers, predict


@dataclass(frozen=True)
class Task:
    """What is done (``parity``, ``count``, ``compile``, ``execute``, ``codegen``, ``warm``, ``time``, ``bandwidth``),
    for which loss, on what, by which provider or for which compile target; ``exact``: no program is left out.

    ``warm`` is a first step, for what compilers leave on disk; parity is also that of a ``compile`` that it names.
    """

    kind: str
    case: str
    work: Workload
    provider: str = ""
    device: str = "cpu"
    exact: bool = False

    @property
    def label(self) -> str:
        """For people."""
        return " ".join(filter(None, (self.kind, self.case, self.provider)))


def do(task: Task) -> Any:
    """The work of a task, in a process for its kind of work."""
    if task.kind == "bandwidth":
        return timing.copy_bandwidth()
    case, work, provider = CASES[task.case], task.work, task.provider
    if task.kind == "parity":
        others = [peer.name for peer in peers.of(case)]
        others += [measure.COMPILE] * (provider == measure.COMPILE)
        return parity(case, work, task.device, {name: partial(measure.provide, case, name) for name in others})
    if task.kind == "count":
        return asdict(measure.count_step(case, work, provider, task.exact))
    if task.kind == "compile":
        return measure.count_compiled(case, work)
    if task.kind == "execute":
        return predict.execute_step(case, work, provider)
    if task.kind == "codegen":
        return codegen.compile_step(case, work, provider)
    if task.kind == "warm":
        measure.ready(case, work, provider, task.device)()
        return None
    try:
        return measure.time_step(case, work, provider, task.device)
    finally:
        torch.cuda.empty_cache()  # for the next one


def run_all(
    tasks: Sequence[Task],
    jobs: int,
    console: Console,
    title: str,
    failures: list[str],
    keep: Callable[[dict[Task, Any]], None] = lambda results: None,
) -> dict[Task, Any]:
    """Run tasks in ``jobs`` processes at a time; the results there are, and to ``failures`` what the others said.

    ``keep`` is given the results so far whenever there is another, should the rest be cut.
    """
    calls = {
        task: processes.Call(
            partial(do, task),
            interpreted=task.kind in ("parity", "count") and task.device == "cpu",
        )
        for task in tasks
    }
    results: dict[Task, Any] = {}
    start = time.monotonic()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(title, total=len(tasks))

        def done(task: Task, result: Any) -> None:
            progress.advance(bar)
            if isinstance(result, processes.Failed):
                causes = [line for line in result.why.splitlines() if "Error" in line] or result.why.splitlines()
                console.print(f"[yellow]no {task.label}:[/] {escape(causes[-1])}", highlight=False)
                failures.append(f"{task.label}\n\n{result.why}\n")
            elif task.kind != "warm":
                results[task] = result
                keep(results)
                if not console.is_terminal:
                    console.print(f"{time.monotonic() - start:.0f} s: {task.label}", highlight=False)

        processes.run_all(calls, jobs, done)
    return results
