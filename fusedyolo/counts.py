"""How many predictions had an object, and how many target rows were skipped, in the last call of a loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

STANDING: WeakSet[Any] = WeakSet()
"""Where it is kept which of our losses stands in for an object of another library: each has ``of``."""

DEEP = 3  # a patched model has an object that has a dictionary that has our loss


class Last:
    """What the last call of a loss has left: of its copies and pickles nothing.

    Attributes:
        counts: int32 ``[2]``.
    """

    counts: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Last, ()


class Counts(NamedTuple):
    """Of a call of a loss, as a :class:`~fusedyolo.LossOutput` has them.

    Attributes:
        num_pos: predictions that were assigned an object, 0-dim.
        num_invalid: target rows that were skipped, 0-dim; :meth:`Targets.validate` says which and why.
    """

    num_pos: Tensor
    num_invalid: Tensor


def last_counts(owner: Any) -> list[Counts]:
    """The counts of the last call of each loss in ``owner``, for who has but the numbers that another library returns.

    ``int(last_counts(model)[0].num_invalid)`` waits for the device; looking for them does not, and costs a walk over
    the modules of a model.

    Args:
        owner: a loss; an object of another library that one stands in for (Ultralytics' ``v8DetectionLoss``, YOLOv5's
            ``ComputeLoss``, a ``YOLOXHead``); or a model, wrapped or not, that has one of these in it.

    Returns:
        One a loss: two of an end-to-end detector, whose two branches skip the same rows, none where no call was made,
        or where an object keeps its own loss. They are those of this process. Of the replicas of ``nn.DataParallel``,
        which live for a step, there are none, but of torchvision's models, which share their loss, those of one
        replica. What ``torch.compile`` has compiled leaves none.
    """
    last = {id(each): each.counts for each in _all_last(owner)}
    return [Counts(*counts.unbind()) for counts in last.values() if counts is not None and _is_plain(counts)]


def _all_last(owner: Any) -> Iterator[Last]:
    """Of the losses in an object or for it."""
    for part in _all_parts(owner):
        last = getattr(part, "__dict__", {}).get("_last")
        if isinstance(last, Last):
            yield last


def _all_parts(owner: Any) -> Iterator[Any]:
    """What may be a loss of ours."""
    for part in _held(owner, set()):
        yield part
        for standing in list(STANDING):
            yield from _parts(standing.of(part), 1)


def _held(owner: Any, seen: set[int]) -> Iterator[Any]:
    """What an object holds, and each of its modules but those ``seen``; modules that are held, too, as a list's are."""
    for module in owner.modules() if isinstance(owner, nn.Module) else (owner,):
        if id(module) in seen:
            continue
        seen.add(id(module))
        for part in _parts(module, DEEP):
            yield part
            if isinstance(part, nn.Module) and part is not module:
                yield from _held(part, seen)


def _parts(owner: Any, deep: int) -> Iterator[Any]:
    """An object, and what it holds under public names; modules in a module are left to who goes through these."""
    if isinstance(owner, Tensor | str | int | float):
        return
    yield owner
    if not deep:
        return
    held = owner
    if isinstance(owner, dict):
        held = owner.values()
    elif not isinstance(owner, tuple | list):
        held = [part for name, part in getattr(owner, "__dict__", {}).items() if not name.startswith("_")]
    for part in held:
        yield from _parts(part, deep - 1)


def _is_plain(counts: Tensor) -> bool:
    """Whether they are numbers, and not of a tracer or a transform, which are nothing once it is over."""
    return type(counts) is Tensor and not is_functorch_wrapped_tensor(counts)
