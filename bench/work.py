"""Pieces of work and the processes that do them: Triton decides when it is imported whether kernels are interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusedyolo.tools.environment import ROOT
from fusedyolo.tools.registry import CASES, Workload

OnProgress = Callable[[list[int]], None]


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
        """For the progress display."""
        return " ".join(filter(None, (self.kind, self.case, self.provider)))

    @property
    def interpreted(self) -> bool:
        """Whether Triton's kernels are to run in the interpreter."""
        return self.kind in ("parity", "count", "count exactly") and self.device == "cpu"


def do(task: Task) -> Any:
    """The work of a task, in a process for its kind of work."""
    from fusedyolo.tools import codegen, timing
    from fusedyolo.tools.parity import parity

    from . import measure, peers

    if task.kind == "bandwidth":
        return timing.copy_bandwidth()
    case = CASES.get(task.case) or peers.PENDING[task.case]
    if task.kind == "parity":
        others = [peer.name for peer in peers.of(case)]
        others += [measure.COMPILE] * (task.device != "cpu")  # what is to be timed
        return parity(case, task.work, task.device, {name: partial(measure.provide, case, name) for name in others})
    if task.kind in ("count", "count exactly"):
        exact = task.kind == "count exactly"
        return measure.count_step(case, task.work, task.provider, _report_programs(), exact).as_dict()
    if task.kind == "compile":
        return measure.count_compiled(case, task.work)
    if task.kind == "execute":
        from .predict import execute_step

        return execute_step(case, task.work, task.provider)
    if task.kind == "codegen":
        compiled = codegen.compile_step(case, task.work, task.provider)
        return {launch: resources.as_dict() for launch, resources in compiled.items()}
    return measure.time_step(case, task.work, task.provider, quick=task.kind == "quick time")


def _report_programs() -> Callable[[int, int, int], None]:
    last = 0.0

    def tell(launch: int, program: int, programs: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            print(json.dumps({"progress": [launch, program, programs]}), flush=True)

    return tell


def serve() -> None:
    """The life of a worker: a task a line comes in, a result goes out."""
    for line in sys.stdin:
        fields = json.loads(line)
        result = do(Task(**{**fields, "work": Workload(**fields["work"])}))
        print(json.dumps({"result": result}), flush=True)


class Worker:
    """A process that does one task after another, and another one after it should one of them break it. What a ``cold``
    one compiles was never compiled before.
    """

    def __init__(self, interpreted: bool, threads: int, cold: bool = False):
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        for name in ("TRITON_INTERPRET", "FUSEDYOLO_DISABLE"):
            self.environment.pop(name, None)
        if interpreted:
            self.environment["TRITON_INTERPRET"] = "1"
        self.caches: tempfile.TemporaryDirectory[str] | None = None
        if cold:
            self.caches = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
                self.environment[name] = os.path.join(self.caches.name, name)
        self.process: subprocess.Popen[str] | None = None
        self.errors: IO[str] | None = None

    def run(self, task: Task, on_progress: OnProgress) -> tuple[Any, str]:
        """The result of a task, or None and why there is none."""
        if self.process is None:
            self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "bench", "_work"],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # it died on its way up: there will be no answer
            print(json.dumps({**vars(task), "work": task.work.as_dict()}), file=self.process.stdin, flush=True)
        for line in self.process.stdout:
            if line.startswith('{"progress"'):
                on_progress(json.loads(line)["progress"])
            elif line.startswith('{"result"'):
                return json.loads(line)["result"], ""
        return None, self.close()

    def close(self) -> str:
        """End the process; what it had to say on standard error, or its exit status."""
        if self.process is None or self.errors is None:
            return ""
        with suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        status = self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()
        self.errors.close()
        self.process = None
        if self.caches is not None:
            self.caches.cleanup()
        return said or f"exit status {status}"


def run_all(tasks: Sequence[Task], jobs: int, console: Console, title: str, failures: list[str]) -> dict[Task, Any]:
    """Run tasks in ``jobs`` processes at a time; the results there are, the others' output appended to ``failures``.

    What is timed at length has a process of its own: memory and compiled code of one must not be in the way of another,
    and the first step is to be a first step.
    """
    results: dict[Task, Any] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    idle: dict[bool, list[Worker]] = {True: [], False: []}
    lock = threading.Lock()
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
        overall = progress.add_task(title, total=len(tasks))

        def run(task: Task) -> tuple[Any, str, float]:
            bar = progress.add_task(f"  {task.label}", total=None)

            def move(done: list[int]) -> None:
                launch, program, programs = done
                progress.update(bar, description=f"  {task.label}, launch {launch}", completed=program, total=programs)

            alone = task.kind in ("time", "bandwidth")
            with lock:
                found = [] if alone else idle[task.interpreted]
                worker = found.pop() if found else Worker(task.interpreted, threads, cold=alone)
            start = time.monotonic()
            result, why = worker.run(task, move)
            progress.remove_task(bar)
            if alone:
                worker.close()
            else:
                with lock:
                    idle[task.interpreted].append(worker)
            return result, why, time.monotonic() - start

        futures = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(futures):
            task, (result, why, seconds) = futures[future], future.result()
            progress.advance(overall)
            if why:
                causes = [line for line in why.splitlines() if "Error" in line] or why.splitlines()
                console.print(f"[yellow]no {task.label}:[/] {escape(causes[-1])}", highlight=False)
                failures.append(f"{task.label}\n\n{why}\n")
            else:
                results[task] = result
                if not console.is_terminal:
                    console.print(f"{task.label}: {seconds:.0f} s", highlight=False)
    for worker in idle[True] + idle[False]:
        worker.close()
    return results
