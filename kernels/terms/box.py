"""IoU terms on decoded boxes.

Contract: ``box(x: Axis, y: Axis, args, extent) -> loss, Span, Span``, the derivatives on both axes by the predicted
centre and size: as derivatives by edges, the part that turns a tiny box would drown the part that moves it. The whole
family is invariant under translation, and an :class:`Axis` holds differences alone. ``extent`` is the width and height
of the image; only :func:`mpdiou` reads it, the others take None as well. Any one unit of length.

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

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..primitives import angle, held, inverse_power, larger, pow_pos, safe_div, sign, smaller, step, vanishes
from .records import Axis, Span, takes


class _Numbers(NamedTuple):
    """The numbers of an IoU term."""

    eps: Any
    eps_alpha: Any
    alpha: Any = None  # with gamma: a plain loss
    gamma: Any = None


class _Ends(NamedTuple):
    """Derivatives by the two edges of the predicted interval, p1 and p2."""

    first: Any
    last: Any


class _Overlap(NamedTuple):
    """How much two boxes have in common, and its derivatives on both axes."""

    iou: Any
    union: Any
    inter_x: _Ends  # of the intersection
    inter_y: _Ends
    iou_x: _Ends
    iou_y: _Ends


class _Penalty(NamedTuple):
    """A penalty q and its derivatives, None where there is none.

    Before Triton 3.7 a function cannot return None, nor does a tuple know its length if there is one in it.
    """

    value: Any
    x: Any = None  # _Ends of a normalised axis
    y: Any = None
    width: Any = None  # what comes on top of these by the predicted width, in the original unit
    height: Any = None


@triton.jit
def _normalise(x, y):
    """Both axes by a factor that makes the longer side of the enclosing box 1 to 2, so that no product leaves float32;
    and the factor, a power of two: edges that coincide do so afterwards, fused with what sum they may be.

    The family is invariant under scaling, except for eps, which :func:`_scaled_eps` adjusts.
    """
    inv = inverse_power(tl.maximum(_enclose(x), _enclose(y)))
    return (
        Axis(x.size * inv, x.true_size * inv, x.before * inv, x.behind * inv),
        Axis(y.size * inv, y.true_size * inv, y.before * inv, y.behind * inv),
        inv,
    )


@triton.jit
def _scaled_eps(eps, inv):
    return tl.where(eps > 0, eps * inv * inv, 0.0)


@triton.jit
def _shared(x):
    """min(p2, g2) - max(p1, g1), what sticks out taken off the shorter interval, where fewer digits cancel.

    A NaN of a place is in both differences, of which one is enough to keep it; one of a side is in the area as well.
    """
    p = x.size + smaller(x.before, 0.0) + tl.minimum(x.behind, 0.0)
    g = x.true_size - larger(x.before, 0.0) - tl.maximum(x.behind, 0.0)
    return tl.where(x.size < x.true_size, p, g)


@triton.jit
def _enclose(x):
    """max(p2, g2) - min(p1, g1): what sticks out of the true interval is put on it, of a predicted size that may be far
    below 0, too, beside which no digit of another sum would be left.
    """
    return x.true_size - tl.minimum(x.before, 0.0) - tl.minimum(x.behind, 0.0)


@triton.jit
def _overlap(x, y, eps):
    """Of normalised axes; eps joins the union that IoU is divided by."""
    ow = _shared(x)
    oh = _shared(y)
    on = tl.where((ow > 0) & (oh > 0), 1.0, 0.0)
    inter = ow * oh * on
    union = x.size * y.size + x.true_size * y.true_size - inter
    iou = safe_div(inter, union + eps)
    inter_x = _Ends(-oh * on * step(x.before), oh * on * step(x.behind))
    inter_y = _Ends(-ow * on * step(y.before), ow * on * step(y.behind))
    # d iou = (d inter (1 + iou) - iou d area) / (union + eps)
    r = safe_div(1.0, union + eps)
    k = (1.0 + iou) * r
    a = iou * r
    iou_x = _Ends(inter_x.first * k + a * y.size, inter_x.last * k - a * y.size)
    iou_y = _Ends(inter_y.first * k + a * x.size, inter_y.last * k - a * x.size)
    return _Overlap(iou, union, inter_x, inter_y, iou_x, iou_y)


@triton.jit
def similarity(x, y):
    """IoU of a pair, 0 where both have no area."""
    x, y, _inv = _normalise(x, y)
    return _overlap(x, y, 0.0).iou


@triton.jit
def _span(ends, inv):
    """Derivatives by centre and size from those by both edges, in the original unit."""
    return Span((ends.first + ends.last) * inv, 0.5 * (ends.last - ends.first) * inv)


@triton.jit
def _power(q, numbers):
    """q^alpha and its derivative; q and 1 without an alpha."""
    if numbers.alpha is not None:
        raised = pow_pos(q, numbers.alpha)
        slope = tl.where(numbers.alpha == 1, 1.0, numbers.alpha * safe_div(raised, q))
        raised = tl.where(numbers.alpha == 1, q, raised)
    else:
        raised = q
        slope = 1.0
    return raised, slope


@triton.jit
def _plus(ends, slope, more):
    """``more``, if there is any, times a slope on top."""
    if more is not None:
        ends = _Ends(ends.first + slope * more.first, ends.last + slope * more.last)
    return ends


@triton.jit
def _compose(overlap, penalties, COUNT: tl.constexpr, inv, numbers):
    """The loss made of an overlap and COUNT penalties, and its gradient."""
    raised, slope = _power(overlap.iou, numbers)
    loss = 1.0 - raised
    x = _Ends(-slope * overlap.iou_x.first, -slope * overlap.iou_x.last)
    y = _Ends(-slope * overlap.iou_y.first, -slope * overlap.iou_y.last)
    for i in tl.static_range(COUNT):
        raised, slope = _power(penalties[i].value, numbers)
        loss += raised
        x = _plus(x, slope, penalties[i].x)
        y = _plus(y, slope, penalties[i].y)
    cx, w = _span(x, inv)
    cy, h = _span(y, inv)
    for i in tl.static_range(COUNT):
        _raised, slope = _power(penalties[i].value, numbers)
        if penalties[i].width is not None:
            w += slope * penalties[i].width
        if penalties[i].height is not None:
            h += slope * penalties[i].height
    if numbers.gamma is not None:
        focus = pow_pos(overlap.iou, numbers.gamma)
        loss *= focus
        cx *= focus
        w *= focus
        cy *= focus
        h *= focus
    return loss, Span(cx, w), Span(cy, h)


@triton.jit
def _share(d, c, eps):
    """d^2 / (c^2 + eps) and its derivatives by d and by c. In units of c: thin boxes have no c^2 in float32."""
    r = safe_div(d, c)
    k = 1.0 / (1.0 + safe_div(safe_div(eps, c), c))
    q = r * r * k
    return q, safe_div(2.0 * r * k, c), safe_div(-2.0 * q * k, c)


@triton.jit
def _spread(x, y, eps):
    """DIoU's penalty of normalised axes, squared distance of centres over squared enclosing diagonal: value, x, y."""
    cw = _enclose(x)
    ch = _enclose(y)
    dx = 0.5 * (x.before - x.behind)
    dy = 0.5 * (y.before - y.behind)
    r = safe_div(1.0, cw * cw + ch * ch + eps)
    ratio = (dx * dx + dy * dy) * r
    kx = 2.0 * ratio * cw
    ky = 2.0 * ratio * ch
    by_x = _Ends((dx + kx * step(-x.before)) * r, (dx - kx * step(-x.behind)) * r)
    by_y = _Ends((dy + ky * step(-y.before)) * r, (dy - ky * step(-y.behind)) * r)
    return ratio, by_x, by_y


