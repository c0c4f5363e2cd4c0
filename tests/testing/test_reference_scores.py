"""The reference's scores against what their formulas say of keys made for the purpose."""

from __future__ import annotations

import math

import pytest
import torch

from sparda_compile.testing import reference_scores as scores


def rules(**changes):
    defaults = {
        "mode": "query",
        "selector": "infllm2",
        "top_k": 1,
        "sink_blocks": 0,
        "local_blocks": 0,
        "block_size": 64,
        "pool_size": 32,
        "pool_stride": 16,
    }
    return scores.Rules(**{**defaults, **changes})


def test_windows_of_a_block_are_the_published_five():
    for m in range(4):
        touching = [
            j
            for j in range(20)
            if scores.window_to_block_scores(
                [1.0 if i == j else 0.0 for i in range(20)], 5, rules()
            )[m]
            == 1.0
        ]
        assert touching == [j for j in range(4 * m - 1, 4 * m + 4) if j >= 0]


def test_block_without_a_window_is_never_preferred():
    found = scores.window_to_block_scores([-5.0], 3, rules())
    assert found == [-5.0, -math.inf, -math.inf]


def test_pooled_keys_are_whole_windows_only():
    keys = [torch.full((2,), float(t)) for t in range(63)]
    pooled = scores.pooled_keys(keys, rules())
    assert [p[0].item() for p in pooled] == [15.5, 31.5]
    assert scores.pooled_keys(keys[:31], rules()) == []


def test_quest_bounds_every_key_of_a_block():
    generator = torch.Generator().manual_seed(0)
    keys = list(torch.randn(100, 8, generator=generator))
    q_RD = torch.randn(3, 8, generator=generator)
    found = scores._quest_block_scores(q_RD, keys, 3, rules(selector="quest"))
    for m in range(2):
        products = torch.stack(keys[64 * m : 64 * (m + 1)]) @ q_RD.mean(0)
        assert found[m] >= products.max().item()
    assert found[2] == -math.inf


@pytest.mark.parametrize("bits", [2, 4])
def test_keys_in_few_bits_are_at_most_half_a_step_away(bits):
    block_PD = torch.randn(32, 8, generator=torch.Generator().manual_seed(1)) * 3 + 1
    block_PD[:, 3] = 7.0
    near_PD = scores._few_bits(block_PD, bits)
    step_D = (block_PD.amax(0) - block_PD.amin(0)) / (2**bits - 1)
    assert ((near_PD - block_PD).abs() <= step_D / 2 + 1e-5).all()
    assert (near_PD[:, 3] == 7.0).all()
    for d in (0, 1, 2):
        assert len(near_PD[:, d].unique()) <= 2**bits
        for end in (block_PD[:, d].amin(), block_PD[:, d].amax()):
            assert (near_PD[:, d] - end).abs().min() < 1e-5


def test_codes_of_two_bits_by_hand():
    """From 0 to 3 there is a level at each whole number; halves go up."""
    block_PD = torch.tensor([[0.0], [0.4], [0.5], [1.4], [2.5], [3.0]])
    near_PD = scores._few_bits(block_PD, 2)
    assert near_PD.flatten().tolist() == [0.0, 0.0, 1.0, 1.0, 3.0, 3.0]


@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_shares_of_full_blocks_sum_to_the_heads(selector):
    generator = torch.Generator().manual_seed(2)
    keys = list(torch.randn(100, 8, generator=generator))
    q_RD = torch.randn(3, 8, generator=generator)
    found = scores.block_scores(q_RD, None, 0.5, keys, 7, rules(selector=selector, block_size=16))
    assert sum(found[:6]) == pytest.approx(3.0)
    assert found[6] == -math.inf  # 4 of its tokens are there
    masses = scores.block_scores(
        q_RD, q_RD[0], 0.5, keys, 7, rules(selector=selector, block_size=16)
    )
    alone = scores.block_scores(
        q_RD[:1], None, 0.5, keys, 7, rules(selector=selector, block_size=16)
    )
    # One head's shares are its masses over their sum.
    shares = torch.tensor(masses[:6]).softmax(0)
    torch.testing.assert_close(shares, torch.tensor(alone[:6]))
    assert masses[6] == -math.inf
    none = scores.block_scores(q_RD, None, 0.5, keys[:9], 1, rules(selector=selector))
    assert none == [-math.inf]
