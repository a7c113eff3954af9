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
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import fusedyolo
from bench.detector import STRIDES, Detector, decode, detect, fit_anchors, hits
from bench.objects import load_labels
from bench.pictures import Pictures, draw_curves, draw_predictions, generate, load

LOSSES = {"yolov3": "YOLOv3Loss", "yolov4": "YOLOv4Loss"}
NAMES = {"torch": "eager reference", "triton": "fused"}
PHASES = ("forward", "loss", "backward", "optimiser")  # loss: its value and its gradient, with respect to predictions
WARM_UP = 3  # first steps, left out of the timing
TRACED = 2  # last steps, traced and left out too
COMPARED = 10  # steps over which the curves are held to BOUND; later ones may drift, as any two roundings do
BOUND = 1e-4
CLIP = 100.0  # largest norm of the gradient
SHOWN = 12  # pictures in predictions.png


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
    parser.add_argument("--fused-steps", type=int, help="steps of the fused run; all on a GPU, 30 in the interpreter")
    parser.add_argument("--loss", choices=LOSSES, default="yolov4")
    parser.add_argument("--recipe", help="variant of the loss; its first one if left out")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak of the learning rate's one cycle")
    parser.add_argument("--generate", type=int, default=240, metavar="N", help="images to draw without --images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/train"))
    args = parser.parse_args(argv)
    if args.size % STRIDES[-1]:
        parser.error(f"--size: {args.size}, want a multiple of {STRIDES[-1]}")
    if args.fused_steps is None:
        args.fused_steps = args.steps if torch.cuda.is_available() else 30
    args.fused_steps = min(args.fused_steps, args.steps)
    return args


class Run:
    """A detector in training on one backend, and the losses and times of each of its steps."""

    def __init__(self, backend: str, args: argparse.Namespace, anchors: list, num_classes: int, device: torch.device):
        torch.manual_seed(args.seed)
        self.model = Detector(num_classes).to(device, memory_format=torch.channels_last)
        recipe = {"recipe": args.recipe} if args.recipe else {}
        build = getattr(fusedyolo, LOSSES[args.loss])
        self.criterion = build(anchors, STRIDES, num_classes, reduction="mean", backend=backend, **recipe)
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimiser, args.lr, args.steps, pct_start=0.1)
        self.outputs, self.stamps = [], []

    def step(self, pixels: torch.Tensor, targets: fusedyolo.Targets) -> None:
        """One step. The loss sees detached predictions, so that its own backward is timed apart from the network's."""
        stamps = [stamp(pixels.device)]
        preds = self.model(pixels.float() / 255)
        stamps.append(stamp(pixels.device))
        leaves = [pred.detach().requires_grad_() for pred in preds]
        out = self.criterion(leaves, targets)
        out.total.backward()
        stamps.append(stamp(pixels.device))
        torch.autograd.backward(preds, [leaf.grad for leaf in leaves])
        stamps.append(stamp(pixels.device))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.schedule.step()
        stamps.append(stamp(pixels.device))
        self.outputs.append({"total": out.total.detach(), **out.parts, "positives": out.num_pos})
        self.stamps.append(stamps)

    def losses(self) -> list[dict[str, float]]:
        """Total and parts of every step."""
        return [{name: float(value) for name, value in step.items()} for step in self.outputs]

    def seconds(self) -> dict[str, float]:
        """Mean seconds of each phase of a step."""
        steps = [list(map(elapsed, s, s[1:])) for s in self.stamps[WARM_UP:-TRACED] or self.stamps]
        return dict(zip(PHASES, map(fmean, zip(*steps, strict=True)), strict=True))


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


def batch(pictures: Pictures, step: int, args: argparse.Namespace, device: torch.device) -> tuple:
    """Images and targets of a step, on the device."""
    pixels, rows = pictures.batch(step, args.batch, args.seed)
    targets = fusedyolo.Targets.from_packed(rows, args.batch)
    return pixels.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def train(run: Run, steps: int, pictures: Pictures, args: argparse.Namespace, device: torch.device, console: Console):
    """Take ``steps`` steps behind a progress bar; a Chrome trace of the last of them comes back."""
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))
    label, loss, rate = "{task.description:16}", "loss {task.fields[loss]:8.2f}", "{task.fields[rate]:6.1f} images/s"
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(loss),
        TextColumn(rate),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(NAMES[run.criterion.backend], total=steps, loss=float("nan"), rate=0.0)
        begin = time.perf_counter()
        for step in range(steps):
            if step == max(0, steps - TRACED):
                profiler.start()
            run.step(*batch(pictures, step, args, device))
            if device.type != "cuda" or step % 20 == 0:  # reading the loss makes a GPU wait
                rate = (step + 1) * args.batch / (time.perf_counter() - begin)
                bar.update(task, completed=step + 1, loss=float(run.outputs[-1]["total"]), rate=rate)
        profiler.stop()
        bar.update(task, completed=steps)
    return profiler


def find(model: Detector, head, pictures: Pictures, device: torch.device) -> list[list]:
    """Detections on every picture."""
    with torch.no_grad():
        boxes, scores = decode(model(pictures.pixels.to(device).float() / 255), head)
    return [detect(*each) for each in zip(boxes.cpu(), scores.cpu(), strict=True)]


