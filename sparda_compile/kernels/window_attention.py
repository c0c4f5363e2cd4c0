"""Attention over a sliding window, its keys and values kept in a ring on the device.

    token at position p attends to positions p-window+1 .. p         slot of position s: s % window

Layers with a sliding window stay dense: all of the window is read, nothing is offloaded. Many new
tokens are read in bands of `WINDOW_TOKENS`, each against the keys within its reach alone:

    time      O(T * (window + WINDOW_TOKENS))      memory beside results      O(window)
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.kernels.prefill_attention import masked_attention, real_columns
from sparda_compile.kernels.workspace import WINDOW_TOKENS, window_attention_bytes

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
    rings, new, factors = (ring_k, ring_v), (k, v), (scale, softcap)
    if token_mask is None:
        return _step(query, new, lengths, rings, factors)
    column_BT = real_columns(token_mask)
    out = _in_bands(query, new, (column_BT, token_mask.sum(1)), lengths, rings, factors)
    window = ring_k.shape[2]
    last_B1 = (lengths.long() + token_mask.sum(1))[:, None] - 1
    # A slot whose position is new takes the token that stands there.
    place_BW = _held(last_B1, window) - lengths.long()[:, None]
    column_BW = column_BT.gather(1, place_BW.clamp(0, k.shape[2] - 1))
    for ring, tensor in zip(rings, new, strict=True):
        taken = _columns(tensor, column_BW)
        ring.copy_(torch.where((place_BW >= 0)[:, None, :, None], taken, ring))
    return out


def _held(last_B1: Tensor, window: int) -> Tensor:
    """Return the position that each slot holds: the largest p <= last with p % window == slot."""
    return last_B1 - (last_B1 - torch.arange(window, device=last_B1.device)) % window


def _columns(tensor_BHTD: Tensor, column_BS: Tensor) -> Tensor:
    """Return some tokens of each sequence, [B, H, S, D]."""
    batch, heads, _, dim = tensor_BHTD.shape
    shape = (batch, heads, column_BS.shape[1], dim)
    return tensor_BHTD.gather(2, column_BS[:, None, :, None].expand(shape))


def _step(
    query_BH1D: Tensor,
    new: tuple[Tensor, Tensor],
    lengths: Tensor,
    rings: tuple[Tensor, Tensor],
    factors: tuple[float, float],
) -> Tensor:
    """Attend for one token of each sequence, and put it into the ring."""
    window = rings[0].shape[2]
    position_B1 = lengths.long()[:, None]
    keys, values = (torch.cat(pair, dim=2) for pair in zip(rings, new, strict=True))
    positions = torch.cat([_held(position_B1 - 1, window), position_B1], dim=1)
    out = masked_attention(query_BH1D, keys, values, position_B1, positions, *factors, window)
    rows = torch.arange(len(lengths), device=lengths.device)
    for ring, tensor in zip(rings, new, strict=True):
        ring[rows, :, position_B1[:, 0] % window] = tensor[:, :, 0]
    return out


def _in_bands(
    query_BHTD: Tensor,
    new: tuple[Tensor, Tensor],
    real: tuple[Tensor, Tensor],
    lengths: Tensor,
    rings: tuple[Tensor, Tensor],
    factors: tuple[float, float],
) -> Tensor:
    """Attend for many tokens, some at a time.

    Counted from the first new token, in the order of positions, the tokens of a band from `first`
    to `end` reach those from first - window + 1 to end - 1. Those below 0 are in the ring.

    Args:
        query_BHTD: Queries.
        new: [B, G, T, D] new keys and values.
        real: The columns of the real tokens in order and then the others, [B, T] int64, and how
            many are real, [B] int64.
        lengths: [B] int32, tokens before these.
        rings: Keys and values of the past.
        factors: Factor on q . k, and soft cap on the scores, 0.0 for none.
    """
    (column_BT, num_real), window = real, rings[0].shape[2]
    length_B1, num_tokens = lengths.long()[:, None], query_BHTD.shape[2]
    # The ring by position: the oldest token first.
    slot_BW = (length_B1 + torch.arange(window, device=lengths.device)) % window
    past = [_columns(ring, slot_BW) for ring in rings]
    out = torch.empty_like(query_BHTD, memory_format=torch.contiguous_format)
    for first in range(0, num_tokens, WINDOW_TOKENS):
        end = min(first + WINDOW_TOKENS, num_tokens)
        begin, num_past = max(first + 1 - window, 0), max(window - first - 1, 0)
        near_BS = column_BT[:, begin:end]
        keys, values = (
            torch.cat([old[:, :, window - num_past :], _columns(tensor, near_BS)], dim=2)
            for old, tensor in zip(past, new, strict=True)
        )
        rank_S = torch.arange(begin - num_past, end, device=lengths.device)
        position_BS = (length_B1 + rank_S).where(rank_S < num_real[:, None], -1)
        column_Bt, position_Bt = column_BT[:, first:end], position_BS[:, first - end :]
        query = _columns(query_BHTD, column_Bt)
        out.scatter_(
            2,
            column_Bt[:, None, :, None].expand_as(query),
            masked_attention(query, keys, values, position_Bt, position_BS, *factors, window),
        )
    return out
