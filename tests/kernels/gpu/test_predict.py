"""Prediction moves ids, bit-equal to the reference; an update rounds as written, or in its sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.gpu import predict as room
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.predict_blocks import (
    predict_blocks_reference,
    standardise,
    update_prediction_reference,
)
from sparda_compile.kernels.speculation import predict_ahead
from sparda_compile.selectors.nosa import LISTED

SIZE = 16
INF = float("inf")


def check_predict(device, level, trend, lengths, choice, damping):
    lengths = torch.tensor(lengths, dtype=torch.int32)
    want = predict_blocks_reference(level, trend, lengths, choice, damping)
    got = torch.full(want.shape, -77, dtype=torch.int32, device=device)
    room.predict(level.to(device), trend.to(device), lengths.to(device), got, choice, damping)
    assert torch.equal(got.cpu(), want)
    return want


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 8, 21, 32]), st.integers(0, 1 << 16), st.sampled_from([1, 2, 5, 20]),
    st.integers(0, 3), st.integers(0, 3), st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_predictions_equal_the_reference(device, num_blocks, seed, selected, sink, local, damping):
    """Few values, so there are many ties, and blocks that were never scored."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-INF, 0.0, -0.0, 1.0, -1.0, 0.5])
    shape = (2, 3, num_blocks)
    level = values[torch.randint(0, len(values), shape, generator=generator)]
    trend = values[torch.randint(1, len(values), shape, generator=generator)]
    lengths = torch.randint(0, num_blocks * SIZE, (2,), generator=generator).tolist()
    choice = Choice(min(selected, num_blocks), SIZE, sink, local)
    check_predict(device, level, trend, lengths, choice, damping)


def check_budget(device, level, trend, lengths, choice, damping, budget):
    """Check that a budget on the device picks what the op's reference does."""
    arguments = (choice.block_size, choice.sink_blocks, choice.local_blocks, damping)
    lengths, budget = (torch.tensor(n, dtype=torch.int32) for n in (lengths, [budget]))
    want = torch.full((*level.shape[:2], choice.num_selected), -77, dtype=torch.int32)
    predict_ahead(level, trend, lengths - 3, budget, want, 3, *arguments)
    got = torch.full_like(want, -77).to(device)
    level, trend, lengths, budget = (x.to(device) for x in (level, trend, lengths, budget))
    room.predict(level, trend, lengths, got, choice, damping, budget)
    assert torch.equal(got.cpu(), want)
    return want


