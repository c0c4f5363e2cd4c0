"""Prediction of blocks by level and trend; the reference is `kernels/predict_blocks.py`.

    _predict_blocks      level + damping * trend, then the K best as `select_blocks` picks them
    _update_prediction   the scores of some steps, one after another, into level and trend

A prediction has one program for each sequence and group. An update that standardises has, too, for
it needs the mean of a step; else one for each part of the blocks. Floor: level and trend are read
once, and written once by an update, N * 8 bytes per sequence and group. The weights that a prompt
was calibrated to are read where they are, so no launch depends on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import as_written, launch, power_of_two
from sparda_compile.kernels.gpu.select import check_num_blocks, pick
from sparda_compile.selectors.nosa import LISTED

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.select import Choice

__all__ = ["predict", "standardised", "taken_in", "update"]

# Blocks of one program of an update that needs no mean.
_BLOCKS: Final = 1024
_LISTED = tl.constexpr(LISTED)


@triton.jit
def standardised(score, scored):  # noqa: ANN201 - a part of kernels
    """Return scores of one step that can be compared with another's; see `standardise`."""
    is_open = scored & (score < _LISTED)
    count = tl.maximum(tl.sum(is_open.to(tl.int32), 0), 1).to(tl.float32)
    mean = tl.sum(tl.where(is_open, score, 0.0), 0) / count
    distance = tl.where(is_open, score - mean, 0.0)
    variance = tl.sum(distance * distance, 0) / count
    factor = tl.where(variance > 0.0, 1.0 / tl.sqrt(tl.where(variance > 0.0, variance, 1.0)), 0.0)
    standard = distance * factor
    best = tl.maximum(tl.max(tl.where(is_open, standard, float("-inf")), 0), 0.0)
    return tl.where(score >= _LISTED, best + 1.0, standard)


@triton.jit
def taken_in(  # noqa: ANN201 - a part of kernels
    score, scored, old, slope, level_weight, level_rest, trend_weight, trend_rest
):
    """Return level and trend behind a step, from those before it."""
    score = tl.where(scored, score, 0.0)
    is_old = old > float("-inf")
    known = tl.where(is_old, old, 0.0)
    rise = trend_weight * (score - known) + trend_rest * slope
    new = tl.where(is_old, level_weight * score + level_rest * known, score)
    return tl.where(scored, new, old), tl.where(scored & is_old, rise, slope)


