"""What commands share on a terminal, those of ``fusedyolo`` and of ``python -m bench``: arguments and tables."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .registry import CASES, RefusedError

WIDTH = 160  # at least: in fewer columns, numbers of wide tables are cut off; a terminal folds lines that are too long
PASSES = {True: "[green]passes[/]", False: "[bold red]FAILS[/]"}


def positive(text: str) -> int:
    """A number of things."""
    if int(text) < 1:
        raise ArgumentTypeError(f"{text}, want at least 1")
    return int(text)


def count(text: str) -> int:
    """A number of things that may be none."""
    if int(text) < 0:
        raise ArgumentTypeError(f"{text}, want at least 0")
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


def source(text: str) -> Path:
    """A folder that is there."""
    if existing(text).is_file():
        raise ArgumentTypeError(f"{text} is a file, want a folder")
    return Path(text)


def folder(text: str) -> Path:
    """One that can be written to, made if it is not there."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=text):
            return Path(text)
    except OSError as error:
        raise ArgumentTypeError(f"nothing can be written to {text}: {error.strerror}") from None


def file(text: str) -> Path:
    """One in such a folder."""
    if Path(text).is_dir():
        raise ArgumentTypeError(f"{text} is a folder, want a file")
    return folder(str(Path(text).parent)) / Path(text).name


def add_loss(parser: ArgumentParser, usual: str, several: bool = True) -> None:
    """Give a command ``--loss``, names for :func:`~fusedyolo.tools.registry.select`; ``usual`` says what none means.
    Where it does not take ``several``, its module refuses them.
    """
    names = f"one of {', '.join(CASES)}{'; repeat for more' * several} ({usual})"
    parser.add_argument("--loss", action="append", default=[], metavar="NAME", help=names)


def console() -> Console:
    """What a command prints its tables on."""
    return Console(width=max(WIDTH, Console().width))


@contextmanager
def asked() -> Iterator[None]:
    """Whatever is wrong with what a user gave is :class:`~fusedyolo.tools.registry.RefusedError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise RefusedError(str(error)) from error


def run(package: str, options: Namespace) -> int:
    """Call ``run`` of the module ``options.module``: its exit status, 2 if it refuses or lacks a package of others, 130
    if it is interrupted.
    """
    try:
        return import_module(f".{options.module}", package).run(options)
    except RefusedError as error:
        said, status = str(error), 2
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "fusedyolo", "bench"):
            raise
        said, status = f"{name} is not installed: pip install 'fusedyolo[bench]'", 2
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    Console(stderr=status == 130).print(f"[red]{escape(said)}", highlight=False, soft_wrap=True)
    return status


def table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str = "") -> Table:
    """A table with columns of names and of numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    made.caption, made.caption_justify = caption, "left"
    for name in names:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right")
    return made
