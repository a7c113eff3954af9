"""A device that is not there: while it is entered, kernels launched on CPU tensors run as they were compiled."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch import Tensor

from .allocations import Allocations, bytes_of
from .compile import Call, Compiled, bind
from .contract import contract
from .engine import CHECKS, LIMIT, run
from .memory import Buffer, Pointer
from .ptx import Fault, Program
from .report import Report

_SCRATCH_PARAMETERS = 2  # pointers that Triton adds; kernels that use them are refused
_SEEDS_A_DEVICE = 1000  # launches of one device that draw from seeds of their own

_programs: dict[tuple[str, bool], Program] = {}  # by digest of the text, and whether fine


@dataclass(frozen=True)
class Record:
    """A launch that was run: its grid, what was found, how long it took, and what it was called with."""

    name: str
    programs: int
    report: Report
    seconds: float
    compiled: Compiled
    arguments: Mapping[str, Any]


class Device:
    """While it is entered, every ``kernel[grid](...)`` on CPU tensors is compiled to PTX and emulated, and
    ``backend="auto"`` and ``"triton"`` choose the kernels on the CPU.

    Memory of ``torch.empty`` is poisoned and counts as unwritten. Kernels must have been imported without
    ``TRITON_INTERPRET``.

    Args:
        arch: 90 for sm_90.
        seed: of the order in which threads, warps and programs run.
        fusion: ``False`` compiles every launch with ``enable_fp_fusion=False``; else as each launch asks. A launch that
            asks for ``False`` is exact by contract and stays so.
        contraction: a seed by which products and sums that ptxas may still fuse are fused or not, in launches that
            were compiled with fusion.
        checks: of ``"race"`` and ``"init"``; bounds and alignment are always checked. Without them little memory is
            needed.
        noise: whether approximate instructions are off by as much as is documented.
        fine: whether other threads may come in before every access, not only before atomics and barriers.
        lockstep: how often all threads that can go on do, in [0, 1].
        resident: programs that run at once.
        change: given the name and the PTX of each launch, the PTX that is run.
        sample: given the name of a kernel, the number of its programs and its arguments, the programs to run; ``None``
            for all.
        limit: of steps of a launch.
        chains: whether reports say how long instructions wait for one another.

    Attributes:
        launches: a :class:`Record` of each launch.
        faults, notes: those of all launches, with the name of the kernel.
    """

    def __init__(
        self,
        arch: int = 90,
        seed: int = 0,
        *,
        fusion: bool | None = None,
        contraction: int | None = None,
        checks: Sequence[str] = CHECKS,
        noise: bool = False,
        fine: bool = False,
        lockstep: float = 0.7,
        resident: int = 4,
        change: Callable[[str, str], str] | None = None,
        sample: Callable[[str, int, Mapping[str, Any]], Sequence[int] | None] | None = None,
        limit: int = LIMIT,
        chains: bool = False,
    ):
        self.arch, self.seed, self.fusion, self.contraction, self.fine = arch, seed, fusion, contraction, fine
        self.change, self.sample = change, sample
        self._options = {
            "checks": tuple(checks), "noise": noise, "lockstep": lockstep, "resident": resident, "limit": limit,
            "chains": chains,
        }  # fmt: skip
        self._allocations = Allocations("init" in checks)
        self.launches: list[Record] = []
        self.faults: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def __enter__(self) -> Device:
        from triton.runtime.jit import JITFunction

        from .. import backend
        from ..kernels import primitives

        if not isinstance(primitives.step, JITFunction):
            raise RuntimeError(
                "kernels were imported with TRITON_INTERPRET set and cannot be compiled; start a process without it"
            )

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
            self._launch(kernel, args, kwargs, grid, warmup)

        with ExitStack() as stack:
            stack.enter_context(backend.kernels_on_cpu())
            stack.enter_context(mock.patch.object(JITFunction, "run", launch))
            stack.enter_context(self._allocations)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._exits.__exit__(kind, error, trace)
        left = [tensor for tensor in _shared_zeros() if tensor.device.type == "cpu" and bool(tensor.any())]
        for tensor in left:
            tensor.zero_()
        if left and kind is None and self.sample is None:  # a part of the programs does not clean up
            self.faults["memory that launches share is not left at 0"] += 1

    def missing(self, tensor: Tensor) -> int:
        """Bytes of a tensor that nothing has written since ``torch.empty`` gave its memory."""
        return self._allocations.missing(tensor)

    def check(self) -> None:
        """Raises:
        Fault: something was found; the message lists it.
        """
        if self.faults:
            raise Fault("\n".join(f"{count} x {fault}" for fault, count in self.faults.most_common()))

    def _launch(self, kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any], grid: Any, warmup: bool) -> None:
        for hook in kernel.pre_run_hooks:
            hook(*args, **kwargs)
        call = bind(kernel, args, kwargs, self.arch, self.fusion)
        if warmup:
            return
        name = call.compiled.name
        programs = _programs_of(name, grid(call.arguments) if callable(grid) else grid)
        if programs:
            chosen = None if self.sample is None else self.sample(name, programs, call.arguments)
            self._run(call, programs, chosen)

    def _run(self, call: Call, programs: int, chosen: Sequence[int] | None) -> None:
        compiled = call.compiled
        begin = time.perf_counter()
        program = self._program(compiled)
        arguments = self._arguments(compiled.name, call.passed)
        arguments += [0] * min(len(program.parameters) - len(arguments), _SCRATCH_PARAMETERS)
        report = run(
            program, programs, compiled.warps, compiled.shared, arguments,
            seed=self.seed * _SEEDS_A_DEVICE + len(self.launches), programs=chosen, **self._options,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        self.launches.append(Record(compiled.name, programs, report, seconds, compiled, call.arguments))
        self.faults.update({f"{compiled.name}: {fault}": count for fault, count in report.faults.items()})
        self.notes.update({f"{compiled.name}: {note}": count for note, count in report.notes.items()})

    def _program(self, compiled: Compiled) -> Program:
        text = compiled.ptx
        if self.contraction is not None and compiled.fusion:
            text = contract(text, self.contraction)
        if self.change is not None:
            text = self.change(compiled.name, text)
        key = hashlib.sha256(text.encode()).hexdigest(), self.fine
        if key not in _programs:
            _programs[key] = Program(text, self.fine)
        return _programs[key]

    def _arguments(self, name: str, passed: Sequence[Any]) -> list[Any]:
        buffers: dict[int, Buffer] = {}
        out: list[Any] = []
        for value in passed:
            if not isinstance(value, Tensor):
                out.append(value)
                continue
            if value.device.type != "cpu":
                raise ValueError(f"{name}: a tensor on {value.device}; the emulator runs kernels on CPU tensors")
            storage = value.untyped_storage()
            size = value.element_size()
            buffer = buffers.get(storage.data_ptr())
            if buffer is None:
                written = self._allocations.written(value)
                is_new = self._allocations.is_new(value)
                buffer = buffers[storage.data_ptr()] = Buffer(bytes_of(storage), size, written, is_new)
            buffer.itemsize = min(buffer.itemsize, size)
            out.append(Pointer(buffer, int(value.storage_offset()) * size))
        return out


def _programs_of(name: str, grid: Any) -> int:
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if any(size != 1 for size in sizes[1:]):
        raise NotImplementedError(f"{name}: a grid of {sizes}; the emulator runs grids of one dimension")
    return int(sizes[0])


def _shared_zeros() -> list[Tensor]:
    """Memory that launches share, and must leave at zero."""
    from ..ops import launch

    return launch.shared_zeros()
