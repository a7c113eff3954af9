"""The turns of training runs, and the times of the phases of their steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise, zip_longest
from statistics import median
from typing import Any

import torch
from torch.profiler import record_function

PHASES = ("data", "forward", "loss", "backward", "optimiser")
WARM_UP, TRACED = 1, 2  # steps that are not timed, the first and the last
BLOCK = 20  # steps that a run takes before another has its turn


def turns(*steps: int) -> list[tuple[int, range]]:
    """Whose turn it is, and for which steps: A B B A A B B A ..., so that a drift of clocks is no one's advantage. The
    last ``TRACED`` steps of a run are a block of their own.
    """
    cuts = [(*range(0, max(0, n - TRACED), BLOCK), max(0, n - TRACED), n) for n in steps]
    blocks = [[range(*each) for each in pairwise(own)] for own in cuts]
    order = []
    for k, each in enumerate(zip_longest(*blocks, fillvalue=range(0))):
        due = [(run, block) for run, block in enumerate(each) if block]
        order += due[::-1] if k % 2 else due
    return order


class Clock:
    """Times the phases of each step of a run on the device's clock, and names them in a trace.

    Attributes:
        steps: seconds by phase, and of the whole ``"step"``.
    """

    def __init__(self, device: torch.device, name: str):
        self.gpu, self.name = device.type == "cuda", name
        self.steps: list[dict[str, float]] = []
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step; all of :data:`PHASES` follow one another."""
        start = self._stamp()
        with record_function(f"{self.name}: {name}"):
            yield
        self._marks.append((start, self._stamp()))

    def settle(self) -> None:
        """A block is over: wait for the device, and read its events."""
        if self.gpu:
            torch.cuda.synchronize()
        for first in range(0, len(self._marks), len(PHASES)):
            marks = self._marks[first : first + len(PHASES)]
            seconds = {name: self._elapsed(*mark) for name, mark in zip(PHASES, marks, strict=True)}
            self.steps.append(seconds | {"step": self._elapsed(marks[0][0], marks[-1][1])})
        self._marks.clear()

    def _stamp(self) -> Any:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.gpu else end - start


def summarise(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median seconds of each phase and of a step, of those that are timed, or of all where none are."""
    used = steps[WARM_UP:-TRACED] or steps
    return {name: median(each[name] for each in used) for name in (*PHASES, "step")}
