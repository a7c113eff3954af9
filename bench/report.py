"""Tables of what was measured. What was not is ``?``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.registry import CASES, Case, Workload

from .measure import COMPILE, EAGER, FUSED
from .peers import PEERS
from .rows import Index, Row, index, providers, slower

LAUNCHES = ("overlap", "match", "loss", "rank", "grad")
LABELS = {EAGER: "eager", COMPILE: "torch.compile", FUSED: "fused"}


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


def text(value: Any, form: str = "") -> str:
    """``value`` in a format, ``?`` if there is none."""
    return "?" if value is None else format(value, form)


def print_parity(console: Console, parity: Mapping[str, Any], gpu: bool) -> None:
    """What the gate decided on."""
    where = "on this GPU" if gpu else "in Triton's interpreter"
    table = table_of(f"Errors against the reference in float64, kernels {where}")
    table.add_column("provider", no_wrap=True)
    for name in ("loss", "gradient", "assigned", ""):
        table.add_column(name, justify="right")
    for name, found in parity.items():
        if found is None:
            table.add_row(name, "fused", "?", "?", "?", "[bold red]did not run[/]", end_section=True)
            continue
        others = [key.removesuffix("_loss_error") for key in found if key.endswith("_loss_error")]
        for provider in [p for p in others if p not in ("truth", FUSED)] + [FUSED]:
            ok = found["ok"] if provider == FUSED else provider not in found["failed"]
            verdict = "" if provider == EAGER else "[green]passes[/]" if ok else "[bold red]FAILS[/]"
            table.add_row(
                name if provider == FUSED else "",
                LABELS.get(provider, provider),
                *(text(found[f"{provider}_{metric}"], ".1e") for metric in ("loss_error", "grad_error")),
                str(found["positives"]) if provider == FUSED else "",
                verdict,
                end_section=provider == FUSED,
            )
    console.print(table)
    for name, found in parity.items():
        for provider, why in (found or {}).get("broken", {}).items():
            console.print(f"[yellow]{name}, {provider}:[/] {escape(why)}", highlight=False)


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Cost, time, time predicted for ``gpu`` and compiled resources, and what is to be said of them."""
    values = index(found)
    tables = (
        _cost_table(values, cases),
        _time_table(values, cases),
        _predicted_table(values, cases, gpu),
        _codegen_table(values, cases),
    )
    console.print(*tables)
    print_remarks(console, values, cases)


def print_remarks(console: Console, values: Index, cases: Sequence[Case]) -> None:
    """What counts of a peer do not say, and where another provider is faster."""
    for name in dict.fromkeys(provider for case in cases for provider in providers(values, case)):
        if name in PEERS and PEERS[name].note:
            console.print(f"{name}: {PEERS[name].note}", highlight=False)
    for sentence in slower(values, cases):
        console.print(f"[yellow]slower than another:[/] {sentence}", highlight=False)


