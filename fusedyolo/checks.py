"""Every ``ValueError`` about an argument: its name, what came, what was wanted.

Nothing here launches work or waits for a device, so the checks run on every call, and ``torch.compile`` traces through
them. What they find of shapes, types and devices is remembered.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("sum", "mean")
UNITS = ("relative", "pixel")
BOXES = ("cxcywh", "xyxy", "xywh")

Pair = tuple[float, float]
BoxForm = tuple[str | None, str | None] | None
"""What was said of boxes in targets: their unit and their four numbers, None for what is usual."""
R = TypeVar("R")


def fail(name: str, got: object, want: object) -> NoReturn:
    """Raise the ``ValueError`` that every check raises."""
    raise ValueError(f"{name}: {got}, want {want}")


def describe(value: object) -> str:
    """What came, in a few words: the shape of a tensor, or its layout, otherwise a short value or a type."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided:
            return f"a tensor of layout {value.layout}, not torch.strided"
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"


class Form(NamedTuple):
    """What there is to check of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def form(value: object) -> Form | str:
    """Of a strided tensor; what came instead, in words."""
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return _form(Form, (value.shape, value.dtype, value.device))
    return describe(value)


_form = tuple.__new__  # what a NamedTuple's own constructor, in Python, comes to


def remembered(check: Callable[..., R]) -> Callable[..., R]:
    """Decorates a check of what can be a key: done once for the same arguments, unless it fails.

    Graphs are traced through it, and where a size is a symbol, which is no key, it is done at each call.
    """
    find = lru_cache(maxsize=256, typed=True)(check)

    @wraps(check)
    def checked(*arguments: Any) -> R:
        if not torch.compiler.is_compiling():
            try:
                return find(*arguments)
            except TypeError:
                pass
        return check(*arguments)

    return checked


# Scalars.


def one_of(name: str, value: object, allowed: Collection[str]) -> str:
    """``value``, one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        fail(name, describe(value), "one of " + ", ".join(map(repr, allowed)))
    return value


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf, open_low: bool = False) -> float:
    """``value`` as a float, finite and in ``[low, high]`` (``(low, high]`` with ``open_low``)."""
    if type(value) is float and low < value < math.inf and value <= high:
        return value
    want = "a finite number"
    if high < math.inf:
        want += f" in {'(' if open_low else '['}{low:g}, {high:g}]"
    elif low > -math.inf:
        want += f" {'>' if open_low else '>='} {low:g}"
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        fail(name, describe(value), want)
    result = float(value)
    if not -math.inf < result < math.inf or not low <= result <= high or (open_low and result == low):
        fail(name, describe(value), want)
    return result


