"""Attention over a sliding window, its keys and values kept in a ring on the device.

    token at position p attends to positions p-window+1 .. p         slot of position s: s % window

Layers with a sliding window stay dense: all of the window is read, nothing is offloaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.kernels.prefill_attention import (
    masked_attention,
    real_columns,
    token_positions,
)
from sparda_compile.kernels.workspace import window_attention_bytes

__all__ = ["window_attention"]


@define(
    mutates=("ring_k", "ring_v"),
    fake=lambda a: torch.empty_like(a.query, memory_format=torch.contiguous_format),
    workspace=window_attention_bytes,
)
def window_attention(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    token_mask: Tensor | None,
    lengths: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend to the last tokens and put the new ones into the ring.

    Args:
        query: [B, H, T, D].
        k: [B, G, T, D] new keys.
        v: [B, G, T, D] new values.
        token_mask: [B, T] bool, which tokens are real; None means all, and T is 1.
        lengths: [B] int32, tokens before this step.
        ring_k: [B, G, window, D], updated.
        ring_v: [B, G, window, D], updated.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        [B, H, T, D]; zero for tokens that are not real.
    """
    window = ring_k.shape[2]
    slot_W = torch.arange(window, device=k.device)
    last_B1 = lengths.long()[:, None] - 1
    # Position of what a slot holds: the largest p <= last with p % window == slot.
    past_BW = last_B1 - (last_B1 - slot_W) % window
    new_BT = token_positions(lengths, token_mask, k.shape[2])
    out = masked_attention(
        query,
        torch.cat([ring_k, k], dim=2),
        torch.cat([ring_v, v], dim=2),
        new_BT,
        torch.cat([past_BW, new_BT], dim=1),
        scale,
        softcap,
        window,
    )
    if token_mask is None:
        rows = torch.arange(k.shape[0], device=k.device)
        slot = new_BT[:, 0] % window
        ring_k[rows, :, slot] = k[:, :, 0]
        ring_v[rows, :, slot] = v[:, :, 0]
        return out
    # As above behind this step; a slot whose position is new takes the token that stands there.
    last_B1 = last_B1 + token_mask.sum(1, keepdim=True)
    place_BW = last_B1 - (last_B1 - slot_W) % window - lengths.long()[:, None]
    column_BW = real_columns(token_mask).gather(1, place_BW.clamp(0, k.shape[2] - 1))
    for ring, new in ((ring_k, k), (ring_v, v)):
        taken = new.gather(2, column_BW[:, None, :, None].expand_as(ring))
        ring.copy_(torch.where((place_BW >= 0)[:, None, :, None], taken, ring))
    return out
