"""PTX broken one line at a time: does the emulator notice?

In a process without ``TRITON_INTERPRET``, from the repository root: ``PYTHONPATH=tests python -m emulator.mutants
YOLOv2/region grid_kernel`` breaks every line of each kind and prints how many are caught; ``--most`` bounds each kind.
"""

from __future__ import annotations

import argparse
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from fusedyolo import functional
from fusedyolo.emulator import Device
from fusedyolo.tools.parity import step
from fusedyolo.tools.registry import CASES, Workload

GONE = "\t// gone"
UNMASK = r"@!?%p\d+ "


@dataclass(frozen=True)
class Kind:
    """Lines that match are edited; ``seeds`` schedules are tried, one where numbers or bounds must give it away."""

    pattern: str
    edit: Callable[[str], str]
    seeds: int = 1

    def sites(self, lines: list[str]) -> list[int]:
        """Numbers of lines that it changes."""
        return [i for i, line in enumerate(lines) if re.search(self.pattern, line) and self.edit(line) != line]

    def broken(self, text: str, site: int) -> str:
        """The text with one line edited."""
        lines = text.splitlines()
        return "\n".join([*lines[:site], self.edit(lines[site]), *lines[site + 1 :]])


def shifted(by: int) -> Callable[[str], str]:
    """The address of an access moved on."""
    return lambda line: re.sub(r"\[ ?(%\w+)( ?\+ ?0)? ?\]", rf"[\1+{by}]", line)


KINDS = {
    "barrier": Kind(r"^\tbar\.sync \t0;$", lambda line: GONE, 3),
    "relaxed": Kind(r"acq_rel", lambda line: line.replace("acq_rel", "relaxed"), 3),
    "scope": Kind(r"\.gpu\.acq_rel", lambda line: line.replace(".gpu.", ".cta."), 3),
    "store shifted": Kind(r"st\.global", shifted(4)),
    "store far": Kind(r"st\.global", shifted(-4096)),
    "load shifted": Kind(r"ld\.global", shifted(4)),
    "store mask": Kind(UNMASK + r"st\.global", lambda line: re.sub(UNMASK, "", line)),
    "load mask": Kind(UNMASK + r"ld\.global", lambda line: re.sub(UNMASK, "", line)),
    "store dropped": Kind(r"st\.global", lambda line: GONE),
    "shared store dropped": Kind(r"(st|stmatrix\S*)\.shared", lambda line: GONE),
    "shared store shifted": Kind(r"st\.shared", shifted(4)),
    "shared store mask": Kind(UNMASK + r"st\.shared", lambda line: re.sub(UNMASK, "", line)),
    "wrong lane": Kind(r"shfl\.sync\.bfly.*, 1, 31", lambda line: line.replace(", 1, 31", ", 2, 31")),
    "atomic mask": Kind(UNMASK + "atom", lambda line: re.sub(UNMASK, "", line)),
}


Outputs = dict[str, torch.Tensor]


def loss(name: str) -> Callable[[], Outputs]:
    """A small training step of a recipe."""
    case, work = CASES[name], Workload(2, 64, 3, "float32", seed=3)
    targets, criterion = case.targets(work), case.bind(case.build(work.classes, "triton"), work)

    def go() -> Outputs:
        preds = case.predictions(work)
        out = step(criterion, preds, targets, torch.tensor(1.0))
        return {"total": out.total, **out.parts, **{f"grad{i}": pred.grad for i, pred in enumerate(preds)}}

    return go


def focal() -> Outputs:
    """A pointwise loss, summed."""
    x = torch.linspace(-6, 6, 1300).requires_grad_()
    value = functional.sigmoid_focal_loss(x, torch.linspace(0, 1, 1300), reduction="sum", backend="triton")
    value.backward()
    assert x.grad is not None
    return {"value": value, "grad": x.grad}


def problem(name: str) -> Callable[[], Outputs]:
    """What is run: ``focal`` or the name of a recipe."""
    return focal if name == "focal" else loss(name)


@dataclass
class Mutants:
    """One kernel of a problem, as it is and broken."""

    go: Callable[[], Outputs]
    kernel: str
    arch: int = 90
    text: str = ""
    active: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        with Device(self.arch) as device:
            out = self.go()
        device.check()
        self._right = {key: value.detach().clone() for key, value in out.items()}
        self._notes = self._known_notes(device)
        mine = [record for record in device.launches if record.name == self.kernel]
        self.text = mine[0].compiled.ptx
        for record in mine:
            if record.compiled.ptx == self.text:
                self.active.update(record.report.active)

    def _known_notes(self, device: Device) -> set[str]:
        return {re.sub(r" at `.*", "", note) for note in device.notes}

    def found(self, broken: str, seed: int) -> set[str]:
        """How the emulator or the numbers give a broken kernel away."""

        def change(name: str, text: str) -> str:
            return broken if text == self.text else text

        device = Device(self.arch, seed, change=change, limit=20_000)
        try:
            with device:
                out = self.go()
        except Exception as error:
            return {type(error).__name__}
        how = {re.sub(r" at `.*", "", fault).partition(": ")[2] or fault for fault in device.faults}
        how |= {f"noted: {note.partition(': ')[2]}" for note in self._known_notes(device) - self._notes}
        if any(not torch.equal(self._right[key], value) for key, value in out.items()):
            how.add("other numbers")
        if any(device.missing(value) for value in out.values()):
            how.add("an output is not written")
        return how

    def sites(self, kind: Kind) -> list[int]:
        """Lines of a kind that some thread comes to."""
        return [site for site in kind.sites(self.text.splitlines()) if self.active[site]]

    def tried(self, kind: Kind, most: int) -> Iterator[tuple[int, set[str]]]:
        """Each broken line, up to ``most`` of them, with how it was noticed."""
        sites = self.sites(kind)
        random.Random(1).shuffle(sites)
        for site in sites[:most]:
            broken, how = kind.broken(self.text, site), set[str]()
            for seed in range(kind.seeds):
                how = how or self.found(broken, seed)
            yield site, how


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problem", help="focal, or the name of a recipe")
    parser.add_argument("kernel")
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--most", type=int, default=1000)
    options = parser.parse_args()
    mutants = Mutants(problem(options.problem), options.kernel, options.arch)
    lines = mutants.text.splitlines()
    for name, kind in KINDS.items():
        ways: Counter[str] = Counter()
        tried = dict(mutants.tried(kind, options.most))
        for how in tried.values():
            ways.update(how)
        idle = len(kind.sites(lines)) - len(mutants.sites(kind))
        caught = sum(bool(how) for how in tried.values())
        print(f"{name}: {caught} of {len(tried)} caught ({idle} lines are not run); {dict(ways)}", flush=True)
        for site, how in tried.items():
            if not how:
                place = next((each for each in reversed(lines[:site]) if ".loc" in each), "").partition("//")[2]
                print(f"    survives: line {site} {lines[site].strip()} ({place.strip()})", flush=True)


if __name__ == "__main__":
    main()
