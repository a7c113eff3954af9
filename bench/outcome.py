"""What a training run has shown: whether its curves agree, a table and two pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from fusedyolo.tools import terminal

from .measure import EAGER, FUSED
from .phases import PHASES

NAMES = {EAGER: "eager reference", FUSED: "fused"}
COMPARED = 10  # first steps, over which the curves are held to BOUND
JUDGED = 100  # steps of a run, from which on its loss must have fallen
BOUND = 2e-5  # relative; 3.4e-6 was seen. Tens of steps later one flipped assignment sets any two roundings 1e-2 apart
COLOURS = ("#1d3557", "#e76f51")  # of the two runs
PHASE_COLOURS = ("#c9c9bd", "#a8c4da", "#e76f51", "#7fa8c9", "#d9c58b")

Result = Mapping[str, Any]
"""What ``train.json`` holds."""


def faults(result: Result) -> list[str]:
    """What is wrong with the curves. A fused run that stopped early is held to the other one alone.

    Whether the loss fell is asked of longer runs: from batch to batch it differs by the number of objects.
    """
    found = []
    early = max(result["difference"][:COMPARED])
    if not early <= BOUND:
        found.append(f"The curves differ by {early:.1e} within {COMPARED} steps, want at most {BOUND:g}.")
    for provider, run in result["runs"].items():
        totals = [step["total"] for step in run["steps"]]
        quarter = len(totals) // 4
        if result["config"]["steps"] == len(totals) >= JUDGED and fmean(totals[-quarter:]) >= fmean(totals[:quarter]):
            found.append(f"The loss of the {NAMES.get(provider, provider)} run did not fall.")
    return found


def table(result: Result) -> Table:
    """Where a step goes, how fast it is, and where its loss waits."""
    config, runs, gpu = result["config"], result["runs"], not result["interpreted"]
    found = terminal.table(
        f"{config['loss']}, batches of {config['batch']} images of {config['size']} x {config['size']}",
        ("ms of a step, its share" + ", of the host" * gpu,),
        [NAMES.get(provider, provider) for provider in runs],
        "host: until the calls had returned, nothing being queued before"
        if gpu
        else "?: the fused loss ran in Triton's interpreter",
    )
    each, known = list(runs.values()), [gpu or provider != FUSED for provider in runs]
    for phase in PHASES:
        cells = []
        for run, told in zip(each, known, strict=True):
            seconds, host = run["seconds"][phase], run["host_seconds"][phase]
            share = f"{seconds / run['step_seconds']['p50']:.1%}" if told else "?"
            time = f"{1e3 * seconds:.2f}" if told or phase != "loss" else "?"
            cells.append(f"{time}  {share}" + f"  {1e3 * host:.2f}" * gpu)
        found.add_row(phase, *cells, end_section=phase == PHASES[-1])
    steps = [run["step_seconds"] for run in each]
    speeds = {f"ms of a step, {q}": [f"{1e3 * step[q]:.2f}" for step in steps] for q in ("p20", "p50", "p80")}
    speeds["images/s"] = [f"{config['batch'] / step['p50']:.1f}" for step in steps]
    for name, cells in speeds.items():
        found.add_row(name, *(cell if told else "?" for cell, told in zip(cells, known, strict=True)))
    found.add_row("steps, and those timed", *(f"{len(run['steps'])}, {run['timed_steps']}" for run in each))
    found.add_row("loss at the last step", *(f"{run['steps'][-1]['total']:.4f}" for run in each))
    shared = len(result["difference"])
    for number in sorted({min(COMPARED, shared), shared}):
        found.add_row(f"largest difference, {number} steps", "", f"{max(result['difference'][:number]):.1e}")
    waits = [run["waits"] for run in each]
    found.add_row("host waits of the loss", *("?" if w is None else f"{sum(w.values()):g}" for w in waits))
    for place in dict.fromkeys(place for w in waits for place in w or ()):
        found.add_row(f"  {place}", *(f"{(w or {}).get(place, 0):g}" for w in waits))
    return found


def draw_curves(path: Path, result: Result) -> None:
    """Loss curves of both runs on one another, the fused loss last; its parts, and the relative difference of totals.

    A peer has no parts.
    """
    runs = {NAMES.get(provider, provider): run["steps"] for provider, run in result["runs"].items()}
    parts = ["total", *(name for name in list(runs.values())[-1][0] if name not in ("total", "positives"))]
    figure = Figure(figsize=(4.2 * (len(parts) + 1), 4), layout="constrained")
    *axes, last = figure.subplots(1, len(parts) + 1)
    for part, axis in zip(parts, axes, strict=True):
        _plain(axis, part)
        for (name, steps), colour, line in zip(runs.items(), COLOURS, ("-", (0, (2, 2))), strict=True):
            if part in steps[0]:
                few = {"marker": "o", "markersize": 4, "markerfacecolor": "none"} if len(steps) <= 50 else {}
                axis.plot([step[part] for step in steps], color=colour, linestyle=line, linewidth=1, label=name, **few)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    _plain(last, f"relative difference (1e-9: none), bound {BOUND:g}")
    shown = [max(each, 1e-9) for each in result["difference"]]
    last.semilogy(shown, color=COLOURS[1], linewidth=1, marker=".", markersize=4)
    last.axhline(BOUND, color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(path, dpi=110)


def draw_steps(path: Path, result: Result) -> None:
    """Where a step goes: a bar for each run, stacked of its phases; on a GPU another of the host's time under it."""
    config, gpu = result["config"], not result["interpreted"]
    bars = []  # name, seconds by phase, what is written behind
    for provider, run in result["runs"].items():
        name, seconds, step = NAMES.get(provider, provider), dict(run["seconds"]), run["step_seconds"]["p50"]
        note = f"{1e3 * step:.5g} ms, the loss {seconds['loss'] / step:.0%} of it"
        if not gpu and provider == FUSED:
            note, seconds["loss"] = f"{len(run['steps'])} steps, loss interpreted: ?", 0.0
        bars.append((name, seconds, note))
        if gpu:
            host = run["host_seconds"]
            bars.append(("its host", host, f"{1e3 * sum(host.values()):.5g} ms until all calls return"))
    names, phases, notes = zip(*bars, strict=True)
    figure = Figure(figsize=(11, 1.4 + 0.55 * len(bars)), layout="constrained")
    axis, ends = figure.subplots(), np.zeros(len(bars))
    _plain(axis, "")
    wide = max(sum(each.values()) for each in phases) * 1e3 / 30
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        widths, style = np.array([1e3 * each[phase] for each in phases]), {"edgecolor": "white", "linewidth": 0.8}
        drawn = axis.barh(range(len(bars)), widths, 0.62, left=ends, color=colour, label=phase, **style)
        labels = [f"{width:.4g}" if width > wide else "" for width in widths]
        axis.bar_label(drawn, labels, label_type="center", fontsize=8.5, color="#222222")
        ends += widths
    for place, (end, note) in enumerate(zip(ends, notes, strict=True)):
        axis.text(end, place, f"  {note}", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    axis.set_xlim(0, 1.4 * ends.max())
    axis.set_xlabel("milliseconds of a step, median of each phase", fontsize=9)
    axis.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=len(PHASES), frameon=False, fontsize=9)
    size = f"{config['batch']} images of {config['size']} x {config['size']}"
    on = result["environment"]["gpu"] or result["environment"]["system"]
    figure.suptitle(f"{config['loss']}: where a step goes. {size} on {on}", fontsize=11)
    figure.savefig(path, dpi=130)


def _plain(axis: Axes, title: str) -> None:
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
