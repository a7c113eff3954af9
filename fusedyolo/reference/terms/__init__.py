"""The terms: twins of ``kernels/terms``, found by the names of the table in ``fusedyolo/terms.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from ...terms import TERMS
from ..primitives import weighed
from . import box, decode, label, offset


def _room(module: ModuleType, prefix: str = "") -> dict[str, Callable[..., Any]]:
    room = module.__name__.rpartition(".")[2]
    return {term.name: getattr(module, prefix + term.name) for term in TERMS.values() if term.room == room}


BOX_TERMS: dict[str, Callable[..., Tensor]] = _room(box)
OFFSET_TERMS: dict[str, Callable[..., Tensor]] = _room(offset)
LABEL_TERMS: dict[str, Callable[..., Tensor]] = _room(label)
DECODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = _room(decode)
ENCODE: dict[str, Callable[..., tuple[Tensor, Tensor]]] = _room(decode, "encode_")


def label_term(name: str, x: Tensor, t: Tensor, args: Sequence[float], weights: Tensor | None = None) -> Tensor:
    """A term of logits x [..., C] and targets t, multiplied by ``weights`` [C] of the classes.

    Of a softmax it is the targets that are, of which it is a sum (``torch.nn.CrossEntropyLoss(weight=...)``, summed).
    """
    if weights is None:
        return LABEL_TERMS[name](x, t, args)
    if TERMS[name].elementwise:
        return weighed(LABEL_TERMS[name](x, t, args), weights)
    return LABEL_TERMS[name](x, weights * t, args)
