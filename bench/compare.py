"""The main job: parity first, then launches, bytes, host waits, compiled code, predicted and, on a GPU, time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from fusedyolo.tools.env import environment
from fusedyolo.tools.registry import CASES, Case, RefusedError, Workload, first_recipes, select
from fusedyolo.tools.terminal import asked

from . import labels, peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS
from .rows import rows, write
from .work import Task, run_all

GPU_KINDS = ("time", "bandwidth")
PREDICTING = ("count", "count exactly", "execute", "codegen")


def plan(cases: Iterable[Case], work: Workload, gpu: bool, options: argparse.Namespace) -> list[Task]:
    """Every task behind the parity gate; the longest first."""
    cases, executed = list(cases), GPUS[options.gpu].target
    ours = [case.name for case in cases]
    theirs = [(case.name, peer.name) for case in cases for peer in peers.of(case)]
    targets = dict.fromkeys([*(options.target or ("sm_90", "gfx942")), executed])
    tasks = [Task("compile", name, work, COMPILE) for name in ours if not options.quick]
    tasks += [Task("count exactly" if options.exact else "count", name, work, FUSED) for name in ours]
    tasks += [Task("count", name, work, peer) for name, peer in theirs]
    tasks += [Task("execute", name, work, executed) for name in ours]
    tasks += [Task("codegen", name, work, target) for name in ours for target in targets]
    tasks += [Task("count", name, work, EAGER) for name in ours]
    if options.predict:
        return [task for task in tasks if task.kind in PREDICTING and task.provider in (FUSED, executed)]
    if not gpu:
        return tasks
    providers = (EAGER, FUSED) if options.quick else (EAGER, COMPILE, FUSED)
    timed = [Task("time", name, work, peer, "cuda") for name, peer in theirs]
    timed += [Task("time", name, work, provider, "cuda") for name in ours for provider in providers]
    timed.append(Task("bandwidth", "", work, device="cuda"))
    return timed if options.times else tasks + timed


def usual_cases() -> list[Case]:
    """Each loss in its default recipe, and whatever a peer that is installed here computes."""
    first = first_recipes()
    return [case for case in CASES.values() if case in first or peers.of(case)]


def workload(options: argparse.Namespace) -> Workload:
    """What is asked for.

    Raises:
        RefusedError: label files that cannot be read, or name more classes.
    """
    batch, size = options.batch or (2 if options.quick else 16), options.size or (320 if options.quick else 640)
    objects = f"crowded:{options.crowded}" if options.crowded else "coco"
    work = Workload(batch, size, options.classes, options.dtype, objects, options.form, options.layout, options.seed)
    if options.labels is None:
        return work
    with asked():
        annotations, _ = labels.load_labels(options.labels)
        return labels.given(work, labels.sample_labels(annotations, batch, options.seed))


def gate(
    tasks: Sequence[Task], options: argparse.Namespace, console: Console, failures: list[str]
) -> tuple[bool, dict[Task, Any]]:
    """Whether every loss gives the numbers of the reference, and what was found: else nothing is to be measured."""
    parity = run_all(tasks, 1 if tasks[0].device == "cuda" else options.jobs, console, "parity", failures)
    bad = [task.label for task in tasks if task not in parity or not parity[task]["ok"]]
    if bad:
        console.print(f"[bold red]parity failed:[/] {', '.join(bad)}; nothing else was measured")
    return not bad, parity


def differing(parity: dict[Task, Any]) -> set[tuple[str, str]]:
    """Names of losses with those who compute something else and are not to be timed."""
    return {(task.case, name) for task, found in parity.items() for name in found["failed"]}


def run(options: argparse.Namespace) -> int:
    """Do it: 1 if a loss failed parity or a measurement of ours broke."""
    host, console, failures = environment(), Console(), []
    if not console.is_terminal:
        console = Console(width=120)
    work, gpu = workload(options), host["gpu"] is not None
    if options.times and not gpu:
        raise RefusedError("--times: there is no GPU to time on")
    cases = select(options.loss, CASES.values() if options.recipes else usual_cases())
    console.print(report.headline(work, host), highlight=False)

    checks = [Task("parity", c.name, work, device="cuda" if gpu else "cpu") for c in cases if c.name in CASES]
    passed, parity = gate(checks, options, console, failures)
    report.print_parity(console, {task.case: parity.get(task) for task in checks}, gpu)
    if not passed:
        write(options.out, [], host, failures)
        return 1

    tasks, unlike = plan(cases, work, gpu, options), differing(parity)
    tasks = [task for task in tasks if task.kind != "time" or (task.case, task.provider) not in unlike]
    others = [task for task in tasks if task.kind not in GPU_KINDS]
    results = run_all(others, options.jobs, console, "counting and compiling", failures)
    timed = [task for task in tasks if task.kind in GPU_KINDS]
    for name in dict.fromkeys(task.case for task in timed):  # nothing else runs meanwhile
        results |= run_all([task for task in timed if task.case == name], 1, console, f"timing {name}", failures)
        write(options.out, rows(parity | results, work, host, options.gpu), host, failures)  # should the rest be cut
    found = rows(parity | results, work, host, options.gpu)
    report.print_tables(console, found, cases, options.gpu)
    for path in [*write(options.out, found, host, failures), *plots.plot(options.out, found, cases, options.gpu)]:
        console.print(f"wrote {path}", highlight=False)
    return int(any(task not in results for task in tasks if task.provider not in (COMPILE, *peers.PEERS)))
