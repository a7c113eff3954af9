"""How long instructions wait for one another: each program as if it had a multiprocessor to itself.

A warp issues its instructions in the order of the PTX, one a cycle. One whose operands are not there yet waits, and all
that come after it wait, too; a barrier waits for the slowest warp of its program. What a program takes so is a chain of
loads, shuffles, barriers and arithmetic, which no other program hides where all of a launch run at once.

Not modelled: what ptxas moves or makes of the PTX, units that several warps share, the bandwidth of memory, loads of
instructions, and who is served first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .ptx import REGISTER, Instruction, Program, Segment
from .warp import WARP

SECTOR = 32  # bytes that memory gives at a time
ARITHMETIC, SPECIAL, SHARED, WARP_WIDE, BARRIER = 5, 22, 30, 25, 30
"""Cycles until the result of an instruction can be used, about what microbenchmarks of sm_80 and sm_90 find."""
CACHED, NEW, GLOBAL, FENCE = 35, 280, 650, 700
"""Likewise of a load that its program has made before, of one of what the launches just before have left, of any other,
and of an atomic that orders other accesses, which waits for these."""
DIVISION, INTEGER_DIVISION = 45, 100  # a routine each

_LATENCIES = {
    "ex2": SPECIAL, "lg2": SPECIAL, "rcp": SPECIAL, "rsqrt": SPECIAL, "sqrt": 2 * SPECIAL, "sin": SPECIAL,
    "cos": SPECIAL, "tanh": SPECIAL, "shfl": WARP_WIDE, "redux": WARP_WIDE, "vote": WARP_WIDE, "ldmatrix": SHARED,
    "popc": SPECIAL, "rem": INTEGER_DIVISION,
}  # fmt: skip
_WITHOUT_RESULT = ("st", "bra", "bar", "barrier", "ret", "exit", "red", "stmatrix")


@dataclass(frozen=True)
class _Step:
    """An instruction: the rows of what it reads and of what it writes, cycles between, whether it loads global memory,
    which takes as long as that does, whether what it loads is kept at hand, and whether it orders other accesses.
    """

    reads: list[int]
    writes: list[int]
    cycles: int
    is_load: bool
    is_kept: bool
    orders: bool


class Chains:
    """Cycles of the programs that run at once, in so many ``slots`` of so many ``warps`` each."""

    def __init__(self, program: Program, slots: int, warps: int):
        self._warps = warps
        self._row = {name: i for i, name in enumerate(program.registers)}
        self._there = np.zeros((len(self._row), slots * warps), np.int64)  # cycle in which a register can be read
        self._next = np.zeros(slots * warps, np.int64)  # earliest cycle of the next instruction
        self._ordered = np.zeros(slots, np.int64)
        self._known: list[dict[int, int]] = [{} for _ in range(slots)]  # of each program, when a sector is there
        self._loads: list[tuple[np.ndarray, ...]] = []  # of the segment that runs: warps, sectors, and cycles of these
        self._met: list[int] = []  # programs whose warps meet at the end of that segment
        self._plans: dict[int, list[_Step]] = {}

    def start(self, slot: int) -> None:
        """Of the next program."""
        warps = self._of(slot)
        self._there[:, warps], self._next[warps], self._ordered[slot], self._known[slot] = 0, 0, 0, {}

    def end(self, slot: int) -> tuple[int, int]:
        """Of a program the cycle of its last instruction, and of its last atomic that orders accesses, else 0."""
        return int(self._next[self._of(slot)].max()), int(self._ordered[slot])

    def barrier(self, slot: int) -> None:
        """With the segment that now runs, all warps of a program have come to one."""
        self._met.append(slot)

    def load(self, lanes: np.ndarray, place: np.ndarray, is_new: np.ndarray) -> None:
        """Global memory that the segment which now runs has loaded, in the order of its instructions."""
        self._loads.append((lanes // WARP, place // SECTOR, np.where(is_new, NEW, GLOBAL)))

    def run(self, segment: Segment, warps: np.ndarray) -> None:
        """A segment that some warps have run."""
        plan = self._plans.get(segment.number)
        if plan is None:
            plan = self._plans[segment.number] = [self._step(one) for one in segment.code]
        there, now, loads = self._there[:, warps], self._next[warps], iter(self._loads)
        for step in plan:
            for row in step.reads:
                np.maximum(now, there[row], out=now)
            there[step.writes] = (
                self._arrives(step.is_kept, warps, now, next(loads)) if step.is_load else now + step.cycles
            )
            if step.orders:
                self._ordered[warps // self._warps] = now
            now += 1
        self._there[:, warps], self._next[warps] = there, now
        for slot in self._met:
            together = self._of(slot)
            self._next[together] = self._next[together].max() + BARRIER
        self._loads.clear()
        self._met.clear()

    def _rows(self, operands: Sequence[str]) -> list[int]:
        """Of the registers among them, or in them."""
        return [self._row[name] for name in REGISTER.findall(" ".join(operands))]

    def _of(self, slot: int) -> slice:
        return slice(slot * self._warps, (slot + 1) * self._warps)

    def _arrives(self, is_kept: bool, warps: np.ndarray, now: np.ndarray, load: tuple[np.ndarray, ...]) -> np.ndarray:
        """When what each warp loads is there; at once where none of its threads does."""
        found, (of_warps, sectors, cycles) = now + ARITHMETIC, load
        for i in np.flatnonzero(np.isin(warps, of_warps)).tolist():
            begin = int(now[i])
            known = self._known[int(warps[i]) // self._warps] if is_kept else {}
            own = of_warps == warps[i]
            for sector, wait in set(zip(sectors[own].tolist(), cycles[own].tolist(), strict=True)):
                found[i] = max(found[i], begin + CACHED, known.setdefault(sector, begin + wait))
        return found

    def _step(self, one: Instruction) -> _Step:
        writes = [] if one.op[0] in _WITHOUT_RESULT else self._rows(one.operands[:1])
        reads = self._rows([one.predicate or "", *one.operands[bool(writes) :]])
        is_load, is_kept = one.op[:2] == ["ld", "global"], "cg" not in one.op
        return _Step(reads, writes, _cycles(one), is_load, is_kept, _orders(one))


def _orders(one: Instruction) -> bool:
    """Whether it is an atomic that waits for other accesses of its thread."""
    return one.is_atomic and "shared" not in one.op and "relaxed" not in one.op


def _cycles(one: Instruction) -> int:
    """Until the result of an instruction can be used."""
    name, op = one.op[0], one.op
    if one.is_atomic:
        return FENCE if _orders(one) else 2 * SHARED if "shared" in op else GLOBAL
    if name == "ld" and op[1] == "shared":
        return SHARED
    if name == "div":
        return INTEGER_DIVISION if re.fullmatch(r"[su]\d+", op[-1]) else DIVISION
    return _LATENCIES.get(name, ARITHMETIC)
