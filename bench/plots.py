"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from fusedyolo.tools.registry import CASES, Case, Workload

from .measure import COMPILE, EAGER, FUSED
from .report import text
from .rows import Index, Row, index, launches

INK, MUTED = "#222222", "#777777"
PEER = "peer"
COLOURS = {PEER: "#d08c60", EAGER: "#c3c9d2", COMPILE: "#8fa3bf", FUSED: "#1f7a5c"}
PARTS = {"memory": "#8fa3bf", "issue": "#1f7a5c", "longest": "#c2410c"}
NAMES = {
    PEER: "the loss that it replaces",
    EAGER: "eager PyTorch reference",
    COMPILE: "torch.compile of it",
    FUSED: "fusedyolo",
}


def plot(out: Path, found: Sequence[Row], cases: Sequence[Case], gpu: str = "H100") -> list[Path]:
    """``cost.png``: bytes and launches; where there are any, ``time.png``: milliseconds and memory, and
    ``issue_time.png``: what is predicted for ``gpu``.
    """
    values, first = _with_peers(index(found)), found[0]
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for case in cases if case.name in CASES]
    for case in cases:
        for provider in NAMES:
            each = [values.get((case.name, provider, f"{kind}_launches")) for kind in ("triton", "other")]
            values[case.name, provider, "launches"] = sum(n or 0 for n in each) or None
    title = (
        f"One training step of the loss, forward + backward: batch {first['batch']}, {first['size']} px, "
        f"{first['classes']} classes, {first['dtype']}"
    )
    panels = ("bytes_per_P", "memory traffic, multiples of the predictions", ".2f"), ("launches", "launches", ".0f")
    paths = [_bars(out / "cost.png", title, panels, values, cases)]
    if any(values.get((case.name, FUSED, "full_ms_p50")) for case in cases):
        panels = (
            ("full_ms_p50", f"milliseconds on {first['device']}", ".2f"),
            ("peak_per_P", "peak memory, multiples of the predictions", ".2f"),
        )
        paths.append(_bars(out / "time.png", title, panels, values, cases))
    predicted = {
        (case.name, launch): [each[f"{name}_us"] for name in PARTS]
        for case in cases
        for launch, each in launches(values, case, f"predicted.{gpu}").items()
        if launch != "step"
    }
    if predicted:
        paths.append(_predicted(out / "issue_time.png", predicted, gpu, title))
    return paths


def _with_peers(values: Index) -> Index:
    """The first peer of a case also under one name for all peers."""
    peers: Index = {}
    for (name, provider, metric), value in values.items():
        if provider not in NAMES:
            peers.setdefault((name, PEER, metric), value)
    return {**values, **peers}


def _bars(
    path: Path, title: str, panels: Sequence[tuple[str, str, str]], values: Mapping[Any, Any], cases: Sequence[Case]
) -> Path:
    """A bar for each provider of each case, in a panel for each metric."""
    metric = panels[0][0]
    shown = {c.name: [p for p in NAMES if p != PEER or values.get((c.name, p, metric)) is not None] for c in cases}
    used = [provider for provider in NAMES if any(provider in each for each in shown.values())]
    height = 1.6 + 0.19 * sum(map(len, shown.values())) + 0.1 * len(cases)
    figure = Figure(figsize=(5.2 * len(panels), height), dpi=160, layout="constrained")
    for axis, (metric, label, form) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        known = [n for n in (values.get((name, p, metric)) for name, each in shown.items() for p in each) if n]
        low, high = (min(0.5, min(known) / 2), max(known)) if known else (1, 10)
        y, ticks = 0.0, []
        for name, each in shown.items():
            ticks.append(y + (len(each) - 1) / 2)
            for provider in each:
                value = values.get((name, provider, metric))
                if value:
                    axis.barh(y, value - low, 0.85, left=low, color=COLOURS[provider])
                best = values.get((name, PEER, metric)) or values.get((name, EAGER, metric))
                note, ours = text(value, form), provider == FUSED and value
                if ours and best:
                    ratio, word = (best / value, "less") if best >= value else (value / best, "MORE")
                    note += f"  ({ratio:.{0 if ratio > 10 else 1}f}x {word})"
                _note(axis, note, value or low, y, bool(ours))
                y += 1
            y += 0.7
        axis.set_yticks(ticks, [case.name.replace("/", "\n") for case in cases])
        axis.set_ylim(y - 0.7, -0.7)
        _log_scale(axis, low, high * (high / low) ** 0.35, f"{label} (log scale)")
        axis.xaxis.set_minor_locator(NullLocator())
    keys = [Patch(color=COLOURS[provider], label=NAMES[provider]) for provider in used]
    return _save(figure, path, title, keys)


