"""Compare every loss and its gradient with the reference in float64 on this machine; exit status 1 if one differs.

On a GPU the kernels run there, elsewhere in Triton's interpreter, which takes under a minute. With ``--compiled`` they
are compiled for GPUs that need not be here and executed by ``fusedyolo.emulator``, with ``select`` and the functional
losses: seconds each, more where they have not been compiled before.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from . import compiled, interpreter
from .compiled import SMALL, Found, Settings
from .env import kernels_digest, version
from .parity import parity, parity_table
from .registry import CASES, RefusedError, Workload, choose, select
from .terminal import PASSES, asked, table


def run(options: argparse.Namespace) -> int:
    """Compare, and print a table: 0 if all pass, 1 if not."""
    console, dtypes = Console(), options.dtype or ["float32"]
    if options.compiled:
        return _run_compiled(options, dtypes, console)
    for name in ("arch", "seeds", "fusion", "noise", "fine", "markdown"):
        if getattr(options, name):
            raise RefusedError(f"--{name}: wants --compiled")
    wanted, gpu = list(itertools.product(select(options.loss), dtypes)), torch.cuda.is_available()
    if not gpu:
        try:
            interpreter.prepare()
        except ImportError:
            raise RefusedError("Triton is not installed: there is nothing to compare the reference with") from None
    found = {
        f"{case.name} {dtype}": parity(case, Workload(dtype=dtype), "cuda" if gpu else "cpu")
        for case, dtype in track(wanted, "checking", console=console, transient=True)
    }
    console.print(
        parity_table(f"on {torch.cuda.get_device_name()}" if gpu else "in Triton's interpreter", found), highlight=False
    )
    failed = [name for name, result in found.items() if result["failed"]]
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(found)} differ from the reference:[/] {', '.join(failed)}")
    return int(bool(failed))


# --------------------------------------------------------------------------------------------------------- compiled

BEGIN, END = "<!-- written by fusedyolo check --compiled -->", "<!-- until here -->"
PLACE = re.compile(f"({BEGIN}\n).*?({END})", re.DOTALL)  # of the table in a file
LINES = 8  # of what is wrong with a case
COLUMNS: dict[str, Callable[[Found], str]] = {
    "error": lambda found: f"{found.error:.1e}",
    "eager's": lambda found: f"{found.eager:.1e}",
    "bits": lambda found: {None: "not compared", True: "same", False: "OTHER"}[found.same],
    "faults": lambda found: str(sum(found.faults.values())),
    "unwritten bytes": lambda found: f"{found.unwritten:,}",
    "programs": lambda found: f"{found.programs:,}",
    "warp instructions": lambda found: f"{found.instructions:,}",
}

Results = Mapping[tuple[str, str, str], Found]
"""By case, type and architecture."""


def _run_compiled(options: argparse.Namespace, dtypes: Sequence[str], console: Console) -> int:
    settings = Settings(
        seeds=options.seeds or 2, fusion=options.fusion or "as-shipped", noise=options.noise, fine=options.fine
    )
    cases = choose(options.loss, compiled.cases())
    with asked():
        page = options.markdown.read_text() if options.markdown else ""
    if options.markdown and not PLACE.search(page):
        raise RefusedError(f"--markdown: {options.markdown} has no line {BEGIN}, or no line {END} after it")
    compiled.ready()
    wanted = list(itertools.product(cases.items(), dtypes, options.arch or [90]))
    results = {}
    for (name, case), dtype, arch in track(wanted, "executing", console=console, transient=True):
        try:
            found = compiled.compare(case(replace(SMALL, dtype=dtype)), settings._replace(arch=arch))
        except Exception as error:  # what a compiler may raise is not known; the others are still checked
            found = Found(wrong=[f"{type(error).__name__}: {error}".splitlines()[0]])
        results[name, dtype, f"sm_{arch}"] = found
    _print(console, results, settings)
    if options.markdown:
        lines = "".join(f"{line}\n" for line in _markdown(results, settings))
        options.markdown.write_text(PLACE.sub(lambda place: place[1] + lines + place[2], page))
    return int(any(found.wrong for found in results.values()))


def _cells(found: Found) -> list[str]:
    """One for each of :data:`COLUMNS`; ``?`` where it did not run."""
    return [cell(found) if found.programs else "?" for cell in COLUMNS.values()]


def _print(console: Console, results: Results, settings: Settings) -> None:
    """The table, and below it why cases fail."""
    title = f"Compiled kernels, executed, against the reference in float64; {_how(settings)}"
    made, said = table(title, ("case", "dtype", "arch"), (*COLUMNS, "")), []
    for names, found in results.items():
        made.add_row(*names, *_cells(found), PASSES[not found.wrong])
        if found.wrong:
            more = len(found.wrong) - LINES
            said += [f"[red]{' '.join(names)}:", *(f"    {escape(why)}" for why in found.wrong[:LINES])]
            said += [f"    and {more} more"] * (more > 0)
    failed = sum(bool(found.wrong) for found in results.values())
    said += [f"[bold red]{failed} of {len(results)} fail"] * (failed > 0)
    console.print(made, *said, sep="\n", highlight=False)


def _markdown(results: Results, settings: Settings) -> list[str]:
    """The lines of a table, a row for each case and type; where architectures differ, a cell has all their values."""
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for (name, dtype, _), found in results.items():
        rows.setdefault((name, dtype), []).append(_cells(found))
    archs = " / ".join(dict.fromkeys(arch for *_, arch in results))
    passed = sum(not found.wrong for found in results.values())
    versions = ", ".join(f"{name} {version(name)}" for name in ("fusedyolo", "torch", "triton"))
    larger = dict.fromkeys(f" ({case.loss}: {case.images})" for case in CASES.values() if case.images > SMALL.batch)
    lines = [
        f"{passed} of {len(results)} pass. {archs}; {_how(settings)}. {versions}, kernels {kernels_digest()}. "
        f"Batch {SMALL.batch}{''.join(larger)}, {SMALL.size} px, {SMALL.classes} classes.",
        "",
        "| " + " | ".join(["case", "dtype", *COLUMNS]) + " |",
        "|" + "---|" * 2 + "---:|" * len(COLUMNS),
    ]
    for names, each in rows.items():
        cells = [" / ".join(dict.fromkeys(values)) for values in zip(*each, strict=True)]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    return lines


def _how(settings: Settings) -> str:
    """How kernels were run, in words."""
    words = [f"{settings.seeds} seed" + "s" * (settings.seeds > 1), f"fusion {settings.fusion}"]
    return ", ".join(words + ["noise"] * settings.noise + ["fine"] * settings.fine)
