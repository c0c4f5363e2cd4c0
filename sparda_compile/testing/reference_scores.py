"""How the reference scores blocks: every selector written a second time, from its formula.

Scores are recomputed from the keys of all tokens, block by block; nothing of the library is used.

Legend: R query heads of a group, D head size, P tokens of a block, L = 2^bits levels of a code.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = [
    "ReferenceMode",
    "ReferenceSelector",
    "Rules",
    "block_scores",
    "pooled_keys",
    "window_to_block_scores",
]

ReferenceMode = Literal["dense", "query", "exact", "speculate", "forecast"]
ReferenceSelector = Literal["infllm2", "quest", "nosa", "lowbit2", "lowbit4"]
_BITS: Final = {"lowbit2": 2, "lowbit4": 4}
_NEVER: Final = float("-inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """How blocks are scored and how many are kept; fields as in `reference_decode`."""

    mode: ReferenceMode
    selector: ReferenceSelector
    top_k: int | None
    sink_blocks: int
    local_blocks: int
    block_size: int
    pool_size: int
    pool_stride: int
    short_list: int = 23
    is_prompt_sparse: bool = False
    shared_tokens: int = 1
    candidates: float | None = None


def block_scores(
    q_RD: Tensor,
    forecast_D: Tensor | None,
    scale: float,
    keys: list[Tensor],
    num_blocks: int,
    rules: Rules,
    among: Collection[int] | None = None,
) -> list[float]:
    """Return the score of each block, -inf for one without.

    Args:
        q_RD: Query heads of a group.
        forecast_D: Its forecast, which scores instead; None in other modes.
        scale: Factor on q . k.
        keys: Of the tokens before the step, [D] each.
        num_blocks: How many blocks there are, the one being written included.
        rules: How to score.
        among: Blocks that a query scores by keys in few bits, as if there were no others; None is
            all.
    """
    if rules.selector in _BITS:
        bits = _BITS[rules.selector]
        if forecast_D is None:
            blocks = dict(enumerate(_full_blocks(keys, rules, bits)))
            if among is not None:
                blocks = {m: block for m, block in blocks.items() if m in among}
            return _lowbit_block_scores(q_RD, scale, blocks, num_blocks, rules)
        return _lowbit_forecast_scores(forecast_D, scale, keys, num_blocks, rules, bits)
    if forecast_D is not None:
        window_scores = [float(forecast_D @ pooled_D) for pooled_D in pooled_keys(keys, rules)]
        return window_to_block_scores(window_scores, num_blocks, rules)
    if rules.selector == "quest":
        return _quest_block_scores(q_RD, keys, num_blocks, rules)
    window_scores = _infllm2_window_scores(q_RD, pooled_keys(keys, rules), scale)
    return window_to_block_scores(window_scores, num_blocks, rules)


def pooled_keys(keys: list[Tensor], rules: Rules) -> list[Tensor]:
    """Return the mean key of every window whose tokens are all there."""
    if len(keys) < rules.pool_size:
        return []
    windows = torch.stack(keys).float().unfold(0, rules.pool_size, rules.pool_stride)
    return list(windows.mean(-1))


def _infllm2_window_scores(q_RD: Tensor, windows: list[Tensor], scale: float) -> list[float]:
    """Return each window's share of attention, summed over the heads of the group."""
    if not windows:
        return []
    logits_RW = q_RD.float() @ torch.stack(windows).T * scale
    scores: list[float] = logits_RW.softmax(-1).sum(0).tolist()
    return scores


def window_to_block_scores(
    window_scores: list[float], num_blocks: int, rules: Rules
) -> list[float]:
    """Return the largest score among the windows that touch each block."""
    scores = [_NEVER] * num_blocks
    for m in range(num_blocks):
        for j, score in enumerate(window_scores):
            start, end = j * rules.pool_stride, j * rules.pool_stride + rules.pool_size
            if start < (m + 1) * rules.block_size and end > m * rules.block_size:
                scores[m] = max(scores[m], score)
    return scores


def _quest_block_scores(
    q_RD: Tensor, keys: list[Tensor], num_blocks: int, rules: Rules
) -> list[float]:
    """Return an upper bound of the mean query's dot product with any key of each block."""
    query_D = q_RD.float().mean(0)
    scores = [_NEVER] * num_blocks
    for m in range(num_blocks):
        block = keys[m * rules.block_size : (m + 1) * rules.block_size]
        if block:
            block_PD = torch.stack(block).float()
            low_D, high_D = block_PD.amin(0), block_PD.amax(0)
            scores[m] = float(torch.maximum(query_D * low_D, query_D * high_D).sum())
    return scores


def _few_bits(block_PD: Tensor, bits: int) -> Tensor:
    """Return the keys of a full block as codes of few bits give them back, [P, D]."""
    levels = 2**bits
    low_D, high_D = block_PD.amin(0), block_PD.amax(0)
    span_D = (high_D - low_D) * (levels / (levels - 1))
    base_D = low_D - span_D
    varies_D = span_D > 0.0  # else the key is the base, which is what code 0 gives
    code_PD = ((block_PD - base_D) * levels / span_D.where(varies_D, 1.0) - levels + 0.5).floor()
    code_PD = code_PD.clamp(0, levels - 1).where(varies_D, 0.0)
    near_PD: Tensor = (1 + code_PD / levels) * span_D + base_D
    return near_PD


def _full_blocks(keys: list[Tensor], rules: Rules, bits: int) -> list[Tensor]:
    """Return the approximate keys [P, D] of each block that all tokens of are there."""
    size = rules.block_size
    ends = range(size, len(keys) + 1, size)
    return [_few_bits(torch.stack(keys[end - size : end]).float(), bits) for end in ends]


def _lowbit_block_scores(
    q_RD: Tensor, scale: float, blocks: dict[int, Tensor], num_blocks: int, rules: Rules
) -> list[float]:
    """Return each given block's share of attention over all of them, summed over the heads."""
    scores = [_NEVER] * num_blocks
    if blocks:
        weights_RT = (q_RD.float() @ torch.cat([*blocks.values()]).T * scale).softmax(-1)
        for m, weights_RP in zip(blocks, weights_RT.split(rules.block_size, dim=1), strict=True):
            scores[m] = float(weights_RP.sum())
    return scores


def _lowbit_forecast_scores(
    forecast_D: Tensor, scale: float, keys: list[Tensor], num_blocks: int, rules: Rules, bits: int
) -> list[float]:
    """Return the logarithm of each full block's mass, by a forecast of one head."""
    scores = [_NEVER] * num_blocks
    for m, near_PD in enumerate(_full_blocks(keys, rules, bits)):
        scores[m] = float((near_PD @ forecast_D.float() * scale).exp().sum().log())
    return scores