def table_of(title: str) -> Table:
    """A table of losses."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("loss", no_wrap=True)
    return table


def _getter(values: Index, case: Case, provider: str) -> Callable[..., str]:
    return lambda metric, form="": text(values.get((case.name, provider, metric)), form)


def _cost_table(values: Index, cases: Sequence[Case]) -> Table:
    table = table_of("Forward + backward: launches (Triton + other), bytes, host waits; P = bytes of the predictions")
    table.caption = (
        "~: some programs of each kind stand for the others (--exact runs all). torch.compile: fused nodes and their "
        "bytes, as Inductor schedules them for a CPU."
    )
    table.caption_justify = "left"
    table.add_column("provider", no_wrap=True)
    for name in ("launches", "loads/P", "stores/P", "bytes/P", "of floor", "waits"):
        table.add_column(name, justify="right")
    for case in cases:
        floor = values.get((case.name, FUSED, "floor_per_P"))
        each = providers(values, case)
        for provider in each:
            get = _getter(values, case, provider)
            estimated = (values.get((case.name, provider, "programs_run")) or 1) < 1
            moved = values.get((case.name, provider, "bytes_per_P"))
            launches = get("other_launches")
            if provider == FUSED:
                launches = "?" if launches == "?" else f"{get('triton_launches')} + {launches}"
            waits = "?" if provider == COMPILE else get("syncs")
            table.add_row(
                case.name if provider == each[0] else "",
                LABELS.get(provider, provider),
                launches,
                get("loads_per_P", ".2f"),
                get("stores_per_P", ".2f"),
                "~" * estimated + get("bytes_per_P", ".2f" if estimated else ".3f"),
                f"{moved / floor:.2f}x" if moved and floor else "?",
                waits,
                end_section=provider == each[-1] and case.name in CASES,
            )
        if case.name not in CASES:
            table.add_row("", "fused", "planned", end_section=True)
    return table


def _time_table(values: Index, cases: Sequence[Case]) -> Table:
    table = table_of("Milliseconds p50 (full: p20 / p50 / p80), cold cache, graph: warm; ? without a GPU")
    table.add_column("provider", no_wrap=True)
    for name in ("fwd", "bwd", "full", "graph", "no grad", "GB/s", "x floor", "peak/P", "host us", "cold s"):
        table.add_column(name, justify="right")
    for case in cases:
        each = providers(values, case)
        for provider in each:
            get = _getter(values, case, provider)
            full = [get(f"full_ms_p{q}", ".3f") for q in (20, 50, 80)]
            rate = [get("gb_per_s", ".0f"), get("copy_gb_per_s", ".0f")]
            table.add_row(
                case.name if provider == each[0] else "",
                LABELS.get(provider, provider),
                get("forward_ms_p50", ".3f"),
                get("backward_ms_p50", ".3f"),
                "?" if full[1] == "?" else " / ".join(full),
                get("full_graph_ms_p50", ".3f"),
                get("no_grad_ms_p50", ".3f"),
                "" if provider != FUSED else "?" if rate[0] == "?" else " of ".join(rate),
                get("time_over_floor", ".2f") if provider == FUSED else "",
                get("peak_per_P", ".2f"),
                get("host_us", ".0f"),
                get("cold_s", ".1f"),
                end_section=provider == each[-1],
            )
    return table


def _predicted_table(values: Index, cases: Sequence[Case], gpu: str) -> Table:
    table = table_of(
        f"Predicted for {gpu}, not measured: microseconds of forward + backward, by bytes and by instructions"
    )
    table.caption = (
        "predicted: the longer of both, launch by launch. longest: the longest program's instructions over the "
        "median's; what it takes with a multiprocessor to itself. Latency, occupancy, caches and the host are not "
        "modelled."
    )
    table.caption_justify = "left"
    table.add_column("launch")
    for name in ("programs", "memory", "issue", "predicted", "issue/memory", "longest/median", "longest"):
        table.add_column(name, justify="right")
    for case in cases:
        label = case.name
        for launch in (*LAUNCHES, "step"):
            prefix = f"predicted.{gpu}.{launch}"
            get = _getter(values, case, FUSED)
            memory, issue = (values.get((case.name, FUSED, f"{prefix}.{name}_us")) for name in ("memory", "issue"))
            if memory is None or issue is None:
                continue
            table.add_row(
                label,
                launch,
                get(f"{prefix}.programs"),
                f"{memory:.1f}",
                f"{issue:.1f}",
                get(f"{prefix}.predicted_us", ".1f"),
                f"{issue / memory:.2f}",
                get(f"{prefix}.longest_over_median", ".1f"),
                get(f"{prefix}.longest_us", ".1f") if launch != "step" else "",
                style="bold" if launch == "step" else "",
            )
            label = ""
        table.add_section()
    return table


def _codegen_table(values: Index, cases: Sequence[Case]) -> Table:
    table = table_of("What the kernels compile to; loads and stores: instructions x bits")
    table.add_column("launch")
    table.add_column("target", no_wrap=True)
    for name in ("regs", "stack", "spills", "instr"):
        table.add_column(name, justify="right")
    table.add_column("loads")
    table.add_column("stores")
    metrics = ("registers", "stack", "spills", "instructions", "loads", "stores")
    for case in cases:
        label = case.name
        for mode in LAUNCHES:
            for target in TARGETS:
                each = [values.get((case.name, FUSED, f"{target}.{mode}.{metric}")) for metric in metrics]
                if each[0] is not None:
                    table.add_row(label, mode, target, *map(text, each))
                    label = ""
        table.add_section()
    return table
