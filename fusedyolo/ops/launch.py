"""A kernel launch as an object, and what every launch needs.

A driver works in two steps. What follows from shapes, strides, types, devices and the row alone (the configuration,
programs, strides, records of numbers, flags, sizes of buffers) is a *plan*, made once by a function under
:func:`planned`. A call allocates, fills its tensors in (:meth:`Launch.filled`) and launches:

    @planned
    def _plan(key: str, pred: Layout, grad: Layout | None, with_loss: bool) -> Launch:
        head, view = head_from_key(key), grid_view(pred.meta(), ...)
        ...
        return Launch(kernel, (programs,), {"W": view.shape[3], "HEAD": ...}, threads)

    def grid_launch(pred, rows, ...):
        plan = _plan(head.key, layout(pred), None, True)
        return plan.filled({"pred_ptr": pred, "rows_ptr": rows, "M": rows.shape[0], ...})

A plan may be a tuple of launches, or a ``NamedTuple`` with sizes beside them. What differs from batch to batch, such as
the number of rows, does not belong in its key; of what does, everything must be in it. It holds no tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import tuned
from ..kernels.launch import power_of_two

import triton.language as tl  # isort: skip
from triton.compiler import CompiledKernel  # isort: skip

R = TypeVar("R")

_ACC = {torch.float64: (tl.float64, torch.float64)}


def accumulator(dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """The compute type of predictions of this dtype, for Triton and for PyTorch: float64 for float64, else float32."""
    return _ACC.get(dtype, (tl.float32, torch.float32))


def float_parts(value: float) -> tuple[float, float, float]:
    """Three float32 numbers that add up to a float64."""
    high = float(np.float32(value))
    middle = float(np.float32(value - high))
    return high, middle, value - high - middle


def odd(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """Integers, also in tuples within, as odd ones: no kernel is compiled for the values of these, see ``plain``."""
    odds = [odd(n) if isinstance(n, tuple) else 2 * n + 3 for n in numbers]
    return type(numbers)(*odds) if hasattr(numbers, "_fields") else tuple(odds)


class Layout(NamedTuple):
    """What a plan knows of a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def meta(self) -> Tensor:
        """A tensor that lies so, without memory: for views and their strides."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_new = tuple.__new__  # what a NamedTuple's own constructor, in Python, comes to


def layout(tensor: Tensor) -> Layout:
    """Of a tensor."""
    return _new(Layout, (tensor.shape, tensor.stride(), tensor.dtype, tensor.device))


def layouts(tensors: Sequence[Tensor]) -> tuple[Layout, ...]:
    """Of each of some tensors."""
    return tuple([_new(Layout, (t.shape, t.stride(), t.dtype, t.device)) for t in tensors])


PLANS = 512  # of a driver; a plan is a few kilobytes
_plans: list[Any] = []  # the caches, of all drivers


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """Decorates what makes a plan: made once for the same arguments, and for what ``tuned`` says meanwhile.

    Of the ``PLANS`` last ones; threads share them. Arguments are hashable and positional.
    """
    find = lru_cache(maxsize=PLANS)(lambda _version, *arguments: make(*arguments))
    _plans.append(find)

    @wraps(make)
    def plan(*arguments: Any) -> R:
        return find(tuned.version, *arguments)

    return plan


def forget_plans() -> None:
    """Make all plans anew: something that no key says has changed."""
    for find in _plans:
        find.cache_clear()


@dataclass(slots=True, eq=False)
class Launch:
    """One kernel launch, ready to run, compile or count, or one that lacks only its tensors. ``max_registers``, a
    thread's, is of NVIDIA only; ``exact`` keeps products and sums apart, as PyTorch's operators do; ``stages`` is how
    many loads of a loop are under way.

    ``given`` are those of the arguments that a plan did not have; what it was ``compiled`` to is a plan's, by what
    Triton specializes on of these.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int
    max_registers: int | None = None
    exact: bool = False
    stages: int | None = None
    given: dict[str, Any] | None = None
    compiled: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def filled(self, given: dict[str, Any]) -> Launch:
        """This launch with further arguments, those of a call; it stays as it is."""
        arguments, settings = {**self.arguments, **given}, (self.threads, self.max_registers, self.exact, self.stages)
        return Launch(self.kernel, self.grid, arguments, *settings, given, self.compiled)

    def run(self) -> None:
        """Launch on the current device and stream: :func:`run_all` sees to it that they are the right ones.

        Of what the plan fixed Triton has nothing to find out again, and that is most of what its launcher does.
        """
        nvidia = torch.version.hip is None  # elsewhere it specializes on the size of memory, too
        if self.given is None or not nvidia:
            self.kernel[self.grid](**self.arguments, **self.options(nvidia))
            return
        kinds: list[Any] = []
        passed = {name: _passed(value, kinds) for name, value in self.given.items()}
        found = self.compiled.get(key := tuple(kinds))
        if found is None:
            made = self.kernel[self.grid](**self.arguments, **self.options(nvidia))
            if isinstance(made, CompiledKernel):  # not where kernels are interpreted
                self.compiled[key] = made
            return
        every = {**self.arguments, **passed}
        found[(*self.grid, 1, 1)[:3]](*[every[name] for name in self.kernel.arg_names])

    def options(self, nvidia: bool) -> dict[str, int]:
        """Compiler options: a warp is 32 threads on NVIDIA's GPUs, 64 on AMD's data-centre GPUs."""
        return dict(_options(self.threads, self.max_registers, self.exact, self.stages, nvidia))


