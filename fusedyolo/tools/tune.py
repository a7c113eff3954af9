"""Measure block sizes, warps and stages on this GPU, for each loss, type, layout and size, and keep the best.

What the compiler says of a configuration prunes it before anything is timed: spills, more registers than there are,
narrower accesses, the same code as another. Gradients must be the same bits with every configuration. Measurements are
written down one by one, so that a run that was interrupted goes on where it was, and two runs at once share them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from rich.progress import Progress

from .. import tuned
from ..kernels.launch import REGISTERS, Wishes, legal_wishes
from . import codegen, terminal, timing
from .env import environment, kernels_digest
from .parity import Step, bound
from .processes import Call, Failed, run_all
from .registry import Case, RefusedError, Workload, first_recipes, select

GAIN = 0.02  # of the time that a configuration must save to be preferred to the heuristic
TURNS = 3  # in which the best one and the heuristic are timed once more

Resources = Mapping[str, Mapping[str, Any]]
"""Of each launch of a step by name, see :func:`~fusedyolo.tools.codegen.compile_step`."""
Timer = Callable[["Point", Wishes], float]


@dataclass(frozen=True)
class Point:
    """A loss on predictions of a type, a layout and a size: what a configuration is sought for."""

    case: Case
    work: Workload
    device: str = "cuda"

    @property
    def label(self) -> str:
        """For people."""
        work = self.work
        sizes = f"batch {work.batch}, {work.size} px, {work.classes} classes"
        return f"{self.case.name} {work.dtype} {self.case.layout(work)}, {sizes}"


# ----------------------------------------------------------------------------------------------------------- candidates


def candidates(point: Point) -> list[Wishes]:
    """What is tried, the heuristic (no wishes) first."""
    driver, head = point.case.driver, point.case.head(point.work.classes)
    found = driver.candidates(head, point.case.layout(point.work))
    return [(), *(tuple(each.items()) for each in found if legal_wishes(driver.kind, each))]


def prune(reports: Mapping[Wishes, Resources | str]) -> dict[Wishes, str]:
    """Why each configuration need not be timed; those that are to be timed are left out. The heuristic comes first."""
    usual = reports[()]
    assert not isinstance(usual, str)
    found: dict[Wishes, str] = {}
    codes = set()
    for wishes, report in reports.items():
        if isinstance(report, str):
            why = report
        elif not (why := _worse(report, usual)):
            code = tuple((name, each["code"], each["grid"]) for name, each in report.items())
            why = "same code as another" * (code in codes)
            codes.add(code)
        if why and wishes:
            found[wishes] = why
    return found


def _worse(report: Resources, usual: Resources) -> str:
    for name, each in report.items():
        own = usual[name]
        if max(each["spills"], each["stack"]) > max(own["spills"], own["stack"]):
            return "spills"
        if not each["target"].startswith("gfx") and each["registers"] * each["threads"] > REGISTERS:
            return "registers"
        if max(each["stores"], default=0) < max(own["stores"], default=0):
            return "narrower stores"
    return ""


def key_of(point: Point) -> str:
    """The key under which launches look for what is found here."""
    with tuned.forced(()) as keys:
        codegen.launches(point.case, point.work)
    (key,) = keys
    return key


def inspect(point: Point, wishes: Wishes, target: str) -> Resources:
    """What a step compiles to for a target; in a process in which kernels are not interpreted."""
    with tuned.forced(wishes):
        return codegen.compile_step(point.case, point.work, target)


def inspect_all(
    point: Point, wanted: Sequence[Wishes], target: str, jobs: int, done: Callable[[], None]
) -> dict[Wishes, Resources | str]:
    """The same for many, in ``jobs`` processes; of what does not compile, that it does not."""
    calls = {wishes: Call(partial(inspect, point, wishes, target)) for wishes in wanted}
    found: dict[Wishes, Resources | str] = {}
    for wishes, result in run_all(calls, jobs):
        done()
        if isinstance(result, Failed):
            if not (wishes and result.error):  # a process that died says nothing of the configuration
                raise RuntimeError(result.why)
            result = f"does not compile: {result.error}"
        found[wishes] = result
    return {wishes: found[wishes] for wishes in wanted}


# ----------------------------------------------------------------------------------------------------------- measuring


def milliseconds(point: Point, wishes: Wishes) -> float:
    """Median time of forward and backward on the GPU, by replay of a graph."""
    step = _step(point)
    with tuned.forced(wishes):
        return timing.by_replay(step, step.preds)[1]


def gradients(point: Point, wishes: Wishes) -> list[torch.Tensor]:
    """Of a step, as bytes, so that equal means the same bits."""
    step = _step(point)
    for pred in step.preds:
        pred.grad = None
    with tuned.forced(wishes):
        step()
    return [pred.grad.contiguous().view(-1).view(torch.uint8) for pred in step.preds if pred.grad is not None]


@lru_cache(maxsize=1)
def _step(point: Point) -> Step:
    case, work, device = point.case, point.work, point.device
    return bound(case.bind(case.build(work.classes, "triton"), work, device), case, work, device)


def _try(point: Point, wishes: Wishes, usual: Callable[[], list[torch.Tensor]], timer: Timer) -> float | str:
    """The time of a configuration, or why it has none. The heuristic's has one, or there is no use in going on."""
    wanted = usual()
    try:
        if not all(map(torch.equal, gradients(point, wishes), wanted)):
            return "gradient differs"
        return timer(point, wishes)
    except Exception as error:  # what a launch may raise: too much shared memory, for one
        if not wishes or "CUDA error" in str(error):  # nothing works after that
            raise
        return f"fails: {type(error).__name__}"


