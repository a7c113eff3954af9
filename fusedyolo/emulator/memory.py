"""Memory of a launch: where buffers lie, which bytes an access may touch, and which of them hold something.

Buffers are copied into one array, each at a page of its own with a page between that belongs to nobody; the shared
memory of programs that run at once is another array. What was written is copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arithmetic import S64, U8, Array

PAGE_BITS = 12
PAGE = 1 << PAGE_BITS
ORIGIN = 0x7F00_0000_0000
"""The first address of a device's memory."""

POISON = 0xFB
"""Every byte of memory that nothing has written: a NaN, or a large negative number."""


@dataclass
class Buffer:
    """An allocation: its bytes, the size of its smallest elements, which bytes hold something (all, if ``None``), and
    whether what is in it was put there by a launch just before.

    ``data`` and ``init`` are changed in place by a launch.
    """

    data: np.ndarray
    itemsize: int = 4
    init: np.ndarray | None = None
    is_new: bool = False


@dataclass
class Pointer:
    """An argument that points into a buffer, ``offset`` bytes from its start."""

    buffer: Buffer
    offset: int = 0


def pages(size: int) -> int:
    """Bytes of the pages that ``size`` bytes need."""
    return -(-size // PAGE) * PAGE


class Space:
    """Bytes, and which of them an access may touch.

    Attributes:
        data: the bytes.
        unwritten: of each byte, whether nothing has written it; ``None`` where nobody asks.
        granule_bits: of each page, how many bytes one entry of a history stands for, as a power of two.
    """

    def __init__(self, name: str, size: int, granule: int, tracks_writes: bool):
        self.name = name
        self.data = np.zeros(size, U8)
        self.unwritten = np.zeros(size, bool) if tracks_writes else None
        self.granule_bits = np.full(-(-size // PAGE), granule.bit_length() - 1, np.int8)

    def word_is_unwritten(self, at: Array, size: int) -> Array:
        """Whether a byte of the ``at``-th word of ``size`` bytes holds nothing."""
        assert self.unwritten is not None
        return self.unwritten.view(f"u{size}")[at] != 0

    def mark_written(self, at: Array, size: int) -> None:
        """The ``at``-th word of ``size`` bytes holds something from now on."""
        if self.unwritten is not None:
            self.unwritten.view(f"u{size}")[at] = 0


class Shared(Space):
    """Shared memory of the programs that run at once, each a slot of ``stride`` bytes."""

    def __init__(self, size: int, slots: int, granule: int, tracks_writes: bool):
        self.size, self.stride = size, pages(max(size, 16))
        super().__init__("shared", self.stride * slots, granule, tracks_writes)

    def part(self, slot: int) -> slice:
        """The bytes of a slot."""
        return slice(slot * self.stride, (slot + 1) * self.stride)

    def wipe(self, slot: int) -> None:
        """For the next program in this slot, it holds nothing."""
        self.data[self.part(slot)] = POISON
        if self.unwritten is not None:
            self.unwritten[self.part(slot)] = True

    def place(self, address: Array, slots: Array) -> Array:
        """Where addresses lie in ``data``."""
        return address.astype(S64) + slots.astype(S64) * self.stride

    def outside(self, place: Array, address: Array, size: int) -> Array:
        """Which accesses of ``size`` bytes leave the memory of their program."""
        return address.astype(S64) + size > self.size


class Global(Space):
    """Memory of the device, with the buffers that a launch is given."""

    def __init__(self, args: Sequence[Any], tracks_writes: bool):
        self._starts: dict[int, int] = {}
        self._buffers: list[Buffer] = []
        end = PAGE
        for value in args:
            if isinstance(value, Pointer) and id(value.buffer) not in self._starts:
                self._starts[id(value.buffer)] = end
                self._buffers.append(value.buffer)
                end += pages(len(value.buffer.data)) + PAGE
        super().__init__("global", end, 4, tracks_writes)
        self._low = np.zeros(end // PAGE, S64)  # of the buffer of each page
        self._high = np.zeros(end // PAGE, S64)
        self._new = np.zeros(end // PAGE, bool)  # pages of new buffers
        self._touched = np.zeros(end // PAGE, bool)  # pages that were written
        for buffer in self._buffers:
            self._copy_in(buffer)

    def _copy_in(self, buffer: Buffer) -> None:
        start, stop = self._extent(buffer)
        own = slice(start // PAGE, -(-stop // PAGE))
        self.data[start:stop] = buffer.data
        self._low[own], self._high[own], self._new[own] = start, stop, buffer.is_new
        self.granule_bits[own] = min(buffer.itemsize, 4).bit_length() - 1
        if buffer.init is not None and self.unwritten is not None:
            self.unwritten[start:stop] = ~buffer.init

    def _extent(self, buffer: Buffer) -> tuple[int, int]:
        start = self._starts[id(buffer)]
        return start, start + len(buffer.data)

    def address(self, pointer: Pointer) -> int:
        """What a kernel is given for it."""
        return ORIGIN + self._starts[id(pointer.buffer)] + pointer.offset

    def place(self, address: Array) -> Array:
        """Where addresses lie in ``data``."""
        return address.astype(S64) - ORIGIN

    def outside(self, place: Array, size: int) -> Array:
        """Which accesses of ``size`` bytes are not within a buffer."""
        near = np.where((place >= 0) & (place < len(self.data)), place, 0)  # nobody's page
        page = near >> PAGE_BITS
        return (place < self._low[page]) | (place + size > self._high[page])

    def is_new(self, place: Array) -> Array:
        """Whether a launch just before has put there what is there."""
        return self._new[place >> PAGE_BITS]

    def touch(self, place: Array) -> None:
        """A launch writes there."""
        self._touched[place >> PAGE_BITS] = True

    def copy_out(self) -> None:
        """Give the buffers what was written."""
        for buffer in self._buffers:
            start, stop = self._extent(buffer)
            if self._touched[start // PAGE : -(-stop // PAGE)].any():
                buffer.data[:] = self.data[start:stop]
                if buffer.init is not None and self.unwritten is not None:
                    buffer.init[:] = ~self.unwritten[start:stop]
