"""Keyed rows of what was measured, and the files they are kept in. What was not measured is ``?``, never a guess."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedyolo.tools.codegen import widths
from fusedyolo.tools.registry import CASES, Case, Workload

from . import peers
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS, predict

MODES = ("no_grad", "forward", "backward", "full")
GRAPHS = ("forward_graph", "full_graph")
Row = dict[str, Any]


def case_of(name: str) -> Case:
    """A case of this package, or one that only a peer computes yet."""
    return CASES.get(name) or peers.PENDING[name]


def rows(results: Mapping[Any, Any], work: Workload, host: Mapping[str, Any], gpu: str = "H100") -> list[Row]:
    """One row a number, from the results of tasks. Without a GPU the times are rows too, with no value.

    What is predicted for ``gpu``, one of :data:`bench.predict.GPUS`, has metrics ``predicted.{gpu}.{launch}.{metric}``.
    """
    kinds = {"count exactly": "count", "quick time": "time"}
    found = {(kinds.get(task.kind, task.kind), task.case, task.provider): r for task, r in results.items()}
    return [
        row
        for name in dict.fromkeys(task.case for task in results if task.case)
        for row in _rows_of(case_of(name), found, work, host, gpu)
    ]


def _rows_of(case: Case, found: Mapping, work: Workload, host: Mapping[str, Any], gpu: str) -> Iterator[Row]:
    size = case.prediction_bytes(work)
    versions = {name: host[name] for name in ("torch", "triton", "fusedyolo", "commit")}

    def row(provider: str, metric: str, value: Any) -> Row:
        peer = peers.PEERS.get(provider)
        return {
            "loss": case.loss,
            "recipe": case.recipe,
            "provider": provider,
            "metric": metric,
            "value": value,
            "batch": work.batch,
            "size": work.size,
            "classes": work.classes,
            "dtype": work.dtype,
            "layout": case.layout(work),
            "objects": work.objects if not Path(work.objects).exists() else "labels",
            "form": work.form,
            "seed": work.seed,
            "device": host["gpu"] or "cpu",
            "peer": f"{peer.package} {peer.version()}" if peer else "",
            **versions,
        }

    parity = found.get(("parity", case.name, ""), {})
    measured = [p for kind, name, p in found if kind in ("count", "time") and name == case.name]
    others = [p for p in dict.fromkeys(measured) if p not in (FUSED, EAGER, COMPILE)]
    ours = [EAGER, COMPILE, FUSED] if case.name in CASES else []
    for provider in (*others, *ours):
        if provider != COMPILE:
            for metric in ("loss_error", "grad_error"):
                yield row(provider, metric, parity.get(f"{provider}_{metric}"))
        kind = "compile" if provider == COMPILE else "count"
        for metric, value in _counted(found.get((kind, case.name, provider)), size).items():
            yield row(provider, metric, value)
        timed = found.get(("time", case.name, provider)) or {}
        for mode in MODES + GRAPHS:
            for q in (20, 50, 80):
                yield row(provider, f"{mode}_ms_p{q}", timed.get(f"{mode}_ms_p{q}"))
        for metric in ("host_us", "cold_s"):
            yield row(provider, metric, timed.get(metric))
        peak = timed.get("peak_bytes")
        yield row(provider, "peak_per_P", None if peak is None else peak / size)
    if ours:
        yield row(FUSED, "floor_per_P", case.floor(work))
        counted, timed = found.get(("count", case.name, FUSED)), found.get(("time", case.name, FUSED))
        ceiling = found.get(("bandwidth", "", ""))
        moved = counted["bytes_loaded"] + counted["bytes_stored"] if counted else 0
        rate = moved / timed["full_ms_p50"] / 1e6 if counted and timed else None
        yield row(FUSED, "gb_per_s", rate)
        yield row(FUSED, "copy_gb_per_s", ceiling)
        yield row(FUSED, "time_over_bytes", ceiling / rate if rate and ceiling else None)
        floor_ms = case.floor(work) * size / ceiling / 1e6 if ceiling else None
        yield row(FUSED, "time_over_floor", timed["full_ms_p50"] / floor_ms if timed and floor_ms else None)
    for launch, predicted in _predicted(case, found, gpu).items():
        for metric, value in predicted.items():
            yield row(FUSED, f"predicted.{gpu}.{launch}.{metric}", value)
    for (kind, name, target), launches in found.items():
        if kind == "codegen" and name == case.name:
            for launch, resources in launches.items():
                for metric, value in resources.items():
                    if metric in ("loads", "stores"):
                        value = widths({int(width): number for width, number in value.items()})
                    if metric not in ("target", "code"):
                        yield row(FUSED, f"{target}.{launch}.{metric}", value)


def _predicted(case: Case, found: Mapping, gpu: str) -> dict[str, dict[str, float]]:
    """By launch, if all that it takes is there."""
    model = GPUS[gpu]
    counted = found.get(("count", case.name, FUSED))
    executed, compiled = (found.get((kind, case.name, model.target)) for kind in ("execute", "codegen"))
    if not (counted and executed and compiled):
        return {}
    return predict(model, counted["kernels"], executed, compiled)


def _counted(counted: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    names = ("triton_launches", "other_launches", "syncs", "loads_per_P", "stores_per_P", "bytes_per_P")
    if counted is None:
        return dict.fromkeys(names)
    if "graph_breaks" in counted:
        return {
            "other_launches": counted["kernels"],
            "bytes_per_P": counted["bytes"] / size,
            "graph_breaks": counted["graph_breaks"],
        }
    loads, stores = counted["bytes_loaded"] / size, counted["bytes_stored"] / size
    return {
        **{name: counted[name] for name in names[:3]},
        "loads_per_P": loads,
        "stores_per_P": stores,
        "bytes_per_P": loads + stores,
        "programs_run": counted["programs_run"] / max(1, counted["programs"]),
    }


Index = dict[tuple[str, str, str], Any]


def index(found: Iterable[Row]) -> Index:
    """Values by loss/recipe, provider and metric."""
    return {("/".join(filter(None, (r["loss"], r["recipe"]))), r["provider"], r["metric"]): r["value"] for r in found}


def providers(values: Index, case: Case) -> list[str]:
    """Who computes a case: its peers first, ours last."""
    return list(dict.fromkeys(provider for name, provider, metric in values if name == case.name))


def slower(values: Index, cases: Iterable[Case]) -> list[str]:
    """Where another provider takes less time than the fused loss, a sentence each."""
    found = []
    for case in cases:
        for mode in MODES + GRAPHS:
            ours = values.get((case.name, FUSED, f"{mode}_ms_p50"))
            for provider in providers(values, case):
                theirs = values.get((case.name, provider, f"{mode}_ms_p50"))
                if ours and theirs and theirs < ours:
                    found.append(f"{case.name}, {mode}: {ours:.3f} ms, {provider} {theirs:.3f} ms")
    return found


# ---------------------------------------------------------------------------------------------------------------- files


def write(out: Path, found: Sequence[Row], host: Mapping[str, Any], name: str = "bench") -> list[Path]:
    """Write ``{name}.json`` (this run) and ``{name}.csv`` (this run's rows replace those with the same key)."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({"environment": host, "rows": list(found)}, indent=1) + "\n")
    merge(out / f"{name}.csv", found)
    return [out / f"{name}.json", out / f"{name}.csv"]


def write_failures(out: Path, failures: Sequence[str]) -> list[Path]:
    """Write what tasks that broke had to say to ``failed.txt``, or remove the one of an earlier run."""
    path = out / "failed.txt"
    if not failures:
        path.unlink(missing_ok=True)
        return []
    out.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(failures))
    return [path]


def merge(path: Path, found: Sequence[Row]) -> None:
    """Put rows into a CSV in place of those with the same key, that is everything but the value."""
    names = list(found[0])

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple("" if row[name] is None else str(row[name]) for name in names if name != "value")

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
