"""The text of PTX, read: a program is a list of segments, a segment a list of instructions.

A *segment* is a stretch that threads run without a stop: it ends before a label, after a branch or a barrier, and
before an atomic, where other threads may come in between.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .arithmetic import U16, U32, U64, np

_INSTRUCTION = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\S+\s+)?(?:\.align\s+\d+\s+)?(\w+)")
_HALF = re.compile(r"\{ \.reg \.b\d+ (\w+); mov\.b64 \{(.*)\}, (%rd\d+); \}")  # of 64 bits, as LLVM writes it
_TARGET = re.compile(r"bra(?:\.uni)?\s+([$\w]+)")
_USED_BYTES = re.compile(r"used_bytes_mask (\w+)")
REGISTER = re.compile(r"%(?:p|rs|rd|r|fd|f)\d+")
_WARP_WIDE = ("shfl", "redux", "vote", "stmatrix", "ldmatrix", "bar.warp")
_CLASSES: dict[str, tuple[str, Any]] = {
    "p": ("pred", np.bool_), "rs": ("b16", U16), "r": ("b32", U32), "rd": ("b64", U64), "f": ("b32", U32),
    "fd": ("b64", U64),
}  # fmt: skip


class Fault(Exception):  # noqa: N818 - of the kernel, not of the emulator
    """What a launch did that it must not do, or what is not emulated; the message says where."""


@dataclass
class Instruction:
    """One line: its predicate and the sense of it, the opcode in pieces, operands as text, and where it came from.

    ``used`` are the bytes of a load that matter, as a mask, all of them if ``None``: the compiler widens loads.
    """

    predicate: str | None
    sense: bool
    op: list[str]
    operands: list[str]
    text: str
    place: str
    line: int
    used: int | None = None

    @property
    def is_access(self) -> bool:
        """Whether it loads or stores memory that threads share."""
        return self.op[0] in ("ld", "st") and self.op[1] != "param"

    @property
    def is_atomic(self) -> bool:
        """Whether it changes memory in one piece."""
        return self.op[0] in ("atom", "red")

    @property
    def ends_segment(self) -> bool:
        """Whether threads may part or wait after it."""
        return self.op[0] in ("bra", "ret", "exit", "bar", "barrier") and "warp" not in self.op


@dataclass
class Segment:
    """Instructions that are run without a stop; ``sync`` if some of them need a whole warp."""

    number: int
    code: list[Instruction] = field(default_factory=list)
    sync: bool = False
    run: Callable[..., None] | None = None  # its translation, once it is needed


@dataclass(frozen=True)
class Parameter:
    """Of a kernel: its number, kind and byte offset."""

    number: int
    kind: str
    place: int


def register_class(register: str) -> tuple[str, Any]:
    """What a register holds, as a kind of PTX and a type of numpy, by its name."""
    found = re.match(r"%([a-z]+)", register)
    if found is None or found[1] not in _CLASSES:
        raise Fault(f"{register}: no such registers are emulated")
    return _CLASSES[found[1]]


def is_register(text: str) -> bool:
    """Whether an operand is a register, not a number, a special register or a name."""
    return REGISTER.fullmatch(text) is not None


class Program:
    """A kernel, read; translated as far as it is run, and kept so from launch to launch.

    Args:
        ptx: a module with one kernel.
        fine: whether other threads may come in before every access, not only before atomics.

    Raises:
        Fault: a line that is not understood.
    """

    def __init__(self, ptx: str, fine: bool = False):
        _, _, body = ptx.partition(".entry")
        name = re.match(r"\s*(\w+)", body)
        if name is None:
            raise Fault("PTX without a kernel")
        self.name, self.fine = name[1], fine
        arguments, _, body = body.partition("{")
        self.parameters = _parameters(arguments)
        self.labels: dict[str, int] = {}
        self.segments: list[Segment] = [Segment(0)]
        self._read(body, ptx[: len(ptx) - len(body)].count("\n"))
        self.registers, self.carried = _registers(self.segments)

    def _read(self, body: str, first: int) -> None:
        targets = set(_TARGET.findall(body))
        place, used, depth = "", None, 1
        for number, line in enumerate(body.splitlines(), first):
            code, _, comment = line.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                place = comment.strip()
            elif code.startswith(".pragma"):
                found = _USED_BYTES.search(code)
                used = int(found[1], 0) if found else None
            elif code.endswith(":"):
                if code[:-1] in targets:
                    self._cut()
                    self.labels[code[:-1]] = len(self.segments) - 1
            elif code in ("{", "}"):
                depth += 1 if code == "{" else -1
                if depth == 0:
                    break
            elif code and not code.startswith("."):
                self._add(_instruction(code, place, number, used))
                used = None

    def _cut(self) -> None:
        if self.segments[-1].code:
            self.segments.append(Segment(len(self.segments)))

    def _add(self, one: Instruction) -> None:
        if one.is_atomic or (self.fine and one.is_access):
            self._cut()
        segment = self.segments[-1]
        segment.code.append(one)
        segment.sync |= ".".join(one.op).startswith(_WARP_WIDE)
        if one.ends_segment:
            self._cut()

    def shared_granule(self) -> int:
        """Bytes of the narrowest access to shared memory, at most 4."""
        return min([4, *(width(one.op[-1]) for one in self._accesses("shared"))])

    def _accesses(self, space: str) -> list[Instruction]:
        return [one for segment in self.segments for one in segment.code if one.is_access and space in one.op]


def width(kind: str) -> int:
    """Bytes of a kind of PTX, such as ``f32``."""
    return 4 if kind.endswith("x2") else int(kind.lstrip("bfsu")) // 8


def _instruction(code: str, place: str, line: int, used: int | None) -> Instruction:
    half = _HALF.fullmatch(code)
    if half:
        code = f"mov.b64 {{{half[2].replace(half[1], '_')}}}, {half[3]};"
    found = _INSTRUCTION.match(code.rstrip(";").strip())
    if found is None:
        raise Fault(f"not read: {code}")
    negated, predicate, op, rest = found.groups()
    operands = [operand.strip() for operand in _OPERAND.findall(rest)]
    return Instruction(predicate, negated != "!", op.split("."), operands, code, place, line, used)


def _parameters(text: str) -> dict[str, Parameter]:
    found: dict[str, Parameter] = {}
    end = 0
    for number, (kind, name) in enumerate(_PARAMETER.findall(text)):
        size = width(kind)
        place = -(-end // size) * size
        found[name] = Parameter(number, kind, place)
        end = place + size
    return found


def _registers(segments: list[Segment]) -> tuple[list[str], set[str]]:
    """All registers, and those that more than one segment uses."""
    users: defaultdict[str, set[int]] = defaultdict(set)
    for segment in segments:
        for one in segment.code:
            for register in REGISTER.findall(" ".join([one.predicate or "", *one.operands])):
                users[register].add(segment.number)
    return sorted(users), {register for register, where in users.items() if len(where) > 1}
