"""Decode attention over the selected KV blocks, one partial result per block.

    partial over block i :  o_i, lse_i = softmax(q K_i^T * scale) V_i        fp32
    merge                :  lse = logsumexp_i lse_i ;  o = sum_i exp(lse_i - lse) o_i

Partials are always taken per block and merged in the order of the ids, so the result does not
depend on which blocks were resident when attention began: `attend_resident` then `attend_missing`
equals `sparse_attention` bit for bit. Merge formula: PRR (arXiv 2606.30389) section 4.3.

Reads K*2*P*D elements per sequence and group.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attend_missing", "attend_resident", "sparse_attention"]


def block_partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend to each selected block alone: [B, G, K, R, D] and [B, G, K, R], fp32."""
    batch, groups, _, _, size, _ = pages.shape
    query_BGRD = query_BH1D[:, :, 0].unflatten(1, (groups, -1)).float()
    index = page_ids_BGK.clamp(min=0).long()
    rows = torch.arange(batch, device=pages.device)[:, None, None]
    heads = torch.arange(groups, device=pages.device)[:, None]
    kv_BGK2PD = pages[rows, heads, index].float()
    keys, values = kv_BGK2PD.unbind(3)
    scores = query_BGRD[:, :, None] @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    offset_P = torch.arange(size, device=pages.device)
    position = block_ids_BGK[..., None].long() * size + offset_P
    seen = (block_ids_BGK[..., None] >= 0) & (position <= lengths_B.long()[:, None, None, None])
    scores = scores.masked_fill(~seen[..., None, :], float("-inf"))
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.clamp(min=torch.finfo(torch.float32).min)[..., None])
    # A page of a block that is not there may hold anything, NaN too: weight 0 must win.
    values = values.masked_fill(~seen[..., None], 0.0)
    return weights @ values, lse


def merge_partials(out_BGKRD: Tensor, lse_BGKR: Tensor) -> Tensor:
    """Merge partials in the order of the ids: [B, G, R, D] fp32."""
    total = lse_BGKR.logsumexp(2, keepdim=True)
    return (torch.exp(lse_BGKR - total)[..., None] * out_BGKRD).sum(2)


@torch.library.custom_op("sparda::sparse_attention", mutates_args=())
def sparse_attention(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend to the selected blocks, all of them resident.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D] device pages.
        page_ids: [B, G, K] int32, page of each selected block.
        block_ids: [B, G, K] int32, the blocks, -1 for none.
        lengths: [B] int32, position of the new token.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    out, lse = block_partials(query, pages, page_ids, block_ids, lengths, scale, softcap)
    return merge_partials(out, lse).flatten(1, 2)[:, :, None].to(query.dtype)


@sparse_attention.register_fake
def _(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("sparda::attend_resident", mutates_args=())
def attend_resident(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Attend to the selected blocks that are resident while the others are on their way.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D]; pages of missing blocks are not read.
        page_ids: [B, G, K] int32.
        block_ids: [B, G, K] int32.
        is_miss: [B, G, K] bool, blocks that a copy is bringing.
        lengths: [B] int32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        Partial outputs [B, G, K, R, D] fp32 and their log-sum-exps [B, G, K, R] fp32; empty
        (0, -inf) for missing blocks.
    """
    resident = block_ids.masked_fill(is_miss, -1)
    return block_partials(query, pages, page_ids, resident, lengths, scale, softcap)


@attend_resident.register_fake
def _(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    batch, groups, selected = block_ids.shape
    shape = (batch, groups, selected, query.shape[1] // groups)
    lse = query.new_empty(shape, dtype=torch.float32)
    return query.new_empty((*shape, query.shape[-1]), dtype=torch.float32), lse


@torch.library.custom_op("sparda::attend_missing", mutates_args=())
def attend_missing(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attend to the blocks that were missing and merge with the resident ones (repair).

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D].
        page_ids: [B, G, K] int32.
        block_ids: [B, G, K] int32.
        is_miss: [B, G, K] bool, blocks that had to be fetched.
        lengths: [B] int32.
        partial_out: [B, G, K, R, D] fp32, from `attend_resident`.
        partial_lse: [B, G, K, R] fp32.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    missing = block_ids.masked_fill(~is_miss, -1)
    out, lse = block_partials(query, pages, page_ids, missing, lengths, scale, softcap)
    out = torch.where(is_miss[..., None, None], out, partial_out)
    lse = torch.where(is_miss[..., None], lse, partial_lse)
    return merge_partials(out, lse).flatten(1, 2)[:, :, None].to(query.dtype)


@attend_missing.register_fake
def _(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    is_miss: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    return query.new_empty(query.shape)
