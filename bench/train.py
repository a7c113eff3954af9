"""``python -m bench train``: train a small detector twice, with the eager reference and with the fused loss.

Both runs start from the same seed and see the same batches, so their curves must lie on one another.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

import fusedyolo

from . import interpreter
from .detector import STRIDES, Detector, fit_anchors, hits
from .objects import load_labels
from .pictures import Pictures, draw_curves, draw_predictions, generate, load

LOSSES = {"yolov3": "YOLOv3Loss", "yolov4": "YOLOv4Loss"}
NAMES = {"torch": "eager reference", "triton": "fused"}
INTERPRETED_STEPS = 3  # of the fused run without a GPU: one of the default size takes over a minute
COMPARED = 10  # first steps, over which the curves are held to BOUND
BOUND = 2e-5  # relative; 2e-6 was seen. Tens of steps later one flipped assignment sets any two roundings 1e-2 apart
WARM_UP, TRACED = 3, 2  # first and last steps, left out of the timing
CLIP = 100.0  # largest norm of the gradient
SHOWN = 12  # pictures in predictions.png
CONF, IOU = 0.5, 0.4  # of the detections in them


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
    parser.add_argument("--loss", choices=LOSSES, default="yolov4")
    parser.add_argument("--recipe", help="variant of the loss; its first one if left out")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak of the learning rate's one cycle")
    parser.add_argument("--generate", type=int, default=240, metavar="N", help="images to draw without --images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    args = parser.parse_args(argv)
    if args.size % STRIDES[-1]:
        parser.error(f"--size: {args.size}, want a multiple of {STRIDES[-1]}")
    if args.fused_steps is None:
        args.fused_steps = args.steps if torch.cuda.is_available() else INTERPRETED_STEPS
    args.fused_steps = min(args.fused_steps, args.steps)
    return args


class Run:
    """A detector in training on one backend, and the losses and times of each of its steps."""

    def __init__(self, backend: str, args: argparse.Namespace, anchors: list, num_classes: int, device: torch.device):
        torch.manual_seed(args.seed)
        self.name, self.device = NAMES[backend], device
        self.model = Detector(num_classes).to(device, memory_format=torch.channels_last)
        recipe = {"recipe": args.recipe} if args.recipe else {}
        build = getattr(fusedyolo, LOSSES[args.loss])
        self.criterion = build(anchors, STRIDES, num_classes, reduction="mean", backend=backend, **recipe)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, args.lr, args.steps, pct_start=0.1)
        self.outputs, self.stamps = [], defaultdict(list)

    def step(self, images: torch.Tensor, targets: fusedyolo.Targets) -> None:
        """One step. The loss sees detached predictions, so that its own backward is timed apart from the network's."""
        with self.phase("forward"):
            preds = self.model(images)
        with self.phase("loss"):
            leaves = [pred.detach().requires_grad_() for pred in preds]
            out = self.criterion(leaves, targets)
            out.total.backward()
        with self.phase("backward"):
            torch.autograd.backward(preds, [leaf.grad for leaf in leaves])
        with self.phase("optimiser"):
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            self.optimiser.step()
            self.optimiser.zero_grad()
            self.schedule.step()
        self.outputs.append({"total": out.total.detach(), **out.parts, "positives": out.num_pos})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a step, and name it in the trace."""
        start = stamp(self.device)
        with record_function(f"{self.name}: {name}"):
            yield
        self.stamps[name].append((start, stamp(self.device)))

    def summary(self, batch: int) -> dict:
        """What ``train.json`` keeps of a run."""
        timed = {name: pairs[WARM_UP:-TRACED] or pairs for name, pairs in self.stamps.items()}
        seconds = {name: fmean(elapsed(*pair) for pair in pairs) for name, pairs in timed.items()}
        return {
            "seconds_per_step": seconds,
            "loss_share": seconds["loss"] / sum(seconds.values()),
            "images_per_second": batch / sum(seconds.values()),
            "steps": [{name: float(value) for name, value in step.items()} for step in self.outputs],
        }


def stamp(device: torch.device) -> torch.cuda.Event | float:
    """The time now, on the device's clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Seconds between two stamps."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


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


