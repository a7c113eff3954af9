"""Keyed rows, tables, JSON, CSV and pictures of what was measured. What was not is ``?``, never a guess."""

from __future__ import annotations

import csv
import datetime
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from .codegen import TARGETS, widths
from .registry import Case, Workload, select

FUSED, EAGER, COMPILE = "fused", "eager", "compile"
PROVIDERS = (EAGER, COMPILE, FUSED)
MODES = ("no_grad", "forward", "backward", "full")
Row = dict[str, Any]


def environment(root: Path) -> dict[str, Any]:
    """The machine, the versions and the commit; nothing that names a person or a path."""
    import torch

    return {
        "when": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "fusedyolo": _version("fusedyolo"),
        "commit": _commit(root),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "?"


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(root), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "?"


def headline(work: Workload, host: Mapping[str, Any]) -> str:
    """One line on what is about to be measured, and on what."""
    gpu = host["gpu"] or "no GPU: kernels run in Triton's interpreter, times are ?"
    source = work.objects if work.objects == "coco" or work.objects.startswith("crowded:") else "from labels"
    targets = work.targets()
    number = len(targets.rows if work.form == "Targets" else targets)
    return (
        f"fusedyolo {host['fusedyolo']} ({host['commit']}), torch {host['torch']}, triton {host['triton']}\n{gpu}\n"
        f"batch {work.batch}, {work.size} px, {work.classes} classes, {work.dtype}, "
        f"{number} objects ({source}, {work.form})"
    )


# ----------------------------------------------------------------------------------------------------------------- rows


def rows(results: Mapping[Any, Any], work: Workload, host: Mapping[str, Any]) -> list[Row]:
    """One row a number, from the results of tasks. Without a GPU the times are rows too, with no value."""
    common = {
        "batch": work.batch,
        "size": work.size,
        "classes": work.classes,
        "dtype": work.dtype,
        "objects": work.objects if not Path(work.objects).exists() else "labels",
        "form": work.form,
        "seed": work.seed,
        "device": host["gpu"] or "cpu",
        **{name: host[name] for name in ("torch", "triton", "fusedyolo", "commit")},
    }
    found: list[Row] = []

    def add(case: Case, provider: str, metric: str, value: Any) -> None:
        found.append(
            {"loss": case.loss, "recipe": case.recipe, "provider": provider, "metric": metric, "value": value, **common}
        )

    cases = list(dict.fromkeys(select([task.case])[0] for task in results if task.case))
    by_key = {(task.kind, task.case, task.provider): result for task, result in results.items()}
    ceiling = by_key.get(("bandwidth", "", ""))
    for case in cases:
        size = case.prediction_bytes(work)
        parity = by_key.get(("parity", case.name, ""), {})
        for provider in (FUSED, EAGER):
            for metric in ("loss_error", "grad_error"):
                add(case, provider, metric, parity.get(f"{provider}_{metric}"))
        for provider in (EAGER, FUSED):
            counted = by_key.get(("count", case.name, provider))
            for metric, value in _counted(counted, size).items():
                add(case, provider, metric, value)
        compiled = by_key.get(("compile", case.name, COMPILE), {})
        for metric in ("cpu_codegen_kernels", "graph_breaks"):
            add(case, COMPILE, metric, compiled.get(metric))
        for provider in (EAGER, COMPILE, FUSED):
            timed = by_key.get(("time", case.name, provider)) or {}
            for metric in [f"{mode}_ms_p{q}" for mode in MODES for q in (20, 50, 80)] + ["host_us"]:
                add(case, provider, metric, timed.get(metric))
            add(case, provider, "peak_per_P", timed["peak_bytes"] / size if timed else None)
        counted, timed = by_key.get(("count", case.name, FUSED)), by_key.get(("time", case.name, FUSED))
        moved = counted["bytes_loaded"] + counted["bytes_stored"] if counted else 0
        rate = moved / timed["full_ms_p50"] / 1e6 if counted and timed else None
        add(case, FUSED, "gb_per_s", rate)
        add(case, FUSED, "copy_gb_per_s", ceiling)
        add(case, FUSED, "time_over_floor", ceiling / rate if rate and ceiling else None)
        for (kind, name, target), modes in by_key.items():
            if kind == "codegen" and name == case.name:
                for mode, resources in modes.items():
                    for metric, value in resources.items():
                        if metric in ("loads", "stores"):
                            value = widths({int(width): number for width, number in value.items()})
                        if metric != "target":
                            add(case, FUSED, f"{target}.{mode}.{metric}", value)
    return found


def _counted(counted: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    names = ("triton_launches", "other_launches", "syncs")
    if counted is None:
        return dict.fromkeys((*names, "loads_per_P", "stores_per_P", "bytes_per_P"))
    loads, stores = counted["bytes_loaded"] / size, counted["bytes_stored"] / size
    return {
        **{n: counted[n] for n in names},
        "loads_per_P": loads,
        "stores_per_P": stores,
        "bytes_per_P": loads + stores,
    }


def index(found: Iterable[Row]) -> dict[tuple[str, str, str], Any]:
    """Values by loss/recipe, provider and metric."""
    return {("/".join(filter(None, (r["loss"], r["recipe"]))), r["provider"], r["metric"]): r["value"] for r in found}


# --------------------------------------------------------------------------------------------------------------- tables


def text(value: Any, form: str = "") -> str:
    """``value`` in a format, ``?`` if there is none."""
    return "?" if value is None else format(value, form)


def print_parity(console: Console, parity: Mapping[str, Any], gpu: bool) -> None:
    """What the gate decided on."""
    where = "on this GPU" if gpu else "in Triton's interpreter"
    table = _table(f"Errors against the reference in float64, kernels {where}")
    for name in ("fused loss", "eager loss", "fused grad", "eager grad", "assigned", ""):
        table.add_column(name, justify="right")
    for name, found in parity.items():
        if found is None:
            table.add_row(name, "?", "?", "?", "?", "?", "[bold red]did not run[/]")
            continue
        keys = ("fused_loss_error", "eager_loss_error", "fused_grad_error", "eager_grad_error")
        verdict = "[green]passes[/]" if found["ok"] else "[bold red]FAILS[/]"
        table.add_row(name, *(text(found[key], ".1e") for key in keys), str(found["positives"]), verdict)
    console.print(table)


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case]) -> None:
    """Cost, time and compiled resources."""
    values = index(found)
    console.print(_cost_table(values, cases), _time_table(values, cases), _codegen_table(values, cases))


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("loss", no_wrap=True)
    return table


