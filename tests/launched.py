"""Steps launched through Triton's own launcher, by a driver that does nothing: ``launched.py NAME LIBRARY`` prints, as
JSON, of each of four steps what was launched, see ``no_driver.c``; how many kernels Triton bound, and how often a hook
was called, which the last step has.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from fusedyolo.backend import kernels_on_cpu
from fusedyolo.ops.launch import Launch
from fusedyolo.tools.parity import bound
from fusedyolo.tools.registry import CASES, Workload

MOST, EACH = 256, 6


class Driver(CudaDriver):
    """Triton's own, but for what it asks PyTorch."""

    def __init__(self) -> None:
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main(name: str, library: str) -> None:
    notes = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    driver.set_active(Driver())
    case, work = CASES[name], Workload(batch=2, size=64, classes=3)
    called: list[object] = []
    bound_ones: list[Launch] = []
    found, run = [], Launch.run

    def bind(launch: Launch) -> object:
        bound_ones.append(launch)
        return run(launch)

    Launch.run = bind  # type: ignore[method-assign]
    with kernels_on_cpu():
        step = bound(case.bind(case.build(work.classes, "triton"), work, "cpu"), case, work, "cpu")
        for hooked in (False, False, False, True):
            if hooked:
                knobs.runtime.launch_enter_hook.add(called.append)
            step()
            space = (ctypes.c_longlong * (MOST * EACH))()
            count = notes.take_notes(space)
            found.append([list(space[i * EACH : (i + 1) * EACH]) for i in range(count)])
    print(json.dumps([found, len(bound_ones), len(called)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
