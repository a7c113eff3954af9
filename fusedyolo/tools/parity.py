"""Whether a loss gives the numbers of the eager reference in float64: the gate before every other measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape

from .registry import Case, RefusedError, Workload
from .terminal import PASSES, table

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


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """PyTorch's, where it has them, if ``wanted``."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(wanted or before[0], warn_only=not before[0] or before[1])
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def parity(
    case: Case, work: Workload, device: str = "cpu", others: Mapping[str, Callable[[Workload, str], Loss]] | None = None
) -> dict[str, Any]:
    """The kernels, the eager reference and ``others`` against the reference in float64 on the same predictions.

    The loss error is that of the total, of ours the largest of total and parts, relative to the total; the gradient
    error is the largest of all entries, relative to the largest entry. What passes is at most ``TOLERANCE`` beyond the
    eager reference's own error, in bfloat16 on a CPU a last digit, for there Triton's interpreter cuts off what GPUs
    round; the kernels must find as many positives, too.

    Args:
        case: the loss.
        work: what it is given; cut to a size that takes seconds in Triton's interpreter.
        device: where the predictions lie.
        others: by name, what makes a loss for a workload and a device.

    Returns:
        ``errors``, of the loss and of the gradient, by name, ours are ``eager`` and ``fused``; ``positives``;
        ``failed``, the names of those that do not pass; ``broken``, of those that raised, what they said.

    Raises:
        RefusedError: ``FUSEDYOLO_DISABLE`` is set, and the reference would be compared with itself.
    """
    from .. import backend as backends  # loads Triton, and ``check`` must choose the interpreter before that

    if backends.is_on("FUSEDYOLO_DISABLE"):
        raise RefusedError("FUSEDYOLO_DISABLE is set: no kernel would be launched")
    work = work.small()

    def ours(backend: str) -> Callable[[Workload, str], Loss]:
        return lambda work, device: case.bind(case.build(work.classes, backend), work, device)

    def numbers(make: Callable[[Workload, str], Loss], exact: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
        preds = case.predictions(work, device)
        if exact:
            preds = [pred.detach().double().requires_grad_() for pred in preds]
        out = step(make(work, device), preds, case.targets(work, device), torch.ones((), device=device))
        values = torch.stack([out.total.detach(), *getattr(out, "parts", {}).values()]).double()
        grads = torch.cat([pred.grad.double().flatten() for pred in preds if pred.grad is not None])
        return values, grads, int(getattr(out, "num_pos", 0))

    makers = {"eager": ours("torch"), "fused": ours("triton"), **(others or {})}
    values, grads, positives = numbers(makers["eager"], exact=True)
    errors, failed, broken = {}, [], {}
    cut = device == "cpu" and work.dtype == "bfloat16"
    tolerance = torch.finfo(torch.bfloat16).eps if cut else TOLERANCE
    for name, make in makers.items():
        try:
            # where indices meet, what a peer stores last counts: on a GPU there is no last one otherwise
            with deterministic_algorithms(name in (others or {})):
                own, own_grads, own_positives = numbers(make)
        except Exception as error:  # what a kernel, a compiler or another package may raise; the others are compared
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            failed.append(name)
            continue
        loss_error = float((own - values[: len(own)]).abs().max() / values[0].abs())
        errors[name] = loss_error, float((own_grads - grads).abs().max() / grads.abs().max())
        within = (a <= b + tolerance for a, b in zip(errors[name], errors["eager"], strict=True))  # NaN is not
        if not all(within) or (name == "fused" and own_positives != positives):
            failed.append(name)
    return {"errors": errors, "positives": positives, "failed": failed, "broken": broken}


def parity_table(where: str, found: Mapping[str, Mapping[str, Any] | None]) -> Group:
    """What :func:`parity` found by loss, and what broke; ``None`` where nothing was found. ``where`` kernels ran."""
    title = f"Errors against the reference in float64, relative to the largest entry; kernels {where}"
    made, said = table(title, ("loss", "provider"), ("loss", "gradient", "assigned", "")), []
    for name, result in found.items():
        if result is None:
            made.add_row(name, "fused", "?", "?", "?", "[bold red]did not run[/]", end_section=True)
            continue
        label, positives = name, str(result["positives"])
        for provider in dict.fromkeys((*result["errors"], *result["broken"])):
            errors = [f"{error:.1e}" for error in result["errors"].get(provider, ())] or ["?", "?"]
            made.add_row(label, provider, *errors, positives, PASSES[provider not in result["failed"]])
            label = positives = ""
        made.add_section()
        said += [f"[yellow]{name}, {provider}:[/] {escape(why)}" for provider, why in result["broken"].items()]
    return Group(made, *said)
