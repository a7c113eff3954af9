"""What instructions of a GPU compute, in numpy: integers wrap, shifts saturate, NaN and conversions are a GPU's.

Functions take arrays or scalars of one type and give what the instruction of that type gives, element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any  # an array of numpy or a scalar of it: expressions mix both

F16, F32, F64 = np.float16, np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
S8, S16, S32, S64 = np.int8, np.int16, np.int32, np.int64

TYPES: dict[str, Any] = {
    "f16": F16, "f32": F32, "f64": F64, "s8": S8, "s16": S16, "s32": S32, "s64": S64, "u8": U8, "u16": U16, "u32": U32,
    "u64": U64, "b8": U8, "b16": U16, "b32": U32, "b64": U64, "bf16": U16, "bf16x2": U32, "f16x2": U32,
    "s16x2": U32, "u16x2": U32, "pred": np.bool_,
}  # fmt: skip
"""The type of numpy that holds a kind of PTX; bfloat16 and pairs are held as bits."""

_NAN: dict[Any, tuple[Any, Any]] = {
    F16: (U16, U16(0x7FFF)),
    F32: (U32, U32(0x7FFFFFFF)),
    F64: (U64, U64(0x7FFFFFFFFFFFFFFF)),
}
_ROUND: dict[str, Callable[[Array], Array]] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


# -- integers


def mul_hi(a: Array, b: Array) -> Array:
    """The upper half of a product of 16, 32 or 64 bits."""
    kind = np.result_type(a)
    if kind.itemsize < 8:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}").type
        return ((np.asarray(a).astype(wide) * np.asarray(b).astype(wide)) >> wide(8 * kind.itemsize)).astype(kind)
    if kind.kind == "i":
        high = mul_hi(np.asarray(a).view(U64), np.asarray(b).view(U64)).view(S64)
        return high - np.where(a < 0, b, S64(0)) - np.where(b < 0, a, S64(0))
    low, half = U64(0xFFFFFFFF), U64(32)
    a_low, a_high, b_low, b_high = a & low, a >> half, b & low, b >> half
    middle = a_high * b_low + ((a_low * b_low) >> half)
    other = a_low * b_high + (middle & low)
    return a_high * b_high + (middle >> half) + (other >> half)


def divide(a: Array, b: Array, rest: bool) -> Array:
    """Quotient, or rest, of integers, towards zero; a division by zero gives all ones, as the hardware does."""
    a, b = np.broadcast_arrays(a, b)
    kind = a.dtype.type
    zero = b == 0
    safe = np.where(zero, kind(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0))).astype(kind)
    ones = kind(-1) if a.dtype.kind == "i" else ~kind(0)
    return np.where(zero, ones, a - quotient * safe if rest else quotient)


def shift_left(a: Array, by: Array) -> Array:
    """shl: by more than there are bits nothing is left."""
    kind = np.result_type(a)
    bits = kind.itemsize * 8
    near = np.minimum(by, bits - 1).astype(kind)
    return np.where(np.asarray(by) < bits, a << near, kind.type(0))


def shift_right(a: Array, by: Array) -> Array:
    """shr: by more than there are bits nothing, or the sign, is left."""
    kind = np.result_type(a)
    bits = kind.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(kind)
    return shifted if kind.kind == "i" else np.where(np.asarray(by) < bits, shifted, kind.type(0))


def funnel(low: Array, high: Array, by: Array, left: bool, clamp: bool) -> Array:
    """shf: of two registers in a row, the upper 32 bits of a shift to the left, the lower ones of one to the right."""
    both = np.asarray(low, U64) | (np.asarray(high, U64) << U64(32))
    count = np.minimum(by, U32(32)).astype(U64) if clamp else np.asarray(by, U64) & U64(31)
    return ((both << count) >> U64(32) if left else both >> count).astype(U32)


def extract(a: Array, at: Array, count: Array) -> Array:
    """bfe: ``count`` bits from bit ``at`` on, filled up with zeros or the sign."""
    kind = np.result_type(a)
    bits = kind.itemsize * 8
    at, count = np.asarray(at, S64) & 255, np.asarray(count, S64) & 255
    end = np.minimum(at + count, bits)
    up = bits - end
    moved = shift_right(shift_left(a, up), np.minimum(up + at, bits))
    return np.where(count == 0, kind.type(0), moved)


def insert(a: Array, b: Array, at: Array, count: Array) -> Array:
    """bfi: the lowest ``count`` bits of a into b at bit ``at``."""
    kind = np.result_type(a)
    at, count = np.asarray(at, U32) & U32(255), np.asarray(count, U32) & U32(255)
    mask = shift_left(~shift_left(~kind.type(0), count), at)
    return (shift_left(a, at) & mask) | (b & ~mask)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four of the eight bytes of two words, or their signs."""
    both = np.asarray(a, U64) | (np.asarray(b, U64) << U64(32))
    out: Array = U64(0)
    for i in range(4):
        pick = (np.asarray(selector, U64) >> U64(4 * i)) & U64(15)
        byte = (both >> (U64(8) * (pick & U64(7)))) & U64(255)
        byte = np.where(pick & U64(8), np.where(byte & U64(128), U64(255), U64(0)), byte)
        out = out | (byte << U64(8 * i))
    return out.astype(U32)


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: a function of three bits, its values the bits of ``table``."""
    out = a & U32(0)
    for index in range(8):
        if table >> index & 1:
            out = out | ((a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c))
    return out


def reverse(a: Array) -> Array:
    """brev: bits in the opposite order."""
    kind = np.result_type(a)
    bits = kind.itemsize * 8
    out = a & kind.type(0)
    for index in range(bits):
        out = out | (((a >> kind.type(index)) & kind.type(1)) << kind.type(bits - 1 - index))
    return out


def ones(a: Array) -> Array:
    """popc: how many bits are 1."""
    kind = np.result_type(a)
    out: Array = U32(0)
    for index in range(kind.itemsize * 8):
        out = out + ((a >> kind.type(index)) & kind.type(1)).astype(U32)
    return out


def leading_zeros(a: Array) -> Array:
    """clz."""
    kind = np.result_type(a)
    for by in (1, 2, 4, 8, 16, 32)[: int(kind.itemsize).bit_length() + 2]:
        a = a | (a >> kind.type(by))
    return U32(kind.itemsize * 8) - ones(a)


# -- floats


def to_int(x: Array, kind: Any, rounding: str) -> Array:
    """A float as an integer, ``rounding`` as PTX names it: cut off at the ends of the type, NaN is 0."""
    x = _ROUND[rounding](np.asarray(x, F64))
    ends = np.iinfo(kind)
    high, low = x >= float(ends.max), x <= float(ends.min)
    inside = np.where(high | low | (x != x), 0.0, x).astype(kind)
    return np.where(high, kind(ends.max), np.where(low, kind(ends.min), inside))


def round_to(x: Array, rounding: str) -> Array:
    """To an integer, still a float."""
    return _ROUND[rounding](x)


def from_bf16(bits: Array) -> Array:
    """As float32."""
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def to_bf16(x: Array) -> Array:
    """Of float32, to the nearest, ties to even."""
    bits = np.asarray(x, F32).view(U32)
    rounded = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def unpack(bits: Array, kind: str) -> tuple[Array, Array]:
    """The lower and the upper number of a pair: float16, bfloat16 as float32, or integers."""
    low, high = np.asarray(bits & U32(0xFFFF)).astype(U16), np.asarray(bits >> U32(16)).astype(U16)
    if kind == "bf16x2":
        return from_bf16(low), from_bf16(high)
    half = TYPES[kind.removesuffix("x2")]
    return low.view(half), high.view(half)


def pack(low: Array, high: Array, kind: str) -> Array:
    """A pair of numbers, each rounded."""
    bits = [_half_bits(x, kind) for x in (low, high)]
    return bits[0].astype(U32) | (bits[1].astype(U32) << U32(16))


def _half_bits(x: Array, kind: str) -> Array:
    if kind == "bf16x2":
        return to_bf16(x)
    return canonical(np.asarray(x).astype(F16)) if kind == "f16x2" else np.asarray(x).astype(U16)


def flush(x: Array) -> Array:
    """.ftz: subnormal numbers of float32 as zeros of their sign."""
    tiny = np.abs(x) < F32(2**-126)
    return np.where(tiny, np.copysign(F32(0), x), x) if tiny.any() else x


def saturate(x: Array) -> Array:
    """.sat: into [0, 1]; NaN is 0."""
    kind = np.result_type(x).type
    return np.where(x > 0, np.minimum(x, kind(1)), kind(0))


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` rounded once, but for a tie after 53 (float16 and float32) or 64 (float64) bits."""
    kind = np.result_type(a)
    big = np.longdouble if kind == F64 else F64
    return (np.asarray(a).astype(big) * b + c).astype(kind)


