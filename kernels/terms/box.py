"""IoU terms on decoded boxes.

Contract: ``box(x, y, args) -> loss, (d_cx, d_w), (d_cy, d_h)``, by the predicted centre and size: as derivatives by
edges, the part that turns a tiny box would drown the part that moves it. ``x`` and ``y`` describe the predicted
interval p and the true interval g on one axis by ``(p2 - p1, g2 - g1, p1 - g1, g2 - p2, extent)``: the whole family is
invariant under translation, and differences keep their digits where coordinates would cancel. ``extent`` is the length
of the image on that axis; only :func:`mpdiou` reads it, the others take four lengths as well. Any one unit of length.

``args = (eps, eps_alpha)`` or ``(eps, eps_alpha, alpha, gamma)``. eps joins each denominator that is an area or a
squared length of boxes, eps_alpha that of CIoU's alpha. A loss is ``1 - IoU`` and penalties; with the longer args it is
``IoU^gamma (1 - IoU^alpha + sum of penalty^alpha)``: alpha-IoU (He et al. 2021) under a focal factor held constant
(Focal-EIoU, Zhang et al. 2021). ``IoU^0`` is 1 for every IoU. ``q^alpha`` has slope 0 at 0 for every alpha but 1: that
is the limit for alpha > 1, while for alpha < 1 there is none. Where q is below the normal numbers it counts as 0.

Rules: two boxes intersect only where both overlaps are positive (torchvision), edges or sides that coincide share the
gradient half and half (torch.maximum, torch.minimum), the slope of ``|d|`` at 0 is 0 (torch.abs). The terms are
symmetric: the gradient by the true box is that of the term with p and g swapped. Values and gradients are finite for
boxes of any finite size with none below 1e-30, or without area; a NaN among the lengths makes all of them NaN.
"""

import triton
import triton.language as tl

from ..primitives import angle, inverse_power, larger, pow_pos, safe_div, sign, smaller, step, vanishes


@triton.jit
def _normalise(x, y):
    """Both axes by a factor that makes the longer side of the enclosing box 1 to 2, so that no product leaves float32;
    and the factor, a power of two: edges that coincide do so afterwards, fused with what sum they may be.

    The family is invariant under scaling, except for eps, which :func:`_scaled_eps` adjusts. The extents are left out.
    """
    inv = inverse_power(tl.maximum(_enclose(x), _enclose(y)))
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
    """min(p2, g2) - max(p1, g1), what sticks out taken off the shorter interval, where fewer digits cancel.

    A NaN of a place is in both differences, of which one is enough to keep it; one of a side is in the area as well.
    """
    p = x[0] + smaller(x[2], 0.0) + tl.minimum(x[3], 0.0)
    g = x[1] - larger(x[2], 0.0) - tl.maximum(x[3], 0.0)
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
def _power(q, args):
    """q^alpha and its derivative; q and 1 without an alpha."""
    if len(args) > 2:
        alpha = args[2]
        raised = pow_pos(q, alpha)
        slope = tl.where(alpha == 1, 1.0, alpha * safe_div(raised, q))
        raised = tl.where(alpha == 1, q, raised)
    else:
        raised = q
        slope = 1.0
    return raised, slope


@triton.jit
def _compose(iou, d, penalties, inv, args):
    """The loss made of an IoU, its derivatives by the normalised edges, and penalties; and its gradient.

    A penalty is ``(q, ex, ey, dw, dh)``: its value, its derivatives by (px1, px2) and (py1, py2) in the normalised
    unit, and what comes on top of these by the predicted width and height, in the original unit. Each may be None.
    """
    raised, slope = _power(iou, args)
    loss = 1.0 - raised
    e0 = -slope * d[0]
    e1 = -slope * d[1]
    e2 = -slope * d[2]
    e3 = -slope * d[3]
    for i in tl.static_range(len(penalties)):
        raised, slope = _power(penalties[i][0], args)
        loss += raised
        if penalties[i][1] is not None:
            e0 += slope * penalties[i][1][0]
            e1 += slope * penalties[i][1][1]
        if penalties[i][2] is not None:
            e2 += slope * penalties[i][2][0]
            e3 += slope * penalties[i][2][1]
    cx, w = _centre_size(e0, e1, inv)
    cy, h = _centre_size(e2, e3, inv)
    for i in tl.static_range(len(penalties)):
        _raised, slope = _power(penalties[i][0], args)
        if penalties[i][3] is not None:
            w += slope * penalties[i][3]
        if penalties[i][4] is not None:
            h += slope * penalties[i][4]
    if len(args) > 2:
        focus = pow_pos(iou, args[3])
        loss *= focus
        cx *= focus
        w *= focus
        cy *= focus
        h *= focus
    return loss, (cx, w), (cy, h)


