"""Arithmetic that PyTorch lacks: twins of ``kernels/primitives.py`` and what else a reference needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode


def safe_div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with no gradient where b is 0; the inner where keeps NaN out of the backward."""
    zero = b == 0
    if at_hand(zero) and not zero.any():
        return a / b
    return (a / b.masked_fill(zero, 1.0)).masked_fill(zero, 0.0)


def pow_pos(q: Tensor, gamma: float, empty: float = 0.0) -> Tensor:
    """q^gamma of q >= 0; where q underflows, ``empty`` with no gradient: that of q^gamma is inf there for gamma < 1."""
    if gamma >= 1:
        return q**gamma
    zero = q < torch.finfo(q.dtype).tiny
    return (q.masked_fill(zero, 1.0) ** gamma).masked_fill(zero, empty)


def angle(sides: Tensor) -> Tensor:
    """atan(w / h), pi/2 at h = 0 and 0 at w = h = 0. Smaller side over larger, so that no quotient overflows."""
    w, h = sides.unbind(-1)
    wide = w.abs() > h.abs()
    a = safe_div(torch.where(wide, h, w), torch.where(wide, w, h)).atan()
    complement = torch.where((w < 0) != (h < 0), -math.pi / 2 - a, math.pi / 2 - a)
    return torch.where(wide, complement, a)


def distance(d: Tensor) -> Tensor:
    """|d|, of slope 0 at 0, and NaN where d is, where that of torch.abs is 0."""
    return d * torch.where(d > 0, 1.0, torch.where(d < 0, -1.0, d)).detach()


def held(b: Tensor, low: float, high: float = math.inf) -> Tensor:
    """b within [low, high], the gradient passes as if it were not: there sizes keep what a gradient by them takes."""
    if not b.requires_grad:
        return b.clamp(low, high)
    if at_hand(b) and b.numel():
        least, most = b.detach().aminmax()
        if least >= low and most <= high:
            return b
    passed = torch.where(b.isinf(), 0.0, b)  # inf - inf would be NaN
    return b.detach().clamp(low, high) + (passed - passed.detach())


def at_hand(values: Tensor) -> bool:
    """Whether what a tensor holds may be asked for: on a CPU, where no graph, transform or mode is in between."""
    return (
        values.device.type == "cpu"
        and type(values) is Tensor
        and not torch.compiler.is_compiling()
        and _get_current_dispatch_mode() is None
        and not is_functorch_wrapped_tensor(values)
    )


def where_used(values: Tensor, used: Tensor) -> Tensor:
    """``values`` where they are ``used``, else 0; as they are where all are: a copy, and that of a gradient, cost."""
    return values if at_hand(used) and used.all() else torch.where(used, values, 0.0)


def _none(weight: Tensor | float) -> Tensor | bool | None:
    """Where a weight is 0; None where none is known to be."""
    if not isinstance(weight, Tensor):
        return None if weight else True
    return None if at_hand(weight) and weight.all() else weight == 0


def weighed(loss: Tensor, weight: Tensor | float) -> Tensor:
    """A loss times its weight, or gain: of one of 0 nothing but a NaN, for a loss that leaves its type is infinite."""
    none = _none(weight)
    return weight * (loss if none is None else torch.where(loss.detach().isinf() & none, 0.0, loss))


def read_weighed(raw: Tensor, weight: Tensor | float) -> Tensor:
    """Raw numbers that a loss of this weight, or gain, is made of: 0 for those that have one of 0, but for a NaN, so
    that it multiplies no slope that leaves its type, as that of a square does.
    """
    none = _none(weight)
    return raw if none is None else torch.where(~raw.detach().isnan() & none, 0.0, raw)


class Places:
    """Of the first axis of tensors the entries that a mask says; all of them where its values are not :func:`at_hand`,
    so that no shape depends on what a GPU has yet to find.
    """

    def __init__(self, mask: Tensor):
        self._every = not at_hand(mask)
        self.index = torch.arange(len(mask), device=mask.device) if self._every else mask.nonzero()[:, 0]
        self.used = self.of(mask)

    def of(self, values: Tensor) -> Tensor:
        """Their entries of ``values`` [as long as the mask, ...]."""
        return values if self._every else values.index_select(0, self.index)


def constants(values: Sequence[float] | Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """``values`` in the dtype and on the device of ``like``, by fill: torch.tensor(..., device="cuda") would wait."""
    if at_hand(like):
        return like.new_tensor(values)
    each = [constants(value, like) if isinstance(value, Sequence) else like.new_full((), value) for value in values]
    return torch.stack(each)
