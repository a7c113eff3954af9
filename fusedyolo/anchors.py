"""Anchors of the detectors that predict at anchors: RetinaNet, SSD and FCOS.

Each function takes the (height, width) of each prediction map and of the image, and returns float32 ``[N, 4]``, x1 y1
x2 y2 in pixels, in the order level, y, x, anchor; every bit is that of torchvision 0.28. Anchors are made once for the
same arguments, on the CPU, one copy brings them to the device, and what is returned is a copy of those: write to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import checks

RETINANET_SIZES = tuple((s, int(s * 2 ** (1 / 3)), int(s * 2 ** (2 / 3))) for s in (32, 64, 128, 256, 512))
FCOS_SIZES = (8, 16, 32, 64, 128)
SSD300: dict[str, Any] = {
    "aspect_ratios": ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    "scales": (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05),
    "steps": (8, 16, 32, 64, 100, 300),
}
"""Settings of SSD300: ``ssd_anchors(map_sizes, 300, **SSD300)``."""

KEPT = 32
"""Sets of anchors of each kind that are kept; one of RetinaNet for 800 x 1333 pixels takes 3 MiB."""

Sizes = tuple[tuple[int, int], ...]
Numbers = tuple[float, ...]


def retinanet_anchors(
    map_sizes: Sequence[Sequence[int]],
    image_size: int | Sequence[int],
    sizes: Sequence[Any] = RETINANET_SIZES,
    aspect_ratios: Sequence[Any] = (0.5, 1.0, 2.0),
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Anchors of RetinaNet; at each place those of the first aspect ratio come first, one for each size.

    An anchor of size s and ratio r is s * sqrt(r) high and s / sqrt(r) wide, its corners rounded to whole pixels (half
    to even) around the upper left corner of its cell. A cell is the image divided by the map, rounded down.

    Args:
        map_sizes: (height, width) of each prediction map.
        image_size: (height, width) in pixels, or the side of a square; of the batch, padding included.
        sizes: for each level the sizes in pixels, or one size.
        aspect_ratios: height / width, the same ones at every level or a sequence for each.
        device: where the anchors are to lie; the CPU without one.

    Raises:
        ValueError: an argument does not fit; it says which, what came and what was wanted.
    """
    maps, image, place = _maps(map_sizes), _image(image_size), _device(device)
    levels = len(maps)
    every = _lists("sizes", sizes, levels)
    if isinstance(aspect_ratios, Sequence) and aspect_ratios and not isinstance(aspect_ratios[0], Sequence):
        ratios = (_numbers("aspect_ratios", aspect_ratios),) * levels
    else:
        ratios = _lists("aspect_ratios", aspect_ratios, levels)
    return _copy(_retinanet(maps, image, every, ratios, place))