@triton.jit
def _aspect(w, h, turn, alpha):
    """CIoU's penalty alpha v, v = 4/pi^2 turn^2: value, width, height; turn is the true angle less atan(w / h)."""
    # d atan(w / h) = (h dw - w dh) / (w^2 + h^2), sides divided by the longer one so that no square leaves float32
    side = tl.maximum(tl.abs(w), tl.abs(h))
    a = safe_div(w, side)
    b = safe_div(h, side)
    k = safe_div(alpha * 0.8105694691387022 * turn, (a * a + b * b) * side)
    return alpha * (0.4052847345693511 * turn * turn), -(k * b), k * a


@triton.jit
def iou(x, y, args, extent):
    """1 - IoU."""
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    x, y, inv = _normalise(x, y)
    return _compose(_overlap(x, y, _scaled_eps(numbers.eps, inv)), (), 0, inv, numbers)


@triton.jit
def iou_log(x, y, args, extent):
    """-ln(max(IoU, floor)), without a slope below the floor; ``args = (floor,)`` (Yu et al. 2016; FCOS)."""
    takes(args, 1, 1)
    x, y, inv = _normalise(x, y)
    common = _overlap(x, y, 0.0)
    floor = tl.cast(args[0], common.iou.dtype)
    low = common.iou < floor
    value = tl.where(low, floor, common.iou)
    k = tl.where(low, 0.0, -1.0 / value)
    by_x = _span(_Ends(k * common.iou_x.first, k * common.iou_x.last), inv)
    by_y = _span(_Ends(k * common.iou_y.first, k * common.iou_y.last), inv)
    return -tl.log(value), by_x, by_y


