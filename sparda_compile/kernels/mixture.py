"""Mix what past steps and a query computed early say of each block, by a share that is learned.

    mix_scores      mixed = share * asked + (1 - share) * (level + damping * trend)
    learn_mixture   behind the layer's selection, whose scores say what was right:
                    both = decay * both + sum_n (asked - past)(score - past)
                    own  = decay * own  + sum_n (asked - past)^2
                    share = both / own, from 0 to 1

`asked` are the scores by a query that was computed one layer early, `past` is what the levels
predict. The share is that of the least squares: of all mixtures it gives scores that are nearest to
the layer's own, over the steps before, which count less the older they are. There is one for each
sequence and KV head; before anything is learned it is 0.75. Sink, local and current blocks are
left out, for they are read anyway, and so is a block that one of the three has no score for.

Scores that cannot be compared between steps are standardised, as in `predict_blocks.py`. Reads 12
bytes a block and writes 4 to mix, and reads 16 to learn. On CUDA: `gpu/mixture.py`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.kernels.predict_blocks import calibrated_or, standardise

__all__ = [
    "DECAY",
    "START",
    "learn_mixture",
    "learn_reference",
    "mix_reference",
    "mix_scores",
    "share_of",
]

START: Final = 0.75
"""Share of the early query before anything is learned."""
DECAY: Final = 0.95
"""What a step's sums count for in the next step."""
_NEVER: Final = float("-inf")


def share_of(mixture_BG2: Tensor) -> Tensor:
    """Return the share of the early query, [B, G, 1] float32, 0 to 1.

    Args:
        mixture_BG2: Both sums, float32; the second is 0 before anything is learned.
    """
    both, own = mixture_BG2[..., :1], mixture_BG2[..., 1:]
    known = own > 0.0
    return torch.where(known, (both / own.where(known, 1.0)).clamp(0.0, 1.0), START)


def mix_reference(asked_BGN: Tensor, past_BGN: Tensor, mixture_BG2: Tensor) -> Tensor:
    """Return mixed scores, [B, G, N] float32; -inf where either has none.

    Args:
        asked_BGN: Scores by the early query, float32, comparable with those of other steps.
        past_BGN: What the levels predict, float32.
        mixture_BG2: What was learned.
    """
    share = share_of(mixture_BG2)
    known = (asked_BGN > _NEVER) & (past_BGN > _NEVER)
    mixed = share * asked_BGN.where(known, 0.0) + (1.0 - share) * past_BGN.where(known, 0.0)
    return mixed.masked_fill(~known, _NEVER)


def learn_reference(
    scores_BGN: Tensor,
    asked_BGN: Tensor,
    past_BGN: Tensor,
    lengths_B: Tensor,
    mixture_BG2: Tensor,
    choice: tuple[int, int, int],
) -> None:
    """Take one step into both sums, in place.

    Args:
        scores_BGN: Scores of the layer's own selection, comparable, float32.
        asked_BGN: Those by the early query, comparable, float32.
        past_BGN: What the levels had predicted, float32.
        lengths_B: Tokens before the step, int32.
        mixture_BG2: Both sums, float32, updated.
        choice: Tokens of a block, sink blocks and local blocks.
    """
    block_size, sink_blocks, local_blocks = choice
    block_N = torch.arange(scores_BGN.shape[-1], device=scores_BGN.device)
    current_B11 = (lengths_B.long() // block_size)[:, None, None]
    used = (block_N >= sink_blocks) & (block_N < current_B11 - local_blocks)
    for part in (scores_BGN, asked_BGN, past_BGN):
        used = used & (part > _NEVER)
    ahead = (asked_BGN - past_BGN).where(used, 0.0)
    found = (scores_BGN - past_BGN).where(used, 0.0)
    sums = torch.stack([(ahead * found).sum(-1), ahead.square().sum(-1)], dim=-1)
    mixture_BG2.mul_(DECAY).add_(sums)


def _past(level: Tensor, trend: Tensor, damping: float, calibrated: Tensor | None) -> Tensor:
    factor = calibrated_or((0.0, 0.0, damping), calibrated)[2]
    past: Tensor = level + factor * trend
    return past


@define(
    fake=lambda a: torch.empty_like(a.asked),
    kernels=("_mix_scores",),
    before=("learn_mixture",),
)
def mix_scores(
    asked: Tensor,
    level: Tensor,
    trend: Tensor,
    mixture: Tensor,
    damping: float,
    are_comparable: bool,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> Tensor:
    """Mix the scores by an early query with those that past steps predict.

    Args:
        asked: [B, G, N] float32, from `score_blocks`.
        level: [B, G, N] float32, -inf for a block that was never scored.
        trend: [B, G, N] float32.
        mixture: [B, G, 2] float32, what was learned.
        damping: Factor on the trend, 0 to 1.
        are_comparable: Whether scores of two steps can be compared; else they are standardised.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.
        calibrated: As for `predict_blocks`.

    Returns:
        [B, G, N] float32, -inf for a block without one of the two.
    """
    del after
    mixed = torch.empty_like(asked)

    def work() -> None:
        if asked.is_cuda:
            from sparda_compile.kernels.gpu.mixture import mix

            past = (level, trend, damping, calibrated)
            mix(asked, past, mixture, mixed, START, are_comparable=are_comparable)
            return
        given = asked if are_comparable else standardise(asked)
        mixed.copy_(mix_reference(given, _past(level, trend, damping, calibrated), mixture))

    current_engine().submit(stream, work)
    return mixed


@define(
    mutates=("mixture",),
    kernels=("_learn_mixture",),
    before=("update_prediction",),  # it compares with what the levels had predicted
    is_for_later=True,
)
def learn_mixture(
    scores: Tensor,
    asked: Tensor,
    level: Tensor,
    trend: Tensor,
    lengths: Tensor,
    mixture: Tensor,
    damping: float,
    are_comparable: bool,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> None:
    """Take the scores of this step's selection into the sums that the share is made of.

    Args:
        scores: [B, G, N] float32, of the layer's own selection.
        asked: [B, G, N] float32, what `mix_scores` took.
        level: [B, G, N] float32, as it was when that was mixed.
        trend: [B, G, N] float32.
        lengths: [B] int32, tokens before this step.
        mixture: [B, G, 2] float32, updated.
        damping: Factor on the trend, 0 to 1.
        are_comparable: Whether scores of two steps can be compared; else they are standardised.
        block_size: P.
        sink_blocks: Always-read first blocks, left out.
        local_blocks: Always-read blocks before the current one, left out as that one is.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        calibrated: As for `predict_blocks`.
    """
    del after
    choice = (block_size, sink_blocks, local_blocks)

    def work() -> None:
        if scores.is_cuda:
            from sparda_compile.kernels.gpu.mixture import learn

            past = (level, trend, damping, calibrated)
            operands = (scores, asked, past, lengths, mixture, choice)
            learn(*operands, DECAY, are_comparable=are_comparable)
            return
        right, early = (s if are_comparable else standardise(s) for s in (scores, asked))
        predicted = _past(level, trend, damping, calibrated)
        learn_reference(right, early, predicted, lengths, mixture, choice)

    current_engine().submit(stream, work)