@triton.jit
def _predict_blocks(
    level, trend, lengths, budget, ids, damping, calibrated, groups, num_blocks, sink, local,
    SIZE: tl.constexpr, SELECTED: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    LIMITED: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    current = tl.load(lengths + pair // groups) // SIZE
    if calibrated is not None:
        weights = calibrated + pair // groups * 3
        damping = tl.where(tl.load(weights) > 0.0, tl.load(weights + 2), damping)
    block = tl.arange(0, BLOCKS)
    exists = (block <= current) & (block < num_blocks)
    place = pair.to(tl.int64) * num_blocks + block
    known = tl.load(level + place, mask=exists, other=float("-inf"))
    score = known + damping * tl.load(trend + place, mask=exists, other=0.0)
    wanted = SELECTED
    if LIMITED:
        wanted = tl.minimum(tl.maximum(tl.load(budget), 0), SELECTED)
    picked = pick(score, current, num_blocks, sink, local, wanted, SELECTED, BLOCKS, COLUMNS)
    forced = (block < sink) | (block >= current - local)
    picked = picked & (forced | (known > float("-inf")))
    row = ids + pair.to(tl.int64) * SELECTED
    tl.store(row + tl.cumsum(picked.to(tl.int32), 0) - 1, block, mask=picked)
    column = tl.arange(0, COLUMNS)
    unused = (column < SELECTED) & (column >= tl.sum(picked.to(tl.int32), 0))
    tl.store(row + column, -1, mask=unused)


@triton.jit(do_not_specialize=["num_steps"])
def _update_prediction(
    scores, level, trend, level_weight, level_rest, trend_weight, trend_rest, calibrated, groups,
    num_steps, num_blocks, COMPARABLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if calibrated is not None:
        weights = calibrated + pair // groups * 3
        of_level, of_trend = tl.load(weights), tl.load(weights + 1)
        is_calibrated = of_level > 0.0
        level_weight = tl.where(is_calibrated, of_level, level_weight)
        level_rest = tl.where(is_calibrated, 1.0 - of_level, level_rest)
        trend_weight = tl.where(is_calibrated, of_trend, trend_weight)
        trend_rest = tl.where(is_calibrated, 1.0 - of_trend, trend_rest)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = pair * num_blocks + block
    old = tl.load(level + place, mask=inside, other=float("-inf"))
    slope = tl.load(trend + place, mask=inside, other=0.0)
    for step in tl.range(num_steps):
        at = (step * tl.num_programs(0) + pair) * num_blocks + block
        score = tl.load(scores + at, mask=inside, other=float("-inf"))
        scored = score > float("-inf")
        if not COMPARABLE:
            score = standardised(score, scored)
        old, slope = taken_in(
            score, scored, old, slope, level_weight, level_rest, trend_weight, trend_rest
        )
    tl.store(level + place, old, mask=inside)
    tl.store(trend + place, slope, mask=inside)


def predict(
    level_BGN: Tensor,
    trend_BGN: Tensor,
    lengths_B: Tensor,
    ids_BGK: Tensor,
    choice: Choice,
    damping: float,
    budget: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> None:
    """Predict blocks; see `kernels.predict_blocks`. Writes `ids_BGK`.

    Args:
        level_BGN: float32, -inf for a block that was never scored.
        trend_BGN: float32.
        lengths_B: int32, tokens before the step that is predicted.
        ids_BGK: int32, written: ascending, then -1.
        choice: What to pick; K is the width of `ids_BGK`.
        damping: Factor on the trend.
        budget: [1] int32 on the device, most blocks to pick in all, if fewer than K. Sink, local
            and current blocks are the best: with less room than they need, the first of them alone
            are picked; with 0, none.
        calibrated: [B, 3] float32 on the device, whose last counts instead of `damping` where a
            prompt was calibrated.
    """
    batch, groups, num_blocks = level_BGN.shape
    check_num_blocks(num_blocks)
    # As of `_select_pages`, which picks in the same way.
    warps = 4 if num_blocks <= 1024 else 8 if num_blocks <= 8192 else 16
    launch(_predict_blocks, (batch * groups,))(
        level_BGN, trend_BGN, lengths_B, lengths_B if budget is None else budget, ids_BGK, damping,
        calibrated, groups, num_blocks,
        choice.sink_blocks, choice.local_blocks, choice.block_size, choice.num_selected,
        power_of_two(num_blocks), power_of_two(choice.num_selected), budget is not None,
        num_warps=warps, **as_written(),
    )  # fmt: skip


def update(
    scores_WBGN: Tensor,
    level_BGN: Tensor,
    trend_BGN: Tensor,
    weights: tuple[float, float],
    *,
    are_comparable: bool,
    calibrated: Tensor | None = None,
) -> None:
    """Take in scores of W steps, in order; see `kernels.predict_blocks`. All are contiguous."""
    num_steps, batch, groups, num_blocks = scores_WBGN.shape
    check_num_blocks(num_blocks)
    blocks = power_of_two(num_blocks)
    if are_comparable:
        blocks = min(blocks, _BLOCKS)
    warps = 4 if blocks <= 1024 else 8 if blocks <= 8192 else 16
    of_level, of_trend = weights
    launch(_update_prediction, (batch * groups, triton.cdiv(num_blocks, blocks)))(
        scores_WBGN, level_BGN, trend_BGN, of_level, 1.0 - of_level, of_trend, 1.0 - of_trend,
        calibrated, groups, num_steps, num_blocks, are_comparable, blocks, num_warps=warps,
        **as_written(),
    )  # fmt: skip
