"""Partial results of attention, (O, log-sum-exp), and what can be done with them.

    attend    o_b, lse_b = softmax(q K_b^T * scale) V_b                  of each block alone
    merge     lse = logsumexp_s lse_s ;  o = sum_s exp(lse_s - lse) o_s
    remove    r = exp(lse_n - lse) ;  o' = (o - r o_n) / (1 - r) ;  lse' = lse + log(1 - r)

A partial of nothing is (0, -inf), and so are merges of such. All is fp32. Merging in another order
changes the result by rounding alone: at most a few units of the last place of the largest partial.
Removing multiplies the error of what it is given by 1 / (1 - r): it is refused where r is more than
a limit, and the caller attends again instead.

Source: PRR (arXiv 2606.30389) section 4.3, equations 6 to 8; removal is not in the paper.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

__all__ = ["MOST_REMOVED", "block_partials", "merge", "remove"]

MOST_REMOVED: Final = 0.5
"""Share of the mass that `remove` takes out at most; what is left has twice the error then."""


def block_partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Attend to each block alone.

    Args:
        query_BH1D: Queries.
        pages: [B, G, C, 2, P, D], keys then values.
        page_ids_BGK: Page of each block, int32.
        block_ids_BGK: Blocks, int32, -1 for none.
        lengths_B: Position of the query, int32; later keys are not seen.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.

    Returns:
        [B, G, K, R, D] fp32 and [B, G, K, R] fp32; (0, -inf) where there is no block.
    """
    batch, groups, _, _, size, _ = pages.shape
    query_BGRD = query_BH1D[:, :, 0].unflatten(1, (groups, -1)).float()
    rows = torch.arange(batch, device=pages.device)[:, None, None]
    heads = torch.arange(groups, device=pages.device)[:, None]
    keys, values = pages[rows, heads, page_ids_BGK.clamp(min=0).long()].float().unbind(3)
    scores_BGKRP = query_BGRD[:, :, None] @ keys.transpose(-1, -2) * scale
    if softcap:
        scores_BGKRP = softcap * torch.tanh(scores_BGKRP / softcap)
    position = block_ids_BGK[..., None].long() * size + torch.arange(size, device=pages.device)
    seen = (block_ids_BGK[..., None] >= 0) & (position <= lengths_B.long()[:, None, None, None])
    scores_BGKRP = scores_BGKRP.masked_fill(~seen[..., None, :], float("-inf"))
    lse = scores_BGKRP.logsumexp(-1)
    weights = torch.exp(scores_BGKRP - lse.clamp(min=torch.finfo(torch.float32).min)[..., None])
    # A page of a block that is not there may hold anything, NaN too: weight 0 must win.
    return weights @ values.masked_fill(~seen[..., None], 0.0), lse


def merge(out_SRD: Tensor, lse_SR: Tensor, keep_S: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Merge partials in their order.

    Args:
        out_SRD: [..., S, R, D] fp32.
        lse_SR: [..., S, R] fp32.
        keep_S: [..., S] bool, those that count; None for all.

    Returns:
        [..., R, D] fp32 and [..., R] fp32; (0, -inf) if nothing counts.
    """
    if keep_S is not None:
        lse_SR = lse_SR.masked_fill(~keep_S[..., None], float("-inf"))
    total = lse_SR.logsumexp(-2)
    weights = torch.exp(lse_SR - total.clamp(min=torch.finfo(torch.float32).min)[..., None, :])
    # A partial that does not count may hold anything.
    parts = out_SRD.masked_fill((weights == 0.0)[..., None], 0.0)
    return (weights[..., None] * parts).sum(-3), total


def remove(
    out_RD: Tensor,
    lse_R: Tensor,
    part_out_RD: Tensor,
    part_lse_R: Tensor,
    limit: float = MOST_REMOVED,
) -> tuple[Tensor, Tensor, Tensor]:
    """Take a partial out of a merged one that it is part of.

    Args:
        out_RD: [..., R, D] fp32, of all.
        lse_R: [..., R] fp32.
        part_out_RD: [..., R, D] fp32, of what goes.
        part_lse_R: [..., R] fp32.
        limit: Share of the mass that may go; the rest keeps its precision then.

    Returns:
        [..., R, D] and [..., R] of what is left, and [..., R] bool: whether it may be used. Where
        more than the limit went, what is there is (0, -inf).
    """
    share = torch.exp(part_lse_R - lse_R.clamp(min=torch.finfo(torch.float32).min))
    fine = share <= limit
    left = torch.where(fine, 1.0 - share, 1.0)
    out = (out_RD - share[..., None] * part_out_RD) / left[..., None]
    out = torch.where(fine[..., None], out, 0.0)
    return out, torch.where(fine, lse_R + torch.log1p(-share.clamp(max=limit)), float("-inf")), fine
