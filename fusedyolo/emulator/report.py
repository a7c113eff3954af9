"""What a launch was found to do, and what it took."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .ptx import Fault, Instruction

__all__ = ["Fault", "Findings", "Report"]


@dataclass
class Report:
    """Of one launch.

    ``faults`` are errors; ``notes`` what a GPU does right but a reader might want to know (several threads write one
    value to one place; a branch parts a warp). ``active`` counts threads at accesses, barriers and shuffles, by line.
    ``by_program`` are executed warp instructions of each program: one for each warp in which a thread executes it;
    ``chains``, where they were asked for, its cycles until its last instruction, and until its last atomic that orders
    other accesses.
    """

    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    active: Counter[int] = field(default_factory=Counter)
    by_program: dict[int, int] = field(default_factory=dict)
    chains: dict[int, tuple[int, int]] = field(default_factory=dict)
    steps: int = 0

    @property
    def instructions(self) -> int:
        """Warp instructions in all."""
        return sum(self.by_program.values())

    @property
    def programs(self) -> int:
        """That were run to their end, or to the end of the launch."""
        return len(self.by_program)


class Findings:
    """Faults and notes with the instruction they belong to; with ``stop`` the first fault is raised."""

    def __init__(self, report: Report, stop: bool):
        self.report, self.stop = report, stop
        self.at: Instruction | None = None

    def _where(self) -> str:
        return "" if self.at is None else f" at `{self.at.text}` ({self.at.place})"

    def fault(self, what: str) -> None:
        """An error at the current instruction."""
        text = what + self._where()
        self.report.faults[text] += 1
        if self.stop:
            raise Fault(text)

    def note(self, what: str, here: bool = False) -> None:
        """What is right, but worth a note; ``here`` with the place."""
        self.report.notes[what + self._where() if here else what] += 1