def _cost_table(values: Mapping, cases: Sequence[Case]) -> Table:
    table = _table("Forward + backward: launches (of Triton + other), bytes, host waits; P = bytes of the predictions")
    table.add_column("provider", no_wrap=True)
    for name in ("launches", "loads/P", "stores/P", "bytes/P", "waits"):
        table.add_column(name, justify="right")
    for case in cases:
        for provider in PROVIDERS:
            get = _getter(values, case, provider)
            each = [get(metric, ".3f") for metric in ("loads_per_P", "stores_per_P", "bytes_per_P")]
            name, launches = "", f"{get('triton_launches')} + {get('other_launches')}"
            if provider == EAGER:
                name, launches = case.name, get("other_launches")
            elif provider == COMPILE:  # Inductor's own count, of C++ kernels where there is no GPU
                launches = f"{get('cpu_codegen_kernels')} on a CPU"
            launches = "?" if launches.startswith("?") else launches
            table.add_row(name, _LABELS[provider], launches, *each, get("syncs"), end_section=provider == FUSED)
    return table


_LABELS = {EAGER: "eager", COMPILE: "compile", FUSED: "fused"}


def _getter(values: Mapping, case: Case, provider: str) -> Callable[..., str]:
    return lambda metric, form="": text(values.get((case.name, provider, metric)), form)


def _time_table(values: Mapping, cases: Sequence[Case]) -> Table:
    table = _table("Milliseconds p50 (full: p20 / p50 / p80), cold cache; ? without a GPU")
    table.add_column("provider", no_wrap=True)
    for name in ("fwd", "bwd", "full", "no grad", "GB/s", "x floor", "peak/P", "host us"):
        table.add_column(name, justify="right")
    for case in cases:
        for provider in PROVIDERS:
            get = _getter(values, case, provider)
            full = [get(f"full_ms_p{q}", ".3f") for q in (20, 50, 80)]
            rate = [get("gb_per_s", ".0f"), get("copy_gb_per_s", ".0f")]
            table.add_row(
                case.name if provider == EAGER else "",
                _LABELS[provider],
                get("forward_ms_p50", ".3f"),
                get("backward_ms_p50", ".3f"),
                "?" if full[1] == "?" else " / ".join(full),
                get("no_grad_ms_p50", ".3f"),
                "" if provider != FUSED else "?" if rate[0] == "?" else " of ".join(rate),
                get("time_over_floor", ".2f") if provider == FUSED else "",
                get("peak_per_P", ".2f"),
                get("host_us", ".0f"),
                end_section=provider == FUSED,
            )
    return table


def _codegen_table(values: Mapping, cases: Sequence[Case]) -> Table:
    table = _table("What the kernels compile to; loads and stores: instructions x bits")
    table.add_column("launch")
    table.add_column("target", no_wrap=True)
    for name in ("regs", "stack", "spills", "instr"):
        table.add_column(name, justify="right")
    table.add_column("loads")
    table.add_column("stores")
    metrics = ("registers", "stack", "spills", "instructions", "loads", "stores")
    for case in cases:
        label = case.name
        for mode in ("overlap", "match", "loss", "rank", "grad"):
            for target in TARGETS:
                each = [values.get((case.name, FUSED, f"{target}.{mode}.{metric}")) for metric in metrics]
                if each[0] is not None:
                    table.add_row(label, mode, target, *map(text, each))
                    label = ""
        table.add_section()
    return table


