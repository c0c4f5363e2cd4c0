"""Attention mass by keys in 2 or 4 bits, quantised per channel and block when a block fills.

    span[n, d] = (max - min of block n's keys) * L / (L - 1)    L = 2^bits
    base[n, d] = min - span
    code[t, d] = floor((k[t, d] - base) * L / span - L + 1/2)   0 to L - 1
    k'[t, d]   = (1 + code / L) * span + base                   at most span / 2L away from k

    weight[h, t] = softmax_t(q_h . k'[t] * factor)              over the tokens of all full blocks
    score[g, n]  = sum_{h in g} sum_{t in n} weight[h, t]
    forecast     = log sum_{t in n} exp(f_g . k'[t] * factor)   one head: no normaliser needed

The block that is being written is read whatever its score. It has none, and no part in the
normaliser: so a score is made of what a block was when it filled, and a token of a prompt scores as
a decode step would at its position, however the prompt was cut.

The factor is a number from 1 to 2 whose mantissa begins with the code, which is how a kernel makes
it; span, base and k' are rounded to the dtype of the keys.

Source of the codes: KIVI (arXiv 2402.02750) section 3, keys quantised per channel in groups of
tokens, here a block each; it computes with them what here ranks blocks.

Dimensions: B batch, G groups, R query heads of a group, N blocks, P tokens of a block, D head dim,
C bytes that hold a channel's codes of one block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

import torch

from sparda_compile.selectors.base import Geometry, Narrowing, RowSummary, Selector, Summary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "LowBit2",
    "LowBit2Forecast",
    "LowBit4",
    "LowBit4Forecast",
    "LowBitKeys",
    "dequantize",
    "quantize",
]

_BYTE: Final = 8
# Of the keys that formats of values alone read back.
_STAYING_BITS: Final = 4


def quantize(k: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise full blocks.

    Args:
        k: [..., P, D] keys of whole blocks.
        bits: Of one code, 2 or 4.

    Returns:
        Codes [..., C, D] uint8, span and base [..., D] of the keys' dtype. Token t is in byte
        t // (8 / bits), the first one in the lowest bits. A channel that is constant, or almost,
        has span 0 and codes 0.
    """
    low, high = k.float().amin(-2), k.float().amax(-2)
    levels, largest = 2**bits, min(torch.finfo(dtype).max for dtype in (k.dtype, low.dtype))
    span = ((high - low) * (levels / (levels - 1))).clamp(max=largest).to(k.dtype)
    base = (low - span.float()).clamp(min=-largest).to(k.dtype)
    step = span.float()[..., None, :] / levels
    steps = (k.float() - base.float()[..., None, :]) / step.where(step > 0, 1.0) - levels
    codes = (steps.where(step > 0, 0.0) + 0.5).floor().clamp(0, levels - 1).int()
    per_byte = _BYTE // bits
    shifts = torch.arange(per_byte, device=k.device, dtype=torch.int32) * bits
    each = codes.unflatten(-2, (-1, per_byte)) << shifts[:, None]
    return each.sum(-2).to(torch.uint8), span, base


def dequantize(codes: Tensor, span: Tensor, base: Tensor, bits: int) -> Tensor:
    """Return k' of `quantize`'s results, [..., P, D] of their dtype."""
    shifts = torch.arange(0, _BYTE, bits, device=codes.device, dtype=torch.int32)
    each = (codes.int().unsqueeze(-2) >> shifts[:, None]) & (2**bits - 1)
    factor = 1.0 + each.flatten(-3, -2) / 2**bits
    near = factor * span.float().unsqueeze(-2) + base.float().unsqueeze(-2)
    rounded: Tensor = near.to(span.dtype)
    return rounded


