"""One loss by one provider: what a step of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes

import fusedyolo
from fusedyolo.targets import Targets
from fusedyolo.tools import timing
from fusedyolo.tools.parity import Loss, step
from fusedyolo.tools.registry import CASES, Case, CellCase, DenseCase, Workload

from . import peers
from .count import Counts, OnProgram, Sample, count

FUSED, EAGER, COMPILE = "fused", "eager", "compile"


def provide(case: Case, provider: str, work: Workload, device: str = "cpu") -> Loss:
    """The loss of a case, bound to a workload: ours on its two backends, the reference compiled, or a peer's."""
    if provider not in (FUSED, EAGER, COMPILE):
        return peers.PEERS[provider].loss(case, work, device)
    criterion = case.build(work.classes, "triton" if provider == FUSED else "torch")
    if provider == COMPILE:
        torch._dynamo.reset()  # of another workload's code, which would make this one's dynamic or not compiled at all
        criterion = torch.compile(criterion, dynamic=False)
    return case.bind(criterion, work, device)


def count_step(
    case: Case,
    work: Workload,
    provider: str,
    on_program: OnProgram | None = None,
    exact: bool = False,
) -> Counts:
    """Counts of forward and backward, of a call that is not the first.

    The eager reference has no shape that depends on data, so that it is counted without any: on the meta device. The
    kernels run in Triton's interpreter, of a launch some programs of each kind, or with ``exact`` all.
    """
    device = "meta" if provider == EAGER else "cpu"
    one = torch.ones((), device=device)
    tiny = replace(work.small(), batch=1, size=max(case.strides))
    step(provide(case, provider, tiny, device), case.predictions(tiny, device), case.targets(tiny, device), one)
    loss, preds = provide(case, provider, work, device), case.predictions(work, device)
    targets = case.targets(work, device)
    sample = Sample(kinds) if provider == FUSED and not exact else None
    with filled_in(case, work, targets) if sample and isinstance(case, DenseCase) else nullcontext():
        return count(lambda: step(loss, preds, targets, one), on_program, sample)