def _predicted(path: Path, predicted: Mapping[tuple[str, str], Sequence[float]], gpu: str, title: str) -> Path:
    """Two bars a launch and a mark for its longest program."""
    figure = Figure(figsize=(8.4, 1.9 + 0.31 * len(predicted)), dpi=160, layout="constrained")
    axis = figure.subplots()
    low = 0.01  # what takes no more is over at once
    high = max(2 * low, *(max(each) for each in predicted.values()))
    mark: dict[str, Any] = {"marker": "|", "color": PARTS["longest"], "markeredgewidth": 1.6, "linestyle": ""}
    y, ticks, names, before = 0.0, [], [], ""
    for (case, launch), (memory, issue, longest) in predicted.items():
        y += 0.35 * (before not in ("", case))
        for place, (part, value) in zip((y - 0.2, y + 0.2), (("memory", memory), ("issue", issue)), strict=True):
            axis.barh(place, max(0.0, value - low), 0.4, left=low, color=PARTS[part])
        axis.plot(max(low, longest), y + 0.2, zorder=3, markersize=7, **mark)
        note = f"{max(memory, issue):.3g}   issue/memory {issue / memory:.2g}"
        _note(axis, note, max(memory, issue, longest, low), y, issue > memory)
        ticks.append(y)
        names.append(f"{case}  {launch}" if case != before else launch)
        y, before = y + 1, case
    axis.set_yticks(ticks, names)
    axis.set_ylim(y - 0.4, -0.7)
    _log_scale(axis, low, high * (high / low) ** 0.25, f"microseconds predicted for {gpu}, not measured (log scale)")
    keys = [
        Patch(color=PARTS["memory"], label="bytes / bandwidth"),
        Patch(color=PARTS["issue"], label="instructions / issue rate"),
        Line2D([], [], label="issue of the longest program with a multiprocessor to itself", **mark),
    ]
    return _save(figure, path, f"{title}\nEach launch on {gpu}: predicted, not measured", keys)


Curves = Mapping[tuple[str, str, str], Mapping[Any, Mapping[str, Any] | None]]
"""Results by value, of a case, an axis and a provider."""


def sweep(out: Path, curves: Curves, gpu: bool, base: Workload) -> list[Path]:
    """``sweep_time.png`` on a GPU, else ``sweep_bytes.png`` and ``sweep_launches.png``; a row is a loss."""
    if gpu:
        return [_curves(out / "sweep_time.png", curves, ("full_ms_p50",), 1, "milliseconds of a step", base)]
    moved, launched = ("bytes_loaded", "bytes_stored"), ("triton_launches", "other_launches")
    return [
        _curves(out / "sweep_bytes.png", curves, moved, 1e6, "megabytes read and written by a step", base),
        _curves(out / "sweep_launches.png", curves, launched, 1, "launches of a step", base),
    ]


def _curves(path: Path, curves: Curves, summed: Sequence[str], unit: float, label: str, base: Workload) -> Path:
    cases, axes = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    figure = Figure(figsize=(2.9 * len(axes), 0.9 + 1.5 * len(cases)), dpi=140, layout="constrained")
    panels = figure.subplots(len(cases), len(axes), squeeze=False, sharey="row")
    keys: dict[str, Any] = {}
    for (case, axis, provider), results in curves.items():
        panel = panels[cases.index(case)][axes.index(axis)]
        known = {value: sum(r[name] for name in summed) / unit for value, r in results.items() if r}
        kind = provider if provider in NAMES else PEER
        if known:
            places = list(range(len(known)))  # at equal distances, whatever the values
            line = "-" if all(isinstance(value, int) for value in known) else ":"
            style = {"linestyle": line, "linewidth": 1.8 if kind == FUSED else 1.3, "marker": "o", "markersize": 3}
            (drawn,) = panel.plot(places, list(known.values()), color=COLOURS[kind], label=NAMES[kind], **style)
            keys.setdefault(kind, drawn)
            panel.set_xticks(places, [str(value).replace("channels_last", "chan. last") for value in known])
    for case, row in zip(cases, panels, strict=True):
        row[0].set_ylabel(case.replace("/", "\n"), size=8, color=INK)
        for panel in row:
            panel.set_yscale("log")
            panel.grid(axis="y", alpha=0.3, linewidth=0.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7, colors=MUTED)
    for axis, panel in zip(axes, panels[-1], strict=True):
        panel.set_xlabel(axis + " of an image" * (axis == "objects"), size=8, color=INK)
    usual = f"batch {base.batch}, {base.size} px, {base.classes} classes but for what varies"
    return _save(figure, path, f"{label[0].upper()}{label[1:]}: {usual}", list(keys.values()))


def _note(axis: Axes, note: str, x: float, y: float, bold: bool) -> None:
    """Behind a bar."""
    style: dict[str, Any] = {"va": "center", "size": 7.5, "weight": "bold" if bold else "normal", "color": INK}
    axis.annotate(note, (x, y), (5, 0), textcoords="offset points", **style)


def _log_scale(axis: Axes, low: float, high: float, label: str) -> None:
    """Of horizontal bars, with nothing around them that says nothing."""
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.set_xlabel(label, size=9, color=INK)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.tick_params(axis="y", length=0, labelsize=8.5, labelcolor=INK)
    axis.tick_params(axis="x", labelsize=8, colors=MUTED)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)


def _save(figure: Figure, path: Path, title: str, keys: Sequence[Any]) -> Path:
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold", color=INK)
    figure.savefig(path)
    return path
