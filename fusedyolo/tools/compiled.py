"""Compiled kernels, executed by the emulator, against the reference in float64: the cases, and the command."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from torch import Tensor

import fusedyolo

from ..emulator import Device
from ..emulator.compare import Found, Outputs, Settings, Step, compare
from ..terms import term_names
from .env import kernels_digest, version
from .parity import TOLERANCE
from .registry import CASES, RefusedError, Workload, choose
from .registry import Case as LossCase
from .terminal import PASSES, table

SMALL = Workload(batch=2, size=64, classes=3, seed=3)
WEIGHTS = (1.0, 0.75)  # gradients of the total; dense heads have launches that do their work for others than 1 only
WEIGHED = ("YOLOv1/paper", "YOLOv2/region", "YOLOv4/darknet", "YOLOv5", "RetinaNet", "SSD", "FCOS", "YOLOX", "YOLOv8")
"""Losses that are also run with weights of rows, and ignored regions."""
LABEL_LOSSES = ("sigmoid_focal_loss", "quality_focal_loss", "varifocal_loss")

Case = Callable[[Workload], Step]

# ------------------------------------------------------------------------------------------------------------ cases


def _step(maps: list[Tensor], targets: Any, build: Callable[[str], Callable[..., Any]]) -> Step:
    """A training step of a loss, which is built for a backend: total, parts, counts, and a gradient for each of
    :data:`WEIGHTS`.
    """

    def step(backend: str, exact: bool) -> Outputs:
        preds = [_as(pred, exact).requires_grad_() for pred in maps]
        out = build(backend)(preds, targets)
        found = {"total": out.total, **out.parts, "num_pos": out.num_pos, "num_invalid": out.num_invalid}
        for weight in WEIGHTS:
            grads = torch.autograd.grad(out.total, preds, out.total.new_tensor(weight), retain_graph=True)
            found |= {f"gradient {i} of {weight}": grad for i, grad in enumerate(grads)}
        return found

    return step


def _loss(case: LossCase, work: Workload, weighed: bool = False) -> Step:
    """Of a case, of targets that may be ``weighed``."""
    work = replace(work, batch=max(work.batch, case.images))
    targets = case.targets(work)
    if weighed:
        targets = _weighed(targets, case.background, work.batch)
    return _step(case.predictions(work), targets, lambda on: case.bind(case.build(work.classes, on), work))


def _auxiliary(work: Workload) -> Step:
    """YOLOv7 with auxiliary heads, of which objects pick by what other maps cost."""
    case = CASES["YOLOv7"]
    maps = case.predictions(work) + case.predictions(replace(work, seed=work.seed + 1))
    loss = partial(fusedyolo.YOLOv7AuxLoss, case.anchors, case.strides, work.classes)
    return _step(maps, case.targets(work), lambda on: loss(backend=on))


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


def cases() -> dict[str, Case]:
    """All cases by name: every loss, auxiliary heads, one of each way to share and to match with weights, ``select``
    once for each class term where kernels read predictions, the rest.
    """
    scanned = {case.head(SMALL.classes).label: case for case in reversed(CASES.values()) if case.driver.scans}
    found: dict[str, Case] = {name: partial(_loss, case) for name, case in CASES.items()}
    found["YOLOv7/aux"] = _auxiliary
    found |= {f"weighed/{CASES[name].loss}": partial(_loss, CASES[name], weighed=True) for name in WEIGHED}
    found |= {f"select/{case.loss}": partial(_select, case) for case in scanned.values()}
    return found | {"pointwise": _pointwise}


# ------------------------------------------------------------------------------------------------------- the command

BEGIN, END = "<!-- written by fusedyolo check --compiled -->", "<!-- until here -->"
PLACE = re.compile(f"({BEGIN}\n).*?({END})", re.DOTALL)  # of the table in a file
LINES = 8  # of what is wrong with a case
COLUMNS: dict[str, Callable[[Found], str]] = {
    "error": lambda found: f"{found.error:.1e}",
    "eager's": lambda found: f"{found.eager:.1e}",
    "bits": lambda found: {None: "not compared", True: "same", False: "OTHER"}[found.same],
    "faults": lambda found: str(sum(found.faults.values())),
    "unwritten bytes": lambda found: f"{found.unwritten:,}",
    "programs": lambda found: f"{found.programs:,}",
    "warp instructions": lambda found: f"{found.instructions:,}",
}

Results = Mapping[tuple[str, str], Mapping[str, Found]]
"""By case and type, and by architecture."""


def run(options: argparse.Namespace, dtypes: Sequence[str], console: Console) -> int:
    """Execute, and print a table: 0 if all pass, 1 if not.

    Raises:
        RefusedError: kernels cannot be compiled in this process, or the table has no place in the file.
    """
    given = {name: getattr(options, name) for name in ("seeds", "fusion", "noise", "fine") if getattr(options, name)}
    settings, chosen = Settings(TOLERANCE, **given), choose(options.loss, cases())
    page = _page(options.markdown) if options.markdown else ""
    try:
        with Device():
            pass
    except ImportError:
        raise RefusedError("--compiled: Triton is not installed, and there is nothing to compile with") from None
    except RuntimeError as error:
        raise RefusedError(f"--compiled: {error}") from None
    results: dict[tuple[str, str], dict[str, Found]] = {}
    wanted = list(itertools.product(chosen.items(), dtypes, options.arch or [settings.arch]))
    for (name, case), dtype, arch in track(wanted, "executing", console=console, transient=True):
        try:
            found = compare(case(replace(SMALL, dtype=dtype)), settings._replace(arch=arch))
        except Exception as error:  # what a compiler may raise is not known; the others are still checked
            found = Found(wrong=[f"{type(error).__name__}: {error}".splitlines()[0]])
        results.setdefault((name, dtype), {})[f"sm_{arch}"] = found
    failed = _print(console, results, settings)
    if options.markdown:
        lines = "".join(f"{line}\n" for line in _markdown(results, settings, len(wanted) - failed))
        options.markdown.write_text(PLACE.sub(lambda place: place[1] + lines + place[2], page), encoding="utf-8")
    return int(failed > 0)


def _page(path: Path) -> str:
    """What a file holds that the table can be written into."""
    try:
        with path.open("r+", encoding="utf-8") as file:  # as it is opened to be written, which is found out first
            page = file.read()
    except (OSError, ValueError) as error:
        raise RefusedError(f"--markdown: {error}") from error
    if not PLACE.search(page):
        raise RefusedError(f"--markdown: {path} has no line {BEGIN}, or no line {END} after it")
    return page


def _cells(of: Mapping[str, Found]) -> list[str]:
    """One for each of :data:`COLUMNS`, with all values where architectures differ; ``?`` where a case did not run."""
    each = [[cell(found) if found.programs else "?" for cell in COLUMNS.values()] for found in of.values()]
    return [" / ".join(dict.fromkeys(values)) for values in zip(*each, strict=True)]


def _print(console: Console, results: Results, settings: Settings) -> int:
    """The table, and below it why cases fail; how many do."""
    title = f"Compiled kernels, executed, against the reference in float64; {settings}"
    made, failed, said = table(title, ("case", "dtype", "arch"), (*COLUMNS, "")), 0, []
    for names, of in results.items():
        wrong = {arch: found.wrong for arch, found in of.items() if found.wrong}
        made.add_row(*names, " / ".join(of), *_cells(of), PASSES[not wrong])
        failed += len(wrong)
        for arch, why in wrong.items():
            said += [f"[red]{' '.join(names)} {arch}:", *(f"    {escape(each)}" for each in why[:LINES])]
            said += [f"    and {len(why) - LINES} more"] * (len(why) > LINES)
    said += [f"[bold red]{failed} of {sum(map(len, results.values()))} fail"] * (failed > 0)
    console.print(made, *said, sep="\n", highlight=False)
    return failed


def _markdown(results: Results, settings: Settings, passed: int) -> list[str]:
    """The lines of the table."""
    archs = next(iter(results.values()))
    versions = ", ".join(f"{name} {version(name)}" for name in ("fusedyolo", "torch", "triton"))
    larger = dict.fromkeys(f" ({case.loss}: {case.images})" for case in CASES.values() if case.images > SMALL.batch)
    return [
        f"{passed} of {len(results) * len(archs)} pass. {' / '.join(archs)}; {settings}. {versions}, kernels "
        f"{kernels_digest()}. Batch {SMALL.batch}{''.join(larger)}, {SMALL.size} px, {SMALL.classes} classes.",
        "",
        "| " + " | ".join(["case", "dtype", *COLUMNS]) + " |",
        "|" + "---|" * 2 + "---:|" * len(COLUMNS),
        *("| " + " | ".join([*names, *_cells(of)]) + " |" for names, of in results.items()),
    ]
