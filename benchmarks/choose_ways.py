"""Ways to choose the KV blocks that a token reads, which `choose_text.py` compares.

Dimensions: L layers, G KV heads, R query heads of a group, T scored tokens, S all tokens, N blocks,
P tokens of a block, D head dim.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch.nn import functional as F

from sparda_compile.selectors.base import Geometry
from sparda_compile.selectors.pooled_keys import existing_windows, windows_to_blocks

BLOCK = 64
SINK_TOKENS = 64
LOCAL_TOKENS = 128
SHARES = (0.1, 0.25)
NEVER = float("-inf")


@dataclasses.dataclass(frozen=True)
class Step:
    """What a layer's choice is made from: q [G, R, T, D], k and v [G, S, D], positions [T]."""

    layer: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor
    block: int = BLOCK

    @property
    def num_blocks(self):
        return -(-self.k.shape[1] // self.block)

    def masses(self, k, *, full_only=True, kept=None):
        """Return the softmax weights of keys [G, S, D] in blocks, [G, R, T, N, P].

        As a decode step has them: before its own key, and of low-bit keys those of full blocks.
        With `kept` [G, T, N] as if there were no other blocks.
        """
        end = self.positions // self.block * self.block if full_only else self.positions
        unseen = torch.arange(k.shape[1]) >= end[:, None]
        if kept is not None:
            kept = kept.repeat_interleave(self.block, -1)[..., : k.shape[1]]
            unseen = (unseen | ~kept)[:, None]
        logits = torch.einsum("grtd,gsd->grts", self.q * k.shape[-1] ** -0.5, k)
        weights = logits.masked_fill_(unseen, NEVER).softmax(-1)
        missing = self.num_blocks * self.block - k.shape[1]
        return (F.pad(weights, (0, missing)) if missing else weights).unflatten(
            -1, (-1, self.block)
        )


def rounded(k, bits, block=BLOCK):
    """Return keys [G, S, D] in so many bits, per channel and block; bits may be [G]."""
    levels = 2 ** torch.as_tensor(bits).view(-1, 1, 1, 1) - 1
    full = F.pad(k, (0, 0, 0, -k.shape[1] % block)).unflatten(1, (-1, block))
    low, high = full.amin(2, keepdim=True), full.amax(2, keepdim=True)
    step = (high - low).clamp(min=1e-6) / levels
    return (((full - low) / step).round() * step + low).flatten(1, 2)[:, : k.shape[1]]


def oracle(step, _):
    return step.masses(step.k, full_only=False).sum((1, 4))


def infllm2(step, _):
    geometry = Geometry(step.num_blocks, step.block, 32, 16)
    pooled = step.k.unfold(1, 32, 16).mean(-1)
    logits = torch.einsum("grtd,gwd->grtw", step.q, pooled) * step.k.shape[-1] ** -0.5
    there = existing_windows(step.positions, pooled.shape[1], geometry)
    scores = logits.masked_fill(~there, NEVER).softmax(-1).sum(1).masked_fill(~there, NEVER)
    lacking = geometry.num_windows - pooled.shape[1]
    return windows_to_blocks(F.pad(scores, (0, max(lacking, 0)), value=NEVER), geometry)


def low_bit(bits, scale_block=None):
    def score(step, _):
        return step.masses(rounded(step.k, bits, scale_block or step.block)).sum((1, 4))

    return score


def mixed(name):
    def score(step, tuned):
        return step.masses(rounded(step.k, tuned[name][step.layer])).sum((1, 4))

    return score


def among(factor, bits):
    """Low-bit mass among the best `factor` times K blocks of infllm2."""

    def score(step, tuned):
        first = infllm2(step, tuned).masked_fill(~may_choose(step), NEVER)
        best = first.topk(min(factor * tuned["num_chosen"], first.shape[-1]), -1).indices
        kept = torch.zeros_like(first, dtype=torch.bool).scatter_(-1, best, True)
        return low_bit(bits)(step, tuned).masked_fill(~kept, NEVER)

    return score


def among_mean(factor, bits):
    """Low-bit mass among the best blocks of one query, the mean of the group's, by the same keys.

    `factor` times K of them, and those that are read anyway, as if there were no others.
    """

    def score(step, tuned):
        keys = rounded(step.k, bits)
        logits = torch.einsum("gtd,gsd->gts", step.q.mean(1) * keys.shape[-1] ** -0.5, keys)
        logits = F.pad(logits, (0, -keys.shape[1] % step.block), value=NEVER)
        first = logits.unflatten(-1, (-1, step.block)).logsumexp(-1)
        first = first.masked_fill(~may_choose(step), NEVER)
        best = first.topk(min(math.ceil(factor * tuned["num_chosen"]), first.shape[-1]), -1).indices
        named = torch.zeros_like(first, dtype=torch.bool).scatter_(-1, best, True)
        mass = step.masses(keys, kept=named | always_read(step)).sum((1, 4))
        return mass.masked_fill(~named, NEVER)

    return score


def with_values(bits, *, by_token):
    """Mass times the norms of the values: of each token, or their mean over the block."""

    def score(step, _):
        norms = F.pad(step.v.norm(dim=-1), (0, -step.v.shape[1] % step.block))
        norms = norms.unflatten(-1, (-1, step.block))
        keys, full_only = (step.k, False) if bits is None else (rounded(step.k, bits), True)
        mass = step.masses(keys, full_only=full_only).sum(1)
        if by_token:
            return (mass * norms[:, None]).sum(-1)
        return mass.sum(-1) * norms.mean(-1)[:, None]

    return score


def by_head(bits, combine):
    """Scores of a group's heads as one: the largest, or the mean of ranks."""

    def score(step, _):
        each = step.masses(rounded(step.k, bits)).sum(-1).masked_fill(~may_choose(step), 0.0)
        if combine == "max":
            return each.amax(1)
        return each.argsort(-1).argsort(-1).float().mean(1)

    return score


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to choose, and the shares of the blocks at which it is measured.

    `budgets` names those of `calibrate`; None is the same K everywhere.
    """

    score: object
    block: int = BLOCK
    budgets: str | None = None
    shares: tuple = SHARES


LOW = SHARES[:1]
METHODS = {
    "oracle": Method(oracle),
    "infllm2": Method(infllm2),
    "lowbit2": Method(low_bit(2)),
    "lowbit4": Method(low_bit(4)),
    "lowbit3": Method(low_bit(3), shares=LOW),
    "mixed 1 and 4 bits, mean 2": Method(mixed("bits_1_4")),
    "mixed 2 and 4 bits, mean 3": Method(mixed("bits_2_4"), shares=LOW),
    "lowbit2 among 2 K of infllm2": Method(among(2, 2)),
    "lowbit2 among 3 K of infllm2": Method(among(3, 2), shares=LOW),
    "lowbit2 among 1 K of the mean query": Method(among_mean(1, 2)),
    "lowbit2 among 2 K of the mean query": Method(among_mean(2, 2)),
    "lowbit2 among 3 K of the mean query": Method(among_mean(3, 2)),
    "lowbit2 among 4 K of the mean query": Method(among_mean(4, 2)),
    "lowbit2 x mean norm of values": Method(with_values(2, by_token=False), shares=LOW),
    "lowbit2 x norm of each value": Method(with_values(2, by_token=True)),
    "lowbit2, largest head": Method(by_head(2, "max")),
    "lowbit2, mean of ranks": Method(by_head(2, "rank"), shares=LOW),
    "lowbit2, K by layer": Method(low_bit(2), budgets="by_layer"),
    "lowbit2, K by layer and head": Method(low_bit(2), budgets="by_head"),
    "infllm2, K by layer and head": Method(infllm2, budgets="by_head"),
    "oracle, K by layer and head": Method(oracle, budgets="by_head", shares=LOW),
    "infllm2, blocks of 32": Method(infllm2, 32),
    "infllm2, blocks of 16": Method(infllm2, 16, shares=LOW),
    "lowbit2, blocks of 32": Method(low_bit(2), 32),
    "lowbit2, blocks of 16": Method(low_bit(2), 16, shares=LOW),
    "lowbit2, blocks of 16, scales of 64": Method(low_bit(2, 64), 16, shares=LOW),
}


def always_read(step):
    """Return [T, N] bool: sink, local and current blocks."""
    first = torch.arange(step.num_blocks)
    current = step.positions[:, None] // step.block
    is_sink = first < SINK_TOKENS // step.block
    return (is_sink | (first >= current - LOCAL_TOKENS // step.block)) & (first <= current)


def may_choose(step):
    """Return [T, N] bool: blocks that are there and are not read anyway."""
    there = torch.arange(step.num_blocks) <= step.positions[:, None] // step.block
    return there & ~always_read(step)


def choose(step, scores, num_GL):
    """Return [G, T, N] bool: what is read, `num_GL` [G] of it by score."""
    free = scores.masked_fill(~may_choose(step), NEVER)
    order = free.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        -1, order, torch.arange(free.shape[-1]).expand_as(order).contiguous()
    )
    chosen = (ranks < num_GL[:, None, None]) & (free > NEVER)
    return chosen | always_read(step)
