"""4-bit integers and back, as `formats/int4.py` says it."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["decode", "encode"]

# Added to a number, it leaves the nearest integer in the low bits; ties go to the even one.
_SHIFT = tl.constexpr(12582912.0)
_SHIFT_BITS = tl.constexpr(0x4B400000)

# The float32 next to 1 / 15: a quotient would be many instructions.
_STEP = tl.constexpr(0.06666667014360428)


@triton.jit
def encode(x, inside, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the codes of a tile, int32, and between which values they lie."""
    low = tl.min(tl.where(inside, x, float("inf")), AXIS)
    high = tl.max(tl.where(inside, x, float("-inf")), AXIS)
    is_wide = tl.abs(high - low) == float("inf")
    low = tl.where(is_wide, float("nan"), low)
    high = tl.where(is_wide, float("nan"), high)
    span = tl.expand_dims(high - low, AXIS) + tl.zeros_like(x)
    has_span = span > 0
    above = tl.where(has_span, x - tl.expand_dims(low, AXIS), 0.0)
    share = tl.div_rn(above, tl.where(has_span, span, 1.0))
    codes = (share * 15.0 + _SHIFT).to(tl.int32, bitcast=True) - _SHIFT_BITS
    return codes, low, high


@triton.jit
def decode(codes, first, last, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the values of codes, 0 to 15, between two that spread over the tile."""
    step = (last - first) * _STEP
    return tl.where(codes == 15, last, first + codes.to(tl.float32) * step)
