"""A kernel launch as an object, and what every launch needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import triton.language as tl  # isort: skip

_ACC = {torch.float64: (tl.float64, torch.float64)}


def accumulator(dtype: torch.dtype) -> tuple[Any, torch.dtype]:
    """The compute type of predictions of this dtype, for Triton and for PyTorch: float64 for float64, else float32."""
    return _ACC.get(dtype, (tl.float32, torch.float32))


@dataclass(frozen=True)
class Launch:
    """One kernel launch, ready to run, compile or count. ``max_registers``, a thread's, is of NVIDIA only."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    threads: int
    max_registers: int | None = None

    def run(self) -> None:
        """Launch on the current device and stream."""
        self.kernel[self.grid](**self.arguments, **self.options(torch.version.hip is None))

    def options(self, nvidia: bool) -> dict[str, int]:
        """Compiler options: a warp is 32 threads on NVIDIA's GPUs, 64 on AMD's data-centre GPUs."""
        if not nvidia:
            return {"num_warps": max(1, self.threads // 64)}
        limit = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return {"num_warps": self.threads // 32, **limit}


_DONE: dict[tuple[torch.device, int], Tensor] = {}


def done_counter(device: torch.device) -> Tensor:
    """The counters of finished programs and of places taken, one pair a stream because launches on two streams overlap.

    The kernel leaves them at 0, so they are filled once, not once a call. A captured graph gets a pair of its own:
    memory that a capture allocates belongs to the graph.
    """
    if device.type == "cpu":
        stream = 0
    elif torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
    counter = _DONE.get((device, stream))
    if counter is None:
        counter = _DONE[device, stream] = torch.zeros(2, dtype=torch.int32, device=device)
    return counter


def refuse_double_backward(name: str) -> Callable[..., Any]:
    """The autograd formula of a gradient operator: an error that says so."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name}: double backward is not supported; use backend='torch' for it")

    return refuse
