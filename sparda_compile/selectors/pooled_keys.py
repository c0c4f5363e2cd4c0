"""Pooled keys: the mean of every window of keys, kept incrementally.

    pooled_k[j] = mean(k[stride*j : stride*j + size])        only once all of its keys exist

Source: SparDA (arXiv 2606.04511) section 3, InfLLM-V2's compressed keys; reference constants
size 32, stride 16, post-RoPE keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.selectors.base import Geometry, RowSummary

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["PooledKeys", "existing_windows", "windows_to_blocks"]


class PooledKeys(RowSummary):
    """Two tensors: `pooled_k` [B, G, W, D] and `recent_k`, the last `size` raw keys as a ring."""

    name: ClassVar[str] = "pooled_keys"
    kernels: ClassVar[tuple[str, ...]] = ("_append_pooled_keys",)

    def shapes(self, geometry: Geometry, head_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes behind [B, G]."""
        return {
            "pooled_k": (geometry.num_windows, head_dim),
            "recent_k": (geometry.pool_size, head_dim),
        }

    def _append(
        self, tensors: Sequence[Tensor], k_BG1D: Tensor, lengths_B: Tensor, geometry: Geometry
    ) -> None:
        pooled_BGWD, recent_BGPD = tensors
        size, stride = geometry.pool_size, geometry.pool_stride
        rows_B = torch.arange(len(lengths_B), device=lengths_B.device)
        length_B = lengths_B.long()
        recent_BGPD[rows_B, :, length_B % size] = k_BG1D[:, :, 0]
        age_BP = (length_B[:, None] + 1 + torch.arange(size, device=lengths_B.device)) % size
        ordered_BPGD = recent_BGPD[rows_B[:, None], :, age_BP]
        mean_BGD = ordered_BPGD.float().mean(1).to(pooled_BGWD.dtype)
        start_B = length_B + 1 - size
        window_B = start_B.clamp(min=0) // stride
        complete_B = (start_B >= 0) & (start_B % stride == 0)
        old_BGD = pooled_BGWD[rows_B, :, window_B]
        pooled_BGWD[rows_B, :, window_B] = torch.where(complete_B[:, None, None], mean_BGD, old_BGD)

    def _extend_row(
        self, tensors: Sequence[Tensor], k_GTD: Tensor, length: int, geometry: Geometry
    ) -> None:
        pooled_GWD, recent_GPD = tensors
        size, stride = geometry.pool_size, geometry.pool_stride
        kept = min(length, size)
        past = torch.arange(length - kept, length, device=k_GTD.device) % size
        keys_GSD = torch.cat([recent_GPD[:, past], k_GTD], dim=1)
        first, total = length - kept, length + k_GTD.shape[1]
        # The next window to complete is the first one that ends after `length`.
        window = max((length - size) // stride + 1, 0)
        last = (total - size) // stride
        if total >= size and last >= window:
            tail_GSD = keys_GSD[:, window * stride - first : last * stride + size - first]
            means_GWD = tail_GSD.float().unfold(1, size, stride).mean(-1)
            pooled_GWD[:, window : last + 1] = means_GWD.to(pooled_GWD.dtype)
        newest = min(total, size)
        slots = torch.arange(total - newest, total, device=k_GTD.device) % size
        recent_GPD[:, slots] = keys_GSD[:, keys_GSD.shape[1] - newest :]


def windows_to_blocks(scores_BGW: Tensor, geometry: Geometry) -> Tensor:
    """Give each block the best score of the windows that touch it, [B, G, N].

    With the reference constants block m takes windows 4m-1 to 4m+3 (SparDA's 5/4/1 max-pool).
    """
    ratio = geometry.block_size // geometry.pool_stride
    overhang = geometry.pool_size // geometry.pool_stride - 1
    device = scores_BGW.device
    first_N = torch.arange(geometry.num_blocks, device=device) * ratio - overhang
    window_NR = first_N[:, None] + torch.arange(ratio + overhang, device=device)
    inside_NR = (window_NR >= 0) & (window_NR < scores_BGW.shape[-1])
    touching = scores_BGW[..., window_NR.clamp(0, scores_BGW.shape[-1] - 1)]
    return touching.masked_fill(~inside_NR, float("-inf")).amax(-1)


def existing_windows(lengths_B: Tensor, num_windows: int, geometry: Geometry) -> Tensor:
    """Return [B, W] bool: which windows are complete."""
    starts_W = torch.arange(num_windows, device=lengths_B.device) * geometry.pool_stride
    return starts_W + geometry.pool_size <= lengths_B[:, None]
