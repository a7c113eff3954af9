"""Which predictions a loss assigns to the objects of an image, drawn; those of a network that knows nothing, or that
has been trained for some steps on the images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track

import fusedyolo
from fusedyolo.tools.registry import SHOWN, RefusedError, Workload, select

from . import labels, pictures
from .measure import EAGER
from .train import DRAWN, Run

CALM = -4.0  # logits of predictions that are sure of nothing


def run(options: argparse.Namespace) -> int:
    """Draw it."""
    case, index = select(options.loss, SHOWN[1:])[0], options.index
    drawn = max(index + 1, DRAWN * (options.steps > 0))
    annotations, names = pictures.annotated(options, options.out.parent / "drawn", drawn, options.size)
    if not 0 <= index < len(annotations):
        raise RefusedError(f"--index: {index}, want less than {len(annotations)}, the images there are")
    shown = pictures.load([annotations[index]], options.size)
    work = Workload(batch=1, size=options.size, classes=len(names), layout="nchw")
    preds = [torch.full_like(pred, CALM).detach() for pred in case.predictions(work)]
    if options.steps:  # of a small detector, with the reference, as what objects pick is what predicts them best
        images = pictures.load(annotations, options.size)
        training = Run(EAGER, case, replace(work, batch=min(8, len(annotations))), 0, torch.device("cpu"))
        for number in track(range(options.steps), "training", transient=True):
            training.step(number, training.loss, images)
        preds = training.model.requires_grad_(False)(shown.pixels / 255)
    rows = labels.pack(shown.annotations)
    rows[:, 1] += case.background
    criterion = case.build(work.classes, "torch")
    found = fusedyolo.assign(criterion, case.pack(preds, work), rows, **case.geometry(work))
    names = ["background"] * case.background + names
    figure = fusedyolo.draw_assignment(shown.pixels[0], found, names=names)
    figure.suptitle(f"{case.name}, objects: {len(shown.annotations[0].boxes)}", fontsize=11)
    figure.savefig(options.out, dpi=110)
    Console().print(f"wrote {options.out}", highlight=False)
    return 0
