"""Predict the KV blocks of the next step from the scores of past ones: a level and a trend.

    predict_blocks      the K blocks with the largest level + damping * trend
    update_prediction   trend = b * (score - level) + (1 - b) * trend, by the level as it was
                        level = a * score + (1 - a) * level

The weights a and b and the damping are numbers, or those that the prompt of each sequence was
calibrated to (`calibrate.py`): `calibrated`, [B, 3] float32, whose first is 0 as long as no prompt
was long enough for that, and the numbers count.

A level of -inf says that the block was never scored; its first score becomes its level, its trend
stays 0, and until then it is not predicted. A score of -inf changes nothing. Scores that cannot be
compared between steps are standardised in each step: (score - mean) / deviation, over the scored
blocks that are not on a short list; those on it get one more than the best of the others.

Source: PRR (arXiv 2606.30389) section 4.1, equations 2 and 3. On CUDA: `gpu/predict.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.selectors.nosa import LISTED

__all__ = [
    "calibrated_or",
    "predict_blocks",
    "predict_blocks_reference",
    "standardise",
    "take_in",
    "update_prediction",
    "update_prediction_reference",
]


def predict_blocks_reference(
    level_BGN: Tensor,
    trend_BGN: Tensor,
    lengths_B: Tensor,
    choice: tuple[int, int, int, int],
    damping: float | Tensor,
) -> Tensor:
    """Pick the best predicted blocks, as `select_blocks` picks; [B, G, K] int32, -1 at the end.

    Args:
        level_BGN: Levels, float32; -inf for a block that was never scored.
        trend_BGN: Trends, float32.
        lengths_B: Tokens before the step that is predicted, int32.
        choice: K, tokens of a block, sink blocks and local blocks.
        damping: Factor on the trend: a number, or one for each sequence, [B, 1, 1].
    """
    num_blocks = level_BGN.shape[-1]
    _, block_size, sink_blocks, local_blocks = choice
    ids_BGK = select_blocks_reference(level_BGN + damping * trend_BGN, lengths_B, *choice)
    current_B11 = (lengths_B.long() // block_size)[:, None, None]
    is_forced = (ids_BGK < sink_blocks) | (ids_BGK >= current_B11 - local_blocks)
    has_level = level_BGN.gather(-1, ids_BGK.clamp(min=0).long()) > float("-inf")
    is_kept = (ids_BGK >= 0) & (is_forced | has_level)
    ids_BGK = ids_BGK.masked_fill(~is_kept, num_blocks).sort(-1).values
    return ids_BGK.masked_fill(ids_BGK == num_blocks, -1)


def standardise(scores_BGN: Tensor) -> Tensor:
    """Return scores that can be compared between steps; -inf stays.

    Args:
        scores_BGN: Scores of one step, float32.
    """
    is_open = (scores_BGN > float("-inf")) & (scores_BGN < LISTED)
    count = is_open.sum(-1, keepdim=True).clamp(min=1)
    mean = scores_BGN.where(is_open, 0.0).sum(-1, keepdim=True) / count
    distance = (scores_BGN - mean).where(is_open, 0.0)
    variance = distance.square().sum(-1, keepdim=True) / count
    scale = torch.where(variance > 0.0, variance.rsqrt(), 0.0)
    standard = distance * scale
    best = standard.masked_fill(~is_open, float("-inf")).amax(-1, keepdim=True)
    listed = (best.clamp(min=0.0) + 1.0).expand_as(standard)
    standard = torch.where(scores_BGN >= LISTED, listed, standard)
    return standard.masked_fill(scores_BGN == float("-inf"), float("-inf"))


def update_prediction_reference(
    scores_BGN: Tensor,
    level_BGN: Tensor,
    trend_BGN: Tensor,
    weights: tuple[float | Tensor, float | Tensor],
) -> None:
    """Take in the scores of one step, in place.

    Args:
        scores_BGN: Scores that can be compared between steps, float32.
        level_BGN: Levels, float32, updated.
        trend_BGN: Trends, float32, updated.
        weights: Of the new score in the level, and of its distance from the level in the trend;
            numbers, or one for each sequence, [B, 1, 1].
    """
    of_level, of_trend = weights
    is_scored, is_old = scores_BGN > float("-inf"), level_BGN > float("-inf")
    # Where there is no score or no level, numbers that nobody reads stand in.
    score, level = scores_BGN.where(is_scored, 0.0), level_BGN.where(is_old, 0.0)
    trend = of_trend * (score - level) + (1.0 - of_trend) * trend_BGN
    trend_BGN.copy_(trend.where(is_scored & is_old, trend_BGN))
    level = (of_level * score + (1.0 - of_level) * level).where(is_old, score)
    level_BGN.copy_(level.where(is_scored, level_BGN))


def calibrated_or(
    numbers: tuple[float, float, float], calibrated_B3: Tensor | None
) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
    """Return level weight, trend weight and damping: [B, 1, 1] each, or the numbers.

    Args:
        numbers: What counts for a sequence that was not calibrated.
        calibrated_B3: float32, 0 in front for such a sequence; None if prompts are not calibrated.
    """
    if calibrated_B3 is None:
        return numbers
    found_B3 = torch.where(
        calibrated_B3[:, :1] > 0.0, calibrated_B3, calibrated_B3.new_tensor(numbers)
    )
    of_level, of_trend, damping = found_B3[:, :, None, None].unbind(1)
    return of_level, of_trend, damping


@define(
    fake=lambda a: a.lengths.new_empty((*a.level.shape[:2], a.num_selected)),
    kernels=("_predict_blocks",),
    before=("update_prediction",),  # else the prediction knew this step's own scores
)
def predict_blocks(
    level: Tensor,
    trend: Tensor,
    lengths: Tensor,
    num_selected: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    damping: float,
    stream: int = 0,
    after: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> Tensor:
    """Predict the blocks that this step will read, from the scores of the steps before.

    Args:
        level: [B, G, N] float32, -inf for a block that was never scored.
        trend: [B, G, N] float32.
        lengths: [B] int32, tokens before this step; the new token is in block length // P.
        num_selected: K, blocks to predict in all.
        block_size: P, tokens of one block.
        sink_blocks: Always-read first blocks.
        local_blocks: Always-read blocks before the current one.
        damping: Factor on the trend, 0 to 1.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.
        calibrated: [B, 3] float32, whose last counts instead of `damping` where a prompt was
            calibrated; None if prompts are not.

    Returns:
        [B, G, K] int32 block ids, ascending, then -1: sink, local and current blocks, then the
        best by level + damping * trend, the lower id where two are equal.
    """
    del after
    ids = lengths.new_empty((*level.shape[:2], num_selected))
    choice = (num_selected, block_size, sink_blocks, local_blocks)

    def work() -> None:
        if level.is_cuda:
            from sparda_compile.kernels.gpu.predict import predict
            from sparda_compile.kernels.gpu.select import Choice

            predict(level, trend, lengths, ids, Choice(*choice), damping, calibrated=calibrated)
        else:
            factor = calibrated_or((0.0, 0.0, damping), calibrated)[2]
            ids.copy_(predict_blocks_reference(level, trend, lengths, choice, factor))

    current_engine().submit(stream, work)
    return ids


@define(mutates=("level", "trend"), kernels=("_update_prediction",), is_for_later=True)
def update_prediction(
    scores: Tensor,
    level: Tensor,
    trend: Tensor,
    level_weight: float,
    trend_weight: float,
    are_comparable: bool,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> None:
    """Take the scores of this step's selection into level and trend, for the next step.

    Args:
        scores: [B, G, N] float32, -inf for a block without a score.
        level: [B, G, N] float32, updated.
        trend: [B, G, N] float32, updated.
        level_weight: Weight of the new score in the level, above 0 and at most 1.
        trend_weight: Weight of its distance from the level in the trend, above 0 and at most 1.
        are_comparable: Whether scores of two steps can be compared; else they are standardised.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        calibrated: [B, 3] float32, whose first two count instead of the weights where a prompt was
            calibrated; None if prompts are not.
    """
    del after
    weights = (level_weight, trend_weight)
    current_engine().submit(
        stream, lambda: take_in(scores[None], level, trend, weights, are_comparable, calibrated)
    )


def take_in(
    scores_WBGN: Tensor,
    level: Tensor,
    trend: Tensor,
    weights: tuple[float, float],
    are_comparable: bool,
    calibrated: Tensor | None,
) -> None:
    """Take in the scores of some steps, in order, as `update_prediction` does those of one."""
    if level.is_cuda:
        from sparda_compile.kernels.gpu.predict import update

        update(
            scores_WBGN,
            level,
            trend,
            weights,
            are_comparable=are_comparable,
            calibrated=calibrated,
        )
        return
    of_level, of_trend, _ = calibrated_or((*weights, 0.0), calibrated)
    for scores_BGN in scores_WBGN:
        scores_BGN = scores_BGN if are_comparable else standardise(scores_BGN)
        update_prediction_reference(scores_BGN, level, trend, (of_level, of_trend))
