"""Tables of what was measured. What was not is ``?``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.registry import CASES, Case, Workload
from fusedyolo.tools.terminal import PASSES, table

from .measure import COMPILE, EAGER, FUSED
from .peers import PEERS
from .rows import Index, Row, index, launches, providers, slower

LABELS = {EAGER: "eager", COMPILE: "torch.compile", FUSED: "fused"}


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


def print_parity(console: Console, parity: Mapping[str, Any], gpu: bool) -> None:
    """What the gate decided on."""
    where = "on this GPU" if gpu else "in Triton's interpreter"
    title = f"Errors against the reference in float64, kernels {where}"
    made, broken = table(title, ("loss", "provider"), ("loss", "gradient", "assigned", "")), []
    for name, found in parity.items():
        if found is None:
            made.add_row(name, "fused", "?", "?", "?", "[bold red]did not run[/]", end_section=True)
            continue
        broken += [f"[yellow]{name}, {provider}:[/] {escape(why)}" for provider, why in found["broken"].items()]
        others = [key.removesuffix("_loss_error") for key in found if key.endswith("_loss_error")]
        verdicts = {p: PASSES[p not in found["failed"]] for p in others if p not in ("truth", FUSED)}
        for provider, verdict in (verdicts | {EAGER: "", FUSED: PASSES[found["ok"]]}).items():
            errors = [text(found[f"{provider}_{metric}"], ".1e") for metric in ("loss_error", "grad_error")]
            case, assigned = (name, str(found["positives"])) if provider == FUSED else ("", "")
            row = case, LABELS.get(provider, provider), *errors, assigned, verdict
            made.add_row(*row, end_section=provider == FUSED)
    console.print(made, *broken, sep="\n", highlight=False)


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Cost, time, time predicted for ``gpu`` and compiled resources, and what is to be said of them."""
    values = index(found)
    for make in (_cost_table, _time_table, _codegen_table):
        console.print(make(values, cases))
    console.print(_predicted_table(values, cases, gpu))
    print_remarks(console, values, cases)


def print_remarks(console: Console, values: Index, cases: Sequence[Case]) -> None:
    """What counts of a peer do not say, and where another provider is faster."""
    for name in dict.fromkeys(provider for case in cases for provider in providers(values, case)):
        if name in PEERS and PEERS[name].note:
            console.print(f"{name}: {PEERS[name].note}", highlight=False)
    for sentence in slower(values, cases):
        console.print(f"[yellow]slower than another:[/] {sentence}", highlight=False)


def _lines(values: Index, cases: Sequence[Case]) -> Iterator[tuple[Case, str, list[str], Callable[[str], Any], bool]]:
    """A case, a provider of it, how the line of both begins, its values, and whether it is the case's last."""
    for case in cases:
        each = providers(values, case)
        for provider in each:

            def get(metric: str, key: tuple[str, str] = (case.name, provider)) -> Any:
                return values.get((*key, metric))

            begin = [case.name if provider == each[0] else "", LABELS.get(provider, provider)]
            yield case, provider, begin, get, provider == each[-1]


def _cost_table(values: Index, cases: Sequence[Case]) -> Table:
    made = table(
        "Forward + backward: launches (Triton + other), bytes, host waits; P = bytes of the predictions",
        ("loss", "provider"),
        ("launches", "loads/P", "stores/P", "bytes/P", "of floor", "waits"),
        "~: some programs of each kind stand for the others (--exact runs all). torch.compile: fused nodes and their "
        "bytes, as Inductor schedules them for a CPU.",
    )
    for case, provider, begin, get, last in _lines(values, cases):
        floor, moved = values.get((case.name, FUSED, "floor_per_P")), get("bytes_per_P")
        estimated = (get("programs_run") or 1) < 1
        launched = text(get("other_launches"))
        if provider == FUSED and launched != "?":
            launched = f"{get('triton_launches')} + {launched}"
        parts = (text(get(name), ".2f") for name in ("loads_per_P", "stores_per_P"))
        total = "~" * estimated + text(moved, ".2f" if estimated else ".3f")
        share = f"{moved / floor:.2f}x" if moved and floor else "?"
        made.add_row(*begin, launched, *parts, total, share, text(get("syncs")), end_section=last)
        if last and case.name not in CASES:
            made.add_row("", "fused", "planned", end_section=True)
    return made


