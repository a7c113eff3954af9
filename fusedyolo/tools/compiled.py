"""Compiled kernels, executed by the emulator, against the reference in float64: the cases, and the comparison."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import fusedyolo

from ..emulator import Device
from ..terms import term_names
from .parity import TOLERANCE
from .registry import CASES, RefusedError, Workload
from .registry import Case as LossCase

ARCHS = (80, 90)
FUSION = {"as-shipped": ("as shipped",), "off": ("off",), "both": ("as shipped", "off", "by seed")}
SMALL = Workload(batch=2, size=64, classes=3, seed=3)
WEIGHTS = (1.0, 0.75)  # gradients of the total; dense heads have launches that do their work for others than 1 only
WEIGHED = ("YOLOv1/paper", "YOLOv2/region", "YOLOv4/darknet", "YOLOv5", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8")
"""Losses that are also run with weights of rows, and ignored regions."""
LABEL_LOSSES = ("sigmoid_focal_loss", "quality_focal_loss", "varifocal_loss")

Outputs = dict[str, Tensor]
Step = Callable[[str, bool], Outputs]
"""What a case computes, by name, on a backend; of its inputs as they are, or, if true, in float64."""
Case = Callable[[Workload], Step]


class Settings(NamedTuple):
    """How kernels are compiled and executed, see :class:`fusedyolo.emulator.Device`: ``arch`` 90 for sm_90; by so many
    schedules, ``seeds``; ``fusion`` of :data:`FUSION`, ``"both"`` of which also leaves to the seed what ptxas may still
    fuse; ``noise``: approximate instructions are off by what is documented; ``fine``: other threads may come in before
    every access.
    """

    arch: int = 90
    seeds: int = 2
    fusion: str = "as-shipped"
    noise: bool = False
    fine: bool = False


@dataclass
class Found:
    """What a case was found to do.

    Attributes:
        error: the largest of any output and run, relative to the output's largest entry in float64.
        eager: that of the eager reference in the type of the inputs.
        same: whether every schedule gives the same bits; ``None`` where noise makes them differ.
        unwritten: bytes of outputs that nothing has written, of all runs.
        faults: of the emulator, of all runs.
        programs, instructions: of the first run; instructions are those that warps execute.
        wrong: why the case fails; empty if it passes.
    """

    error: float = 0.0
    eager: float = 0.0
    same: bool | None = True
    unwritten: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    programs: int = 0
    instructions: int = 0
    wrong: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------ cases


def _loss(case: LossCase, work: Workload, weighed: bool = False) -> Step:
    """A training step: total, parts, counts, and a gradient for each of :data:`WEIGHTS`; of targets that may be
    ``weighed``.
    """
    work = replace(work, batch=max(work.batch, case.images))
    targets = case.targets(work)
    if weighed:
        targets = _weighed(targets, case.background, work.batch)

    def step(backend: str, exact: bool) -> Outputs:
        preds = [_as(pred, exact).requires_grad_() for pred in case.predictions(work)]
        out = case.bind(case.build(work.classes, backend), work)(preds, targets)
        found = {"total": out.total, **out.parts, "num_pos": out.num_pos, "num_invalid": out.num_invalid}
        for weight in WEIGHTS:
            grads = torch.autograd.grad(out.total, preds, out.total.new_tensor(weight), retain_graph=True)
            found |= {f"gradient {i} of {weight}": grad for i, grad in enumerate(grads)}
        return found

    return step


def _weighed(rows: Tensor, label: int, batch: int) -> Tensor:
    """Rows with weights, and behind them as many ignored regions as a program tests at a time, and some more; the last
    image is one.
    """
    generator = torch.Generator().manual_seed(len(rows))
    weights = torch.tensor((1.0, 0.5, 0.0, float("nan"), 2.0)).repeat(len(rows))[: len(rows)]
    boxes = torch.cat((torch.rand(40, 2, generator=generator), torch.full((40, 2), 0.25)), 1)
    boxes[-1] = torch.tensor((0.5, 0.5, 1.0, 1.0))
    image = torch.zeros(40, 1)
    image[-1] = batch - 1
    regions = torch.cat((image, image * 0 + label, boxes, image * 0 - 1), 1)
    return torch.cat((torch.cat((rows, weights[:, None]), 1), regions))


def _select(case: LossCase, work: Workload) -> Step:
    """Detections, of logits that are high here and there."""

    def step(backend: str, exact: bool) -> Outputs:
        generator = torch.Generator().manual_seed(work.seed)
        preds = [pred.detach() for pred in case.predictions(work)]
        preds = [_as(p + 3.5 * (torch.rand(p.shape, generator=generator) > 0.7).to(p.dtype), exact) for p in preds]
        criterion = case.build(work.classes, backend)
        return fusedyolo.select(case.pack(preds, work), criterion, 0.2, 0.4, 20, backend=backend)._asdict()

    return step


def _pointwise(work: Workload) -> Step:
    """The losses of ``fusedyolo.functional``, with values and gradients."""
    generator = torch.Generator().manual_seed(work.seed)
    corner, sides, shift = (torch.rand(shape, generator=generator) for shape in ((700, 2), (700, 2), (700, 4)))
    first = torch.cat([corner, corner + sides + 0.1], 1)
    labels = torch.randn(1300, generator=generator), torch.rand(1300, generator=generator)
    boxes = first, first + 0.2 * shift

    def step(backend: str, exact: bool) -> Outputs:
        kind = torch.float64 if exact else getattr(torch, work.dtype)
        calls: dict[str, tuple[tuple[Tensor, Tensor], Callable[..., Tensor]]] = {
            name: (labels, partial(getattr(fusedyolo.functional, name), reduction="sum")) for name in LABEL_LOSSES
        }
        for name in term_names("iou", users=True):
            calls[f"box_iou_loss {name}"] = boxes, partial(fusedyolo.functional.box_iou_loss, kind=name, image_size=2)
        found = {}
        for name, (pair, loss) in calls.items():
            given, wanted = (each.to(getattr(torch, work.dtype)).to(kind) for each in pair)
            given.requires_grad_()
            value = loss(given, wanted, backend=backend)
            found[name] = value
            (found[f"gradient of {name}"],) = torch.autograd.grad(value, given, torch.ones_like(value))
        return found

    return step


def _as(value: Tensor, exact: bool) -> Tensor:
    return value.detach().double() if exact else value.detach()


@lru_cache(maxsize=1)
def cases() -> dict[str, Case]:
    """All cases by name: every loss, one of each way to share and to match with weights, ``select`` once for each class
    term where kernels read predictions, the rest.
    """
    scanned = {case.head(SMALL.classes).label: case for case in reversed(CASES.values()) if case.driver.scans}
    found: dict[str, Case] = {name: partial(_loss, case) for name, case in CASES.items()}
    found |= {f"weighed/{CASES[name].loss}": partial(_loss, CASES[name], weighed=True) for name in WEIGHED}
    found |= {f"select/{case.loss}": partial(_select, case) for case in scanned.values()}
    return found | {"pointwise": _pointwise}


def ready() -> None:
    """Raises:
    RefusedError: kernels cannot be compiled in this process.
    """
    try:
        with Device():
            pass
    except ImportError:
        raise RefusedError("--compiled: Triton is not installed, and there is nothing to compile with") from None
    except RuntimeError as error:
        raise RefusedError(f"--compiled: {error}") from None


# ------------------------------------------------------------------------------------------------------- comparison


def compare(step: Step, settings: Settings) -> Found:
    """Run a case on the emulator, once for each seed and way of compiling, and compare.

    It passes where every output is at most the tolerance of its type beyond the eager reference's own error, integers
    are equal to those in float64, schedules give the same bits, however fused results agree within that tolerance and
    gradients are 0 at the same places, nothing is left unwritten, and the emulator finds no fault.
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
        lacking = {key: device.missing(value) for key, value in out.items()}
        found.unwritten += sum(lacking.values())
        found.wrong += [f"{run}: {number} bytes of {key} are not written" for key, number in lacking.items() if number]
        for key, value in out.items():
            error = _error(value, truth[key], truth[key])
            found.error = max(found.error, error)
            limit = eager_errors[key] + _tolerance(value.dtype) if value.is_floating_point() else 0.0
            if error > limit:
                found.wrong.append(f"{run}: {key} is off by {error:.1e}, at most {limit:.1e} is allowed")
        same = [key for key, value in out.items() if _bits(value, first.get(alike, out)[key])]
        if len(same) < len(out):
            found.same = False
            found.wrong.append(f"{run}: other bits than seed 0 in {', '.join(key for key in out if key not in same)}")
        first.setdefault(alike, out)
    found.wrong += [f"{count} x {fault}" for fault, count in found.faults.most_common()]
    found.wrong += decided(first, truth)
    return found


