"""Tables of what compiled kernels were found to do: on the terminal, and in a section of a markdown file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .compiled import SMALL, Found, Settings
from .environment import kernels_digest, version
from .registry import CASES

BEGIN, END = "<!-- written by fusedyolo check --compiled -->", "<!-- until here -->"
LINES = 8  # of what is wrong with a case


@dataclass(frozen=True)
class Result:
    """What was found of a case in one type, compiled for one architecture."""

    name: str
    dtype: str
    arch: int
    found: Found

    @property
    def cells(self) -> list[str]:
        """One for each of :data:`COLUMNS`; ``?`` where it did not run."""
        return [form(getattr(self.found, name)) if self.found.programs else "?" for name, _, form in COLUMNS]


COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("error", "error", "{:.1e}".format),
    ("eager", "eager's", "{:.1e}".format),
    ("same", "bits", lambda same: "not compared" if same is None else "same" if same else "OTHER"),
    ("faults", "faults", lambda faults: str(sum(faults.values()))),
    ("unwritten", "unwritten bytes", "{:,}".format),
    ("programs", "programs", "{:,}".format),
    ("instructions", "warp instructions", "{:,}".format),
)


def print_results(console: Console, results: Sequence[Result], settings: Settings) -> None:
    """The table, and below it why cases fail."""
    title = f"Compiled kernels, executed, against the reference in float64; {_how(settings)}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("case", "dtype", "arch"):
        table.add_column(name, no_wrap=True)
    for _, name, _ in COLUMNS:
        table.add_column(name, justify="right")
    table.add_column("")
    for result in results:
        verdict = "[green]passes" if result.found.ok else "[bold red]FAILS"
        table.add_row(result.name, result.dtype, f"sm_{result.arch}", *result.cells, verdict)
    console.print(table)
    failed = [result for result in results if not result.found.ok]
    for result in failed:
        console.print(f"[red]{result.name} {result.dtype} sm_{result.arch}:", highlight=False)
        more = len(result.found.wrong) - LINES
        lines = result.found.wrong[:LINES] + [f"and {more} more"] * (more > 0)
        console.print("\n".join(f"    {escape(line)}" for line in lines), highlight=False)
    if failed:
        console.print(f"[bold red]{len(failed)} of {len(results)} fail")


def accepts(path: Path) -> None:
    """Raises:
    ValueError: :func:`write` would have no place in this file.
    """
    if not path.parent.is_dir():
        raise ValueError(f"--markdown: {path.parent} is no folder")
    if path.exists():
        text = path.read_text()
        if not -1 < text.find(BEGIN) < text.find(END):
            raise ValueError(f"--markdown: {path} has no line {BEGIN}, or no line {END} after it")


def write(path: Path, results: Sequence[Result], settings: Settings) -> None:
    """Put the table between the two lines of a file that is there, or into a new one."""
    text = path.read_text() if path.exists() else f"{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{_markdown(results, settings)}\n{END}{after}")


def _markdown(results: Sequence[Result], settings: Settings) -> str:
    """One row for each case and type; where architectures differ, a cell has their values one after the other."""
    rows: dict[tuple[str, str], list[list[str]]] = {}
    for result in results:
        rows.setdefault((result.name, result.dtype), []).append(result.cells)
    archs = " / ".join(dict.fromkeys(f"sm_{result.arch}" for result in results))
    failed = sum(not result.found.ok for result in results)
    versions = ", ".join(f"{name} {version(name)}" for name in ("fusedyolo", "torch", "triton"))
    larger = dict.fromkeys(f" ({case.loss}: {case.images})" for case in CASES.values() if case.images > SMALL.batch)
    head = ["case", "dtype", *(name for _, name, _ in COLUMNS)]
    lines = [
        f"{len(results) - failed} of {len(results)} pass. {archs}; {_how(settings)}. {versions}, kernels "
        f"{kernels_digest()}. Batch {SMALL.batch}{''.join(larger)}, {SMALL.size} px, {SMALL.classes} classes.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * 2 + "---:|" * len(COLUMNS),
    ]
    for (name, dtype), each in rows.items():
        cells = [" / ".join(dict.fromkeys(values)) for values in zip(*each, strict=True)]
        lines.append("| " + " | ".join([name, dtype, *cells]) + " |")
    return "\n".join(lines)


def _how(settings: Settings) -> str:
    """How kernels were run, in words."""
    words = [f"{settings.seeds} seed" + "s" * (settings.seeds > 1), f"fusion {settings.fusion}"]
    return ", ".join(words + ["noise"] * settings.noise + ["fine"] * settings.fine)
