"""``python -m bench``: parity first, then launches, bytes, host waits, compiled code, predicted and, on a GPU, time.

``python -m bench sweep`` shows how these grow with objects, batch and classes, ``python -m bench train`` where a
training step goes, ``python -m bench assign`` what a loss assigns to the objects of an image; ``python -m bench
qualify`` does everything that wants a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.environment import environment
from fusedyolo.tools.registry import CASES, DTYPES, FORMS, LAYOUTS, Case, Workload, add_loss, first_recipes, select

from . import peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS
from .rows import index, rows, write, write_failures
from .work import Task, run_all, serve

GPU_KINDS = ("time", "bandwidth")
PREDICTING = ("count", "count exactly", "execute", "codegen")


def plan(
    cases: Iterable[Case],
    work: Workload,
    gpu: bool,
    exact: bool,
    compiles: bool,
    targets: Iterable[str],
    executed: str,
) -> list[Task]:
    """Every task behind the parity gate; the longest first. Kernels are compiled for ``targets``, and for one of them
    executed.
    """
    cases = list(cases)
    ours = [case.name for case in cases if case.name in CASES]
    kind = "count exactly" if exact else "count"
    tasks = [Task("compile", name, work, COMPILE) for name in ours if compiles]
    tasks += [Task(kind, name, work, FUSED) for name in ours]
    tasks += [Task("count", case.name, work, peer.name) for case in cases for peer in peers.of(case)]
    tasks += [Task("execute", name, work, executed) for name in ours]
    tasks += [Task("codegen", name, work, target) for name in ours for target in dict.fromkeys([*targets, executed])]
    tasks += [Task("count", name, work, EAGER) for name in ours]
    if gpu:
        tasks.append(Task("bandwidth", "", work, device="cuda"))
        providers = {case.name: [peer.name for peer in peers.of(case)] for case in cases}
        for name in ours:
            providers[name] += [EAGER, *[COMPILE] * compiles, FUSED]
        tasks += [Task("time", name, work, p, "cuda") for name, each in providers.items() for p in each]
    return tasks


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, help="images (16; 2 with --quick)")
    parser.add_argument("--size", type=int, help="image side in pixels, a multiple of 32 (640; 320 with --quick)")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--dtype", default="float32", choices=[name for name in DTYPES if name != "float64"])
    add_loss(parser, "each loss in its default recipe")
    parser.add_argument("--recipes", action="store_true", help="every recipe of every loss")
    objects = parser.add_mutually_exclusive_group()
    objects.add_argument("--labels", metavar="PATH", help="objects of a YOLO txt folder, a COCO json or a VOC folder")
    objects.add_argument(
        "--crowded", nargs="?", type=int, const=5000, metavar="N", help="N objects an image (5000); slow without a GPU"
    )
    parser.add_argument(
        "--form", default="packed", choices=FORMS, help="targets as packed rows, or as fusedyolo.Targets"
    )
    parser.add_argument("--layout", default="", choices=LAYOUTS, help="of predictions, where a loss takes it")
    parser.add_argument("--seed", type=int, default=Workload.seed)
    parser.add_argument(
        "--exact", action="store_true", help="without a GPU, run every program of a kernel in the interpreter: minutes"
    )
    parser.add_argument(
        "--target", action="append", choices=list(TARGETS), help="to compile for; repeat for more (sm_90, gfx942)"
    )
    parser.add_argument("--gpu", default="H100", choices=list(GPUS), help="to predict the time of launches for (H100)")
    parser.add_argument("--quick", action="store_true", help="smaller, no torch.compile")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--times", action="store_true", help="on a GPU, parity and times alone")
    only.add_argument("--predict", action="store_true", help="parity and predicted times alone")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for JSON, CSV and pictures")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON and no tables")
    options = parser.parse_args(argv)
    options.batch = options.batch or (2 if options.quick else 16)
    options.size = options.size or (320 if options.quick else 640)
    options.target = options.target or ["sm_90", "gfx942"]
    if options.size % 32 or options.size <= 0:
        parser.error(f"--size: {options.size}, want a multiple of 32")
    for name in ("batch", "classes", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)}, want at least 1")
    if options.labels and not Path(options.labels).exists():
        parser.error(f"--labels: {options.labels} does not exist")
    try:
        options.cases = select(options.loss) if options.loss or options.recipes else usual_cases()
    except ValueError as error:
        parser.error(str(error))
    return options


def usual_cases() -> list[Case]:
    """Each loss in its default recipe, and whatever a peer that is installed here computes."""
    first = first_recipes()
    ours = [case for case in CASES.values() if case in first or peers.of(case)]
    return ours + [case for case in peers.PENDING.values() if peers.of(case)]


def bench(argv: list[str]) -> int:
    """The main job: 1 if a loss failed parity or a measurement of ours broke, 2 for times without a GPU."""
    options = parse(argv)
    objects = f"crowded:{options.crowded}" if options.crowded else "coco"
    if options.labels:
        objects = str(Path(options.labels).resolve())
    work = Workload(
        options.batch,
        options.size,
        options.classes,
        options.dtype,
        objects,
        options.form,
        options.layout,
        options.seed,
    )
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=120)
    failures: list[str] = []
    host = environment()
    gpu = host["gpu"] is not None
    if options.times and not gpu:
        console.print("[red]--times: there is no GPU to time on")
        return 2
    console.print(report.headline(work, host), highlight=False)

    gate = [Task("parity", c.name, work, device="cuda" if gpu else "cpu") for c in options.cases if c.name in CASES]
    parity = run_all(gate, 1 if gpu else options.jobs, console, "parity", failures)
    report.print_parity(console, {task.case: parity.get(task) for task in gate}, gpu)
    if not all(task in parity and parity[task]["ok"] for task in gate):
        console.print("[bold red]parity failed:[/] nothing else was measured")
        write_failures(options.out, failures)
        return 1

    model = GPUS[options.gpu]
    tasks = plan(options.cases, work, gpu, options.exact, not options.quick, options.target, model.target)
    tasks = [task for task in tasks if not _differs(task, parity)]
    if options.predict:
        tasks = [task for task in tasks if task.kind in PREDICTING and task.provider in (FUSED, model.target)]
    timed = [task for task in tasks if task.kind in GPU_KINDS]
    others = [] if options.times else [task for task in tasks if task.kind not in GPU_KINDS]
    results = run_all(others, options.jobs, console, "counting and compiling", failures)
    for name in dict.fromkeys(task.case for task in timed):  # nothing else runs meanwhile
        results |= run_all([task for task in timed if task.case == name], 1, console, f"timing {name}", failures)
        write(options.out, rows(parity | results, work, host, options.gpu), host)  # kept, should the rest be cut
    found = rows(parity | results, work, host, options.gpu)
    if options.json:
        print(json.dumps(found, indent=1))
        report.print_remarks(console, index(found), options.cases)
    else:
        report.print_tables(console, found, options.cases, options.gpu)
    pictures = plots.plot(options.out, found, options.cases, options.gpu)
    for path in [*write(options.out, found, host), *pictures, *write_failures(options.out, failures)]:
        console.print(f"wrote {path}", highlight=False)
    return int(any(task not in results for task in others + timed if task.provider not in (COMPILE, *peers.PEERS)))


def _differs(task: Task, parity: dict[Task, dict]) -> bool:
    """Whether a task would time a peer that computes something else."""
    return task.kind == "time" and any(
        gate.case == task.case and task.provider in found["failed"] for gate, found in parity.items()
    )


def main(argv: list[str]) -> int:
    """Choose between the main job, the others, and the work of one process."""
    if argv[:1] == ["train"]:
        from . import train

        return train.main(argv[1:])
    if argv[:1] == ["assign"]:
        from . import assign

        return assign.main(argv[1:])
    if argv[:1] == ["sweep"]:
        from . import sweep

        return sweep.main(argv[1:])
    if argv[:1] == ["qualify"]:
        from . import qualify

        return qualify.main(argv[1:])
    if argv[:1] == ["_work"]:
        serve()
        return 0
    if argv[:1] == ["_step"]:
        from .measure import run_fused

        run_fused(argv[1])
        return 0
    return bench(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
