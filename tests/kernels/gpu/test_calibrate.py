"""Worths and hit rates are near the reference, which rounds other sums."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.calibrate import (
    CALIBRATION_WINDOW,
    calibrate,
    candidates,
    hit_rates_reference,
    worths_reference,
)
from sparda_compile.kernels.gpu import calibrate as room
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.predict_blocks import standardise
from sparda_compile.selectors.nosa import LISTED

SIZE = 16
INF = float("inf")


def rows_of(num_rows, num_blocks, batch=2, groups=2):
    """Return scores [W, B, G, N] and tokens before each row [B, W]; blocks begin one by one."""
    base = torch.rand(batch, groups, num_blocks)
    scores = base + torch.rand(num_rows, batch, groups, num_blocks)
    last = num_blocks * SIZE - num_rows - 7 * torch.arange(batch)
    before = (last[:, None] + torch.arange(num_rows)).clamp(min=0)
    begun = torch.arange(num_blocks) * SIZE + SIZE <= before.T[..., None]
    return scores.where(begun[:, :, None], -INF).contiguous(), before.int()


def wanted(scores, before, choice, weights, are_comparable):
    comparable = scores if are_comparable else standardise(scores)
    worths = worths_reference(comparable, before, choice, are_comparable=are_comparable)
    return comparable, hit_rates_reference(comparable, worths, before, choice, weights)


def few():
    """Return some of the candidates, with weights and dampings of each size."""
    return candidates("cpu")[::17].contiguous()


def check(device, scores, before, choice, weights, are_comparable):
    comparable, want = wanted(scores, before, choice, weights, are_comparable)
    given = scores.clone().to(device)
    got = room.hit_rates(
        given, before.to(device), Choice(*choice), weights.to(device),
        are_comparable=are_comparable,
    )  # fmt: skip
    # Of two blocks that are predicted alike but for a rounding, either may be picked.
    off = (got.cpu() - want).abs()
    assert (off < 1e-4).float().mean() > 0.95
    assert off.max() < 0.1
    assert torch.allclose(given.cpu(), comparable, atol=1e-5)
    return want


@pytest.mark.parametrize("are_comparable", [True, False])
@pytest.mark.parametrize("num_blocks", [1, 13, 37])
def test_rates_equal_the_reference(device, num_blocks, are_comparable):
    scores, before = rows_of(6, num_blocks)
    choice = (min(7, num_blocks), SIZE, 1, 1)
    found = check(device, scores, before, choice, few(), are_comparable)
    assert (found > 0.0).any() == (num_blocks > 4)


def test_short_lists_ties_and_rows_that_are_none(device):
    scores, before = rows_of(6, 21)
    scores = scores.round(decimals=1)
    scores[:, :, :, 3:6] = LISTED
    scores[:3, 1] = -INF
    check(device, scores, before, (8, SIZE, 1, 2), few(), are_comparable=False)


@pytest.mark.gpu
@pytest.mark.parametrize("num_blocks", [100, 2048])
@pytest.mark.parametrize("are_comparable", [True, False])
def test_a_whole_search_finds_as_good_weights(device, num_blocks, are_comparable):
    scores, before = rows_of(CALIBRATION_WINDOW, num_blocks, groups=4)
    choice = (num_blocks // 10, SIZE, 1, 2)
    weights = candidates("cpu")
    want = check(device, scores, before, choice, weights, are_comparable).sum(-1)
    found = torch.zeros(2, 3, device=device)
    num_rows = torch.full((2,), CALIBRATION_WINDOW, device=device)
    calibrate(
        scores.to(device), before.to(device), num_rows, choice, found,
        are_comparable=are_comparable,
    )  # fmt: skip
    for row in range(2):
        (place,) = torch.where(((weights - found[row].cpu()).abs() < 1e-6).all(-1))[0].tolist()
        assert want[place, row] >= want[:, row].max() - 1e-3


def test_more_blocks_than_can_be_counted(device):
    scores = torch.zeros(1, 1, 1, (1 << 15) + 1, device=device)
    before = torch.zeros(1, 1, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedInputError, match="32769 KV blocks is too long"):
        room.hit_rates(
            scores, before, Choice(4, SIZE, 1, 1), candidates(device), are_comparable=True
        )
