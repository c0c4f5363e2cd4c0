"""Mixed scores, and the share that is learned, against their formulas."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.kernels.mixture import (
    DECAY,
    START,
    learn_mixture,
    learn_reference,
    mix_reference,
    mix_scores,
    share_of,
)
from sparda_compile.kernels.predict_blocks import standardise

INF = float("inf")
SIZE = 16
LENGTHS = torch.tensor([16 * 9 + 4, 16 * 6], dtype=torch.int32)


def scores(seed):
    """Return scores of two sequences, 3 groups and 12 blocks; blocks to come have none."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.rand(2, 3, 12, generator=generator)
    return found.masked_fill(torch.arange(12) > (LENGTHS // SIZE)[:, None, None], -INF)


def test_the_share_is_learned_and_stays_a_share():
    sums = torch.tensor([[[0.0, 0.0], [1.0, 4.0], [-1.0, 2.0], [5.0, 2.0]]])
    assert share_of(sums).flatten().tolist() == [START, 0.25, 0.0, 1.0]


def test_a_mixture_is_a_weighted_sum_of_what_both_know():
    asked, past = torch.tensor([[[1.0, 2.0, -INF, 3.0]]]), torch.tensor([[[3.0, -INF, 1.0, 3.0]]])
    sums = torch.tensor([[[1.0, 4.0]]])
    assert mix_reference(asked, past, sums).flatten().tolist() == [2.5, -INF, -INF, 3.0]


@pytest.mark.parametrize("sink", [0, 2])
@pytest.mark.parametrize("local", [0, 3])
def test_the_share_is_that_of_the_least_squares(sink, local):
    """Of all mixtures over two steps; the older step counts less."""
    steps = [(scores(3 * i), scores(3 * i + 1), scores(3 * i + 2)) for i in range(2)]
    sums = torch.zeros(2, 3, 2)
    for step in steps:
        learn_reference(*step, LENGTHS, sums, (SIZE, sink, local))
    share = share_of(sums).double()

    def distance(of):
        total = torch.zeros(2, 3, dtype=torch.float64)
        for weight, (own, asked, past) in zip((DECAY, 1.0), steps, strict=True):
            for row, length in enumerate(LENGTHS.tolist()):
                used = slice(sink, max(length // SIZE - local, sink))
                mixed = of[row] * asked[row, :, used] + (1 - of[row]) * past[row, :, used]
                total[row] += weight * (own[row, :, used] - mixed).double().square().sum(-1)
        return total

    best = distance(share)
    assert ((share > 0) & (share < 1)).any()
    for other in (share + 1e-3, share - 1e-3):
        inside = ((other >= 0) & (other <= 1))[..., 0]
        assert (distance(other) >= best - 1e-9)[inside].all()


def test_a_block_without_a_score_teaches_nothing():
    own, asked, past = scores(0), scores(1), scores(2)
    want, sums = torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)
    places = torch.tensor([1, 2, 3])
    kept = torch.ones(12, dtype=torch.bool)
    kept[places] = False
    masked = [part.masked_fill(~kept, -INF) for part in (own, asked, past)]
    learn_reference(*masked, LENGTHS, want, (SIZE, 0, 1))
    for part, place in zip((own, asked, past), places.tolist(), strict=True):
        part[..., place] = -INF
    learn_reference(own, asked, past, LENGTHS, sums, (SIZE, 0, 1))
    assert torch.isfinite(sums).all()
    assert torch.equal(sums, want)


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("comparable", [False, True])
def test_ops_are_their_references(comparable, calibrated):
    own, asked, level = scores(0), scores(1), scores(2)
    trend, sums = torch.randn(2, 3, 12), torch.rand(2, 3, 2)
    weights = torch.tensor([[0.4, 0.3, 0.75], [0.0, 0.0, 0.0]]) if calibrated else None
    damping = torch.tensor([0.75, 0.5] if calibrated else [0.5, 0.5])[:, None, None]
    past = level + damping * trend
    given = (asked, own) if comparable else (standardise(asked), standardise(own))
    kept = [x.clone() for x in (own, asked, level, trend, sums)]
    mixed = mix_scores(asked, level, trend, sums, 0.5, comparable, calibrated=weights)
    torch.testing.assert_close(mixed, mix_reference(given[0], past, sums))
    assert all(map(torch.equal, kept, (own, asked, level, trend, sums)))
    want = sums.clone()
    learn_reference(given[1], given[0], past, LENGTHS, want, (SIZE, 1, 1))
    rest = (0.5, comparable, SIZE, 1, 1)
    learn_mixture(own, asked, level, trend, LENGTHS, sums, *rest, calibrated=weights)
    torch.testing.assert_close(sums, want)
    assert all(map(torch.equal, kept[:4], (own, asked, level, trend)))
