"""Arithmetic that Triton lacks, in plain operations that the interpreter and every backend have."""

import triton
import triton.language as tl


@triton.jit
def step(d):
    """Derivative of max(x, y) with respect to x, for d = x - y: 0.5 at a tie, as torch.maximum and torch.minimum."""
    return tl.where(d > 0, 1.0, tl.where(d < 0, 0.0, 0.5))


@triton.jit
def sign(d):
    """Derivative of |d|, 0 at 0, as torch.abs; NaN stays NaN."""
    return tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, d))


@triton.jit
def larger(a, b):
    """The larger of two floats, NaN if one of them is, as torch.maximum. ``tl.maximum`` drops a NaN on a GPU."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def smaller(a, b):
    """The smaller of two floats, NaN if one of them is, as torch.minimum."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def held(d, far):
    """A distance, held within ``far`` either way; NaN stays NaN."""
    return smaller(larger(d, -far), far)


@triton.jit
def near(d):
    """A distance in strides or anchors, held within 1e8, so that no area that it is part of leaves float32; derivatives
    go on as if it were not."""
    return held(d, 1e8)


@triton.jit
def finite(d):
    """d <= 0, and the lowest finite number of its type where it is less; NaN stays NaN."""
    if d.dtype == tl.float64:
        result = larger(d, -1.7976931348623157e308)
    else:
        result = larger(d, -3.4028234663852886e38)
    return result


@triton.jit
def weigh(weight, value, ZEROS: tl.constexpr = True):
    """A value times its weight, or gain: of one of 0 nothing but a NaN, for a value that leaves its type is infinite.

    Without ZEROS, where no weight can be 0 or no value infinite, it is the plain product.
    """
    product = weight * value
    if ZEROS:
        product = tl.where((weight == 0) & (value == value), 0.0, product)
    return product


@triton.jit
def vanishes(q):
    """Whether q >= 0 lies below the normal numbers, where a quotient by it may be inf, and an operation of the GPU may
    take it for 0 while another does not. NaN does not vanish."""
    if q.dtype == tl.float64:
        small = q < 2.2250738585072014e-308
    else:
        small = q < 1.1754943508222875e-38
    return small


@triton.jit
def inverse_power(q):
    """A power of two that brings q > 0 into [1, 2), 1 where q vanishes.

    A product with it is exact, so that nothing depends on whether the compiler rounds it.
    """
    if q.dtype == tl.float64:
        exponent = q.to(tl.int64, bitcast=True) & 0x7FF0000000000000
        power = tl.maximum(0x7FE0000000000000 - exponent, 0x0010000000000000).to(tl.float64, bitcast=True)
    else:
        exponent = q.to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.maximum(0x7F000000 - exponent, 0x00800000).to(tl.float32, bitcast=True)
    return tl.where(vanishes(q), 1.0, power)


@triton.jit
def safe_div(a, b):
    """a / b, and 0 where b vanishes."""
    none = vanishes(tl.abs(b))
    return tl.where(none, 0.0, a / tl.where(none, 1.0, b))


@triton.jit
def divide(a, b):
    """a / b, rounded to nearest, for quotients that meet a threshold: in float32 plain ``/`` is off by up to 2 ulp."""
    if b.dtype == tl.float32:
        q = tl.div_rn(a, b)
    else:
        q = a / b
    return q


@triton.jit
def near_divide(a, b):
    """a / b as :func:`divide`, where that takes too many registers.

    Any quotient that is itself a float32, as one that meets a threshold is, comes out as it is; of the others one in
    millions, half way between two, may be the next one. The rest that the first guess leaves is exact. Where b leaves
    2^-126 ... 2^126, it is plain ``/``.
    """
    q = a / b
    if b.dtype == tl.float32:
        inverse = 1.0 / b
        guess = a * inverse
        rest = tl.fma(-guess, b, a)
        q = tl.where(tl.abs(rest) < float("inf"), tl.fma(rest, inverse, guess), q)
    return q


@triton.jit
def log1p_of_share(e):
    """log(1 + e) for e in [0, 1]: in float32 e times a polynomial, within 2.3e-7 of its value also for the smallest e.

    The polynomial is a fit of log(1 + e) / e whose own relative error is 3e-8. In float64 the rounding of 1 + e cancels
    in a quotient (Kahan).
    """
    if e.dtype == tl.float64:
        u = 1.0 + e
        result = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        p = 0.005232503071377436 * e - 0.029504472511753213
        p = p * e + 0.07822470389602328
        p = p * e - 0.13663139919966036
        p = p * e + 0.19105956978899147
        p = p * e - 0.2484296949523795
        p = p * e + 0.3331909521061606
        p = p * e - 0.49999493064011546
        p = p * e + 0.9999999698735456
        result = p * e
    return result


