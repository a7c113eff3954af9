"""Writes the table of docs/measured.md and docs/predicted.png: launches as predicted for an H200, and as measured.

python docs/predicted.py
"""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
PAGE, PICTURE, DATA = ROOT / "docs" / "measured.md", ROOT / "docs" / "predicted.png", ROOT / "bench" / "data"
PLACE = re.compile(r"(<!-- written by docs/predicted.py -->\n).*?(<!-- end -->)", re.DOTALL)
KERNEL = re.compile(r"(?!all_)\w+_kernel\S*\.p50_us")
COMMIT = "d6ebf88"  # whose kernels were measured
PARTS = {  # what a prediction is mostly made of
    "chain_us": ("longest chain", "#c2410c"),
    "memory_us": ("bytes", "#8fa3bf"),
    "issue_us": ("instructions", "#1f7a5c"),
}


class One(NamedTuple):
    """A launch, in microseconds."""

    case: str
    launch: str
    predicted: float
    measured: float
    parts: dict[str, float]

    @property
    def mostly(self) -> str:
        """The largest of the parts."""
        return max(PARTS, key=lambda name: self.parts[name])


def _values(path: Path) -> dict[str, dict[str, float]]:
    """By case the values of kernels of that commit, float32, in the order of the file."""
    found: dict[str, dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["commit"].startswith(COMMIT) and row["dtype"] == "float32" and row["provider"] == "fused":
                case = "/".join(filter(None, (row["loss"], row["recipe"])))
                found.setdefault(case, {})[row["metric"]] = float(row["value"])
    return found


def launches() -> list[One]:
    """Those that were measured."""
    measured, found = _values(DATA / "h200.csv"), []
    for case, values in _values(DATA / "predicted.csv").items():
        names = list(dict.fromkeys(name.split(".")[2] for name in values))
        times = [time for name, time in measured.get(case, {}).items() if KERNEL.fullmatch(name)]
        for name, time in zip(names, times, strict=False):
            parts = {part: values[f"predicted.H200.{name}.{part}"] for part in (*PARTS, "predicted_us")}
            found.append(One(case, name, parts["predicted_us"], time, parts))
    return found


def apart(found: list[One]) -> float:
    """By what factor predictions are off: the exponential of the root mean square of the logarithms."""
    return math.exp(math.sqrt(sum(math.log(one.predicted / one.measured) ** 2 for one in found) / len(found)))


def page(text: str) -> str:
    """The page with its table as it should be."""
    by_case: dict[str, list[One]] = {}
    for one in launches():
        by_case.setdefault(one.case, []).append(one)
    lines = ["| loss | launches | predicted | measured |", "|---|---|---:|---:|"]
    for case, own in by_case.items():
        times = [(one.predicted, one.measured) for one in own]
        columns = ["; ".join(f"{time:.1f}" for time in column) for column in zip(*times, strict=True)]
        lines.append(f"| {case} | {', '.join(one.launch for one in own)} | {' | '.join(columns)} |")
    return PLACE.sub(lambda found: found[1] + "\n".join(lines) + "\n" + found[2], text)


def draw(found: list[One]) -> None:
    """Each launch a point; on the line a prediction would be right."""
    figure = Figure(figsize=(7, 6.2), dpi=130, layout="constrained")
    axis = figure.subplots()
    ends = (0.8, 400)
    axis.plot(ends, ends, color="#6b7280", lw=1)
    for factor in (1.5, 1 / 1.5):
        axis.plot(ends, [end * factor for end in ends], color="#d1d5db", lw=0.8)
    for part, (label, colour) in PARTS.items():
        own = [one for one in found if one.mostly == part]
        axis.scatter([one.measured for one in own], [one.predicted for one in own], 22, colour, label=f"mostly {label}")
    for one in found:
        if not 1 / 1.7 < one.predicted / one.measured < 1.7:
            name, place = f"{one.case} {one.launch}", (one.measured, one.predicted)
            axis.annotate(name, place, (0, -12), textcoords="offset points", ha="center", size=7)
    axis.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axis.set(xlabel="microseconds measured on an H200, cold cache", ylabel="microseconds predicted")
    axis.set_title(f"{len(found)} launches at commit {COMMIT}; lines: equal, and 1.5 times off", size=10)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(PICTURE)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
    draw(launches())
    print(f"{len(launches())} launches, off by a factor of {apart(launches()):.2f}")
