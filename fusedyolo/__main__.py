"""``python -m fusedyolo`` and the command ``fusedyolo``: the command line of ``env``, ``check`` and ``tune``."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from .emulator.compare import ARCHS, FUSION
from .tools import terminal
from .tools.compiled import BEGIN, END
from .tools.registry import DTYPES, LAYOUTS
from .tools.terminal import add_loss, folder, positive, side


def parse(argv: Sequence[str] | None = None) -> Namespace:
    """The options of a command, whose module's ``run`` takes them."""
    main = ArgumentParser("fusedyolo", description="Training losses of one-stage detectors.")
    commands = main.add_subparsers(required=True, metavar="COMMAND", dest="module")

    def command(name: str, about: str) -> ArgumentParser:
        return commands.add_parser(name, help=about, description=about)

    env = command("env", "Versions, GPU, which implementation runs, and which launch configurations are found.")
    env.add_argument("--json", action="store_true", help="print JSON")

    check = command("check", "Compare every loss and its gradient with the reference in float64 on this machine.")
    add_loss(check, "all; with --compiled also select and pointwise")
    check.add_argument("--dtype", action="append", choices=list(DTYPES), help="repeat for more (float32)")
    check.add_argument("--compiled", action="store_true", help="compile the kernels and execute them without a GPU")
    group = check.add_argument_group("with --compiled")
    group.add_argument("--arch", action="append", type=int, choices=ARCHS, help="90 for sm_90; repeat for more (90)")
    group.add_argument("--seeds", type=positive, help="orders of threads, warps and programs that are tried (2)")
    group.add_argument("--fusion", choices=list(FUSION), help="of products and sums (as-shipped)")
    group.add_argument("--noise", action="store_true", help="approximate instructions are off by what is documented")
    group.add_argument("--fine", action="store_true", help="other threads come in before every access")
    place = f"also write the table into this file, between its lines {BEGIN} and {END}"
    group.add_argument("--markdown", type=Path, metavar="PATH", help=place)

    tune = command("tune", "Measure block sizes, warps and stages on this GPU, for each loss, and keep the best.")
    add_loss(tune, "each loss in its default recipe")
    tune.add_argument("--dtype", nargs="+", default=["float32"], choices=list(DTYPES))
    tune.add_argument("--layout", nargs="+", default=[""], choices=LAYOUTS, help="of predictions (a loss's usual one)")
    tune.add_argument("--batch", nargs="+", type=positive, default=[16])
    tune.add_argument("--size", nargs="+", type=side, default=[640], help="image sides in pixels, multiples of 32")
    tune.add_argument("--classes", nargs="+", type=positive, default=[80])
    tune.add_argument("--out", type=folder, help="folder of the results (that of the user's own configurations)")
    tune.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes that compile")
    return main.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    return terminal.run("fusedyolo.tools", parse(argv))


if __name__ == "__main__":
    sys.exit(main())