def count(name: str, value: Any, low: int = 1) -> int:
    """``value`` as an int, at least ``low``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < low:
        fail(name, describe(value), f"an integer >= {low}")
    return int(value)


def size(name: str, value: Any) -> tuple[float, float]:
    """``value`` as (height, width), both positive; one number stands for a square."""
    if type(value) is int and 0 < value <= 1 << 53:
        return value, value
    pair = (value, value) if isinstance(value, Real) else value
    if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
        fail(name, describe(value), "(height, width)")
    if any(isinstance(side, Sequence) for side in pair):
        fail(name, describe(value), "one (height, width), that of the batch")
    return _side(name, pair[0]), _side(name, pair[1])


def _side(name: str, value: Any) -> float:
    """A positive number. An integer stays what it is, for in a graph it may be a symbol, and whoever asks what a symbol
    is as a float has a graph of this number alone.
    """
    if type(value) is int and 0 < value <= 1 << 53:
        return value
    return _whole(number(name, value, 0, open_low=True))


def image_sizes(value: Any, images: int) -> list[tuple[float, float]]:
    """The (height, width) of each image, from one pair (or side) for all of them or one for each."""
    if isinstance(value, Sequence) and value and isinstance(value[0], Sequence):
        if len(value) != images:
            fail("image_size", f"{len(value)} pairs", f"(height, width), or one pair for each of {images} images")
        return [size(f"image_size[{i}]", pair) for i, pair in enumerate(value)]
    return [size("image_size", value)] * images


def _whole(value: float) -> float:
    """An int where the value is one: products with it stay exact, and symbolic sizes stay integers."""
    return int(value) if float(value).is_integer() else value


# The construction of an anchor-grid loss.


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


def strides(value: Any, levels: int) -> tuple[float, ...]:
    """Strides in pixels per cell, one a level."""
    items = _items("strides", value, "a sequence of numbers, one a level")
    if len(items) != levels:
        fail("strides", f"{len(items)} numbers", f"{levels}, one for each level of anchors")
    return tuple(number(f"strides[{i}]", item, 0, open_low=True) for i, item in enumerate(items))


def class_counts(value: Any, num_classes: int) -> tuple[float, ...]:
    """Objects of each class in the data set: ``num_classes`` positive numbers."""
    items = _items("counters_per_class", value, f"{num_classes} positive numbers, one a class")
    if len(items) != num_classes:
        fail("counters_per_class", f"{len(items)} numbers", f"{num_classes}, one a class")
    return tuple(number(f"counters_per_class[{c}]", item, 0, open_low=True) for c, item in enumerate(items))


# The call of an anchor-grid loss.


def _type(where: str, dtype: torch.dtype, first: torch.dtype, like: str) -> None:
    """Predictions may be of several types: halves and float32, which autocast leaves of some; float64 stands alone."""
    if dtype != first and torch.float64 in (dtype, first):
        fail(where, f"dtype {dtype}", f"{first} as {like}")


def of_one_type(preds: Sequence[Tensor]) -> list[Tensor]:
    """These predictions, or where their types differ in float32: a kernel reads the maps of all levels as one type."""
    if all(pred.dtype == preds[0].dtype for pred in preds):
        return list(preds)
    return [pred.float() for pred in preds]


ORDERS: dict[str, tuple[int, ...]] = {
    "(B, A, H, W, 5 + C)": (0, 1, 2, 3, 4),
    "(B, A, 5 + C, H, W)": (0, 1, 3, 4, 2),
    "(B, H, W, A, 5 + C)": (0, 3, 1, 2, 4),
}
"""Of maps with an axis for everything, where those of the first order are, which is meant where sizes fit several."""


def grid_predictions(
    preds: Any,
    anchors: tuple[int, ...],
    strides: tuple[float, ...],
    num_classes: int,
    image_size: tuple[float, float] | None,
    any_order: bool = False,
) -> tuple[int, tuple[float, float]]:
    """Check the prediction maps of a grid head; batch size and image (height, width) come back.

    ``anchors`` is the number of anchors a level. ``image_size`` is what the maps have to amount to, if it is known.
    With ``any_order`` maps of five axes, if all are, may have them in each of :data:`ORDERS`, see :func:`grid_views`.
    """
    levels = len(anchors)
    if not isinstance(preds, list | tuple):
        fail("preds", describe(preds), f"a list of {levels} tensors, one a level{_SPLIT * isinstance(preds, dict)}")
    if len(preds) != levels:
        fail("preds", f"{len(preds)} levels", f"{levels}, one for each level of anchors")
    return _grid_maps(tuple([form(pred) for pred in preds]), anchors, strides, num_classes, image_size, any_order)


_SPLIT = ": boxes, objectness and classes of a level in one, by torch.cat"


def grid_views(preds: Sequence[Tensor], anchors: tuple[int, ...], num_classes: int) -> list[Tensor]:
    """Views of checked predictions, of which those of five axes have them in the first of :data:`ORDERS`."""
    if any(pred.dim() != 5 for pred in preds):
        return list(preds)
    order = _orders(tuple([pred.shape for pred in preds]), anchors, 5 + num_classes)[0]
    return [pred.permute(order) for pred in preds]


@remembered
def _orders(shapes: tuple[tuple[int, ...], ...], anchors: tuple[int, ...], channels: int) -> list[tuple[int, ...]]:
    """In which orders the axes of all these maps may be."""
    levels = list(zip(shapes, anchors, strict=True))
    return [
        order
        for order in ORDERS.values()
        if all(shape[order[1]] == count and shape[order[4]] == channels for shape, count in levels)
    ]


@remembered
def _grid_maps(
    maps: tuple[Form | str, ...],
    anchors: tuple[int, ...],
    strides: tuple[float, ...],
    num_classes: int,
    image_size: tuple[float, float] | None,
    any_order: bool,
) -> tuple[int, tuple[float, float]]:
    """Of maps, one a level."""
    sizes: list[tuple[float, float]] = []
    first: Any = maps[0]
    shapes: list[tuple[int, ...]] = []
    channels, orders = 5 + num_classes, list(ORDERS.values())[:1]
    any_order = any_order and all(isinstance(pred, str) or len(pred.shape) == 5 for pred in maps)
    for i, pred in enumerate(maps):
        if isinstance(pred, str):
            several = pred in ("a list", "a tuple") or pred[0] in "[("
            fail(f"preds[{i}]", pred, "a tensor" + _SPLIT * several)
        shape = pred.shape
        shapes.append(shape)
        flat = len(shape) == 4 and shape[1] == anchors[i] * channels
        if any_order:
            orders = _orders(tuple(shapes), anchors[: i + 1], channels)
        elif len(shape) == 5 and not (shape[1] == anchors[i] and shape[4] == channels):
            orders = []
        if not flat and not (len(shape) == 5 and orders):
            names = ["(B, A * (5 + C), H, W)", *list(ORDERS)[: 3 if any_order else 1]]
            want = " or ".join(names).replace("A", f"{anchors[i]}").replace("5 + C", f"5 + {num_classes}")
            fail(f"preds[{i}]", f"shape {tuple(shape)}", want)
    for i, (pred, shape) in enumerate(zip(maps, shapes, strict=True)):
        assert isinstance(pred, Form)
        height, width = (shape[2], shape[3]) if len(shape) == 4 else (shape[orders[0][2]], shape[orders[0][3]])
        if shape[0] < 1 or height < 1 or width < 1:
            fail(f"preds[{i}]", f"shape {tuple(shape)}", "no empty dimension")
        if pred.dtype not in FLOATS:
            fail(f"preds[{i}]", f"dtype {pred.dtype}", "one of " + ", ".join(map(str, FLOATS)))
        _type(f"preds[{i}]", pred.dtype, first.dtype, "preds[0]")
        if pred.device != first.device:
            fail(f"preds[{i}]", f"device {pred.device}", f"{first.device} as preds[0]")
        if shape[0] != first.shape[0]:
            fail(f"preds[{i}]", f"batch size {shape[0]}", f"{first.shape[0]} as preds[0]")
        sizes.append((height * strides[i], width * strides[i]))
        if sizes[i] != sizes[0]:
            fail(
                f"preds[{i}]",
                f"a map of {height} x {width} cells of {strides[i]} pixels, an image of {sizes[i]} (height, width)",
                f"{sizes[0]} as preds[0]: maps in the order of strides, of an image whose sides all strides divide",
            )
    if image_size is not None and sizes[0] != image_size:
        fail("preds", f"maps of an image of {sizes[0]} (height, width)", f"image_size {image_size}")
    return first.shape[0], sizes[0]


# Targets.


def box_form(unit: Any, boxes: Any) -> BoxForm:
    """The unit of boxes in targets and their four numbers, as far as they are given; None where neither is."""
    if unit is None and boxes is None:
        return None
    return (
        None if unit is None else one_of("unit", unit, UNITS),
        None if boxes is None else one_of("boxes", boxes, BOXES),
    )


def target_size(image_size: tuple[float, float] | None, targets: Any, form: BoxForm = None) -> tuple[float, float]:
    """``image_size``, which targets in pixels cannot do without, as lists of dicts are and others that ``form``, of
    :func:`box_form`, says it of; others make do with (1, 1).
    """
    if image_size is None and isinstance(targets, list | tuple | Tensor):
        dicts = not isinstance(targets, Tensor) and bool(targets) and isinstance(targets[0], dict)
        unit = form[0] if form is not None and form[0] else ("pixel" if dicts else "relative")
        if unit == "pixel":
            fail("image_size", None, "(height, width) of the images, for targets in pixels")
    return image_size or (1, 1)


def same_device(name: str, value: Tensor, device: torch.device | None) -> None:
    """``value`` lies on ``device``, where the predictions are; anything will do without one."""
    if device is not None and value.device != device:
        fail(name, f"device {value.device}", f"{device} as preds")


def rows(name: str, value: Any, columns: int, ndim: int, layout: str, weights: bool = False) -> Tensor:
    """``value``, a tensor of float32 or float64 of ``ndim`` dimensions and ``columns`` columns, or with ``weights`` one
    more.
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        fail(name, describe(value), f"a tensor of shape {layout}")
    if value.dim() != ndim or value.shape[-1] not in (columns, columns + weights):
        fail(name, f"shape {tuple(value.shape)}", layout + ", or a column more, of weights" * weights)
    if value.dtype not in (torch.float32, torch.float64):
        halved = value.dtype in FLOATS
        why = ": halves hold no class above 256 or 2048, and move centres; keep targets out of casts" * halved
        fail(name, f"dtype {value.dtype}", f"torch.float32{why}")
    return value


