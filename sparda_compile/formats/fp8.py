"""8-bit floats e4m3: of each channel of keys about its middle, of each token of values about 0.

    l, h = min x, max x of keys        -a, a = -max |x|, max |x| of values
    m = l / 2 + h / 2                  u = the power of two below or at h - l
    code = e4m3(256 (x - m) / u)       x' = m + code * (u / 256), from l to h

and l and h themselves are the codes -256 and 256. The error of a float goes with its size, so that
what keys of a channel have in common would cost all of them; it is not in the codes. Half a step is
|x - m| / 16 at most, and below u / 16384 it is u / 262144.

u is a power of two, as the distances between codes, and between numbers of the model's dtype, are
then. So what was read stays what it is when it is stored again: in units of h - l a code may round
to a number that is nearer to another code, which rounds to another number. Where h - l is beyond
float32 all is NaN. Kernels: `kernels/gpu/pack_fp8.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.formats.base import ScaledFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fp8Format"]

_KEYS_AXIS: Final = -2
_LARGEST: Final = 256.0
# The codes of the ends, 256 and -256.
_HIGHEST: Final = 0x78
_LOWEST: Final = 0xF8
_EXPONENT: Final = 0x7F800000
_PRECISION: Final = 2.0**-4
_SMALLEST: Final = 2.0**-10


class Fp8Format(ScaledFormat):
    """Codes are torch's `float8_e4m3fn`."""

    name: ClassVar[str] = "fp8"
    kernels: ClassVar[str | None] = "sparda_compile.kernels.gpu.pack_fp8"
    error: ClassVar[float] = 0.025
    code_bits: ClassVar[int] = 8
    num_scales: ClassVar[tuple[int, int]] = (2, 1)

    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the least and the largest value of keys, the largest absolute value of values."""
        if axis == _KEYS_AXIS:
            low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
            ends = [low + 0.0, high + 0.0]  # of two zeros neither is the least: both are 0
        else:
            ends = [x.abs().amax(axis, keepdim=True)]
        wide = (ends[-1] - _low(ends)).isinf()
        return [end.masked_fill(wide, float("nan")) for end in ends]

    def encode(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the nearest codes; 0 where something is not finite."""
        low, high = _low(scales), scales[-1]
        unit = _unit(low, high)
        scaled = (x - _middle(low, high)) / unit * _LARGEST
        codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        codes = codes.masked_fill(x == low, _LOWEST).masked_fill(x == high, _HIGHEST)
        return codes.masked_fill(unit.isinf(), 0)

    def decode(self, codes: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the values of codes."""
        low, high = _low(scales), scales[-1]
        values = codes.view(torch.float8_e4m3fn).float() / _LARGEST * _unit(low, high)
        if len(scales) > 1:
            values = _middle(low, high) + values
        return torch.minimum(torch.maximum(values, low), high)

    def half_step(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return half a step, relative to how far each element is from the middle."""
        low, high = _low(scales), scales[-1]
        distance = (x - _middle(low, high)).abs()
        return torch.maximum(distance * _PRECISION, _unit(low, high) / _LARGEST * _SMALLEST)


def _low(scales: list[Tensor]) -> Tensor:
    """Return the lower end of a line: that of values is as far from 0 as the other."""
    return scales[0] if len(scales) > 1 else -scales[0]


def _middle(low: Tensor, high: Tensor) -> Tensor:
    """Return the middle of lines, which their sum would be too large for."""
    return low * 0.5 + high * 0.5


def _unit(low: Tensor, high: Tensor) -> Tensor:
    """Return the power of two below or at `high - low`, a normal number; infinity for NaN."""
    bits = (high - low).view(torch.int32) & _EXPONENT
    return bits.view(torch.float32).clamp_min(torch.finfo(torch.float32).tiny)
