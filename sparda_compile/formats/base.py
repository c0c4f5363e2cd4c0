"""What a format of full blocks is, and the common form of those that round.

    stored run of a block     codes of keys | codes of values | scales of keys | scales of values

A format that rounds has a code of 4 or 8 bits for each element, and one or two numbers by which
codes become values: for each channel of the keys within the block, and for each token of the
values. Outliers of keys stand in few channels and those of values in few tokens, so that the others
keep their resolution (KIVI, arXiv 2402.02750, section 3). Scales are elements of the block itself,
so that the model's dtype holds them exactly. Everything else is computed in float32.

What is unpacked was rounded to the model's dtype. To pack it again and unpack it gives the same:
the numbers that scale a line are in it, and a code's number is nearest to that code, or is the
number that it was made of.

A channel of keys, or a token of values, that has an element which is NaN or infinite is NaN as a
whole: nothing that is not finite is lost, and the others of the block do not see it.

Dimensions: P tokens of a block, D head dim.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Final, Protocol

import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["BlockFormat", "ScaledFormat", "format_of"]

# Addresses of runs are multiples of this, as those of what copies move have to be.
_ALIGNMENT: Final = 16
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
# Float32 results of a few operations are no further off, relative to the largest of their block.
_SLACK: Final = 2.0**-20
_SMALLEST: Final = 2.0**-140


def format_of(config: SpardaConfig, layer: int) -> BlockFormat:
    """Return how a layer's full blocks are written."""
    chosen = config.kv_format
    name = chosen if isinstance(chosen, str) else dict(chosen).get(layer, "model")
    found: BlockFormat = KV_FORMATS[name]
    return found


class BlockFormat(Protocol):
    """How a full block is written.

    Attributes:
        name: As in `SpardaConfig.kv_format`.
        rounds: Whether what is read is not what was written.
        kernels: Module with its Triton functions, see `kernels/gpu/packed_form.py`; None where it
            has none, and works on a CPU alone.
    """

    name: ClassVar[str]
    rounds: ClassVar[bool] = True
    kernels: ClassVar[str | None] = None

    def stored(
        self, size: int, dim: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return shape and dtype of a stored block of `size` tokens of head dim `dim`."""

    def pack(self, blocks: Tensor) -> Tensor:
        """Return blocks [..., 2, P, D], keys then values, as they are stored."""

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return stored blocks as [..., 2, P, D] of the model's dtype."""

    def bound(self, blocks: Tensor) -> Tensor:
        """Return how far each element may be off when it is read again, [..., 2, P, D] float32."""

    def num_bytes(self, size: int, dim: int, dtype: torch.dtype) -> int:
        """Return the bytes of a stored block."""
        shape, stored = self.stored(size, dim, dtype)
        return int(torch.Size(shape).numel()) * stored.itemsize


class ScaledFormat(BlockFormat):
    """A format of codes and scales.

    Attributes:
        code_bits: Of one element, 4 or 8.
        num_scales: Numbers for each channel of keys, and for each token of values.
    """

    code_bits: ClassVar[int]
    num_scales: ClassVar[int]

    @abstractmethod
    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return elements of finite `x` by which it is coded, reduced over an axis that stays."""

    @abstractmethod
    def encode(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the codes of finite float32 values, uint8, one for each element."""

    @abstractmethod
    def decode(self, codes: Tensor, scales: list[Tensor]) -> Tensor:
        """Return the values of codes, float32."""

    @abstractmethod
    def half_step(self, x: Tensor, scales: list[Tensor]) -> Tensor:
        """Return half the distance of the codes next to finite values."""

    def stored(
        self, size: int, dim: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the bytes of a run, [bytes] uint8.

        Raises:
            UnsupportedInputError: If keys and values are of a dtype without such a format.
        """
        if dtype not in _DTYPES:
            raise UnsupportedInputError(
                f"kv_format={self.name!r} is made of bfloat16, float16 or float32, and the model's "
                f"keys are {dtype}; convert the model, or use kv_format='model'."
            )
        codes = 2 * size * dim * self.code_bits // 8
        total = codes + self.num_scales * (size + dim) * dtype.itemsize
        return (-(-total // _ALIGNMENT) * _ALIGNMENT,), torch.uint8

    def pack(self, blocks: Tensor) -> Tensor:
        """Return the runs of blocks [..., 2, P, D], [..., bytes] uint8."""
        lead, (size, dim) = blocks.shape[:-3], blocks.shape[-2:]
        (total,), _ = self.stored(size, dim, blocks.dtype)
        codes, scales = [], []
        for part, axis in zip(blocks.unbind(-3), (-2, -1), strict=True):
            x, mine = self._scaled(part, axis)
            codes.append(self._join(self.encode(x, mine)).flatten(-2))
            kept = torch.stack([s.flatten(-2) for s in mine], -2).to(blocks.dtype)
            scales.append(kept.flatten(-2).contiguous().view(torch.uint8))
        run = torch.cat([*codes, *scales], -1)
        padding = run.new_zeros((*lead, total - run.shape[-1]))
        return torch.cat([run, padding], -1)

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the blocks of runs [..., bytes] uint8, [..., 2, P, D] of the model's dtype."""
        codes = size * dim * self.code_bits // 8
        widths = [self.num_scales * n * dtype.itemsize for n in (dim, size)]
        parts = stored[..., : 2 * codes + sum(widths)].split([codes, codes, *widths], -1)
        halves = []
        for half, axis in enumerate((-2, -1)):
            kept = parts[2 + half].contiguous().view(dtype).unflatten(-1, (self.num_scales, -1))
            scales = [s.unsqueeze(axis).float() for s in kept.unbind(-2)]
            each = self._split(parts[half].unflatten(-1, (-1, dim)))
            halves.append(self.decode(each, scales))
        return torch.stack(halves, -3).to(dtype)

    def bound(self, blocks: Tensor) -> Tensor:
        """Return half a step, and what rounding to the model's dtype adds; NaN where all is."""
        bounds = []
        for part, axis in zip(blocks.unbind(-3), (-2, -1), strict=True):
            x, scales = self._scaled(part, axis)
            step = self.half_step(x, scales)
            rounding = torch.finfo(blocks.dtype).eps / 2 * (x.abs() + step)
            largest = torch.stack(scales).abs().amax(0)
            smallest = torch.finfo(blocks.dtype).smallest_normal * torch.finfo(blocks.dtype).eps
            bounds.append(step + rounding + largest * _SLACK + max(smallest, _SMALLEST))
        return torch.stack(bounds, -3)

    def _scaled(self, part: Tensor, axis: int) -> tuple[Tensor, list[Tensor]]:
        """Return what is coded and the scales: 0 and NaN where something is not finite."""
        x = part.float()
        finite = x.isfinite()
        x = x.where(finite, 0.0)
        broken = ~finite.all(axis, keepdim=True)
        scales = [s.masked_fill(broken, float("nan")) for s in self.scales(x, axis)]
        return x.masked_fill(broken, 0.0), scales

    def _join(self, codes: Tensor) -> Tensor:
        """Return codes [..., P, D] as bytes: of 4 bits, those of neighbouring tokens share one."""
        if self.code_bits == 8:
            return codes
        return codes[..., 0::2, :] | codes[..., 1::2, :] << 4

    def _split(self, joined: Tensor) -> Tensor:
        if self.code_bits == 8:
            return joined
        return torch.stack([joined & 15, joined >> 4], -2).flatten(-3, -2)
