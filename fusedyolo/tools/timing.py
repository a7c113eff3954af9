"""Times on a GPU. What is short is measured many times, by events on the device and by replaying a graph of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

QUANTILES = (0.2, 0.5, 0.8)


def by_events(fn: Callable[[], Any], leaves: Sequence[torch.Tensor] = ()) -> tuple[float, ...]:
    """Milliseconds of ``fn`` at each of ``QUANTILES``, the cache cleared and the gradients of ``leaves`` dropped before
    every call.
    """
    from triton.testing import do_bench

    return tuple(do_bench(fn, warmup=50, rep=300, grad_to_none=list(leaves), quantiles=list(QUANTILES)))


def by_replay(fn: Callable[[], Any], leaves: Sequence[torch.Tensor] = ()) -> tuple[float, ...]:
    """The same by replays of a CUDA graph of many calls: no time of the host is in it, the cache is warm, and the
    quantiles are of means over a replay.

    Raises:
        RuntimeError: ``fn`` waits for the host or allocates in a way that cannot be captured.
    """
    from triton.testing import do_bench_cudagraph

    torch.cuda.synchronize()  # it captures on a stream of its own
    return tuple(do_bench_cudagraph(fn, rep=100, grad_to_none=list(leaves), quantiles=list(QUANTILES)))


def busy(fn: Callable[[], Any], leaves: Sequence[torch.Tensor], calls: int = 5) -> float:
    """Milliseconds in which the device works for a call: all its kernels and copies added up, one behind the other."""
    return sum(time for _, time in _profiled(fn, leaves, calls)) / 1000 / calls


def by_launch(fn: Callable[[], Any], leaves: Sequence[torch.Tensor], calls: int = 15) -> dict[str, float]:
    """Median microseconds of each Triton kernel of a call, the cache cleared before; what has one name is numbered."""
    cache = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def cold() -> None:
        cache.zero_()
        fn()

    return by_name(_profiled(cold, leaves, calls), calls)


def _profiled(fn: Callable[[], Any], leaves: Sequence[torch.Tensor], calls: int) -> list[tuple[str, float]]:
    """Names and microseconds of all kernels and copies of so many calls, in order."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            for leaf in leaves:
                leaf.grad = None
            fn()
        torch.cuda.synchronize()
    events = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


def by_name(seen: Sequence[tuple[str, float]], calls: int) -> dict[str, float]:
    """Medians over so many calls, each of which launched the same; PyTorch's own kernels, which are templates, and
    copies are left out.

    Raises:
        ValueError: they cannot have launched the same.
    """
    own = [(name, time) for name, time in seen if name.isidentifier()]
    each, rest = divmod(len(own), calls)
    if rest or any(name != own[i % each][0] for i, (name, _) in enumerate(own)):
        raise ValueError(f"calls: {calls} launched {len(own)} kernels, want the same ones each time")
    names, found = [name for name, _ in own[:each]], dict[str, float]()
    for i, name in enumerate(names):
        number = f".{names[: i + 1].count(name)}" if names.count(name) > 1 else ""
        found[name + number] = median(time for _, time in own[i::each])
    return found


def copy_bandwidth(bytes_moved: int = 1 << 30) -> float:
    """GB/s of a device-to-device copy, reads and writes: the ceiling of everything here."""
    source = torch.empty(bytes_moved // 2, dtype=torch.uint8, device="cuda").random_(256)
    target = torch.empty_like(source)
    return bytes_moved / by_events(lambda: target.copy_(source))[1] / 1e6


def peak_memory(fn: Callable[[], Any], leaves: Sequence[torch.Tensor]) -> int:
    """Most bytes in use at a time beyond what was before ``fn``, gradients of ``leaves`` included."""
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def host_microseconds(fn: Callable[[], Any], leaves: Sequence[torch.Tensor], device: str, calls: int = 50) -> float:
    """Median time until ``fn`` returns, nothing before it being under way on the device."""
    times = []
    for _ in range(calls):
        for leaf in leaves:
            leaf.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return 1e6 * sorted(times)[calls // 2]
