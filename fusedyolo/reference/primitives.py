"""Arithmetic that PyTorch lacks: twins of ``kernels/primitives.py`` and what else a reference needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def safe_div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 with no gradient where b is 0; the inner where keeps NaN out of the backward."""
    zero = b == 0
    return torch.where(zero, 0.0, a / torch.where(zero, 1.0, b))


def pow_pos(q: Tensor, gamma: float, empty: float = 0.0) -> Tensor:
    """q^gamma of q >= 0; where q underflows, ``empty`` with no gradient: that of q^gamma is inf there for gamma < 1."""
    zero = q < torch.finfo(q.dtype).tiny
    return torch.where(zero, empty, torch.where(zero, 1.0, q) ** gamma)


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


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """[len(values)] of the dtype and device of ``like``, by fill: torch.tensor(..., device="cuda") would wait."""
    return torch.stack([like.new_full((), value) for value in values])