@triton.jit
def _share(d, c, eps):
    """d^2 / (c^2 + eps) and its derivatives by d and by c. In units of c: thin boxes have no c^2 in float32."""
    r = safe_div(d, c)
    k = 1.0 / (1.0 + safe_div(safe_div(eps, c), c))
    q = r * r * k
    return q, safe_div(2.0 * r * k, c), safe_div(-2.0 * q * k, c)


@triton.jit
def _spread(x, y, eps):
    """DIoU's penalty of normalised axes: squared distance of the centres over squared enclosing diagonal."""
    cw = _enclose(x)
    ch = _enclose(y)
    dx = 0.5 * (x[2] - x[3])
    dy = 0.5 * (y[2] - y[3])
    r = safe_div(1.0, cw * cw + ch * ch + eps)
    ratio = (dx * dx + dy * dy) * r
    kx = 2.0 * ratio * cw
    ky = 2.0 * ratio * ch
    ex = ((dx + kx * step(-x[2])) * r, (dx - kx * step(-x[3])) * r)
    ey = ((dy + ky * step(-y[2])) * r, (dy - ky * step(-y[3])) * r)
    return ratio, ex, ey, None, None


@triton.jit
def _aspect(w, h, turn, alpha):
    """CIoU's penalty alpha v, v = 4/pi^2 turn^2; turn is the true angle less atan(w / h)."""
    # d atan(w / h) = (h dw - w dh) / (w^2 + h^2), sides divided by the longer one so that no square leaves float32
    side = tl.maximum(tl.abs(w), tl.abs(h))
    a = safe_div(w, side)
    b = safe_div(h, side)
    k = safe_div(alpha * 0.8105694691387022 * turn, (a * a + b * b) * side)
    return alpha * (0.4052847345693511 * turn * turn), None, None, -(k * b), k * a


@triton.jit
def iou(x, y, args):
    """1 - IoU."""
    x, y, inv = _normalise(x, y)
    value, _union, _di, d = _iou(x, y, _scaled_eps(args[0], inv))
    return _compose(value, d, (), inv, args)


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
    ex = ((-kx * step(-x[2]) + y[0] + di[0]) * r, (kx * step(-x[3]) - y[0] + di[1]) * r)
    ey = ((-ky * step(-y[2]) + x[0] + di[2]) * r, (ky * step(-y[3]) - x[0] + di[3]) * r)
    return _compose(value, d, ((rest, ex, ey, None, None),), inv, args)


@triton.jit
def diou(x, y, args):
    """1 - IoU + rho^2 / c^2: squared distance of the centres over squared diagonal of the enclosing box (Zheng)."""
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, _union, _di, d = _iou(x, y, eps)
    return _compose(value, d, (_spread(x, y, eps),), inv, args)


@triton.jit
def ciou(x, y, args):
    """DIoU + alpha v, v = 4/pi^2 (atan(gw/gh) - atan(pw/ph))^2, alpha = v / (1 - IoU + v) held constant (Zheng)."""
    pw = x[0]
    ph = y[0]
    turn = angle(x[1], y[1]) - angle(pw, ph)
    v = 0.4052847345693511 * turn * turn
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, _union, _di, d = _iou(x, y, eps)
    aspect = _aspect(pw, ph, turn, safe_div(v, 1.0 - value + v + args[1]))
    return _compose(value, d, (_spread(x, y, eps), aspect), inv, args)


@triton.jit
def ciou_plus(x, y, args):
    """DIoU - alpha v, with lightnet's sign: 1 - (IoU - rho^2 / c^2 + alpha v), alpha = v / (1 - IoU + v) constant.

    v takes height + eps for both heights. ``args = (eps,)``, and what follows is not read. Its clip of 1 - loss to
    [-1, 1] is left out, for no two boxes reach further: v is at most 1 - IoU, rho at most c.
    """
    tl.static_assert(len(args) < 3, "ciou_plus has no alpha and no focal form")
    pw = x[0]
    ph = y[0] + args[0]
    turn = angle(x[1], y[1] + args[0]) - angle(pw, ph)
    v = 0.4052847345693511 * turn * turn
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, _union, _di, d = _iou(x, y, eps)
    aspect = _aspect(pw, ph, turn, -safe_div(v, 1.0 - value + v))
    return _compose(value, d, (_spread(x, y, eps), aspect), inv, args)


@triton.jit
def _side_share(x, eps, inv):
    """EIoU's penalty on one normalised axis, (pw - gw)^2 / cw^2: value, derivatives by both edges, by size on top."""
    q, by_size, by_enclosing = _share(x[0] - x[1], _enclose(x), eps)
    return q, (-by_enclosing * step(-x[2]), by_enclosing * step(-x[3])), by_size * inv


