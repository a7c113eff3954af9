"""Which predictions a loss assigns to the objects of an image, drawn."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from rich.console import Console

import fusedyolo
from fusedyolo.tools.registry import CASES, Workload

from . import labels, pictures

CALM = -4.0  # logits of predictions that are sure of nothing


def run(args: argparse.Namespace) -> int:
    """Draw it: 0, or 2 for what cannot be drawn."""
    console = Console()
    folder = args.images
    if folder is None:
        folder = args.out.parent / "drawn"
        pictures.generate(folder, args.index + 1, args.size, seed=0)
    annotations, names = labels.load_labels(args.labels or folder, folder)
    if not 0 <= args.index < len(annotations):
        console.print(f"--index: {args.index}, want less than {len(annotations)}, the images there are")
        return 2
    loaded = pictures.load([annotations[args.index]], args.size)
    case = args.cases[0] if args.cases else CASES["YOLOv5"]
    work = replace(Workload(), batch=1, size=args.size, classes=len(names))
    criterion = case.build(work.classes, "torch")
    preds = [torch.full_like(pred, CALM).detach() for pred in case.predictions(work)]
    rows = labels.pack(loaded.annotations)
    rows[:, 1] += case.background
    names = ["background"] * case.background + names
    found = fusedyolo.assign(criterion, case.pack(preds, work), rows, **case.geometry(work))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure = fusedyolo.draw_assignment(loaded.pixels[0], found, names=names)
    figure.suptitle(f"{case.name}, objects: {len(loaded.annotations[0].boxes)}", fontsize=11)
    figure.savefig(args.out, dpi=110)
    console.print(f"wrote {args.out}", highlight=False)
    return 0
