"""What tests call in a process without Triton's interpreter; results are as JSON has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from fusedyolo import backend, functional
from fusedyolo.emulator import Device, Fault

N = 1000


@triton.jit
def scale_kernel(x_ptr, out_ptr, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n)
    tl.store(out_ptr + i, x * factor + 1.0, mask=i < n)


@triton.jit
def grid_of_two_kernel(out_ptr):
    tl.store(out_ptr + tl.program_id(1), 1.0)


def scale(device: Device, out: torch.Tensor | None = None, n: int = N, **options: Any) -> torch.Tensor:
    """``3 x + 1`` for x from 0."""
    with device:
        out = torch.empty(N) if out is None else out
        x = torch.arange(N, dtype=torch.float32)
        scale_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, out, n, 3.0, BLOCK=256, num_warps=2, **options)
    return out


def error(run: Callable[[], Any]) -> str:
    """The type and the message of what is raised."""
    try:
        run()
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return ""


def launches() -> dict[str, Any]:
    """A kernel of a test's own, launched in several ways."""
    before, environment, run = backend.resolve("auto", torch.device("cpu")), dict(os.environ), JITFunction.run
    device = Device(90, seed=1)
    out = scale(device)
    half = Device(90)
    part = scale(half, n=600)
    few = Device(90, checks=(), sample=lambda name, programs, arguments: [programs - 1])
    last = scale(few, torch.zeros(N))
    beyond = Device(90)
    scale(beyond, torch.zeros(N - 8))
    (record,) = device.launches
    with Device(90):
        inside = backend.resolve("auto", torch.device("cpu"))
        inside_eager = backend.resolve("torch", torch.device("cpu"))
        grids = error(lambda: grid_of_two_kernel[(2, 2)](torch.zeros(2)))
        grid_of_two_kernel[(2, 1)](torch.zeros(2))
    return {
        "right": torch.equal(out, 3 * torch.arange(N, dtype=torch.float32) + 1),
        "missing": [device.missing(out), half.missing(part)],
        "poisoned": [part[599].item(), bool((part[600:] < -1e30).all())],
        "sampled": [int(last.count_nonzero()), few.launches[0].programs, sorted(few.launches[0].report.by_program)],
        "faults": [len(device.faults), list(beyond.faults), error(beyond.check)],
        "record": [record.name, record.programs, record.compiled.warps, sorted(record.arguments), record.seconds > 0],
        "by_program": sorted(record.report.by_program),
        "backends": [before, inside, inside_eager, backend.resolve("auto", torch.device("cpu"))],
        "grids": grids,
        "restored": [dict(os.environ) == environment, JITFunction.run is run],
    }


def rounding() -> dict[str, Any]:
    """Which launches are compiled with fusion, and what contraction by seed leaves alone."""

    def compiled(fusion: bool | None, **options: Any) -> list[Any]:
        device = Device(90, fusion=fusion)
        scale(device, **options)
        record = device.launches[0].compiled
        return [record.fusion, record.ptx.count("fma.rn.f32")]

    asked = {"enable_fp_fusion": True}
    exact = {"enable_fp_fusion": False}
    return {
        "as asked": [compiled(None, **asked), compiled(None, **exact)],
        "off": [compiled(False, **asked), compiled(False, **exact)],
        "on": [compiled(True, **asked), compiled(True, **exact)],
    }


def operators() -> dict[str, Any]:
    """Memory that an operator of ours allocates is poisoned, and counts as unwritten until a kernel writes it."""
    drop = [""]

    def change(name: str, text: str) -> str:
        lines = text.splitlines()
        stores = [i for i, line in enumerate(lines) if "st.global" in line]
        if drop[0]:
            lines[stores[-1]] = "\t// gone"
        return "\n".join(lines) + "\n"

    found: dict[str, Any] = {}
    for drop[0] in ("", "drop"):
        device = Device(90, change=change)
        with device:
            x = torch.linspace(-3, 3, 700)
            out = functional.sigmoid_focal_loss(x, torch.full_like(x, 0.25), reduction="none")
        found[drop[0] or "kept"] = [device.missing(out), bool((out >= 0).all()), len(device.launches)]
    return found


def unclean() -> list[str]:
    """Memory that launches share is left dirty."""
    from fusedyolo.ops import launch

    device = Device(90)
    with device:
        launch.zeros(torch.device("cpu"), 2, torch.int32)[0] = 1
    clean = Device(90)
    with clean:
        pass
    return [*device.faults, *clean.faults, error(device.check).partition(":")[0] or Fault.__name__]


def everything() -> dict[str, Any]:
    """All of these, in one process."""
    return {"launches": launches(), "rounding": rounding(), "operators": operators(), "unclean": unclean()}


def mutants(name: str, kernel: str, kinds: list[str], most: int) -> dict[str, list[list[str]]]:
    """For some kinds of broken lines, how each was noticed."""
    from emulator.mutants import KINDS, Mutants, problem

    broken = Mutants(problem(name), kernel)
    return {kind: [sorted(how) for _, how in broken.tried(KINDS[kind], most)] for kind in kinds}
