"""Where predictions lie, as kernels take it."""

from __future__ import annotations

from torch import Tensor

from ..kernels.levels import Strides
from .launch import Layout


def map_strides(at: Layout | Tensor, channels: int) -> Strides:
    """Strides of a map ``[B, A * channels, H, W]`` or ``[B, A, H, W, channels]``, or of a row of N cells
    ``[B, N, channels]``; those of axes of length 1 are made to follow their neighbours.
    """
    stride = at.stride() if isinstance(at, Tensor) else at.stride
    if len(stride) == 3:
        (b, x, k), height, width = stride, 1, at.shape[1]
        a, y = k * channels, x
    else:
        height, width = at.shape[2:4]
        if len(stride) == 4:
            b, k, y, x = stride
            a = k * channels
        else:
            b, a, y, x, k = stride
    if width == 1:
        x = y if height > 1 else 1
    if height == 1:
        y = x * width
    return Strides(b, y, x, a, k)
