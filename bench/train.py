"""Where a training step goes, with the fused loss and with the one that it replaces.

A small detector is trained twice, with the loss of a peer where one is installed, else with the eager reference, and
with the fused loss. Both runs start from the same seed, see the same batches and take turns, a block of steps each, so
their curves must lie on one another and their times can be compared. The network computes in float32 without TF32, that
the losses alone may differ: in mixed precision it would be faster, and the share of the loss in a step larger.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch.profiler import ProfilerActivity, profile

import fusedyolo
from fusedyolo.tools import interpreter, terminal
from fusedyolo.tools.env import environment, version
from fusedyolo.tools.parity import Loss, step
from fusedyolo.tools.registry import SHOWN, Case, RefusedError, Workload, select

from . import outcome, peers
from .detector import Detector
from .labels import given
from .measure import EAGER, FUSED, provide
from .phases import Clock, summarise, turns
from .pictures import Pictures, annotated, load, send

INTERPRETED_STEPS = 3  # of the fused run without a GPU: one of the default size takes over a minute
RATE = 5e-4  # of learning
CLIP = 100.0  # largest norm of the gradient, of each image: many losses are sums over a batch
DRAWN = 240  # images, where there are none
DETECTED, CONFIDENT = 6, 0.25  # images that detections are drawn on, and the least score of these


def chosen(options: argparse.Namespace, usual: Sequence[Case]) -> Case:
    """The one loss of a command; ``usual[0]`` if it names none.

    Raises:
        RefusedError: it names several.
    """
    if len(options.loss) > 1:
        raise RefusedError(f"--loss: {', '.join(options.loss)}, want one")
    return select(options.loss, usual)[0]


class Run:
    """A detector in training with the loss of one provider: its curve, a dictionary a step, and its times."""

    def __init__(self, provider: str, case: Case, work: Workload, seed: int, device: torch.device):
        torch.manual_seed(seed)
        self.provider, self.case, self.work, self.seed, self.device = provider, case, work, seed, device
        self.model = Detector(case, work).to(device)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=RATE)
        self.loss = provide(case, provider, work, str(device)) if provider in (EAGER, FUSED) else None
        self.clock = Clock(device, provider)
        self.curve: list[dict[str, float]] = []
        self._one = torch.ones((), device=device)

    def take(self, block: range, pictures: Pictures) -> None:
        """Take the steps of a block."""
        losses = [self.loss or self._bound(number, pictures) for number in block]
        found = [self.step(number, loss, pictures) for number, loss in zip(block, losses, strict=True)]
        self.clock.settle()
        self.curve += [{name: float(value) for name, value in each.items()} for each in found]

    def _bound(self, number: int, pictures: Pictures) -> Loss:
        """A peer's, which holds the objects of its batch already, in the form its own data loader makes."""
        _, rows = pictures.batch(number, self.work.batch, self.seed, torch.device("cpu"))
        return provide(self.case, self.provider, given(self.work, rows), str(self.device))

    def step(self, number: int, loss: Loss, pictures: Pictures) -> dict[str, torch.Tensor]:
        """One step: the total, and of ours its parts and how many positives there are. The loss sees detached
        predictions, so that its own backward is timed apart from the network's.
        """
        with self.clock.phase("data"):
            images, rows = pictures.batch(number, self.work.batch, self.seed, self.device)
            rows[:, 1] += self.case.background
            made = fusedyolo.Targets.from_packed(rows, self.work.batch)
            targets = fusedyolo.Targets(send(made.rows, self.device), send(made.offsets, self.device), self.work.batch)
        with self.clock.phase("forward"):
            preds = self.model(images)
        with self.clock.phase("loss"):
            leaves = [pred.detach().requires_grad_() for pred in preds]
            out = step(loss, leaves, targets, self._one)
        with self.clock.phase("backward"):
            torch.autograd.backward(preds, [leaf.grad for leaf in leaves])
        with self.clock.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP * self.work.batch)
            self.optimiser.step()
            self.optimiser.zero_grad()
        more = {**out.parts, "positives": out.num_pos} if isinstance(out, fusedyolo.LossOutput) else {}
        return {"total": out.total.detach(), **more}


