"""Which predictions a loss assigns to the objects of an image, drawn; those of a network that knows nothing, or that
has been trained for some steps on the images.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from matplotlib.backend_bases import FigureCanvasBase
from rich.console import Console
from rich.progress import track

import fusedyolo
from fusedyolo.tools.registry import SHOWN, RefusedError, Workload

from . import labels, pictures
from .measure import EAGER
from .train import DRAWN, Run, chosen

CALM = -4.0  # logits of predictions that are sure of nothing


def run(options: argparse.Namespace) -> int:
    """Draw it.

    Raises:
        RefusedError: several losses, no such image, or a kind of picture that matplotlib does not write.
    """
    case, index, kinds = chosen(options, SHOWN[1:]), options.index, FigureCanvasBase.get_supported_filetypes()
    if options.out.suffix[1:].lower() not in kinds:
        raise RefusedError(f"--out: {options.out}, want a name that ends in one of {', '.join(kinds)}")
    drawn = DRAWN if options.steps else min(index + 1, DRAWN)
    annotations, names = pictures.annotated(options, options.out.parent / "drawn", drawn, options.size)
    if index >= len(annotations):
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
