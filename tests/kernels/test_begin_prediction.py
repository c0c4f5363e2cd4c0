"""What a prompt leaves for the first step: the levels of its last tokens, one by one."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile import ops
from sparda_compile.isa.table import INSTRUCTIONS
from sparda_compile.kernels.begin_prediction import WINDOW
from sparda_compile.kernels.calibrate import CALIBRATION_WINDOW, NUM_CANDIDATES, calibrate
from sparda_compile.kernels.predict_blocks import standardise
from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.selectors.base import empty_summary

assert ops.OPS
INF = float("inf")
SIZE = 16
MASKS = {
    "no padding": torch.ones(2, 50, dtype=torch.bool),
    "left": torch.arange(50) >= torch.tensor([[0], [35]]),
    "holes": torch.arange(50) % torch.tensor([[3], [5]]) > 0,
    "one sequence without a token": (torch.arange(50) >= 0) & torch.tensor([[True], [False]]),
    "fewer than the window": torch.ones(2, 7, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("selector", ["infllm2", "quest", "nosa", "lowbit2"])
def test_a_prompt_begins_as_steps_at_its_last_tokens_would(selector, mask):
    """Each token scores by the keys before it alone, though the summary has them all."""
    geometry = Geometry(12, SIZE, 8, 4, 2, 1, 1) if selector == "nosa" else Geometry(12, SIZE, 8, 4)
    rule, generator = SELECTORS[selector], torch.Generator().manual_seed(3)
    lengths = torch.tensor([100, 61], dtype=torch.int32)
    tensors = empty_summary(rule.summary, torch.empty(2, 2, 1, 8), geometry)
    past = torch.randn(2, 2, 100, 8, generator=generator)
    nothing = torch.zeros(2, dtype=torch.int32)
    rule.summary.extend(tensors, past, nothing, torch.arange(100) < lengths[:, None], geometry)
    k = torch.randn(2, 2, mask.shape[1], 8, generator=generator)
    rule.summary.extend(tensors, k, lengths, mask, geometry)
    query = torch.randn(2, 4, mask.shape[1], 8, generator=generator)
    level = torch.full((2, 2, 12), -INF)
    level[:, :, :3] = 0.7
    trend = torch.zeros_like(level)
    want_level, want_trend = level.clone(), trend.clone()
    _, columns, totals = torch.ops.sparda.number_tokens(mask, lengths)
    torch.ops.sparda.begin_prediction(
        query, tensors, columns, totals, lengths, level, trend, None, selector, 0.3, 12, SIZE, 8, 4,
        0.4, 0.3, rule.is_comparable, geometry.short_list, geometry.sink_blocks,
        geometry.local_blocks,
    )  # fmt: skip
    for row in range(2):
        one = slice(row, row + 1)
        columns = torch.where(mask[row])[0]
        for number in range(max(len(columns) - WINDOW, 0), len(columns)):
            now = lengths[one] + number
            scores = rule.score(
                query[one, :, columns[number], None], [t[one] for t in tensors], now, 0.3, geometry
            )
            torch.ops.sparda.update_prediction(
                scores, want_level[one], want_trend[one], 0.4, 0.3, rule.is_comparable
            )
    assert torch.equal(level, want_level)
    assert torch.equal(trend, want_trend)
    assert not math.isnan(level.sum())


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_a_prompt_is_calibrated_by_more_tokens_than_begin_the_levels(selector):
    """The second sequence has too few tokens, and is taken in by the numbers."""
    geometry = Geometry(24, SIZE, 8, 4)
    rule, generator = SELECTORS[selector], torch.Generator().manual_seed(3)
    tensors = empty_summary(rule.summary, torch.empty(2, 2, 1, 8), geometry)
    mask = torch.arange(300) >= torch.tensor([[0], [288]])
    lengths = torch.tensor([0, 200], dtype=torch.int32)
    past = torch.randn(2, 2, 200, 8, generator=generator)
    is_past = torch.arange(200) < lengths[:, None]
    rule.summary.extend(tensors, past, torch.zeros_like(lengths), is_past, geometry)
    k = torch.randn(2, 2, 300, 8, generator=generator)
    rule.summary.extend(tensors, k, lengths, mask, geometry)
    query = torch.randn(2, 4, 300, 8, generator=generator)
    level, trend = torch.full((2, 2, 24), -INF), torch.zeros(2, 2, 24)
    calibrated = torch.zeros(2, 3)
    _, columns, totals = torch.ops.sparda.number_tokens(mask, lengths)
    torch.ops.sparda.begin_prediction(
        query, tensors, columns, totals, lengths, level, trend, calibrated, selector, 0.3, 24, SIZE,
        8, 4, 0.4, 0.3, rule.is_comparable, 0, 1, 2, 7,
    )  # fmt: skip
    number = torch.arange(300 - CALIBRATION_WINDOW, 300)
    first = [tensor[:1] for tensor in tensors]
    rows = [rule.score(query[:1, :, n, None], first, n[None].int(), 0.3, geometry) for n in number]
    scores, want = torch.stack(rows), torch.zeros(1, 3)
    calibrate(
        scores, number[None].int(), torch.tensor([CALIBRATION_WINDOW]), (7, SIZE, 1, 2), want,
        are_comparable=rule.is_comparable,
    )  # fmt: skip
    assert calibrated[0].tolist() == want[0].tolist()
    assert calibrated[1].tolist() == [0.0, 0.0, 0.0]
    alone = torch.full((1, 2, 24), -INF), torch.zeros(1, 2, 24)
    for row in torch.stack(rows):
        row = row if rule.is_comparable else standardise(row)
        torch.ops.sparda.update_prediction(row, *alone, *want[0, :2].tolist(), True)
    assert torch.allclose(level[:1], alone[0], atol=1e-6)
    assert torch.allclose(trend[:1], alone[1], atol=1e-6)
    assert (level[1] > -INF).any()


def test_to_calibrate_takes_more_memory():
    workspace = INSTRUCTIONS["begin_prediction"].workspace
    with torch.device("meta"):
        query, level, calibrated = (
            torch.empty(3, 4, 500, 8),
            torch.empty(3, 2, 24),
            torch.empty(3, 3),
        )
        none = torch.empty(3, dtype=torch.int32)
    given = (query, [level], none, none, none, level, level)
    sizes = ("infllm2", 0.3, 24, SIZE, 8, 4, 0.4, 0.3, True)
    assert workspace(*given, None, *sizes) == 4 * WINDOW * 3 * 2 * 24
    # Scores, and what each is worth, of each token; and a rate of each candidate.
    found = workspace(*given, calibrated, *sizes)
    assert found == 4 * 2 * CALIBRATION_WINDOW * 3 * 2 * 24 + 4 * NUM_CANDIDATES * 3 * 2
