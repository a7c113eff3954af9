"""Compare every loss and its gradient with the reference in float64 on this machine; exit status 1 if one differs.

On a GPU the kernels run there, elsewhere in Triton's interpreter, which takes under a minute. With ``--compiled`` they
are compiled for GPUs that need not be here and executed by ``fusedyolo.emulator``, with ``select`` and the functional
losses: seconds each, more where they have not been compiled before.
"""

from __future__ import annotations

import argparse
import itertools

import torch
from rich.progress import track

from . import compiled, interpreter, terminal
from .parity import parity, parity_table
from .registry import RefusedError, Workload, select


def run(options: argparse.Namespace) -> int:
    """Compare, and print a table: 0 if all pass, 1 if not."""
    console, dtypes = terminal.console(), options.dtype or ["float32"]
    if options.compiled:
        return compiled.run(options, dtypes, console)
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
