"""Pictures of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fusedyolo.tools.registry import Case, Workload

from .measure import COMPILE, EAGER, FUSED
from .rows import Row, index, launches

PEER = "peer"
STYLES = {
    PEER: ("the loss that it replaces", "#d08c60"),
    EAGER: ("eager PyTorch reference", "#c3c9d2"),
    COMPILE: ("torch.compile of it", "#8fa3bf"),
    FUSED: ("fusedyolo", "#1f7a5c"),
}
PARTS = {  # of a prediction, by metric
    "memory_us": ("bytes / bandwidth", "#8fa3bf"),
    "issue_us": ("instructions / issue rate", "#1f7a5c"),
    "chain_us": ("longest chain of instructions that wait for one another", "#c2410c"),
}
LEAST = 0.01  # microseconds that are told apart


class Bar(NamedTuple):
    """One of a group of bars, which may be of nothing."""

    value: float | None
    colour: str
    note: str


Panel = tuple[str, Mapping[str, Sequence[Bar]]]
"""What is shown, and bars by the name of their group."""
Keys = Sequence[tuple[str, str]]
"""What colours mean: words, and a colour each."""


def plot(out: Path, found: Sequence[Row], cases: Sequence[Case], gpu: str = "H100") -> list[Path]:
    """``cost.png``: bytes and launches; where there are any, ``time.png``: milliseconds and memory, and
    ``issue_time.png``: what is predicted for ``gpu``.
    """
    values, first = index(found), found[0]
    shown = {who if who in STYLES else PEER for case in cases for who in values[case.name]}
    keys = [style for who, style in STYLES.items() if who in shown]
    title = (
        f"One training step of the loss, forward + backward: batch {first['batch']}, {first['size']} px, "
        f"{first['classes']} classes, {first['dtype']}"
    )
    for each in (each for case in cases for each in values[case.name].values() if "other_launches" in each):
        each["launches"] = each.get("triton_launches", 0) + each["other_launches"]

    def panel(metric: str, label: str, form: str) -> Panel:
        return label, {case.name.replace("/", "\n"): _providers(values[case.name], metric, form) for case in cases}

    cost = [
        panel("bytes_per_P", "memory traffic, multiples of the predictions", ".2f"),
        panel("launches", "launches", ".0f"),
    ]
    paths = [_bars(out / "cost.png", title, cost, keys)]
    if any("full_ms_p50" in values[case.name].get(FUSED, {}) for case in cases):
        time = [
            panel("full_ms_p50", f"milliseconds on {first['device']}", ".2f"),
            panel("peak_per_P", "peak memory, multiples of the predictions", ".2f"),
        ]
        paths.append(_bars(out / "time.png", title, time, keys))
    predicted = {
        f"{case.name}  {launch}": [each[part] for part in PARTS]
        for case in cases
        for launch, each in launches(values, case, f"predicted.{gpu}").items()
        if launch != "step"
    }
    if predicted:
        title = f"{title}\nEach launch on {gpu}: predicted, not measured"
        paths.append(_dots(out / "issue_time.png", title, f"microseconds predicted for {gpu}, not measured", predicted))
    return paths


def _providers(values: Mapping[str, Mapping[str, Any]], metric: str, form: str) -> list[Bar]:
    """Of each provider of a case, the fused loss compared with its peer, else with the reference."""
    peer = next((name for name in values if name not in STYLES), EAGER)
    best, bars = values.get(peer, {}).get(metric), []
    for provider, each in values.items():
        value = each.get(metric)
        note = "?" if value is None else format(value, form)
        if provider == FUSED and value and best:
            ratio, word = (best / value, "less") if best >= value else (value / best, "MORE")
            note += f"  ({ratio:.{0 if ratio > 10 else 1}f}x {word})"
        bars.append(Bar(value, STYLES.get(provider, STYLES[PEER])[1], note))
    return bars


def _dots(path: Path, title: str, label: str, rows: Mapping[str, Sequence[float]]) -> Path:
    """A row a launch, with a dot for each of :data:`PARTS` on a logarithmic scale, and the numbers behind them."""
    figure = Figure(figsize=(9, 1.6 + 0.17 * len(rows)), dpi=130, layout="constrained")
    axis = figure.subplots()
    places, columns = range(len(rows)), list(zip(*rows.values(), strict=True))
    low, high = LEAST / 1.5, max(map(max, columns))
    ends = [high * 2 * 2.6**i for i in range(len(columns))]
    axis.hlines(places, low, [max(values) for values in rows.values()], color="#e5e7eb", lw=0.8, zorder=0)
    for values, (_, colour) in zip(columns, PARTS.values(), strict=True):
        axis.scatter([max(value, LEAST) for value in values], places, 18, colour)
    for place, values in enumerate(rows.values()):
        for value, (_, colour), end in zip(values, PARTS.values(), ends, strict=True):
            note = f"< {LEAST}" if value < LEAST else f"{value:.3g}"
            axis.text(end, place, note, size=7, color=colour, va="center", ha="right")
    axis.set_yticks(places, list(rows))
    axis.set_ylim(len(rows) - 0.3, -0.7)
    axis.set_xscale("log")
    axis.set_xlim(low, ends[-1])
    axis.set_xlabel(f"{label} (log scale)", size=9)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    axis.tick_params(labelsize=7.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    return _save(figure, path, title, [Patch(color=colour, label=words) for words, colour in PARTS.values()])


def _bars(path: Path, title: str, panels: Sequence[Panel], keys: Keys) -> Path:
    """Groups of horizontal bars on a logarithmic scale, each with its note behind it."""
    sizes = [len(bars) for bars in panels[0][1].values()]
    places = [[sum(sizes[:g]) + 0.7 * g + i for i in range(size)] for g, size in enumerate(sizes)]
    flat = [place for own in places for place in own]
    figure = Figure(figsize=(5.2 * len(panels), 1.6 + 0.2 * flat[-1]), dpi=160, layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (label, groups) in zip(axes, panels, strict=True):
        bars = [bar for of in groups.values() for bar in of]
        known = [bar.value for bar in bars if bar.value]
        low, high = (min(0.5, min(known) / 2), max(known)) if known else (1, 10)
        lengths = [(bar.value or low) - low for bar in bars]
        drawn = axis.barh(flat, lengths, 0.85, left=low, color=[bar.colour for bar in bars])
        axis.bar_label(drawn, [bar.note for bar in bars], padding=5, size=7.5)
        axis.set_yticks([sum(own) / len(own) for own in places], list(groups))
        axis.set_ylim(flat[-1] + 0.7, -0.7)
        axis.set_xscale("log")
        axis.set_xlim(low, high * (high / low) ** 0.35)
        axis.set_xlabel(f"{label} (log scale)", size=9)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right", "left"]].set_visible(False)
    return _save(figure, path, title, [Patch(color=colour, label=words) for words, colour in keys])


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
        words, colour = STYLES.get(provider, STYLES[PEER])
        known = {str(value): sum(r[name] for name in summed) / unit for value, r in results.items() if r}
        (keys[words],) = panel.semilogy(list(known), list(known.values()), ".-", color=colour, label=words)
        panel.set_ylabel(case.replace("/", "\n") if axis == axes[0] else "", size=8)
        panel.set_xlabel(axis + " of an image" * (axis == "objects") if case == cases[-1] else "", size=8)
        panel.tick_params(labelsize=7)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    usual = f"batch {base.batch}, {base.size} px, {base.classes} classes but for what varies"
    return _save(figure, path, f"{label[0].upper()}{label[1:]}: {usual}", list(keys.values()))


def _save(figure: Figure, path: Path, title: str, keys: Sequence[Any]) -> Path:
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold")
    figure.savefig(path)
    return path
