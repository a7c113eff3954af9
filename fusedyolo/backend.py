"""Which implementation runs: the Triton kernels or the eager reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad

from . import checks

BACKENDS = ("auto", "triton", "torch")

_on_cpu = False  # whether something runs compiled kernels on CPU tensors, see kernels_on_cpu


def is_on(name: str) -> bool:
    """Whether an environment variable is on, by the spellings that Triton accepts."""
    return name in os.environ and os.environ[name].strip().lower() in ("1", "y", "yes", "t", "true", "on")


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    try:
        return find_spec("triton") is not None
    except (ImportError, ValueError):  # an import hook that forbids it, a module put there by hand
        return False


@torch.compiler.assume_constant_result
def _choose(backend: str, device_type: str) -> str:
    if is_on("FUSEDYOLO_DISABLE"):
        return "torch"
    gpu = device_type == "cuda"  # PyTorch calls a HIP device by that name too
    runs = _has_triton() and (gpu or (device_type == "cpu" and (_on_cpu or is_on("TRITON_INTERPRET"))))
    if backend == "auto":
        return "triton" if runs else "torch"
    if backend == "triton" and not runs:
        if not _has_triton():
            checks.fail(
                "backend", "'triton', but Triton is not installed", "backend='auto' or 'torch', or Triton installed"
            )
        if device_type == "cpu":
            checks.fail(
                "backend",
                "'triton' on a CPU",
                "tensors on a GPU, or TRITON_INTERPRET=1 set before Triton is imported, or backend='auto' or 'torch'",
            )
        checks.fail("backend", f"'triton' on a device of type {device_type}", "a CUDA or HIP GPU, or backend='auto'")
    return backend


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Meanwhile kernels run on CPU tensors too; whoever enters this makes sure of it, as the emulator does."""
    global _on_cpu
    before, _on_cpu = _on_cpu, True
    try:
        yield
    finally:
        _on_cpu = before


def resolve(backend: str, device: torch.device) -> str:
    """The implementation that runs, ``"triton"`` or ``"torch"``, for tensors on ``device``.

    ``"auto"`` takes Triton on a CUDA or HIP GPU when it is installed, and on a CPU when ``TRITON_INTERPRET=1`` or
    inside :func:`kernels_on_cpu`; the eager reference otherwise. ``FUSEDYOLO_DISABLE=1`` takes the reference whatever
    was asked for. Both variables are read at each call; under ``torch.compile``, when the graph is traced.

    Raises:
        ValueError: ``backend`` is no known name, or is ``"triton"`` where Triton cannot run; or kernels would run
            inside a transform of ``torch.func`` or of ``torch.autograd.forward_ad``, of which they know nothing.
    """
    checks.one_of("backend", backend, BACKENDS)
    chosen = _choose(backend, device.type)
    if (
        chosen == "triton"
        and not torch.compiler.is_compiling()
        and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0)
    ):
        checks.fail(
            "backend",
            f"{backend!r}, kernels, in torch.func.vmap, grad or jvp, or in forward_ad",
            "'torch', the reference",
        )
    return chosen
