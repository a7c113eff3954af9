"""What the swaps of a method of another library's class share."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any, Generic, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .. import checks
from ..counts import STANDING

CLOSE = 1e-3  # how closely a probe must agree, of the largest number; another formula is off by much more

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
HELD = ("_parameters", "_buffers", "_modules", *HOOKS)

Loss = TypeVar("Loss")

PATCHING = threading.RLock()
"""Of who patches or unpatches: another thread would try out a class that is half patched, by other random numbers."""


class Method:
    """A method of other libraries' classes, and what stands in for it."""

    def __init__(self, name: str, ours: Callable[..., Any]):
        self.name, self.ours = name, ours
        self.kept: dict[type, Any] = {}  # by class, what was replaced

    def stands(self, cls: type) -> bool:
        """Whether a class has ours."""
        return getattr(cls, self.name) is self.ours

    def put(self, cls: type) -> None:
        """Replace that of a class."""
        if not self.stands(cls):
            # who wrapped ours meanwhile is not what ours falls back to
            self.kept.setdefault(cls, getattr(cls, self.name))
            setattr(cls, self.name, self.ours)

    def take(self, cls: type) -> None:
        """Give a class its own back, if it has ours."""
        if cls in self.kept and self.stands(cls):
            setattr(cls, self.name, self.kept.pop(cls))

    def own(self, cls: type) -> Any:
        """What ours stands in for, in a class or one that it is derived from."""
        return next(self.kept[each] for each in cls.__mro__ if each in self.kept)


class Criteria(Generic[Loss]):
    """Losses by the object of another library that they stand in for.

    They are kept here and not in the object, so that it is saved and copied as if nothing had happened, and go with it.
    """

    def __init__(self) -> None:
        self.kept: WeakKeyDictionary[Any, tuple[Sequence[Any], Loss | None, str]] = WeakKeyDictionary()
        STANDING.add(self)

    def of(self, owner: Any) -> Loss | None:
        """What stands in for an object, any that there is, if something does."""
        return next((had[1] for kept, had in list(self.kept.items()) if kept is owner), None)

    def find(self, owner: Any, settings: Sequence[Any], make: Callable[[], Loss], above: int = 0) -> Loss | None:
        """What ``make`` returned, or None where it raised a ``ValueError``, which is told once; anew where settings are
        not the :func:`same`. The warning is of a caller so many calls further ``above``.
        """
        had = self.kept.get(owner)
        if had is None or not same(settings, had[0]):
            told = had[2] if had else ""
            try:
                with torch.inference_mode(False):  # whose tensors no later training step could use
                    had = settings, make(), ""
            except ValueError as error:
                had = settings, None, str(error)
                if had[2] != told:
                    warnings.warn(f"a {type(owner).__name__} keeps its own loss. {error}", stacklevel=4 + above)
            self.kept[owner] = had
        return had[1]


# ---- is an object as it was? This is asked at every call


def state(*parts: Any) -> list[Any]:
    """What objects hold, with hooks and buffers but nothing deeper, and how often buffers were written to."""
    found = list[Any](parts)
    for part in parts:
        held = getattr(part, "__dict__", {})
        found += held.values()
        for name in HELD:
            if held.get(name):
                found += held[name].values()
                found += versions(held[name].values())
    return found


def versions(found: Iterable[Any]) -> list[int]:
    """How often each tensor was written to."""
    return [0 if each.is_inference() else each._version for each in found if isinstance(each, Tensor)]


def methods(*parts: Any) -> list[Any]:
    """What was put over methods of objects, or hooked to them; of those whose other attributes change by themselves."""
    found = list[Any](parts)
    for part in parts:
        found += _put_over(part).values()
        held = getattr(part, "__dict__", {})
        for name in HOOKS:
            if held.get(name):
                found += held[name].values()
    return found


def same(found: Sequence[Any], had: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects, or equal numbers and words; it waits for no tensor."""
    if len(found) != len(had):
        return False
    return all(map(is_, found, had)) or all(map(_equal, found, had))


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


_methods: dict[type, frozenset[str]] = {}


def _put_over(part: Any) -> dict[str, Any]:
    """Attributes with the name of a method of their class."""
    kind = type(part)
    names = _methods.get(kind)
    if names is None:
        names = _methods[kind] = frozenset(name for name in dir(kind) if callable(getattr(kind, name, None)))
    held = getattr(part, "__dict__", {})
    return {} if names.isdisjoint(held) else {name: held[name] for name in held if name in names}


def plain(name: str, part: Any, kind: type) -> None:
    """A module of this very class, with nothing put over a method of it and nothing hooked to it.

    Raises:
        ValueError: it is not.
    """
    if type(part) is not kind:
        checks.fail(name, f"a {type(part).__name__}", f"a {kind.__name__}, and no class derived from it")
    for over in _put_over(part):
        checks.fail(f"{name}.{over}", "one of its own", f"that of {kind.__name__}")
    if any(getattr(part, hook, None) for hook in HOOKS):
        checks.fail(name, "with hooks", "none, for it is not called")


def bce(name: str, part: Any, reduction: str, pos_weight: bool = False) -> None:
    """``BCEWithLogitsLoss`` as it comes, but for the reduction and, if allowed, ``pos_weight``.

    Raises:
        ValueError: it is not.
    """
    plain(name, part, nn.BCEWithLogitsLoss)
    if part.reduction != reduction:
        checks.fail(f"{name}.reduction", repr(part.reduction), repr(reduction))
    if part.weight is not None or (part.pos_weight is not None and not pos_weight):
        checks.fail(name, "with weights", "none")


@contextmanager
def probing() -> Iterator[None]:
    """Meanwhile gradients, whatever the caller's modes are; what is drawn is drawn from a seed and leaves no trace."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
    ):
        torch.random.default_generator.manual_seed(0)  # and no other device's
        yield


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """How two lists of tensors differ, in a few words; empty if they agree within :data:`CLOSE`."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a.shape != b.shape:
            return f"number {i} has shape {tuple(a.shape)}, ours {tuple(b.shape)}"
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        if not error <= CLOSE * max(largest, CLOSE):
            return f"number {i} differs from ours by {error:.2g} where the largest is {largest:.2g}"
    return ""


def refuse(package: str, version: str, got: str, want: str) -> NoReturn:
    """Say why a package cannot be patched.

    Raises:
        ValueError: always.
    """
    checks.fail(f"{package} {version}", got, want)