def image_boxes(i: int, item: Any) -> tuple[Tensor, Tensor]:
    """The boxes ``[N, 4]`` and labels ``[N]`` of the ``i``-th image of a torchvision target list."""
    name = f"targets[{i}]"
    if not isinstance(item, dict):
        fail(name, describe(item), "a dict with 'boxes' and 'labels'")
    if "boxes" not in item or "labels" not in item:
        fail(name, f"keys {list(item)}", "'boxes' and 'labels'")
    boxes, labels = item["boxes"], item["labels"]
    if not isinstance(boxes, Tensor) or boxes.layout is not torch.strided or boxes.dim() != 2 or boxes.shape[1] != 4:
        fail(f"{name}['boxes']", describe(boxes), "a tensor of shape (N, 4)")
    if isinstance(labels, Tensor) and labels.numel() == 0 == boxes.shape[0]:
        labels = labels.reshape(0)  # as some loaders leave an empty image
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.shape[0] != boxes.shape[0]:
        fail(f"{name}['labels']", describe(labels), f"a tensor of shape ({boxes.shape[0]},), one a box")
    for key, value in (("boxes", boxes), ("labels", labels)):
        if value.is_complex() or value.dtype == torch.bool:
            fail(f"{name}['{key}']", f"dtype {value.dtype}", "a real number type")
    if labels.device != boxes.device:
        fail(f"{name}['labels']", f"device {labels.device}", f"{boxes.device} as the boxes")
    return boxes, labels


