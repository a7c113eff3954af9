"""``python -m bench``: parity first, then launches, bytes, host waits, compiled resources and, on a GPU, time.

``python -m bench train`` profiles the training of a small detector instead, ``python -m bench assign`` draws what a
loss assigns to the objects of an image. Every piece of work runs in a process of
its own, because Triton decides when it is imported whether kernels are interpreted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import report
from .codegen import TARGETS
from .registry import CASES, DTYPES, FORMS, Case, Workload, select

ROOT = Path(__file__).resolve().parent.parent
GPU_KINDS = ("time", "bandwidth")


@dataclass(frozen=True)
class Task:
    """One process: what it does, for which loss, on what, by which provider (or for which compile target)."""

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
        return self.kind in ("parity", "count") and self.device == "cpu"


def work_on(task: Task) -> Any:
    """Do the work of a task, in its own process."""
    from . import codegen, measure

    if task.kind == "bandwidth":
        return measure.copy_bandwidth()
    case = CASES[task.case]
    if task.kind == "parity":
        return measure.parity(case, task.work, task.device)
    if task.kind == "count":
        backend = "torch" if task.provider == "eager" else "triton"
        return measure.count_step(case, task.work, backend, _report_programs()).as_dict()
    if task.kind == "compile":
        return measure.count_compiled(case, task.work)
    if task.kind == "codegen":
        launches = codegen.launches(case, task.work)
        return {
            mode: codegen.compile_launch(
                launch.kernel, launch.arguments, launch.options(task.provider != "gfx942"), task.provider
            ).as_dict()
            for mode, launch in launches.items()
        }
    return measure.time_step(case, task.work, task.provider)


def _report_programs() -> Callable[[int, int, int], None]:
    last = 0.0

    def tell(launch: int, program: int, programs: int) -> None:
        nonlocal last
        if time.monotonic() - last > 0.2:
            last = time.monotonic()
            print(json.dumps({"progress": [launch, program, programs]}), flush=True)

    return tell


def run_task(task: Task, threads: int, on_progress: Callable[[list[int]], None]) -> tuple[Any, str]:
    """Run a task in a process; its result, or None and why there is none."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("FUSEDYOLO_DISABLE", None)
    if task.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    description = json.dumps({**vars(task), "work": task.work.as_dict()})
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench", "_task", description],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert process.stdout is not None
        result = None
        for line in process.stdout:
            if line.startswith('{"progress"'):
                on_progress(json.loads(line)["progress"])
            elif line.startswith('{"result"'):
                result = json.loads(line)["result"]
        if process.wait() == 0:
            return result, ""
        errors.seek(0)
        return None, errors.read().strip() or f"exit status {process.returncode}"