def kinds(kernel: str, programs: int, arguments: Mapping[str, Any]) -> Sequence[int]:
    """What work each program of one of our launches has: which stream or level it is of, and how large its tile is."""
    if kernel in ("grid_kernel", "grid_grad_kernel"):
        cells = arguments["CELLS"]
        return [
            level * (cells + 1) + min(cells, size - tile * cells)
            for level, (own, size) in enumerate(zip(arguments["LEVELS"], arguments["HWs"], strict=True))
            for _ in range(arguments["B"] * len(own))
            for tile in range(-(-size // cells))
        ]
    if kernel == "dense_kernel":
        levels = arguments["levels"]
        streams = [(n - 3) // 2 for n in (*levels.box_programs, *levels.class_programs)]  # made odd
        return [stream for stream, count in enumerate(streams) for _ in range(count)]
    if kernel in ("overlap_kernel", "match_kernel"):
        blocks = -(-arguments["N"] // arguments["SPEC"].BLOCK)
        return [int(p % blocks == blocks - 1) for p in range(programs)]
    return [0] * programs


UNIFORM = ("dense_kernel", "rank_kernel")
"""Kernels whose programs execute as much as the others of their kind."""


class Effort:
    """How much programs of one kind have to do, as far as the reference knows: it tells which predictions are assigned,
    and the targets how many rows an image has.
    """

    def __init__(self, case: Case, work: Workload, targets: Any):
        rows = targets.rows if isinstance(targets, Targets) else targets
        self.rows = torch.bincount(rows[:, 0].long(), minlength=work.batch).tolist()
        self.assigned: list[torch.Tensor] = []  # [B, A, H * W] of each level of a grid
        if not isinstance(case, (CellCase, DenseCase)):
            preds = [p.detach() for p in case.predictions(work)]
            found = fusedyolo.assign(case.build(work.classes, "torch"), preds, targets)
            self.assigned = [(level.row >= 0).flatten(2) for level in found.levels]

    def of(self, kernel: str, kinds: Sequence[int], arguments: Mapping[str, Any]) -> tuple[Sequence[Any], list[float]]:
        """Of each program a kind that is finer where it must be, and a number that grows with its instructions."""
        programs = len(kinds)
        if kernel in ("grid_kernel", "grid_grad_kernel"):
            counts = [
                (tile.sum().item(), self.rows[image])
                for level in self.assigned
                for image, planes in enumerate(level)
                for plane in planes
                for tile in plane.split(arguments["CELLS"])
            ]
            finer = [(kind, assigned > 0) for kind, (assigned, _) in zip(kinds, counts, strict=True)]
            return finer, [4.0 * assigned + rows for assigned, rows in counts]
        if kernel in ("overlap_kernel", "match_kernel"):
            blocks = -(-arguments["N"] // arguments["SPEC"].BLOCK)
            return kinds, [float(self.rows[program // blocks]) for program in range(programs)]
        return kinds, [0.0] * programs


@contextmanager
def filled_in(case: DenseCase, work: Workload, targets: Any) -> Iterator[None]:
    """After a launch of which a part was run, what the rest would have left for later launches is put there: matches
    and cross-entropies, both taken from the eager reference.
    """
    from fusedyolo.ops.launch import Launch

    criterion = case.build(work.classes, "torch")
    rows = [p.detach() for p in case.predictions(replace(work, layout="rows"))]
    found = fusedyolo.assign(criterion, tuple(rows), targets, **case.geometry(work))
    match = torch.where(found.ignored & (found.row < 0), -2, found.row)
    run = Launch.run

    def run_and_fill(self: Launch) -> None:
        run(self)
        with _disable_current_modes():  # not to be counted
            fill(self)

    def fill(self: Launch) -> None:
        arguments = self.arguments
        if self.kernel.__name__ == "match_kernel":
            arguments["matched"].match_ptr.copy_(match)
            own = (match >= 0).sum(1)
            arguments["matched"].found_ptr.copy_(torch.cat((own, own.sum(0, keepdim=True))))
        elif self.kernel.__name__ == "dense_kernel" and arguments["SPEC"].RANKED and arguments["SPEC"].WITH_LOSS:
            label = found.label.clamp(min=0)  # 0 is the background
            for image, (logits, classes) in enumerate(zip(rows[0].float(), label, strict=True)):
                arguments["ranked"].ce_ptr[image] = functional.cross_entropy(logits, classes, reduction="none")

    with mock.patch.object(Launch, "run", run_and_fill):
        yield


def count_compiled(case: Case, work: Workload) -> dict[str, int]:
    """What ``torch.compile`` makes of the eager reference, by Inductor's own scheduler, for this CPU.

    Everything is done but the generation of code, so nothing is compiled or run.

    Returns:
        ``kernels``, what is left after fusion; ``bytes``, what those read and write; ``graph_breaks``.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config
    from torch._inductor.graph import GraphLowering
    from torch._inductor.scheduler import NopKernelSchedulerNode

    found = {"kernels": 0, "bytes": 0}

    def schedule_only(self: GraphLowering) -> SimpleNamespace:
        self.init_wrapper_code()
        self._update_scheduler()
        moved, nodes, _ = self.count_bytes()
        found["kernels"] += sum(not isinstance(node, NopKernelSchedulerNode) for node, _ in nodes)
        found["bytes"] += moved
        returned = [getattr(node, "meta", {}).get("val") for node in self.orig_gm.graph.output_node().args[0]]

        def call(arguments: list[Any]) -> list[torch.Tensor | None]:
            arguments.clear()
            return [
                v if v is None else torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device)
                for v in returned
            ]

        return SimpleNamespace(call=call)

    counters.clear()
    settings = config.patch(fx_graph_cache=False)
    with settings, mock.patch.object(GraphLowering, "compile_to_module", schedule_only):
        step(provide(case, COMPILE, work), case.predictions(work, empty=True), case.targets(work), torch.ones(()))
    return found | {"graph_breaks": sum(counters["graph_break"].values())}


# ---------------------------------------------------------------------------------------------------------------- a GPU


def time_step(case: Case, work: Workload, provider: str, device: str = "cuda", quick: bool = False) -> dict[str, float]:
    """Milliseconds at p20, p50, p80 of each mode, by events and by replay of a graph; memory, host time, cold start.

    ``cold_s`` is the very first step of the process, compilation included; what a provider cannot do (a graph of a loss
    that waits for the host) is left out. ``quick`` measures forward and backward by events alone.
    """
    one = torch.ones((), device=device)
    preds, targets = case.predictions(work, device), case.targets(work, device)
    if provider == COMPILE:
        import torch._functorch.config as functorch_config

        functorch_config.donated_buffer = False  # so that one forward serves many backwards
    start = time.perf_counter()
    loss = provide(case, provider, work, device)
    step(loss, preds, targets, one).total.item()
    result = {} if quick else {"cold_s": time.perf_counter() - start}

    def full() -> None:
        step(loss, preds, targets, one)

    if quick:
        return result | _quantiles("full_ms", timing.by_events(full, preds))
    kept = [loss(preds, targets).total]

    def no_grad() -> None:
        with torch.no_grad():
            loss(preds, targets)

    modes: dict[str, Callable[[], Any]] = {
        "no_grad": no_grad,
        "forward": lambda: loss(preds, targets),
        "backward": lambda: kept[0].backward(gradient=one, retain_graph=True),
        "full": full,
    }
    for mode, fn in modes.items():
        result |= _quantiles(f"{mode}_ms", timing.by_events(fn, preds))
    kept.clear()
    result["peak_bytes"] = timing.peak_memory(full, preds)
    tiny = replace(work.small(), batch=1, size=max(case.strides))
    few, rows = case.predictions(tiny, device), case.targets(tiny, device)
    small = provide(case, provider, tiny, device)
    step(small, few, rows, one)
    result["host_us"] = timing.host_microseconds(lambda: step(small, few, rows, one), few, device)
    for mode in ("forward", "full"):  # last, for a capture that fails may leave errors behind
        try:
            result |= _quantiles(f"{mode}_graph_ms", timing.by_replay(modes[mode], preds))
        except RuntimeError:  # it waits for the host
            break
    return result


def run_fused(name: str, steps: int = 3) -> None:
    """Steps of the fused loss on a GPU and nothing beside them, for a profiler to look at."""
    case, work, one = CASES[name], Workload(), torch.ones((), device="cuda")
    loss, preds = provide(case, FUSED, work, "cuda"), case.predictions(work, "cuda")
    targets = case.targets(work, "cuda")
    for _ in range(steps):
        step(loss, preds, targets, one)
    torch.cuda.synchronize()


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"{name}_p{q * 100:.0f}": value for q, value in zip(timing.QUANTILES, values, strict=True)}
