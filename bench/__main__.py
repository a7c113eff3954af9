"""``python -m bench``: the command line of the main job, :mod:`bench.compare`, and of the others."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence

from fusedyolo.tools import terminal
from fusedyolo.tools.codegen import TARGETS
from fusedyolo.tools.registry import AXES, DTYPES, FORMS, LAYOUTS, SHOWN
from fusedyolo.tools.terminal import add_loss, count, existing, file, folder, positive, side, source

from .predict import GPUS

FOLDER = "folder for JSON, CSV and pictures"
LABELS = "YOLO txt folder, COCO json or VOC xml folder"


def parser() -> ArgumentParser:
    """Of every command; each has its module, whose ``run`` takes the options."""
    main = ArgumentParser(
        "python -m bench",
        description="Parity first, then launches, bytes, host waits, compiled code, predicted and, on a GPU, time.",
    )
    main.set_defaults(module="compare")
    main.add_argument("--batch", type=positive, help="images (16; 2 with --quick)")
    main.add_argument("--size", type=side, help="image side in pixels, a multiple of 32 (640; 320 with --quick)")
    main.add_argument("--classes", type=positive, default=80)
    main.add_argument("--dtype", default="float32", choices=[name for name in DTYPES if name != "float64"])
    add_loss(main, "each loss in its default recipe")
    main.add_argument("--recipes", action="store_true", help="every recipe listed above")
    main.add_argument("--labels", type=existing, metavar="PATH", help=f"objects of a {LABELS}")
    main.add_argument("--form", default="packed", choices=FORMS, help="targets as packed rows or fusedyolo.Targets")
    main.add_argument("--layout", default="", choices=LAYOUTS, help="of predictions, where a loss takes it")
    main.add_argument("--exact", action="store_true", help="without a GPU, run every program of a kernel: minutes")
    main.add_argument("--target", action="append", choices=TARGETS, help="to compile for (sm_90, gfx942)")
    main.add_argument("--gpu", default="H100", choices=list(GPUS), help="to predict the time of launches for (H100)")
    main.add_argument("--quick", action="store_true", help="smaller, no torch.compile")
    only = main.add_mutually_exclusive_group()
    only.add_argument("--times", action="store_true", help="on a GPU, parity and times alone")
    only.add_argument("--predict", action="store_true", help="parity and predicted times alone")
    commands = main.add_subparsers(metavar="COMMAND", title="other commands; COMMAND --help says more")

    def command(name: str, about: str) -> ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        added.set_defaults(module=name)
        return added

    sweep = command("sweep", "how the cost of a step grows with objects, batch, classes, type and layout")
    add_loss(sweep, ", ".join(case.name for case in SHOWN))
    sweep.add_argument("--axis", action="append", choices=AXES, help="what is varied; repeat for more (all)")

    train = command("train", "where a training step goes, with the fused loss and with the one that it replaces")
    add_loss(train, f"{SHOWN[0].name}; the first recipe that is meant", several=False)
    train.add_argument("--peer", metavar="NAME", help="what to compare with (an installed peer, else eager)")
    train.add_argument("--steps", type=positive, default=1000, help="of which, without a GPU, the fused loss takes 3")
    train.add_argument("--batch", type=positive, default=8)
    train.add_argument("--size", type=side, default=192, help="side that images are fitted into, a multiple of 32")
    train.add_argument("--seed", type=int, default=0)

    assign = command("assign", "which predictions a loss assigns to the objects of an image, drawn")
    add_loss(assign, f"{SHOWN[1].name}; the first recipe that is meant", several=False)
    assign.add_argument("--index", type=count, default=0, help="which of the images")
    assign.add_argument("--size", type=side, default=416, help="side the image is fitted into, a multiple of 32")
    assign.add_argument("--steps", type=count, default=0, help="that a small detector is trained first (0)")
    assign.add_argument("--out", type=file, default="runs/assignment.png")

    qualify = command("qualify", "everything that wants a GPU, in one command of under eight minutes and one folder")
    for each in (main, sweep):
        each.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes at a time")
    for each in (train, assign):
        each.add_argument("--images", type=source, help="folder of images; drawn ones if left out")
        each.add_argument("--labels", type=existing, help=f"{LABELS}; found beside --images")
    for each, name in ((main, "bench"), (sweep, "sweep"), (train, "train"), (qualify, "qualify")):
        each.add_argument("--out", type=folder, default=f"runs/{name}", help=FOLDER)
    return main


def main(argv: Sequence[str]) -> int:
    """Run a command; its exit status."""
    return terminal.run("bench", parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
