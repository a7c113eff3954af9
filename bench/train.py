"""``python -m bench train``: where a training step goes, with the fused loss and with the one that it replaces.

A small detector is trained twice, with the loss of a peer where one is installed, else with the eager reference, and
with the fused loss. Both runs start from the same seed, see the same batches and take turns, a block of steps each, so
their curves must lie on one another and their times can be compared. The network computes in float32 without TF32, that
the losses alone may differ: in mixed precision it would be faster, and the share of the loss in a step larger.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.profiler import ProfilerActivity, profile

import fusedyolo
from fusedyolo.tools import interpreter
from fusedyolo.tools.environment import environment
from fusedyolo.tools.objects import load_labels
from fusedyolo.tools.parity import Loss, step
from fusedyolo.tools.registry import CASES, Case, DenseCase, Workload, select
from fusedyolo.tools.timing import QUANTILES

from . import peers
from .count import count
from .detector import COARSEST, Detector, detect, fit, hits
from .measure import EAGER, FUSED, provide
from .outcome import NAMES, draw, faults, phase_table, remarks, table
from .phases import Block, Clock, busy, summarise, turns, verdict, waits
from .pictures import Pictures, generate, load, send

INTERPRETED_STEPS = 3  # of the fused run without a GPU: one of the default size takes over a minute
CLIP = 100.0  # largest norm of the gradient, of each image: many losses are sums over a batch
CONF, IOU = 0.3, 0.4  # of the detections in them


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench train", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; drawn ones if left out")
    parser.add_argument(
        "--labels", type=Path, help="YOLO txt folder, COCO json or VOC xml folder; found beside --images"
    )
    parser.add_argument("--size", type=int, default=192, help="side the images are fitted into, a multiple of 32")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--fused-steps", type=int, help=f"all on a GPU, else {INTERPRETED_STEPS}")
    parser.add_argument("--loss", default="YOLOv4", metavar="NAME", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--peer", metavar="NAME", help=f"what to compare with: {', '.join(peers.PEERS)}, or {EAGER}")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the learning rate's one cycle")
    parser.add_argument("--generate", type=int, default=240, metavar="N", help="images to draw without --images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    args = parser.parse_args(argv)
    if args.size % COARSEST or args.size <= 0:
        parser.error(f"--size: {args.size}, want a multiple of {COARSEST}")
    if args.fused_steps is None:
        args.fused_steps = args.steps if torch.cuda.is_available() else INTERPRETED_STEPS
    args.fused_steps = min(args.fused_steps, args.steps)
    for name in ("batch", "steps", "fused_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: {getattr(args, name)}, want at least 1")
    try:
        case = select([args.loss])[0]
    except ValueError as error:
        parser.error(str(error))
    known = [*(peer.name for peer in peers.of(case)), EAGER]
    args.loss, args.peer = case.name, args.peer or known[0]
    if args.peer not in known:
        parser.error(f"--peer: {args.peer}, want one of {', '.join(known)} for {case.name}")
    return args


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Batch(Workload):
    """A workload whose objects are those of a batch at hand."""

    rows: torch.Tensor | None = None

    def targets(self, device: str = "cpu") -> torch.Tensor:
        """Packed rows, the caller's own."""
        return self.rows.clone().to(device)