@triton.jit
def giou(x, y, args, extent):
    """1 - IoU + (C - U) / C, C the area of the enclosing box (Rezatofighi et al. 2019)."""
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    common = _overlap(x, y, eps)
    cw = _enclose(x)
    ch = _enclose(y)
    rest = safe_div(cw * ch - common.union, cw * ch + eps)
    # d rest = (d C (1 - rest) - d U) / (C + eps), d U = d area - d inter
    r = safe_div(1.0, cw * ch + eps)
    kx = (1.0 - rest) * ch
    ky = (1.0 - rest) * cw
    by_x = _Ends(
        (-kx * step(-x.before) + y.size + common.inter_x.first) * r,
        (kx * step(-x.behind) - y.size + common.inter_x.last) * r,
    )
    by_y = _Ends(
        (-ky * step(-y.before) + x.size + common.inter_y.first) * r,
        (ky * step(-y.behind) - x.size + common.inter_y.last) * r,
    )
    return _compose(common, (_Penalty(rest, by_x, by_y),), 1, inv, numbers)


@triton.jit
def diou(x, y, args, extent):
    """1 - IoU + rho^2 / c^2: squared distance of the centres over squared diagonal of the enclosing box (Zheng)."""
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    return _compose(_overlap(x, y, eps), (_Penalty(*_spread(x, y, eps)),), 1, inv, numbers)


@triton.jit
def _with_aspect(x, y, args, WHOLE: tl.constexpr):
    """DIoU + alpha v; alpha is held constant, or with WHOLE is not."""
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    pw = x.size
    ph = y.size
    turn = angle(x.true_size, y.true_size) - angle(pw, ph)
    v = 0.4052847345693511 * turn * turn
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    common = _overlap(x, y, eps)
    alpha = safe_div(v, 1.0 - common.iou + v + numbers.eps_alpha)
    if WHOLE:  # d (alpha v) = (2 alpha - alpha^2) dv + alpha^2 d iou
        _value, width, height = _aspect(pw, ph, turn, alpha * (2.0 - alpha))
        k = alpha * alpha
        by_x = _Ends(k * common.iou_x.first, k * common.iou_x.last)
        by_y = _Ends(k * common.iou_y.first, k * common.iou_y.last)
        aspect = _Penalty(alpha * v, by_x, by_y, width, height)
    else:
        value, width, height = _aspect(pw, ph, turn, alpha)
        aspect = _Penalty(value, width=width, height=height)
    return _compose(common, (_Penalty(*_spread(x, y, eps)), aspect), 2, inv, numbers)


@triton.jit
def ciou(x, y, args, extent):
    """DIoU + alpha v, v = 4/pi^2 (atan(gw/gh) - atan(pw/ph))^2, alpha = v / (1 - IoU + v) held constant (Zheng)."""
    return _with_aspect(x, y, args, False)


@triton.jit
def ciou_whole(x, y, args, extent):
    """CIoU, alpha not held constant: DIoU + v^2 / (1 - IoU + v), which pulls at the IoU too."""
    return _with_aspect(x, y, args, True)


@triton.jit
def ciou_plus(x, y, args, extent):
    """DIoU - alpha v, with lightnet's sign: 1 - (IoU - rho^2 / c^2 + alpha v), alpha = v / (1 - IoU + v) constant.

    v takes height + eps for both heights; eps_alpha is not read. It has no alpha and no focal form. Its clip of
    1 - loss to [-1, 1] is left out, for no two boxes reach further: v is at most 1 - IoU, rho at most c.
    """
    takes(args, 2, 2)
    numbers = _Numbers(*args)
    pw = x.size
    ph = y.size + numbers.eps
    turn = angle(x.true_size, y.true_size + numbers.eps) - angle(pw, ph)
    v = 0.4052847345693511 * turn * turn
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    common = _overlap(x, y, eps)
    value, width, height = _aspect(pw, ph, turn, -safe_div(v, 1.0 - common.iou + v))
    aspect = _Penalty(value, width=width, height=height)
    return _compose(common, (_Penalty(*_spread(x, y, eps)), aspect), 2, inv, numbers)


@triton.jit
def _side_share(x, eps, inv):
    """EIoU's penalty on one normalised axis, (pw - gw)^2 / cw^2: value, derivatives by both edges, by size on top."""
    q, by_size, by_enclosing = _share(x.size - x.true_size, _enclose(x), eps)
    return q, _Ends(-by_enclosing * step(-x.before), by_enclosing * step(-x.behind)), by_size * inv