@triton.jit
def log1p(e):
    """log(1 + e) for 0 <= e < 2^24, to full precision: of e less than 1 as :func:`log1p_of_share`.

    Else 1 + e is a power of two times 1 + share, and what e is more than the power, less 1, is exact.
    """
    if e.dtype == tl.float64:
        result = log1p_of_share(e)
    else:
        exponent = (1.0 + e).to(tl.int32, bitcast=True) & 0x7F800000
        power = exponent.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        share = (e - (power - 1.0)) * inverse
        result = log1p_of_share(share) + 0.6931471805599453 * ((exponent >> 23) - 127).to(tl.float32)
    return result


@triton.jit
def exp_down(x):
    """e^x for x <= 0; in float32 0 below the normal numbers, which saves the GPU a test for these."""
    if x.dtype == tl.float64:
        result = tl.exp(x)
    else:
        result = tl.exp2(x * 1.4426950408889634)
    return result


@triton.jit
def logistic(x):
    """sigmoid(x), sigmoid(-x) and e^-|x|, none of them from a difference, so that each keeps its digits in its tail.

    In float32 1 / (1 + e) is the square of a root's reciprocal and one step of Newton's: half of what a division costs.
    """
    # Triton takes -x for 0 - x, which is an instruction of its own; times -1 is none
    e = exp_down(tl.abs(x) * -1.0)
    u = 1.0 + e
    if x.dtype == tl.float64:
        high = 1.0 / u
    else:
        root = tl.rsqrt(u)
        high = root * root
        high = tl.fma(high, tl.fma(u * -1.0, high, 1.0), high)
    low = e * high
    return tl.where(x >= 0, high, low), tl.where(x >= 0, low, high), e


@triton.jit
def pow_pos(q, g):
    """q ** g for q >= 0 and g >= 0; where q vanishes 0, and 1 for g = 0. NaN stays NaN."""
    none = vanishes(q)
    return tl.where(none, tl.where(g == 0, 1.0, 0.0), tl.exp(g * tl.log(tl.where(none, 1.0, q))))


@triton.jit
def angle(w, h):
    """atan(w / h) in radians, pi/2 at h = 0 and 0 at w = h = 0.

    The smaller side is divided by the larger, and the quotient q is taken below tan(pi/8) by
    atan(q) = pi/4 + atan((q - 1) / (q + 1)); there a polynomial in q^2 (Chebyshev fit, error below 4e-17) suffices.
    """
    aw = tl.abs(w)
    ah = tl.abs(h)
    q = safe_div(tl.minimum(aw, ah), tl.maximum(aw, ah))
    upper = q > 0.4142135623730950
    x = tl.where(upper, (q - 1.0) / (q + 1.0), q)
    z = x * x
    p = 0.021135373157693246 * z - 0.04348052215716462
    p = p * z + 0.056883492268090106
    p = p * z - 0.06640233930429408
    p = p * z + 0.07689953496306857
    p = p * z - 0.09090773074808414
    p = p * z + 0.11111106180455946
    p = p * z - 0.14285714180976467
    p = p * z + 0.1999999999885511
    p = p * z - 0.3333333333332844
    a = x + x * z * p
    a = tl.where(upper, 0.7853981633974483 + a, a)  # a constant alone in tl.where would be float32
    a = tl.where(aw > ah, 1.5707963267948966 - a, a)
    return tl.where((w < 0) != (h < 0), -a, a)


@triton.jit
def exact(parts):
    """A float64 number from the three float32 numbers that add up to it: no other argument carries one unrounded."""
    return tl.cast(parts[0], tl.float64) + tl.cast(parts[1], tl.float64) + tl.cast(parts[2], tl.float64)


@triton.jit
def plain(number):
    """n from the odd number 2 n + 3 that stands for it: Triton compiles anew for a number that is 1 or divisible by
    16, and cannot be told not to where it is in a tuple."""
    return (number - 3) // 2


@triton.jit
def scaled_less(c, scale, origin, ACC: tl.constexpr):
    """c * scale - origin, of a float32 c and a scale of at most 12 bits, a nearby origin: as if not rounded in between.

    The upper half of c times the scale is exact, so that its digits are still there when the origin is taken off.
    """
    upper = (c.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return (upper.to(ACC) * scale - origin) + (c - upper).to(ACC) * scale


@triton.jit
def ordered_bits(value):
    """An integer that orders floats >= 0 as they are: their bits."""
    if value.dtype == tl.float32:
        bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    else:
        bits = value.to(tl.int64, bitcast=True)
    return bits


WARP_LANES: tl.constexpr = tl.constexpr(32)


@triton.jit
def lane_bits(flags):
    """An integer whose bits are those of the threads of a warp."""
    bits = tl.sum(flags.to(tl.int32) << tl.arange(0, WARP_LANES), axis=0)  # 32 bits: one instruction of a warp
    return bits.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def of_lane(values, own):
    """Of float32 numbers of the threads of a warp the one that is a thread's ``own``."""
    bits = tl.where(own, values.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0).to(tl.float32, bitcast=True)  # of integers one instruction of a warp, too


@triton.jit
def lowest_bit(bits):
    """The lowest bit that is set: the exponent of the power of two."""
    power = (bits & -bits).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127
