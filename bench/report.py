"""Tables of what was measured. What was not is ``?``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.registry import Case, Workload
from fusedyolo.tools.terminal import table

from .measure import FULL
from .peers import PEERS
from .rows import Row, index, launches, slower

# Formats of metrics, which are called as in the CSV.
COST = {"triton_launches": "", "other_launches": "", "loads_per_P": ".2f", "stores_per_P": ".2f", "bytes_per_P": ".3f"}
COST |= {"floor_per_P": ".2f", "programs_run": ".0%", "syncs": ""}
TIME = dict.fromkeys((*FULL, "forward_ms_p50", "busy_ms", "graph_ms_p50"), ".3f")
TIME |= {"gb_per_s": ".0f", "copy_gb_per_s": ".0f", "time_over_floor": ".2f", "peak_per_P": ".2f", "host_us": ".0f"}
CODEGEN = dict.fromkeys(("registers", "stack", "spills", "instructions", "loads", "stores"), "")
PREDICTED = {"programs": "", "memory_us": ".1f", "issue_us": ".1f", "places_us": ".1f", "chain_us": ".1f"}
PREDICTED |= {"predicted_us": ".1f", "longest_over_median": ".1f"}


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


def beside(peers: Iterable[str]) -> str:
    """Whose losses are measured with ours, so that one that is missing is not missed without a word."""
    names = ", ".join(dict.fromkeys(peers))
    return "beside " + (names or "the reference alone: no library whose loss is replaced is installed")


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Cost, time, compiled resources and time predicted for ``gpu``, what counts of peers do not say, and where
    another provider is faster than the fused loss.
    """
    values = index(found)
    cases = [case for case in cases if case.name in values]
    by_provider = [((case.name, who), each) for case in cases for who, each in values[case.name].items()]

    def by_launch(*targets: str) -> list[tuple[tuple[str, ...], Mapping[str, Any]]]:
        of = [(case, target) for case in cases for target in targets]
        return [((c.name, t, name), each) for c, t in of for name, each in launches(values, c, t).items()]

    cost = (
        "Forward + backward: launches, bytes, host waits; P = bytes of the predictions",
        "programs_run: where not all are, some stand for the others, and bytes are an estimate (--exact runs all). "
        "compile: fused nodes and their bytes, as Inductor schedules them for a CPU.",
    )
    predicted = (
        f"Predicted for {gpu}, not measured: microseconds of forward + backward, by bytes, instructions and chains",
        "places: programs have those of all multiprocessors in turn. chain: the longest, of a program's instructions "
        "that wait for one another. predicted: the longest of the others, the chain and 1 us. longest over median: of "
        "the programs' instructions. The host is left out.",
    )
    time = "Milliseconds of forward + backward, cold cache (graph: replayed, warm); ? without a GPU"
    codegen = "What the kernels compile to; loads and stores: instructions x bits"
    for made in (
        _table(*cost, ("loss", "provider"), COST, by_provider),
        _table(time, "", ("loss", "provider"), TIME, by_provider),
        _table(codegen, "", ("loss", "target", "launch"), CODEGEN, by_launch(*TARGETS)),
        _table(*predicted, ("loss", "of", "launch"), PREDICTED, by_launch(f"predicted.{gpu}")),
    ):
        console.print(made)
    for name in dict.fromkeys(provider for case in cases for provider in values[case.name]):
        if name in PEERS and PEERS[name].note:
            console.print(f"{name}: {PEERS[name].note}", highlight=False)
    for sentence in slower(values, cases):
        console.print(f"[yellow]slower than another:[/] {sentence}", highlight=False)


def _table(
    title: str,
    caption: str,
    names: Sequence[str],
    formats: Mapping[str, str],
    lines: Iterable[tuple[tuple[str, ...], Mapping[str, Any]]],
) -> Table:
    """A line of metrics for each of ``lines``: its names, that of a loss first, and its values."""
    made = table(title, names, [metric.replace("_per_", "/").replace("_", " ") for metric in formats], caption)
    last = ""
    for (loss, *more), found in lines:
        if loss != last and last:
            made.add_section()
        shown = [format(found[metric], form) if metric in found else "?" for metric, form in formats.items()]
        made.add_row("" if loss == last else loss, *more, *shown, style="bold" if more[-1] == "step" else "")
        last = loss
    return made