def fcos_anchors(
    map_sizes: Sequence[Sequence[int]],
    image_size: int | Sequence[int],
    sizes: Sequence[float] = FCOS_SIZES,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Anchors of FCOS: one square at each place, centred and rounded as :func:`retinanet_anchors` does.

    Args:
        map_sizes: (height, width) of each prediction map.
        image_size: (height, width) in pixels, or the side of a square; of the batch, padding included.
        sizes: the side of the square, in pixels, at each level.
        device: where the anchors are to lie; the CPU without one.

    Raises:
        ValueError: an argument does not fit; it says which, what came and what was wanted.
    """
    maps, image, place = _maps(map_sizes), _image(image_size), _device(device)
    sides = checks.per_level("sizes", _sequence("sizes", sizes), len(maps))
    return _copy(_retinanet(maps, image, tuple((side,) for side in sides), ((1.0,),) * len(maps), place))


def ssd_anchors(
    map_sizes: Sequence[Sequence[int]],
    image_size: int | Sequence[int],
    aspect_ratios: Sequence[Sequence[float]],
    scales: Sequence[float] | None = None,
    steps: Sequence[float] | None = None,
    clip: bool = True,
    min_ratio: float = 0.15,
    max_ratio: float = 0.9,
    device: torch.device | str | int | None = None,
) -> Tensor:
    """Default boxes of SSD; at each place the two squares, then for each aspect ratio the wide box and the high one.

    At level k the squares have the sides s_k and sqrt(s_k * s_(k+1)), relative to the image, and the boxes of ratio a
    the sides s_k * sqrt(a) and s_k / sqrt(a). Centres are those of the cells.

    Args:
        map_sizes: (height, width) of each prediction map.
        image_size: (height, width) in pixels, or the side of a square.
        aspect_ratios: for each level its ratios other than 1, possibly none.
        scales: s_k, one more than there are levels; without them evenly spaced from ``min_ratio`` to ``max_ratio``,
            then 1.
        steps: for each level the side of a cell in pixels; the image divided by the map without them.
        clip: sides are at most those of the image. Boxes may still reach beyond its border.
        min_ratio: the first scale, where there are no ``scales``.
        max_ratio: the last scale but one, likewise.
        device: where the anchors are to lie; the CPU without one.

    Raises:
        ValueError: an argument does not fit; it says which, what came and what was wanted.
    """
    maps, image, place = _maps(map_sizes), _image(image_size), _device(device)
    levels = len(maps)
    ratios = _lists("aspect_ratios", aspect_ratios, levels, 0)
    if scales is None:
        low = checks.number("min_ratio", min_ratio, 0, open_low=True)
        high = checks.number("max_ratio", max_ratio, 0, open_low=True)
        sides = _spread(low, high, levels)
    else:
        sides = _numbers("scales", scales)
        if len(sides) != levels + 1:
            checks.fail("scales", f"{len(sides)} numbers", f"{levels + 1}, one more than map_sizes")
    cells = None if steps is None else checks.per_level("steps", _sequence("steps", steps), levels)
    return _copy(_ssd(maps, image, ratios, sides, cells, checks.flag("clip", clip), place))


def _spread(low: float, high: float, levels: int) -> Numbers:
    if levels == 1:
        return low, high
    span = high - low
    return (*(low + span * k / (levels - 1.0) for k in range(levels)), 1.0)


# In inference mode PyTorch would make tensors that no later training step could use.


@torch.inference_mode(False)
def _copy(anchors: Tensor) -> Tensor:
    return anchors.clone()


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)
def _retinanet(
    maps: Sizes, image: tuple[int, int], sizes: tuple[Numbers, ...], ratios: tuple[Numbers, ...], place: torch.device
) -> Tensor:
    levels = []
    for (height, width), size, ratio in zip(maps, sizes, ratios, strict=True):
        root = _column(ratio).sqrt()  # the square roots and quotients of float32 decide how halves are rounded
        high = (root[:, None] * _column(size)).flatten()
        wide = ((1 / root)[:, None] * _column(size)).flatten()
        cell = (torch.stack((-wide, -high, wide, high), 1) / 2).round()
        if not bool((cell[:, 2:] > 0).all()):
            checks.fail("sizes", size, f"larger ones: of aspect ratios {ratio} an anchor is rounded to no area")
        y = torch.arange(height, device="cpu") * (image[0] // height)
        x = torch.arange(width, device="cpu") * (image[1] // width)
        levels.append((_places(y, x)[:, None] + cell).flatten(0, 1))
    return torch.cat(levels).to(place)


@lru_cache(maxsize=KEPT)
@torch.inference_mode(False)
def _ssd(
    maps: Sizes,
    image: tuple[int, int],
    ratios: tuple[Numbers, ...],
    scales: Numbers,
    steps: Numbers | None,
    clip: bool,
    place: torch.device,
) -> Tensor:
    levels = []
    for k, (height, width) in enumerate(maps):
        side, mean = scales[k], math.sqrt(scales[k] * scales[k + 1])
        pairs = [(side, side), (mean, mean)]
        for root in map(math.sqrt, ratios[k]):
            pairs += [(side * root, side / root), (side / root, side * root)]
        cell = torch.tensor([(*pair, *pair) for pair in pairs], dtype=torch.float32, device="cpu")
        if clip:
            cell = cell.clamp(0, 1)
        rows, columns = (height, width) if steps is None else (image[0] / steps[k], image[1] / steps[k])
        y = (torch.arange(height, dtype=torch.float32, device="cpu") + 0.5) / rows
        x = (torch.arange(width, dtype=torch.float32, device="cpu") + 0.5) / columns
        half = 0.5 * cell * _column((-1, -1, 1, 1))
        levels.append((_places(y, x)[:, None] + half).flatten(0, 1))
    return (torch.cat(levels) * _column((image[1], image[0]) * 2)).to(place)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def _places(y: Tensor, x: Tensor) -> Tensor:
    """x y x y of every place of a map, row by row."""
    y, x = (v.flatten() for v in torch.meshgrid(y.to(torch.float32), x.to(torch.float32), indexing="ij"))
    return torch.stack((x, y, x, y), 1)


# Arguments, in a form that can be a key.


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        checks.fail(name, checks.describe(value), "a sequence, one item for each of map_sizes")
    return value


def _maps(value: Any) -> Sizes:
    maps = []
    for i, pair in enumerate(_sequence("map_sizes", value)):
        name = f"map_sizes[{i}]"
        if not isinstance(pair, Sequence):
            checks.fail(name, checks.describe(pair), "(height, width)")
        height, width = checks.size(name, pair)
        maps.append((checks.count(name, height), checks.count(name, width)))
    return tuple(maps)


def _image(value: Any) -> tuple[int, int]:
    height, width = checks.size("image_size", value)
    return checks.count("image_size", height), checks.count("image_size", width)


def _numbers(name: str, value: Sequence[Any], low: int = 1) -> Numbers:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) < low:
        checks.fail(name, checks.describe(value), "a sequence of positive numbers")
    return tuple(checks.number(f"{name}[{i}]", item, 0, open_low=True) for i, item in enumerate(value))


def _lists(name: str, value: Any, levels: int, low: int = 1) -> tuple[Numbers, ...]:
    """For each level a tuple of at least ``low`` numbers; a number is a tuple of one."""
    items = _sequence(name, value)
    if len(items) != levels:
        checks.fail(name, f"{len(items)} levels", f"{levels} as map_sizes")
    return tuple(
        _numbers(f"{name}[{i}]", item if isinstance(item, Sequence) else (item,), low) for i, item in enumerate(items)
    )


def _device(value: Any) -> torch.device:
    """With its index, so that a device has one name."""
    try:
        return torch.empty(0, device="cpu" if value is None else value).device
    except (RuntimeError, TypeError, AssertionError):
        checks.fail("device", checks.describe(value), "a device that PyTorch has here")
