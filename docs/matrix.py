"""Writes the tables of docs/matrix.md, from the registry of losses, the table of terms and bench/data/results.csv.

python docs/matrix.py
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from fusedyolo.terms import TERMS, Term
from fusedyolo.tools.registry import CASES, Case, Workload

ROOT = Path(__file__).parents[1]
PAGE, DATA = ROOT / "docs" / "matrix.md", ROOT / "bench" / "data" / "results.csv"
PLACE = re.compile(r"(<!-- written by docs/matrix.py: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
OURS = ("fused", "eager", "compile")
WORK = Workload()
COST = (
    ("loss", "the peer"),
    ("error: ours", "the peer's"),
    ("launches: ours", "the peer's"),
    ("bytes / P: ours", "floor", "the peer's"),
    ("waits: ours", "the peer's"),
)
TERM = ("term", "of", "numbers, as usual", "source")
GENERIC = (("loss",), ("launches: ours", "eager", "compiled"), ("bytes / P: ours", "eager", "compiled"))

Found = Mapping[str, Mapping[str, str]]
"""Values by provider and metric."""


def read(path: Path = DATA) -> tuple[dict[str, dict[str, dict[str, str]]], dict[str, str]]:
    """By case the values, of a CPU and of the usual workload; and peers with their versions."""
    values: dict[str, dict[str, dict[str, str]]] = {}
    versions = {}
    same = {name: str(getattr(WORK, name)) for name in ("batch", "size", "classes", "dtype", "objects", "form", "seed")}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["device"] == "cpu" and all(row[name] == value for name, value in same.items()):
                case = "/".join(filter(None, (row["loss"], row["recipe"])))
                values.setdefault(case, {}).setdefault(row["provider"], {})[row["metric"]] = row["value"]
                if row["peer"]:
                    versions[row["provider"]] = row["peer"].removesuffix(" ?")
    return values, versions


def cost(case: Case, found: Found, versions: Mapping[str, str]) -> tuple[str, ...]:
    """A line of ours and the peer's; ``?`` for what was not counted, nothing where there is no peer."""
    (peer,) = [name for name in found if name not in OURS] or [""]
    both = found.get("fused", {}), found.get(peer)
    ours, theirs = (_bytes(of) for of in both)
    return (
        f"[{case.name}](reference/losses.md#fusedyolo.{case.cls})",
        versions.get(peer, ""),
        *(_errors(of) for of in both),
        *(_launches(of) for of in both),
        *(ours, f"{case.floor(WORK):.2f}", theirs),
        *(_waits(of) for of in both),
    )


def generic(case: Case, found: Found) -> tuple[str, ...]:
    """A line of ours, of the eager reference and of what ``torch.compile`` makes of that."""
    every = [found.get(name, {}) for name in OURS]
    return (case.name, *(_launches(of) for of in every), *(_bytes(of) for of in every))


def _errors(of: Mapping[str, str] | None) -> str:
    if of is None:
        return ""
    loss, grad = (of.get(name) for name in ("loss_error", "grad_error"))
    return "?" if loss is None or grad is None else f"{float(loss):.1e}, {float(grad):.1e}"


def _launches(of: Mapping[str, str] | None) -> str:
    if of is None:
        return ""
    return str(int(of.get("triton_launches", 0)) + int(of["other_launches"])) if "other_launches" in of else "?"


def _bytes(of: Mapping[str, str] | None) -> str:
    if of is None:
        return ""
    if "bytes_per_P" not in of:
        return "?"
    estimated = 0 < float(of.get("programs_run", 1)) < 1
    return f"{'~' * estimated}{float(of['bytes_per_P']):.{3 if 'floor_per_P' in of else 2}f}"


def _waits(of: Mapping[str, str] | None) -> str:
    return "" if of is None else of.get("syncs", "?")


def tables() -> dict[str, str]:
    """What stands in each place of the page, in Markdown."""
    values, versions = read()
    found = {case: values.get(case.name, {}) for case in CASES.values()}
    known = [term for term in TERMS.values() if term.users]
    return {
        "costs": _markdown(COST, [cost(case, of, versions) for case, of in found.items()], words=2),
        "eager": _markdown(GENERIC, [generic(case, of) for case, of in found.items()], words=1),
        "terms": _markdown((TERM,), [described(term) for term in known], words=len(TERM)),
    }


def described(term: Term) -> tuple[str, ...]:
    """A line of a term that users may ask for."""
    numbers = [f"{name} = {value:g}" for name, value in {**term.numbers, **term.optional}.items()]
    return f"`{term.name}`", ", ".join(term.roles), ", ".join(numbers), term.source


def _markdown(head: Sequence[tuple[str, ...]], lines: Sequence[tuple[str, ...]], words: int) -> str:
    """A table whose first columns, so many, are words."""
    names = sum(head, ())
    aligned = ("---",) * words + ("---:",) * (len(names) - words)
    return "".join(f"| {' | '.join(row)} |\n" for row in (names, aligned, *lines))


def page(text: str) -> str:
    """The page with the tables as they are to be."""
    made = tables()
    return PLACE.sub(lambda place: f"{place[1]}\n{made[place[2]]}\n{place[3]}", text)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