class LowBitKeys(RowSummary):
    """Codes, spans and bases of the full blocks, and the keys of the block being written.

    key_codes [B, G, N, C, D] uint8       key_span, key_base [B, G, N, D]
    open_k    [B, G, P, D]                the token at position p in slot p % P

    Those names are of 4 bits. Of 2 bits they end in `_2bit`: a cache may have both, as keys that
    stay are read back from 4 bits, whatever the selector.
    """

    kernels: ClassVar[tuple[str, ...]] = ("_append_low_bit_keys",)

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"lowbit{bits}_keys"
        self.dtypes = {self._named("key_codes"): torch.uint8}  # type: ignore[misc]
        self.uncounted = frozenset({self._named("open_k")})  # type: ignore[misc]

    def _named(self, tensor: str) -> str:
        return tensor if self.bits == _STAYING_BITS else f"{tensor}_{self.bits}bit"

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes behind [B, G]."""
        blocks, size = geometry.num_blocks, geometry.block_size
        return {
            self._named("key_codes"): (blocks, size * self.bits // _BYTE, head_dim),
            self._named("key_span"): (blocks, head_dim),
            self._named("key_base"): (blocks, head_dim),
            self._named("open_k"): (size, head_dim),
        }

    def _append(
        self, tensors: Sequence[Tensor], k_BG1D: Tensor, lengths_B: Tensor, geometry: Geometry
    ) -> None:
        *stored, open_BGPD = tensors
        size = geometry.block_size
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        length_B = lengths_B.long()
        open_BGPD[rows_B, :, length_B % size] = k_BG1D[:, :, 0]
        block_B, fills_B = length_B // size, length_B % size == size - 1
        for tensor, new in zip(stored, quantize(open_BGPD, self.bits), strict=True):
            old = tensor[rows_B, :, block_B]
            fills = fills_B.view(-1, *[1] * (new.dim() - 1))
            tensor[rows_B, :, block_B] = torch.where(fills, new, old)

    def _extend_row(
        self, tensors: Sequence[Tensor], k_GTD: Tensor, length: int, geometry: Geometry
    ) -> None:
        *stored, open_GPD = tensors
        size = geometry.block_size
        keys_GSD = torch.cat([open_GPD[:, : length % size], k_GTD], dim=1)
        first, num_full = length // size, keys_GSD.shape[1] // size
        full_GNPD = keys_GSD[:, : num_full * size].unflatten(1, (num_full, size))
        if num_full:
            for tensor, new in zip(stored, quantize(full_GNPD, self.bits), strict=True):
                tensor[:, first : first + num_full] = new
        rest_GSD = keys_GSD[:, num_full * size :]
        open_GPD[:, : rest_GSD.shape[1]] = rest_GSD


class _LowBit(Narrowing):
    """Attention mass by the query."""

    kernels: ClassVar[tuple[str, ...]] = (
        "_integer_masses",
        "_low_bit_masses",
        "_low_bit_scores",
    )
    is_comparable: ClassVar[bool] = True  # shares of one attention
    scores_tokens: ClassVar[bool] = True
    bits: ClassVar[int]

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32."""
        return self.score_among(query_BHTD, tensors, lengths_B, scale, geometry, None)

    def score_among(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
        among_BGN: Tensor | None,
    ) -> Tensor:
        """Return [B, G, N] float32 of some blocks; see `Narrowing`."""
        logits_BGRNP, is_full_BN = _logits(
            query_BHTD, tensors, lengths_B, scale, geometry, self.bits
        )
        is_read_BGN = is_full_BN[:, None]
        if among_BGN is not None:
            is_read_BGN = is_read_BGN & among_BGN
        hidden = ~is_read_BGN[:, :, None, :, None]
        flat = logits_BGRNP.masked_fill(hidden, float("-inf")).flatten(-2)
        weights_BGRNP = flat.softmax(-1).view_as(logits_BGRNP)
        scores_BGN = weights_BGRNP.sum((2, 4))
        return scores_BGN.masked_fill(~is_read_BGN, float("-inf"))


class _LowBitForecast(Selector):
    """Attention mass by a predicted query, one head per group, up to a factor of its own."""

    kernels: ClassVar[tuple[str, ...]] = ("_integer_masses", "_low_bit_masses")
    settles: ClassVar[bool] = True
    scores_tokens: ClassVar[bool] = True
    bits: ClassVar[int]

    def score(
        self,
        query_BHTD: Tensor,
        tensors: Sequence[Tensor],
        lengths_B: Tensor,
        scale: float,
        geometry: Geometry,
    ) -> Tensor:
        """Return [B, G, N] float32; `query_BHTD` has H = G heads."""
        logits_BG1NP, is_full_BN = _logits(
            query_BHTD, tensors, lengths_B, scale, geometry, self.bits
        )
        scores_BGN = logits_BG1NP[:, :, 0].logsumexp(-1)
        return scores_BGN.masked_fill(~is_full_BN[:, None], float("-inf"))


class LowBit2(_LowBit):
    """Keys in 2 bits."""

    name: ClassVar[str] = "lowbit2"
    bits: ClassVar[int] = 2
    summary: ClassVar[Summary] = LowBitKeys(2)
    forecast_selector: ClassVar[str] = "lowbit2_forecast"


class LowBit4(_LowBit):
    """Keys in 4 bits."""

    name: ClassVar[str] = "lowbit4"
    bits: ClassVar[int] = 4
    summary: ClassVar[Summary] = LowBitKeys(4)
    forecast_selector: ClassVar[str] = "lowbit4_forecast"


class LowBit2Forecast(_LowBitForecast):
    """A Forecast's scores by keys in 2 bits."""

    name: ClassVar[str] = "lowbit2_forecast"
    bits: ClassVar[int] = 2
    summary: ClassVar[Summary] = LowBitKeys(2)


class LowBit4Forecast(_LowBitForecast):
    """A Forecast's scores by keys in 4 bits."""

    name: ClassVar[str] = "lowbit4_forecast"
    bits: ClassVar[int] = 4
    summary: ClassVar[Summary] = LowBitKeys(4)


def _logits(
    query_BHTD: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    bits: int,
) -> tuple[Tensor, Tensor]:
    """Return q . k' * scale, [B, G, R, N, P], and which blocks are full, [B, N] bool."""
    codes, span, base, _ = tensors
    keys_BGNPD = dequantize(codes, span, base, bits).float()
    query_BGRD = query_BHTD[:, :, 0].unflatten(1, (keys_BGNPD.shape[1], -1)).float()
    dots_BGRS = query_BGRD @ keys_BGNPD.flatten(2, 3).transpose(-1, -2)
    block_N = torch.arange(geometry.num_blocks, device=lengths_B.device)
    is_full_BN = block_N < (lengths_B // geometry.block_size)[:, None]
    return dots_BGRS.unflatten(-1, keys_BGNPD.shape[2:4]) * scale, is_full_BN