@triton.jit
def eiou(x, y, args, extent):
    """DIoU + (pw - gw)^2 / cw^2 + (ph - gh)^2 / ch^2, cw and ch the sides of the enclosing box (Zhang et al. 2021)."""
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    qw, by_x, by_width = _side_share(x, eps, inv)
    qh, by_y, by_height = _side_share(y, eps, inv)
    wider = _Penalty(qw, x=by_x, width=by_width)
    higher = _Penalty(qh, y=by_y, height=by_height)
    return _compose(_overlap(x, y, eps), (_Penalty(*_spread(x, y, eps)), wider, higher), 3, inv, numbers)


@triton.jit
def _misfit(p, g):
    """SIoU's shape cost of one side, (1 - e^-|p - g| / max(p, g))^4, and its derivative by p."""
    longer = tl.maximum(p, g)
    w = safe_div(tl.abs(p - g), longer)
    e = tl.exp(-w)
    c = 1.0 - e
    return c * c * c * c, 4.0 * c * c * c * e * safe_div(sign(p - g) - w * step(p - g), longer)


@triton.jit
def siou(x, y, args, extent):
    """1 - IoU + (distance + shape) / 2, the second a single penalty (Gevorgyan 2022).

    distance = 2 - e^(-k dx^2 / cw^2) - e^(-k dy^2 / ch^2), dx, dy between the centres, cw, ch the enclosing sides,
    k = 2 - angle; angle = 2 |dx| |dy| / (dx^2 + dy^2), the paper's 1 - 2 sin^2(arcsin(|dy| / rho) - pi / 4). shape =
    (1 - e^-ww)^4 + (1 - e^-wh)^4, ww = |pw - gw| / max(pw, gw), and wh likewise. eps joins cw^2 and ch^2 alone. Where
    the centres coincide, the slope of distance is 0, its limit.
    """
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    shape_w, dw = _misfit(x.size, x.true_size)  # as they come: a thin box beside a large one would lose its width
    shape_h, dh = _misfit(y.size, y.true_size)
    x, y, inv = _normalise(x, y)
    eps = _scaled_eps(numbers.eps, inv)
    common = _overlap(x, y, eps)
    dx = 0.5 * (x.before - x.behind)
    dy = 0.5 * (y.before - y.behind)
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
    by_dx = k * tx * rx_d - turn * b * sign(dx)
    by_dy = k * ty * ry_d + turn * a * sign(dy)
    by_cw = k * tx * rx_c
    by_ch = k * ty * ry_c
    # half of each, and a centre moves by half of what an edge moves
    by_x = _Ends(
        0.25 * by_dx - 0.5 * by_cw * step(-x.before),
        0.25 * by_dx + 0.5 * by_cw * step(-x.behind),
    )
    by_y = _Ends(
        0.25 * by_dy - 0.5 * by_ch * step(-y.before),
        0.25 * by_dy + 0.5 * by_ch * step(-y.behind),
    )
    return _compose(common, (_Penalty(q, by_x, by_y, 0.5 * dw, 0.5 * dh),), 1, inv, numbers)


@triton.jit
def _near(x, far):
    """With the predicted size, and distances of edges, held within ``far`` either way."""
    return Axis(smaller(x.size, far), x.true_size, held(x.before, far), held(x.behind, far))


@triton.jit
def mpdiou(x, y, args, extent):
    """1 - IoU + d1^2 / (W^2 + H^2) + d2^2 / (W^2 + H^2) (Ma & Xu 2023).

    d1 and d2 are the distances of the upper left and of the lower right corners, W and H the sides of the image; none
    of these takes eps. The one term that is not bounded: lengths are held within 1e6 images, the derivative goes on.
    """
    takes(args, 2, 4)
    numbers = _Numbers(*args)
    width = tl.cast(extent[0], x.size.dtype)  # a plain argument of a kernel is float32
    height = tl.cast(extent[1], x.size.dtype)
    scale = 1.0 / tl.maximum(width, height)
    width *= scale
    height *= scale
    r = 1.0 / (width * width + height * height)
    x = _near(x, 1e6 / scale)
    y = _near(y, 1e6 / scale)
    x1 = x.before * scale
    y1 = y.before * scale
    x2 = x.behind * scale
    y2 = y.behind * scale
    x, y, inv = _normalise(x, y)
    k = 2.0 * r * (scale / inv)
    first = _Penalty((x1 * x1 + y1 * y1) * r, _Ends(k * x1, 0.0), _Ends(k * y1, 0.0))
    second = _Penalty((x2 * x2 + y2 * y2) * r, _Ends(0.0, -k * x2), _Ends(0.0, -k * y2))
    return _compose(_overlap(x, y, _scaled_eps(numbers.eps, inv)), (first, second), 2, inv, numbers)
