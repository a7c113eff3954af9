"""What commands share on a terminal, those of ``fusedyolo`` and of ``python -m bench``: arguments and tables."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .registry import CASES, RefusedError

PASSES = {True: "[green]passes[/]", False: "[bold red]FAILS[/]"}


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


@contextmanager
def asked() -> Iterator[None]:
    """Whatever is wrong with what a user gave is :class:`~fusedyolo.tools.registry.RefusedError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RefusedError(str(error)) from error


def run(package: str, options: Namespace) -> int:
    """Call ``run`` of the module ``options.module``: its exit status, or 2 if it refuses."""
    try:
        return import_module(f".{options.module}", package).run(options)
    except RefusedError as error:
        Console().print(f"[red]{escape(str(error))}", highlight=False)
        return 2


def table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str = "", **more: Any) -> Table:
    """A table with columns of names and of numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, **more)
    made.caption, made.caption_justify = caption, "left"
    for name in names:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right")
    return made
