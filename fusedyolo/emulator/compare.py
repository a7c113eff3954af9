"""A computation by compiled kernels against the same in float64: its rounding, its bits by schedule, and its faults."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .device import Device

ARCHS = (80, 90)
FUSION = {"as-shipped": ("as shipped",), "off": ("off",), "both": ("as shipped", "off", "by seed")}

Outputs = dict[str, Tensor]
Step = Callable[[str, bool], Outputs]
"""What is computed, by name, on a backend; of its inputs as they are, or, if true, in float64."""


class Settings(NamedTuple):
    """How kernels are compiled and executed, see :class:`Device`: ``arch`` 90 for sm_90; by so many schedules,
    ``seeds``; ``fusion`` of :data:`FUSION`, ``"both"`` of which also leaves to the seed what ptxas may still fuse;
    ``noise``: approximate instructions are off by what is documented; ``fine``: other threads may come in before every
    access. Floats may be off by ``tolerance``, relative to the largest, beyond the eager reference's own error.
    """

    tolerance: float
    arch: int = 90
    seeds: int = 2
    fusion: str = "as-shipped"
    noise: bool = False
    fine: bool = False

    def allowed(self, value: Tensor) -> float:
        """How far off such a tensor may be: a last digit of the short types, which are rounded once."""
        if not value.is_floating_point():
            return 0.0
        return 1e-12 if value.dtype == torch.float64 else max(self.tolerance, torch.finfo(value.dtype).eps)

    def __str__(self) -> str:
        words = [f"{self.seeds} seed" + "s" * (self.seeds > 1), f"fusion {self.fusion}"]
        return ", ".join(words + ["noise"] * self.noise + ["fine"] * self.fine)


@dataclass
class Found:
    """What a computation was found to do.

    Attributes:
        error: the largest of any output and run, relative to the output's largest entry in float64.
        eager: that of the eager reference in the type of the inputs.
        same: whether every schedule gives the same bits; ``None`` where noise makes them differ.
        unwritten: bytes of outputs that nothing has written, of all runs.
        faults: of the emulator, of all runs.
        programs, instructions: of the first run; instructions are those that warps execute.
        wrong: why it fails; empty if it passes.
    """

    error: float = 0.0
    eager: float = 0.0
    same: bool | None = True
    unwritten: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    programs: int = 0
    instructions: int = 0
    wrong: list[str] = field(default_factory=list)


def compare(step: Step, settings: Settings) -> Found:
    """Run it on the emulator, once for each seed and way of compiling, and compare.

    It passes where every output is within the tolerance, integers are equal to those in float64, schedules give the
    same bits, however fused results agree within the tolerance and gradients are 0 at the same places, nothing is left
    unwritten, and the emulator finds no fault.
    """
    truth, eager = step("torch", True), step("torch", False)
    found = Found(same=None if settings.noise else True)
    first: dict[tuple[str, int], Outputs] = {}
    eager_errors = {key: _error(value, truth[key], truth[key]) for key, value in eager.items()}
    found.eager = max(eager_errors.values())
    for fusion, seed in itertools.product(FUSION[settings.fusion], range(settings.seeds)):
        run = f"seed {seed}" if fusion == "as shipped" else f"seed {seed}, fusion {fusion}"
        alike = fusion, seed if settings.noise or fusion == "by seed" else 0  # runs that give the same bits
        device = Device(
            settings.arch,
            seed,
            fusion=False if fusion == "off" else None,
            contraction=seed if fusion == "by seed" else None,
            noise=settings.noise,
            fine=settings.fine,
        )
        with device:
            out = step("triton", False)
        if not device.launches:
            raise RuntimeError("no kernel was launched; is FUSEDYOLO_DISABLE set?")
        if not first:
            found.programs = sum(record.report.programs for record in device.launches)
            found.instructions = sum(record.report.instructions for record in device.launches)
        found.faults += device.faults
        for key, value in out.items():
            lacking, error = device.missing(value), _error(value, truth[key], truth[key])
            found.unwritten += lacking
            found.error = max(found.error, error)
            limit = eager_errors[key] + settings.allowed(value) if value.is_floating_point() else 0.0
            if lacking:
                found.wrong.append(f"{run}: {lacking} bytes of {key} are not written")
            if error > limit:
                found.wrong.append(f"{run}: {key} is off by {error:.1e}, at most {limit:.1e} is allowed")
        others = [key for key, value in out.items() if not _same_bits(value, first.get(alike, out)[key])]
        if others:
            found.same = False
            found.wrong.append(f"{run}: other bits than seed 0 in {', '.join(others)}")
        first.setdefault(alike, out)
    found.wrong += [f"{count} x {fault}" for fault, count in found.faults.most_common()]
    found.wrong += decided(first, truth, settings)
    return found


def decided(first: Mapping[tuple[str, int], Outputs], truth: Outputs, settings: Settings) -> list[str]:
    """Where kernels that were fused in other ways differ by more than rounding."""
    (_, usual), *others = first.items()
    wrong = []
    for (fusion, seed), out in others:
        name = f"fusion {fusion}, seed {seed}"
        for key, value in out.items():
            if key.startswith("gradient") and not torch.equal(value != 0, usual[key] != 0):
                wrong.append(f"{name}: {key} is 0 at other places")
            by = _error(value, usual[key], truth[key])
            if by > settings.allowed(value):
                wrong.append(f"{name}: {key} differs by {by:.1e}")
    return wrong


def _error(value: Tensor, other: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true entry; infinite for NaN and for another shape."""
    if value.shape != other.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    largest = (value.detach().double() - other.detach().double()).abs().max()
    error = float(largest / truth.detach().double().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)))
