"""Block recall: how many of the blocks that the true query picks the Forecast picks too.

    truth     = top_k free blocks by sum_{h in g} softmax_j(q_h . pooled_k[j] * scale)
    guess     = top_k free blocks by f_g . pooled_k[j]
    recall    = |truth and guess| / top_k

Both as a decode step at that position would score them (`selectors/infllm2.py`, `forecast.py`):
over the windows that are complete before the token. With a selector on low-bit keys
(`selectors/lowbit.py`) both are by these, over the blocks that are full:

    truth     = top_k free blocks by sum_{h in g} sum_{t in n} softmax_t(q_h . k'[t] * scale)
    guess     = top_k free blocks by sum_{t in n} exp(f_g . k'[t] * scale)

and a Forecast of several heads for each KV head by the formula of the truth.

Free blocks are those that are not read anyway; sink, local and current blocks would be hits without
any forecast. Only queries with more than `top_k` free blocks are counted: with fewer, every choice
is right.
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
from sparda_compile.training.mass_loss import (
    block_mass,
    near_keys,
    scores_low_bit_keys,
    token_shares,
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
    forecast_BETD: Tensor,
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
        forecast_BETD: Predicted queries, after rotation, one or several (E = G * F) for each KV
            head.
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
    score = _by_low_bit_keys if scores_low_bit_keys(config) else _by_pooled_keys
    query_BHQD, forecast_BEQD = query_BHTD[:, :, position_Q], forecast_BETD[:, :, position_Q]
    blocks = score(query_BHQD, forecast_BEQD.to(k_BGTD.dtype), k_BGTD, position_Q, config, scale)
    truth, guess = (_picked(scored, position_Q, config) for scored in blocks)
    return (truth & guess).sum() / truth.sum()


def _by_pooled_keys(
    query_BHQD: Tensor,
    forecast_BGQD: Tensor,
    k_BGTD: Tensor,
    position_Q: Tensor,
    config: SpardaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the blocks' scores by the query and by the Forecast, [B, G, Q, N] each."""
    pooled_BGWD = pool_keys(k_BGTD, config)
    pool = (config.pool_size, config.pool_stride)
    starts_W = torch.arange(pooled_BGWD.shape[2], device=position_Q.device) * config.pool_stride
    absent_QW = starts_W + config.pool_size > position_Q[:, None]
    truth_BGQW = query_weights(query_BHQD, pooled_BGWD, position_Q, pool, scale)
    guess_BGQW = scores(forecast_BGQD, pooled_BGWD)
    geometry = geometry_of(config, k_BGTD.shape[2])
    truth, guess = (
        windows_to_blocks(scored.masked_fill(absent_QW, float("-inf")), geometry)
        for scored in (truth_BGQW, guess_BGQW)
    )
    return truth, guess


def _by_low_bit_keys(
    query_BHQD: Tensor,
    forecast_BEQD: Tensor,
    k_BGTD: Tensor,
    position_Q: Tensor,
    config: SpardaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the blocks' scores by the query and by the Forecast, [B, G, Q, N] each."""
    near_BGSD = near_keys(k_BGTD, config)
    free_QN = free_blocks(position_Q, config, near_BGSD.shape[2] // config.block_size)
    truth = block_mass(query_BHQD, near_BGSD, position_Q, config, scale, full_only=True)
    if forecast_BEQD.shape[1] > near_BGSD.shape[1]:
        guess = block_mass(forecast_BEQD, near_BGSD, position_Q, config, scale, full_only=True)
    else:
        guess = token_shares(forecast_BEQD, near_BGSD, free_QN, scale).sum(-1)
    return truth, guess


def _picked(blocks_BGQN: Tensor, position_Q: Tensor, config: SpardaConfig) -> Tensor:
    """Return [B, G, Q, N] bool: the `top_k` best free blocks."""
    free_QN = free_blocks(position_Q, config, blocks_BGQN.shape[-1])
    assert config.top_k is not None
    best = best_blocks(blocks_BGQN, free_QN, config.top_k)
    return torch.zeros_like(blocks_BGQN, dtype=torch.bool).scatter(-1, best, value=True)