# -------------------------------------------------------------------------------------------------------------- records


class Records:
    """The files of one GPU: every measurement in a journal, the best ones in what launches read."""

    def __init__(self, folder: Path, gpu: str, provenance: Mapping[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.gpu, self.provenance = gpu, dict(provenance)
        self.path = folder / tuned.file_name(gpu)
        self.journal = self.path.with_suffix(".journal.sqlite")
        self.lock = FileLock(self.path.with_suffix(".lock"))
        self.versions = {name: value for name, value in self.provenance.items() if name not in ("when", "commit")}

    def once(self, point: Point, wishes: Wishes, measure: Callable[[], Any], what: str = "time") -> Any:
        """What is measured, one at a time on this GPU, and written down; or what was before, with these versions."""
        key = json.dumps([self.versions, point.label, wishes, what], sort_keys=True)
        with self.lock, closing(sqlite3.connect(self.journal, isolation_level=None)) as journal:
            journal.execute("create table if not exists found (key text primary key, value text)")
            known = journal.execute("select value from found where key = ?", [key]).fetchone()
            if known is None:
                known = (json.dumps(measure()),)
                journal.execute("insert into found values (?, ?)", [key, *known])
        return json.loads(known[0])

    def keep(self, key: str, entry: Mapping[str, Any]) -> None:
        """Put a result beside those that are there, replacing the file in one step."""
        with self.lock:
            kept = tuned.read(self.path, self.gpu) | {key: {**entry, "provenance": self.provenance}}
            content = {"format": tuned.FORMAT, "gpu": self.gpu, "entries": dict(sorted(kept.items()))}
            draft = self.path.with_suffix(".draft")
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            draft.replace(self.path)


def provenance(gpu: str, target: str) -> dict[str, Any]:
    """What a result depends on beside its key."""
    found = {name: value for name, value in environment().items() if name not in ("gpu", "system", "python")}
    return {"gpu": gpu, "arch": target, "kernels": kernels_digest(), "measured": "graph replay, p50"} | found


# --------------------------------------------------------------------------------------------------------------- tuning


class Result(NamedTuple):
    """Of one point: times in milliseconds, the wishes that won (none: the heuristic), how many configurations have a
    time, and why others have none.
    """

    heuristic: float
    best: float
    wishes: Wishes
    timed: int
    pruned: Mapping[str, int]


def tune_point(
    point: Point,
    reports: Mapping[Wishes, Resources | str],
    records: Records,
    timer: Timer,
    done: Callable[[], None] = lambda: None,
) -> Result:
    """Time what is not pruned, unless it was before, and keep the best."""
    found: dict[Wishes, float | str] = dict(prune(reports))
    usual = lru_cache(partial(gradients, point, ()))
    for wishes in reports:
        if wishes not in found:
            found[wishes] = records.once(point, wishes, partial(_try, point, wishes, usual, timer))
        done()
    times = {wishes: each for wishes, each in found.items() if not isinstance(each, str)}
    best = min(times, key=lambda wishes: times[wishes])
    if best:  # the least of many single measurements may owe it to chance

        def in_turns() -> list[float]:
            turns = [(timer(point, ()), timer(point, best)) for _ in range(TURNS)]
            return [median(each) for each in zip(*turns, strict=True)]

        times[()], times[best] = records.once(point, best, in_turns, "turns")
        best = best if times[best] <= (1 - GAIN) * times[()] else ()
    entry = {"config": dict(best), "ms": times[best], "heuristic_ms": times[()], "loss": point.label}
    records.keep(key_of(point), entry)
    pruned = Counter(each for each in found.values() if isinstance(each, str))
    return Result(times[()], times[best], best, len(times), pruned)


def run(
    options: argparse.Namespace,
    device: str = "cuda",
    timer: Timer = milliseconds,
    inspector: Callable[..., dict[Wishes, Resources | str]] | None = None,
) -> int:
    """Tune for every combination that was asked for, a layout that a loss does not take left out. Tests put in a timer
    and an inspector that need no GPU.
    """
    asked = (options.batch, options.size, options.classes, options.dtype, options.layout)
    todo = [
        Point(case, Workload(batch, size, classes, dtype, layout=layout), device)
        for case in select(options.loss, first_recipes())
        for batch, size, classes, dtype, layout in itertools.product(*asked)
        if layout in ("", *case.layouts)
    ]
    console, where = terminal.console(), torch.device(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError("no GPU: there is nothing to tune; launches are configured by a heuristic")
    gpu, target = tuned.gpu_name(where), _target(where)
    try:
        own = options.out or terminal.folder(str(tuned.folder()))
    except argparse.ArgumentTypeError as error:
        raise RefusedError(f"{error}; --out names another folder") from None
    records = Records(own, gpu, provenance(gpu, target))
    inspector = inspector or partial(inspect_all, target=target, jobs=options.jobs)
    made = terminal.table("Forward + backward, milliseconds", ("loss",), ("heuristic", "best", "saved", "timed"))
    made.columns[0].no_wrap = False
    made.add_column("configuration")
    made.add_column("not timed")
    shared: dict[str, Point] = {}
    with Progress(console=console) as progress:
        for point in progress.track(todo, description=f"tuning on {gpu}"):
            other = shared.setdefault(key_of(point), point)
            if other is not point:
                console.print(f"{point.label}: launched as {other.label}", highlight=False)
                continue
            tried = candidates(point)
            bar = progress.add_task(f"  {point.label}", total=2 * len(tried))  # compiled and timed
            advance = partial(progress.advance, bar)
            found = tune_point(point, inspector(point, tried, done=advance), records, timer, advance)
            times = f"{found.heuristic:.4f}", f"{found.best:.4f}", f"{1 - found.best / found.heuristic:.1%}"
            best = " ".join(f"{name}={value}" for name, value in found.wishes) or "the heuristic's"
            left = ", ".join(f"{count} {why}" for why, count in sorted(found.pruned.items())) or "none"
            made.add_row(point.label, *times, str(found.timed), best, left)
            progress.remove_task(bar)
    tuned.forget()
    console.print(made, f"wrote {records.path}", highlight=False)
    return 0


def _target(device: torch.device) -> str:
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
