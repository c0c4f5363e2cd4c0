"""4-bit integers between the least and the largest: of each channel of keys, each token of values.

    l, h = min x, max x       code = round(15 (x - l) / (h - l))      x' = l + code * ((h - l) / 15)

and h itself at 15. Half a step is (h - l) / 30. The bytes of two neighbouring tokens are one, the
first in the low bits. Where h - l is beyond float32 all is NaN. Kernels:
`kernels/gpu/pack_int4.py`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.formats.base import ScaledFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Int4Format"]

_LARGEST: Final = 15
# Of float32: whoever unpacks multiplies, and does not divide.
_STEP: Final = ctypes.c_float(1.0 / _LARGEST).value


class Int4Format(ScaledFormat):
    """Codes are the integers from 0 to 15."""

    name: ClassVar[str] = "int4"
    kernels: ClassVar[str | None] = "sparda_compile.kernels.gpu.pack_int4"
    error: ClassVar[float] = 0.1
    code_bits: ClassVar[int] = 4
    num_scales: ClassVar[tuple[int, int]] = (2, 2)

    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the least and the largest value."""
        low, high = x.amin(axis, keepdim=True), x.amax(axis, keepdim=True)
        wide = (high - low).isinf()
        return [each.masked_fill(wide, float("nan")) for each in (low, high)]

    def encode(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the nearest codes; 0 where all is one value, or something is not finite."""
        low, high = scales
        span = high - low
        share = (x - low) / span.where(span > 0, 1.0)
        return (share * _LARGEST).round().where(span > 0, 0.0).to(torch.uint8)

    def decode(self, codes: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the values of codes."""
        low, high = scales
        values = low + codes.float() * ((high - low) * _STEP)
        return high.where(codes == _LARGEST, values)

    def half_step(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return half a step, which is one for all."""
        low, high = scales
        return ((high - low) / (2 * _LARGEST)).expand_as(x)
