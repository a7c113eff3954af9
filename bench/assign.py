"""Which predictions a loss assigns to the objects of an image, drawn."""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

import fusedyolo
from fusedyolo.tools.registry import SHOWN, RefusedError, Workload, select
from fusedyolo.tools.terminal import asked

from . import labels, pictures

CALM = -4.0  # logits of predictions that are sure of nothing


def run(options: argparse.Namespace) -> int:
    """Draw it."""
    case, index = select(options.loss, SHOWN[1:])[0], options.index
    with asked():
        annotations, names = pictures.annotated(options, options.out.parent / "drawn", index + 1, options.size, 0)
    if not 0 <= index < len(annotations):
        raise RefusedError(f"--index: {index}, want less than {len(annotations)}, the images there are")
    loaded = pictures.load([annotations[index]], options.size)
    work = Workload(batch=1, size=options.size, classes=len(names))
    preds = [torch.full_like(pred, CALM).detach() for pred in case.predictions(work)]
    rows = labels.pack(loaded.annotations)
    rows[:, 1] += case.background
    criterion = case.build(work.classes, "torch")
    found = fusedyolo.assign(criterion, case.pack(preds, work), rows, **case.geometry(work))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    names = ["background"] * case.background + names
    figure = fusedyolo.draw_assignment(loaded.pixels[0], found, names=names)
    figure.suptitle(f"{case.name}, objects: {len(loaded.annotations[0].boxes)}", fontsize=11)
    figure.savefig(options.out, dpi=110)
    Console().print(f"wrote {options.out}", highlight=False)
    return 0