def fmin(a: Array, b: Array) -> Array:
    """min: a NaN loses; -0 is below +0."""
    return _signed_zero(np.fmin(a, b), a, b, np.signbit(a) | np.signbit(b))


def fmax(a: Array, b: Array) -> Array:
    """max: a NaN loses; -0 is below +0."""
    return _signed_zero(np.fmax(a, b), a, b, np.signbit(a) & np.signbit(b))


def minimum(a: Array, b: Array) -> Array:
    """min.NaN: a NaN wins; -0 is below +0."""
    return _signed_zero(np.minimum(a, b), a, b, np.signbit(a) | np.signbit(b))


def maximum(a: Array, b: Array) -> Array:
    """max.NaN: a NaN wins; -0 is below +0."""
    return _signed_zero(np.maximum(a, b), a, b, np.signbit(a) & np.signbit(b))


def _signed_zero(picked: Array, a: Array, b: Array, negative: Array) -> Array:
    zeros = (a == 0) & (b == 0)
    if not np.any(zeros):
        return picked
    kind = np.result_type(picked).type
    return np.where(zeros, np.where(negative, kind(-0.0), kind(0)), picked)


def canonical(x: Array) -> Array:
    """Bits of a float; NaN has those that a GPU gives it."""
    x = np.asarray(x)
    kind, ones = _NAN[x.dtype.type]
    nan = x != x
    bits = x.view(kind)
    return np.where(nan, ones, bits) if nan.any() else bits


