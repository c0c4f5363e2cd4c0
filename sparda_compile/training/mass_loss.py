"""One layer's loss where a Forecast scores low-bit keys: its blocks' mass against the attention's.

    T[g, p, n] = sum_{h in g} sum_{t in n} softmax_t(q_h[p] . k[t] * scale)      the teacher
    S[g, p, n] = sum_{t in n} softmax_t(f_g[p] . k'[t] * scale)                  t in free blocks
    loss       = sum_{g, p} KL(T over its free blocks || S) / (G * T)            mean over B

Free blocks are those that a query may choose: neither sink nor local nor current. All of them are
full, so each has low-bit keys k', as `selectors/lowbit.py` makes them. Sorted by S they are in the
order of that file's Forecast scores. Teacher `attention` has the softmax over all keys up to p, as
they are; teacher `query` has it over the low-bit keys of all full blocks, which is what the query
chooses by. The gradient reaches the Forecast alone:

    d loss / d f_g[p] = scale * sum_t S_t (1 - T[n] / S[n]) k'[t],       S_t the token's own share

Of F heads for each KV head, F > 1, the selector itself scores each as a query head, over the blocks
that are full before p. So their student is, with S over its sum on free blocks in the loss,

    s[f, p, n] = sum_{t in n} softmax_t(f_f[p] . k'[t] * scale)                  t in full blocks
    S[g, p, n] = sum_{f in g} s[f, p, n]
    a[n]       = 1 / sum_free(S) - T[n] / S[n]                                   0 if not free

    d loss / d f_f[p] = scale * sum_t softmax_t (a[n] - sum_m a[m] s[f, m]) k'[t]

With F = 1 both are the same: the normaliser of one head is no part of S over its sum.

Ours: SparDA (arXiv 2606.04511) teaches the spread over pooled keys, see `loss.py`.

Dimensions: B batch, H heads, G groups, R = H / G, F heads of a Forecast in a group, E = G * F,
T tokens, Q queries of a tile, N full blocks, P tokens of a block, S = N * P, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.registry import SELECTORS
from sparda_compile.selectors.lowbit import LowBitKeys, dequantize, quantize
from sparda_compile.training.loss import first_supervised, free_blocks
from sparda_compile.training.teacher import Backend, Teacher, is_fused, scores

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["backward_mass_loss", "block_mass", "near_keys", "scores_low_bit_keys", "token_shares"]

# Scores that are held at once, over all heads: 64 Mi of them are 256 MiB of float32, twice.
_TILE_SCORES: Final = 1 << 26
_SMALLEST: Final = 1e-20
# Of several heads, whose shares are divided by each other: the square of its inverse is finite.
_SMALLEST_OF_HEADS: Final = 1e-15


def scores_low_bit_keys(config: SpardaConfig) -> bool:
    """Return whether a Forecast of this configuration scores low-bit keys."""
    return isinstance(SELECTORS[config.selector].summary, LowBitKeys)


def near_keys(k_BGTD: Tensor, config: SpardaConfig, backend: Backend = "auto") -> Tensor:
    """Return the low-bit keys of all full blocks of a sequence, [B, G, S, D], in the keys' dtype.

    Args:
        k_BGTD: Keys, after rotation.
        config: Of a selector on low-bit keys.
        backend: `triton` is one kernel, `plain` this file, of the same bits; see `is_fused`.

    Raises:
        ConfigError: If the backend is not known.
    """
    summary = SELECTORS[config.selector].summary
    assert isinstance(summary, LowBitKeys)
    size = config.block_size
    if is_fused(backend, k_BGTD):
        from sparda_compile.training.near_keys_kernel import launch_near_keys

        return launch_near_keys(k_BGTD, size, summary.bits)
    num_full = k_BGTD.shape[2] // size
    blocks = k_BGTD[:, :, : num_full * size].unflatten(2, (num_full, size))
    return dequantize(*quantize(blocks, summary.bits), summary.bits).flatten(2, 3)


def block_mass(
    query_BHQD: Tensor,
    k_BGSD: Tensor,
    position_Q: Tensor,
    config: SpardaConfig,
    scale: float,
    *,
    softcap: float = 0.0,
    full_only: bool = False,
    seen: int = 0,
) -> Tensor:
    """Return the attention that falls on each block, summed over a group, [B, G, Q, N] float32.

    Args:
        query_BHQD: Queries at the positions, after rotation.
        k_BGSD: Keys, or low-bit keys, of the same dtype.
        position_Q: The positions, ascending.
        config: Sizes.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        full_only: Whether the softmax is over the blocks that are full before the position; else
            it is over all tokens up to it, and N counts the full blocks of `k_BGSD` all the same.
        seen: Whole blocks of tokens before the first position, which need no mask; 0 will do.
    """
    groups, num_tokens = k_BGSD.shape[1:3]
    size = config.block_size
    num_full = num_tokens // size
    query_BGMD = query_BHQD.unflatten(1, (groups, -1)).flatten(2, 3)
    logits = scores(query_BGMD, k_BGSD).mul_(scale).unflatten(2, (-1, len(position_Q)))
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    token_S = torch.arange(seen * size, num_tokens, device=logits.device)
    end_Q = position_Q // size * size if full_only else position_Q + 1
    hidden_QS = token_S >= end_Q[:, None]
    logits[..., seen * size :].masked_fill_(hidden_QS, float("-inf"))
    weights_BGRQS = logits.softmax(-1)
    of_blocks = weights_BGRQS[..., : num_full * size].unflatten(-1, (num_full, size))
    mass: Tensor = of_blocks.sum(-1).sum(2)
    if full_only:
        # Before the first full block there is nothing to weigh, and the softmax has no number.
        mass.masked_fill_((end_Q < size)[:, None], 0.0)
    return mass


def token_shares(
    forecast_BGQD: Tensor,
    near_BGSD: Tensor,
    free_QN: Tensor,
    scale: float,
    free: range = range(0),
) -> Tensor:
    """Return the Forecast's softmax over the tokens of free blocks, [B, G, Q, N, P] float32.

    A query without a free block has NaN.

    Args:
        forecast_BGQD: Predicted queries, of the dtype of the keys.
        near_BGSD: Low-bit keys of the first N blocks.
        free_QN: Bool: which blocks each query may choose.
        scale: Factor on f . k'.
        free: Blocks that every query may choose, which need no mask; none will do.
    """
    logits_BGQS = scores(forecast_BGQD, near_BGSD).mul_(scale)
    logits = logits_BGQS.unflatten(-1, (free_QN.shape[1], -1))
    for part in (slice(0, free.start), slice(max(free.stop, free.start), None)):
        logits[..., part, :].masked_fill_(~free_QN[:, part, None], float("-inf"))
    shares: Tensor = logits.flatten(-2).softmax(-1).view_as(logits)
    return shares


def backward_mass_loss(
    forecast_BETD: Tensor,
    query_BHTD: Tensor,
    k_BGTD: Tensor,
    config: SpardaConfig,
    scale: float,
    *,
    softcap: float = 0.0,
    weight: float = 1.0,
    last_tokens: int | None = None,
    teacher: Teacher = "attention",
    backend: Backend = "auto",
) -> Tensor:
    """Compute the loss of one layer and send its gradient into the Forecast at once.

    Works in ranges of queries, so that memory is linear in T.

    Args:
        forecast_BETD: Predicted queries, after rotation, E = G or several for each KV head; if they
            need no gradient, only the loss is computed.
        query_BHTD: The layer's true queries, after rotation.
        k_BGTD: Its keys, after rotation.
        config: Of a selector on low-bit keys.
        scale: Factor on q . k of the model.
        softcap: Soft cap on the scores, 0.0 for none.
        weight: Factor on the gradient, not on what is returned.
        last_tokens: Queries to learn from, at the end of each sequence; None is all. The loss is
            the mean over them.
        teacher: What to learn: `attention` or `query`.
        backend: `triton` fuses all of it, `plain` is this file; see `is_fused`.

    Returns:
        The loss, a float32 scalar in nats without a graph.

    Raises:
        ConfigError: If the backend is not known, or the fused loss does not take the head dim.
    """
    forecast, query_BHTD, k_BGTD = forecast_BETD.detach(), query_BHTD.detach(), k_BGTD.detach()
    batch, groups, num_tokens, _ = k_BGTD.shape
    counted = min(last_tokens or num_tokens, num_tokens)
    near_BGSD = near_keys(k_BGTD, config, backend)
    is_query = teacher == "query"
    keys = (near_BGSD if is_query else k_BGTD, near_BGSD)
    gradient = forecast.new_zeros(forecast.shape) if forecast_BETD.requires_grad else None
    mean = 1.0 / (counted * batch * groups)
    push = None if gradient is None else (gradient, mean * weight)
    queries = range(max(first_supervised(config), num_tokens - counted), num_tokens)
    loss_of = _plain_loss
    if is_fused(backend, k_BGTD):
        from sparda_compile.training.mass_loss_kernel import launch_mass_loss

        loss_of = launch_mass_loss
    softcap = 0.0 if is_query else softcap
    total = loss_of(
        forecast, query_BHTD, keys, queries, config, scale, softcap, full_only=is_query, push=push
    )
    if gradient is not None:
        forecast_BETD.backward(gradient)
    return total * mean


def _plain_loss(
    forecast_BETD: Tensor,
    query_BHTD: Tensor,
    keys: tuple[Tensor, Tensor],
    queries: range,
    config: SpardaConfig,
    scale: float,
    softcap: float,
    *,
    full_only: bool,
    push: tuple[Tensor, float] | None,
) -> Tensor:
    """Do what `launch_mass_loss` says in plain PyTorch, in tiles of queries."""
    taught_BGSD, near_BGSD = keys
    batch, heads, num_tokens = query_BHTD.shape[:3]
    total = torch.zeros((), dtype=torch.float32, device=near_BGSD.device)
    step = max(1, min(1024, _TILE_SCORES // max(batch * heads * num_tokens, 1)))
    for start in range(queries.start, queries.stop, step):
        stop = min(start + step, queries.stop)
        position_Q = torch.arange(start, stop, device=near_BGSD.device)
        # Tokens up to the last query: the full blocks of these hold every free block.
        seen = stop // config.block_size * config.block_size if full_only else stop
        target_BGQN = block_mass(
            query_BHTD[:, :, start:stop],
            taught_BGSD[:, :, :seen],
            position_Q,
            config,
            scale,
            softcap=softcap,
            full_only=full_only,
            seen=start // config.block_size,
        )
        forecast_BEQD = forecast_BETD[:, :, start:stop]
        loss, part = _tile(forecast_BEQD, near_BGSD, target_BGQN, range(start, stop), config, scale)
        total += loss
        if push is not None:
            gradient, factor = push
            gradient[:, :, start:stop] = part * factor
    return total


def _tile(
    forecast_BEQD: Tensor,
    near_BGSD: Tensor,
    mass_BGQN: Tensor,
    queries: range,
    config: SpardaConfig,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return the divergence of some queries, summed, and its gradient, [B, E, Q, D] float32."""
    num_blocks = mass_BGQN.shape[-1]
    position_Q = torch.arange(queries.start, queries.stop, device=near_BGSD.device)
    free_QN = free_blocks(position_Q, config, num_blocks)
    near = near_BGSD[:, :, : num_blocks * config.block_size]
    target = mass_BGQN.masked_fill(~free_QN, 0.0)
    target /= target.sum(-1, keepdim=True).clamp(min=_SMALLEST)
    if forecast_BEQD.shape[1] > near.shape[1]:
        student, pushed = _several_heads(forecast_BEQD, near, target, free_QN, queries, scale)
    else:
        current = queries.start // config.block_size
        free = range(config.sink_blocks, current - config.local_blocks)
        shares = token_shares(forecast_BEQD, near, free_QN, scale, free)
        student = shares.sum(-1).clamp(min=_SMALLEST)
        pushed = shares.mul_((1.0 - target / student)[..., None]).flatten(-2)
    surprise = target.clamp(min=_SMALLEST).log() - student.log()
    loss = (target * surprise).sum()
    gradient = scores(pushed.to(near.dtype), near.transpose(-1, -2)) * scale
    return loss, gradient.view(forecast_BEQD.shape)


