"""Calibration of the predictor; the reference is `kernels/calibrate.py`.

    _judge_rows         what predicting each block of each row is worth; standardises the scores
    _rate_candidates    each candidate predicts row by row, and adds up the worth that it finds

The first has a program for each row, sequence and group; the second one for each candidate instead
of a row, which keeps level and trend in registers. Floor: scores and worths are written once and
read once by each candidate, mostly from the L2 cache, W * N * 8 bytes per sequence and group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import as_written, launch, power_of_two
from sparda_compile.kernels.gpu.predict import standardised, taken_in
from sparda_compile.kernels.gpu.select import check_num_blocks, pick

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.select import Choice

__all__ = ["hit_rates"]


@triton.jit
def _judge_rows(
    scores, worths, before, groups, num_blocks, sink, local, COMPARABLE: tl.constexpr,
    SIZE: tl.constexpr, SELECTED: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(before + pair // groups * tl.num_programs(0) + row)
    current = length // SIZE
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    at = (row * tl.num_programs(1) + pair) * num_blocks + block
    score = tl.load(scores + at, mask=inside, other=float("-inf"))
    scored = score > float("-inf")
    if not COMPARABLE:
        score = tl.where(scored, standardised(score, scored), float("-inf"))
        tl.store(scores + at, score, mask=inside)
    picked = pick(score, current, num_blocks, sink, local, SELECTED, SELECTED, BLOCKS, COLUMNS)
    picked = picked & scored & (block >= sink) & (block < current - local)
    weight = tl.where(picked, score, 0.0)
    if not COMPARABLE:
        weight = tl.where(picked, tl.exp(weight - tl.max(weight, 0)), 0.0)
    total = tl.sum(weight, 0)
    worth = tl.where(total > 0.0, weight / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(worths + at, worth, mask=inside)


@triton.jit
def _rate_candidates(
    scores, worths, before, weights, rates, groups, num_rows, num_blocks, sink, local,
    SIZE: tl.constexpr, SELECTED: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pair, candidate = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_level = tl.load(weights + candidate * 3)
    of_trend = tl.load(weights + candidate * 3 + 1)
    damping = tl.load(weights + candidate * 3 + 2)
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    old = tl.full([BLOCKS], float("-inf"), tl.float32)
    slope = tl.zeros([BLOCKS], tl.float32)
    rate = 0.0
    for row in tl.range(num_rows):
        current = tl.load(before + pair // groups * num_rows + row) // SIZE
        at = (row * tl.num_programs(0) + pair) * num_blocks + block
        predicted = old + damping * slope
        picked = pick(
            predicted, current, num_blocks, sink, local, SELECTED, SELECTED, BLOCKS, COLUMNS
        )
        worth = tl.load(worths + at, mask=inside & picked & (old > float("-inf")), other=0.0)
        rate += tl.sum(worth, 0)
        score = tl.load(scores + at, mask=inside, other=float("-inf"))
        old, slope = taken_in(
            score, score > float("-inf"), old, slope, of_level, 1.0 - of_level, of_trend,
            1.0 - of_trend,
        )  # fmt: skip
    tl.store(rates + candidate * tl.num_programs(0) + pair, rate)


def hit_rates(
    scores_WBGN: Tensor,
    before_BW: Tensor,
    choice: Choice,
    weights_C3: Tensor,
    *,
    are_comparable: bool,
) -> Tensor:
    """Return the worth that each candidate finds, [C, B, G]; all given are contiguous.

    Standardises the scores in place, if they cannot be compared; see `kernels.calibrate`.
    """
    num_rows, batch, groups, num_blocks = scores_WBGN.shape
    check_num_blocks(num_blocks)
    worths = torch.empty_like(scores_WBGN)
    rates = scores_WBGN.new_empty(len(weights_C3), batch, groups)
    # As of `_predict_blocks`, which picks in the same way.
    warps = 4 if num_blocks <= 1024 else 8 if num_blocks <= 8192 else 16
    forced = (choice.sink_blocks, choice.local_blocks)
    sizes = (
        choice.block_size, choice.num_selected, power_of_two(num_blocks),
        power_of_two(choice.num_selected),
    )  # fmt: skip
    launch(_judge_rows, (num_rows, batch * groups))(
        scores_WBGN, worths, before_BW, groups, num_blocks, *forced, are_comparable, *sizes,
        num_warps=warps, **as_written(),
    )  # fmt: skip
    launch(_rate_candidates, (batch * groups, len(weights_C3)))(
        scores_WBGN, worths, before_BW, weights_C3, rates, groups, num_rows, num_blocks, *forced,
        *sizes, num_warps=warps, **as_written(),
    )  # fmt: skip
    return rates
