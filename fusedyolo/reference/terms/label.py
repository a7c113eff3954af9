"""Label terms: the twin of ``kernels/terms/label.py``.

``label(x, t, args) -> loss`` of logits x and targets t in [0, 1] of one dtype. Elementwise but for :func:`softmax_ce`,
and smooth but for :func:`qfl` where p = t. A negative alpha means no factor; a pos_weight multiplies the positive half
of BCE. The elementwise ones also take a bool, 0 or 1 for all logits, or a tensor of bools, and leave out what these
multiply by 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ..primitives import at_hand, held, pow_pos

Target = Tensor | bool

LOW = -1e4
"""A logit of which every elementwise term, and its slope, is 0 for the target 0."""


def bce(x: Tensor, t: Target, args: Sequence[float] = ()) -> Tensor:
    """-w t log(p) - (1 - t) log(1 - p), p = sigmoid(x), args = () or (w,). The slope is sigmoid(x) - t at 0 too.

    PyTorch's own, (1 - t) x - logsigmoid(x), has no digit left in float32 for a background logit of -17.
    """
    weight = args[0] if args else 1.0
    if t is False:
        return softplus(x, threshold=40)  # beyond which the difference from x is none in float64
    if isinstance(t, Tensor) and t.dtype == torch.bool:
        loss = bce(_turned(x, t), False)
        return loss if weight == 1 else torch.where(t, weight * loss, loss)
    positive = t if weight == 1 else t * weight
    if t is True:
        return -(positive * logsigmoid(x))
    return -(positive * logsigmoid(x) + (1 - t) * logsigmoid(-x))


def _turned(x: Tensor, t: Tensor) -> Tensor:
    """-x where a logit's target is true: that of its complement is false."""
    return x * torch.where(t, -1.0, 1.0).to(x.dtype)


def _mix(t: Target, zero: Callable[[], Tensor], one: Callable[[], Tensor]) -> Tensor:
    """zero (1 - t) + one t."""
    if isinstance(t, bool):
        return one() if t else zero()
    if t.dtype == torch.bool:
        return torch.where(t, one(), zero())
    return zero() * (1 - t) + one() * t


def _sloped(x: Tensor) -> Tensor:
    """Logits for what a cross-entropy is multiplied by. Beyond these its slope is 0, and no product with that, which
    may leave the type, is to be NaN. As a rule none is beyond, and where they can be looked at that costs less.
    """
    if at_hand(x) and x.numel():
        low, high = x.detach().aminmax()
        if low >= LOW and high <= -LOW:
            return x
    return x.clamp(LOW, -LOW)


def _balance(t: Target, alpha: float, dtype: torch.dtype) -> Tensor | float:
    if alpha < 0:
        return 1.0
    if isinstance(t, bool):
        return alpha if t else 1 - alpha
    t = t.to(dtype)
    return alpha * t + (1 - alpha) * (1 - t)


def focal(x: Tensor, t: Target, args: Sequence[float]) -> Tensor:
    """alpha_t q^gamma BCE, q = 1 - p_t, args = (alpha, gamma[, pos_weight]); RetinaNet eq. 5.

    Soft targets as torchvision. q is summed from products, not from 1 - p_t, so that it keeps its digits where the
    prediction is right. Where it underflows, so does the BCE, and the loss is 0.
    """
    alpha, gamma = args[:2]
    z = _sloped(x)
    q = _mix(t, z.sigmoid, lambda: (-z).sigmoid())
    return pow_pos(q, gamma) * _balance(t, alpha, x.dtype) * bce(x, t, args[2:])


def qfl(x: Tensor, t: Target, args: Sequence[float]) -> Tensor:
    """alpha_t |t - p|^gamma BCE, args = (alpha, gamma); quality focal loss, Li et al. 2020. |.| has no slope at 0."""
    alpha, gamma = args
    miss = _miss(_sloped(x), t).abs()
    return pow_pos(miss, gamma, 0.0**gamma) * _balance(t, alpha, x.dtype) * bce(x, t)


def varifocal(x: Tensor, t: Target, args: Sequence[float]) -> Tensor:
    """t BCE where t > 0, else alpha p^gamma BCE, args = (alpha, gamma); Zhang et al. 2021."""
    if t is True:
        return bce(x, t)
    alpha, gamma = args
    negative = pow_pos(_sloped(x).sigmoid(), gamma) * (alpha if alpha >= 0 else 1.0)
    return (negative if t is False else torch.where(t > 0, t, negative)) * bce(x, t)


def sse(x: Tensor, t: Target, args: Sequence[float] = ()) -> Tensor:
    """(sigmoid(x) - t)^2."""
    return _miss(x, t) ** 2


def _miss(x: Tensor, t: Target) -> Tensor:
    """sigmoid(x) - t, with all its digits where t is 0 or 1, and its slope's too: sigmoid's own is 0 beyond 40."""
    return _mix(t, lambda: logsigmoid(x).exp(), lambda: -logsigmoid(-x).exp())


def softmax_ce(x: Tensor, t: Tensor, args: Sequence[float] = ()) -> Tensor:
    """-t_c log softmax(x)_c over the last axis, one an entry.

    log1p of the other classes' share keeps the digits of a class that is nearly sure, where log_softmax has none.
    """
    top, index = x.max(-1, keepdim=True)
    z = (x - top).scatter(-1, index, 0.0)  # of the top class 0, with no slope of 1 - 1
    rest = z.exp().scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return torch.where(t == 0, -t * z.clamp(min=torch.finfo(z.dtype).min), -t * (z - rest.log1p()))


def cross_entropy(x: Tensor, label: Tensor) -> Tensor:
    """The sum of :func:`softmax_ce` over the last axis of x, [..., C], towards the class ``label`` [...].

    log(1 + exp(the others' logsumexp - its own logit)), which has all digits at both ends. From the largest logit, so
    that logits with the same differences cost the same; held where such a difference would be infinite, and of more
    than one no gradient could be told. In as few passes over them as it can be done in.
    """
    if x.requires_grad:
        x = held(x, torch.finfo(x.dtype).min / 2, torch.finfo(x.dtype).max / 2)
    largest, at = x.detach().amax(-1, keepdim=True), label[..., None]
    own = (x.gather(-1, at) - largest)[..., 0]
    others = (x - largest).scatter_(-1, at, -math.inf).exp_().sum(-1).clamp(min=torch.finfo(x.dtype).tiny)
    return -logsigmoid(own - others.log())