def _several_heads(
    forecast_BEQD: Tensor,
    near_BGSD: Tensor,
    target_BGQN: Tensor,
    free_QN: Tensor,
    queries: range,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return S over its sum on free blocks, [B, G, Q, N], and the gradient of the logits.

    That is [B, G, F * Q, S]. A query without a full block has NaN.
    """
    groups, num_blocks = near_BGSD.shape[1], free_QN.shape[1]
    size = near_BGSD.shape[2] // num_blocks
    forecast_BGMD = forecast_BEQD.unflatten(1, (groups, -1)).flatten(2, 3)
    logits_BGMS = scores(forecast_BGMD, near_BGSD).mul_(scale)
    logits = logits_BGMS.unflatten(2, (-1, len(queries)))
    full_Q1 = torch.arange(queries.start, queries.stop, device=logits.device)[:, None] // size
    block_S = torch.arange(num_blocks * size, device=logits.device) // size
    weights_BGFQS = logits.masked_fill_(block_S >= full_Q1, float("-inf")).softmax(-1)
    weights = weights_BGFQS.unflatten(-1, (num_blocks, size))
    shares_BGFQN = weights.sum(-1)
    free_BGQN = shares_BGFQN.sum(2).masked_fill(~free_QN, 0.0)
    total = free_BGQN.sum(-1, keepdim=True).clamp(min=_SMALLEST_OF_HEADS)
    student = (free_BGQN / total).clamp(min=_SMALLEST_OF_HEADS)
    push = ((1.0 - target_BGQN / student) / total).masked_fill(~free_QN, 0.0)[:, :, None]
    own = (push * shares_BGFQN).sum(-1, keepdim=True)
    pushed = weights.mul_((push - own)[..., None])
    return student, pushed.flatten(-2).flatten(2, 3)
