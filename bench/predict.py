"""How long a launch should take on a GPU that need not be here: predicted, never measured.

Compiled kernels are executed by the emulator, which counts the instructions of each program, and the cycles that these
wait for one another; what the compiler reports turns instructions of PTX into those of the GPU. Of a launch some
programs stand for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from fusedyolo.emulator.report import Report
from fusedyolo.tools.codegen import target_of
from fusedyolo.tools.registry import Case, Workload

from .measure import FUSED, ready
from .sampling import Sample, pretend_others_finished


@dataclass(frozen=True)
class Gpu:
    """``multiprocessors`` with four schedulers each, of which every one issues an instruction of a warp a cycle;
    ``clock`` in Hz, ``bandwidth`` in bytes a second, ``shared`` memory of a multiprocessor in bytes.
    """

    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    shared: int

    @property
    def issue_rate(self) -> float:
        """Instructions of a warp a second, of all multiprocessors."""
        return 4 * self.multiprocessors * self.clock

    def places(self, threads: int, registers: int, shared: int) -> int:
        """How many programs of so many threads, registers a thread and bytes of shared memory run at once."""
        by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        return self.multiprocessors * min(
            PROGRAMS, THREADS // threads, by_registers, self.shared // (shared + RESERVED_SHARED)
        )


PROGRAMS, THREADS, REGISTERS, RESERVED_SHARED = 32, 2048, 65536, 1024
"""Of a multiprocessor of compute capability 8.0 and 9.0; the last one of each program."""

START = 1e-6  # seconds, of a launch: those whose programs end at once were measured to take so long


# SXM cards. Multiprocessors are those of NVIDIA's white papers. Clocks are what a card is assumed to hold under load,
# and bandwidths what large copies are assumed to reach, 83 to 90 % of the data sheets' 3.35, 4.8 and 2.04 TB/s; of an
# H200 4.17 TB/s were measured.
GPUS = {
    "H100": Gpu("sm_90", 132, 1.755e9, 3.0e12, 228 << 10),
    "H200": Gpu("sm_90", 132, 1.755e9, 4.2e12, 228 << 10),
    "A100": Gpu("sm_80", 108, 1.41e9, 1.7e12, 164 << 10),
}


# ------------------------------------------------------------------------------------------------------------ executed

MOST, LEAST = 32, 2  # programs of a launch that run, see Plan


def execute_step(case: Case, work: Workload, target: str, exact: bool = False) -> list[dict[str, Any]]:
    """Instructions of PTX that forward and backward execute as compiled for ``target``, an NVIDIA one.

    Kernels must have been imported without ``TRITON_INTERPRET``.

    Args:
        case: the loss.
        work: what it is given.
        target: as in :data:`fusedyolo.tools.codegen.TARGETS`.
        exact: run every program.

    Returns:
        A dictionary a launch, in order: ``kernel``; ``programs``, ``programs_run``; ``instructions`` of warps in all
        programs, ``longest`` and ``median`` of one; ``ptx``, how many there are in the text; cycles, the ``chain`` of
        the launch, see :func:`chain_of`, and those of all programs together, ``chains``; ``shared`` bytes of a program.

    Raises:
        Fault: what the emulator found wrong.
    """
    from fusedyolo.emulator import Device, Program
    from fusedyolo.ops.launch import Launch

    step = ready(case, work, FUSED)
    sample = Sample(case, work, step.targets, MOST, LEAST)
    chosen: Sequence[int] = ()
    found: list[dict[str, Any]] = []
    device = Device(
        target_of(target)[1], checks=(), lockstep=1.0, resident=16, chains=True,
        sample=lambda name, programs, arguments: chosen,
    )  # fmt: skip
    run = Launch.run

    def run_some(self: Launch) -> None:
        nonlocal chosen
        name, programs = self.kernel.__name__, self.grid[0]
        plan = sample.plan(name, programs, self.arguments)
        ran = list(range(programs)) if exact else plan.chosen
        begin = len(device.launches)
        # the last program alone, so that the final sum is its own
        for chosen in (ran[:-1], ran[-1:]):
            if len(chosen) == 1:
                pretend_others_finished(sum(p < plan.adding for p in ran[:-1]), plan.adding)
            if chosen:
                run(self)
        records = device.launches[begin:]
        reports = [record.report for record in records]
        executed = plan.estimate({p: n for report in reports for p, n in report.by_program.items()})
        cycles = plan.estimate({p: n for report in reports for p, (n, _) in report.chains.items()})
        found.append(
            {
                "kernel": name,
                "programs": programs,
                "programs_run": len(ran),
                "instructions": round(executed.sum()),
                "longest": round(executed.max()),
                "median": float(np.median(executed)),
                "ptx": sum(len(segment.code) for segment in Program(records[-1].compiled.ptx).segments),
                "chain": chain_of(reports),
                "chains": round(cycles.sum()),
                "shared": records[-1].compiled.shared,
            }
        )

    with device, mock.patch.object(Launch, "run", run_some), nullcontext() if exact else sample.completed():
        step()
    device.check()
    return found


def chain_of(reports: Sequence[Report]) -> int:
    """Cycles of a launch whose programs all run at once. Where the last one that ran adds up what the others left, it
    goes on after its last atomic when the slowest one has come there.
    """
    chains = [each for report in reports for each in report.chains.values()]
    slowest, (end, met) = max(each for each, _ in chains), chains[-1]
    return max(max(each for each, _ in chains[:-1]), met) + end - met if met and len(chains) > 1 else slowest


# ----------------------------------------------------------------------------------------------------------- predicted


def predict(
    gpu: Gpu,
    counted: Sequence[Mapping[str, Any]],
    executed: Sequence[Mapping[str, Any]],
    compiled: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, float]]:
    """What each launch of a step should take, by name, and under ``step`` all of them one after another.

    Args:
        gpu: one of :data:`GPUS`, or like them.
        counted: of each launch its bytes, as in :attr:`bench.count.Counts.kernels`.
        executed: of each launch its instructions, as :func:`execute_step` returns them.
        compiled: of each launch by name what it compiles to, as :func:`fusedyolo.tools.codegen.compile_step` says.

    Returns:
        Microseconds: ``memory_us``; ``issue_us``; ``places_us``, for which programs hold the places of all
        multiprocessors; ``chain_us``, the longest wait of instructions for one another; and ``predicted_us``, that,
        the largest of the others and a start together. ``programs``, ``instructions``, ``longest_over_median``. Of a
        step sums, but the largest of the last.

    Raises:
        ValueError: these are not launches of one step.
    """
    names = [(one["name"], one["programs"]) for one in counted]
    if names != [(one["kernel"], one["programs"]) for one in executed] or len(names) != len(compiled):
        raise ValueError(f"counted: launches {names}, want those executed and compiled: {list(compiled)}")
    found: dict[str, dict[str, float]] = {}
    for bytes_of, ran, (name, resources) in zip(counted, executed, compiled.items(), strict=True):
        real = (resources["instructions"] - resources["called"]) / ran["ptx"]
        memory = bytes_of["bytes"] / gpu.bandwidth
        issue = ran["instructions"] * real / gpu.issue_rate
        at_once = gpu.places(resources["threads"], resources["registers"], ran["shared"])
        places, chain = ran["chains"] / at_once / gpu.clock, ran["chain"] / gpu.clock
        found[name] = {
            "programs": ran["programs"],
            "instructions": ran["instructions"] * real,
            "memory_us": memory * 1e6,
            "issue_us": issue * 1e6,
            "places_us": places * 1e6,
            "chain_us": chain * 1e6,
            "predicted_us": (max(memory, issue, places) + chain + START) * 1e6,
            "longest_over_median": ran["longest"] / ran["median"],
        }
    launches = list(found.values())
    sums = {name: sum(each[name] for each in launches) for name in launches[0]}
    return found | {"step": sums | {"longest_over_median": max(each["longest_over_median"] for each in launches)}}