def row_weights(name: str, value: Any, of: Tensor) -> Tensor:
    """``value``, a real number for each of the rows, or boxes, ``of``, on their device."""
    row_flags(name, value, of)
    if value.dtype == torch.bool:
        fail(name, "dtype torch.bool", "a real number type")
    return value


def row_flags(name: str, value: Any, of: Tensor) -> Tensor:
    """``value``, a bool, or a number that is 0 or not, for each of the rows, or boxes, ``of``, on their device."""
    count = of.shape[0]
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.shape != (count,):
        fail(name, describe(value), f"a tensor of shape ({count},), one a row")
    if value.is_complex():
        fail(name, f"dtype {value.dtype}", "a real number type")
    if value.device != of.device:
        fail(name, f"device {value.device}", f"{of.device} as the rows")
    return value


# Pairs of tensors, for fusedyolo.functional.


def pair(name1: str, value1: Any, name2: str, value2: Any) -> None:
    """Two tensors of real numbers on one device."""
    for name, value in ((name1, value1), (name2, value2)):
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            fail(name, describe(value), "a tensor")
        if value.is_complex() or value.dtype == torch.bool:
            fail(name, f"dtype {value.dtype}", "a real number type")
    if value1.device != value2.device:
        fail(name2, f"device {value2.device}", f"{value1.device} as {name1}")


# The loss of a grid whose cells hold one object each.


def flag(name: str, value: Any) -> bool:
    """``value``, one of 0 and 1, as a bool."""
    if not isinstance(value, Integral) or value not in (0, 1):
        fail(name, describe(value), "0 or 1")
    return bool(value)