def decided(first: Mapping[tuple[str, int], Outputs], truth: Outputs) -> list[str]:
    """Where kernels that were fused in other ways differ by more than rounding."""
    (_, usual), *others = first.items()
    wrong = []
    for (fusion, seed), out in others:
        name = f"fusion {fusion}, seed {seed}"
        for key, value in out.items():
            if key.startswith("gradient") and not torch.equal(value != 0, usual[key] != 0):
                wrong.append(f"{name}: {key} is 0 at other places")
            by = _error(value, usual[key], truth[key])
            if by > (_tolerance(value.dtype) if value.is_floating_point() else 0.0):
                wrong.append(f"{name}: {key} differs by {by:.1e}")
    return wrong


def _tolerance(dtype: torch.dtype) -> float:
    """A last digit of the short types, which are rounded once."""
    return 1e-12 if dtype == torch.float64 else max(TOLERANCE, torch.finfo(dtype).eps)


def _error(value: Tensor, other: Tensor, truth: Tensor) -> float:
    """The largest difference, relative to the largest true entry; infinite for NaN and for another shape."""
    if value.shape != other.shape:
        return float("inf")
    if not value.numel():
        return 0.0
    largest = (value.detach().double() - other.detach().double()).abs().max()
    error = float(largest / truth.detach().double().abs().max().clamp_min(1e-12))
    return error if error == error else float("inf")


def _bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bits."""
    return a.shape == b.shape and torch.equal(*(x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b)))