class Run:
    """A detector in training with the loss of one provider: its curve, its times, and the waits of a step by place."""

    def __init__(self, provider: str, case: Case, work: Workload, args: argparse.Namespace, device: torch.device):
        torch.manual_seed(args.seed)
        self.provider, self.name = provider, NAMES.get(provider, provider)
        self.case, self.work, self.seed, self.device = case, work, args.seed, device
        self.model = Detector(case, work).to(device)
        self.loss = provide(case, provider, work, str(device)) if provider in NAMES else None
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, args.lr, args.steps, pct_start=0.1)
        self.clock, self.curve = Clock(device, self.name), []
        self.waits, self.watched = Counter(), 0
        self._one = torch.ones((), device=device)
        self._outputs = []

    def losses(self, block: Block, pictures: Pictures) -> list[Loss]:
        """One for each step. A peer's holds the objects of its batch already, in the form its own data loader makes."""
        if self.loss is not None:
            return [self.loss] * len(block.steps)
        rows = (pictures.batch(number, self.work.batch, self.seed, torch.device("cpu"))[1] for number in block.steps)
        works = [Batch(**vars(self.work), rows=each) for each in rows]
        return [provide(self.case, self.provider, work, str(self.device)) for work in works]

    def take(self, block: Block, losses: Sequence[Loss], pictures: Pictures) -> Iterator[None]:
        """Take the steps of a block, one at a time."""
        watched = block.kind == "watched"
        counted = not self.clock.gpu and (watched or self.provider == FUSED)  # the interpreter is twice as fast so
        for number, loss in zip(block.steps, losses, strict=True):
            with waits(self.clock) if watched and self.clock.gpu else nullcontext(Counter()) as found:
                self.step(number, loss, pictures, self.count if counted else step)
            self.waits += found
            self.watched += watched or counted
            yield
        self.clock.settle(block.kind)
        self.curve += [{name: float(value) for name, value in each.items()} for each in self._outputs]
        self._outputs.clear()

    def step(self, number: int, loss: Loss, pictures: Pictures, evaluate: Callable = step) -> None:
        """One step. The loss sees detached predictions, so that its own backward is timed apart from the network's."""
        with self.clock.phase("data"):
            images, rows = pictures.batch(number, self.work.batch, self.seed, self.device)
            targets = self.targets(rows)
        with self.clock.phase("forward"):
            preds = self.model(images)
        with self.clock.phase("loss"):
            leaves = [pred.detach().requires_grad_() for pred in preds]
            out = evaluate(loss, leaves, targets, self._one)
        with self.clock.phase("backward"):
            torch.autograd.backward(preds, [leaf.grad for leaf in leaves])
        with self.clock.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP * self.work.batch)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.schedule.step()
        more = {**out.parts, "positives": out.num_pos} if isinstance(out, fusedyolo.LossOutput) else {}
        self._outputs.append({"total": out.total.detach(), **more})

    def targets(self, rows: torch.Tensor) -> fusedyolo.Targets:
        """As a data loader would make them, on the device."""
        rows[:, 1] += self.case.background if isinstance(self.case, DenseCase) else 0
        made = fusedyolo.Targets.from_packed(rows, self.work.batch)
        return fusedyolo.Targets(send(made.rows, self.device), send(made.offsets, self.device), self.work.batch)

    def count(self, loss: Loss, leaves: list[torch.Tensor], targets: fusedyolo.Targets, one: torch.Tensor) -> Any:
        """Forward and backward of the loss on a CPU; what would wait for a GPU is counted, operator by operator."""
        found = []
        counts = count(lambda: found.append(step(loss, leaves, targets, one)))
        self.waits.update({f"loss: {name}": n for name, n in counts.sync_ops.items()})
        return found[0]

    def summary(self, trace: Path) -> dict[str, Any]:
        """What ``train.json`` keeps of a run."""
        times, gpu_busy = summarise(self.clock.steps), busy(trace)
        names, batch = [f"p{q * 100:.0f}" for q in QUANTILES], self.work.batch
        return {
            "seconds": times.device,
            "host_seconds": times.host,
            "step_seconds": dict(zip(names, times.step, strict=True)),
            "images_per_second": dict(zip(names, [batch / s for s in reversed(times.step)], strict=True)),
            "timed_steps": times.timed,
            "busy_seconds": gpu_busy,
            "waits": {place: n / self.watched for place, n in self.waits.most_common()} if self.watched else None,
            "verdict": verdict(times.device, times.host, gpu_busy)._asdict(),
            "steps": self.curve,
        }


def train(runs: Sequence[Run], steps: Sequence[int], pictures: Pictures, out: Path, console: Console) -> None:
    """Let the runs take their steps in turn behind a progress bar; a trace of the last ones is left in ``out``."""
    texts = "{task.description:16}", "loss {task.fields[loss]:8.2f}", "{task.fields[rate]:6.1f} images/s"
    label, loss, rate = map(TextColumn, texts)
    gpu = runs[0].clock.gpu
    columns = label, BarColumn(), MofNCompleteColumn(), loss, rate, TimeRemainingColumn()
    with Progress(*columns, console=console, auto_refresh=not gpu) as bar:  # its thread would slow a GPU's host down
        tasks = [
            bar.add_task(run.name, total=n, loss=float("nan"), rate=0.0) for run, n in zip(runs, steps, strict=True)
        ]
        for number, block in turns(*steps):
            run, losses = runs[number], runs[number].losses(block, pictures)
            with traced(trace(out, run), gpu) if block.kind == "traced" else nullcontext():
                for _ in run.take(block, losses, pictures):
                    bar.advance(tasks[number])
            taken = sum(times.device["step"] for times in run.clock.steps[-len(block.steps) :])
            speed = len(block.steps) * run.work.batch / taken
            bar.update(tasks[number], loss=run.curve[-1]["total"], rate=speed, refresh=True)


