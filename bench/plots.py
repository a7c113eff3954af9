"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedyolo.tools.registry import CASES, Case, Workload

from .measure import COMPILE, EAGER, FUSED
from .report import LAUNCHES, text
from .rows import Index, Row, index

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
        for provider in (PEER, EAGER, COMPILE, FUSED):
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
        (case.name, launch): [values.get((case.name, FUSED, f"predicted.{gpu}.{launch}.{name}_us")) for name in PARTS]
        for case in cases
        for launch in LAUNCHES
    }
    if predicted := {key: each for key, each in predicted.items() if None not in each}:
        paths.append(_predicted(out / "issue_time.png", predicted, gpu, title))
    return paths


def _predicted(path: Path, predicted: Mapping[tuple[str, str], Sequence[float]], gpu: str, title: str) -> Path:
    """Two bars a launch and a mark for its longest program."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter

    figure, axis = plt.subplots(figsize=(8.4, 1.9 + 0.31 * len(predicted)), dpi=160, layout="constrained")
    axis.set_xscale("log")
    low = 0.01  # what takes no more is over at once
    high = max(2 * low, *(max(each) for each in predicted.values()))
    axis.set_xlim(low, high * (high / low) ** 0.25)
    y, ticks, names, before = 0.0, [], [], ""
    for (case, launch), (memory, issue, longest) in predicted.items():
        if before and case != before:
            y += 0.35
        for place, (part, value) in zip((y - 0.2, y + 0.2), (("memory", memory), ("issue", issue)), strict=True):
            axis.barh(place, max(0.0, value - low), 0.4, left=low, color=PARTS[part])
        mark = {"marker": "|", "color": PARTS["longest"], "markersize": 7, "markeredgewidth": 1.6}
        axis.plot(max(low, longest), y + 0.2, zorder=3, **mark)
        note = f"{max(memory, issue):.3g}   issue/memory {issue / memory:.2g}"
        style = {"va": "center", "size": 7, "color": INK, "weight": "bold" if issue > memory else "normal"}
        axis.annotate(note, (max(memory, issue, longest, low), y), (6, 0), textcoords="offset points", **style)
        ticks.append(y)
        names.append(f"{case}  {launch}" if case != before else launch)
        y, before = y + 1, case
    axis.set_yticks(ticks, names, size=8, color=INK)
    axis.set_ylim(y - 0.4, -0.7)
    axis.set_xlabel(f"microseconds predicted for {gpu}, not measured (log scale)", size=9, color=INK)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8, colors=MUTED)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(MUTED)
    handles = [plt.Rectangle((0, 0), 1, 1, color=PARTS[part]) for part in ("memory", "issue")]
    handles.append(plt.Line2D([], [], color=PARTS["longest"], marker="|", linestyle="", markeredgewidth=1.6))
    labels = [
        "bytes / bandwidth", "instructions / issue rate", "issue of the longest program with a multiprocessor to itself"
    ]  # fmt: skip
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(
        f"{title}\nEach launch on {gpu}: predicted, not measured", x=0.01, ha="left", size=10, weight="bold", color=INK
    )
    figure.savefig(path)
    plt.close(figure)
    return path


def _with_peers(values: Index) -> Index:
    """The first peer of a case also under one name for all peers."""
    ours = (EAGER, COMPILE, FUSED)
    peers: Index = {}
    for (name, provider, metric), value in values.items():
        if provider not in ours:
            peers.setdefault((name, PEER, metric), value)
    return {**values, **peers}


def _bars(
    path: Path, title: str, panels: Sequence[tuple[str, str, str]], values: Mapping[Any, Any], cases: Sequence[Case]
) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    metric = panels[0][0]
    shown = {c.name: [p for p in NAMES if p != PEER or values.get((c.name, p, metric)) is not None] for c in cases}
    used = [provider for provider in NAMES if any(provider in each for each in shown.values())]
    bars = sum(map(len, shown.values()))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 1.6 + 0.19 * bars + 0.1 * len(cases)), sharey=True, dpi=160,
        layout="constrained",
    )  # fmt: skip
    for axis, (metric, label, form) in zip(axes, panels, strict=True):
        axis.set_xscale("log")
        known = [n for n in (values.get((name, p, metric)) for name, each in shown.items() for p in each) if n]
        low, high = (min(0.5, min(known) / 2), max(known)) if known else (1, 10)
        axis.set_xlim(low, high * (high / low) ** 0.35)
        y, ticks = 0.0, []
        for case in cases:
            ticks.append(y + (len(shown[case.name]) - 1) / 2)
            for provider in shown[case.name]:
                value = values.get((case.name, provider, metric))
                if value:
                    axis.barh(y, value - low, 0.85, left=low, color=COLOURS[provider])
                best = values.get((case.name, PEER, metric)) or values.get((case.name, EAGER, metric))
                note, weight = text(value, form), "normal"
                if provider == FUSED and value:
                    weight = "bold"
                    if best:
                        ratio, word = (best / value, "less") if best >= value else (value / best, "MORE")
                        note += f"  ({ratio:.{0 if ratio > 10 else 1}f}x {word})"
                style = {"va": "center", "size": 7.5, "weight": weight, "color": INK}
                axis.annotate(note, (value or low, y), (4, 0), textcoords="offset points", **style)
                y += 1
            y += 0.7
        axis.set_xlabel(f"{label} (log scale)", size=9, color=INK)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8, colors=MUTED)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(MUTED)
        axis.set_yticks(ticks, [case.name.replace("/", "\n") for case in cases], size=9, color=INK)
        axis.set_ylim(y - 0.7, -0.7)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[provider]) for provider in used]
    labels = [NAMES[provider] for provider in used]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(used), frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold", color=INK)
    figure.savefig(path)
    plt.close(figure)
    return path


Curves = Mapping[tuple[str, str, str], Mapping[Any, Mapping[str, Any] | None]]
"""Results by value, of a case, an axis and a provider."""


def sweep(out: Path, curves: Curves, gpu: bool, base: Workload) -> list[Path]:
    """``sweep_time.png`` on a GPU, else ``sweep_bytes.png`` and ``sweep_launches.png``; a row is a loss."""
    out.mkdir(parents=True, exist_ok=True)
    if gpu:
        return [_curves(out / "sweep_time.png", curves, lambda r: r["full_ms_p50"], "milliseconds of a step", base)]

    def moved(result: Mapping[str, Any]) -> float:
        return (result["bytes_loaded"] + result["bytes_stored"]) / 1e6

    def launches(result: Mapping[str, Any]) -> float:
        return result["triton_launches"] + result["other_launches"]

    return [
        _curves(out / "sweep_bytes.png", curves, moved, "megabytes read and written by a step", base),
        _curves(out / "sweep_launches.png", curves, launches, "launches of a step", base),
    ]


def _curves(path: Path, curves: Curves, read: Callable[[Mapping[str, Any]], float], label: str, base: Workload) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases, axes = (list(dict.fromkeys(key[i] for key in curves)) for i in (0, 1))
    figure, panels = plt.subplots(
        len(cases), len(axes), figsize=(2.9 * len(axes), 0.9 + 1.5 * len(cases)), squeeze=False, dpi=140,
        layout="constrained", sharey="row",
    )  # fmt: skip
    drawn = {}
    for (case, axis, provider), results in curves.items():
        panel = panels[cases.index(case)][axes.index(axis)]
        known = {value: read(result) for value, result in results.items() if result}
        if not known:
            continue
        places = list(range(len(known)))  # at equal distances, whatever the values
        kind = provider if provider in COLOURS else PEER
        style = {"color": COLOURS[kind], "linewidth": 1.8 if kind == FUSED else 1.3, "marker": "o", "markersize": 3}
        numbers = all(isinstance(value, int) for value in known)
        (line,) = panel.plot(places, list(known.values()), linestyle="-" if numbers else ":", **style)
        drawn.setdefault(NAMES[kind], line)
        panel.set_xticks(places, [str(value).replace("channels_last", "chan. last") for value in known], fontsize=7)
    for row, case in enumerate(cases):
        for column, axis in enumerate(axes):
            panel = panels[row][column]
            panel.set_yscale("log")
            panel.grid(axis="y", alpha=0.3, linewidth=0.5)
            panel.spines[["top", "right"]].set_visible(False)
            panel.tick_params(labelsize=7, colors=MUTED)
            if row == len(cases) - 1:
                panel.set_xlabel(axis + " of an image" * (axis == "objects"), size=8, color=INK)
        panels[row][0].set_ylabel(case.replace("/", "\n"), size=8, color=INK)
    usual = f"batch {base.batch}, {base.size} px, {base.classes} classes but for what varies"
    title = f"{label[0].upper()}{label[1:]}: {usual}"
    figure.suptitle(title, x=0.01, ha="left", size=9, weight="bold", color=INK)
    figure.legend(list(drawn.values()), list(drawn), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path)
    plt.close(figure)
    return path
