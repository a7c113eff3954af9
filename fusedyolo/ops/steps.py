"""Launches that follow one another, made once; each call brings their tensors and numbers.

What follows from shapes, strides, types, devices and the row alone is a *plan*, made once by a function under
:func:`~.launch.planned`: launches whose arguments have a :class:`Slot` wherever a call has something to say.

    @planned
    def _plan(key: str, preds: tuple[Layout, ...]) -> Steps:
        own = Outline()
        maps, rows = own.tensors("preds", len(preds)), own.tensor("rows")
        found = own.scratch_of_rows(torch.int32, 8)
        first = Launch(kernel, (programs,), {"maps": maps, "rows_ptr": rows, "M": own.M, "found_ptr": found}, threads)
        return own.steps(first, ...)

    _plan(key, layouts(preds)).run(rows.device, rows.shape[0], preds=preds, rows=rows)

Scratch is what launches leave for one another and nobody else reads: one allocation a call, of which kernels are given
addresses. No Python object is made for a piece of it, and none of a plan's records is walked through: the code that
reads what a call brings, and puts its addresses into them, is made with the plan, as that of a NamedTuple is with its
class. Before kernels of
a plan are compiled for what a call brings, and where Triton interprets or emulates them, tensors are filled in, each
piece of scratch an allocation of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .launch import Launch, forget_zeros, on_device, run_all

from triton import knobs  # isort: skip
from triton.compiler import CompiledKernel  # isort: skip

Shape = tuple[int, ...]
Names = list[tuple[str, int | None]]  # and of how many, where that is said
ALIGNED = 16  # bytes: kernels are compiled for pointers that are, and for others
LIMIT = 2**31


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """A place that a call fills: the item ``at`` of its numbers, tensors or scratch; of a tensor what comes after so
    many bytes, as another type.
    """

    of: str  # "numbers", "tensors" or "scratch"
    at: int
    skipped: int = 0
    dtype: torch.dtype | None = None

    def after(self, skipped: int, dtype: torch.dtype) -> Slot:
        """What follows so many bytes of a contiguous tensor, as one of this type and of one dimension."""
        return replace(self, skipped=skipped, dtype=dtype)

    def found_in(self, values: Mapping[str, Sequence[Any]]) -> Any:
        """What a call has put there."""
        value = values[self.of][self.at]
        if self.dtype is None or value is None:
            return value
        return value.view(-1).view(torch.uint8)[self.skipped :].view(self.dtype)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Of scratch: its shape, and so many numbers behind it for each row; or with ``of_rows`` the shape is a row's."""

    dtype: torch.dtype
    shape: Shape
    a_row: int = 0
    of_rows: bool = False

    def shape_for(self, rows: int) -> Shape:
        """All of it."""
        if self.of_rows:
            return (rows, *self.shape)
        return (self.shape[0] + self.a_row * rows,) if self.a_row else self.shape

    def sizes(self) -> tuple[int, int]:
        """In bytes, without rows and with each more, so that the next piece is aligned for as many as are aligned."""
        fixed, a_row = (0, math.prod(self.shape)) if self.of_rows else (math.prod(self.shape), self.a_row)
        return _aligned(fixed * self.dtype.itemsize), a_row * self.dtype.itemsize


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class Outline:
    """Where a plan says what its calls bring, by name; the same name is the same slot. ``M`` is the number of rows."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, int | None]] = {"numbers": {}, "tensors": {}}
        self._slots: dict[tuple[str, str], tuple[Slot, ...]] = {}
        self._counts = {"numbers": 1, "tensors": 0}
        self._pieces: list[_Piece] = []
        self.M = Slot("numbers", 0)

    def _named(self, of: str, name: str, count: int | None) -> tuple[Slot, ...]:
        if (of, name) not in self._slots:
            first = self._counts[of]
            self._counts[of] += 1 if count is None else count
            self._names[of][name] = count
            self._slots[of, name] = tuple([Slot(of, at) for at in range(first, self._counts[of])])
        return self._slots[of, name]

    def tensor(self, name: str) -> Slot:
        """A tensor, or None."""
        return self._named("tensors", name, None)[0]

    def tensors(self, name: str, count: int) -> tuple[Slot, ...]:
        """So many tensors, or Nones."""
        return self._named("tensors", name, count)

    def numbers(self, name: str, count: int) -> tuple[Slot, ...]:
        """So many integers or floats."""
        return self._named("numbers", name, count)

    def scratch(self, dtype: torch.dtype, shape: Shape, a_row: int = 0) -> Slot:
        """Memory for the launches of a call, of this shape; of one dimension with so many numbers more for each row."""
        self._pieces.append(_Piece(dtype, shape, a_row))
        return Slot("scratch", len(self._pieces) - 1)

    def scratch_of_rows(self, dtype: torch.dtype, *shape: int) -> Slot:
        """So much for each row."""
        self._pieces.append(_Piece(dtype, shape, of_rows=True))
        return Slot("scratch", len(self._pieces) - 1)

    def steps(self, *launches: Launch) -> Steps:
        """The plan. A grid that hangs on the number of rows is a function of it."""
        return Steps(launches, list(self._names["numbers"].items()), list(self._names["tensors"].items()), self._pieces)


class Steps:
    """Launches in order, but for what a call brings."""

    def __init__(
        self,
        launches: Sequence[Launch],
        numbers: Names,
        tensors: Names,
        pieces: list[_Piece],
    ):
        self._launches, self._pieces, self._read = launches, pieces, _reader(numbers, tensors)
        self._grids = [None if callable(launch.grid) else (*launch.grid, 1, 1)[:3] for launch in launches]
        self._takers = [_taker([launch.arguments[name] for name in launch.kernel.arg_names]) for launch in launches]
        # where in memory a piece begins, and how much more for each row
        self._places: list[tuple[int, int]] = []
        self._fixed = self._a_row = 0
        for piece in pieces:
            self._places.append((self._fixed, self._a_row))
            fixed, a_row = piece.sizes()
            self._fixed += fixed
            self._a_row += a_row
        self._compiled: dict[tuple[Any, ...], list[Any]] = {}

    def launches(self, device: torch.device, M: int, **given: Any) -> list[Launch]:
        """For a call with so many rows, each with all its arguments."""
        numbers, tensors, _addresses, _kinds = self._read(M, given)
        return self._filled(device, numbers, tensors)

    def run(self, device: torch.device, M: int, **given: Any) -> None:
        """Launch them on the current stream of the ``device`` of a call's tensors.

        What :func:`~.launch.zeros` has given is forgotten if one of them fails or is interrupted.
        """
        numbers, tensors, addresses, kinds = self._read(M, given)
        nvidia = torch.version.hip is None  # elsewhere Triton specializes on the size of memory, too
        kernels = self._compiled.get(kinds) if nvidia else None
        if kernels is None:
            made = run_all(self._filled(device, numbers, tensors), device)
            if nvidia and all([isinstance(kernel, CompiledKernel) for kernel in made]):  # not interpreted ones
                self._compiled[kinds] = made
            return
        memory, places = self._scratch(device, M)
        first, last = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # a profiler's may call something
        hooked = getattr(first, "calls", first) or getattr(last, "calls", last)
        try:
            with on_device(device):
                stream = torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0
                for kernel, launch, grid, take in zip(kernels, self._launches, self._grids, self._takers, strict=True):
                    programs = (*launch.grid(M), 1, 1)[:3] if grid is None else grid
                    arguments = take(numbers, addresses, places)
                    if hooked:
                        kernel[programs](*arguments)
                    else:  # as ``kernel[programs]`` does, without asking for the stream or telling hooks
                        function, packed = kernel.function, kernel.packed_metadata
                        kernel.run(*programs, stream, function, packed, None, None, None, *arguments)
        except BaseException:
            forget_zeros()
            raise
        del memory  # what comes after the launches on their stream may have it

    def _filled(self, device: torch.device, numbers: list[Any], tensors: list[Any]) -> list[Launch]:
        like = torch.empty(0, device=device)
        scratch = [like.new_empty(piece.shape_for(numbers[0]), dtype=piece.dtype) for piece in self._pieces]
        values = {"numbers": numbers, "tensors": tensors, "scratch": scratch}
        return [
            replace(
                launch,
                grid=launch.grid(numbers[0]) if callable(launch.grid) else launch.grid,
                arguments={name: _fill(item, values) for name, item in launch.arguments.items()},
                weights=_fill(launch.weights, values),
            )
            for launch in self._launches
        ]

    def _scratch(self, device: torch.device, M: int) -> tuple[Tensor | None, list[int]]:
        """Memory, and the address of each piece."""
        if not self._pieces:
            return None, []
        rows = _aligned(M)
        memory = torch.empty(self._fixed + self._a_row * rows, dtype=torch.uint8, device=device)
        base = memory.data_ptr()
        return memory, [base + fixed + a_row * rows for fixed, a_row in self._places]


def _fill(item: Any, values: Mapping[str, Sequence[Any]]) -> Any:
    """A record with what a call brings in its slots."""
    if isinstance(item, Slot):
        return item.found_in(values)
    if not isinstance(item, tuple):
        return item
    filled = [_fill(each, values) for each in item]
    return type(item)(*filled) if hasattr(item, "_fields") else tuple(filled)


Given = tuple[list[Any], list[Any], list[Any], tuple[Any, ...]]


def _reader(numbers: Names, tensors: Names) -> Callable[[int, dict[str, Any]], Given]:
    """A function of the number of rows and of what a call brings, by name, that returns all numbers, all tensors, their
    addresses, and what the code of kernels hangs on: the types of tensors, how they are aligned, kinds of numbers.
    """
    of_numbers, of_tensors, lines, kinds = ["M"], list[str](), list[str](), list[str]()
    for names, found, letter in ((numbers, of_numbers, "n"), (tensors, of_tensors, "t")):
        for name, count in names:
            own = [f"{letter}{len(found) + i}" for i in range(1 if count is None else count)]
            found += own
            if own:
                lines.append(f"{', '.join(own)}{'' if count is None else ','} = given[{name!r}]")
    addresses = [f"a{i}" for i in range(len(of_tensors))]
    for tensor, address in zip(of_tensors, addresses, strict=True):
        lines.append(f"{address} = None if {tensor} is None else {tensor}.data_ptr()")
        kinds.append(f"{tensor} is not None and ({tensor}.dtype, {address} % {ALIGNED})")  # what lies behind it, too
    for n in of_numbers:
        kinds.append(f"({n} == 1, {n} % {ALIGNED} == 0, -{LIMIT} <= {n} < {LIMIT}) if type({n}) is int else type({n})")
    listed = ["[" + ", ".join(each) + "]" for each in (of_numbers, of_tensors, addresses)]
    body = "\n    ".join([*lines, f"return {', '.join(listed)}, ({', '.join(kinds)},)"])
    space: dict[str, Any] = {}
    exec(f"def read(M, given):\n    {body}", space)
    return space["read"]


def _taker(items: Sequence[Any]) -> Callable[[list[Any], list[Any], list[int]], tuple[Any, ...]]:
    """A function of numbers, addresses of tensors and of scratch that returns the items with these in their slots."""
    constants: list[Any] = []
    texts = "".join(_text(item, constants) + ", " for item in items)
    return eval(f"lambda numbers, tensors, scratch: ({texts})", {"constants": constants})


def _text(item: Any, constants: list[Any]) -> str:
    """As Python has it; what a call changes nothing in is one of the ``constants``."""
    if isinstance(item, Slot):
        text = f"{item.of}[{item.at}]"
        return f"({text} and {text} + {item.skipped})" if item.skipped else text
    if not _is_open(item):
        constants.append(item)
        return f"constants[{len(constants) - 1}]"
    return "(" + "".join(_text(each, constants) + "," for each in item) + ")"


def _is_open(item: Any) -> bool:
    return isinstance(item, Slot) or (isinstance(item, tuple) and any(map(_is_open, item)))
