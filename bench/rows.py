"""Keyed rows of what was measured, and the files they are kept in. What was not measured is ``?``, never a guess."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fusedyolo.tools.codegen import widths
from fusedyolo.tools.env import version
from fusedyolo.tools.registry import CASES, Case, Workload

from . import peers
from .measure import COMPILE, EAGER, FUSED
from .predict import GPUS, predict

MODES = ("no_grad", "forward", "backward", "full")
GRAPHS = ("forward_graph", "full_graph")
TIMES = (*(f"{mode}_ms_p{q}" for mode in MODES + GRAPHS for q in (20, 50, 80)), "host_us", "cold_s")
COUNTS = ("triton_launches", "other_launches", "syncs", "loads_per_P", "stores_per_P", "bytes_per_P")

Row = dict[str, Any]
Index = dict[tuple[str, str, str], Any]


def rows(results: Mapping[Any, Any], work: Workload, host: Mapping[str, Any], gpu: str = "H100") -> list[Row]:
    """One row a number, from the results of tasks. Without a GPU the times are rows too, with no value.

    What is predicted for ``gpu``, one of :data:`bench.predict.GPUS`, has metrics ``predicted.{gpu}.{launch}.{metric}``.
    """
    kinds = {"count exactly": "count", "quick time": "time"}
    found = {(kinds.get(task.kind, task.kind), task.case, task.provider): r for task, r in results.items()}
    versions = {name: host[name] for name in ("torch", "triton", "fusedyolo", "commit")}
    listed = []
    for case in (CASES[name] for name in dict.fromkeys(task.case for task in results if task.case)):
        for provider, metric, value in _values(case, found, work, gpu):
            peer = f"{provider} {version(provider)}" if provider in peers.PEERS else ""
            row = {"loss": case.loss, "recipe": case.recipe, "provider": provider, "metric": metric, "value": value}
            row |= {name: getattr(work, name) for name in ("batch", "size", "classes", "dtype")}
            row |= {"layout": case.layout(work), "objects": work.objects, "form": work.form, "seed": work.seed}
            row |= {"device": host["gpu"] or "cpu", "peer": peer}
            listed.append(row | versions)
    return listed


def _values(case: Case, found: Mapping, work: Workload, gpu: str) -> Iterator[tuple[str, str, Any]]:
    """Provider, metric and value."""
    size = case.prediction_bytes(work)

    def of(kind: str, provider: str) -> Any:
        return found.get((kind, case.name, provider)) or {}

    measured = dict.fromkeys(p for kind, name, p in found if kind in ("count", "time") and name == case.name)
    ours = EAGER, COMPILE, FUSED
    for provider in (*(p for p in measured if p not in ours), *ours):
        timed, peak = of("time", provider), of("time", provider).get("peak_bytes")
        numbers = {name: of("parity", "").get(f"{provider}_{name}") for name in ("loss_error", "grad_error")}
        numbers = {} if provider == COMPILE else numbers
        numbers |= _counted(of("compile" if provider == COMPILE else "count", provider), size)
        numbers |= {name: timed.get(name) for name in TIMES}
        numbers |= {"peak_per_P": None if peak is None else peak / size}
        if provider == FUSED:
            numbers |= _rates(of("count", FUSED), timed, found.get(("bandwidth", "", "")), case.floor(work) * size)
            numbers |= {"floor_per_P": case.floor(work)}
        yield from ((provider, metric, value) for metric, value in numbers.items())
    target = GPUS[gpu].target
    counted, executed, compiled = of("count", FUSED), of("execute", target), of("codegen", target)
    if counted and executed and compiled:
        for launch, predicted in predict(GPUS[gpu], counted["kernels"], executed, compiled).items():
            for metric, value in predicted.items():
                yield FUSED, f"predicted.{gpu}.{launch}.{metric}", value
    for (kind, name, target), launches in found.items():
        if kind == "codegen" and name == case.name:
            for launch, resources in launches.items():
                for metric, value in resources.items():
                    if metric in ("loads", "stores"):
                        value = widths({int(width): number for width, number in value.items()})
                    if metric not in ("target", "code"):
                        yield FUSED, f"{target}.{launch}.{metric}", value


def _counted(counted: Mapping[str, Any], size: int) -> Row:
    if not counted:
        return dict.fromkeys(COUNTS)
    if "graph_breaks" in counted:
        return {
            "other_launches": counted["kernels"],
            "bytes_per_P": counted["bytes"] / size,
            "graph_breaks": counted["graph_breaks"],
        }
    loads, stores = counted["bytes_loaded"] / size, counted["bytes_stored"] / size
    shares = {"loads_per_P": loads, "stores_per_P": stores, "bytes_per_P": loads + stores}
    ran = counted["programs_run"] / max(1, counted["programs"])
    return {name: counted[name] for name in COUNTS[:3]} | shares | {"programs_run": ran}


def _rates(counted: Row, timed: Row, ceiling: float | None, floor: float) -> Row:
    """How near the fused loss comes to copying what it moves, and the ``floor`` in bytes of what it must move."""
    rate = over_bytes = over_floor = None
    if timed:
        over_floor = timed["full_ms_p50"] * ceiling * 1e6 / floor if ceiling else None
        rate = (counted["bytes_loaded"] + counted["bytes_stored"]) / timed["full_ms_p50"] / 1e6 if counted else None
        over_bytes = ceiling / rate if rate and ceiling else None
    return {"gb_per_s": rate, "copy_gb_per_s": ceiling, "time_over_bytes": over_bytes, "time_over_floor": over_floor}


def index(found: Iterable[Row]) -> Index:
    """Values by loss/recipe, provider and metric."""
    return {("/".join(filter(None, (r["loss"], r["recipe"]))), r["provider"], r["metric"]): r["value"] for r in found}


def providers(values: Index, case: Case) -> list[str]:
    """Who computes a case: its peers first, ours last."""
    return list(dict.fromkeys(provider for name, provider, metric in values if name == case.name))


def launches(values: Index, case: Case, of: str) -> dict[str, dict[str, Any]]:
    """Values by metric of each launch of a case, in order, ``of`` a target or ``predicted.{gpu}``."""
    found: dict[str, dict[str, Any]] = {}
    for (name, _, metric), value in values.items():
        begin, _, rest = metric.partition(f"{of}.")
        if (name, begin) == (case.name, "") and rest:
            launch, _, metric = rest.partition(".")
            found.setdefault(launch, {})[metric] = value
    return found


def slower(values: Index, cases: Iterable[Case]) -> list[str]:
    """Where another provider takes less time than the fused loss, a sentence each."""
    found = []
    for case, mode in itertools.product(cases, MODES + GRAPHS):
        ours = values.get((case.name, FUSED, f"{mode}_ms_p50"))
        for provider in providers(values, case):
            theirs = values.get((case.name, provider, f"{mode}_ms_p50"))
            if ours and theirs and theirs < ours:
                found.append(f"{case.name}, {mode}: {ours:.3f} ms, {provider} {theirs:.3f} ms")
    return found


def write(
    out: Path, found: Sequence[Row], host: Mapping[str, Any], failures: Sequence[str], name: str = "bench"
) -> list[Path]:
    """Write ``{name}.json`` (this run), ``{name}.csv`` (this run's rows replace those with the same key, that is
    everything but the value) and, if tasks broke, what they had to say.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.json", out / f"{name}.csv", out / "failed.txt"]
    paths[0].write_text(json.dumps({"environment": host, "rows": list(found)}, indent=1) + "\n")
    if found:
        _merge(paths[1], found)
    paths[2].unlink(missing_ok=True)
    if failures:
        paths[2].write_text("\n".join(failures))
    return [path for path in paths if path.exists()]


def _merge(path: Path, found: Sequence[Row]) -> None:
    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple("" if value is None else str(value) for name, value in row.items() if name != "value")

    kept: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames == list(found[0]):
                kept = {key(row): row for row in reader}
    kept |= {key(row): {**row, "value": "?" if row["value"] is None else row["value"]} for row in found}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())
