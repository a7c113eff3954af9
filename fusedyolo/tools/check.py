"""Compare every loss and its gradient with the reference in float64 on this machine; exit status 1 if one differs.

On a GPU the kernels run there, elsewhere in Triton's interpreter, which takes under a minute. With ``--compiled`` they
are compiled for GPUs that need not be here and executed by ``fusedyolo.emulator``, with ``select`` and the functional
losses: seconds each, more where they have not been compiled before.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, track
from rich.table import Table

from . import compiled, interpreter
from .compiled_table import Result, accepts, print_results, write
from .registry import Case, Workload, choose, select


def run(options: argparse.Namespace) -> int:
    """Compare, and print a table: 0 if all pass, 1 if not, 2 if nothing can be compared."""
    console = Console()
    if options.compiled:
        return _run_compiled(options, console)
    for name in ("arch", "seeds", "fusion", "noise", "fine", "markdown"):
        if getattr(options, name):
            console.print(f"[red]--{name}: wants --compiled", highlight=False)
            return 2
    try:
        cases = select(options.loss)
    except ValueError as error:
        console.print(f"[red]{error}", highlight=False)
        return 2
    gpu = torch.cuda.is_available()
    if not gpu:
        try:
            interpreter.prepare()
        except ImportError:
            console.print("[red]Triton is not installed: the reference runs, and there is nothing to compare it with")
            return 2
    work = [(case, Workload(dtype=dtype)) for case in cases for dtype in options.dtype or ["float32"]]
    results = [
        (case, each, _compared(case, each, "cuda" if gpu else "cpu"))
        for case, each in track(work, "checking", console=console, transient=True)
    ]
    console.print(_table(results, torch.cuda.get_device_name() if gpu else "Triton's interpreter"))
    for case, each, found in results:
        if "error" in found:
            console.print(f"[red]{case.name} {each.dtype}:[/] {escape(found['error'])}", highlight=False)
    failed = [f"{case.name} {each.dtype}" for case, each, found in results if not found["ok"]]
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(results)} differ from the reference:[/] {', '.join(failed)}")
    return int(bool(failed))


def _compared(case: Case, work: Workload, device: str) -> dict[str, Any]:
    from .parity import parity

    try:
        return parity(case, work, device)
    except Exception as error:  # what a kernel or a compiler may raise is not known; the others are still checked
        return {"ok": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _table(results: list[tuple[Case, Workload, dict[str, Any]]], device: str) -> Table:
    title = f"Errors against the reference in float64, relative to the largest entry; kernels on {device}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("loss", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("loss error", "eager's", "gradient error", "eager's", ""):
        table.add_column(name, justify="right")
    keys = ("fused_loss_error", "eager_loss_error", "fused_grad_error", "eager_grad_error")
    for case, work, found in results:
        errors = [f"{found[key]:.1e}" if key in found else "?" for key in keys]
        table.add_row(case.name, work.dtype, *errors, "[green]passes" if found["ok"] else "[bold red]FAILS")
    return table


# --------------------------------------------------------------------------------------------------------- compiled


def _run_compiled(options: argparse.Namespace, console: Console) -> int:
    settings = compiled.Settings(
        seeds=options.seeds or 2, fusion=options.fusion or "as-shipped", noise=options.noise, fine=options.fine
    )
    try:
        cases = choose(options.loss, compiled.cases())
        if options.markdown:
            accepts(options.markdown)
        compiled.ready()
    except ValueError as error:
        console.print(f"[red]{escape(str(error))}", highlight=False)
        return 2
    results: list[Result] = []
    archs, dtypes = options.arch or [90], options.dtype or ["float32"]
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(cases) * len(archs) * len(dtypes))
        for name, case in cases.items():
            for dtype in dtypes:
                for arch in archs:
                    progress.update(task, description=f"{name} {dtype} sm_{arch}")
                    found = _executed(case, replace(compiled.SMALL, dtype=dtype), replace(settings, arch=arch))
                    results.append(Result(name, dtype, arch, found))
                    progress.advance(task)
    print_results(console, results, settings)
    if options.markdown:
        write(options.markdown, results, settings)
    return int(not all(result.found.ok for result in results))


def _executed(case: compiled.Case, work: Workload, settings: compiled.Settings) -> compiled.Found:
    try:
        return compiled.compare(case(work), settings)
    except Exception as error:  # as above
        return compiled.Found(wrong=[f"{type(error).__name__}: {error}".splitlines()[0]])
