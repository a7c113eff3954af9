"""Cells that predict a box each: where predictions lie, and the launches that settle what goes to which object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..heads import pick_head_from_key
from ..kernels.levels import Strides
from ..kernels.picks import records
from .launch import Layout, odd, planned
from .strides import map_strides

Maps = tuple[tuple[int, int], ...]


@planned
def parts_of(form: str, preds: tuple[Layout, ...], key: str, maps: Maps) -> records.Predictions:
    """Where box, objectness and class of each level lie in predictions of a ``form`` (see
    :func:`fusedyolo.checks.point_predictions`), whose ``layouts`` are given, for the head of this ``key`` and maps of
    such (height, width): all that kernels take but for the tensors, in whose place are their numbers. See
    :func:`fill_parts`.
    """
    head = pick_head_from_key(key)
    count = len(head.widths)
    parts: list[list[tuple[int, int, Strides]]] = [[] for _ in range(count)]  # of each level tensor, start, strides
    cell = 0
    for level, (height, width) in enumerate(maps):
        channel = 0
        for k, channels in enumerate(head.widths):
            if form == "planes":
                image, by, step = preds[k].stride
                parts[k].append((k, cell * step, Strides(image, width * step, step, 0, by)))
            else:
                at = level if form == "maps" else level * count + k
                strides = map_strides(preds[at], channels)._replace(anchor=0)
                parts[k].append((at, channel * strides.channel if form == "maps" else 0, strides))
            channel += channels
        cell += height * width
    found = []
    for levels in parts:
        at, starts, strides_of = zip(*levels, strict=True)
        found.append(records.Part(at, odd(starts), odd(strides_of)))
    return records.Predictions(found[0], found[1] if head.objectness else None, found[-1])


def fill_parts(parts: records.Predictions, tensors: Sequence[Tensor]) -> records.Predictions:
    """What :func:`parts_of` says, with the ``tensors`` of the predictions, or gradients of such layouts, in order."""
    return records.Predictions(*[None if part is None else _filled(part, tensors) for part in parts])


def _filled(part: records.Part, tensors: Sequence[Any]) -> records.Part:
    return part._replace(ptrs=tuple([tensors[at] for at in part.ptrs]))