def run_all(tasks: list[Task], jobs: int, console: Console, title: str, failures: list[str]) -> dict[Task, Any]:
    """Run tasks in ``jobs`` processes at a time; the results there are, the others' output appended to ``failures``."""
    results: dict[Task, Any] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress, ThreadPoolExecutor(jobs) as pool:
        overall = progress.add_task(title, total=len(tasks))

        def run(task: Task) -> tuple[Any, str, float]:
            bar = progress.add_task(f"  {task.label}", total=None)

            def move(done: list[int]) -> None:
                launch, program, programs = done
                progress.update(bar, description=f"  {task.label}, launch {launch}", completed=program, total=programs)

            start = time.monotonic()
            result, why = run_task(task, max(1, (os.cpu_count() or 1) // jobs), move)
            progress.remove_task(bar)
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
    return results


def plan(cases: Iterable[Case], work: Workload, gpu: bool, quick: bool, targets: Iterable[str]) -> list[Task]:
    """Every task behind the parity gate; the longest first."""
    names = [case.name for case in cases]
    tasks = [Task("count", name, work, provider) for provider in ("fused", "eager") for name in names]
    tasks += [] if quick else [Task("compile", name, work, "compile") for name in names]
    tasks += [Task("codegen", name, work, target) for name in names for target in targets]
    if gpu:
        tasks.append(Task("bandwidth", "", work, device="cuda"))
        tasks += [Task("time", n, work, p, "cuda") for n in names for p in ("eager", "compile", "fused")]
    return tasks


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, help="images (16; 2 with --quick)")
    parser.add_argument("--size", type=int, help="image side in pixels, a multiple of 32 (640; 320 with --quick)")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--dtype", default="float32", choices=[name for name in DTYPES if name != "float64"])
    parser.add_argument(
        "--loss", action="append", default=[], metavar="NAME", help=f"one of {', '.join(CASES)}; repeat for more"
    )
    objects = parser.add_mutually_exclusive_group()
    objects.add_argument("--labels", metavar="PATH", help="objects of a YOLO txt folder, a COCO json or a VOC folder")
    objects.add_argument(
        "--crowded", nargs="?", type=int, const=5000, metavar="N", help="N objects an image (5000); slow without a GPU"
    )
    parser.add_argument(
        "--form", default="packed", choices=FORMS, help="targets as packed rows, or as fusedyolo.Targets"
    )
    parser.add_argument("--seed", type=int, default=Workload.seed)
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="to compile for; repeat for more (all)"
    )
    parser.add_argument("--quick", action="store_true", help="smaller, fewer compile targets, no torch.compile")
    parser.add_argument("--jobs", type=int, default=max(1, min(4, (os.cpu_count() or 1))), help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for JSON, CSV and pictures")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and no tables")
    options = parser.parse_args(argv)
    options.batch = options.batch or (2 if options.quick else 16)
    options.size = options.size or (320 if options.quick else 640)
    options.target = options.target or (["sm_90", "gfx942"] if options.quick else list(TARGETS))
    if options.size % 32 or options.size <= 0:
        parser.error(f"--size: {options.size}, want a multiple of 32")
    for name in ("batch", "classes", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)}, want at least 1")
    if options.labels and not Path(options.labels).exists():
        parser.error(f"--labels: {options.labels} does not exist")
    try:
        options.cases = select(options.loss)
    except ValueError as error:
        parser.error(str(error))
    return options


def bench(argv: list[str]) -> int:
    """The main job; 1 if a loss failed parity or a measurement of ours broke."""
    options = parse(argv)
    objects = f"crowded:{options.crowded}" if options.crowded else "coco"
    if options.labels:
        objects = str(Path(options.labels).resolve())
    work = Workload(options.batch, options.size, options.classes, options.dtype, objects, options.form, options.seed)
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=120)
    failures: list[str] = []
    host = report.environment(ROOT)
    gpu = host["gpu"] is not None
    console.print(report.headline(work, host), highlight=False)

    gate = [Task("parity", case.name, work, device="cuda" if gpu else "cpu") for case in options.cases]
    parity = run_all(gate, 1 if gpu else options.jobs, console, "parity", failures)
    report.print_parity(console, {task.case: parity.get(task) for task in gate}, gpu)
    if not all(task in parity and parity[task]["ok"] for task in gate):
        console.print("[bold red]parity failed:[/] nothing else was measured")
        report.write_failures(options.out, failures)
        return 1

    tasks = plan(options.cases, work, gpu, options.quick, options.target)
    timed = [task for task in tasks if task.kind in GPU_KINDS]
    others = [task for task in tasks if task.kind not in GPU_KINDS]
    results = run_all(others, options.jobs, console, "counting and compiling", failures)
    if gpu:  # nothing else runs meanwhile
        results |= run_all(timed, 1, console, "timing", failures)
    rows = report.rows(parity | results, work, host)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        report.print_tables(console, rows, options.cases)
    for path in [*report.write(options.out, rows, host, options.cases), *report.write_failures(options.out, failures)]:
        console.print(f"wrote {path}", highlight=False)
    return int(any(t not in results for t in tasks if t.kind != "compile" and t.provider != "compile"))


def main(argv: list[str]) -> int:
    """Choose between the main job, training, a picture of an assignment, and the work of one process."""
    if argv[:1] == ["train"]:
        from . import train

        return train.main(argv[1:])
    if argv[:1] == ["assign"]:
        from . import assign

        return assign.main(argv[1:])
    if argv[:1] == ["_task"]:
        fields = json.loads(argv[1])
        task = Task(**{**fields, "work": Workload(**fields["work"])})
        print(json.dumps({"result": work_on(task)}), flush=True)
        return 0
    return bench(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
