"""How the cost of a step grows with objects, batch, classes, type and layout, one of them varied at a time.

On a GPU milliseconds, elsewhere bytes and launches, counted.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusedyolo.tools.registry import AXES, DTYPES, SHOWN, Case, Workload, select

from . import peers, plots, report
from .measure import COMPILE, EAGER, FUSED
from .rows import rows
from .session import Session, Task

NUMBERS = {"objects": (1, 8, 64, 512), "batch": (1, 4, 16, 64, 128), "classes": (1, 20, 80, 365)}
INTERPRETED = {**NUMBERS, "objects": (1, 8, 64), "batch": (1, 4, 16)}  # more takes Triton's interpreter too long
BASE = {True: Workload(), False: Workload(batch=4, size=320)}  # on a GPU, without one


def workloads(case: Case, axis: str, gpu: bool) -> dict[Any, Workload]:
    """What is measured along an axis, by the value there; ``objects`` are those of an image."""
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
    wanted = {(case, axis): workloads(case, axis, gpu) for case in cases for axis in axes}
    checks = [
        Task("parity", case.name, replace(base, dtype=work.dtype, layout=work.layout), COMPILE * gpu, device)
        for (case, _), works in wanted.items()
        for work in works.values()
    ]
    passed, unlike = session.gate(list(dict.fromkeys(checks)))
    if not passed:
        return 1
    asked = {
        (case.name, axis, provider): {
            value: Task(kind, case.name, work, provider, device) for value, work in of.items()
        }
        for (case, axis), of in wanted.items()
        for provider in [*(peer.name for peer in peers.of(case)), EAGER, *[COMPILE] * gpu, FUSED]
        if (case.name, provider) not in unlike
    }

    def keep(found: dict[Task, Any]) -> list[Path]:
        return session.write(rows(found, session.host))

    tasks = list(dict.fromkeys(task for each in asked.values() for task in each.values()))
    results = session.run(tasks, "timing" if gpu else "counting", keep)
    curves = {key: {value: results.get(task) for value, task in each.items()} for key, each in asked.items()}
    for path in [*keep(results), *plots.sweep(options.out, curves, gpu, base)]:
        session.console.print(f"wrote {path}", highlight=False)
    return int(any(None in each.values() for (*_, provider), each in curves.items() if provider == FUSED))
