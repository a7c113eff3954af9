"""Predictions of a call: what they are, and the sizes that follow from theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .values import FLOATS, Form, count, describe, fail, form, remembered


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
        others = "".join(f", {name} {width}" for name, width in zip(names[1:], widths[1:], strict=True))
        channels = f": {names[0]} 4 * {widths[0] // 4}{others}"
        sizes = _point_maps(forms, where, (sum(widths),) * len(preds), strides, image_size, channels)
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
    parts: str = "",
) -> tuple[tuple[tuple[int, int], ...], tuple[float, float]]:
    """Of maps, each with its name, its channels and its stride; ``parts``: what of a map these are."""
    for name, pred, width in zip(where, maps, widths, strict=True):
        if isinstance(pred, str):
            fail(name, pred, "a tensor")
        if len(pred.shape) != 4 or pred.shape[1] != width:
            fail(name, f"shape {tuple(pred.shape)}", f"(B, {width}, H, W){parts}")
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
