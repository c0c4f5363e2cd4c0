"""Calibration against PRR's equations 4 and 5, written out block by block in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.kernels import calibrate as room
from sparda_compile.kernels.predict_blocks import standardise

INF = float("inf")
BATCH, GROUPS, BLOCKS, SIZE = 2, 2, 11, 16
CHOICE = (6, SIZE, 1, 1)
CPU = torch.device("cpu")


def rows_of(num_rows, seed=0):
    """Return scores [W, B, G, N] and tokens before each row [B, W]; blocks begin one by one."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(BATCH, GROUPS, BLOCKS, generator=generator)
    noise = torch.rand(num_rows, BATCH, GROUPS, BLOCKS, generator=generator)
    before = torch.tensor([[130], [100]]) + torch.arange(num_rows)
    begun = torch.arange(BLOCKS) * SIZE + SIZE <= before.T[..., None]
    scores = (base + noise).where(begun[:, :, None], -INF)
    return scores, before.int()


def best_blocks(scores, current, wanted):
    """Return the blocks with the best scores that are neither sink nor local ones."""
    free = [b for b in range(1, current - 1) if scores.get(b, -INF) > -INF]
    return set(sorted(free, key=lambda b: (-scores[b], b))[:wanted])


def hit_rate(rows, before, alpha, beta, gamma, worth_of):
    """Return equation 4 for one sequence and group, and how many rows it is a mean of."""
    level, trend = {}, {}
    rates = []
    for row, length in zip(rows, before, strict=True):
        current = length // SIZE
        scores = {b: s for b, s in enumerate(row) if s > -INF}
        wanted = CHOICE[0] - 3  # without the sink, the local and the current block
        read = best_blocks(scores, current, wanted)
        guess = best_blocks({b: level[b] + gamma * trend[b] for b in level}, current, wanted)
        if read:
            worth = {b: worth_of(scores[b]) for b in read}
            rates.append(sum(worth[b] for b in read & guess) / sum(worth.values()))
        for b, score in scores.items():
            if b in level:
                trend[b] = beta * (score - level[b]) + (1 - beta) * trend[b]
                level[b] = alpha * score + (1 - alpha) * level[b]
            else:
                level[b], trend[b] = score, 0.0
    return sum(rates), len(rates)


def test_candidates_are_the_grid_of_the_paper_without_doubles_and_the_last_scores():
    found = [tuple(round(x, 4) for x in row) for row in room.candidates(CPU).tolist()]
    assert len(found) == room.NUM_CANDIDATES == len(set(found))
    levels, trends, dampings = (
        (0.2, 0.4, 0.6, 0.8, 1.0),
        (0.1, 0.2, 0.3, 0.4, 0.5),
        (0, 0.25, 0.5, 0.75),
    )
    assert {row[0] for row in found} == set(levels)
    assert {row for row in found if row[2]} == {
        (a, b, g) for a in levels for b in trends for g in dampings if g
    }
    assert [row[0] for row in found if not row[2]] == list(levels)
    assert found == sorted(found, key=lambda row: (row[0], row[2], row[1]))


@pytest.mark.parametrize("are_comparable", [True, False])
def test_rates_are_those_of_equation_4(are_comparable):
    scores, before = rows_of(14)
    if not are_comparable:
        scores = standardise(scores)
    weights = room.candidates(CPU)[::7]
    worths = room.worths_reference(scores, before, CHOICE, are_comparable=are_comparable)
    found = room.hit_rates_reference(scores, worths, before, CHOICE, weights)
    worth_of = (lambda score: score) if are_comparable else math.exp
    for row in range(BATCH):
        for group in range(GROUPS):
            rows = scores[:, row, group].tolist()
            for number, theta in enumerate(weights.tolist()):
                want, num_rows = hit_rate(rows, before[row].tolist(), *theta, worth_of)
                assert found[number, row, group].item() == pytest.approx(want, abs=1e-5)
                assert num_rows == worths[:, row, group].sum(-1).round().sum()
    assert len(set(found[:, 0, 0].tolist())) > 3