TIMES = {  # by the head of a column: metrics, their format, what is put between them
    "fwd": (["forward_ms_p50"], ".3f", ""),
    "bwd": (["backward_ms_p50"], ".3f", ""),
    "full": (["full_ms_p20", "full_ms_p50", "full_ms_p80"], ".3f", " / "),
    "graph": (["full_graph_ms_p50"], ".3f", ""),
    "no grad": (["no_grad_ms_p50"], ".3f", ""),
    "GB/s": (["gb_per_s", "copy_gb_per_s"], ".0f", " of "),  # this and the next of the fused loss alone
    "x floor": (["time_over_floor"], ".2f", ""),
    "peak/P": (["peak_per_P"], ".2f", ""),
    "host us": (["host_us"], ".0f", ""),
    "cold s": (["cold_s"], ".1f", ""),
}


def _time_table(values: Index, cases: Sequence[Case]) -> Table:
    title = "Milliseconds p50 (full: p20 / p50 / p80), cold cache, graph: warm; ? without a GPU"
    made = table(title, ("loss", "provider"), tuple(TIMES))
    for case, provider, begin, get, last in _lines(values, cases):
        cells = []
        for metrics, form, between in TIMES.values():
            known = [text(get(metric), form) for metric in metrics if (case.name, provider, metric) in values]
            cells.append("?" if set(known) == {"?"} else between.join(known))
        made.add_row(*begin, *cells, end_section=last)
    return made


def _predicted_table(values: Index, cases: Sequence[Case], gpu: str) -> Table:
    made = table(
        f"Predicted for {gpu}, not measured: microseconds of forward + backward, by bytes and by instructions",
        ("loss", "launch"),
        ("programs", "memory", "issue", "predicted", "issue/memory", "longest/median", "longest"),
        "predicted: the longer of both, launch by launch. longest: the longest program's instructions over the "
        "median's; what it takes with a multiprocessor to itself. Latency, occupancy, caches and the host are not "
        "modelled.",
    )
    metrics = ("programs", "memory_us", "issue_us", "predicted_us", "longest_over_median", "longest_us")
    for case in cases:
        for number, (launch, found) in enumerate(launches(values, case, f"predicted.{gpu}").items()):
            programs, memory, issue, predicted, over, longest = (found[metric] for metric in metrics)
            row = [f"{memory:.1f}", f"{issue:.1f}", f"{predicted:.1f}", f"{issue / memory:.2f}", f"{over:.1f}"]
            row.append("" if launch == "step" else f"{longest:.1f}")
            style = "bold" if launch == "step" else ""
            made.add_row("" if number else case.name, launch, str(programs), *row, style=style)
        made.add_section()
    return made


def _codegen_table(values: Index, cases: Sequence[Case]) -> Table:
    made = table(
        "What the kernels compile to; loads and stores: instructions x bits",
        ("loss", "launch", "target"),
        ("regs", "stack", "spills", "instr", "loads", "stores"),
    )
    metrics = ("registers", "stack", "spills", "instructions", "loads", "stores")
    for case in cases:
        label, compiled = case.name, {target: launches(values, case, target) for target in TARGETS}
        for launch in dict.fromkeys(launch for each in compiled.values() for launch in each):
            for target in (target for target, each in compiled.items() if launch in each):
                made.add_row(label, launch, target, *(text(compiled[target][launch][metric]) for metric in metrics))
                label = ""
        made.add_section()
    return made
