"""8-bit floats e4m3, scaled to their range: for each channel of keys and each token of values.

    a = max |x|        code = e4m3(448 x / a)        x' = code * (a / 448),  a itself at +-448

Half a step is |x| / 16 at most, and below a / 28672 it is a / 458752: small elements beside large
ones keep their precision, which integers do not give them. Kernels: `kernels/gpu/pack_fp8.py`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.formats.base import ScaledFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fp8Format"]

_LARGEST: Final = 448.0
# Of float32: whoever unpacks multiplies, and does not divide.
_STEP: Final = ctypes.c_float(1.0 / _LARGEST).value
_PRECISION: Final = 2.0**-4
_SMALLEST: Final = 2.0**-10


class Fp8Format(ScaledFormat):
    """Codes are torch's `float8_e4m3fn`."""

    name: ClassVar[str] = "fp8"
    kernels: ClassVar[str | None] = "sparda_compile.kernels.gpu.pack_fp8"
    error: ClassVar[float] = 0.027
    code_bits: ClassVar[int] = 8
    num_scales: ClassVar[int] = 1

    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return the largest absolute value."""
        return [x.abs().amax(axis, keepdim=True)]

    def encode(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the nearest codes; 0 where all is 0, or something is not finite."""
        (a,) = scales
        scaled = x / a.where(a > 0, 1.0) * _LARGEST
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)

    def decode(self, codes: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the values of codes."""
        (a,) = scales
        floats = codes.view(torch.float8_e4m3fn).float()
        is_largest = floats.abs() == _LARGEST
        return torch.where(is_largest, a.copysign(floats), floats * (a * _STEP))

    def half_step(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return half a step, relative to each element."""
        (a,) = scales
        return torch.maximum(x.abs() * _PRECISION, a / _LARGEST * _SMALLEST)
