"""Where a training step goes: the times of its phases, and where the loss makes the host wait."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import record_function

from .count import count

PHASES = ("data", "forward", "loss", "backward", "optimiser")
WARM_UP, WATCHED, TRACED = 1, 2, 2  # steps that are not timed: the very first, those whose waits are counted, the last
BLOCK = 20  # steps that a run takes before the other has its turn


class Block(NamedTuple):
    """Steps that a run takes at a stretch: ``"warm-up"``, ``"watched"``, ``"timed"`` or ``"traced"``."""

    kind: str
    steps: range


def blocks(steps: int) -> list[Block]:
    """The blocks of a run. Of a short run the last steps are traced, the ones before watched, and none timed."""
    end = max(0, steps - TRACED)
    warm = min(WARM_UP, max(0, end - 1))
    begin = min(end, warm + WATCHED)
    found = [Block("warm-up", range(warm)), Block("watched", range(warm, begin))]
    found += [Block("timed", range(i, min(i + BLOCK, end))) for i in range(begin, end, BLOCK)]
    return [block for block in [*found, Block("traced", range(end, steps))] if block.steps]


def turns(*steps: int) -> list[tuple[int, Block]]:
    """Whose turn it is, and for which steps: A B B A A B B A ..., so that a drift of clocks is no one's advantage."""
    order = []
    for k, pair in enumerate(zip_longest(*map(blocks, steps))):
        due = [(run, block) for run, block in enumerate(pair) if block]
        order += due[::-1] if k % 2 else due
    return order


class Times(NamedTuple):
    """Seconds of one step by phase, and of the whole ``"step"``, and the kind of the block it belongs to."""

    kind: str
    seconds: dict[str, float]


class Clock:
    """Times the phases of the steps of one run on the device's clock, and names them in a trace."""

    def __init__(self, device: torch.device, name: str):
        self.gpu, self.name = device.type == "cuda", name
        self.steps: list[Times] = []
        self._marks: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step."""
        start = self._stamp()
        with record_function(f"{self.name}: {name}"):
            yield
        self._marks.append((name, start, self._stamp()))

    def settle(self, kind: str) -> None:
        """A block is over: wait for the device, and read its events."""
        if self.gpu:
            torch.cuda.synchronize()
        for first in range(0, len(self._marks), len(PHASES)):
            marks = self._marks[first : first + len(PHASES)]
            seconds = {name: self._elapsed(start, end) for name, start, end in marks}
            self.steps.append(Times(kind, seconds | {"step": self._elapsed(marks[0][1], marks[-1][2])}))
        self._marks.clear()

    def _stamp(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start


def summarise(steps: Sequence[Times]) -> dict[str, float]:
    """Median seconds of each phase and of a step, of the timed steps, or of all where none are timed."""
    used = [step.seconds for step in steps if step.kind == "timed"] or [step.seconds for step in steps]
    return {name: median(seconds[name] for seconds in used) for name in (*PHASES, "step")}


def waits(fn: Callable[[], Any], gpu: bool) -> tuple[Any, Counter[str]]:
    """What ``fn`` returns, and by line of code how often it makes the host wait for the GPU; without a GPU by operator,
    how often it would.
    """
    if not gpu:
        results: list[Any] = []
        counts = count(lambda: results.append(fn()))
        return results[0], counts.sync_ops
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            result = fn()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    waited = [each for each in said if "synchronizing CUDA operation" in str(each.message)]
    return result, Counter("/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}" for each in waited)