def summary(run: Run, args: argparse.Namespace) -> dict:
    """What ``train.json`` keeps of a run."""
    seconds = run.seconds()
    total = sum(seconds.values())
    return {
        "loss_share": seconds["loss"] / total,
        "images_per_second": args.batch / total,
        "seconds_per_step": seconds,
        "steps": run.losses(),
    }


def fell(losses: Sequence[dict[str, float]]) -> bool:
    """Whether the last quarter of a curve lies below its first."""
    quarter = max(1, len(losses) // 4)
    return fmean(s["total"] for s in losses[-quarter:]) < fmean(s["total"] for s in losses[:quarter])


def installed(name: str) -> str | None:
    """The version of a package, None without it."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(result: dict, args: argparse.Namespace) -> Table:
    """The summary."""
    runs, compared = result["runs"], args.fused_steps
    rows = Table(title=f"{args.loss}, {args.steps} steps of {args.batch} images, {args.size} x {args.size}")
    for column in ("", *NAMES.values()):
        rows.add_column(column, justify="right" if column else "left")
    both = [runs[backend] for backend in NAMES]
    rows.add_row("loss at the first step", *(f"{r['steps'][0]['total']:.4f}" for r in both))
    rows.add_row(f"loss at step {compared}", *(f"{r['steps'][compared - 1]['total']:.4f}" for r in both))
    rows.add_row("loss at the last step", *(f"{r['steps'][-1]['total']:.4f} ({len(r['steps'])})" for r in both))
    rows.add_row("share of a step in the loss", *(f"{r['loss_share']:.1%}" for r in both))
    rows.add_row("images/s", *(f"{r['images_per_second']:.1f}" for r in both))
    rows.add_row(f"largest difference, first {COMPARED} steps", "", f"{max(result['difference'][:COMPARED]):.1e}")
    rows.add_row("largest difference, all steps of both", "", f"{max(result['difference']):.1e}")
    rows.add_row("held-out images: boxes found", f"{result['recall']:.1%}", "")
    rows.add_row("held-out images: detections right", f"{result['precision']:.1%}", "")
    return rows


def main(argv: Sequence[str]) -> int:
    """Run the command; 0 if both losses fell and the curves agree."""
    args = parse(argv)
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    interpreted = device.type == "cpu"
    if interpreted:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which happens at the first fused call
        console.print("No GPU: the fused loss runs in Triton's interpreter, which says nothing about its speed.")
    torch.backends.cudnn.deterministic = True
    args.out.mkdir(parents=True, exist_ok=True)

    images = args.images or args.out / "generated"
    if args.images is None:
        generate(images, args.generate, 2 * args.size, args.seed)
    annotations, names = load_labels(args.labels or images, images)
    annotations = [a for a in annotations if a.image]
    order = torch.randperm(len(annotations), generator=torch.Generator().manual_seed(args.seed)).tolist()
    held_out = min(max(1, len(order) // 10), 100)
    with console.status(f"loading {len(order)} images"):
        validation, training = (
            load([annotations[i] for i in p], args.size) for p in (order[:held_out], order[held_out:])
        )
    boxes = sum(len(a.boxes) for a in training.annotations)
    console.print(
        f"{len(order)} images, {held_out} of them held out; {boxes} boxes of {len(names)} classes to train on"
    )
    anchors = fit_anchors(torch.cat([a.boxes[:, 2:] for a in training.annotations]) * args.size)

    runs = {backend: Run(backend, args, anchors, len(names), device) for backend in NAMES}
    for backend, steps in (("torch", args.steps), ("triton", args.fused_steps)):
        profiler = train(runs[backend], steps, training, args, device, console)
        profiler.export_chrome_trace(str(args.out / f"trace_{backend}.json"))

    results = {backend: summary(run, args) for backend, run in runs.items()}
    reference, fused = (results[backend]["steps"] for backend in NAMES)
    difference = [abs(a["total"] - b["total"]) / abs(a["total"]) for a, b in zip(reference, fused, strict=False)]
    detections = find(runs["torch"].model, runs["torch"].criterion.head, validation, device)
    right = sum(map(hits, detections, validation.annotations))
    found = sum(map(len, detections))
    result = {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "versions": {name: installed(name) for name in ("fusedyolo", "torch", "triton")} | {"python": sys.version},
        "device": torch.cuda.get_device_name() if not interpreted else platform.processor() or platform.machine(),
        "interpreted": interpreted,
        "anchors": anchors,
        "classes": names,
        "difference": difference,
        "recall": right / max(1, sum(len(a.boxes) for a in validation.annotations)),
        "precision": right / max(1, found),
        "runs": results,
    }
    (args.out / "train.json").write_text(json.dumps(result, indent=1))
    draw_curves(args.out / "curves.png", reference, fused, difference, BOUND)
    title = (
        f"{len(detections)} held-out images after {args.steps} steps: detections in colour, annotations dashed in white"
    )
    draw_predictions(args.out / "predictions.png", validation, detections[:SHOWN], names, title)
    console.print(table(result, args))
    console.print(f"curves, pictures, traces and numbers are in {args.out}")
    early = max(difference[:COMPARED])
    if not early <= BOUND:
        console.print(f"[red]The curves differ by {early:.1e} within {COMPARED} steps, want at most {BOUND:g}.")
    if not fell(reference):
        console.print("[red]The loss did not fall.")
    return 0 if early <= BOUND and fell(reference) else 1
