"""One loss by one provider: what a step of it costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import _disable_current_modes

import fusedyolo
from fusedyolo.drivers.protocol import Driver, Known
from fusedyolo.targets import Targets
from fusedyolo.tools import timing
from fusedyolo.tools.parity import Loss, step
from fusedyolo.tools.registry import CASES, Case, Workload

from . import peers
from .count import Counts, OnProgram, Plan, Planned, count

MOST, LEAST = 48, 4  # programs of a launch that are counted, see Plan
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
    if provider != FUSED or exact:
        return count(lambda: step(loss, preds, targets, one), on_program)
    reference = known(case, work, targets)
    with completed(case.driver, reference):
        return count(lambda: step(loss, preds, targets, one), on_program, planned(case.driver, reference, MOST, LEAST))


def known(case: Case, work: Workload, targets: Any) -> Known:
    """What the reference knows of a step."""
    work = replace(work, layout="")
    preds = [pred.detach() for pred in case.predictions(work)]
    rows = targets.rows if isinstance(targets, Targets) else targets

    def assign() -> Any:
        criterion = case.build(work.classes, "torch")
        return fusedyolo.assign(criterion, case.pack(preds, work), targets, **case.geometry(work))

    return Known(preds, torch.bincount(rows[:, 0].long(), minlength=work.batch).tolist(), assign)


def planned(driver: Driver, known: Known, most: int, least: int) -> Planned:
    """Which programs of the launches of a driver to run."""

    def plan(kernel: str, programs: int, arguments: Mapping[str, Any]) -> Plan:
        kinds = driver.kinds(kernel, programs, arguments)
        with _disable_current_modes():  # not to be counted
            return Plan(*driver.efforts(kernel, kinds, arguments, known), most, least)

    return plan


@contextmanager
def completed(driver: Driver, known: Known) -> Iterator[None]:
    """After a launch of which a part was run, what the rest would have left for later launches is put there."""
    from fusedyolo.ops.launch import Launch

    run = Launch.run

    def run_and_complete(self: Launch) -> None:
        run(self)
        with _disable_current_modes():
            driver.complete(self.kernel.__name__, self.arguments, known)

    with mock.patch.object(Launch, "run", run_and_complete):
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