def cell_predictions(pred: Any, grid_size: int, num_boxes: int, num_classes: int) -> int:
    """Check the predictions of a head of cells, in either layout; the batch size comes back."""
    if not isinstance(pred, Tensor) or pred.layout is not torch.strided:
        fail("pred", describe(pred), "a tensor")
    S, channels, shape = grid_size, 5 * num_boxes + num_classes, pred.shape
    flat = len(shape) == 2 and shape[1] == S * S * channels
    if not flat and not (len(shape) == 4 and shape[1] == S and shape[2] == S and shape[3] == channels):
        layout = f"5 * {num_boxes} + {num_classes}"
        fail("pred", f"shape {tuple(shape)}", f"(B, {S}, {S}, {layout}) or (B, {S} * {S} * ({layout}))")
    if shape[0] < 1:
        fail("pred", f"shape {tuple(shape)}", "no empty dimension")
    if pred.dtype not in FLOATS:
        fail("pred", f"dtype {pred.dtype}", "one of " + ", ".join(map(str, FLOATS)))
    return shape[0]


# The call of a loss over anchors.


def dense_predictions(
    preds: Any, names: tuple[str, ...], channels: tuple[int, ...], anchors: Any
) -> tuple[list[list[Tensor]], tuple[int, ...]]:
    """Check the predictions of a dense head; each as a list of levels comes back, and the anchors of a level.

    ``names`` and ``channels`` are those of each prediction: ``[B, N, channels]``, or maps ``[B, A * channels, H, W]``.
    """
    if not isinstance(preds, list | tuple) or len(preds) != len(names):
        fail("preds", describe(preds), f"({', '.join(names)})")
    levels = [list(pred) if isinstance(pred, list | tuple) else [pred] for pred in preds]
    forms = tuple([tuple([form(pred) for pred in maps]) for maps in levels])
    return levels, _dense_levels(forms, names, channels, form(anchors))


@remembered
def _dense_levels(
    levels: tuple[tuple[Form | str, ...], ...],
    names: tuple[str, ...],
    channels: tuple[int, ...],
    anchors: Form | str,
) -> tuple[int, ...]:
    """The anchors of each level."""
    first: Any = levels[0][0] if levels[0] else None
    sizes: list[int] = []
    for name, maps, width in zip(names, levels, channels, strict=True):
        if not maps or len(maps) != len(levels[0]):
            fail(name, f"{len(maps)} levels", f"{max(len(levels[0]), 1)} as {names[0]}")
        for i, pred in enumerate(maps):
            where = name if len(maps) == 1 else f"{name}[{i}]"
            if isinstance(pred, str):
                fail(where, pred, "a tensor, or a list of maps")
            shape = tuple(pred.shape)
            maps_form = len(shape) == 4 and shape[1] % width == 0
            if not maps_form and not (len(shape) == 3 and len(maps) == 1 and shape[2] == width):
                fail(where, f"shape {shape}", f"(B, N, {width}), or a list of maps (B, A * {width}, H, W)")
            if 0 in shape:
                fail(where, f"shape {shape}", "no empty dimension")
            if pred.dtype not in FLOATS:
                fail(where, f"dtype {pred.dtype}", "one of " + ", ".join(map(str, FLOATS)))
            _type(where, pred.dtype, first.dtype, names[0])
            if pred.device != first.device:
                fail(where, f"device {pred.device}", f"{first.device} as {names[0]}")
            like: Any = levels[0][i]
            found = _cells(shape, width)
            if name == names[0]:
                sizes.append(math.prod(found[1:]))
            if found != _cells(like.shape, channels[0]) or found[0] != first.shape[0]:
                fail(where, f"shape {shape}", f"that of {names[0]}, {tuple(like.shape)}, in all but its channels")
    if isinstance(anchors, str):
        fail("anchors", anchors, "a tensor of shape (N, 4)")
    if len(anchors.shape) != 2 or anchors.shape[1] != 4:
        fail("anchors", f"a tensor of shape {tuple(anchors.shape)}", "a tensor of shape (N, 4)")
    if anchors.dtype not in FLOATS:
        fail("anchors", f"dtype {anchors.dtype}", "torch.float32")
    if first is not None and anchors.device != first.device:
        fail("anchors", f"device {anchors.device}", f"{first.device} as {names[0]}")
    if anchors.shape[0] != sum(sizes):
        fail("anchors", f"shape {tuple(anchors.shape)}", f"({sum(sizes)}, 4), one for each of {names[0]}")
    return tuple(sizes)


def _cells(shape: tuple[int, ...], channels: int) -> tuple[int, ...]:
    """Images and anchors of a prediction; of maps images, anchors of a cell, rows, columns."""
    if len(shape) == 3:
        return shape[0], shape[1]
    return shape[0], shape[1] // channels, *shape[2:]


