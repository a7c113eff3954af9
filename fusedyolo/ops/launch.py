"""A kernel launch as an object, and what every launch needs.

What does not change between calls is made once, see :func:`planned` and :mod:`.steps`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import tuned
from ..kernels.launch import MOST_REGISTERS, REGISTERS, WEIGHED_REGISTERS, power_of_two

import triton.language as tl  # isort: skip

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


def alike(preds: Sequence[Layout]) -> tuple[Layout, ...]:
    """Of what ``torch.empty_like`` makes of tensors with these."""
    return tuple([layout(torch.empty_like(pred.meta())) for pred in preds])


PLANS = 512  # of a driver; a plan is a few kilobytes
_plans: list[Any] = []  # the caches, of all drivers


def planned(make: Callable[..., R]) -> Callable[..., R]:
    """Decorates what makes a plan: made once for the same arguments, and for what ``tuned`` says meanwhile.

    Of the ``PLANS`` last ones; threads share them. Arguments are hashable and positional. What differs from batch to
    batch, such as the number of rows, does not belong among them; of what a plan hangs on, everything must be. It holds
    no tensor.
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
    """One kernel launch, ready to run, compile or count, or one of a plan that lacks what calls bring, see
    :mod:`.steps`. ``max_registers``, a thread's, is of NVIDIA only; ``exact`` keeps products and sums apart, as
    PyTorch's operators do; ``stages`` is how many loads of a loop are under way; of launches with some
    of ``weights``, tensors or Nones, programs need more registers.
    """

    kernel: Any
    grid: Any
    arguments: dict[str, Any]
    threads: int
    max_registers: int | None = None
    exact: bool = False
    stages: int | None = None
    weights: tuple[Any, ...] = ()

    def run(self) -> Any:
        """Launch on the current device and stream: :func:`run_all` sees to it that they are the right ones. Returns
        what the kernel was compiled to.
        """
        nvidia = torch.version.hip is None
        return self.kernel[self.grid](**self.arguments, **self.options(nvidia, _generation() if nvidia else 0))

    def options(self, nvidia: bool, generation: int = 9) -> dict[str, int]:
        """Compiler options: a warp is 32 threads on NVIDIA's GPUs, 64 on AMD's data-centre GPUs. ``generation`` is the
        first number of a compute capability.
        """
        limit = self.max_registers
        if limit is not None:
            weighed = any(each is not None for each in self.weights)
            more = WEIGHED_REGISTERS * weighed + NEWER_REGISTERS * (generation >= 10)
            limit = min(limit + more, MOST_REGISTERS, REGISTERS // self.threads)
        return dict(_options(self.threads, limit, self.exact, self.stages, nvidia))


NEWER_REGISTERS = 24
"""Of a thread, more from compute capability 10 on, where ptxas spills some of what fits on older ones."""


def _generation() -> int:
    """Of the current GPU; of the one before where there is none."""
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9


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


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current device: of that one Triton launches, and PyTorch says what its stream is and does."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return _ANYWHERE
    return torch.cuda.device(device)


def run_all(launches: Sequence[Launch], device: torch.device) -> list[Any]:
    """Launch one after the other on the current stream of ``device``, that of their tensors; what each returns.

    What :func:`zeros` has given is forgotten if one of them fails or is interrupted: it may be zeros no more.
    """
    try:
        with on_device(device):
            return [launch.run() for launch in launches]
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
    return zeros_of_types(device, (count, dtype))[0]


def zeros_of_types(device: torch.device, *wanted: tuple[int, torch.dtype]) -> list[Tensor]:
    """:func:`zeros` of several types, for which the stream is asked once."""
    stream = 0
    if device.type == "cuda":
        with on_device(device):
            if torch.cuda.is_current_stream_capturing():
                return [torch.zeros(count, dtype=dtype, device=device) for count, dtype in wanted]
            stream = torch._C._cuda_getCurrentRawStream(device.index)  # as Triton asks: no object is made
    kept, found = _MEMORY.zeros, []
    for count, dtype in wanted:
        zero = kept.get((device, stream, dtype))
        if zero is None or zero.shape[0] < count:
            size = max(LEAST_ZEROS, power_of_two(count))
            zero = kept[device, stream, dtype] = torch.zeros(size, dtype=dtype, device=device)
        found.append(zero)
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


def counters_and_maxima(device: torch.device, rows: int, own: Tensor | None, counters: int = 0) -> list[Tensor]:
    """Those counters, or more, and an int64 for each row; of a workspace these come after its counters. Left at 0."""
    if own is None:
        return zeros_of_types(device, (max(counters, 2 * COUNTERS), torch.int32), (rows, torch.int64))
    return [own[:COUNTERS].view(torch.int32), own[COUNTERS:]]


def refuse_double_backward(operator: Any) -> Callable[..., Any]:
    """The autograd formula of a gradient operator: an error that names it."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{operator}: double backward is not supported; use backend='torch' for it")

    return refuse
