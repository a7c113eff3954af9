"""Label terms: a logit against a target in [0, 1], or a hard one, which is a bool.

Contract: ``label(x, t, args) -> loss, d_x``, finite for |x| <= 1e4, and NaN where x or t is. All are elementwise but
:func:`softmax_ce`, which goes along the last axis, a NaN along its row, and smooth but :func:`qfl`. A negative alpha
means no factor; ``pos_weight`` multiplies the positive half of BCE; gamma comes as a :class:`Power`. Of a hard target
much less is to be computed.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives import exp_down, finite, log1p, log1p_of_share, logistic, pow_pos, safe_div
from .records import takes

LOW: tl.constexpr = tl.constexpr(-1e4)  # a logit of which a term, and its derivative, is 0 for the background


class Power(NamedTuple):
    """An exponent, and the function that raises to it: a number that changes what is computed is structure.

    To be used as it is passed: a variable may not hold a function.
    """

    exponent: Any
    function: Any  # of a base, at least 0, and the exponent


@triton.jit
def _power_0(q, exponent):
    return q * 0.0 + 1.0  # NaN stays NaN


@triton.jit
def power_half(q, exponent):
    """The root."""
    return tl.sqrt(q)


@triton.jit
def power_1(q, exponent):
    """The base itself."""
    return q


@triton.jit
def _power_3_halves(q, exponent):
    return q * tl.sqrt(q)


@triton.jit
def _power_2(q, exponent):
    return q * q


_POWERS = {0.0: _power_0, 0.5: power_half, 1.0: power_1, 1.5: _power_3_halves, 2.0: _power_2}


def power(exponent: float) -> Power:
    """An exponent as terms take it; to 0, 1/2, 1, 3/2 and 2 nothing is raised by logarithms."""
    return Power(exponent, _POWERS.get(exponent, pow_pos))


@triton.jit
def _raised(q, power):
    return power.function(q, power.exponent)


class Miss(NamedTuple):
    """A logit against a hard target."""

    wrong: Any  # probability of the wrong answer
    right: Any
    ce: Any  # cross-entropy


@triton.jit
def _sided(x, t):
    """A number as it counts from the side that is right: of a positive its negative."""
    return tl.where(t, x * -1.0, x)  # not -x, which is 0 - x: an instruction of its own


@triton.jit
def _miss(z):
    """Of a logit from the side that is right."""
    wrong, right, e = logistic(z)
    return Miss(wrong, right, tl.maximum(z, 0.0) + log1p_of_share(e))  # what tl.maximum drops, a NaN, is in e


@triton.jit
def bce(x, t, args):
    """Binary cross-entropy of a logit, max(x, 0) - x t + log1p(e^-|x|); ``args = ()`` or ``(pos_weight,)``.

    Its derivative sigmoid(x) - t is taken as sigmoid(x) (1 - t) - sigmoid(-x) t, exact where a sure logit is right.
    """
    takes(args, 0, 1)
    if t.dtype == tl.int1:
        miss = _miss(_sided(x, t))
        loss = miss.ce
        d_x = _sided(miss.wrong, t)
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
    return tl.where(alpha >= 0, alpha * t + (1.0 - alpha) * (1.0 - t), 1.0)


@triton.jit
def _modulated(x, t, alpha, positive_weight, gamma):
    """Weight times wrong^gamma BCE of a hard target, wrong the probability of the wrong answer, and its derivative. No
    weight is below 0, so that its sign can say on which side the logit is.
    """
    miss = _miss(tl.where(t, -x, x))  # here 0 - x is one instruction, which happens or not
    positive = tl.where(alpha >= 0, alpha, 1.0) * positive_weight
    negative = tl.where(alpha >= 0, 1.0 - alpha, 1.0)
    w = tl.where(t, -positive, negative) * _raised(miss.wrong, gamma)
    return tl.abs(w) * miss.ce, w * (miss.wrong + gamma.exponent * miss.right * miss.ce)


@triton.jit
def focal(x, t, args):
    """alpha_t q^gamma BCE, q = 1 - p_t = p (1 - t) + (1 - p) t (Lin et al. 2017, soft targets as torchvision).

    ``args = (alpha, gamma)`` or ``(alpha, gamma, pos_weight)``. q is summed from products, not from 1 - p_t, so that it
    keeps its digits where the prediction is right.
    """
    takes(args, 2, 3)
    if t.dtype == tl.int1:
        if len(args) > 2:
            loss, d_x = _modulated(x, t, args[0], args[2], args[1])
        else:
            loss, d_x = _modulated(x, t, args[0], 1.0, args[1])
    else:
        ce, d_ce = _weighted_bce(x, t, args)
        p, r, _e = logistic(x)
        q = p * (1.0 - t) + r * t
        w = _balance(t, args[0]) * _raised(q, args[1])
        d_w = args[1].exponent * w * (1.0 - 2.0 * t) * safe_div(p * r, q)  # the quotient is at most 1 for a hard target
        loss = w * ce
        d_x = w * d_ce + d_w * ce
    return loss, d_x


@triton.jit
def qfl(x, t, args):
    """alpha_t |t - p|^gamma BCE, p = sigmoid(x) (quality focal loss, Li et al. 2020); ``args = (alpha, gamma)``.

    Differentiated through the modulator, whose slope at p = t is taken for 0. Next to it gamma < 1 makes that slope
    large, but finite: gamma |t - p|^(gamma - 1) of a difference that is all rounding. The quotient p (1 - p) / (p - t)
    comes first, being at most 1 for a hard target, where |t - p|^gamma over p - t may leave float32.
    """
    takes(args, 2, 2)
    if t.dtype == tl.int1:
        loss, d_x = _modulated(x, t, args[0], 1.0, args[1])
    else:
        ce, miss = bce(x, t, ())  # p - t, with all its digits where t is 0 or 1
        p, r, _e = logistic(x)
        w = _balance(t, args[0]) * _raised(tl.abs(miss), args[1])
        loss = w * ce
        d_x = w * miss + args[1].exponent * w * safe_div(p * r, miss) * ce
    return loss, d_x


@triton.jit
def varifocal(x, t, args):
    """t BCE where t > 0, else alpha p^gamma BCE, p = sigmoid(x) (Zhang et al. 2021); ``args = (alpha, gamma)``.

    Differentiated through the modulator.
    """
    takes(args, 2, 2)
    alpha = args[0]
    t = t.to(x.dtype)
    ce, d_ce = bce(x, t, ())
    p, r, _e = logistic(x)
    w = tl.where(t > 0, t, tl.where(alpha >= 0, alpha, 1.0) * _raised(p, args[1]))
    return w * ce, w * d_ce + tl.where(t > 0, 0.0, args[1].exponent * w * r) * ce


@triton.jit
def sse(x, t, args):
    """(sigmoid(x) - t)^2; ``args = ()``."""
    takes(args, 0, 0)
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
    takes(args, 0, 0)
    t = t.to(x.dtype)
    largest = tl.max(x, axis=-1, keep_dims=True)
    e, first = exponentials(x, largest)
    rest = tl.sum(tl.where(first, 0.0, e), axis=-1, keep_dims=True)
    rest += tl.sum(first.to(e.dtype), axis=-1, keep_dims=True) - 1.0  # equals of the largest
    ce = log1p(rest) - finite(x - largest)
    return t * ce, softmax_slope(e, first, rest, t, tl.sum(t, axis=-1, keep_dims=True))