def level_sizes(value: Any, levels: tuple[int, ...], in_one_piece: bool, needed: bool) -> tuple[int, int]:
    """The numbers of anchors of the first and of the last level, from ``num_anchors_per_level`` or the maps themselves.

    ``levels`` are the anchors of each tensor that came, a map or, ``in_one_piece``, all levels: these then have to be
    told if they are ``needed``.
    """
    if value is None:
        if needed and in_one_piece:
            fail("num_anchors_per_level", None, "the number of anchors of each level")
        return levels[0], levels[-1]
    found = _level_sizes(levels, in_one_piece, *value) if isinstance(value, list | tuple) and value else None
    if found is None:
        want = f"integers that add up to {sum(levels)}, one a level" if in_one_piece else f"{list(levels)}, as the maps"
        fail("num_anchors_per_level", describe(value), want)
    return found


@remembered
def _level_sizes(levels: tuple[int, ...], in_one_piece: bool, *value: Any) -> tuple[int, int] | None:
    """The first and the last number, None if they are not those of the levels."""
    sizes = tuple([count("num_anchors_per_level", item) for item in value])
    fit = sum(sizes) == sum(levels) if in_one_piece else sizes == levels
    return (sizes[0], sizes[-1]) if fit else None


# Losses over cells that predict a box each.


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


def point_predictions(
    preds: Any,
    names: tuple[str, ...],
    widths: tuple[int, ...],
    strides: tuple[float, ...],
    image_size: tuple[float, float] | None,
) -> tuple[str, list[Tensor], tuple[tuple[int, int], ...], tuple[float, float]]:
    """Check predictions of cells; their form, the tensors, (height, width) of each map and of the image come back.

    ``names`` and ``widths`` are those of what is predicted, in their order in a map. The forms: ``"maps"``, a list of
    ``[B, sum of widths, H, W]``, one a level; ``"apart"``, a dict of lists of ``[B, width, H, W]``; ``"planes"``, a
    dict of ``[B, width, N]`` and, as ``"feats"``, of maps that say the sizes, unless ``image_size`` does. Tensors come
    back level by level, in the order of ``names``.
    """
    if isinstance(preds, list | tuple):
        if len(preds) != len(strides):
            fail("preds", f"{len(preds)} levels", f"{len(strides)}, one for each of strides")
        where = tuple(f"preds[{i}]" for i in range(len(preds)))
        forms = tuple([form(pred) for pred in preds])
        sizes = _point_maps(forms, where, (sum(widths),) * len(preds), strides, image_size)
        return "maps", list(preds), *sizes
    if not isinstance(preds, dict) or any(name not in preds for name in names):
        got = f"a dict with {list(preds)}" if isinstance(preds, dict) else describe(preds)
        fail("preds", got, f"a list of {len(strides)} maps, or a dict with {', '.join(map(repr, names))}")
    parts = [preds[name] for name in names]
    if isinstance(parts[0], list | tuple):
        for name, maps in zip(names, parts, strict=True):
            if not isinstance(maps, list | tuple) or len(maps) != len(strides):
                got = f"{len(maps)} levels" if isinstance(maps, list | tuple) else describe(maps)
                fail(name, got, f"a list of {len(strides)} maps as {names[0]}, one for each of strides")
        levels = range(len(strides))
        tensors = [maps[i] for i in levels for maps in parts]
        where = tuple(f"{name}[{i}]" for i in levels for name in names)
        forms = tuple([form(tensor) for tensor in tensors])
        sizes = _point_maps(forms, where, widths * len(levels), tuple(s for s in strides for _ in names), image_size)
        return "apart", tensors, sizes[0][:: len(names)], sizes[1]
    feats = preds.get("feats")
    if feats is None and image_size is None:
        fail("preds", "planes without 'feats'", "these, maps that say the sizes, or image_size")
    if feats is not None and (not isinstance(feats, list | tuple) or len(feats) != len(strides)):
        fail("feats", describe(feats), f"a list of {len(strides)} maps, one for each of strides")
    shapes = None if feats is None else tuple([form(feat) for feat in feats])
    return "planes", parts, *_point_planes(tuple([form(p) for p in parts]), names, widths, shapes, strides, image_size)