def noisy(x: Array, ulps: int, seed: int) -> Array:
    """What an approximate instruction may give for float32 ``x``: up to ``ulps`` units in the last place off.

    How much follows from the number and the seed, so that one argument gives one result, as in hardware. Zeros,
    infinities, NaN, 1 and numbers near the ends of the range stay as they are.
    """
    x = np.asarray(x)
    bits = x.view(U32)
    mixed = (bits * U32(2654435761) + U32(seed * 40503 & 0xFFFFFFFF)) >> U32(16)
    by = (mixed % U32(2 * ulps + 1)).astype(S32) - ulps
    moved = (bits.astype(S64) + by).astype(U32).view(F32)
    steady = ~np.isfinite(x) | (np.abs(x) < F32(1e-30)) | (np.abs(x) > F32(1e38)) | (x == 1)
    return np.where(steady, x, moved)


# -- atomics

ATOMICS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "add": lambda old, new, _: old + new,
    "min": lambda old, new, _: min(old, new),
    "max": lambda old, new, _: max(old, new),
    "exch": lambda old, new, _: new,
    "and": lambda old, new, _: old & new,
    "or": lambda old, new, _: old | new,
    "xor": lambda old, new, _: old ^ new,
    "inc": lambda old, new, _: old - old if old >= new else old + type(old)(1),
    "dec": lambda old, new, _: new if old == 0 or old > new else old - type(old)(1),
    "cas": lambda old, new, other: other if old == new else old,
}
"""What an atomic leaves, of what was there, its operand, and the second one of ``cas``."""
