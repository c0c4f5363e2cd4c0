"""Block recall: how many of the blocks that the true query picks the Forecast picks too.

    truth     = top_k free blocks by sum_{h in g} softmax_j(q_h . pooled_k[j] * scale)
    guess     = top_k free blocks by f_g . pooled_k[j]
    recall    = |truth and guess| / top_k

Both as a decode step at that position would score them (`selectors/infllm2.py`, `forecast.py`):
over the windows that are complete before the token. Free blocks are those that are not read
anyway; sink, local and current blocks would be hits without any forecast. Only queries with more
than `top_k` free blocks are counted: with fewer, every choice is right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.selectors.pooled_keys import windows_to_blocks
from sparda_compile.training.loss import (
    best_blocks,
    first_supervised,
    free_blocks,
    geometry_of,
    pool_keys,
)
from sparda_compile.training.teacher import query_weights, scores

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["block_recall", "first_choice"]


def first_choice(config: SpardaConfig) -> int:
    """Return the first position with more free blocks than `top_k`."""
    assert config.top_k is not None
    return first_supervised(config) + config.top_k * config.block_size


@torch.no_grad()
def block_recall(
    forecast_BGTD: Tensor,
    query_BHTD: Tensor,
    k_BGTD: Tensor,
    config: SpardaConfig,
    scale: float,
    num_queries: int,
    *,
    last_tokens: int | None = None,
) -> Tensor:
    """Return the mean recall over some queries, a float32 scalar from 0 to 1.

    Args:
        forecast_BGTD: Predicted queries, after rotation.
        query_BHTD: The layer's true queries, after rotation.
        k_BGTD: Its keys, after rotation.
        config: Sizes of blocks and windows; `top_k` is a number.
        scale: Factor on q . k of the model.
        num_queries: Positions to look at, evenly spread.
        last_tokens: At the end of each sequence, among which they are; None is all.

    Returns:
        NaN if no position has a choice, or `top_k` is 0.
    """
    num_tokens = k_BGTD.shape[2]
    first = max(first_choice(config), num_tokens - (last_tokens or num_tokens))
    if first >= num_tokens or not config.top_k or num_queries < 1:
        return torch.full((), float("nan"), device=k_BGTD.device)
    count = min(num_queries, num_tokens - first)
    steps = torch.arange(count, device=k_BGTD.device)
    position_Q = first + steps * (num_tokens - first) // count
    pooled_BGWD = pool_keys(k_BGTD, config)
    pool = (config.pool_size, config.pool_stride)
    starts_W = torch.arange(pooled_BGWD.shape[2], device=position_Q.device) * config.pool_stride
    absent_QW = starts_W + config.pool_size > position_Q[:, None]
    truth_BGQW = query_weights(query_BHTD[:, :, position_Q], pooled_BGWD, position_Q, pool, scale)
    guess_BGQW = scores(forecast_BGTD[:, :, position_Q].to(pooled_BGWD.dtype), pooled_BGWD)
    truth, guess = (
        _picked(scored.masked_fill(absent_QW, float("-inf")), position_Q, config, num_tokens)
        for scored in (truth_BGQW, guess_BGQW)
    )
    return (truth & guess).sum() / truth.sum()


def _picked(
    scores_BGQW: Tensor, position_Q: Tensor, config: SpardaConfig, num_tokens: int
) -> Tensor:
    """Return [B, G, Q, N] bool: the `top_k` best free blocks."""
    geometry = geometry_of(config, num_tokens)
    free_QN = free_blocks(position_Q, config, geometry.num_blocks)
    blocks = windows_to_blocks(scores_BGQW, geometry)
    assert config.top_k is not None
    best = best_blocks(blocks, free_QN, config.top_k)
    return torch.zeros_like(blocks, dtype=torch.bool).scatter(-1, best, value=True)
