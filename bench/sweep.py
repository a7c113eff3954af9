"""How the cost of a step grows with objects, batch, classes, type and layout, one of them varied at a time.

On a GPU milliseconds, elsewhere bytes and launches, counted.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from fusedyolo.tools.registry import AXES, DTYPES, SHOWN, Case, Workload, select

from . import peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .rows import Row, index, rows
from .session import Session, Task

NUMBERS: dict[str, tuple[int, ...]] = {
    "objects": (1, 8, 64, 512),  # an image
    "batch": (1, 4, 16, 64, 128),
    "classes": (1, 20, 80, 365),
}
INTERPRETED = {**NUMBERS, "objects": (1, 8, 64), "batch": (1, 4, 16)}  # more takes Triton's interpreter too long
BASE = {True: Workload(), False: Workload(batch=4, size=320)}  # on a GPU, without one


def workloads(case: Case, axis: str, gpu: bool) -> dict[Any, Workload]:
    """What is measured along an axis, by the value there."""
    found: dict[str, Any] = {**(NUMBERS if gpu else INTERPRETED), "layout": case.layouts}
    found["dtype"] = [name for name in DTYPES if name != "float64"]
    form = "crowded:{}".format if axis == "objects" else lambda value: value
    return {value: replace(BASE[gpu], **{axis: form(value)}) for value in found[axis]}


def run(options: argparse.Namespace) -> int:
    """Measure and draw: 0, or 1 if a loss failed parity or a measurement of ours broke."""
    session, cases, axes = Session(options, "sweep"), select(options.loss, SHOWN), options.axis or AXES
    gpu, device = session.gpu, session.device
    kind, base = "time" if gpu else "count", BASE[gpu]
    session.console.print(report.headline(base, session.host), highlight=False)
    wanted = {(case.name, axis): workloads(case, axis, gpu) for case in cases for axis in axes}
    checks = [
        Task("parity", name, replace(base, dtype=work.dtype, layout=work.layout), COMPILE * gpu, device)
        for (name, _), each in wanted.items()
        for work in each.values()
    ]
    passed, unlike = session.gate(list(dict.fromkeys(checks)))
    if not passed:
        return 1

    found: list[Row] = []
    curves: dict[tuple[str, str, str], dict[Any, Any]] = {}
    for case in cases:
        providers = [*(peer.name for peer in peers.of(case)), EAGER, *[COMPILE] * gpu, FUSED]
        own = {
            (case.name, axis, provider): {
                value: Task(kind, case.name, work, provider, device) for value, work in wanted[case.name, axis].items()
            }
            for provider in providers
            if (case.name, provider) not in unlike
            for axis in axes
        }
        tasks = list(dict.fromkeys(task for each in own.values() for task in each.values()))
        results = session.time_alone(tasks) if gpu else session.run(tasks, f"counting {case.name}")
        curves |= {key: {value: results.get(task) for value, task in each.items()} for key, each in own.items()}
        for work in dict.fromkeys(task.work for task in results):
            of_work = rows({task: each for task, each in results.items() if task.work == work}, work, session.host)
            report.print_remarks(session.console, index(of_work), [case])
            found += of_work
        paths = session.write(found)  # kept, should the rest be cut
    for path in [*paths, *plots.sweep(options.out, curves, gpu, base)]:
        session.console.print(f"wrote {path}", highlight=False)
    return int(any(None in each.values() for (*_, provider), each in curves.items() if provider == FUSED))
