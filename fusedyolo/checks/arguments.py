"""What losses are constructed of: anchors, strides, numbers of each level and of each class."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from .values import describe, fail, number

Pair = tuple[float, float]

LARGEST_IMAGE = 4096  # pixels of a side, beyond which an anchor must be a mistake


def _pairs(name: str, value: Any, want: str) -> tuple[Pair, ...]:
    try:
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value, dtype=np.float64)
    except (TypeError, ValueError):
        fail(name, describe(value), want)
    if array.ndim == 1 and array.size % 2 == 0:
        array = array.reshape(-1, 2)
    if array.ndim != 2 or array.shape[1] != 2 or not array.size:
        fail(name, describe(value), want)
    with np.errstate(over="ignore"):
        array = array.astype(np.float32)
    if not (np.isfinite(array) & (array > 0)).all():
        fail(name, describe(value), "positive, finite widths and heights")
    return tuple((float(w), float(h)) for w, h in array)


def _items(name: str, value: Any, want: str) -> list:
    if isinstance(value, str | bytes | dict) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        fail(name, describe(value), want)
    items = list(value)
    if not items:
        fail(name, describe(value), want)
    return items


def level_anchors(anchors: Any) -> tuple[tuple[Pair, ...], ...]:
    """Anchors as one tuple of (width, height) a level; a level may also be flat, or an array."""
    want = "for each level its (width, height) pairs"
    levels = _items("anchors", anchors, want)
    return tuple(
        _pairs(f"anchors[{i}]", level, "(width, height) pairs, or a flat list of even length")
        for i, level in enumerate(levels)
    )


def all_anchors(anchors: Any) -> tuple[Pair, ...]:
    """The competing anchors as one tuple of (width, height), from a flat list, a list of pairs or a list of levels."""
    want = "(width, height) pairs, flat or one list a level"
    found: list[Pair] = []
    flat: list[Any] = []
    for item in _items("all_anchors", anchors, want):
        if isinstance(item, Real) or getattr(item, "ndim", 1) == 0:
            flat.append(float(item))
        else:
            found.extend(_pairs("all_anchors", item, want))
    if flat and found:
        fail("all_anchors", describe(anchors), want)
    return _pairs("all_anchors", flat, want) if flat else tuple(found)


def locate(levels: Sequence[Sequence[Pair]], pool: Sequence[Pair]) -> tuple[tuple[int, ...], ...]:
    """For each level, the places of its anchors in ``pool``; no place is taken twice.

    A level takes the first free contiguous run that equals it, and otherwise the first free place of each anchor.
    """
    free = [True] * len(pool)
    found = []
    for level, anchors in enumerate(levels):
        n = len(anchors)
        starts = range(len(pool) - n + 1)
        run = next((s for s in starts if all(free[s : s + n]) and tuple(pool[s : s + n]) == tuple(anchors)), None)
        places: list[int] = []
        for k, anchor in enumerate(anchors):
            if run is not None:
                place: int | None = run + k
            else:
                place = next((i for i, other in enumerate(pool) if free[i] and other == anchor), None)
            if place is None:
                fail(
                    "all_anchors",
                    f"{len(pool)} anchors of which none is left for anchors[{level}][{k}] = {anchor}",
                    "every anchor of every level among them",
                )
            free[place] = False
            places.append(place)
        found.append(tuple(places))
    return tuple(found)


def per_level(name: str, value: Any, levels: int, open_low: bool = True) -> tuple[float, ...]:
    """``value`` as one positive number a level (or 0, unless ``open_low``); a single number stands for all of them."""
    if isinstance(value, Real):
        return (number(name, value, 0, open_low=open_low),) * levels
    items = _items(name, value, f"a number or one number for each of {levels} levels")
    if len(items) != levels:
        fail(name, f"{len(items)} numbers", f"one for each of {levels} levels")
    return tuple(number(f"{name}[{i}]", item, 0, open_low=open_low) for i, item in enumerate(items))


def ascending_pair(name: str, value: Any) -> Pair:
    """Two numbers of 0 or more, the second not below the first."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        fail(name, describe(value), "(low, high), 0 <= low <= high")
    low, high = (number(f"{name}[{i}]", item, 0) for i, item in enumerate(value))
    if low > high:
        fail(name, describe(value), "(low, high), 0 <= low <= high")
    return low, high


def neighbours(value: Any) -> int:
    """Neighbours of its own cell that an object takes: 0, 2 (the nearest), or 4."""
    if isinstance(value, bool) or value not in (0, 2, 4):
        fail("neighbours", describe(value), "0, 2 or 4")
    return int(value)


