"""What a benchmark is made of: pieces of work in processes of their own, the gate before them, and the files after."""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.progress import track

from fusedyolo.tools import codegen, processes, terminal, timing
from fusedyolo.tools.env import environment
from fusedyolo.tools.parity import parity, parity_table
from fusedyolo.tools.registry import CASES, Workload

from . import measure, peers, predict
from .measure import COMPILE, FUSED


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
        others = [*(peer.name for peer in peers.of(case)), *[COMPILE] * (provider == COMPILE)]
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


Keep = Callable[[dict[Task, Any]], Any]
"""What is given the results so far whenever there is another, should the rest be cut."""


class Session:
    """One benchmark: the machine it runs on, its ``console``, and ``failures``, what tasks that broke had to say."""

    def __init__(self, options: argparse.Namespace, name: str):
        self.name, self.out, self.jobs = name, options.out, options.jobs
        self.host, self.failures = environment(), list[str]()
        self.gpu = self.host["gpu"] is not None
        self.device = "cuda" if self.gpu else "cpu"
        self.console = terminal.console()

    def run(self, tasks: Sequence[Task], title: str, keep: Keep = lambda results: None) -> dict[Task, Any]:
        """The results that tasks have, ``jobs`` of them at a time. Those that are timed are one at a time, with nothing
        beside them: what they compile is compiled before.
        """
        timed = any(task.kind == "time" for task in tasks)
        if timed:
            self.run([replace(task, kind="warm") for task in tasks if task.provider in (COMPILE, FUSED)], "compiling")
        interpreted = {task: task.kind in ("parity", "count") and task.device == "cpu" for task in tasks}
        calls = {task: processes.Call(partial(do, task), each) for task, each in interpreted.items()}
        results: dict[Task, Any] = {}
        start, found = time.monotonic(), processes.run_all(calls, 1 if timed else self.jobs)
        for task, result in track(found, title, len(calls), console=self.console, transient=True):
            if isinstance(result, processes.Failed):
                causes = [line for line in result.why.splitlines() if "Error" in line] or result.why.splitlines()
                self.console.print(f"[yellow]no {task.label}:[/] {escape(causes[-1])}", highlight=False)
                self.failures.append(f"{task.label}\n\n{result.why}\n")
            elif task.kind != "warm":
                results[task] = result
                keep(results)
                if not self.console.is_terminal:
                    self.console.print(f"{time.monotonic() - start:.0f} s: {task.label}", highlight=False)
        return results

    def gate(self, tasks: Sequence[Task]) -> tuple[dict[Task, Any], set[tuple[str, str]]]:
        """What was found of the parity of losses, by task; nothing if one of ours does not give the numbers of the
        reference, for then nothing is to be measured. And who computes something else, a loss and a provider each.
        """
        found = self.run(tasks, "parity")
        shown = {f"{task.case} {task.work.dtype} {task.work.layout}".rstrip(): found.get(task) for task in tasks}
        where = "on this GPU" if self.gpu else "in Triton's interpreter"
        self.console.print(parity_table(where, shown), highlight=False)
        bad = [task.label for task in tasks if task not in found or FUSED in found[task]["failed"]]
        if bad:
            self.console.print(f"[bold red]parity failed:[/] {', '.join(bad)}; nothing else was measured")
            self.write([])
            return {}, set()
        return found, {(task.case, name) for task, result in found.items() for name in result["failed"]}

    def write(self, rows: Sequence[dict[str, Any]]) -> list[Path]:
        """Write this run's JSON and CSV, and, if tasks broke, what they had to say."""
        paths = [self.out / f"{self.name}.json", self.out / f"{self.name}.csv", self.out / "failed.txt"]
        paths[0].write_text(json.dumps({"environment": self.host, "rows": list(rows)}, indent=1) + "\n")
        paths[1].unlink(missing_ok=True)
        if rows:
            with paths[1].open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        paths[2].unlink(missing_ok=True)
        if self.failures:
            paths[2].write_text("\n".join(self.failures))
        return [path for path in paths if path.exists()]