def _same(where: str, pred: Any, first: Any, like: str) -> None:
    """A tensor of floats, of the device and the batch size of the first one."""
    if pred.dtype not in FLOATS:
        fail(where, f"dtype {pred.dtype}", "one of " + ", ".join(map(str, FLOATS)))
    _type(where, pred.dtype, first.dtype, like)
    if pred.device != first.device:
        fail(where, f"device {pred.device}", f"{first.device} as {like}")
    if pred.shape[0] != first.shape[0]:
        fail(where, f"batch size {pred.shape[0]}", f"{first.shape[0]} as {like}")


def _cells_of(side: float, stride: float) -> Any:
    """Cells that cover a side of an image; of symbolic sizes a symbol."""
    return -(-side // stride)


def _point_sizes(
    where: Sequence[str],
    maps: Sequence[tuple[int, int]],
    strides: Sequence[float],
    image_size: tuple[float, float] | None,
) -> tuple[tuple[tuple[int, int], ...], tuple[float, float]]:
    """``maps``, (height, width) each, and the size of the image: that of the first map, unless it is given."""
    size = image_size or (maps[0][0] * strides[0], maps[0][1] * strides[0])
    for name, (height, width), stride in zip(where, maps, strides, strict=True):
        want = _cells_of(size[0], stride), _cells_of(size[1], stride)
        if (height, width) != want:
            of = f"image_size {size}" if image_size else f"an image of {size} (height, width) as {where[0]}"
            fail(name, f"a map of {height} x {width} cells", f"{want[0]} x {want[1]} cells of {stride} pixels for {of}")
    return tuple(maps), size


@remembered
def _point_maps(
    maps: tuple[Form | str, ...],
    where: tuple[str, ...],
    widths: tuple[int, ...],
    strides: tuple[float, ...],
    image_size: tuple[float, float] | None,
) -> tuple[tuple[tuple[int, int], ...], tuple[float, float]]:
    """Of maps, each with its name, its channels and its stride."""
    for name, pred, width in zip(where, maps, widths, strict=True):
        if isinstance(pred, str):
            fail(name, pred, "a tensor")
        if len(pred.shape) != 4 or pred.shape[1] != width:
            fail(name, f"shape {tuple(pred.shape)}", f"(B, {width}, H, W)")
        if 0 in pred.shape:
            fail(name, f"shape {tuple(pred.shape)}", "no empty dimension")
        _same(name, pred, maps[0], where[0])
    sizes: Any = [pred.shape[2:4] for pred in maps if not isinstance(pred, str)]
    return _point_sizes(where, [(height, width) for height, width in sizes], strides, image_size)


@remembered
def _point_planes(
    planes: tuple[Form | str, ...],
    names: tuple[str, ...],
    widths: tuple[int, ...],
    feats: tuple[Form | str, ...] | None,
    strides: tuple[float, ...],
    image_size: tuple[float, float] | None,
) -> tuple[tuple[tuple[int, int], ...], tuple[float, float]]:
    """Of planes, and of the maps that say their sizes."""
    if feats is not None:
        for i, feat in enumerate(feats):
            if isinstance(feat, str) or len(feat.shape) != 4:
                fail(f"feats[{i}]", feat if isinstance(feat, str) else f"shape {tuple(feat.shape)}", "(B, ., H, W)")
        found: Any = [feat.shape[2:4] for feat in feats if not isinstance(feat, str)]
        maps = [(height, width) for height, width in found]
    else:
        assert image_size is not None
        maps = [(int(_cells_of(image_size[0], s)), int(_cells_of(image_size[1], s))) for s in strides]
    where = [f"feats[{i}]" for i in range(len(maps))]
    sizes = _point_sizes(where, maps, strides, image_size)
    N = sum(height * width for height, width in maps)
    for name, pred, width in zip(names, planes, widths, strict=True):
        if isinstance(pred, str):
            fail(name, pred, f"a tensor of shape (B, {width}, {N}), or a list of maps")
        if len(pred.shape) != 3 or pred.shape[1:] != (width, N) or pred.shape[0] < 1:
            fail(name, f"shape {tuple(pred.shape)}", f"(B, {width}, {N})")
        _same(name, pred, planes[0], names[0])
    return sizes
