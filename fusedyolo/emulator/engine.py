"""One launch: which threads go on next, what they wait for, and their accesses, atomics and shuffles.

A step runs one segment on threads that stand at its beginning: all of them, or some warps, drawn from the seed. So
threads, warps and programs interleave in a way that depends on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import warp
from .arithmetic import ATOMICS, S32, S64, TYPES, U8, U32, U64, Array, noisy
from .chains import Chains
from .memory import Global, Pointer, Shared, Space
from .order import IN_PROGRAM, ON_DEVICE, Clocks, History, Releases
from .ptx import Fault, Program, Segment, register_class, width
from .report import Findings, Report
from .translate import translate
from .warp import WARP

CHECKS = ("race", "init")
LIMIT = 2_000_000
_RUNS, _WAITS, _LEFT, _EMPTY = 0, 1, 2, 3  # states of a thread; _EMPTY if there is no program left for it


@dataclass(frozen=True)
class Options:
    """How a launch is run, see :func:`run`."""

    seed: int = 0
    checks: Sequence[str] = CHECKS
    resident: int = 4
    noise: bool = False
    lockstep: float = 0.7
    stop: bool = False
    limit: int = LIMIT
    programs: Sequence[int] | None = None
    chains: bool = False


@dataclass
class _Access:
    """The threads that take part in an access: their lanes, where each one's bytes lie, and which of the threads that
    run the instruction they are, all if ``None``.
    """

    space: Space
    lanes: np.ndarray
    place: np.ndarray
    index: np.ndarray | None

    def without(self, bad: np.ndarray) -> _Access:
        """The others."""
        index = np.flatnonzero(~bad) if self.index is None else self.index[~bad]
        return _Access(self.space, self.lanes[~bad], self.place[~bad], index)

    def pick(self, value: Array, L: np.ndarray) -> np.ndarray:
        """An operand, of those that take part."""
        value = _of_all(value, L)
        return value if self.index is None else value[self.index]


def _of_all(value: Array, L: np.ndarray) -> np.ndarray:
    """An operand, one value for each thread."""
    return value if getattr(value, "shape", None) == L.shape else np.broadcast_to(value, L.shape)


def run(
    ptx: str | Program, grid: int, num_warps: int, shared_bytes: int, args: Sequence[Any], **options: Any
) -> Report:
    """Launch a kernel.

    Args:
        ptx: its text, or the text read.
        grid: how many programs there are.
        num_warps: of each.
        shared_bytes: of each.
        args: a :class:`Pointer` or a number for each parameter of the PTX, in order. Buffers are changed.
        options: ``seed``; ``checks``, of ``"race"`` and ``"init"``, memory never written (bounds and alignment always);
            ``resident``, programs that run at once; ``noise``, approximate instructions off by what is documented;
            ``lockstep``, how often all threads that can go on do; ``stop`` at the first fault; ``limit``, of steps;
            ``programs``, the numbers of those that are run, all if ``None``; ``chains``, how long instructions wait for
            one another; ``fine``, of text: other threads may come in before every access.

    Raises:
        Fault: an instruction that is not emulated, too many steps, or with ``stop`` the first fault.
    """
    if isinstance(ptx, str):
        ptx = Program(ptx, options.pop("fine", False))
    return Engine(ptx, grid, num_warps, shared_bytes, args, Options(**options)).run()


class Engine:
    """The state of a launch. Translated segments call its methods, with ``L`` the lanes that run them."""

    def __init__(
        self, program: Program, grid: int, num_warps: int, shared_bytes: int, args: Sequence[Any], options: Options
    ):
        unknown = set(options.checks) - set(CHECKS)
        if unknown:
            raise ValueError(f"checks: {sorted(unknown)}, want some of {CHECKS}")
        self.program, self.options, self.report = program, options, Report()
        self.findings = Findings(self.report, options.stop)
        self.random = np.random.default_rng(options.seed)
        chosen = np.arange(grid) if options.programs is None else np.unique(np.asarray(options.programs, S64))
        if len(chosen) and not 0 <= chosen[0] <= chosen[-1] < grid:
            raise ValueError(f"programs: {chosen[0]} to {chosen[-1]}, want some of the {grid} of the grid")
        self._waiting: list[int] = self.random.permutation(chosen).tolist()
        self.threads = num_warps * WARP
        self.slots = max(1, min(options.resident, len(chosen)))
        self.chains = Chains(program, self.slots, num_warps) if options.chains else None
        self._make_threads(grid)
        self._make_memory(grid, shared_bytes, args)

    def _make_threads(self, grid: int) -> None:
        n = self.slots * self.threads
        self.grid_size, self.program_size = U32(grid), U32(self.threads)
        self.tid = np.tile(np.arange(self.threads, dtype=U32), self.slots)
        self.ctaid = np.zeros(n, U32)
        self.thread = np.zeros(n, S32)  # among those of the whole launch
        self.slot_of = np.repeat(np.arange(self.slots), self.threads)
        self.pc = np.zeros(n, S32)
        self.state = np.full(n, _EMPTY, np.int8)
        self._wait_at = np.zeros(n, S32)
        self._some_left = False
        self._executed = np.zeros(self.slots, S64)  # warp instructions
        self.registers = {name: np.zeros(n, register_class(name)[1]) for name in self.program.registers}

    def _make_memory(self, grid: int, shared_bytes: int, args: Sequence[Any]) -> None:
        checks_init, checks_race = ("init" in self.options.checks, "race" in self.options.checks)
        self.memory = Global(args, checks_init)
        self.shared = Shared(shared_bytes, self.slots, self.program.shared_granule(), checks_init)
        self.parameters = self._arguments(args)
        self._clocks: Clocks | None = None
        self._histories: dict[str, History] = {}
        if checks_race:
            self._clocks = Clocks(self.slots, self.threads, grid)
            self._histories = {
                "global": History(self.memory, self._clocks, self.findings, grid > 1),
                "shared": History(self.shared, self._clocks, self.findings, False),
            }

    def _arguments(self, args: Sequence[Any]) -> list[Any]:
        """Values of the parameters, and the bytes that hold them."""
        wanted = list(self.program.parameters.values())
        if len(args) != len(wanted):
            raise Fault(f"{len(args)} arguments, the kernel takes {len(wanted)}")
        self._parameter_bytes = np.zeros(8 + max((p.place + 8 for p in wanted), default=0) // 8 * 8, U8)
        out: list[Any] = []
        for parameter, value in zip(wanted, args, strict=True):
            size = width(parameter.kind)
            if isinstance(value, Pointer):
                number = U64(self.memory.address(value))
            elif parameter.kind[0] == "f":
                number = np.array([value], TYPES[parameter.kind]).view(f"u{size}")[0]
            else:
                number = np.array([int(value or 0) & (2 ** (8 * size) - 1)], f"u{size}")[0]
            self._parameter_bytes[parameter.place : parameter.place + size] = np.frombuffer(number.tobytes(), U8)
            out.append(number)
        return out

    # -- scheduling

    def run(self) -> Report:
        """To the end of all programs."""
        for slot in range(self.slots):
            self._start(slot)
        with np.errstate(all="ignore"):
            while (ready := self.state == _RUNS).any():
                self._step(ready)
                if self.report.steps > self.options.limit:
                    raise Fault(f"{self.program.name} is not at its end after {self.options.limit} steps")
                if self._some_left:
                    self._finish()
        self.findings.at = None
        if (self.state == _WAITS).any():
            self.findings.fault("deadlock: threads wait at a barrier that others never reach")
            for slot in np.unique(self.slot_of[self.state == _WAITS]):
                self._count(int(slot))
        self.memory.copy_out()
        return self.report

    def _lanes(self, slot: int) -> slice:
        return slice(slot * self.threads, (slot + 1) * self.threads)

    def _start(self, slot: int) -> None:
        """The next program takes a slot."""
        lanes = self._lanes(slot)
        if not self._waiting:
            self.state[lanes] = _EMPTY
            return
        number = self._waiting.pop()
        self.ctaid[lanes], self.pc[lanes], self.state[lanes] = number, 0, _RUNS
        self.thread[lanes] = number * self.threads + np.arange(self.threads)
        self._executed[slot] = 0
        if self.chains is not None:
            self.chains.start(slot)
        self.shared.wipe(slot)
        if self._clocks is not None:
            self._clocks.start(slot)
            self._histories["shared"].forget(self.shared.part(slot))

    def _count(self, slot: int) -> None:
        number = int(self.ctaid[slot * self.threads])
        self.report.by_program[number] = int(self._executed[slot])
        if self.chains is not None:
            self.report.chains[number] = self.chains.end(slot)

    def _finish(self) -> None:
        """Replace programs whose threads have all left."""
        self._some_left = False
        for slot in range(self.slots):
            state = self.state[self._lanes(slot)]
            left = state == _LEFT
            if not left.any():
                continue
            if not left.all():
                if (state == _RUNS).any():
                    self._some_left = True
                    continue
                self.findings.at = None
                self.findings.fault("barrier: some threads of a program have left, others wait")
            self._count(slot)
            self._start(slot)

    def _turns(self, ready: np.ndarray) -> Iterator[tuple[int, int]]:
        """Warps that can go on in a drawn order, each with where its threads stand: the first place first, or any."""
        for number in self.random.permutation(np.flatnonzero(ready.reshape(-1, WARP).any(1))).tolist():
            lanes = slice(number * WARP, (number + 1) * WARP)
            places = sorted(set(self.pc[lanes][ready[lanes]].tolist()))
            if len(places) > 1 and self.random.random() < 0.5:
                self.random.shuffle(places)
            for place in places:
                yield number, place

    def _step(self, ready: np.ndarray) -> None:
        for number, place in self._turns(ready):
            segment = self.program.segments[place]
            here = (ready & (self.pc == place)).reshape(-1, WARP)
            warps = here.all(1) if segment.sync else here.any(1)
            if warps[number]:
                break
        else:
            self.findings.at = None
            self.findings.fault("a warp-wide instruction that some threads of the warp do not reach")
            for slot in np.unique(self.slot_of[ready]):
                self._count(int(slot))
            self.state[:] = _EMPTY
            return
        draw = self.random.random()
        if draw > self.options.lockstep:
            keep = np.zeros(len(warps), bool)
            keep[number] = True
            if draw < (1 + self.options.lockstep) / 2:
                keep |= self.random.random(len(keep)) < 0.5
            warps &= keep
        self._run_segment(segment, (here & warps[:, None]).reshape(-1).nonzero()[0], warps)

    def _run_segment(self, segment: Segment, lanes: np.ndarray, warps: np.ndarray) -> None:
        if segment.run is None:
            segment.run = translate(self.program, segment)
        self.report.steps += 1
        self._executed += len(segment.code) * warps.reshape(self.slots, -1).sum(1)
        segment.run(self, self.registers, self.parameters, lanes)
        if self.chains is not None:
            self.chains.run(segment, warps.nonzero()[0])

    def _count_active(self, lanes: np.ndarray) -> None:
        if self.findings.at is not None:
            self.report.active[self.findings.at.line] += len(lanes)

    # -- control

    def parameter(self, place: Array, code: str) -> Array:
        """ld.param at an address."""
        return self._parameter_bytes.view(code)[np.asarray(place).astype(S64) // np.dtype(code).itemsize]

    def branch(self, L: np.ndarray, mask: Array, target: int, other: int) -> None:
        """Go on at one of two segments."""
        taken = _of_all(mask, L)
        self.pc[L] = np.where(taken, target, other)
        if taken.all() or not taken.any():
            return
        warps, count = L // WARP, len(self.pc) // WARP
        went, all_of = np.bincount(warps[taken], minlength=count), np.bincount(warps, minlength=count)
        if ((went > 0) & (went < all_of)).any():
            self.findings.note("a branch parts the threads of a warp", here=True)

    def leave(self, L: np.ndarray, mask: Array, other: int) -> None:
        """End of the kernel, for some."""
        if mask is not None:
            taken = _of_all(mask, L)
            self.pc[L[~taken]] = other
            L = L[taken]
        self.state[L] = _LEFT
        self._some_left = True

    def barrier(self, L: np.ndarray, after: int) -> None:
        """bar.sync 0: wait for the whole program."""
        self._count_active(L)
        self.state[L], self.pc[L], self._wait_at[L] = _WAITS, after, after
        for slot in np.flatnonzero(np.bincount(self.slot_of[L])).tolist():
            lanes = self._lanes(slot)
            if (self.state[lanes] != _WAITS).any():
                continue
            if (self._wait_at[lanes] != after).any():
                self.findings.fault("barrier: threads of a program meet at different bar.sync")
            self.state[lanes] = _RUNS
            if self._clocks is not None:
                self._clocks.barrier(slot)
            if self.chains is not None:
                self.chains.barrier(slot)

    def warp_barrier(self, L: np.ndarray) -> None:
        """bar.warp.sync of all threads."""
        self._count_active(L)
        if self._clocks is not None:
            self._clocks.warp_barrier(L[::WARP] // WARP)

    # -- warps

    def _by_warp(self, value: Array, L: np.ndarray) -> np.ndarray:
        return _of_all(value, L).reshape(-1, WARP)

    def _needs_all(self, L: np.ndarray, member: Array) -> None:
        self._count_active(L)
        if (np.asarray(member) != U32(warp.ALL)).any():
            raise Fault("a warp-wide instruction of some threads of a warp is not emulated")

    def shuffle(self, L: np.ndarray, kind: str, value: Array, by: Array, clamp: Array, member: Array) -> Any:
        """shfl.sync."""
        self._needs_all(L, member)
        out, there = warp.shuffle(kind, *(self._by_warp(operand, L) for operand in (value, by, clamp)))
        return out.reshape(-1), there.reshape(-1)

    def reduce(self, L: np.ndarray, kind: str, value: Array, member: Array) -> np.ndarray:
        """redux.sync and vote.sync."""
        self._needs_all(L, member)
        return np.repeat(warp.reduce(kind, self._by_warp(value, L)), WARP)

    def approximate(self, x: Array, ulps: int) -> Array:
        """What an approximate instruction gives."""
        return noisy(x, ulps, self.options.seed) if self.options.noise else x

    # -- accesses

    def _access(self, L: np.ndarray, space: str, address: Array, size: int, mask: Array) -> _Access:
        """After checks of bounds and alignment."""
        address = _of_all(address, L)
        lanes, index = L, None
        if mask is not None:
            index = _of_all(mask, L).nonzero()[0]
            lanes, address = lanes[index], address[index]
        self._count_active(lanes)
        where: Space = self.memory
        if space == "global":
            place = self.memory.place(address)
            outside = self.memory.outside(place, size)
        else:
            where = self.shared
            place = self.shared.place(address, self.slot_of[lanes])
            outside = self.shared.outside(place, address, size)
        found = _Access(where, lanes, place, index)
        misaligned = place & (size - 1) != 0
        if misaligned.any():
            self.findings.fault(f"misaligned {space} access of {size} bytes")
            found, outside = found.without(misaligned), outside[~misaligned]
        if outside.any():
            self.findings.fault(f"{space} access out of bounds")
            found = found.without(outside)
        return found

    def _expect_written(self, access: _Access, at: np.ndarray, size: int, words: int) -> None:
        space = access.space
        if space.unwritten is None:
            return
        fresh = space.word_is_unwritten(at, size)
        for word in range(1, words):
            fresh = fresh | space.word_is_unwritten(at + word, size)
        if fresh.any():
            self.findings.fault(f"{space.name} memory is read that nothing has written")

    def load(
        self, L: np.ndarray, space: str, address: Array, size: int, count: int, mask: Array, used: int | None
    ) -> Any:
        """``count`` words of each thread, 0 where the load does not happen; ``used`` are the bytes that matter."""
        access = self._access(L, space, address, size * count, mask)
        if self.chains is not None and space == "global":
            self.chains.load(access.lanes, access.place, self.memory.is_new(access.place))
        words, at = access.space.data.view(f"u{size}"), access.place // size
        out = [words[at + word] for word in range(count)]
        if access.index is not None:
            some, out = out, [np.zeros(len(L), words.dtype) for _ in range(count)]
            for full, part in zip(out, some, strict=True):
                full[access.index] = part
        if len(access.lanes):
            needed = count if used is None else -(-used.bit_length() // size)
            self._expect_written(access, at, size, needed)
            if space in self._histories:
                self._histories[space].read(access.lanes, self.thread[access.lanes], access.place, size * needed)
        return out

    def store(self, L: np.ndarray, space: str, address: Array, size: int, values: Sequence[Array], mask: Array) -> None:
        """Words of each thread; of several threads at one place the last one wins, which is a fault if they differ."""
        access = self._access(L, space, address, size * len(values), mask)
        if not len(access.lanes):
            return
        words, at = access.space.data.view(f"u{size}"), access.place // size
        new = [access.pick(value, L) for value in values]
        history = self._histories.get(space)
        if history is not None:
            same = np.logical_and.reduce([words[at + word] == value for word, value in enumerate(new)])
            history.write(access.lanes, self.thread[access.lanes], access.place, size * len(values), same)
        for word, value in enumerate(new):
            words[at + word] = value
            access.space.mark_written(at + word, size)
        self._touch(access)
        if history is not None and not (np.diff(at) > 0).all():
            self._check_duplicates(access, words, at, new)

    def _touch(self, access: _Access) -> None:
        if access.space is self.memory:
            self.memory.touch(access.place)

    def _check_duplicates(self, access: _Access, words: np.ndarray, at: np.ndarray, new: list[np.ndarray]) -> None:
        name = access.space.name
        if any((words[at + word] != value).any() for word, value in enumerate(new)):
            self.findings.fault(f"{name} race: threads store different values to one place in one instruction")
        elif len(np.unique(at)) < len(at):
            self.findings.note(f"{name} memory: one value is written by several threads")

    def matrix_store(self, L: np.ndarray, address: Array, values: Sequence[Array], by_columns: bool) -> None:
        """stmatrix: rows, or columns, of 16 bytes whose addresses the threads hold."""
        rows = self._matrix_rows(L, address)
        for number, value in enumerate(values):
            if not by_columns:
                self.store(L, "shared", warp.matrix_places(rows, number), 4, (value,), None)
                continue
            for half in (0, 1):
                part = (value >> U32(16 * half)).astype(np.uint16)
                self.store(L, "shared", warp.column_places(rows, number, half), 2, (part,), None)

    def matrix_load(self, L: np.ndarray, address: Array, count: int, by_columns: bool) -> list[np.ndarray]:
        """ldmatrix: rows, or columns, of rows of 16 bytes whose addresses the threads hold."""
        rows = self._matrix_rows(L, address)
        out: list[np.ndarray] = []
        for number in range(count):
            if not by_columns:
                out += self.load(L, "shared", warp.matrix_places(rows, number), 4, 1, None, None)
                continue
            places = [warp.column_places(rows, number, half) for half in (0, 1)]
            low, high = [self.load(L, "shared", place, 2, 1, None, None)[0].astype(U32) for place in places]
            out.append(low | high << U32(16))
        return out

    def _matrix_rows(self, L: np.ndarray, address: Array) -> np.ndarray:
        rows = self._by_warp(address, L)
        if (rows % U32(16) != 0).any():
            self.findings.fault("misaligned row of a matrix")
        return rows

    def atom(
        self,
        L: np.ndarray,
        space: str,
        address: Array,
        name: str,
        values: Sequence[Array],
        sem: str,
        scope: str,
        mask: Array,
    ) -> np.ndarray:
        """An atomic of each thread, in an order drawn from the seed; what was there before."""
        kind = np.result_type(values[0])
        access = self._access(L, space, address, kind.itemsize, mask)
        out = np.zeros(len(L), kind)
        if not len(access.lanes):
            return out
        turns = self.random.permutation(len(access.lanes))
        lanes, place = access.lanes[turns], access.place[turns]
        index = turns if access.index is None else access.index[turns]
        turn = _Access(access.space, lanes, place, index)
        new = [turn.pick(value, L) for value in values]
        at = place // kind.itemsize
        self._expect_written(turn, at, kind.itemsize, 1)
        history = self._histories.get(space)
        what = Releases(
            sem in ("acquire", "acq_rel"), sem in ("release", "acq_rel"), scope != "cta" or space == "shared"
        )
        if history is not None:
            self._order_atomic(history, turn, kind.itemsize, what)
        words, change = access.space.data.view(kind), ATOMICS[name]
        second = new[1] if len(new) > 1 else new[0]
        for turn_number, spot in enumerate(at.tolist()):
            old = words[spot]
            out[index[turn_number]] = old
            words[spot] = change(old, new[0][turn_number], second[turn_number])
            if history is not None and (what.acquire or what.release):
                lane = int(lanes[turn_number])
                history.pass_on(lane, int(self.ctaid[lane]), int(place[turn_number]), what)
        access.space.mark_written(at, kind.itemsize)
        self._touch(access)
        return out

    def _order_atomic(self, history: History, turn: _Access, size: int, what: Releases) -> None:
        """Atomics that other programs do not see as such are ordered one by one."""
        lanes, place = turn.lanes, turn.place
        same = np.zeros(len(lanes), bool)
        parts = [slice(None)] if what.device else [slice(one, one + 1) for one in range(len(lanes))]
        scope = ON_DEVICE if what.device else IN_PROGRAM
        for part in parts:
            history.write(lanes[part], self.thread[lanes[part]], place[part], size, same[part], scope)
