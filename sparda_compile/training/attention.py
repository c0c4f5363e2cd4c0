"""Dense causal attention of the frozen model while a Forecast is trained.

Differs from the released recipe: there attention reads the blocks that the teacher chose; here it
is dense, as the deployed prefill is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["causal_attention"]

_TILE_SCORES: Final = 1 << 26


def causal_attention(
    query_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Attend to every earlier token and to itself; memory is linear in T.

    Args:
        query_BHTD: Queries, after rotation.
        k_BGTD: Keys, after rotation; head h reads group h // (H / G).
        v_BGTD: Values.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        window: Tokens that a query sees, itself included; 0 for all.

    Returns:
        [B, H, T, D] in the dtype of the query.
    """
    num_tokens = query_BHTD.shape[2]
    if not softcap and (not window or window >= num_tokens):
        return F.scaled_dot_product_attention(
            query_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scale, enable_gqa=True
        )
    batch, heads = query_BHTD.shape[:2]
    span = min(num_tokens, window + 1024) if window else num_tokens
    step = max(16, min(1024, _TILE_SCORES // (batch * heads * span)))
    tiles = []
    for start in range(0, num_tokens, step):
        stop = min(start + step, num_tokens)
        first = max(start - window + 1, 0) if window else 0
        tiles.append(
            _tile(
                query_BHTD[:, :, start:stop],
                k_BGTD[:, :, first:stop],
                v_BGTD[:, :, first:stop],
                scale,
                softcap,
                window,
            )
        )
    return torch.cat(tiles, dim=2)


def _tile(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, window: int
) -> Tensor:
    """Attend with queries that are the last tokens of the keys."""
    num_keys, num_queries = keys.shape[2], query.shape[2]
    key_S = torch.arange(num_keys, device=query.device)
    query_Q = torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
    seen = key_S <= query_Q
    if window:
        seen &= key_S > query_Q - window
    if not softcap:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=scale, enable_gqa=True
        )
    repeat = query.shape[1] // keys.shape[1]
    k, v = (t.repeat_interleave(repeat, dim=1).float() for t in (keys, values))
    logits = softcap * torch.tanh(query.float() @ k.transpose(-1, -2) * scale / softcap)
    return (logits.masked_fill(~seen, float("-inf")).softmax(-1) @ v).to(query.dtype)