def _passed(value: Any, kinds: list[Any]) -> Any:
    """An argument as a compiled kernel takes it, tensors by address; ``kinds`` are told what the code hangs on."""
    if isinstance(value, Tensor):
        address = value.data_ptr()
        kinds += (value.dtype, address % 16 == 0)
        return address
    if isinstance(value, tuple):
        return tuple([_passed(each, kinds) for each in value])
    if type(value) is int:
        kinds.append((value == 1, value % 16 == 0, -(2**31) <= value < 2**31))
    else:
        kinds.append(float if type(value) is float else value)
    return value


@lru_cache(maxsize=256)
def _options(threads: int, max_registers: int | None, exact: bool, stages: int | None, nvidia: bool) -> dict[str, int]:
    options: dict[str, int] = {"enable_fp_fusion": not exact}
    if stages is not None:
        options["num_stages"] = stages
    if not nvidia:
        return {"num_warps": max(1, threads // 64), **options}
    if max_registers is not None:
        options["maxnreg"] = max_registers
    return {"num_warps": threads // 32, **options}


_ANYWHERE = nullcontext()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current device: of that one Triton launches, and PyTorch says what its stream is and does."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _ANYWHERE
    return torch.cuda.device(device)


def run_all(launches: Sequence[Launch], device: torch.device) -> None:
    """Launch one after the other on the current stream of ``device``, that of their tensors.

    What :func:`zeros` has given is forgotten if one of them fails or is interrupted: it may be zeros no more.
    """
    try:
        with _on(device):
            for launch in launches:
                launch.run()
    except BaseException:
        forget_zeros()
        raise


LEAST_ZEROS = 4096  # so that batches of ordinary sizes need no more


class _Memory(threading.local):
    """What a thread keeps from call to call."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


_MEMORY = _Memory()


def zeros(device: torch.device, count: int, dtype: torch.dtype) -> Tensor:
    """At least ``count`` zeros that kernels may write to if they leave zeros behind, so that they are filled once, not
    once a call. Of each stream its own, because launches on two streams overlap; of each thread too, because those of
    two threads mix on one stream, or are on two that have one handle (``cudaStreamPerThread``).

    A capture gets its own: memory that it allocates belongs to the graph. An operator that a compiled graph runs must
    not ask, see :func:`workspace`.
    """
    stream = 0
    if device.type == "cuda":
        with _on(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(count, dtype=dtype, device=device)
            stream = torch.cuda.current_stream(device).cuda_stream
    found = _MEMORY.zeros.get((device, stream, dtype))
    if found is None or len(found) < count:
        size = max(LEAST_ZEROS, power_of_two(count))
        found = _MEMORY.zeros[device, stream, dtype] = torch.zeros(size, dtype=dtype, device=device)
    return found


def shared_zeros() -> list[Tensor]:
    """All that :func:`zeros` keeps for this thread: between calls, nothing but zeros."""
    return list(_MEMORY.zeros.values())


def forget_zeros() -> None:
    """What launches of this thread may have left in :func:`zeros` is not to be used."""
    _MEMORY.zeros.clear()


COUNTERS = 2  # int64s of a workspace that counters take: what follows begins at a multiple of 16 bytes


def workspace(device: torch.device, rows: int = 0) -> Tensor | None:
    """What an operator takes in place of :func:`zeros` where it is traced into a graph, else None.

    int64 zeros, for the counters and for a maximum a row, which are part of the graph and filled when it runs: what is
    allocated while CUDA graphs are recorded must not outlive them, and they refuse what comes from elsewhere. An
    operator leaves them at 0, and thus declares no argument that it changes.
    """
    if not torch.compiler.is_compiling():
        return None
    return torch.zeros(COUNTERS + rows, dtype=torch.int64, device=device)


def done_counter(device: torch.device, own: Tensor | None = None) -> Tensor:
    """Four counters, of finished programs and of places taken, in a workspace where there is one; left at 0."""
    return zeros(device, 2 * COUNTERS, torch.int32) if own is None else own[:COUNTERS].view(torch.int32)


def row_maxima(device: torch.device, rows: int, own: Tensor | None = None) -> Tensor:
    """An int64 for each row, in a workspace where there is one; left at 0."""
    return zeros(device, rows, torch.int64) if own is None else own[COUNTERS:]


def refuse_double_backward(operator: Any) -> Callable[..., Any]:
    """The autograd formula of a gradient operator: an error that names it."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{operator}: double backward is not supported; use backend='torch' for it")

    return refuse
