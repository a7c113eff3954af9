"""What commands share on a terminal, those of ``fusedyolo`` and of ``python -m bench``: arguments and tables."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryFile
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


def writable(out: Path) -> None:
    """See that the folder ``out``, or a file with a suffix, can be written; of what is not there yet nothing is made.

    Raises:
        RefusedError: it cannot.
    """
    if out.suffix and out.is_dir():
        raise RefusedError(f"--out: {out} is a folder, want a file")
    folder = out.parent if out.suffix else out
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise RefusedError(f"--out: nothing can be written to {out}: {error.strerror}") from error


def run(package: str, options: Namespace) -> int:
    """Call ``run`` of the module ``options.module``: its exit status, 2 if it refuses or lacks a package of others, 130
    if it is interrupted. What ``options.out`` names can be written when it begins.
    """
    try:
        if getattr(options, "out", None) is not None:
            writable(options.out)
        return import_module(f".{options.module}", package).run(options)
    except RefusedError as error:
        said, status = str(error), 2
    except ModuleNotFoundError as error:
        said, status = lacking(error), 2
    except KeyboardInterrupt:
        said, status = "interrupted", 130
    Console(stderr=status == 130).print(f"[red]{escape(said)}", highlight=False, soft_wrap=True)
    return status


def lacking(error: ModuleNotFoundError) -> str:
    """What to say of a package of others that is not installed.

    Raises:
        ModuleNotFoundError: it is one of ours.
    """
    name = (error.name or "").partition(".")[0]
    if name in ("", "fusedyolo", "bench"):
        raise error
    return f"{name} is not installed: pip install 'fusedyolo[bench]'"


def table(title: str, names: Sequence[str], numbers: Sequence[str], caption: str = "", **more: Any) -> Table:
    """A table with columns of names and of numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, **more)
    made.caption, made.caption_justify = caption, "left"
    for name in names:
        made.add_column(name, no_wrap=True)
    for name in numbers:
        made.add_column(name, justify="right")
    return made
