"""A kernel launch as an object, and what every launch needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import triton.language as tl  # isort: skip

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
    """Integers, also in tuples, as odd ones: no kernel is compiled for the values of these, see ``plain``."""
    return tuple(odd(n) if isinstance(n, tuple) else 2 * n + 3 for n in numbers)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run, compile or count. ``max_registers``, a thread's, is of NVIDIA only; ``exact``
    keeps products and sums apart, as PyTorch's operators do; ``stages`` is how many loads of a loop are under way.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int
    max_registers: int | None = None
    exact: bool = False
    stages: int | None = None

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options(torch.version.hip is None))

    def options(self, nvidia: bool) -> dict[str, int]:
        """Compiler options: a warp is 32 threads on NVIDIA's GPUs, 64 on AMD's data-centre GPUs."""
        options: dict[str, int] = {"enable_fp_fusion": False} if self.exact else {}
        if self.stages is not None:
            options["num_stages"] = self.stages
        if not nvidia:
            return {"num_warps": max(1, self.threads // 64), **options}
        if self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return {"num_warps": self.threads // 32, **options}


LEAST_ZEROS = 4096  # so that batches of ordinary sizes need no more
_ZEROS: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}


def zeros(device: torch.device, count: int, dtype: torch.dtype) -> Tensor:
    """At least ``count`` zeros that kernels may write to if they leave zeros behind, so that they are filled once, not
    once a call; of each stream its own, because launches on two streams overlap.

    A captured graph gets its own too: memory that a capture allocates belongs to the graph.
    """
    if device.type == "cpu":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=dtype, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    found = _ZEROS.get((device, stream, dtype))
    if found is None or len(found) < count:
        size = max(LEAST_ZEROS, 1 << (count - 1).bit_length())
        found = _ZEROS[device, stream, dtype] = torch.zeros(size, dtype=dtype, device=device)
    return found


def forget_zeros() -> None:
    """What an interrupted sequence of launches may have left in :func:`zeros` is not to be used."""
    _ZEROS.clear()


def done_counter(device: torch.device) -> Tensor:
    """The counters of finished programs and of places taken; the kernels leave them at 0."""
    return zeros(device, 2, torch.int32)


def refuse_double_backward(name: str) -> Callable[..., Any]:
    """The autograd formula of a gradient operator: an error that says so."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name}: double backward is not supported; use backend='torch' for it")

    return refuse
