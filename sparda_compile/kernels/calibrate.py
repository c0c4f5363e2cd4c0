"""Find, for each prompt and layer, the weights that would have predicted its last tokens best.

    worth_w  = score_w / sum(score_w), over the blocks that row w selects by score; 0 elsewhere
    rate     = mean over rows w of  sum(worth_w), over the blocks that were predicted for row w
    weights  = those of the candidate with the best rate; of several, the one that comes first

A candidate is a level weight, a trend weight and a damping. Each begins without a level, predicts a
row and then takes it in, as steps do (`predict_blocks.py`). As many blocks are predicted as a row
selects. Rows are the last tokens of a prompt; one that selects nothing by score is worth nothing.

Source: PRR (arXiv 2606.30389) section 4.2, equations 4 and 5. Differs from the paper: the last rows
instead of all; the same grid without its doubles (without damping, all trend weights are one) and
with a level weight of 1; sink, local and current blocks are left out, for they are always right.
Scores that cannot be compared between steps are standardised, and count by their exponential, as
in a softmax, for they may be negative. On CUDA: `gpu/calibrate.py`.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from sparda_compile.kernels.predict_blocks import (
    predict_blocks_reference,
    standardise,
    update_prediction_reference,
)
from sparda_compile.kernels.select_blocks import select_blocks_reference

__all__ = [
    "CALIBRATION_WINDOW",
    "FEWEST_ROWS",
    "NUM_CANDIDATES",
    "calibrate",
    "candidates",
    "hit_rates_reference",
    "worths_reference",
]

CALIBRATION_WINDOW: Final = 64
"""Tokens at the end of a prompt by which a predictor is calibrated."""
FEWEST_ROWS: Final = 16
"""With fewer tokens than these, what was calibrated before stays."""
_LEVELS, _TRENDS, _DAMPINGS = 5, 5, 3
_KINDS: Final = 1 + _DAMPINGS * _TRENDS
NUM_CANDIDATES: Final = _LEVELS * _KINDS


def candidates(device: torch.device) -> Tensor:
    """Return [C, 3] float32: level weight, trend weight and damping of each candidate.

    Level weights of 0.2 to 1, ascending; for each no damping first, then dampings of 0.25 to 0.75
    with trend weights of 0.1 to 0.5. They are made on the device: nothing waits for a copy.
    """
    number_C = torch.arange(NUM_CANDIDATES, device=device)
    kind_C = number_C % _KINDS
    trend_C = (kind_C + _TRENDS - 1) % _TRENDS
    damping_C = (kind_C + _TRENDS - 1) // _TRENDS
    return torch.stack([0.2 * (number_C // _KINDS + 1), 0.1 * (trend_C + 1), 0.25 * damping_C], 1)


def worths_reference(
    scores_WBGN: Tensor,
    before_BW: Tensor,
    choice: tuple[int, int, int, int],
    *,
    are_comparable: bool,
) -> Tensor:
    """Return what predicting each block is worth, [W, B, G, N] float32; a row sums to 1 or to 0.

    Args:
        scores_WBGN: Scores of the rows, float32; standardised if they cannot be compared.
        before_BW: Tokens before each row, int32.
        choice: K, tokens of a block, sink blocks and local blocks.
        are_comparable: Whether the scores count as they are.
    """
    num_blocks = scores_WBGN.shape[-1]
    _, block_size, sink_blocks, local_blocks = choice
    block_N = torch.arange(num_blocks, device=scores_WBGN.device)
    worths_WBGN = torch.zeros_like(scores_WBGN)
    for row, (scores_BGN, before_B) in enumerate(zip(scores_WBGN, before_BW.T, strict=True)):
        ids_BGK = select_blocks_reference(scores_BGN, before_B, *choice).long()
        # An id of -1, for a block that does not exist, goes to the column behind the last one.
        mask = scores_BGN.new_zeros((*scores_BGN.shape[:2], num_blocks + 1), dtype=torch.bool)
        mask.scatter_(2, ids_BGK.where(ids_BGK >= 0, num_blocks), True)
        current_B11 = (before_B.long() // block_size)[:, None, None]
        is_free = (block_N >= sink_blocks) & (block_N < current_B11 - local_blocks)
        chosen_BGN = mask[..., :-1] & is_free & (scores_BGN > float("-inf"))
        weight_BGN = scores_BGN
        if not are_comparable:
            weight_BGN = (scores_BGN - scores_BGN.amax(-1, keepdim=True)).exp()
        weight_BGN = weight_BGN.where(chosen_BGN, 0.0)
        total_BG1 = weight_BGN.sum(-1, keepdim=True)
        worths_WBGN[row] = torch.where(total_BG1 > 0.0, weight_BGN / total_BG1, 0.0)
    return worths_WBGN


def hit_rates_reference(
    scores_WBGN: Tensor,
    worths_WBGN: Tensor,
    before_BW: Tensor,
    choice: tuple[int, int, int, int],
    weights_C3: Tensor,
) -> Tensor:
    """Return the worth that each candidate finds in all rows, [C, B, G] float32.

    Args:
        scores_WBGN: Scores that can be compared between steps, float32.
        worths_WBGN: What each block is worth, float32.
        before_BW: Tokens before each row, int32.
        choice: K, tokens of a block, sink blocks and local blocks.
        weights_C3: Candidates, float32.
    """
    num, (_, batch, groups, num_blocks) = len(weights_C3), scores_WBGN.shape
    # Candidates stand where sequences do.
    level = scores_WBGN.new_full((num * batch, groups, num_blocks), float("-inf"))
    trend = torch.zeros_like(level)
    each = weights_C3.repeat_interleave(batch, 0)[:, :, None, None]
    rates = scores_WBGN.new_zeros((num * batch, groups))
    for row, scores_BGN in enumerate(scores_WBGN):
        before = before_BW[:, row].repeat(num)
        ids = predict_blocks_reference(level, trend, before, choice, each[:, 2]).long()
        worth = worths_WBGN[row].repeat(num, 1, 1).gather(-1, ids.clamp(min=0))
        rates += worth.where(ids >= 0, 0.0).sum(-1)
        update_prediction_reference(
            scores_BGN.repeat(num, 1, 1), level, trend, (each[:, 0], each[:, 1])
        )
    rates_CBG: Tensor = rates.unflatten(0, (num, batch))
    return rates_CBG


def calibrate(
    scores_WBGN: Tensor,
    before_BW: Tensor,
    num_rows_B: Tensor,
    choice: tuple[int, int, int, int],
    calibrated_B3: Tensor,
    *,
    are_comparable: bool,
) -> None:
    """Write the best candidate's weights of each sequence, where it has rows enough.

    Args:
        scores_WBGN: Scores of the last tokens, float32, -inf throughout for a row that is none;
            replaced by standardised ones if they cannot be compared between steps.
        before_BW: Tokens before each row, int32.
        num_rows_B: Rows that are some.
        choice: K, tokens of a block, sink blocks and local blocks.
        calibrated_B3: Level weight, trend weight and damping, float32, updated.
        are_comparable: Whether scores of two steps can be compared.
    """
    weights_C3 = candidates(scores_WBGN.device)
    if scores_WBGN.is_cuda:
        from sparda_compile.kernels.gpu.calibrate import hit_rates
        from sparda_compile.kernels.gpu.select import Choice

        found = (Choice(*choice), weights_C3)
        rates_CBG = hit_rates(scores_WBGN, before_BW, *found, are_comparable=are_comparable)
    else:
        if not are_comparable:
            scores_WBGN.copy_(standardise(scores_WBGN))
        worths = worths_reference(scores_WBGN, before_BW, choice, are_comparable=are_comparable)
        rates_CBG = hit_rates_reference(scores_WBGN, worths, before_BW, choice, weights_C3)
    # Each row has the same say in every candidate's sum, so the best mean is the best sum; of
    # equal ones `argmax` takes the first.
    best_B3 = weights_C3[rates_CBG.sum(-1).argmax(0)]
    calibrated_B3.copy_(torch.where(num_rows_B[:, None] >= FEWEST_ROWS, best_B3, calibrated_B3))
