"""``python -m bench assign --images DIR``: which predictions a loss assigns to the objects of an image, drawn."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

import fusedyolo
from fusedyolo.tools import objects
from fusedyolo.tools.registry import CASES, Workload

from . import pictures

CALM = -4.0  # logits of predictions that are sure of nothing


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench assign", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of images; drawn ones if left out")
    parser.add_argument(
        "--labels", type=Path, help="YOLO txt folder, COCO json or VOC xml folder; found beside --images"
    )
    parser.add_argument("--loss", choices=list(CASES), default="YOLOv5")
    parser.add_argument("--index", type=int, default=0, help="which of the images")
    parser.add_argument("--size", type=int, default=416, help="side the image is fitted into, a multiple of 32")
    parser.add_argument("--out", type=Path, default=Path("runs/assignment.png"))
    args = parser.parse_args(argv)
    if args.size % 32 or args.size <= 0:
        parser.error(f"--size: {args.size}, want a multiple of 32")
    return args


def main(argv: Sequence[str]) -> int:
    """Draw it."""
    args, console = parse(argv), Console()
    folder = args.images
    if folder is None:
        folder = args.out.parent / "drawn"
        pictures.generate(folder, args.index + 1, args.size, seed=0)
    labels = objects.load_labels(args.labels or folder, folder)
    if not 0 <= args.index < len(labels.annotations):
        console.print(f"--index: {args.index}, want less than {len(labels.annotations)}, the images there are")
        return 2
    loaded = pictures.load([labels.annotations[args.index]], args.size)
    case, work = CASES[args.loss], replace(Workload(), batch=1, size=args.size, classes=len(labels.names))
    criterion = case.build(work.classes, "torch")
    preds = [torch.full_like(pred, CALM).detach() for pred in case.predictions(work)]
    rows = objects.pack(loaded.annotations)
    rows[:, 1] += case.background
    names = ["background"] * case.background + list(labels.names)
    found = fusedyolo.assign(criterion, case.pack(preds, work), rows, **case.geometry(work))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure = fusedyolo.draw_assignment(loaded.pixels[0], found, names=names)
    figure.suptitle(f"{case.name}, objects: {len(loaded.annotations[0].boxes)}", fontsize=11)
    figure.savefig(args.out, dpi=110)
    console.print(f"wrote {args.out}", highlight=False)
    return 0
