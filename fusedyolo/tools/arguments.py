"""What commands take as arguments, of ``fusedyolo`` and of ``python -m bench``."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError
from pathlib import Path

from .registry import CASES


def positive(text: str) -> int:
    """A number of things."""
    if int(text) < 1:
        raise ArgumentTypeError(f"{text}, want at least 1")
    return int(text)


def side(text: str) -> int:
    """Of an image, in pixels."""
    if int(text) < 1 or int(text) % 32:
        raise ArgumentTypeError(f"{text}, want a multiple of 32")
    return int(text)


def existing(text: str) -> Path:
    """A file or a folder."""
    if not Path(text).exists():
        raise ArgumentTypeError(f"{text} does not exist")
    return Path(text)


def add_loss(parser: ArgumentParser, usual: str) -> None:
    """Give a command ``--loss``, names for :func:`~fusedyolo.tools.registry.select`; ``usual`` says what none means."""
    names = f"one of {', '.join(CASES)}; repeat for more ({usual})"
    parser.add_argument("--loss", action="append", default=[], metavar="NAME", help=names)
