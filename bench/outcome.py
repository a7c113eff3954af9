"""What a training run has shown: whether its curves agree, a table and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.table import Table

from fusedyolo.pictures import COLOURS
from fusedyolo.tools import terminal

from .measure import FUSED
from .phases import PHASES

COMPARED = 10  # first steps, over which the curves are held to BOUND
BOUND = 2e-5  # relative; 3.4e-6 was seen. Tens of steps later one flipped assignment sets any two roundings 1e-2 apart

Result = Mapping[str, Any]
"""What ``train.json`` holds."""


def fault(result: Result) -> str:
    """What is wrong with the curves, nothing if they agree."""
    early = max(result["difference"][:COMPARED])
    if early <= BOUND:  # NaN is not
        return ""
    return f"The curves differ by {early:.1e} within {COMPARED} steps, want at most {BOUND:g}."


def table(result: Result) -> Table:
    """Where a step goes, how fast it is, and how far the curves lie apart."""
    config, runs = result["config"], result["runs"]
    made = terminal.table(
        f"{config['loss']}, batches of {config['batch']} images of {config['size']} x {config['size']}",
        ("ms of a step, its share",),
        list(runs),
        "?: the fused loss ran in Triton's interpreter" * result["interpreted"],
    )

    def cell(provider: str, phase: str) -> str:
        unknown, seconds = provider == FUSED and result["interpreted"], runs[provider]["seconds"]
        shown = "?" if unknown and phase in ("loss", "step") else f"{1e3 * seconds[phase]:.2f}"
        return f"{shown}  {'?' if unknown else format(seconds[phase] / seconds['step'], '.1%')}"

    for phase in (*PHASES, "step"):
        made.add_row(phase, *(cell(provider, phase) for provider in runs), end_section=phase in (PHASES[-1], "step"))
    rates = {provider: config["batch"] / run["seconds"]["step"] for provider, run in runs.items()}
    shown = ("?" if p == FUSED and result["interpreted"] else f"{rate:.1f}" for p, rate in rates.items())
    made.add_row("images/s", *shown)
    shared = len(result["difference"])  # steps that both took: without a GPU the fused run is shorter
    made.add_row(f"loss at step {shared}", *(f"{run['steps'][shared - 1]['total']:.4f}" for run in runs.values()))
    for number in sorted({min(COMPARED, shared), shared}):
        made.add_row(f"largest difference, {number} steps", "", f"{max(result['difference'][:number]):.1e}")
    return made


def draw_curves(path: Path, result: Result) -> None:
    """Loss curves of both runs on one another, the fused loss last; its parts, and the relative difference of totals.

    A peer has no parts.
    """
    runs = {provider: run["steps"] for provider, run in result["runs"].items()}
    parts = [name for name in runs[FUSED][0] if name != "positives"]
    figure = Figure(figsize=(4.2 * (len(parts) + 1), 4), layout="constrained")
    *axes, last = figure.subplots(1, len(parts) + 1)
    for part, axis in zip(parts, axes, strict=True):
        for (name, steps), line in zip(runs.items(), ("C0-", "C1:"), strict=True):
            if part in steps[0]:
                marker = "." if len(steps) <= 50 else ""
                axis.plot(range(1, len(steps) + 1), [s[part] for s in steps], line, marker=marker, lw=1, label=name)
        axis.set_title(part)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    shared = range(1, len(result["difference"]) + 1)
    last.semilogy(shared, [max(each, 1e-9) for each in result["difference"]], ".-", linewidth=1)
    last.axhline(BOUND, color="grey", linestyle=":")
    for axis in (*axes, last):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("step")
    last.set_title(f"relative difference (1e-9: none), bound {BOUND:g}")
    figure.savefig(path, dpi=110)


def draw_detections(
    path: Path, pixels: torch.Tensor, found: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]
) -> None:
    """Images, uint8 [n, 3, S, S], with the ``boxes``, ``scores`` and ``labels`` that were found in each."""
    figure = Figure(figsize=(4 * len(pixels), 4), layout="constrained")
    for image, detections, axis in zip(pixels, found, figure.subplots(1, len(pixels), squeeze=False)[0], strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.axis("off")
        values = (detections[name].tolist() for name in ("boxes", "scores", "labels"))
        for (x1, y1, x2, y2), score, label in zip(*values, strict=True):
            colour = COLOURS[int(label) % len(COLOURS)]
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5))
            text = f"{names[int(label)]} {score:.2f}"
            axis.text(x1, y1, text, color="white", fontsize=6, backgroundcolor=colour, clip_on=True)
    figure.savefig(path, dpi=110)
