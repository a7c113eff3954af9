"""What every loss returns, and how its numbers are held."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..heads import CellHead, DenseHead, GridHead, PickHead

Head = TypeVar("Head", GridHead, CellHead, DenseHead, PickHead)


class LossOutput(NamedTuple):
    """What a loss returns.

    Where a framework wants a tensor, or a dictionary of some names, hand it that: ``return out.total`` from Lightning's
    ``training_step``, or ``{"loss": out.total, **out.parts}``. It is neither itself, for what takes such a thing apart
    by its type would make something else of it.

    Attributes:
        total: the loss, 0-dim, or with ``reduction="none"`` ``[B]``, one of each image; float64 for float64
            predictions, else float32.
        parts: the terms that add up to it, gains included, detached, of the same shape.
        num_pos: predictions that were assigned an object, 0-dim.
        num_invalid: target rows that were skipped, 0-dim; :meth:`Targets.validate` says which and why.
    """

    total: Tensor
    parts: dict[str, Tensor]
    num_pos: Tensor
    num_invalid: Tensor

    def backward(self, *arguments: Any, **options: Any) -> None:
        """``total.backward``, for code that calls it on what a loss returns."""
        self.total.backward(*arguments, **options)

    # A tuple's own sum and product would be longer tuples.

    def __add__(self, other: Any) -> NoReturn:
        _is_no_number()

    def __radd__(self, other: Any) -> NoReturn:
        _is_no_number()

    def __mul__(self, other: Any) -> NoReturn:
        _is_no_number()

    def __rmul__(self, other: Any) -> NoReturn:
        _is_no_number()

    def __truediv__(self, other: Any) -> NoReturn:
        _is_no_number()

    def __float__(self) -> float:
        """The total as a number, which waits for the device."""
        return float(self.total.detach())


def _is_no_number() -> NoReturn:
    raise TypeError("a LossOutput is a tuple, no number: take its .total, as in 2 * out.total")


class Apart(NamedTuple):
    """A loss in pieces that add up to it, each of which is divided by numbers of its own, for whoever counts these over
    several processes.

    Attributes:
        pieces: [K], as the total of a :class:`LossOutput`.
        parts: those of a :class:`LossOutput`, by name: numbers, and which of the pieces these belong to, in turn.
        amounts: [D], what the loss is divided or multiplied by, so that those of several batches add up.
        shares: of ``amounts`` [K], what the pieces are multiplied by for them.
        num_pos: as in :class:`LossOutput`.
        num_invalid: likewise.
    """

    pieces: Tensor
    parts: Mapping[str, tuple[Tensor, int | slice]]
    amounts: Tensor
    shares: Callable[[Tensor], Tensor]
    num_pos: Tensor
    num_invalid: Tensor


def apart_by_images(out: LossOutput, images: int, power: int) -> Apart:
    """A loss in one piece, which is multiplied by this ``power`` of the number of images."""
    parts = {name: (part, 0) for name, part in out.parts.items()}
    amounts = out.total.new_full((1,), images, dtype=torch.float64)
    return Apart(out.total[None], parts, amounts, lambda given: given**power, out.num_pos, out.num_invalid)


def detached(names: Iterable[str], terms: Iterable[Tensor]) -> dict[str, Tensor]:
    """Terms by name, without a gradient; of more names than terms the first ones."""
    return {name: term.detach() if term.requires_grad else term for name, term in zip(names, terms, strict=False)}


def rounded(head: Head) -> Head:
    """``head`` with every number in it one that float32 holds.

    The float32 kernels and the float64 reference then compute with the same constants.
    """

    def walk(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(walk, value))
        return float(np.float32(value)) if isinstance(value, float) else value

    names = [field.name for field in dataclasses.fields(head)]
    return dataclasses.replace(head, **{name: walk(getattr(head, name)) for name in names})