def trace(out: Path, run: Run) -> Path:
    """Where the trace of a run lies."""
    return out / f"trace_{run.provider}.json.gz"


@contextmanager
def traced(path: Path, gpu: bool) -> Iterator[None]:
    """Leave a Chrome trace."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on start and stop would cut the bar
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as profiler:
        yield
    profiler.export_chrome_trace(str(path))


def prepare(args: argparse.Namespace, console: Console) -> tuple[Pictures, Pictures, list[str]]:
    """Training and held-out pictures, and the names of the classes."""
    images = args.images or args.out / f"drawn-{args.generate}-{args.size}-{args.seed}"
    if args.images is None:
        generate(images, args.generate, 2 * args.size, args.seed)
    annotations, names = load_labels(args.labels or images, images)
    found = [annotation for annotation in annotations if annotation.image]
    if len(found) < 2:
        raise ValueError(f"images: {len(found)} of {len(annotations)} annotated images are in {images}, want 2 or more")
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = min(max(1, len(order) // 10), 100)
    with console.status(f"loading {len(order)} images"):
        validation = load([found[i] for i in order[:held_out]], args.size)
        training = load([found[i] for i in order[held_out:]], args.size)
    boxes = sum(len(annotation.boxes) for annotation in training.annotations)
    if not boxes:
        raise ValueError("labels: the images have no boxes")
    console.print(f"{len(order)} images, {held_out} held out; {boxes} boxes of {len(names)} classes to train on.")
    return training, validation, names


def find(run: Run, pictures: Pictures) -> list[dict[str, torch.Tensor]]:
    """Detections on every picture, on the CPU."""
    found = []
    for pixels in pictures.pixels.split(run.work.batch):
        found += detect(run.model, run.work, pixels.to(run.device).float() / 255, CONF, IOU)
    return found


def score(detections: Sequence[dict[str, torch.Tensor]], pictures: Pictures) -> dict[str, float]:
    """Which share of the annotations is found, and which share of the detections is one of them."""
    right = sum(map(hits, detections, pictures.annotations))
    return {
        "recall": right / max(1, sum(len(annotation.boxes) for annotation in pictures.annotations)),
        "precision": right / max(1, sum(len(found["labels"]) for found in detections)),
    }


def record(args: argparse.Namespace, case: Case, names: Sequence[str], runs: Sequence[Run]) -> dict[str, Any]:
    """What ``train.json`` keeps, but for the detections."""
    gpu, pairs = runs[0].clock.gpu, zip(*(run.curve for run in runs), strict=False)
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "environment": environment(),
        "peer_version": peers.PEERS[args.peer].version() if args.peer in peers.PEERS else None,
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "interpreted": not gpu,
        "classes": names,
        "anchors": case.anchors,
        "difference": [abs(a["total"] - b["total"]) / abs(a["total"]) for a, b in pairs],
        "runs": {run.provider: run.summary(trace(args.out, run)) for run in runs},
    }


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 if the loss fell and the curves agree, 1 if not, 2 without images to train on."""
    gpu, console = torch.cuda.is_available(), Console()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        interpreter.prepare()  # before peers are looked for: some import Triton
        console.print("No GPU: the fused loss runs in Triton's interpreter, which is slow.")
    args = parse(argv)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # the losses alone shall differ
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        training, validation, names = prepare(args, console)
    except (OSError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}")
        return 2
    boxes = torch.cat([annotation.boxes[:, 2:] for annotation in training.annotations])
    case = fit(CASES[args.loss], args.size, boxes)
    work = Workload(args.batch, args.size, len(names), layout="nchw")
    runs = [Run(provider, case, work, args, device) for provider in (args.peer, FUSED)]
    train(runs, (args.steps, args.fused_steps), training, args.out, console)

    detections = find(runs[0], validation)
    result = record(args, case, names, runs) | score(detections, validation)
    (args.out / "train.json").write_text(json.dumps(result, indent=1))
    draw(result, args.out, validation, detections, names)
    console.print(phase_table(result), table(result))
    for remark in remarks(result):
        console.print(escape(remark))
    console.print(f"Steps, curves, predictions, traces and numbers are in {escape(str(args.out))}.")
    for fault in faults(result):
        console.print(f"[red]{fault}")
    return 1 if faults(result) else 0
