"""Label terms: a logit against a target in [0, 1].

Contract: ``label(x, t, args) -> loss, d_x``, finite for |x| <= 1e4, and NaN where x or t is. All are elementwise but
:func:`softmax_ce`, which goes along the last axis, a NaN along its row, and smooth but :func:`qfl`. A negative alpha
means no factor; ``pos_weight`` multiplies the positive half of BCE.
"""

import triton
import triton.language as tl

from ..primitives import log1p, logistic, pow_pos, safe_div


@triton.jit
def bce(x, t, args):
    """Binary cross-entropy of a logit, max(x, 0) - x t + log1p(e^-|x|); ``args = ()`` or ``(pos_weight,)``.

    Its derivative sigmoid(x) - t is taken as sigmoid(x) (1 - t) - sigmoid(-x) t, exact where a sure logit is right.
    """
    p, q, e = logistic(x)
    # what tl.maximum drops, a NaN, comes with log1p
    if len(args) == 1:
        w = args[0] * t
        rest = log1p(e)
        loss = (1.0 - t) * (tl.maximum(x, 0.0) + rest) + w * (tl.maximum(-x, 0.0) + rest)
    else:
        w = t
        loss = tl.maximum(x, 0.0) - x * t + log1p(e)
    return loss, p * (1.0 - t) - q * w


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
def focal(x, t, args):
    """alpha_t q^gamma BCE, q = 1 - p_t = p (1 - t) + (1 - p) t (Lin et al. 2017, soft targets as torchvision).

    ``args = (alpha, gamma)`` or ``(alpha, gamma, pos_weight)``. q is summed from products, not from 1 - p_t, so that it
    keeps its digits where the prediction is right.
    """
    gamma = args[1]
    ce, d_ce = _weighted_bce(x, t, args)
    p, r, _e = logistic(x)
    q = p * (1.0 - t) + r * t
    w = _balance(t, args[0]) * pow_pos(q, gamma)
    d_w = gamma * w * (1.0 - 2.0 * t) * safe_div(p * r, q)  # the quotient is at most 1 for a hard target
    return w * ce, w * d_ce + d_w * ce


@triton.jit
def qfl(x, t, args):
    """alpha_t |t - p|^gamma BCE, p = sigmoid(x) (quality focal loss, Li et al. 2020); ``args = (alpha, gamma)``.

    Differentiated through the modulator, whose slope at p = t is taken for 0. Next to it gamma < 1 makes that slope
    large, but finite: gamma |t - p|^(gamma - 1) of a difference that is all rounding. The quotient p (1 - p) / (p - t)
    comes first, being at most 1 for a hard target, where |t - p|^gamma over p - t may leave float32.
    """
    gamma = args[1]
    ce, miss = bce(x, t, ())  # p - t, with all its digits where t is 0 or 1
    p, r, _e = logistic(x)
    w = _balance(t, args[0]) * pow_pos(tl.abs(miss), gamma)
    return w * ce, w * miss + gamma * w * safe_div(p * r, miss) * ce


@triton.jit
def varifocal(x, t, args):
    """t BCE where t > 0, else alpha p^gamma BCE, p = sigmoid(x) (Zhang et al. 2021); ``args = (alpha, gamma)``.

    Differentiated through the modulator.
    """
    alpha = args[0]
    gamma = args[1]
    ce, d_ce = bce(x, t, ())
    p, r, _e = logistic(x)
    w = tl.where(t > 0, t, tl.where(alpha >= 0, alpha, 1.0) * pow_pos(p, gamma))
    return w * ce, w * d_ce + tl.where(t > 0, 0.0, gamma * w * r) * ce


@triton.jit
def sse(x, t, args):
    """(sigmoid(x) - t)^2; ``args = ()``."""
    p, q, _e = logistic(x)
    miss = p * (1.0 - t) - q * t
    return miss * miss, 2.0 * miss * (p * q)


@triton.jit
def softmax_ce(x, t, args):
    """-t log(softmax(x)) over the last axis, one an entry: the cross-entropy is their sum; ``args = ()``.

    ``d_x`` is the derivative of that sum, p sum(t) - t. An entry that is padding holds x = -1e30 and t = 0, and adds
    nothing. The largest entry is left out of the sum of exponentials, and 1 - p comes from it: both keep the digits of
    a class that is nearly sure.
    """
    z = x - tl.max(x, axis=-1, keep_dims=True)
    e = tl.exp(z)
    first = z == 0
    rest = tl.sum(tl.where(first, 0.0, e), axis=-1, keep_dims=True)
    rest += tl.sum(first.to(e.dtype), axis=-1, keep_dims=True) - 1.0  # equals of the largest
    s = 1.0 + rest
    others = tl.where(first, rest, s - e)
    return -t * (z - log1p(rest)), (e * (tl.sum(t, axis=-1, keep_dims=True) - t) - others * t) / s
