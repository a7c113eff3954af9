"""What every check is made of: the error, what came in words, numbers and flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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


def one_of(name: str, value: object, allowed: Collection[str]) -> str:
    """``value``, one of ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        fail(name, describe(value), "one of " + ", ".join(map(repr, allowed)))
    return value


def plain(name: str, value: Any, want: str = "numbers") -> Any:
    """``value``, or of an array or a tensor its numbers: one, or a list of them. Nothing trains these."""
    if isinstance(value, Tensor) and value.requires_grad:
        fail(name, "a tensor that requires a gradient", want)
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


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
        value = plain(name, value, want)
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


def flag(name: str, value: Any) -> bool:
    """``value``, one of 0 and 1, as a bool."""
    if not isinstance(value, Integral) or value not in (0, 1):
        fail(name, describe(value), "0 or 1")
    return bool(value)
