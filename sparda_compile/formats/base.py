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

from sparda_compile.checks import AUTO
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = [
    "STAYING_KEYS",
    "BlockFormat",
    "ScaledFormat",
    "aligned",
    "allowed_error",
    "check_dtype",
    "format_of",
    "padded",
]

# Addresses of runs are multiples of this, as those of what copies move have to be.
_ALIGNMENT: Final = 16
# What keys that stay are read back from: state of a layer, and arguments of ops.
STAYING_KEYS: Final = ("key_codes", "key_span", "key_base")
# What `auto` allows where it says nothing.
_AUTO_PERCENT: Final = 3.0
_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
# Float32 results of a few operations are no further off, relative to the largest of their block.
_SLACK: Final = 2.0**-20
_SMALLEST: Final = 2.0**-140


def aligned(num_bytes: int) -> int:
    """Return the length of a run that holds so many bytes."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def padded(run: Tensor, total: int) -> Tensor:
    """Return runs [..., bytes] uint8 with zeros up to a length."""
    return torch.cat([run, run.new_zeros((*run.shape[:-1], total - run.shape[-1]))], -1)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Refuse keys and values that a format which rounds cannot be made of.

    Raises:
        UnsupportedInputError: If they are of another dtype.
    """
    if dtype not in _DTYPES:
        raise UnsupportedInputError(
            f"kv_format={name!r} is made of bfloat16, float16 or float32, and the model's "
            f"keys are {dtype}; convert the model, or use kv_format='model'."
        )


def allowed_error(chosen: object) -> float | None:
    """Return the error that `auto` or `auto:PERCENT` allows, as a share; None for other formats."""
    if not isinstance(chosen, str) or chosen.partition(":")[0] != AUTO:
        return None
    return float(chosen.partition(":")[2] or _AUTO_PERCENT) / 100.0


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
        error: RMS of the error of normal numbers in bfloat16, over theirs; `auto` goes by it.
        summary: Name of the summary, of a selector, from which a block's keys are read back; None
            where they are stored.
    """

    name: ClassVar[str]
    rounds: ClassVar[bool] = True
    kernels: ClassVar[str | None] = None
    error: ClassVar[float] = 1.0
    summary: ClassVar[str | None] = None

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

    def read(
        self, stored: Tensor, keys: Sequence[Tensor], size: int, dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Return stored blocks as [..., 2, P, D] of the model's dtype.

        Args:
            stored: As `pack` returns them.
            keys: What `summary` holds of these blocks: codes, span and base, leading dimensions as
                those of `stored`. Empty where keys are stored.
            size: P, tokens of a block.
            dim: D.
            dtype: Of the model.
        """
        del keys
        return self.unpack(stored, size, dim, dtype)

    def rounded(self, blocks: Tensor) -> Tensor:
        """Return blocks [..., 2, P, D] as they are when they are read again."""
        size, dim = blocks.shape[-2:]
        return self.unpack(self.pack(blocks), size, dim, blocks.dtype)

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
    num_scales: ClassVar[tuple[int, int]]

    @abstractmethod
    def scales(self, x: Tensor, axis: int) -> list[Tensor]:
        """Return elements of finite `x` by which it is coded, reduced over an axis that stays.

        The axis is -2 for keys and -1 for values.
        """

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
        check_dtype(self.name, dtype)
        codes = 2 * size * dim * self.code_bits // 8
        of_keys, of_values = self.num_scales
        total = codes + (of_keys * dim + of_values * size) * dtype.itemsize
        return (aligned(total),), torch.uint8

    def pack(self, blocks: Tensor) -> Tensor:
        """Return the runs of blocks [..., 2, P, D], [..., bytes] uint8."""
        size, dim = blocks.shape[-2:]
        (total,), _ = self.stored(size, dim, blocks.dtype)
        k, v = blocks.unbind(-3)
        halves = (self.pack_half(k, -2), self.pack_half(v, -1))
        run = torch.cat([part for parts in zip(*halves, strict=True) for part in parts], -1)
        return padded(run, total)

    def pack_half(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Return the bytes of codes and of scales of keys or values [..., P, D]; uint8 both.

        Args:
            x: The numbers.
            axis: Along which a line is coded: -2 tokens, -1 channels.
        """
        finite, scales = self._scaled(x, axis)
        kept = torch.stack([s.flatten(-2) for s in scales], -2).to(x.dtype)
        codes = self._join(self.encode(finite, scales)).flatten(-2)
        return codes, kept.flatten(-2).contiguous().view(torch.uint8)

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the blocks of runs [..., bytes] uint8, [..., 2, P, D] of the model's dtype."""
        codes = size * dim * self.code_bits // 8
        lines = zip(self.num_scales, (dim, size), strict=True)
        widths = [each * n * dtype.itemsize for each, n in lines]
        parts = stored[..., : 2 * codes + sum(widths)].split([codes, codes, *widths], -1)
        halves = [
            self.unpack_half(parts[half], parts[2 + half], axis, dim, dtype)
            for half, axis in enumerate((-2, -1))
        ]
        return torch.stack(halves, -3)

    def unpack_half(
        self, codes: Tensor, scales: Tensor, axis: int, dim: int, dtype: torch.dtype
    ) -> Tensor:
        """Return the keys or values [..., P, D] of what `pack_half` returned.

        Args:
            codes: [..., bytes] uint8.
            scales: [..., bytes] uint8.
            axis: As there.
            dim: D.
            dtype: Of the model.
        """
        num_scales = self.num_scales[0 if axis == -2 else 1]
        kept = scales.contiguous().view(dtype).unflatten(-1, (num_scales, -1))
        lines = [s.unsqueeze(axis).float() for s in kept.unbind(-2)]
        return self.decode(self._split(codes.unflatten(-1, (-1, dim))), lines).to(dtype)

    def bound(self, blocks: Tensor) -> Tensor:
        """Return half a step, and what rounding to the model's dtype adds; NaN where all is."""
        k, v = blocks.unbind(-3)
        return torch.stack([self.bound_half(k, -2), self.bound_half(v, -1)], -3)

    def bound_half(self, part: Tensor, axis: int) -> Tensor:
        """Return that of keys or values [..., P, D], float32; `axis` as for `pack_half`."""
        x, scales = self._scaled(part, axis)
        step = self.half_step(x, scales)
        info = torch.finfo(part.dtype)
        rounding = info.eps / 2 * (x.abs() + step)
        largest = torch.stack(scales).abs().amax(0)
        return step + rounding + largest * _SLACK + max(info.smallest_normal * info.eps, _SMALLEST)

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