def test_the_best_candidate_of_each_sequence_is_written():
    """Equation 5, over the groups of a layer."""
    scores, before = rows_of(20, seed=5)
    found = torch.zeros(BATCH, 3)
    room.calibrate(scores, before, torch.tensor([20, 20]), CHOICE, found, are_comparable=True)
    grid = room.candidates(CPU).tolist()
    for row in range(BATCH):
        rates = [
            sum(
                hit_rate(scores[:, row, group].tolist(), before[row].tolist(), *theta, float)[0]
                for group in range(GROUPS)
            )
            for theta in grid
        ]
        chosen = grid.index(found[row].tolist())
        assert rates[chosen] == pytest.approx(max(rates), abs=1e-5)
    assert found[0].tolist() != found[1].tolist()


def test_of_equal_candidates_the_smallest_level_weight_without_a_trend_wins():
    scores = torch.arange(BLOCKS).flip(0).float().expand(20, BATCH, GROUPS, BLOCKS).contiguous()
    before = (BLOCKS * SIZE - 30 + torch.arange(20)).expand(BATCH, 20).int().contiguous()
    found = torch.zeros(BATCH, 3)
    room.calibrate(scores, before, torch.tensor([20, 20]), CHOICE, found, are_comparable=True)
    assert found.tolist() == [pytest.approx([0.2, 0.5, 0.0])] * BATCH


def long_rows(kind):
    """Return scores [64, 1, 1, 40]: noise around fixed means, or a walk of independent steps."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 1, 1, 40, generator=generator)
    if kind == "noise":
        return noise + 1.5 * torch.randn(1, 1, 1, 40, generator=generator) + 20.0
    return noise.cumsum(0) + 100.0


@pytest.mark.parametrize(("kind", "levels"), [("noise", {0.2}), ("walk", {0.8, 1.0})])
def test_noise_is_smoothed_and_what_lasts_is_followed(kind, levels):
    found = torch.zeros(1, 3)
    before = (39 * SIZE + torch.arange(64) % SIZE).int()[None]
    choice = (10, SIZE, 1, 1)
    room.calibrate(long_rows(kind), before, torch.tensor([64]), choice, found, are_comparable=True)
    assert round(found[0, 0].item(), 4) in levels


def test_a_sequence_with_few_rows_keeps_what_it_was_calibrated_to():
    scores, before = rows_of(20)
    scores[:5, 1] = -INF
    found = torch.full((BATCH, 3), 0.123)
    num_rows = torch.tensor([room.FEWEST_ROWS, room.FEWEST_ROWS - 1])
    room.calibrate(scores, before, num_rows, CHOICE, found, are_comparable=True)
    assert found[0].tolist() in room.candidates(CPU).tolist()
    assert found[1].tolist() == pytest.approx([0.123] * 3)


def test_scale_and_offset_of_a_row_make_no_difference_where_they_mean_nothing():
    scores, before = rows_of(20, seed=2)
    found = []
    factor = torch.rand(20, 1, 1, 1, generator=torch.Generator().manual_seed(9)) * 30.0 + 1.0
    for rows in (scores, scores * factor - factor):
        weights = torch.zeros(BATCH, 3)
        given = rows.clone()
        room.calibrate(given, before, torch.tensor([20, 20]), CHOICE, weights, are_comparable=False)
        assert torch.allclose(given, standardise(rows), atol=1e-6)
        found.append(weights.tolist())
    assert found[0] == found[1]


def test_blocks_without_a_score_and_rows_that_choose_nothing_are_worth_nothing():
    scores, before = rows_of(6)
    scores[2, 0] = -INF
    before[1, :3] = 2 * SIZE
    for are_comparable in (True, False):
        given = scores if are_comparable else standardise(scores)
        worths = room.worths_reference(given, before, CHOICE, are_comparable=are_comparable)
        assert not worths.isnan().any()
        sums = worths.sum(-1)
        assert (sums[2, 0] == 0.0).all()
        assert (sums[:3, 1] == 0.0).all()
        assert torch.allclose(sums[3:], torch.ones(3, BATCH, GROUPS))
        assert (worths[scores == -INF] == 0.0).all()