# ---------------------------------------------------------------------------------------------------------------- files


def write(out: Path, found: Sequence[Row], host: Mapping[str, Any], cases: Sequence[Case]) -> list[Path]:
    """Write ``bench.json`` (this run), ``bench.csv`` (this run's rows replace those with the same key) and pictures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.json").write_text(json.dumps({"environment": host, "rows": list(found)}, indent=1) + "\n")
    _merge(out / "bench.csv", found)
    return [out / "bench.json", out / "bench.csv", *plot(out, found, cases)]


def write_failures(out: Path, failures: Sequence[str]) -> list[Path]:
    """Write what tasks that broke had to say to ``failed.txt``, or remove the one of an earlier run."""
    path = out / "failed.txt"
    if not failures:
        path.unlink(missing_ok=True)
        return []
    out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(failures))
    return [path]


def _merge(path: Path, found: Sequence[Row]) -> None:
    names = list(found[0])

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in names if name != "value")

    kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames == names:
                kept = {key(row): row for row in reader}
    kept |= {key(row): {**row, "value": "?" if row["value"] is None else row["value"]} for row in found}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


INK, MUTED = "#222222", "#777777"
COLOURS = {EAGER: "#c3c9d2", COMPILE: "#8fa3bf", FUSED: "#1f7a5c"}


def plot(out: Path, found: Sequence[Row], cases: Sequence[Case]) -> list[Path]:
    """``cost.png``: bytes and launches; ``time.png``: milliseconds and memory, where there are any."""
    values, first = index(found), found[0]
    for case in cases:
        triton, other = (values.get((case.name, FUSED, f"{kind}_launches")) for kind in ("triton", "other"))
        values[case.name, FUSED, "launches"] = None if triton is None else triton + other
        values[case.name, EAGER, "launches"] = values.get((case.name, EAGER, "other_launches"))
    title = (
        f"One training step of the loss, forward + backward: batch {first['batch']}, {first['size']} px, "
        f"{first['classes']} classes, {first['dtype']}"
    )
    panels = ("bytes_per_P", "memory traffic, multiples of the predictions", ".2f"), ("launches", "launches", ".0f")
    paths = [_bars(out / "cost.png", title, panels, (EAGER, FUSED), values, cases)]
    if any(values.get((case.name, FUSED, "full_ms_p50")) for case in cases):
        panels = (
            ("full_ms_p50", f"milliseconds on {first['device']}", ".2f"),
            ("peak_per_P", "peak memory, multiples of the predictions", ".2f"),
        )
        paths.append(_bars(out / "time.png", title, panels, PROVIDERS, values, cases))
    return paths


def _bars(path: Path, title: str, panels, providers: Sequence[str], values: Mapping, cases: Sequence[Case]) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullLocator

    thickness = 0.8 / len(providers)
    shape = 5.2 * len(panels), 1.5 + 0.3 * len(cases) * len(providers)
    figure, axes = plt.subplots(1, len(panels), figsize=shape, sharey=True, dpi=160, layout="constrained")
    for axis, (metric, label, form) in zip(axes, panels, strict=True):
        axis.set_xscale("log")
        known = [n for n in (values.get((c.name, p, metric)) for c in cases for p in providers) if n]
        low, high = (min(0.5, min(known) / 2), max(known)) if known else (1, 10)
        axis.set_xlim(low, high * (high / low) ** 0.3)
        for row, case in enumerate(cases):
            for place, provider in enumerate(providers):
                value = values.get((case.name, provider, metric))
                y = row + (place - (len(providers) - 1) / 2) * thickness
                if value:
                    axis.barh(y, value - low, thickness * 0.9, left=low, color=COLOURS[provider])
                note, weight, eager = text(value, form), "normal", values.get((case.name, EAGER, metric))
                if provider == FUSED:
                    weight = "bold"
                    note += f"  ({eager / value:.{0 if eager > 10 * value else 1}f}x less)" if value and eager else ""
                where = value or low, y
                style = {"va": "center", "size": 8, "weight": weight, "color": INK}
                axis.annotate(note, where, (4, 0), textcoords="offset points", **style)
        axis.set_xlabel(f"{label} (log scale)", size=9, color=INK)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=8, colors=MUTED)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(MUTED)
    axes[0].set_yticks(range(len(cases)), [case.name.replace("/", "\n") for case in cases], size=9, color=INK)
    axes[0].set_ylim(len(cases) - 0.5, -0.5)
    names = {FUSED: "fusedyolo", EAGER: "eager PyTorch reference", COMPILE: "torch.compile of it"}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[provider]) for provider in providers]
    labels = [names[provider] for provider in providers]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(providers), frameon=False, fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold", color=INK)
    figure.savefig(path)
    plt.close(figure)
    return path