@triton.jit
def eiou(x, y, args):
    """DIoU + (pw - gw)^2 / cw^2 + (ph - gh)^2 / ch^2, cw and ch the sides of the enclosing box (Zhang et al. 2021)."""
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, _union, _di, d = _iou(x, y, eps)
    qw, ex, dw = _side_share(x, eps, inv)
    qh, ey, dh = _side_share(y, eps, inv)
    return _compose(value, d, (_spread(x, y, eps), (qw, ex, None, dw, None), (qh, None, ey, None, dh)), inv, args)


@triton.jit
def _misfit(p, g):
    """SIoU's shape cost of one side, (1 - e^-|p - g| / max(p, g))^4, and its derivative by p."""
    longer = tl.maximum(p, g)
    w = safe_div(tl.abs(p - g), longer)
    e = tl.exp(-w)
    c = 1.0 - e
    return c * c * c * c, 4.0 * c * c * c * e * safe_div(sign(p - g) - w * step(p - g), longer)


@triton.jit
def siou(x, y, args):
    """1 - IoU + (distance + shape) / 2, the second a single penalty (Gevorgyan 2022).

    distance = 2 - e^(-k dx^2 / cw^2) - e^(-k dy^2 / ch^2), dx, dy between the centres, cw, ch the enclosing sides,
    k = 2 - angle; angle = 2 |dx| |dy| / (dx^2 + dy^2), the paper's 1 - 2 sin^2(arcsin(|dy| / rho) - pi / 4). shape =
    (1 - e^-ww)^4 + (1 - e^-wh)^4, ww = |pw - gw| / max(pw, gw), and wh likewise. eps joins cw^2 and ch^2 alone. Where
    the centres coincide, the slope of distance is 0, its limit.
    """
    shape_w, dw = _misfit(x[0], x[1])  # as they come: a thin box beside a large one would lose its width
    shape_h, dh = _misfit(y[0], y[1])
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(args[0], inv)
    value, _union, _di, d = _iou(x, y, eps)
    dx = 0.5 * (x[2] - x[3])
    dy = 0.5 * (y[2] - y[3])
    far = tl.maximum(tl.abs(dx), tl.abs(dy))
    a = safe_div(tl.abs(dx), far)
    b = safe_div(tl.abs(dy), far)
    s = tl.where(vanishes(far), 1.0, a * a + b * b)
    k = 2.0 - 2.0 * a * b / s
    rx, rx_d, rx_c = _share(dx, _enclose(x), eps)
    ry, ry_d, ry_c = _share(dy, _enclose(y), eps)
    tx = tl.exp(-k * rx)
    ty = tl.exp(-k * ry)
    q = 0.5 * (2.0 - tx - ty + shape_w + shape_h)
    # d distance = k (tx d rx + ty d ry) - (rx tx + ry ty) d angle, d angle / d |dx| = 2 b (b^2 - a^2) / s^2 / far
    turn = safe_div(2.0 * (rx * tx + ry * ty) * (b * b - a * a) / (s * s), far)
    by_x = k * tx * rx_d - turn * b * sign(dx)
    by_y = k * ty * ry_d + turn * a * sign(dy)
    by_cw = k * tx * rx_c
    by_ch = k * ty * ry_c
    # half of each, and a centre moves by half of what an edge moves
    ex = (0.25 * by_x - 0.5 * by_cw * step(-x[2]), 0.25 * by_x + 0.5 * by_cw * step(-x[3]))
    ey = (0.25 * by_y - 0.5 * by_ch * step(-y[2]), 0.25 * by_y + 0.5 * by_ch * step(-y[3]))
    return _compose(value, d, ((q, ex, ey, 0.5 * dw, 0.5 * dh),), inv, args)


@triton.jit
def mpdiou(x, y, args):
    """1 - IoU + d1^2 / (W^2 + H^2) + d2^2 / (W^2 + H^2) (Ma & Xu 2023).

    d1 and d2 are the distances of the upper left and of the lower right corners, W and H the sides of the image; none
    of these takes eps. The one term that is not bounded: it leaves float32 with boxes of 1e19 images.
    """
    width = tl.cast(x[4], x[0].dtype)  # a plain argument of a kernel is float32
    height = tl.cast(y[4], x[0].dtype)
    scale = 1.0 / tl.maximum(width, height)
    width *= scale
    height *= scale
    r = 1.0 / (width * width + height * height)
    x1 = x[2] * scale
    y1 = y[2] * scale
    x2 = x[3] * scale
    y2 = y[3] * scale
    x, y, inv = _normalise(x, y)
    value, _union, _di, d = _iou(x, y, _scaled_eps(args[0], inv))
    k = 2.0 * r * (scale / inv)
    first = ((x1 * x1 + y1 * y1) * r, (k * x1, 0.0), (k * y1, 0.0), None, None)
    second = ((x2 * x2 + y2 * y2) * r, (0.0, -k * x2), (0.0, -k * y2), None, None)
    return _compose(value, d, (first, second), inv, args)
