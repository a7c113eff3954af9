"""Tables of what was measured. What was not is ``?``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.registry import Case, Workload
from fusedyolo.tools.terminal import table

from .measure import FULL
from .peers import PEERS
from .rows import Row, Values, index, launches, slower

Cells = Callable[[Mapping[str, Any]], Sequence[str]]


def headline(work: Workload, host: Mapping[str, Any]) -> str:
    """What is about to be measured, and on what."""
    gpu = host["gpu"] or "no GPU: kernels run in Triton's interpreter, times are ?"
    targets = work.targets()
    number = len(targets.rows if work.form == "Targets" else targets)
    return (
        f"fusedyolo {host['fusedyolo']} ({host['commit']}), torch {host['torch']}, triton {host['triton']}\n{gpu}\n"
        f"batch {work.batch}, {work.size} px, {work.classes} classes, {work.dtype}, "
        f"{number} objects ({work.objects}, {work.form})"
    )


def text(value: Any, form: str = "") -> str:
    """``value`` in a format, ``?`` if there is none."""
    return "?" if value is None else format(value, form)


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Cost, time, compiled resources and time predicted for ``gpu``, and what is to be said of them."""
    values = index(found)
    cases = [case for case in cases if case.name in values]
    for make in (_cost_table, _time_table, _codegen_table):
        console.print(make(values, cases))
    console.print(_predicted_table(values, cases, gpu))
    print_remarks(console, values, cases)


def print_remarks(console: Console, values: Values, cases: Sequence[Case]) -> None:
    """What counts of a peer do not say, and where another provider is faster."""
    for name in dict.fromkeys(provider for case in cases for provider in values[case.name]):
        if name in PEERS and PEERS[name].note:
            console.print(f"{name}: {PEERS[name].note}", highlight=False)
    for sentence in slower(values, cases):
        console.print(f"[yellow]slower than another:[/] {sentence}", highlight=False)


def _by_provider(made: Table, values: Values, cases: Sequence[Case], cells: Cells) -> Table:
    """A line for each provider of each case, of its values by metric."""
    for case in cases:
        for number, (provider, found) in enumerate(values[case.name].items()):
            made.add_row("" if number else case.name, provider, *cells(found))
        made.add_section()
    return made


def _cost_table(values: Values, cases: Sequence[Case]) -> Table:
    made = table(
        "Forward + backward: launches (Triton + other), bytes, host waits; P = bytes of the predictions",
        ("loss", "provider"),
        ("launches", "loads/P", "stores/P", "bytes/P", "of floor", "waits"),
        "~: some programs of each kind stand for the others (--exact runs all). compile: fused nodes and their bytes, "
        "as Inductor schedules them for a CPU.",
    )

    def cells(found: Mapping[str, Any]) -> Sequence[str]:
        launched = f"{found['triton_launches']} + " if found.get("triton_launches") else ""
        estimated, moved, floor = found.get("programs_run", 1) < 1, found.get("bytes_per_P"), found.get("floor_per_P")
        return (
            launched + text(found.get("other_launches")),
            text(found.get("loads_per_P"), ".2f"),
            text(found.get("stores_per_P"), ".2f"),
            "~" * estimated + text(moved, ".2f" if estimated else ".3f"),
            f"{moved / floor:.2f}x" if moved and floor else "",
            text(found.get("syncs")),
        )

    return _by_provider(made, values, cases, cells)


def _time_table(values: Values, cases: Sequence[Case]) -> Table:
    made = table(
        "Milliseconds of forward + backward, cold cache (graph: replayed, warm); ? without a GPU",
        ("loss", "provider"),
        ("p20 / p50 / p80", "forward", "GPU busy", "graph", "GB/s", "of a copy's", "x floor", "peak/P", "host us"),
    )

    def cells(found: Mapping[str, Any]) -> Sequence[str]:
        ours = ("graph_ms_p50", ".3f"), ("gb_per_s", ".0f"), ("copy_gb_per_s", ".0f"), ("time_over_floor", ".2f")
        return (
            " / ".join(f"{found[metric]:.3f}" for metric in FULL) if FULL[0] in found else "?",
            text(found.get("forward_ms_p50"), ".3f"),
            text(found.get("busy_ms"), ".3f"),
            *(text(found.get(metric), form) if "floor_per_P" in found else "" for metric, form in ours),
            text(found.get("peak_per_P"), ".2f"),
            text(found.get("host_us"), ".0f"),
        )

    return _by_provider(made, values, cases, cells)


def _predicted_table(values: Values, cases: Sequence[Case], gpu: str) -> Table:
    made = table(
        f"Predicted for {gpu}, not measured: microseconds of forward + backward, by bytes and by instructions",
        ("loss", "launch"),
        ("programs", "memory", "issue", "predicted", "issue/memory", "longest/median", "longest"),
        "predicted: the longer of both, launch by launch. longest: the longest program's instructions over the "
        "median's; what it takes with a multiprocessor to itself. Latency, occupancy, caches and the host are not "
        "modelled.",
    )
    for case in cases:
        for number, (launch, found) in enumerate(launches(values, case, f"predicted.{gpu}").items()):
            row = [str(found["programs"])]
            row += [f"{found[metric]:.1f}" for metric in ("memory_us", "issue_us", "predicted_us")]
            row += [f"{found['issue_us'] / found['memory_us']:.2f}", f"{found['longest_over_median']:.1f}"]
            step = launch == "step"
            row.append("" if step else f"{found['longest_us']:.1f}")
            made.add_row("" if number else case.name, launch, *row, style="bold" if step else "")
        made.add_section()
    return made


def _codegen_table(values: Values, cases: Sequence[Case]) -> Table:
    metrics = {"registers": "regs", "stack": "stack", "spills": "spills", "instructions": "instr"}
    metrics |= {"loads": "loads", "stores": "stores"}
    title = "What the kernels compile to; loads and stores: instructions x bits"
    made = table(title, ("loss", "target", "launch"), tuple(metrics.values()))
    for case in cases:
        label = case.name
        for target in TARGETS:
            for launch, found in launches(values, case, target).items():
                made.add_row(label, target, launch, *(str(found[metric]) for metric in metrics))
                label = ""
        made.add_section()
    return made
