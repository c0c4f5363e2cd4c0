from __future__ import annotations

import pytest
import torch
from torch import nn

from sparda_compile.testing import building


@pytest.fixture
def model():
    return nn.Sequential(nn.Embedding(500, 100), nn.Linear(100, 400), nn.LayerNorm(400))


def test_weights_are_spread_and_no_vector_is_left_trivial(model):
    building.fill_weights(model, hidden_size=100, seed=0)
    embedding, linear, norm = model
    assert linear.weight.std().item() == pytest.approx(0.16, rel=0.02)
    assert embedding.weight.std().item() < 0.5 * linear.weight.std().item()
    assert 0.05 < norm.weight.std().item() < 0.2
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=0.05)
    assert norm.bias.abs().min().item() > 0


def test_std_overrides_the_spread(model):
    building.fill_weights(model, hidden_size=100, seed=0, std=0.5)
    assert model[1].weight.std().item() == pytest.approx(0.5, rel=0.02)


def test_query_norms_are_lifted():
    model = nn.ModuleDict({"q_norm": nn.LayerNorm(64), "k_norm": nn.LayerNorm(64)})
    building.fill_weights(model, hidden_size=64, seed=0)
    assert model["q_norm"].weight.mean() > 2 * model["k_norm"].weight.mean()


def test_weights_follow_the_seed_alone(model):
    linear = model[1]
    building.fill_weights(linear, hidden_size=100, seed=3)
    first = linear.weight.clone()
    building.fill_weights(linear, hidden_size=100, seed=4)
    assert not torch.equal(first, linear.weight)
    torch.manual_seed(99)
    building.fill_weights(linear, hidden_size=100, seed=3)
    assert torch.equal(first, linear.weight)


def test_from_transformers_gives_eval_mode_and_the_asked_attention():
    model = building.build_from_transformers(
        "LlamaForCausalLM",
        "LlamaConfig",
        {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        seed=0,
        attn_implementation="eager",
    )
    assert not model.training
    assert model.config._attn_implementation == "eager"
    assert model.lm_head.weight.dtype == torch.float32