def flags(name: str, value: Any, levels: int) -> tuple[bool, ...]:
    """``value`` as one flag (0, 1, or a bool) a level; a single one stands for all of them."""
    items = [value] * levels if isinstance(value, int) else _items(name, value, f"0 or 1, or one a level of {levels}")
    if len(items) != levels:
        fail(name, f"{len(items)} flags", f"one for each of {levels} levels")
    for item in items:
        if not isinstance(item, int) or item not in (0, 1):
            fail(name, describe(item), "0 or 1")
    return tuple(map(bool, items))


def band(name: str, value: Any) -> tuple[float, float]:
    """Two IoUs in ascending order."""
    want = "(low, high), 0 <= low <= high <= 1"
    items = _items(name, value, want)
    if len(items) != 2:
        fail(name, describe(value), want)
    low, high = (number(f"{name}[{i}]", item, 0, 1) for i, item in enumerate(items))
    if low > high:
        fail(name, describe(value), want)
    return low, high


def ascending(levels: Sequence[Sequence[Pair]], strides: Sequence[float]) -> None:
    """Warn of anchors that shrink from the first level to the last while strides grow, or the other way round."""
    first, last = (sum(w * h for w, h in level) / len(level) for level in (levels[0], levels[-1]))
    if (last - first) * (strides[-1] - strides[0]) < 0:
        order = "small to large" if last > first else "large to small"
        warnings.warn(
            f"anchors: from {order}, with strides {tuple(strides)}: the first anchors belong to the first map. Turn "
            "either round if that is not meant",
            stacklevel=5,
        )


def in_pixels(levels: Sequence[Sequence[Pair]], strides: Sequence[float]) -> None:
    """Warn of anchors that seem to be given in cells: no side reaches half a cell of the largest stride."""
    limit = max(strides) / 2
    if all(side < limit for level in levels for anchor in level for side in anchor):
        warnings.warn(
            f"anchors: no side reaches {limit:g} pixels, half a cell of stride {max(strides):g}. If they are in cells, "
            "as YOLOv2's files and YOLOv5's checkpoints have them, multiply each by the stride of its level",
            stacklevel=5,
        )


def in_cells(levels: Sequence[Sequence[Pair]], strides: Sequence[float]) -> None:
    """Warn of anchors that seem to be given in pixels, where they are to be in cells: one is larger than any image."""
    for level, stride in zip(levels, strides, strict=True):
        side = max(side for anchor in level for side in anchor)
        if side * stride > LARGEST_IMAGE:
            warnings.warn(
                f"anchors: a side of {side:g} cells of stride {stride:g} is {side * stride:g} pixels. If they are in "
                "pixels, divide each by the stride of its level",
                stacklevel=3,
            )
            return


def strides(value: Any, levels: int) -> tuple[float, ...]:
    """Strides in pixels per cell, one a level."""
    items = _items("strides", value, "a sequence of numbers, one a level")
    if len(items) != levels:
        flat = levels >= 2 * len(items) > 2  # as files list them
        hint = ": anchors are a list of its (width, height) pairs for each level" * flat
        fail("strides", f"{len(items)} numbers", f"{levels}, one for each level of anchors{hint}")
    return tuple(number(f"strides[{i}]", item, 0, open_low=True) for i, item in enumerate(items))


def class_counts(value: Any, num_classes: int) -> tuple[float, ...]:
    """Objects of each class in the data set: ``num_classes`` positive numbers."""
    items = _items("counters_per_class", value, f"{num_classes} positive numbers, one a class")
    if len(items) != num_classes:
        fail("counters_per_class", f"{len(items)} numbers", f"{num_classes}, one a class")
    return tuple(number(f"counters_per_class[{c}]", item, 0, open_low=True) for c, item in enumerate(items))


def own_strides(value: Any) -> tuple[float, ...]:
    """Strides in pixels per cell, one a level, which say how many levels there are."""
    items = _items("strides", value, "a sequence of numbers, one a level")
    return tuple(number(f"strides[{i}]", item, 0, open_low=True) for i, item in enumerate(items))


def class_weights(value: Any, num_classes: int) -> tuple[float, ...] | None:
    """A factor of each class, not negative; None for none."""
    if value is None:
        return None
    items = _items("class_weights", value.tolist() if isinstance(value, Tensor) else value, f"{num_classes} numbers")
    if len(items) != num_classes:
        fail("class_weights", f"{len(items)} numbers", f"{num_classes}, one a class")
    return tuple(number(f"class_weights[{c}]", item, 0) for c, item in enumerate(items))
