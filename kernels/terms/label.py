"""Label terms: a logit against a target in [0, 1], or a hard one, which is a bool.

Contract: ``label(x, t, args) -> loss, d_x``, finite for |x| <= 1e4, and NaN where x or t is. All are elementwise but
:func:`softmax_ce`, which goes along the last axis, a NaN along its row, and smooth but :func:`qfl`. A negative alpha
means no factor; ``pos_weight`` multiplies the positive half of BCE. Of a hard target much less is to be computed.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives import exp_down, log1p, log1p_of_share, logistic, pow_pos, safe_div


class Miss(NamedTuple):
    """A logit against a hard target."""

    sign: Any  # 1, or -1 for a positive: times the logit, what counts from the side that is right
    wrong: Any  # probability of the wrong answer
    right: Any
    ce: Any  # cross-entropy


@triton.jit
def _miss(x, t):
    """Of a hard target."""
    sign = tl.where(t, -1.0, 1.0).to(x.dtype)
    z = sign * x
    wrong, right, e = logistic(z)
    return Miss(sign, wrong, right, tl.maximum(z, 0.0) + log1p_of_share(e))  # what tl.maximum drops, a NaN, is in e


@triton.jit
def bce(x, t, args):
    """Binary cross-entropy of a logit, max(x, 0) - x t + log1p(e^-|x|); ``args = ()`` or ``(pos_weight,)``.

    Its derivative sigmoid(x) - t is taken as sigmoid(x) (1 - t) - sigmoid(-x) t, exact where a sure logit is right.
    """
    if t.dtype == tl.int1:
        miss = _miss(x, t)
        loss = miss.ce
        d_x = miss.sign * miss.wrong
        if len(args) == 1:
            w = tl.where(t, args[0], 1.0)
            loss = w * loss
            d_x = w * d_x
    else:
        p, q, e = logistic(x)
        # what tl.maximum drops, a NaN, comes with log1p
        if len(args) == 1:
            w = args[0] * t
            rest = log1p_of_share(e)
            loss = (1.0 - t) * (tl.maximum(x, 0.0) + rest) + w * (tl.maximum(-x, 0.0) + rest)
        else:
            w = t
            loss = tl.maximum(x, 0.0) - x * t + log1p_of_share(e)
        d_x = p * (1.0 - t) - q * w
    return loss, d_x


@triton.jit
def _weighted_bce(x, t, args):
    """BCE with the pos_weight that may follow alpha and gamma."""
    if len(args) > 2:
        loss, d_x = bce(x, t, (args[2],))
    else:
        loss, d_x = bce(x, t, ())
    return loss, d_x


@triton.jit
def _balance(t, alpha):
    if t.dtype == tl.int1:
        factor = tl.where(t, tl.where(alpha >= 0, alpha, 1.0), tl.where(alpha >= 0, 1.0 - alpha, 1.0))
    else:
        factor = tl.where(alpha >= 0, alpha * t + (1.0 - alpha) * (1.0 - t), 1.0)
    return factor


@triton.jit
def _modulated(x, t, w, gamma, POWER: tl.constexpr):
    """Weight times wrong^gamma BCE of a hard target, wrong the probability of the wrong answer, and its derivative."""
    miss = _miss(x, t)
    w = w * POWER(miss.wrong, gamma)
    return w * miss.ce, w * miss.sign * (miss.wrong + gamma * miss.right * miss.ce)


@triton.jit
def _focal(x, t, args, POWER: tl.constexpr):
    gamma = args[1]
    if t.dtype == tl.int1:
        w = _balance(t, args[0])
        if len(args) > 2:
            w = tl.where(t, args[2] * w, w)
        loss, d_x = _modulated(x, t, w, gamma, POWER)
    else:
        ce, d_ce = _weighted_bce(x, t, args)
        p, r, _e = logistic(x)
        q = p * (1.0 - t) + r * t
        w = _balance(t, args[0]) * POWER(q, gamma)
        d_w = gamma * w * (1.0 - 2.0 * t) * safe_div(p * r, q)  # the quotient is at most 1 for a hard target
        loss = w * ce
        d_x = w * d_ce + d_w * ce
    return loss, d_x


@triton.jit
def focal(x, t, args):
    """alpha_t q^gamma BCE, q = 1 - p_t = p (1 - t) + (1 - p) t (Lin et al. 2017, soft targets as torchvision).

    ``args = (alpha, gamma)`` or ``(alpha, gamma, pos_weight)``. q is summed from products, not from 1 - p_t, so that it
    keeps its digits where the prediction is right.
    """
    return _focal(x, t, args, pow_pos)


@triton.jit
def _qfl(x, t, args, POWER: tl.constexpr):
    gamma = args[1]
    if t.dtype == tl.int1:
        loss, d_x = _modulated(x, t, _balance(t, args[0]), gamma, POWER)
    else:
        ce, miss = bce(x, t, ())  # p - t, with all its digits where t is 0 or 1
        p, r, _e = logistic(x)
        w = _balance(t, args[0]) * POWER(tl.abs(miss), gamma)
        loss = w * ce
        d_x = w * miss + gamma * w * safe_div(p * r, miss) * ce
    return loss, d_x


@triton.jit
def qfl(x, t, args):
    """alpha_t |t - p|^gamma BCE, p = sigmoid(x) (quality focal loss, Li et al. 2020); ``args = (alpha, gamma)``.

    Differentiated through the modulator, whose slope at p = t is taken for 0. Next to it gamma < 1 makes that slope
    large, but finite: gamma |t - p|^(gamma - 1) of a difference that is all rounding. The quotient p (1 - p) / (p - t)
    comes first, being at most 1 for a hard target, where |t - p|^gamma over p - t may leave float32.
    """
    return _qfl(x, t, args, pow_pos)


@triton.jit
def _varifocal(x, t, args, POWER: tl.constexpr):
    alpha = args[0]
    gamma = args[1]
    t = t.to(x.dtype)
    ce, d_ce = bce(x, t, ())
    p, r, _e = logistic(x)
    w = tl.where(t > 0, t, tl.where(alpha >= 0, alpha, 1.0) * POWER(p, gamma))
    return w * ce, w * d_ce + tl.where(t > 0, 0.0, gamma * w * r) * ce


@triton.jit
def varifocal(x, t, args):
    """t BCE where t > 0, else alpha p^gamma BCE, p = sigmoid(x) (Zhang et al. 2021); ``args = (alpha, gamma)``.

    Differentiated through the modulator.
    """
    return _varifocal(x, t, args, pow_pos)


@triton.jit
def sse(x, t, args):
    """(sigmoid(x) - t)^2; ``args = ()``."""
    p, q, _e = logistic(x)
    t = t.to(x.dtype)
    miss = p * (1.0 - t) - q * t
    return miss * miss, 2.0 * miss * (p * q)


@triton.jit
def exponentials(x, largest):
    """Of logits relative to the largest of their row, and which are equal to that."""
    z = x - largest
    return exp_down(z), z == 0


@triton.jit
def softmax_slope(e, first, rest, t, mass):
    """p mass - t, the derivative of a cross-entropy whose targets t add up to ``mass``; see :func:`softmax_ce`."""
    s = 1.0 + rest
    others = tl.where(first, rest, s - e)
    return (e * (mass - t) - others * t) / s


@triton.jit
def softmax_ce(x, t, args):
    """-t log(softmax(x)) over the last axis, one an entry: the cross-entropy is their sum; ``args = ()``.

    ``d_x`` is the derivative of that sum, p sum(t) - t. An entry that is padding holds x = -1e30 and t = 0, and adds
    nothing. The largest entry is left out of the sum of exponentials, and 1 - p comes from it: both keep the digits of
    a class that is nearly sure.
    """
    t = t.to(x.dtype)
    largest = tl.max(x, axis=-1, keep_dims=True)
    e, first = exponentials(x, largest)
    rest = tl.sum(tl.where(first, 0.0, e), axis=-1, keep_dims=True)
    rest += tl.sum(first.to(e.dtype), axis=-1, keep_dims=True) - 1.0  # equals of the largest
    return -t * (x - largest - log1p(rest)), softmax_slope(e, first, rest, t, tl.sum(t, axis=-1, keep_dims=True))


# The terms of a gamma that is 0, 1 or 2: no general power is taken.


@triton.jit
def _power_0(q, gamma):
    return q * 0.0 + 1.0  # NaN stays NaN


@triton.jit
def _power_1(q, gamma):
    return q


@triton.jit
def _power_2(q, gamma):
    return q * q


@triton.jit
def _focal_0(x, t, args):
    return _focal(x, t, args, _power_0)


@triton.jit
def _focal_1(x, t, args):
    return _focal(x, t, args, _power_1)


@triton.jit
def _focal_2(x, t, args):
    return _focal(x, t, args, _power_2)


@triton.jit
def _qfl_0(x, t, args):
    return _qfl(x, t, args, _power_0)


@triton.jit
def _qfl_1(x, t, args):
    return _qfl(x, t, args, _power_1)


@triton.jit
def _qfl_2(x, t, args):
    return _qfl(x, t, args, _power_2)


@triton.jit
def _varifocal_0(x, t, args):
    return _varifocal(x, t, args, _power_0)


@triton.jit
def _varifocal_1(x, t, args):
    return _varifocal(x, t, args, _power_1)


@triton.jit
def _varifocal_2(x, t, args):
    return _varifocal(x, t, args, _power_2)


_OF_GAMMA = {
    focal: (_focal_0, _focal_1, _focal_2),
    qfl: (_qfl_0, _qfl_1, _qfl_2),
    varifocal: (_varifocal_0, _varifocal_1, _varifocal_2),
}


def label_term(kind: str, args: Sequence[float]) -> Any:
    """The term of this name that a row with these numbers takes: numbers that change it are its structure."""
    term = globals()[kind]
    return _OF_GAMMA[term][int(args[1])] if term in _OF_GAMMA and args[1] in (0, 1, 2) else term
