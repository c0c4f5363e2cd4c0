"""The predictor against its equations, written out block by block in plain Python."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import ops
from sparda_compile.kernels import predict_blocks as room
from sparda_compile.selectors import SELECTORS
from sparda_compile.selectors.nosa import LISTED

assert ops.OPS
INF = float("inf")
BATCH, GROUPS, BLOCKS, SIZE = 2, 2, 9, 16


class Plain:
    """Level and trend of every block, as PRR's equations 2 and 3 say them."""

    def __init__(self, alpha, beta):
        self.alpha, self.beta = alpha, beta
        self.level, self.trend = {}, {}

    def predicted(self, damping):
        """Return equation 2 for each block that was scored."""
        return {i: level + damping * self.trend[i] for i, level in self.level.items()}

    def update(self, scores):
        """Do equations 3a and 3b, in this order: the trend uses the level as it was."""
        for i, score in enumerate(scores):
            if score == -INF:
                continue
            if i not in self.level:
                self.level[i], self.trend[i] = score, 0.0
                continue
            distance = score - self.level[i]
            self.trend[i] = self.beta * distance + (1 - self.beta) * self.trend[i]
            self.level[i] = self.alpha * score + (1 - self.alpha) * self.level[i]


def empty():
    level = torch.full((BATCH, GROUPS, BLOCKS), -INF)
    return level, torch.zeros_like(level)


def scores_of(steps, seed=0):
    """Return scores [steps, B, G, N]; block m has none before step m."""
    scores = torch.rand(steps, BATCH, GROUPS, BLOCKS, generator=torch.Generator().manual_seed(seed))
    begun = torch.arange(steps)[:, None] >= torch.arange(BLOCKS)
    return scores.where(begun[:, None, None], -INF)


def predict(level, trend, lengths, damping=0.0, num_selected=4, sink=1, local=1):
    return torch.ops.sparda.predict_blocks(
        level, trend, torch.tensor(lengths, dtype=torch.int32), num_selected, SIZE, sink, local,
        damping,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("alpha", "beta", "damping"), [(0.4, 0.3, 0.0), (0.2, 0.5, 0.75), (1, 1, 1)]
)
def test_levels_trends_and_predictions_are_those_of_the_equations(alpha, beta, damping):
    level, trend = empty()
    plain = [[Plain(alpha, beta) for _ in range(GROUPS)] for _ in range(BATCH)]
    for step in scores_of(14):
        torch.ops.sparda.update_prediction(step, level, trend, alpha, beta, True)
        for row in range(BATCH):
            for group in range(GROUPS):
                it = plain[row][group]
                it.update(step[row, group].tolist())
                for kept, tensor, missing in ((it.level, level, -INF), (it.trend, trend, 0.0)):
                    want = [kept.get(i, missing) for i in range(BLOCKS)]
                    assert tensor[row, group].tolist() == pytest.approx(want, abs=1e-6)
        ids = predict(level, trend, [SIZE * BLOCKS - 1] * BATCH, damping)
        for row in range(BATCH):
            for group in range(GROUPS):
                scored = plain[row][group].predicted(damping)
                free = sorted((i for i in scored if i not in (0, 7, 8)), key=lambda i: -scored[i])
                assert set(ids[row, group].tolist()) - {-1} == {0, 7, 8, *free[:1]}


def test_trend_takes_the_level_as_it_was():
    level, trend = torch.tensor([[[1.0]]]), torch.tensor([[[0.5]]])
    torch.ops.sparda.update_prediction(torch.tensor([[[3.0]]]), level, trend, 0.25, 0.5, True)
    assert trend.item() == 0.5 * (3.0 - 1.0) + 0.5 * 0.5
    assert level.item() == 0.25 * 3.0 + 0.75 * 1.0


def test_the_last_scores_are_a_weight_of_one():
    level, trend = empty()
    for step in scores_of(12):
        torch.ops.sparda.update_prediction(step, level, trend, 1.0, 0.3, True)
    assert torch.equal(level, step)


def test_a_step_without_a_score_leaves_a_block_as_it_is():
    level, trend = torch.full((1, 1, 3), 2.0), torch.full((1, 1, 3), 0.5)
    scores = torch.tensor([[[-INF, 4.0, -INF]]])
    torch.ops.sparda.update_prediction(scores, level, trend, 0.5, 0.5, True)
    assert level.tolist() == [[[2.0, 3.0, 2.0]]]
    assert trend.tolist() == [[[0.5, 1.25, 0.5]]]


