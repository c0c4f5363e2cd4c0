"""Keys that stay: values alone are stored, and keys are read back from 4 bits on the device.

    stored run of a block    codes of values | scales of values
    on the device            codes, span and base of the keys: the summary of selector `lowbit4`

    v' = as `int8` or `int4` says
    k' = (1 + code / 16) * span + base        half a step is (max - min) / 30 of a channel's block

With selector `lowbit4` the keys' codes are there already; with another one they are kept for this
alone, an eighth of the bytes of 16-bit keys and values and 4 bytes a channel and block. What
crosses the link is half of what the same format of values takes with its keys.

A channel of the keys that has a NaN is NaN as a whole. One that has an infinity is what the
selector makes of it: its others lose their resolution, and unlike in other formats the infinity
itself may become finite.

Codes as in `selectors/lowbit.py` (KIVI, arXiv 2402.02750, section 3).
Kernels: `kernels/gpu/staying.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.formats.base import BlockFormat, aligned, check_dtype, padded
from sparda_compile.formats.int4 import Int4Format
from sparda_compile.formats.int8 import Int8Format
from sparda_compile.selectors.lowbit import dequantize, quantize

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.formats.base import ScaledFormat

__all__ = ["KEY_BITS", "Values4Format", "Values8Format", "ValuesFormat"]

KEY_BITS: Final = 4


class ValuesFormat(BlockFormat):
    """Values in a format of codes and scales.

    Attributes:
        values: Their format.
        code_bits: Its, for kernels, like the next one.
        num_scales: Of each channel of keys, which is none, and of each token.
    """

    summary: ClassVar[str | None] = "lowbit4_keys"
    values: ClassVar[ScaledFormat]
    code_bits: ClassVar[int]
    num_scales: ClassVar[tuple[int, int]]

    def stored(
        self, size: int, dim: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the bytes of a run, [bytes] uint8.

        Raises:
            UnsupportedInputError: If keys and values are of a dtype without such a format.
        """
        check_dtype(self.name, dtype)
        codes = size * dim * self.code_bits // 8
        return (aligned(codes + self.num_scales[1] * size * dtype.itemsize),), torch.uint8

    def pack(self, blocks: Tensor) -> Tensor:
        """Return the runs of the values of blocks [..., 2, P, D], [..., bytes] uint8."""
        size, dim = blocks.shape[-2:]
        (total,), _ = self.stored(size, dim, blocks.dtype)
        return padded(torch.cat(self.values.pack_half(blocks[..., 1, :, :], -1), -1), total)

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return blocks with the values of runs; their keys, which are not stored, are NaN."""
        values = self._values(stored, size, dim, dtype)
        return torch.stack([torch.full_like(values, float("nan")), values], -3)

    def read(
        self, stored: Tensor, keys: Sequence[Tensor], size: int, dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Return blocks with the values of runs, and keys of their codes, span and base."""
        codes, span, base = keys
        return torch.stack(
            [dequantize(codes, span, base, KEY_BITS), self._values(stored, size, dim, dtype)], -3
        )

    def rounded(self, blocks: Tensor) -> Tensor:
        """Return blocks [..., 2, P, D] as they are when they are read again."""
        keys, (size, dim) = quantize(blocks[..., 0, :, :], KEY_BITS), blocks.shape[-2:]
        return self.read(self.pack(blocks), keys, size, dim, blocks.dtype)

    def bound(self, blocks: Tensor) -> Tensor:
        """Return half a step, and what rounding to the model's dtype adds; NaN where all is."""
        k, v = blocks.unbind(-3)
        low, high = k.float().amin(-2, keepdim=True), k.float().amax(-2, keepdim=True)
        info = torch.finfo(k.dtype)
        # Span, base and the result are each rounded to the dtype.
        rounding = info.eps * (1.6 * (high - low) + torch.maximum(low.abs(), high.abs()))
        smallest = max(16 * info.smallest_normal * info.eps, 2.0**-136)
        # Span and base are numbers of the dtype: of a channel as wide as it, they leave out an end.
        span = ((high - low) * (16 / 15)).clamp(max=min(info.max, torch.finfo(low.dtype).max))
        base = (low - span).clamp(min=-info.max)
        left_out = torch.maximum(high - (base + span * (31 / 16)), base + span - low).clamp(min=0.0)
        keys = ((high - low) / 30 + rounding + left_out + smallest).expand_as(k)
        return torch.stack([keys, self.values.bound_half(v, -1)], -3)

    def _values(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        codes = size * dim * self.code_bits // 8
        scales = self.num_scales[1] * size * dtype.itemsize
        coded, scaled = stored[..., : codes + scales].split([codes, scales], -1)
        return self.values.unpack_half(coded, scaled, -1, dim, dtype)


class Values8Format(ValuesFormat):
    """Values as `int8` has them."""

    name: ClassVar[str] = "values8"
    kernels: ClassVar[str | None] = Int8Format.kernels
    error: ClassVar[float] = 0.07
    values: ClassVar[ScaledFormat] = Int8Format()
    code_bits: ClassVar[int] = Int8Format.code_bits
    num_scales: ClassVar[tuple[int, int]] = (0, Int8Format.num_scales[1])


class Values4Format(ValuesFormat):
    """Values as `int4` has them."""

    name: ClassVar[str] = "values4"
    kernels: ClassVar[str | None] = Int4Format.kernels
    error: ClassVar[float] = 0.1
    values: ClassVar[ScaledFormat] = Int4Format()
    code_bits: ClassVar[int] = Int4Format.code_bits
    num_scales: ClassVar[tuple[int, int]] = (0, Int4Format.num_scales[1])
