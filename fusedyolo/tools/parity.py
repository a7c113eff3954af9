"""Whether a loss gives the numbers of the eager reference in float64: the gate before every other measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .registry import Case, Workload

TOLERANCE = 1e-5  # beyond the eager reference's own error

Loss = Callable[[Any, Any], Any]
"""A loss as a function of predictions and targets alone; what it returns has a ``total``."""


def step(loss: Loss, preds: list[torch.Tensor], targets: Any, one: torch.Tensor) -> Any:
    """Forward and backward of a bound loss; ``one`` is the gradient of the total, made beforehand."""
    out = loss(preds, targets)
    out.total.backward(gradient=one)
    return out


@dataclass(eq=False)
class Step:
    """A bound loss with all that a training step of it takes."""

    loss: Loss
    preds: list[torch.Tensor]
    targets: Any
    one: torch.Tensor

    def __call__(self) -> Any:
        """Do one."""
        return step(self.loss, self.preds, self.targets, self.one)


def bound(loss: Loss, case: Case, work: Workload, device: str = "cpu", empty: bool = False) -> Step:
    """A step of a loss on what a workload has; predictions may be left ``empty``."""
    one = torch.ones((), device=device)
    return Step(loss, case.predictions(work, device, empty), case.targets(work, device), one)


def parity(
    case: Case, work: Workload, device: str = "cpu", others: Mapping[str, Callable[[Workload, str], Loss]] | None = None
) -> dict[str, Any]:
    """The kernels, the eager reference and ``others`` against the reference in float64 on the same predictions.

    The loss error is that of the total, of the kernels the largest of total and parts, relative to the total; the
    gradient error is the largest of all entries, relative to the largest entry. What passes is at most ``TOLERANCE``
    beyond the eager reference's own error.

    Args:
        case: the loss.
        work: what it is given; cut to a size that takes seconds in Triton's interpreter.
        device: where the predictions lie.
        others: by name, what makes a loss for a workload and a device.

    Returns:
        ``{name}_loss_error`` and ``{name}_grad_error`` of ``fused``, ``eager`` and each of ``others``; ``positives``;
        ``ok`` of the kernels; ``failed``, the names of those of ``others`` that do not pass; ``broken``, of those that
        raised, what they said.
    """
    work = work.small()

    def build(backend: str) -> Loss:
        return case.bind(case.build(work.classes, backend), work, device)

    makers: dict[str, Callable[[], Loss]] = {
        "truth": partial(build, "torch"),
        "eager": partial(build, "torch"),
        "fused": partial(build, "triton"),
    }
    ours = tuple(makers)
    makers |= {name: partial(make, work, device) for name, make in (others or {}).items()}
    targets, found, broken = case.targets(work, device), {}, {}
    for name, make_loss in makers.items():
        preds = case.predictions(work, device)
        if name == "truth":
            preds = [pred.detach().double().requires_grad_() for pred in preds]
        try:
            out = step(make_loss(), preds, targets, torch.ones((), device=device))
        except Exception as error:  # what another package may raise; ours are compared all the same
            if name in ours:
                raise
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        values = torch.stack([out.total.detach(), *(out.parts.values() if name in ours else ())]).double()
        found[name] = values, torch.cat([p.grad.double().flatten() for p in preds if p.grad is not None]), out

    values, grads, out = found["truth"]
    result: dict[str, Any] = {"positives": int(out.num_pos), "broken": broken}
    for name in found:
        own = found[name][0]
        result[f"{name}_loss_error"] = float((own - values[: len(own)]).abs().max() / values[0].abs())
        result[f"{name}_grad_error"] = float((found[name][1] - grads).abs().max() / grads.abs().max())

    def passes(name: str) -> bool:  # a NaN does not
        return all(
            result[f"{name}_{metric}"] <= result[f"eager_{metric}"] + TOLERANCE
            for metric in ("loss_error", "grad_error")
        )

    result["failed"] = [name for name in others or {} if name in broken or not passes(name)]
    result["ok"] = passes("fused") and int(found["fused"][2].num_pos) == result["positives"]
    return result
