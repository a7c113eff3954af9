"""What the 32 threads of a warp do together; values are ``[warps, 32]``."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import U32, Array

WARP = 32
ALL = 0xFFFFFFFF  # a member mask
_LANE = np.arange(WARP)
_REDUCE: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def shuffle(kind: str, value: Array, by: Array, clamp: Array) -> tuple[Array, Array]:
    """shfl.sync: the value of another thread, and whether there is one; where not, the thread's own."""
    by, clamp = by.astype(int) & 31, clamp.astype(int)
    keep = (clamp >> 8) & 31
    last = (_LANE & keep) | (clamp & 31 & ~keep)
    source = {
        "up": lambda: _LANE - by, "down": lambda: _LANE + by, "bfly": lambda: _LANE ^ by,
        "idx": lambda: (_LANE & keep) | (by & ~keep),
    }[kind]()  # fmt: skip
    there = source >= last if kind == "up" else source <= last
    return np.take_along_axis(value, np.where(there, source, _LANE), 1), there


def reduce(kind: str, value: Array) -> Array:
    """redux.sync and vote.sync: one value a warp."""
    if kind == "ballot":
        return (value.astype(U32) << _LANE.astype(U32)).sum(1, dtype=U32)
    if kind in ("any", "all", "uni"):
        some, every = value.any(1), value.all(1)
        return {"any": some, "all": every, "uni": every | ~some}[kind]
    return _REDUCE[kind].reduce(value, axis=1, dtype=value.dtype)


def matrix_places(rows: Array, number: int) -> Array:
    """Where each thread's word of the ``number``-th 8 x 8 matrix lies: stmatrix and ldmatrix, ``rows`` addresses."""
    return (rows[:, 8 * number + _LANE // 4] + (_LANE % 4 * 4).astype(U32)).reshape(-1)


def column_places(rows: Array, number: int, half: int) -> Array:
    """Where the lower or upper ``half`` of each thread's word lies when the matrix is kept column by column."""
    return (rows[:, 8 * number + _LANE % 4 * 2 + half] + (_LANE // 4 * 2).astype(U32)).reshape(-1)
