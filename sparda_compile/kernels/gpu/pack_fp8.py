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

# The float32 next to 1 / 448: a quotient would be many instructions.
_STEP = tl.constexpr(0.0022321429569274187)


@triton.jit
def encode(x, inside, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the codes of a tile, int32, and what they are scaled by, twice."""
    largest = tl.max(tl.abs(x), AXIS)
    wide = tl.expand_dims(largest, AXIS)
    scaled = tl.div_rn(x, tl.where(wide > 0, wide, 1.0) + tl.zeros_like(x)) * 448.0
    size = tl.abs(scaled)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (127 - 7) * 8
    small = (size * 512.0 + _SHIFT).to(tl.int32, bitcast=True) & 15
    sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 128
    return tl.where(size < _LEAST_NORMAL, small, normal) | sign, largest, largest


@triton.jit
def decode(codes, first, last):  # noqa: ANN201 - a part of kernels
    """Return the values of codes, 0 to 255, by scales that spread over the tile."""
    bits = ((codes & 128) << 8) | ((codes & 127) << 7)
    number = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    values = number * (first * _STEP)
    values = tl.where(number == 448.0, first, values)
    return tl.where(number == -448.0, -first, values)
