"""Small things that several drivers do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..reference import constants


def wide(dtype: torch.dtype) -> torch.dtype:
    """What predictions of a type are decoded and assigned in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def corners_of(size: tuple[float, float], like: Tensor) -> Tensor:
    """[4]: width and height of an image, twice, of a (height, width)."""
    height, width = size
    return constants((width, height, width, height), like)


def counts_without_spare(counts: Tensor, spare: Tensor | None) -> Tensor:
    """``counts``, int32 [2], with the emptied rows of :func:`~fusedyolo.targets.without_spare` off the invalid ones."""
    if spare is None:
        return counts
    num_pos, num_invalid = counts.unbind()
    return torch.stack((num_pos, num_invalid - spare))


def products(**values: Sequence[int]) -> Iterator[dict[str, int]]:
    """All combinations."""
    for each in itertools.product(*values.values()):
        yield dict(zip(values, each, strict=True))


def refuse(geometry: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a call brings what this loss does not take.
    """
    for name, value in geometry.items():
        checks.fail(name, checks.describe(value), "no such argument for this loss")


def own_anchors(anchors: Any) -> None:
    """Raises:
    ValueError: anchors are given to a loss that has its own.
    """
    if anchors is not None:
        checks.fail("anchors", checks.describe(anchors), "none: this loss has its own")


def image_size(criterion: Any, given: Any) -> tuple[float, float] | None:
    """(height, width) as given, or that of the loss, if it is known."""
    return criterion.image_size if given is None else checks.size("image_size", given)


def even(number: int) -> int:
    """What :func:`fusedyolo.ops.launch.odd` was given."""
    return (number - 3) // 2
