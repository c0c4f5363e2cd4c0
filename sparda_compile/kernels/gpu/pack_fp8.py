"""8-bit floats e4m3 and back, as `formats/fp8.py` says it, by integers: any GPU can do it.

    code = s eeee mmm      2^(e - 7) * (1 + m / 8), or m / 512 where e is 0

The bits of a float32 with its exponent counted from -7 and 3 bits of mantissa left are a code. A
code's bits at the top of a float16 are its value over 256.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode", "encode"]

# Added to a number, it leaves the nearest integer in the low bits; ties go to the even one.
_SHIFT = tl.constexpr(8388608.0)
_LEAST_NORMAL = tl.constexpr(2.0**-6)
# Codes of the ends of a line, 256 and -256.
_HIGHEST = tl.constexpr(0x78)
_LOWEST = tl.constexpr(0xF8)
# Bits of a float32: its exponent, and the least normal number.
_EXPONENT = tl.constexpr(0x7F800000)
_LEAST_BITS = tl.constexpr(0x00800000)


@triton.jit
def _unit(low, high):
    """Return the power of two below or at `high - low`, a normal number; infinity for NaN."""
    bits = (high - low).to(tl.int32, bitcast=True) & _EXPONENT
    return tl.maximum(bits, _LEAST_BITS).to(tl.float32, bitcast=True)


@triton.jit
def encode(x, inside, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the codes of a tile, int32, and between which values they lie."""
    if AXIS == 0:
        # Of two zeros neither is the least: both become 0.
        low = tl.min(tl.where(inside, x, float("inf")), AXIS) + 0.0
        high = tl.max(tl.where(inside, x, float("-inf")), AXIS) + 0.0
    else:
        high = tl.max(tl.abs(x), AXIS)
        low = -high
    is_wide = tl.abs(high - low) == float("inf")
    low, high = tl.where(is_wide, float("nan"), low), tl.where(is_wide, float("nan"), high)
    wide_low, wide_high = tl.expand_dims(low, AXIS), tl.expand_dims(high, AXIS)
    unit = _unit(wide_low, wide_high) + tl.zeros_like(x)
    scaled = tl.div_rn(x - (wide_low * 0.5 + wide_high * 0.5), unit) * 256.0
    size = tl.abs(scaled)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (127 - 7) * 8
    small = (size * 512.0 + _SHIFT).to(tl.int32, bitcast=True) & 15
    sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 128
    codes = tl.where(size < _LEAST_NORMAL, small, normal) | sign
    codes = tl.where(x == wide_low, _LOWEST, codes)
    codes = tl.where(x == wide_high, _HIGHEST, codes)
    codes = tl.where(tl.expand_dims(is_wide, AXIS), 0, codes)
    return codes, low if AXIS == 0 else high, high


@triton.jit
def decode(codes, first, last, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the values of codes, 0 to 255, by scales that spread over the tile."""
    low = first if AXIS == 0 else -last
    bits = (codes + (codes & 128)) << 7  # the sum moves the sign one bit up
    number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    values = number * _unit(low, last)
    if AXIS == 0:
        values = (low * 0.5 + last * 0.5) + values
    # A line that is NaN has infinity as its unit, and NaN as its ends.
    return tl.minimum(tl.maximum(values, low), last, propagate_nan=tl.PropagateNan.ALL)