def train(run: Run, steps: int, pictures: Pictures, args: argparse.Namespace, console: Console) -> profile:
    """Take ``steps`` steps behind a progress bar; a profile of the last of them comes back."""
    gpu = run.device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on start and stop would cut the bar
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu)
    texts = "{task.description:16}", "loss {task.fields[loss]:8.2f}", "{task.fields[rate]:6.1f} images/s"
    label, loss, rate = map(TextColumn, texts)
    with Progress(label, BarColumn(), MofNCompleteColumn(), loss, rate, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(run.name, total=steps, loss=float("nan"), rate=0.0)
        begin = time.perf_counter()
        for step in range(steps):
            if step == max(0, steps - TRACED):
                profiler.start()
            images, rows = pictures.batch(step, args.batch, args.seed, run.device)
            run.step(images, fusedyolo.Targets.from_packed(rows, args.batch).to(run.device))
            if not gpu or step % 20 == 0 or step == steps - 1:  # reading the loss makes a GPU wait
                speed = (step + 1) * args.batch / (time.perf_counter() - begin)
                bar.update(task, completed=step + 1, loss=float(run.outputs[-1]["total"]), rate=speed)
        profiler.stop()
    return profiler


def find(run: Run, pictures: Pictures) -> list[dict[str, torch.Tensor]]:
    """Detections on every picture, on the CPU."""
    with torch.no_grad():
        preds = run.model(pictures.pixels.to(run.device).float() / 255)
    found = fusedyolo.select(preds, run.criterion, conf=CONF, iou=IOU, backend=run.criterion.backend)
    return fusedyolo.Detections(*(value.cpu() for value in found)).images()


def fell(steps: Sequence[dict[str, float]]) -> bool:
    """Whether the last quarter of a curve lies below its first."""
    quarter = max(1, len(steps) // 4)
    return fmean(s["total"] for s in steps[-quarter:]) < fmean(s["total"] for s in steps[:quarter])


def faults(result: dict) -> list[str]:
    """What is wrong with the curves. A fused run that stopped early is held to the reference alone."""
    found = []
    early = max(result["difference"][:COMPARED])
    if not early <= BOUND:
        found.append(f"The curves differ by {early:.1e} within {COMPARED} steps, want at most {BOUND:g}.")
    for backend, run in result["runs"].items():
        if len(run["steps"]) == result["config"]["steps"] and not fell(run["steps"]):
            found.append(f"The loss of the {NAMES[backend]} run did not fall.")
    return found


def installed(name: str) -> str | None:
    """The version of a package, None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(result: dict) -> Table:
    """The summary."""
    config, runs = result["config"], [result["runs"][backend] for backend in NAMES]
    title = f"{config['loss']}, batches of {config['batch']} images of {config['size']} x {config['size']}"
    caption = (
        "The fused loss ran in Triton's interpreter: its times say nothing about its speed." * result["interpreted"]
    )
    rows = Table(title=title, caption=caption or None)
    rows.add_column()
    for name in NAMES.values():
        rows.add_column(name, justify="right")
    shared = len(result["difference"])
    early = result["difference"][:COMPARED]
    rows.add_row("steps", *(str(len(run["steps"])) for run in runs))
    rows.add_row("loss at the first step", *(f"{run['steps'][0]['total']:.4f}" for run in runs))
    rows.add_row(f"loss at step {shared}", *(f"{run['steps'][shared - 1]['total']:.4f}" for run in runs))
    rows.add_row("loss at the last step", *(f"{run['steps'][-1]['total']:.4f}" for run in runs))
    rows.add_row(f"largest relative difference, first {len(early)} steps", "", f"{max(early):.1e}")
    rows.add_row(f"largest relative difference, all {shared} steps", "", f"{max(result['difference']):.1e}")
    rows.add_row("share of a step in the loss", *(f"{run['loss_share']:.1%}" for run in runs))
    rows.add_row("images/s", *(f"{run['images_per_second']:.1f}" for run in runs))
    rows.add_row("held-out images: annotations found", f"{result['recall']:.0%}", "")
    rows.add_row("held-out images: detections that are annotated", f"{result['precision']:.0%}", "")
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command: 0 if the loss fell and the curves agree, 1 if not, 2 without images to train on."""
    args, console = parse(argv), Console()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    if not gpu:
        interpreter.prepare()
        console.print(
            "No GPU: the fused loss runs in Triton's interpreter, which is slow and says nothing of its speed."
        )
    torch.backends.cudnn.deterministic, torch.backends.cudnn.allow_tf32 = True, False  # the losses alone shall differ
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        training, validation, names = prepare(args, console)
    except (OSError, ValueError) as error:
        console.print(f"[red]{escape(str(error))}")
        return 2
    anchors = fit_anchors(torch.cat([annotation.boxes[:, 2:] for annotation in training.annotations]) * args.size)

    runs = {backend: Run(backend, args, anchors, len(names), device) for backend in NAMES}
    for backend, steps in (("torch", args.steps), ("triton", args.fused_steps)):
        profiler = train(runs[backend], steps, training, args, console)
        profiler.export_chrome_trace(str(args.out / f"trace_{backend}.json.gz"))

    results = {backend: run.summary(args.batch) for backend, run in runs.items()}
    reference, fused = results["torch"]["steps"], results["triton"]["steps"]
    detections = find(runs["torch"], validation)
    right = sum(map(hits, detections, validation.annotations))
    result = {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {name: installed(name) for name in ("fusedyolo", "torch", "triton")} | {"python": sys.version},
        "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
        "interpreted": not gpu,
        "classes": names,
        "anchors": anchors,
        "difference": [abs(a["total"] - b["total"]) / a["total"] for a, b in zip(reference, fused, strict=False)],
        "recall": right / max(1, sum(len(annotation.boxes) for annotation in validation.annotations)),
        "precision": right / max(1, sum(len(found["labels"]) for found in detections)),
        "runs": results,
    }
    (args.out / "train.json").write_text(json.dumps(result, indent=1))
    draw_curves(args.out / "curves.png", reference, fused, result["difference"], BOUND)
    title = f"Held-out images after {args.steps} steps: detections in colour, annotations dashed in white"
    draw_predictions(args.out / "predictions.png", validation, detections[:SHOWN], names, title)
    console.print(table(result), f"Curves, predictions, traces and numbers are in {escape(str(args.out))}.")
    for fault in faults(result):
        console.print(f"[red]{fault}")
    return 1 if faults(result) else 0
