"""Compare every loss and its gradient with the reference in float64 on this machine; exit status 1 if one differs.

On a GPU the kernels run there, elsewhere in Triton's interpreter, which takes under a minute. With ``--compiled`` they
are compiled for GPUs that need not be here and executed by ``fusedyolo.emulator``, with ``select`` and the functional
losses: seconds each, more where they have not been compiled before.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track

from . import compiled, interpreter
from .compiled import SMALL, Found, Settings
from .env import kernels_digest, version
from .registry import CASES, Case, RefusedError, Workload, choose, select
from .terminal import PASSES, table

TITLE = "against the reference in float64"
ERRORS = ("fused_loss_error", "eager_loss_error", "fused_grad_error", "eager_grad_error")


def run(options: argparse.Namespace) -> int:
    """Compare, and print a table: 0 if all pass, 1 if not."""
    console, dtypes = Console(), options.dtype or ["float32"]
    if options.compiled:
        return _run_compiled(options, dtypes, console)
    for name in ("arch", "seeds", "fusion", "noise", "fine", "markdown"):
        if getattr(options, name):
            raise RefusedError(f"--{name}: wants --compiled")
    cases, gpu = select(options.loss), torch.cuda.is_available()
    if not gpu:
        try:
            interpreter.prepare()
        except ImportError:
            raise RefusedError(
                "Triton is not installed: the reference runs, and there is nothing to compare it with"
            ) from None
    device = torch.cuda.get_device_name() if gpu else "Triton's interpreter"
    title = f"Errors {TITLE}, relative to the largest entry; kernels on {device}"
    made, said, failed = (
        table(title, ("loss", "dtype"), ("loss error", "eager's", "gradient error", "eager's", "")),
        [],
        [],
    )
    work = [(case, dtype) for case in cases for dtype in dtypes]
    for case, dtype in track(work, "checking", console=console, transient=True):
        found = _compared(case, Workload(dtype=dtype), "cuda" if gpu else "cpu")
        errors = [f"{found[key]:.1e}" if key in found else "?" for key in ERRORS]
        made.add_row(case.name, dtype, *errors, PASSES[found["ok"]])
        if not found["ok"]:
            failed.append(f"{case.name} {dtype}")
        if "error" in found:
            said.append(f"[red]{case.name} {dtype}:[/] {escape(found['error'])}")
    if failed:
        said.append(f"[bold red]{len(failed)} of {len(work)} differ from the reference:[/] {', '.join(failed)}")
    console.print(made, *said, sep="\n", highlight=False)
    return int(bool(failed))


def _compared(case: Case, work: Workload, device: str) -> dict[str, Any]:
    from .parity import parity

    try:
        return parity(case, work, device)
    except Exception as error:  # what a kernel or a compiler may raise is not known; the others are still checked
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


# --------------------------------------------------------------------------------------------------------- compiled

BEGIN, END = "<!-- written by fusedyolo check --compiled -->", "<!-- until here -->"
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


class Result(NamedTuple):
    """What was found of a case in one type, compiled for one architecture."""

    name: str
    dtype: str
    arch: int
    found: Found

    @property
    def cells(self) -> list[str]:
        """One for each of :data:`COLUMNS`; ``?`` where it did not run."""
        return [cell(self.found) if self.found.programs else "?" for cell in COLUMNS.values()]


def _run_compiled(options: argparse.Namespace, dtypes: Sequence[str], console: Console) -> int:
    settings = Settings(
        seeds=options.seeds or 2, fusion=options.fusion or "as-shipped", noise=options.noise, fine=options.fine
    )
    cases = choose(options.loss, compiled.cases())
    if options.markdown:
        _accepts(options.markdown)
    compiled.ready()
    wanted = list(itertools.product(cases.items(), dtypes, options.arch or [90]))
    results = []
    for (name, case), dtype, arch in track(wanted, "executing", console=console, transient=True):
        try:
            found = compiled.compare(case(replace(SMALL, dtype=dtype)), replace(settings, arch=arch))
        except Exception as error:  # as above
            found = Found(wrong=[f"{type(error).__name__}: {error}".splitlines()[0]])
        results.append(Result(name, dtype, arch, found))
    _print(console, results, settings)
    if options.markdown:
        _write(options.markdown, results, settings)
    return int(any(result.found.wrong for result in results))


def _print(console: Console, results: Sequence[Result], settings: Settings) -> None:
    """The table, and below it why cases fail."""
    made = table(f"Compiled kernels, executed, {TITLE}; {_how(settings)}", ("case", "dtype", "arch"), (*COLUMNS, ""))
    said = []
    for name, dtype, arch, found in results:
        cells = Result(name, dtype, arch, found).cells
        made.add_row(name, dtype, f"sm_{arch}", *cells, PASSES[not found.wrong])
        if found.wrong:
            more = len(found.wrong) - LINES
            said += [f"[red]{name} {dtype} sm_{arch}:", *(f"    {escape(why)}" for why in found.wrong[:LINES])]
            said += [f"    and {more} more"] * (more > 0)
    failed = sum(bool(result.found.wrong) for result in results)
    said += [f"[bold red]{failed} of {len(results)} fail"] * (failed > 0)
    console.print(made, *said, sep="\n", highlight=False)


def _accepts(path: Path) -> None:
    """Raises:
    RefusedError: :func:`_write` would have no place in this file.
    """
    if not path.parent.is_dir():
        raise RefusedError(f"--markdown: {path.parent} is no folder")
    if path.exists():
        text = path.read_text()
        if not -1 < text.find(BEGIN) < text.find(END):
            raise RefusedError(f"--markdown: {path} has no line {BEGIN}, or no line {END} after it")


def _write(path: Path, results: Sequence[Result], settings: Settings) -> None:
    """Put the table between the two lines of a file that is there, or into a new one: a row for each case and type;
    where architectures differ, a cell has their values one after the other.
    """
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for result in results:
        rows.setdefault((result.name, result.dtype), []).append(result.cells)
    archs = " / ".join(dict.fromkeys(f"sm_{result.arch}" for result in results))
    passed = sum(not result.found.wrong for result in results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("fusedyolo", "torch", "triton"))
    larger = dict.fromkeys(f" ({case.loss}: {case.images})" for case in CASES.values() if case.images > SMALL.batch)
    lines = [
        f"{passed} of {len(results)} pass. {archs}; {_how(settings)}. {versions}, kernels "
        f"{kernels_digest()}. Batch {SMALL.batch}{''.join(larger)}, {SMALL.size} px, {SMALL.classes} classes.",
        "",
        "| " + " | ".join(["case", "dtype", *COLUMNS]) + " |",
        "|" + "---|" * 2 + "---:|" * len(COLUMNS),
    ]
    for names, each in rows.items():
        cells = [" / ".join(dict.fromkeys(values)) for values in zip(*each, strict=True)]
        lines.append("| " + " | ".join([*names, *cells]) + " |")
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    path.write_text(before + "\n".join([BEGIN, *lines, END]) + rest.partition(END)[2])


def _how(settings: Settings) -> str:
    """How kernels were run, in words."""
    words = [f"{settings.seeds} seed" + "s" * (settings.seeds > 1), f"fusion {settings.fusion}"]
    return ", ".join(words + ["noise"] * settings.noise + ["fine"] * settings.fine)