class TestCalibrated:
    """The first sequence was calibrated, the second was not."""

    CALIBRATED = torch.tensor([[0.25, 0.75, 1.0], [0.0, 0.9, 0.9]])

    def test_updates_take_the_weights_of_each_sequence(self):
        level, trend = empty()
        wanted = [empty() for _ in range(2)]
        for step in scores_of(12):
            torch.ops.sparda.update_prediction(
                step, level, trend, 0.5, 0.5, True, calibrated=self.CALIBRATED
            )
            for want, weights in zip(wanted, ((0.25, 0.75), (0.5, 0.5)), strict=True):
                torch.ops.sparda.update_prediction(step, *want, *weights, True)
        for row, (want_level, want_trend) in enumerate(wanted):
            assert torch.equal(level[row], want_level[row])
            assert torch.equal(trend[row], want_trend[row])

    def test_predictions_take_the_damping_of_each_sequence(self):
        level = torch.tensor([0.0, 3.0, 2.0, 0.0]).expand(2, 1, 4).contiguous()
        trend = torch.tensor([0.0, 0.0, 2.0, 0.0]).expand(2, 1, 4).contiguous()
        lengths = torch.tensor([3 * SIZE] * 2, dtype=torch.int32)
        ids = torch.ops.sparda.predict_blocks(
            level, trend, lengths, 3, SIZE, 1, 0, 0.0, calibrated=self.CALIBRATED
        )
        assert ids.tolist() == [[[0, 2, 3]], [[0, 1, 3]]]


class TestPrediction:
    def test_forced_blocks_are_always_in_and_others_only_if_they_were_scored(self):
        level, trend = empty()
        assert predict(level, trend, [8 * SIZE, 3])[:, 0].tolist() == [
            [0, 7, 8, -1],
            [0, -1, -1, -1],
        ]
        level[..., 5] = -3.0
        assert predict(level, trend, [8 * SIZE, 3])[:, 0].tolist() == [
            [0, 5, 7, 8],
            [0, -1, -1, -1],
        ]

    def test_ties_go_to_the_lower_id(self):
        level, trend = torch.zeros(1, 1, BLOCKS), torch.zeros(1, 1, BLOCKS)
        assert predict(level, trend, [8 * SIZE], num_selected=5).tolist() == [[[0, 1, 2, 7, 8]]]

    def test_what_does_not_exist_is_not_predicted(self):
        level = torch.arange(BLOCKS, dtype=torch.float32).expand(1, 1, BLOCKS).contiguous()
        ids = predict(level, torch.zeros_like(level), [5 * SIZE + 3], local=0)
        assert ids.tolist() == [[[0, 3, 4, 5]]]

    def test_damping_decides_how_much_a_trend_counts(self):
        level, trend = (
            torch.tensor([[[0.0, 3.0, 2.0, 0.0]]]),
            torch.tensor([[[0.0, 0.0, 2.0, 0.0]]]),
        )
        for damping, best in ((0.0, 1), (0.4, 1), (0.6, 2), (1.0, 2)):
            ids = predict(level, trend, [3 * SIZE], damping, num_selected=3, local=0)
            assert ids.tolist() == [[[0, best, 3]]]

    def test_a_whole_cache_may_be_predicted(self):
        level = torch.zeros(1, 1, BLOCKS)
        ids = predict(level, level, [BLOCKS * SIZE - 1], num_selected=BLOCKS)
        assert ids.tolist() == [[[*range(BLOCKS)]]]


class TestStandardise:
    def test_scale_and_offset_of_a_step_make_no_difference(self):
        scores = scores_of(BLOCKS)[-1]
        scores[..., 2] = -INF
        want = room.standardise(scores)
        assert torch.isneginf(want[..., 2]).all()
        open_ones = want[want > -INF].view(BATCH, GROUPS, -1)
        assert open_ones.mean(-1).abs().max() < 1e-6
        assert (open_ones.var(-1, correction=0) - 1).abs().max() < 1e-5
        assert torch.allclose(room.standardise(scores * 37.0 - 5.0), want, atol=1e-5)

    def test_short_list_is_one_above_the_best(self):
        scores = torch.tensor([[[1.0, 3.0, LISTED, LISTED, -INF]]])
        assert room.standardise(scores).tolist() == [[[-1.0, 1.0, 2.0, 2.0, -INF]]]

    def test_equal_none_and_only_listed_scores(self):
        assert room.standardise(torch.full((1, 1, 3), 7.0)).tolist() == [[[0.0, 0.0, 0.0]]]
        assert room.standardise(torch.full((1, 1, 2), -INF)).tolist() == [[[-INF, -INF]]]
        assert room.standardise(torch.full((1, 1, 2), LISTED)).tolist() == [[[1.0, 1.0]]]

    def test_update_standardises_what_cannot_be_compared(self):
        level, trend = empty()
        want, flat = empty()
        for step in scores_of(5):
            torch.ops.sparda.update_prediction(step * 9.0, level, trend, 0.4, 0.3, False)
            room.update_prediction_reference(room.standardise(step), want, flat, (0.4, 0.3))
        assert torch.allclose(level, want, atol=1e-5)

    def test_only_shares_of_attention_can_be_compared(self):
        own = ("infllm2", "quest", "nosa", "lowbit2", "lowbit4")
        own += tuple(SELECTORS[name].forecast_selector for name in own)
        comparable = [name for name in own if SELECTORS[name].is_comparable]
        assert comparable == ["infllm2", "lowbit2", "lowbit4"]
