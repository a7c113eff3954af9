"""Tables of what was measured. What was not is ``?``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    table = _table(f"Errors against the reference in float64, kernels {where}", ("loss", "provider"),
                   ("loss", "gradient", "assigned", ""))  # fmt: skip
    broken = []
    for name, found in parity.items():
        if found is None:
            table.add_row(name, "fused", "?", "?", "?", "[bold red]did not run[/]", end_section=True)
            continue
        broken += [f"[yellow]{name}, {provider}:[/] {escape(why)}" for provider, why in found["broken"].items()]
        others = [key.removesuffix("_loss_error") for key in found if key.endswith("_loss_error")]
        for provider in [p for p in others if p not in ("truth", FUSED)] + [FUSED]:
            ours = provider == FUSED
            ok = found["ok"] if ours else provider not in found["failed"]
            errors = [text(found[f"{provider}_{metric}"], ".1e") for metric in ("loss_error", "grad_error")]
            verdict = "" if provider == EAGER else "[green]passes[/]" if ok else "[bold red]FAILS[/]"
            row = (
                name if ours else "",
                LABELS.get(provider, provider),
                *errors,
                str(found["positives"]) if ours else "",
            )
            table.add_row(*row, verdict, end_section=ours)
    console.print(table, *broken, sep="\n", highlight=False)


def print_tables(console: Console, found: Sequence[Row], cases: Sequence[Case], gpu: str) -> None:
    """Cost, time, time predicted for ``gpu`` and compiled resources, and what is to be said of them."""
    values = index(found)
    for table in (_cost_table, _time_table, _codegen_table):
        console.print(table(values, cases))
    console.print(_predicted_table(values, cases, gpu))
    print_remarks(console, values, cases)


def print_remarks(console: Console, values: Index, cases: Sequence[Case]) -> None:
    """What counts of a peer do not say, and where another provider is faster."""
    for name in dict.fromkeys(provider for case in cases for provider in providers(values, case)):
        if name in PEERS and PEERS[name].note:
            console.print(f"{name}: {PEERS[name].note}", highlight=False)
    for sentence in slower(values, cases):
        console.print(f"[yellow]slower than another:[/] {sentence}", highlight=False)


def _table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str = "") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption, table.caption_justify = caption, "left"
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _lines(values: Index, cases: Sequence[Case]) -> Iterator[tuple[Case, str, list[str], Callable[..., str], bool]]:
    """A case, a provider of it, how the line of both begins, its values as text, and whether it is the case's last."""
    for case in cases:
        each = providers(values, case)
        for provider in each:

            def get(metric: str, form: str = "", key: tuple[str, str] = (case.name, provider)) -> str:
                return text(values.get((*key, metric)), form)

            begin = [case.name if provider == each[0] else "", LABELS.get(provider, provider)]
            yield case, provider, begin, get, provider == each[-1]


def _cost_table(values: Index, cases: Sequence[Case]) -> Table:
    table = _table(
        "Forward + backward: launches (Triton + other), bytes, host waits; P = bytes of the predictions",
        ("loss", "provider"),
        ("launches", "loads/P", "stores/P", "bytes/P", "of floor", "waits"),
        "~: some programs of each kind stand for the others (--exact runs all). torch.compile: fused nodes and their "
        "bytes, as Inductor schedules them for a CPU.",
    )
    for case, provider, begin, get, last in _lines(values, cases):
        floor = values.get((case.name, FUSED, "floor_per_P"))
        moved = values.get((case.name, provider, "bytes_per_P"))
        estimated = (values.get((case.name, provider, "programs_run")) or 1) < 1
        launches = get("other_launches")
        if provider == FUSED and launches != "?":
            launches = f"{get('triton_launches')} + {launches}"
        parts = (get("loads_per_P", ".2f"), get("stores_per_P", ".2f"))
        total = "~" * estimated + text(moved, ".2f" if estimated else ".3f")
        share = f"{moved / floor:.2f}x" if moved and floor else "?"
        table.add_row(*begin, launches, *parts, total, share, get("syncs"), end_section=last)
        if last and case.name not in CASES:
            table.add_row("", "fused", "planned", end_section=True)
    return table


def _time_table(values: Index, cases: Sequence[Case]) -> Table:
    table = _table(
        "Milliseconds p50 (full: p20 / p50 / p80), cold cache, graph: warm; ? without a GPU",
        ("loss", "provider"),
        ("fwd", "bwd", "full", "graph", "no grad", "GB/s", "x floor", "peak/P", "host us", "cold s"),
    )
    for _, provider, begin, get, last in _lines(values, cases):
        full = " / ".join(get(f"full_ms_p{q}", ".3f") for q in (20, 50, 80))
        bandwidth = f"{get('gb_per_s', '.0f')} of {get('copy_gb_per_s', '.0f')}".replace("? of ?", "?")
        rates = [bandwidth, get("time_over_floor", ".2f")]
        table.add_row(
            *begin,
            *(get(f"{mode}_ms_p50", ".3f") for mode in ("forward", "backward")),
            full.replace("? / ? / ?", "?"),
            *(get(f"{mode}_ms_p50", ".3f") for mode in ("full_graph", "no_grad")),
            *(rates if provider == FUSED else ("", "")),
            *(get(metric, form) for metric, form in (("peak_per_P", ".2f"), ("host_us", ".0f"), ("cold_s", ".1f"))),
            end_section=last,
        )
    return table


def _predicted_table(values: Index, cases: Sequence[Case], gpu: str) -> Table:
    table = _table(
        f"Predicted for {gpu}, not measured: microseconds of forward + backward, by bytes and by instructions",
        ("loss", "launch"),
        ("programs", "memory", "issue", "predicted", "issue/memory", "longest/median", "longest"),
        "predicted: the longer of both, launch by launch. longest: the longest program's instructions over the "
        "median's; what it takes with a multiprocessor to itself. Latency, occupancy, caches and the host are not "
        "modelled.",
    )
    metrics = ("programs", "memory_us", "issue_us", "predicted_us", "longest_over_median", "longest_us")
    for case in cases:
        label = case.name
        for launch in (*LAUNCHES, "step"):
            each = [values.get((case.name, FUSED, f"predicted.{gpu}.{launch}.{metric}")) for metric in metrics]
            if None in each:
                continue
            programs, memory, issue, predicted, over, longest = each
            row = [f"{memory:.1f}", f"{issue:.1f}", f"{predicted:.1f}", f"{issue / memory:.2f}", f"{over:.1f}"]
            row.append("" if launch == "step" else f"{longest:.1f}")
            table.add_row(label, launch, str(programs), *row, style="bold" if launch == "step" else "")
            label = ""
        table.add_section()
    return table


def _codegen_table(values: Index, cases: Sequence[Case]) -> Table:
    table = _table(
        "What the kernels compile to; loads and stores: instructions x bits",
        ("loss", "launch", "target"),
        ("regs", "stack", "spills", "instr", "loads", "stores"),
    )
    metrics = ("registers", "stack", "spills", "instructions", "loads", "stores")
    for case in cases:
        label = case.name
        for launch in LAUNCHES:
            for target in TARGETS:
                each = [values.get((case.name, FUSED, f"{target}.{launch}.{metric}")) for metric in metrics]
                if each[0] is not None:
                    table.add_row(label, launch, target, *map(text, each))
                    label = ""
        table.add_section()
    return table
