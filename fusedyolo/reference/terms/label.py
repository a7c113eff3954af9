"""Label terms: the twin of ``kernels/terms/label.py``.

``label(x, t, args) -> loss`` of logits x and targets t in [0, 1] of one dtype. Elementwise but for :func:`softmax_ce`,
and smooth but for :func:`qfl` where p = t. A negative alpha means no factor; a pos_weight multiplies the positive half
of BCE.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..primitives import pow_pos


def bce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-w t log(p) - (1 - t) log(1 - p), p = sigmoid(x), args = () or (w,). The slope is sigmoid(x) - t at 0 too.

    PyTorch's own, (1 - t) x - logsigmoid(x), has no digit left in float32 for a background logit of -17.
    """
    positive = t * args[0] if len(args) == 1 else t
    return -(positive * logsigmoid(x) + (1 - t) * logsigmoid(-x))


def _balance(t: Tensor, alpha: float) -> Tensor | float:
    return alpha * t + (1 - alpha) * (1 - t) if alpha >= 0 else 1.0


def focal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t q^gamma BCE, q = 1 - p_t, args = (alpha, gamma[, pos_weight]); RetinaNet eq. 5.

    Soft targets as torchvision. q is summed from products, not from 1 - p_t, so that it keeps its digits where the
    prediction is right. Where it underflows, so does the BCE, and the loss is 0.
    """
    alpha, gamma = args[:2]
    q = x.sigmoid() * (1 - t) + (-x).sigmoid() * t
    return pow_pos(q, gamma) * _balance(t, alpha) * bce(x, t, args[2:])


def qfl(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """alpha_t |t - p|^gamma BCE, args = (alpha, gamma); quality focal loss, Li et al. 2020. |.| has no slope at 0."""
    alpha, gamma = args
    miss = _miss(x, t).abs()
    return pow_pos(miss, gamma, 0.0**gamma) * _balance(t, alpha) * bce(x, t)


def varifocal(x: Tensor, t: Tensor, args: Sequence[float]) -> Tensor:
    """t BCE where t > 0, else alpha p^gamma BCE, args = (alpha, gamma); Zhang et al. 2021."""
    alpha, gamma = args
    negative = pow_pos(x.sigmoid(), gamma) * (alpha if alpha >= 0 else 1.0)
    return torch.where(t > 0, t, negative) * bce(x, t)


def sse(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """(sigmoid(x) - t)^2."""
    return _miss(x, t) ** 2


def _miss(x: Tensor, t: Tensor) -> Tensor:
    """sigmoid(x) - t, with all its digits where t is 0 or 1, and its slope's too: sigmoid's own is 0 beyond 40."""
    return logsigmoid(x).exp() * (1 - t) - logsigmoid(-x).exp() * t


def softmax_ce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-t_c log softmax(x)_c over the last axis, one an entry.

    log1p of the other classes' share keeps the digits of a class that is nearly sure, where log_softmax has none.
    """
    top, index = x.max(-1, keepdim=True)
    z = (x - top).scatter(-1, index, 0.0)  # of the top class 0, with no slope of 1 - 1
    rest = z.exp().scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return -t * (z - rest.log1p())
