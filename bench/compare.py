"""The main job: parity first, then launches, bytes, host waits, compiled code, predicted and, on a GPU, time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from fusedyolo.tools.registry import CASES, Case, RefusedError, Workload, first_recipes, select
from fusedyolo.tools.terminal import asked

from . import labels, peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS
from .rows import rows
from .session import Session, Task


def plan(cases: Iterable[Case], work: Workload, gpu: bool, options: argparse.Namespace) -> list[Task]:
    """Every task behind the parity gate; the longest first."""
    executed = GPUS[options.gpu].target
    by_case = {case.name: [peer.name for peer in peers.of(case)] for case in cases}
    counted = [Task("count", name, work, FUSED, exact=options.exact) for name in by_case]
    ran = [Task("execute", name, work, executed) for name in by_case]
    if options.predict:
        return [*counted, *ran, *(Task("codegen", name, work, executed) for name in by_case)]
    providers = [EAGER, FUSED] if options.quick else [EAGER, COMPILE, FUSED]
    timed = [Task("bandwidth", "", work, device="cuda")]
    timed += [Task("time", name, work, who, "cuda") for name, own in by_case.items() for who in (*own, *providers)]
    if options.times:
        return timed
    targets = dict.fromkeys([*(options.target or ("sm_90", "gfx942")), executed])
    tasks = [Task("compile", name, work, COMPILE) for name in by_case if COMPILE in providers]
    tasks += [*counted, *(Task("count", name, work, peer) for name, own in by_case.items() for peer in own), *ran]
    tasks += [Task("codegen", name, work, target) for name in by_case for target in targets]
    return [*tasks, *(Task("count", name, work, EAGER) for name in by_case), *(timed if gpu else ())]


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


def run(options: argparse.Namespace) -> int:
    """Do it: 1 if a loss failed parity or a measurement of ours broke."""
    session, work = Session(options, "bench"), workload(options)
    if options.times and not session.gpu:
        raise RefusedError("--times: there is no GPU to time on")
    first = first_recipes()  # and whatever a peer that is installed here computes
    usual = (case for case in CASES.values() if options.recipes or case in first or peers.of(case))
    cases = select(options.loss, usual)
    session.console.print(report.headline(work, session.host), highlight=False)
    session.console.print(report.beside(peer.name for case in cases for peer in peers.of(case)), highlight=False)
    compiled = COMPILE * (session.gpu and not options.quick)
    results, unlike = session.gate([Task("parity", case.name, work, compiled, session.device) for case in cases])
    if not results:
        return 1
    tasks = plan(cases, work, session.gpu, options)
    tasks = [task for task in tasks if task.kind != "time" or (task.case, task.provider) not in unlike]
    results |= session.run([task for task in tasks if task.device == "cpu"], "counting and compiling")

    def keep(found: dict[Task, Any]) -> None:
        session.write(rows(results | found, session.host, options.gpu))

    results |= session.run([task for task in tasks if task.device == "cuda"], "timing", keep)
    found = rows(results, session.host, options.gpu)
    report.print_tables(session.console, found, cases, options.gpu)
    for path in [*session.write(found), *plots.plot(options.out, found, cases, options.gpu)]:
        session.console.print(f"wrote {path}", highlight=False)
    return int(any(task not in results for task in tasks if task.provider not in (COMPILE, *peers.PEERS)))
