"""Label terms: a logit against a target in [0, 1].

Contract: ``label(x, t, args) -> loss, d_x``, elementwise, finite for |x| <= 1e4; smooth, no ties.
"""

import triton
import triton.language as tl

from ..primitives import log1p, logistic, pow_pos, safe_div


@triton.jit
def bce(x, t, args):
    """Binary cross-entropy of a logit, max(x, 0) - x t + log1p(e^-|x|).

    Its derivative sigmoid(x) - t is taken as sigmoid(x) (1 - t) - sigmoid(-x) t, exact where a sure logit is right.
    """
    p, q, e = logistic(x)
    return tl.maximum(x, 0.0) - x * t + log1p(e), p * (1.0 - t) - q * t


@triton.jit
def focal(x, t, args):
    """alpha_t q^gamma BCE, q = 1 - p_t = p (1 - t) + (1 - p) t (Lin et al. 2017, soft targets as torchvision).

    ``args = (alpha, gamma)``; a negative alpha means no factor. q is summed from products, not from 1 - p_t, so that
    it keeps its digits where the prediction is right.
    """
    alpha = args[0]
    gamma = args[1]
    ce, d_ce = bce(x, t, ())
    p, r, _e = logistic(x)
    q = p * (1.0 - t) + r * t
    w = tl.where(alpha >= 0, alpha * t + (1.0 - alpha) * (1.0 - t), 1.0) * pow_pos(q, gamma)
    d_w = gamma * w * (1.0 - 2.0 * t) * safe_div(p * r, q)  # the quotient is at most 1 for a hard target
    return w * ce, w * d_ce + d_w * ce
