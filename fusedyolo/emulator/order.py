"""What happened before what: clocks of programs and warps, and the last accesses to every byte.

``bar.sync`` orders the threads of a program, ``bar.warp.sync`` those of a warp, and an acquiring atomic that reads what
a releasing one wrote orders two programs. Shuffles order nothing, and no two threads are taken to move in step. Two
accesses of which one is a write are a race if neither happens before the other, whatever the schedule was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import S32, S64, Array
from .memory import PAGE_BITS, Space
from .report import Fault, Findings
from .warp import WARP

NOBODY = 0  # an entry of a history, see History
IN_PROGRAM, ON_DEVICE = 1, 2  # scopes of an atomic; a plain access has 0
_CLOCK_BITS = 18
_MOST_THREADS = 1 << (62 - 2 * _CLOCK_BITS)


@dataclass(frozen=True)
class Releases:
    """What an atomic does for the order: whether it acquires and releases, and whom it reaches."""

    acquire: bool
    release: bool
    device: bool


class Clocks:
    """How far every program and warp is, and what every thread knows of other programs.

    A lane is the place of a thread that runs, a slot that of a program. A clock moves on at a barrier, so two accesses
    by threads of one program with different clocks are ordered. ``known[lane, program]`` is the clock of that program
    before which everything it did happens before whatever the thread does next.
    """

    def __init__(self, slots: int, threads: int, grid: int):
        if grid * threads > _MOST_THREADS:
            raise Fault(f"{grid} programs of {threads} threads are too many to tell apart")
        self.threads = threads
        self.program = np.zeros(slots, S32)
        self.warp = np.zeros(slots * threads // WARP, S32)
        self.known = np.zeros((slots * threads, grid), S32)

    def _warps(self, slot: int) -> slice:
        return slice(slot * self.threads // WARP, (slot + 1) * self.threads // WARP)

    def _lanes(self, slot: int) -> slice:
        return slice(slot * self.threads, (slot + 1) * self.threads)

    def start(self, slot: int) -> None:
        """Another program begins here."""
        self.program[slot] = 1
        self.warp[self._warps(slot)] = 1
        self.known[self._lanes(slot)] = 0

    def barrier(self, slot: int) -> None:
        """All threads of a program meet."""
        self.program[slot] += 1
        if self.program[slot] >> _CLOCK_BITS:
            raise Fault("more barriers in a program than can be counted")
        self.warp[self._warps(slot)] += 1
        known = self.known[self._lanes(slot)]
        if known.any():
            known[:] = known.max(0)

    def warp_barrier(self, warps: Array) -> None:
        """The threads of each of these warps meet."""
        self.warp[warps] += 1
        if (self.warp[warps] >> _CLOCK_BITS).any():
            raise Fault("more barriers in a warp than can be counted")
        for warp in warps:
            known = self.known[warp * WARP : (warp + 1) * WARP]
            known[:] = known.max(0)


def _entry(number: np.ndarray, program_clock: np.ndarray, warp_clock: np.ndarray) -> np.ndarray:
    """A thread and its clocks as one number, never ``NOBODY``."""
    return ((number.astype(S64) + 1) << 2 * _CLOCK_BITS) | (program_clock.astype(S64) << _CLOCK_BITS) | warp_clock


def _thread(entry: np.ndarray) -> np.ndarray:
    """Its thread, -1 of ``NOBODY``."""
    return (entry >> 2 * _CLOCK_BITS) - 1


def _program_clock(entry: np.ndarray) -> np.ndarray:
    return (entry >> _CLOCK_BITS) & ((1 << _CLOCK_BITS) - 1)


def _warp_clock(entry: np.ndarray) -> np.ndarray:
    return entry & ((1 << _CLOCK_BITS) - 1)


class _Readers:
    """The last two readers of each granule that differ: by thread, or by program."""

    def __init__(self, size: int, threads_of_one: int):
        self.last, self.second = np.zeros(size, S64), np.zeros(size, S64)
        self._of_one = threads_of_one

    def forget(self, part: slice) -> None:
        self.last[part], self.second[part] = NOBODY, NOBODY

    def _who(self, entries: np.ndarray) -> np.ndarray:
        return _thread(entries) if self._of_one == 1 else _thread(entries) // self._of_one

    def add(self, where: np.ndarray, entries: np.ndarray) -> None:
        """Of several in one instruction the first and the last are kept."""
        who = self._who(entries)
        old = self.last[where]
        moved = ((old != NOBODY) & (self._who(old) != who)).nonzero()[0]
        if len(moved):
            self.second[where[moved]] = old[moved]
        self.last[where] = entries
        early = (self._who(self.last[where]) != who).nonzero()[0][::-1]
        if len(early):
            self.second[where[early]] = entries[early]


class History:
    """The last accesses to a space: of each granule an entry, which is a thread of the launch and its clocks then."""

    def __init__(self, space: Space, clocks: Clocks, findings: Findings, many_programs: bool):
        size = len(space.data)
        self.space, self.clocks, self.findings = space, clocks, findings
        self._writer = np.zeros(size, S64)
        self._atomic = np.zeros(size, np.int8)  # the scope of the last write
        self._readers = [_Readers(size, 1)]
        if many_programs:
            self._readers.append(_Readers(size, clocks.threads))
        self._released: dict[tuple[int, int], np.ndarray] = {}  # what is known to whoever acquires at a place

    def forget(self, part: slice) -> None:
        """Nothing has happened in these bytes."""
        self._writer[part] = NOBODY
        for readers in self._readers:
            readers.forget(part)

    def read(self, lanes: np.ndarray, threads: np.ndarray, place: np.ndarray, size: int) -> None:
        """Threads load ``size`` bytes each."""
        for who, number, where, _ in self._granules(lanes, threads, place, size, None):
            found = self._unordered(who, number, where, self._writer)
            if len(found):
                self._race(number[found], self._writer[where[found]], "read", "write")
            entries = self._entries(who, number)
            for readers in self._readers:
                readers.add(where, entries)

    def write(
        self, lanes: np.ndarray, threads: np.ndarray, place: np.ndarray, size: int, same: np.ndarray, scope: int = 0
    ) -> None:
        """Threads store ``size`` bytes each, ``same`` where these are there already, or change them by an atomic."""
        for who, number, where, again in self._granules(lanes, threads, place, size, same):
            found = self._unordered(who, number, where, self._writer)
            if scope and len(found):
                found = found[~self._together(number[found], where[found], scope)]
            if again[found].any():
                self.findings.note(f"{self.space.name} memory: one value is written by several threads")
                found = found[~again[found]]
            if len(found):
                self._race(number[found], self._writer[where[found]], "read or write" if scope else "write", "write")
            self._after_reads(who, number, where)
            self._writer[where], self._atomic[where] = self._entries(who, number), scope
            if not scope and self._released:
                self._forget_releases(where)

    def _after_reads(self, who: np.ndarray, number: np.ndarray, where: np.ndarray) -> None:
        for readers in self._readers:
            for before in (readers.last, readers.second):
                found = self._unordered(who, number, where, before)
                if len(found):
                    self._race(number[found], before[where[found]], "write", "read")
                    return

    def _granules(
        self, lanes: np.ndarray, threads: np.ndarray, place: np.ndarray, size: int, same: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, Any]]:
        """Lanes, threads, entries and ``same``, one for each granule that is touched, by the size of granules."""
        bits = self.space.granule_bits[place >> PAGE_BITS]
        kinds = [int(bits[0])] if (bits == bits[0]).all() else np.unique(bits).tolist()
        out = []
        for kind in kinds:
            some: Any = slice(None) if len(kinds) == 1 else bits == kind
            count = max(size >> kind, 1)
            where = place[some] >> kind << kind
            who, number, again = lanes[some], threads[some], None if same is None else same[some]
            if count > 1:
                where = (where[:, None] + (np.arange(count) << kind)).reshape(-1)
                who, number = np.repeat(who, count), np.repeat(number, count)
                again = None if again is None else np.repeat(again, count)
            out.append((who, number, where, again))
        return out

    def _entries(self, who: np.ndarray, number: np.ndarray) -> np.ndarray:
        return _entry(number, self.clocks.program[who // self.clocks.threads], self.clocks.warp[who // WARP])

    def _unordered(self, who: np.ndarray, number: np.ndarray, where: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Which accesses may happen before or after the earlier one by another thread: their positions."""
        clocks, threads = self.clocks, self.clocks.threads
        earlier = before[where]
        others = earlier.nonzero()[0]
        if not len(others):
            return others
        others = others[_thread(earlier[others]) != number[others]]
        if not len(others):
            return others
        earlier, who, number = earlier[others], who[others], number[others]
        thread, clock = _thread(earlier), _program_clock(earlier)
        program = thread // threads
        ordered = clock < clocks.program[who // threads]
        ordered |= (thread // WARP == number // WARP) & (_warp_clock(earlier) < clocks.warp[who // WARP])
        across = (program != number // threads).nonzero()[0]
        if len(across):
            ordered[across] = clocks.known[who[across], program[across]] > clock[across]
        return others[~ordered]

    def _together(self, number: np.ndarray, where: np.ndarray, scope: int) -> np.ndarray:
        """Where the last write was an atomic that this one sees as such."""
        threads = self.clocks.threads
        own = _thread(self._writer[where]) // threads == number // threads
        before = self._atomic[where]
        return ((before == ON_DEVICE) & (scope == ON_DEVICE)) | ((before > 0) & own)

    def _race(self, number: np.ndarray, earlier: np.ndarray, now: str, then: str) -> None:
        threads = self.clocks.threads
        own = _thread(earlier)[0] // threads == number[0] // threads
        which = "threads of a program" if own else "programs"
        self.findings.fault(f"{self.space.name} race between {which}: {now} after {then}, nothing orders them")

    # -- releases

    def pass_on(self, lane: int, program: int, place: int, what: Releases) -> None:
        """An atomic takes what others have released at its place, and releases what its thread knows."""
        known = self.clocks.known[lane]
        key = (place, NOBODY - 1 if what.device else program)
        if what.acquire and key in self._released:
            np.maximum(known, self._released[key], out=known)
        if what.release:
            says = known.copy()
            says[program] = self.clocks.program[lane // self.clocks.threads]
            self._released[key] = np.maximum(self._released[key], says) if key in self._released else says

    def _forget_releases(self, where: np.ndarray) -> None:
        """A plain store ends what atomics had released there."""
        overwritten = set(where.tolist())
        for key in [key for key in self._released if key[0] in overwritten]:
            del self._released[key]
