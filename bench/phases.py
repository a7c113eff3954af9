"""Where a training step goes: the times of its phases, and where the loss makes the host wait."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.profiler import record_function

from fusedyolo.tools.timing import QUANTILES

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
    """Seconds of one step by phase: on the device's clock, and until the calls had returned."""

    kind: str
    first: bool  # of its block, with nothing queued before it
    device: dict[str, float]  # and of the whole step
    host: dict[str, float]


class Clock:
    """Times the phases of the steps of one run, and names them in a trace."""

    def __init__(self, device: torch.device, name: str):
        self.gpu, self.name = device.type == "cuda", name
        self.steps: list[Times] = []
        self._open: list[tuple[str, Any, Any, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step."""
        begin, start = time.perf_counter(), self._stamp()
        with record_function(f"{self.name}: {name}"):
            yield
        host = time.perf_counter() - begin
        self._open.append((name, start, self._stamp(), host))

    def settle(self, kind: str) -> None:
        """A block is over: wait for the device, and read its events."""
        if self.gpu:
            torch.cuda.synchronize()
        for first in range(0, len(self._open), len(PHASES)):
            marks = self._open[first : first + len(PHASES)]
            device = {name: self._elapsed(start, end) for name, start, end, _ in marks}
            device["step"] = self._elapsed(marks[0][1], marks[-1][2])
            self.steps.append(Times(kind, first == 0, device, {name: host for name, *_, host in marks}))
        self._open.clear()

    def _stamp(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start


def summarise(steps: Sequence[Times]) -> dict[str, Any]:
    """Seconds of the timed steps, of all steps where none are timed: medians by phase, and of a step the quantiles.

    The host's are those of first steps of a block, as a full queue makes the host wait for the device.
    """
    timed = [step for step in steps if step.kind == "timed"]
    used = timed or list(steps)
    step = np.quantile([step.device["step"] for step in used], QUANTILES).tolist()
    return {
        "seconds": {name: median(step.device[name] for step in used) for name in PHASES},
        "host_seconds": {name: median(step.host[name] for step in used if step.first) for name in PHASES},
        "step_seconds": {f"p{100 * q:.0f}": seconds for q, seconds in zip(QUANTILES, step, strict=True)},
        "timed_steps": len(timed),
    }


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count, by line of code, the calls that make the host wait for the GPU."""
    found: Counter[str] = Counter()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            yield found
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for each in said:
        if "synchronizing CUDA operation" in str(each.message):
            found["/".join(Path(each.filename).parts[-2:]) + f":{each.lineno}"] += 1
