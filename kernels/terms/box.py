"""IoU terms on decoded boxes.

Contract: ``box(x, y, args) -> loss, (d_cx, d_w), (d_cy, d_h)``, by the predicted centre and size: as derivatives by
edges, the part that turns a tiny box would drown the part that moves it. ``x`` and ``y`` describe the predicted
interval p and the true interval g on one axis by four differences, ``(p2 - p1, g2 - g1, p1 - g1, g2 - p2)``: the whole
family is invariant under translation, and differences keep their digits where coordinates would cancel. ``args = (eps,
eps_alpha)``; eps joins each denominator, eps_alpha that of CIoU's alpha. Any one unit of length.

Rules: two boxes intersect only where both overlaps are positive (torchvision), edges that coincide share the gradient
half and half (torch.maximum, torch.minimum).
"""

import triton
import triton.language as tl

from ..primitives import angle, safe_div, step


@triton.jit
def _normalise(x, y):
    """Both axes divided by the longer side of the enclosing box, so that no product leaves float32; and the factor.

    The family is invariant under scaling, except for eps, which :func:`_scaled_eps` adjusts.
    """
    cw = _enclose(x)
    ch = _enclose(y)
    side = tl.maximum(cw, ch)
    inv = 1.0 / tl.where(side > 0, side, 1.0)
    return (
        (x[0] * inv, x[1] * inv, x[2] * inv, x[3] * inv),
        (y[0] * inv, y[1] * inv, y[2] * inv, y[3] * inv),
        inv,
    )


@triton.jit
def _scaled_eps(eps, inv):
    return tl.where(eps > 0, eps * inv * inv, 0.0)


@triton.jit
def _overlap(x):
    """min(p2, g2) - max(p1, g1), what sticks out taken off the shorter interval, where fewer digits cancel."""
    p = x[0] + tl.minimum(x[2], 0.0) + tl.minimum(x[3], 0.0)
    g = x[1] - tl.maximum(x[2], 0.0) - tl.maximum(x[3], 0.0)
    return tl.where(x[0] < x[1], p, g)


@triton.jit
def _enclose(x):
    """max(p2, g2) - min(p1, g1)."""
    return x[0] + tl.maximum(x[2], 0.0) + tl.maximum(x[3], 0.0)


@triton.jit
def _iou(x, y, eps):
    """IoU and its union (with eps); the derivatives of the intersection by (px1, px2, py1, py2), and of IoU."""
    ow = _overlap(x)
    oh = _overlap(y)
    on = tl.where((ow > 0) & (oh > 0), 1.0, 0.0)
    inter = ow * oh * on
    union = x[0] * y[0] + x[1] * y[1] - inter
    iou = safe_div(inter, union + eps)
    di = (-oh * on * step(x[2]), oh * on * step(x[3]), -ow * on * step(y[2]), ow * on * step(y[3]))
    # d iou = (d inter (1 + iou) - iou d area) / (union + eps)
    r = safe_div(1.0, union + eps)
    k = (1.0 + iou) * r
    a = iou * r
    d = (di[0] * k + a * y[0], di[1] * k - a * y[0], di[2] * k + a * x[0], di[3] * k - a * x[0])
    return iou, union, di, d


@triton.jit
def _centre_size(d1, d2, inv):
    """Derivatives by centre and size from those by both edges, in the original unit."""
    return (d1 + d2) * inv, 0.5 * (d2 - d1) * inv


@triton.jit
def iou(x, y, args):
    """1 - IoU."""
    x, y, inv = _normalise(x, y)
    value, _union, _di, d = _iou(x, y, _scaled_eps(args[0], inv))
    return 1.0 - value, _centre_size(-d[0], -d[1], inv), _centre_size(-d[2], -d[3], inv)


@triton.jit
def giou(x, y, args):
    """1 - IoU + (C - U) / C, C the area of the enclosing box (Rezatofighi et al. 2019)."""
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, union, di, d = _iou(x, y, eps)
    cw = _enclose(x)
    ch = _enclose(y)
    rest = safe_div(cw * ch - union, cw * ch + eps)
    # d rest = (d C (1 - rest) - d U) / (C + eps), d U = d area - d inter
    r = safe_div(1.0, cw * ch + eps)
    kx = (1.0 - rest) * ch
    ky = (1.0 - rest) * cw
    e0 = (-kx * step(-x[2]) + y[0] + di[0]) * r
    e1 = (kx * step(-x[3]) - y[0] + di[1]) * r
    e2 = (-ky * step(-y[2]) + x[0] + di[2]) * r
    e3 = (ky * step(-y[3]) - x[0] + di[3]) * r
    return 1.0 - value + rest, _centre_size(e0 - d[0], e1 - d[1], inv), _centre_size(e2 - d[2], e3 - d[3], inv)


@triton.jit
def _diou(x, y, eps, inv):
    """The DIoU loss of normalised axes, its IoU, and the gradient of the loss in the original unit."""
    value, _union, _di, d = _iou(x, y, eps)
    cw = _enclose(x)
    ch = _enclose(y)
    dx = 0.5 * (x[2] - x[3])
    dy = 0.5 * (y[2] - y[3])
    r = safe_div(1.0, cw * cw + ch * ch + eps)
    ratio = (dx * dx + dy * dy) * r
    kx = 2.0 * ratio * cw
    ky = 2.0 * ratio * ch
    gx = _centre_size((dx + kx * step(-x[2])) * r - d[0], (dx - kx * step(-x[3])) * r - d[1], inv)
    gy = _centre_size((dy + ky * step(-y[2])) * r - d[2], (dy - ky * step(-y[3])) * r - d[3], inv)
    return 1.0 - value + ratio, value, gx, gy


@triton.jit
def diou(x, y, args):
    """1 - IoU + rho^2 / c^2: squared distance of the centres over squared diagonal of the enclosing box (Zheng)."""
    x, y, inv = _normalise(x, y)
    loss, _value, gx, gy = _diou(x, y, _scaled_eps(args[0], inv), inv)
    return loss, gx, gy


@triton.jit
def ciou(x, y, args):
    """DIoU + alpha v, v = 4/pi^2 (atan(gw/gh) - atan(pw/ph))^2, alpha = v / (1 - IoU + v) held constant (Zheng)."""
    pw = x[0]
    ph = y[0]
    turn = angle(x[1], y[1]) - angle(pw, ph)
    v = 0.4052847345693511 * turn * turn
    x, y, inv = _normalise(x, y)
    loss, value, gx, gy = _diou(x, y, _scaled_eps(args[0], inv), inv)
    alpha = safe_div(v, 1.0 - value + v + args[1])
    # d atan(w / h) = (h dw - w dh) / (w^2 + h^2), sides divided by the longer one so that no square leaves float32
    side = tl.maximum(tl.abs(pw), tl.abs(ph))
    w = safe_div(pw, side)
    h = safe_div(ph, side)
    k = safe_div(alpha * 0.8105694691387022 * turn, (w * w + h * h) * side)
    return loss + alpha * v, (gx[0], gx[1] - k * h), (gy[0], gy[1] + k * w)
