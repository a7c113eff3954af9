"""The main job: parity first, then launches, bytes, host waits, compiled code, predicted and, on a GPU, time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from fusedyolo.tools.env import environment
from fusedyolo.tools.parity import parity_table
from fusedyolo.tools.registry import CASES, Case, RefusedError, Workload, first_recipes, select
from fusedyolo.tools.terminal import asked

from . import labels, peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS
from .rows import rows, write
from .work import Task, run_all


def plan(cases: Iterable[Case], work: Workload, gpu: bool, options: argparse.Namespace) -> list[Task]:
    """Every task behind the parity gate; the longest first."""
    cases, executed = list(cases), GPUS[options.gpu].target
    ours = [case.name for case in cases]
    theirs = [(case.name, peer.name) for case in cases for peer in peers.of(case)]
    counted = [Task("count", name, work, FUSED, exact=options.exact) for name in ours]
    ran = [Task("execute", name, work, executed) for name in ours]
    if options.predict:
        return [*counted, *ran, *(Task("codegen", name, work, executed) for name in ours)]
    providers = [EAGER, FUSED] if options.quick else [EAGER, COMPILE, FUSED]
    timed = [Task("time", name, work, peer, "cuda") for name, peer in theirs]
    timed += [Task("time", name, work, provider, "cuda") for name in ours for provider in providers]
    timed.append(Task("bandwidth", "", work, device="cuda"))
    if options.times:
        return timed
    targets = dict.fromkeys([*(options.target or ("sm_90", "gfx942")), executed])
    tasks = [Task("compile", name, work, COMPILE) for name in ours if COMPILE in providers]
    tasks += [*counted, *(Task("count", name, work, peer) for name, peer in theirs), *ran]
    tasks += [Task("codegen", name, work, target) for name in ours for target in targets]
    return [*tasks, *(Task("count", name, work, EAGER) for name in ours), *(timed if gpu else ())]


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
    work = Workload(batch, size, options.classes, options.dtype, form=options.form, layout=options.layout)
    if options.labels is None:
        return work
    with asked():
        annotations, _ = labels.load_labels(options.labels)
        return labels.given(work, labels.sample_labels(annotations, batch, work.seed))


def gate(
    tasks: Sequence[Task], jobs: int, console: Console, failures: list[str]
) -> tuple[dict[Task, Any], set[tuple[str, str]]]:
    """What was found of the parity of losses, by task; nothing if one of ours does not give the numbers of the
    reference, for then nothing is to be measured. And who computes something else, a loss and a provider each.
    """
    gpu = tasks[0].device == "cuda"
    found = run_all(tasks, jobs, console, "parity", failures)
    shown = {f"{task.case} {task.work.dtype} {task.work.layout}".rstrip(): found.get(task) for task in tasks}
    console.print(parity_table("on this GPU" if gpu else "in Triton's interpreter", shown), highlight=False)
    bad = [task.label for task in tasks if task not in found or FUSED in found[task]["failed"]]
    if bad:
        console.print(f"[bold red]parity failed:[/] {', '.join(bad)}; nothing else was measured")
        return {}, set()
    return found, {(task.case, name) for task, result in found.items() for name in result["failed"]}


def warm(timed: Iterable[Task], jobs: int, console: Console, failures: list[str]) -> None:
    """Compile what is to be timed, in many processes at a time, so that it need not be done in the one that times."""
    own = [replace(task, kind="warm") for task in timed if task.provider in (COMPILE, FUSED)]
    run_all(own, jobs, console, "compiling", failures)


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
    device, compiled = "cuda" if gpu else "cpu", COMPILE * (gpu and not options.quick)
    checks = [Task("parity", case.name, work, compiled, device) for case in cases if case.name in CASES]
    results, unlike = gate(checks, options.jobs, console, failures)
    if not results:
        write(options.out, [], host, failures)
        return 1
    tasks = [t for t in plan(cases, work, gpu, options) if t.kind != "time" or (t.case, t.provider) not in unlike]
    others = [task for task in tasks if task.device == "cpu"]
    results |= run_all(others, options.jobs, console, "counting and compiling", failures)
    timed = [task for task in tasks if task.device == "cuda"]
    warm(timed, options.jobs, console, failures)

    def keep(found: dict[Task, Any]) -> None:
        write(options.out, rows(results | found, work, host, options.gpu), host, failures)

    places = {case.name: place for place, case in enumerate(cases)}
    timed.sort(key=lambda task: places.get(task.case, -1))  # all providers of a case together
    results |= run_all(timed, 1, console, "timing", failures, keep)  # nothing else runs meanwhile
    found = rows(results, work, host, options.gpu)
    report.print_tables(console, found, cases, options.gpu)
    for path in [*write(options.out, found, host, failures), *plots.plot(options.out, found, cases, options.gpu)]:
        console.print(f"wrote {path}", highlight=False)
    return int(any(task not in results for task in tasks if task.provider not in (COMPILE, *peers.PEERS)))
