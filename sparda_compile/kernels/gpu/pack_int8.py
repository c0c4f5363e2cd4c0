"""8-bit integers and back, as `formats/int8.py` says it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode", "encode"]

# Added to a number, it leaves the nearest integer in the low bits; ties go to the even one.
_SHIFT = tl.constexpr(12582912.0)
_SHIFT_BITS = tl.constexpr(0x4B400000)
# Its bits with an integer below 2^23 in the low ones are the float of both; a conversion is slower.
_WHOLE = tl.constexpr(8388608.0)
_WHOLE_BITS = tl.constexpr(0x4B000000)

# The float32 next to 1 / 127: a quotient would be many instructions.
_STEP = tl.constexpr(0.007874015718698502)


@triton.jit
def encode(x, inside, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the codes of a tile, int32, and what they are scaled by, twice."""
    largest = tl.max(tl.abs(x), AXIS)
    wide = tl.expand_dims(largest, AXIS)
    share = tl.div_rn(x, tl.where(wide > 0, wide, 1.0) + tl.zeros_like(x))
    codes = (share * 127.0 + _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS
    return codes, largest, largest


@triton.jit
def decode(codes, first, last, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the values of codes, 0 to 255, by scales that spread over the tile."""
    number = ((codes ^ 128) | _WHOLE_BITS).to(tl.float32, bitcast=True) - (_WHOLE + 128.0)
    values = number * (first * _STEP)
    values = tl.where(number == 127.0, first, values)
    return tl.where(number == -127.0, -first, values)
