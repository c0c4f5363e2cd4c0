from __future__ import annotations

import pytest
import torch

from sparda_compile.testing import PlainCausalLM

IDS = torch.arange(24).remainder(7).reshape(2, 12)


@pytest.fixture(params=["rotary", "learned"])
def positions(request):
    return request.param


@torch.no_grad()
def test_positions_default_to_counting(positions):
    model = PlainCausalLM(positions=positions)
    counted = torch.arange(12).unsqueeze(0)
    assert model(IDS).shape == (2, 12, model.vocab_size)
    torch.testing.assert_close(model(IDS), model(IDS, counted), rtol=0, atol=0)
    assert not torch.allclose(model(IDS), model(IDS, counted * 2), atol=1e-3)


@torch.no_grad()
def test_rows_take_their_own_positions(positions):
    model = PlainCausalLM(positions=positions)
    rows = torch.arange(12).repeat(2, 1)
    rows[1] += 100
    alone = model(IDS[1:], rows[1:])
    torch.testing.assert_close(model(IDS, rows)[1:], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_token_sees_a_later_one(positions):
    model = PlainCausalLM(positions=positions)
    changed = IDS.clone()
    changed[:, -1] = 200
    torch.testing.assert_close(model(IDS)[:, :-1], model(changed)[:, :-1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_both_forms_of_groups_mean_the_same():
    inside = PlainCausalLM(group_form="enable_gqa", num_heads=6, num_groups=3)
    before = PlainCausalLM(group_form="repeat_interleave", num_heads=6, num_groups=3)
    torch.testing.assert_close(inside(IDS), before(IDS), rtol=1e-5, atol=1e-5)


def test_building_it_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    first = PlainCausalLM(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    second = PlainCausalLM(seed=3)
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