@settings(max_examples=40)
@given(
    st.sampled_from([1, 2, 8, 21, 32]), st.integers(0, 1 << 16), st.sampled_from([1, 2, 5, 20]),
    st.integers(0, 3), st.integers(0, 3), st.integers(-1, 22),
)  # fmt: skip
def test_a_budget_limits_a_prediction(device, num_blocks, seed, selected, sink, local, budget):
    """With room for all, for some, for fewer than are forced, and for none."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([-INF, 0.0, 1.0, -1.0, 0.5])
    shape = (2, 2, num_blocks)
    level = values[torch.randint(0, len(values), shape, generator=generator)]
    trend = values[torch.randint(1, len(values), shape, generator=generator)]
    lengths = torch.randint(0, num_blocks * SIZE, (2,), generator=generator).tolist()
    choice = Choice(min(selected, num_blocks), SIZE, sink, local)
    ids = check_budget(device, level, trend, lengths, choice, 0.5, budget)
    assert (ids >= 0).sum(-1).max() <= max(budget, 0)


def test_a_budget_below_the_forced_blocks_takes_the_first_of_them(device):
    level, trend = torch.randn(1, 1, 37), torch.zeros(1, 1, 37)
    choice = Choice(8, SIZE, 2, 2)
    for budget, want in ((0, []), (1, [0]), (3, [0, 1, 34]), (5, [0, 1, 34, 35, 36])):
        ids = check_budget(device, level, trend, [36 * SIZE], choice, 0.5, budget)
        assert ids.tolist() == [[want + [-1] * (8 - len(want))]]


def test_nothing_to_go_by_predicts_the_forced_blocks(device):
    level = torch.full((1, 1, 37), -INF)
    ids = check_predict(
        device, level, level.new_zeros(level.shape), [36 * SIZE], Choice(6, SIZE, 1, 1), 0.0
    )
    assert ids.tolist() == [[[0, 35, 36, -1, -1, -1]]]


def steps_of(steps, num_blocks):
    """Return scores [W, B, G, N]; blocks begin one by one."""
    scores = torch.randn(steps, 2, 2, num_blocks)
    begun = torch.arange(steps)[:, None] + num_blocks // 2 >= torch.arange(num_blocks)
    return scores.where(begun[:, None, None], -INF)


@pytest.mark.parametrize("num_blocks", [1, 37, 128])
@pytest.mark.parametrize("steps", [1, 9])
def test_updates_equal_the_reference(device, monkeypatch, num_blocks, steps):
    monkeypatch.setattr(room, "_BLOCKS", 64)
    scores = steps_of(steps, num_blocks)
    want = torch.full((2, 2, num_blocks), -INF), torch.zeros(2, 2, num_blocks)
    got = [tensor.clone().to(device) for tensor in want]
    for _ in range(2):
        for step in scores:
            update_prediction_reference(step, *want, (0.4, 0.3))
        room.update(scores.to(device), *got, (0.4, 0.3), are_comparable=True)
    for mine, its in zip(want, got, strict=True):
        assert torch.equal(its.cpu(), mine)


@pytest.mark.parametrize("listed", [False, True])
def test_standardised_updates_are_near_the_reference(device, listed):
    scores = steps_of(7, 53) * 20 - 3
    if listed:
        scores[..., 4:9] = LISTED
    want = torch.full((2, 2, 53), -INF), torch.zeros(2, 2, 53)
    got = [tensor.clone().to(device) for tensor in want]
    for step in scores:
        update_prediction_reference(standardise(step), *want, (0.4, 0.3))
    room.update(scores.to(device), *got, (0.4, 0.3), are_comparable=False)
    for mine, its in zip(want, got, strict=True):
        assert torch.equal(its.cpu() == -INF, mine == -INF)
        assert torch.allclose(its.cpu(), mine, atol=1e-5)


CALIBRATED = torch.tensor([[0.25, 0.75, 1.0], [0.0, 0.9, 0.9]])


@pytest.mark.parametrize("are_comparable", [True, False])
def test_each_sequence_has_the_weights_that_it_is_calibrated_to(device, are_comparable):
    """The second one is not, and has the numbers."""
    scores = steps_of(5, 37)
    got = torch.full((2, 2, 37), -INF, device=device), torch.zeros(2, 2, 37, device=device)
    room.update(
        scores.to(device), *got, (0.4, 0.3), are_comparable=are_comparable,
        calibrated=CALIBRATED.to(device),
    )  # fmt: skip
    for row, weights in enumerate(((0.25, 0.75), (0.4, 0.3))):
        want = torch.full((1, 2, 37), -INF), torch.zeros(1, 2, 37)
        for step in scores[:, row : row + 1]:
            step = step if are_comparable else standardise(step)
            update_prediction_reference(step, *want, weights)
        for mine, its in zip(want, got, strict=True):
            assert torch.allclose(its[row].cpu(), mine[0], atol=0.0 if are_comparable else 1e-5)


def test_each_sequence_has_the_damping_that_it_is_calibrated_to(device):
    level, trend = torch.randn(2, 3, 37), torch.randn(2, 3, 37)
    lengths = torch.tensor([36 * SIZE, 30 * SIZE], dtype=torch.int32)
    got = torch.full((2, 3, 9), -77, dtype=torch.int32, device=device)
    choice = Choice(9, SIZE, 1, 1)
    on_device = (tensor.to(device) for tensor in (level, trend, lengths))
    room.predict(*on_device, got, choice, 0.25, calibrated=CALIBRATED.to(device))
    for row, damping in enumerate((1.0, 0.25)):
        one = slice(row, row + 1)
        want = predict_blocks_reference(level[one], trend[one], lengths[one], choice, damping)
        assert torch.equal(got[one].cpu(), want)


def test_steps_without_scores_change_nothing(device):
    level, trend = torch.randn(1, 2, 20), torch.randn(1, 2, 20)
    for are_comparable in (True, False):
        got = [tensor.clone().to(device) for tensor in (level, trend)]
        none = torch.full((3, 1, 2, 20), -INF, device=device)
        room.update(none, *got, (0.4, 0.3), are_comparable=are_comparable)
        assert torch.equal(got[0].cpu(), level)
        assert torch.equal(got[1].cpu(), trend)


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [300, 2048, 20000])
def test_long_sequences(device, num_blocks):
    level, trend = torch.randn(4, 8, num_blocks), torch.randn(4, 8, num_blocks)
    lengths = [num_blocks * SIZE - 1, 0, 90 * SIZE, 100 * SIZE + 7]
    choice = Choice(96, SIZE, 1, 32)
    check_predict(device, level, trend, lengths, choice, 0.5)
    for budget in (0, 20, 60, 96, 200):
        check_budget(device, level, trend, lengths, choice, 0.5, budget)
    scores = steps_of(3, num_blocks)
    for are_comparable in (True, False):
        want = level[:2, :2].clone(), trend[:2, :2].clone()
        got = [tensor.clone().to(device) for tensor in want]
        for step in scores:
            step = step if are_comparable else standardise(step)
            update_prediction_reference(step, *want, (0.4, 0.3))
        room.update(scores.to(device), *got, (0.4, 0.3), are_comparable=are_comparable)
        for mine, its in zip(want, got, strict=True):
            assert torch.allclose(its.cpu(), mine, atol=0.0 if are_comparable else 1e-5)


def test_more_blocks_than_can_be_counted(device):
    level = torch.zeros(1, 1, (1 << 15) + 1, device=device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    ids = torch.zeros(1, 1, 4, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedInputError, match="32769 KV blocks is too long"):
        room.predict(level, level, lengths, ids, Choice(4, SIZE, 1, 1), 0.0)
    with pytest.raises(UnsupportedInputError, match="32769 KV blocks is too long"):
        room.update(level[None], level, level, (0.4, 0.3), are_comparable=True)
