"""Keyed rows of what was measured. What was not measured has no row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fusedyolo.tools.codegen import widths
from fusedyolo.tools.env import version
from fusedyolo.tools.registry import CASES, Case, Workload

from .measure import COMPILE, EAGER, FUSED
from .peers import PEERS
from .predict import GPUS, predict
from .session import Task

RESOURCES = ("registers", "stack", "spills", "scalar_spills", "instructions")

Row = dict[str, Any]
Values = dict[str, dict[str, dict[str, Any]]]
"""By ``loss/recipe``, provider and metric: peers first, ours last."""


def rows(results: Mapping[Task, Any], host: Mapping[str, Any], gpu: str = "H100") -> list[Row]:
    """One row a number, from the results of tasks.

    What is predicted for ``gpu``, one of :data:`bench.predict.GPUS`, has metrics ``predicted.{gpu}.{launch}.{metric}``.
    """
    found: list[Row] = []
    by_case: dict[tuple[str, Workload], dict[tuple[str, str], Any]] = {}
    for task, result in results.items():
        by_case.setdefault((task.case, task.work), {})[task.kind, task.provider] = result
    ceiling = next((result for task, result in results.items() if task.kind == "bandwidth"), None)
    versions = {name: host[name] for name in ("torch", "triton", "fusedyolo", "commit")}
    for (name, work), of in by_case.items():
        if not name:
            continue
        case, shared = CASES[name], {key: getattr(work, key) for key in ("batch", "size", "classes", "dtype")}
        shared |= {"layout": case.layout(work), "objects": work.objects, "form": work.form, "seed": work.seed}
        for provider, metrics in _metrics(case, of, work, gpu, ceiling):
            key = {"loss": case.loss, "recipe": case.recipe, "provider": provider}
            peer = f"{provider} {version(provider)}" if provider in PEERS else ""
            where = {"device": host["gpu"] or "cpu", "peer": peer, **versions}
            found += [{**key, "metric": name, "value": value, **shared, **where} for name, value in metrics.items()]
    return found


def _metrics(case: Case, of: Mapping, work: Workload, gpu: str, ceiling: float | None) -> Iterator[tuple[str, Row]]:
    """Provider and values by metric, from results by kind of task and provider."""
    size, floor = case.prediction_bytes(work), case.floor(work)
    for (kind, provider), result in of.items():
        if kind == "parity":
            for name, errors in result["errors"].items():
                yield name, dict(zip(("loss_error", "grad_error"), errors, strict=True))
        elif kind == "count":
            loads, stores = result["bytes_loaded"] / size, result["bytes_stored"] / size
            yield provider, {name: result[name] for name in ("triton_launches", "other_launches", "syncs")}
            yield provider, {"loads_per_P": loads, "stores_per_P": stores, "bytes_per_P": loads + stores}
            if result["programs"]:
                yield provider, {"programs_run": result["programs_run"] / result["programs"]}
        elif kind == "compile":
            scheduled = {"other_launches": result["kernels"], "bytes_per_P": result["bytes"] / size}
            yield provider, scheduled | {"graph_breaks": result["graph_breaks"]}
        elif kind == "time":
            times = {name: value for name, value in result.items() if name != "peak_bytes"}
            yield provider, times | {"peak_per_P": result["peak_bytes"] / size}
        elif kind == "codegen":
            for launch, resources in result.items():
                shown = {metric: resources[metric] for metric in RESOURCES}
                shown |= {metric: widths(resources[metric]) for metric in ("loads", "stores")}
                yield FUSED, {f"{provider}.{launch}.{metric}": value for metric, value in shown.items()}
    yield FUSED, {"floor_per_P": floor}
    if ceiling and ("time", FUSED) in of:  # how near copying what it moves, and what it must move
        milliseconds, counted = of["time", FUSED]["full_ms_p50"], of.get(("count", FUSED))
        if counted:
            yield FUSED, {"gb_per_s": (counted["bytes_loaded"] + counted["bytes_stored"]) / milliseconds / 1e6}
        yield FUSED, {"copy_gb_per_s": ceiling, "time_over_floor": milliseconds * ceiling * 1e6 / (floor * size)}
    target = GPUS[gpu].target
    counted, executed, compiled = (of.get(key) for key in (("count", FUSED), ("execute", target), ("codegen", target)))
    if counted and executed and compiled:
        for launch, predicted in predict(GPUS[gpu], counted["kernels"], executed, compiled).items():
            yield FUSED, {f"predicted.{gpu}.{launch}.{metric}": value for metric, value in predicted.items()}


def index(found: Iterable[Row]) -> Values:
    """The values of rows."""
    values: Values = {}
    for row in found:
        name = "/".join(filter(None, (row["loss"], row["recipe"])))
        values.setdefault(name, {}).setdefault(row["provider"], {})[row["metric"]] = row["value"]
    ours = (EAGER, COMPILE, FUSED)
    return {
        name: dict(sorted(each.items(), key=lambda item: ours.index(item[0]) if item[0] in ours else -1))
        for name, each in values.items()
    }


def launches(values: Values, case: Case, of: str) -> dict[str, dict[str, Any]]:
    """Values by metric of each launch of a case, in order, ``of`` a target or ``predicted.{gpu}``."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in values[case.name].get(FUSED, {}).items():
        if name.startswith(f"{of}."):
            launch, _, metric = name.removeprefix(f"{of}.").partition(".")
            found.setdefault(launch, {})[metric] = value
    return found


def slower(values: Values, cases: Iterable[Case]) -> list[str]:
    """Where another provider takes less time than the fused loss, a sentence each."""
    found = []
    for case in cases:
        times = {name: each["full_ms_p50"] for name, each in values[case.name].items() if "full_ms_p50" in each}
        ours = times.get(FUSED, 0.0)
        found += [f"{case.name}: {ours:.3f} ms, {name} {ms:.3f} ms" for name, ms in times.items() if ms < ours]
    return found