def fit(case: Case, size: int) -> Case:
    """The case for images of ``size`` pixels: a grid that is the same for any image becomes that of its map."""
    return replace(case, grid=size // case.strides[0]) if case.grid else case


def train(runs: Sequence[Run], steps: Sequence[int], pictures: Pictures, out: Path, console: Console) -> None:
    """Let the runs take their steps in turn; a Chrome trace of the last ones of each is left in ``out``."""
    gpu = runs[0].clock.gpu
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on start and stop would cut the bar
    with Progress(console=console, auto_refresh=not gpu) as bar:  # its thread would slow a GPU's host down
        tasks = [bar.add_task(run.provider, total=n) for run, n in zip(runs, steps, strict=True)]
        for number, block in turns(*steps):
            run, traced = runs[number], block.stop == steps[number]
            activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
            with profile(activities=activities) if traced else nullcontext() as profiler:
                run.take(block, pictures)
            if traced:
                profiler.export_chrome_trace(str(out / f"trace_{run.provider}.json.gz"))
            bar.update(tasks[number], advance=len(block), refresh=True)


def detect(run: Run, pictures: Pictures) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """The first images, uint8 [n, 3, S, S], and what a run has learnt to find in them."""
    pixels = pictures.pixels[:DETECTED]
    case, work = run.case, replace(run.work, batch=len(pixels))
    geometry = case.geometry(work, str(run.device))
    given = {name: geometry[name] for name in ("anchors", "image_size") if name in geometry}
    with torch.no_grad():
        preds = case.pack(run.model(pixels.to(run.device).float() / 255), work)
    return pixels, fusedyolo.select(preds, case.build(work.classes, "torch"), CONFIDENT, **given).images()


def run(options: argparse.Namespace) -> int:
    """Do it: 0 if the curves agree, 1 if not.

    Raises:
        RefusedError: several losses, a peer that does not compute the loss, or nothing to train on.
    """
    gpu, console, out = torch.cuda.is_available(), terminal.console(), options.out
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        interpreter.prepare()  # before peers are looked for: some import Triton
        console.print("No GPU: the fused loss runs in Triton's interpreter, which is slow.")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # the losses alone shall differ
    case = chosen(options, SHOWN)
    known = [*(peer.name for peer in peers.of(case)), EAGER]
    peer = options.peer or known[0]
    if peer not in known:
        raise RefusedError(f"--peer: {peer}, want one of {', '.join(known)} for {case.name}")
    found, names = annotated(options, out / f"drawn-{options.size}", DRAWN, 2 * options.size)
    pictures = load(found, options.size)
    boxes = sum(len(annotation.boxes) for annotation in pictures.annotations)
    console.print(f"{len(pictures.annotations)} images, {boxes} boxes of {len(names)} classes")
    case, work = fit(case, options.size), Workload(options.batch, options.size, len(names), layout="nchw")
    runs = [Run(provider, case, work, options.seed, device) for provider in (peer, FUSED)]
    steps = options.steps, options.steps if gpu else min(options.steps, INTERPRETED_STEPS)
    train(runs, steps, pictures, out, console)

    pairs = zip(*(run.curve for run in runs), strict=False)
    result = {
        "config": {name: getattr(options, name) for name in ("batch", "size", "seed", "steps")}
        | {"loss": case.name, "peer": peer, "peer_version": version(peer)},
        "environment": environment(),
        "interpreted": not gpu,
        "classes": names,
        "difference": [abs(a["total"] - b["total"]) / abs(a["total"]) for a, b in pairs],
        "runs": {run.provider: {"seconds": summarise(run.clock.steps), "steps": run.curve} for run in runs},
    }
    (out / "train.json").write_text(json.dumps(result, indent=1))
    outcome.draw_curves(out / "curves.png", result)
    names = ["background"] * case.background + names
    outcome.draw_detections(out / "predictions.png", *detect(runs[0], pictures), names)
    fault = outcome.fault(result)
    console.print(outcome.table(result))
    console.print(f"Curves, traces and numbers are in {escape(str(out))}. [red]{fault}", highlight=False)
    return int(bool(fault))
