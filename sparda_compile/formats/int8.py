"""8-bit integers, symmetric: one scale for each channel of keys and each token of values.

    a = max |x|        code = round(127 x / a)        x' = code * (a / 127),  a itself at +-127

Half a step is a / 254. Kernels: `kernels/gpu/pack_int8.py`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.formats.base import ScaledFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Int8Format"]

_LARGEST: Final = 127.0
# Of float32: whoever unpacks multiplies, and does not divide.
_STEP: Final = ctypes.c_float(1.0 / _LARGEST).value


class Int8Format(ScaledFormat):
    """Codes are the integers from -127 to 127, in two's complement."""

    name: ClassVar[str] = "int8"
    kernels: ClassVar[str | None] = "sparda_compile.kernels.gpu.pack_int8"
    error: ClassVar[float] = 0.006
    code_bits: ClassVar[int] = 8
    num_scales: ClassVar[tuple[int, int]] = (1, 1)

    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the largest absolute value."""
        return [x.abs().amax(axis, keepdim=True)]

    def encode(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the nearest codes; 0 where all is 0, or something is not finite."""
        (a,) = scales
        codes = (x / a.where(a > 0, 1.0) * _LARGEST).round()
        return codes.to(torch.int8).view(torch.uint8)

    def decode(self, codes: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the values of codes."""
        (a,) = scales
        integers = codes.view(torch.int8).float()
        is_largest = integers.abs() == _LARGEST
        return torch.where(is_largest, a.copysign(integers), integers * (a * _STEP))

    def half_step(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return half a step, which is one for all."""
        (a,) = scales
        return (a / (2 * _LARGEST)).expand_as(x)
