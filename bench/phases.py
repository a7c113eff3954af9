"""Where a training step goes: the times of its phases, what bounds it, and where it makes the host wait."""

from __future__ import annotations

import gzip
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.profiler import record_function

from fusedyolo.tools.timing import QUANTILES

PHASES = ("data", "forward", "loss", "backward", "optimiser")
WARM_UP, WATCHED, TRACED = 1, 2, 2  # steps that are not timed: the very first, those whose waits are counted, the last
BLOCK = 20  # steps that a run takes before the other has its turn
LAUNCHES = ("cuda_runtime", "cuda_driver")  # what a trace calls the calls that hand work to a GPU
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # and that work


# ---------------------------------------------------------------------------------------------------------------- turns


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


# ---------------------------------------------------------------------------------------------------------------- times


class Times(NamedTuple):
    """Seconds of one step by phase: on the device's clock, and until the calls had returned."""

    kind: str
    first: bool  # of its block, with nothing queued before it
    device: dict[str, float]  # and of the whole step
    host: dict[str, float]


class Clock:
    """Times the phases of the steps of one run."""

    def __init__(self, device: torch.device, name: str):
        self.gpu, self.name = device.type == "cuda", name
        self.now = ""  # the phase under way
        self.steps: list[Times] = []
        self._open: list[tuple[str, torch.cuda.Event | float, torch.cuda.Event | float, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step, and name it in a trace."""
        self.now, begin, start = name, time.perf_counter(), self._stamp()
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
            device = {name: _elapsed(start, end) for name, start, end, _ in marks}
            device["step"] = _elapsed(marks[0][1], marks[-1][2])
            self.steps.append(Times(kind, first == 0, device, {name: host for name, *_, host in marks}))
        self._open.clear()

    def _stamp(self) -> torch.cuda.Event | float:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _elapsed(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


class Summary(NamedTuple):
    """Medians over the timed steps of a run, in seconds."""

    device: dict[str, float]  # by phase
    host: dict[str, float]  # by phase; of first steps of a block, as a full queue makes the host wait for the device
    step: tuple[float, ...]  # at each of QUANTILES
    timed: int  # how many steps that is


def summarise(steps: Sequence[Times]) -> Summary:
    """Of the timed steps; of all steps where none are timed."""
    timed = [step for step in steps if step.kind == "timed"]
    used = timed or list(steps)
    first = [step for step in used if step.first]
    return Summary(
        {name: median(step.device[name] for step in used) for name in PHASES},
        {name: median(step.host[name] for step in first) for name in PHASES},
        tuple(np.quantile([step.device["step"] for step in used], QUANTILES).tolist()),
        len(timed),
    )


def busy(trace: Path) -> dict[str, float]:
    """Seconds for which a GPU worked in a step of a trace, by the phase that launched it; empty without a GPU.

    Work of which no launch is known stands under "".
    """
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    launched = {e["args"]["correlation"]: e["ts"] for e in events if e.get("cat") in LAUNCHES}
    named = [e for e in events if e.get("cat") == "user_annotation"]
    phases = [(e["ts"], e["ts"] + e["dur"], e["name"].rpartition(": ")[2]) for e in named]
    found: dict[str, float] = {}
    for work in (e for e in events if e.get("cat") in ON_DEVICE):
        when = launched.get(work["args"].get("correlation"), -1)
        phase = next((name for begin, end, name in phases if begin <= when <= end and name in PHASES), "")
        found[phase] = found.get(phase, 0.0) + work["dur"] / 1e6 / TRACED
    return found


# -------------------------------------------------------------------------------------------------------------- verdict


class Verdict(NamedTuple):
    """What bounds a step, and the share of it that a faster loss could save at most."""

    bound: str  # "GPU-bound", "launch-bound", "data-bound", or "?" where it cannot be told
    why: str
    saving: float


def verdict(device: Mapping[str, float], host: Mapping[str, float], busy: Mapping[str, float]) -> Verdict:
    """What bounds a step: the longer of what the host and the GPU have to do in it.

    Args:
        device: seconds of each phase on the device's clock; a GPU may wait for its host in them.
        host: seconds of each phase until the calls had returned, nothing being queued before.
        busy: seconds for which the GPU computes in a step, by phase; empty without a GPU.

    A loss that costs nothing would still leave the longer of what else the two have to do.
    """
    step = sum(device.values())
    if not busy:
        return Verdict("?", "cannot be told without a trace of a GPU", device["loss"] / step)
    calls, work = sum(host.values()), sum(busy.values())
    loss = busy.get("loss", 0.0) + busy.get("", 0.0)  # what cannot be placed may be the loss's
    rest = max(calls - host["loss"], work - loss)
    saving = 1 - rest / max(step, calls, work)
    why = f"the host is through after {1e3 * calls:.3g} ms, the GPU has {1e3 * work:.3g} ms of work"
    if work >= calls:
        return Verdict("GPU-bound", why, saving)
    if host["data"] >= calls / 2:
        return Verdict("data-bound", f"{why}; batches take the host {1e3 * host['data']:.3g} ms", saving)
    return Verdict("launch-bound", why, saving)


# ---------------------------------------------------------------------------------------------------------------- waits


@contextmanager
def waits(clock: Clock) -> Iterator[Counter[str]]:
    """Count, by phase and line of code, the calls that make the host wait for the GPU."""
    found: Counter[str] = Counter()
    show = warnings.showwarning

    def tally(message, category, filename, lineno, file=None, line=None):
        if "synchronizing CUDA operation" not in str(message):
            return show(message, category, filename, lineno, file, line)
        found[f"{clock.now}: {'/'.join(Path(filename).parts[-2:])}:{lineno}"] += 1

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
        warnings.showwarning = tally
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
