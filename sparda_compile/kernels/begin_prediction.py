"""Begin the levels of a predictor with what the last tokens of a prompt would have selected by.

Each of them scores the blocks before it, as a decode step there would, and is taken in like one
(`predict_blocks.py`). If prompts are calibrated, the same scores first say by which weights
(`calibrate.py`).

Reads the summary once for each of these tokens. On CUDA: `gpu/predict.py`, `gpu/calibrate.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.kernels.calibrate import CALIBRATION_WINDOW, NUM_CANDIDATES, calibrate
from sparda_compile.kernels.predict_blocks import take_in
from sparda_compile.kernels.score_blocks import write_scores
from sparda_compile.selectors import Geometry

__all__ = ["WINDOW", "begin_prediction"]

WINDOW: Final = 32
"""Tokens at the end of a prompt whose scores begin the levels, if it is not calibrated."""


def _score_bytes(arguments: Any) -> int:
    """Return the bytes of the scores of a prompt's last tokens."""
    is_calibrated = arguments.calibrated is not None
    num_scored: int = min(_window(is_calibrated), arguments.query.shape[2])
    # To calibrate takes what each score is worth, and a rate of each candidate.
    num_scores = num_scored * int(arguments.level.numel()) * (2 if is_calibrated else 1)
    num_rates = NUM_CANDIDATES * math.prod(arguments.level.shape[:2]) if is_calibrated else 0
    return 4 * (num_scores + num_rates)


def _window(is_calibrated: bool) -> int:
    return CALIBRATION_WINDOW if is_calibrated else WINDOW


@define(
    mutates=("level", "trend", "calibrated"), behind=("update_summary",), workspace=_score_bytes
)
def begin_prediction(
    query: Tensor,
    summary: Sequence[Tensor],
    columns: Tensor,
    totals: Tensor,
    lengths: Tensor,
    level: Tensor,
    trend: Tensor,
    calibrated: Tensor | None,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    level_weight: float,
    trend_weight: float,
    are_comparable: bool,
    short_list: int = 0,
    sink_blocks: int = 0,
    local_blocks: int = 0,
    num_selected: int = 0,
) -> None:
    """Take the scores of the last tokens of a prompt into level and trend, one by one.

    Each scores what lies before its own position, as a decode step there would. A sequence with
    fewer new tokens than the window takes in those that it has. If prompts are calibrated, the
    window is wider, and its scores first decide by which weights they are taken in.

    Args:
        query: [B, H, T, D] queries.
        summary: The tensors of the selector's summary, with the new keys in them.
        columns: [B, T] int32, columns of the real tokens by position, then the others.
        totals: [B] int32, tokens behind this call.
        lengths: [B] int32, tokens before this call.
        level: [B, G, N] float32, updated.
        trend: [B, G, N] float32, updated.
        calibrated: [B, 3] float32, level weight, trend weight and damping of each sequence,
            updated; None if prompts are not calibrated.
        selector: Name of the selector.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: P.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        level_weight: Weight of a new score in the level.
        trend_weight: Weight of its distance from the level in the trend.
        are_comparable: Whether scores of two steps can be compared; else they are standardised.
        short_list: Blocks that the query picks; for selectors that rank the rest otherwise.
        sink_blocks: First blocks, not on the short list; to calibrate, those that are always read.
        local_blocks: Blocks before the current one, of which the same is true.
        num_selected: K, blocks that a step reads; to calibrate.
    """
    geometry = Geometry(
        num_blocks, block_size, pool_size, pool_stride, short_list, sink_blocks, local_blocks
    )
    batch, _, num_tokens, dim = query.shape
    num_scored = min(_window(calibrated is not None), num_tokens)
    scores = query.new_empty((num_scored, *level.shape[:2], num_blocks), dtype=torch.float32)
    # Counted back from the last token of each sequence, which may have fewer.
    back_W = torch.arange(num_scored, 0, -1, device=query.device)
    number_BW = (totals - lengths)[:, None] - back_W
    column_BW = columns.gather(1, number_BW.clamp(min=0)).long()
    before_BW = (totals[:, None] - back_W).clamp(min=0).int()
    for place in range(num_scored):
        at = column_BW[:, None, place, None, None].expand(batch, query.shape[1], 1, dim)
        asked, before = query.gather(2, at), before_BW[:, place].contiguous()
        write_scores(asked, summary, before, selector, scale, geometry, scores[place])
    scores.masked_fill_((number_BW < 0).T[:, :, None, None], float("-inf"))
    if calibrated is not None:
        choice = (num_selected, block_size, sink_blocks, local_blocks)
        num_rows_B = (number_BW >= 0).sum(1)
        calibrate(scores, before_BW, num_rows_B, choice, calibrated, are_comparable=are_comparable)
        are_comparable = True
    take_in(scores, level, trend, (level_weight, trend_weight), are_comparable, calibrated)
