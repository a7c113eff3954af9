"""One loss by one provider: what a step of it costs."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from fusedyolo.tools import timing
from fusedyolo.tools.parity import Loss, Step, bound
from fusedyolo.tools.registry import CASES, Case, Workload

from . import peers
from .count import Counts, count
from .sampling import Sample

MOST, LEAST = 48, 4  # programs of a launch that are counted, see Plan
FUSED, EAGER, COMPILE = "fused", "eager", "compile"
FULL = ("full_ms_p20", "full_ms_p50", "full_ms_p80")


def provide(case: Case, provider: str, work: Workload, device: str = "cpu") -> Loss:
    """The loss of a case, bound to a workload: ours on its two backends, the reference compiled, or a peer's."""
    if provider not in (FUSED, EAGER, COMPILE):
        return peers.PEERS[provider].loss(case, work, device)
    criterion = case.build(work.classes, "triton" if provider == FUSED else "torch")
    if provider == COMPILE:
        torch._dynamo.reset()  # of another workload's code, which would make this one's dynamic or not compiled at all
        criterion = torch.compile(criterion, dynamic=False)
    return case.bind(criterion, work, device)


def ready(case: Case, work: Workload, provider: str, device: str = "cpu", empty: bool = False) -> Step:
    """A step of a loss by a provider."""
    return bound(provide(case, provider, work, device), case, work, device, empty)


def count_step(case: Case, work: Workload, provider: str, exact: bool = False) -> Counts:
    """Counts of forward and backward, of a call that is not the first.

    The eager reference has no shape that depends on data, so that it is counted without any: on the meta device. The
    kernels run in Triton's interpreter, of a launch some programs of each kind, or with ``exact`` all.
    """
    device = "meta" if provider == EAGER else "cpu"
    ready(case, replace(work.small(), batch=1, size=min(64, max(case.strides))), provider, device)()  # the first
    step = ready(case, work, provider, device)
    if provider != FUSED or exact:
        return count(step)
    sample = Sample(case, work, step.targets, MOST, LEAST)
    with sample.completed():
        return count(step, sample.plan)


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
        ready(case, work, COMPILE, empty=True)()
    return found | {"graph_breaks": sum(counters["graph_break"].values())}


# ---------------------------------------------------------------------------------------------------------------- a GPU


def time_step(case: Case, work: Workload, provider: str, device: str = "cuda") -> dict[str, float]:
    """Forward and backward: milliseconds at p20, p50 and p80 with a cold cache, forward alone at p50, most bytes in
    use, microseconds until the host goes on, milliseconds in which the GPU works; of the fused loss also milliseconds
    by replay of a graph, without its time on the host, and microseconds of each launch.
    """
    step = ready(case, work, provider, device)
    found = dict(zip(FULL, timing.by_events(step, step.preds), strict=True))
    found["forward_ms_p50"] = timing.by_events(lambda: step.loss(step.preds, step.targets), step.preds)[1]
    found["peak_bytes"] = timing.peak_memory(step, step.preds)
    found["host_us"] = timing.host_microseconds(step, step.preds, device)
    found["busy_ms"] = timing.busy(step, step.preds)
    if provider == FUSED:
        with suppress(ValueError):  # a profiler may lose an event: then nothing is known of launches
            launches = timing.by_launch(step, step.preds)
            found |= {f"{name}.p50_us": microseconds for name, microseconds in launches.items()}
        found["graph_ms_p50"] = timing.by_replay(step, step.preds)[1]
    return found


def run_fused(name: str, steps: int = 3) -> None:
    """Steps of the fused loss on a GPU and nothing beside them, for a profiler to look at."""
    step = ready(CASES[name], Workload(), FUSED, "cuda")
    for _ in range(steps):
        step()
    torch.cuda.synchronize()
