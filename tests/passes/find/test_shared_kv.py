"""Layers that share one KV cache are refused with that reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import AttentionNotFoundError
from sparda_compile.testing.building import build_from_config

CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)


def gemma3n(num_shared: int) -> Any:
    config = Gemma3nTextConfig(
        vocab_size=256,
        vocab_size_per_layer_input=256,
        hidden_size=64,
        hidden_size_per_layer_input=8,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=[64] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=32,
        laurel_rank=8,
        altup_num_inputs=2,
        num_kv_shared_layers=num_shared,
    )
    return build_from_config(Gemma3nForCausalLM, config, seed=0, attn_implementation="sdpa")


def test_shared_layers_are_named() -> None:
    with pytest.raises(AttentionNotFoundError, match="shares the KV cache of layer 0"):
        optimize(gemma3n(2), CONFIG)


def test_without_shared_layers_it_equals_the_original() -> None:
    model = gemma3n(0)
    ids = torch.arange(1, 70)[None]
    with torch.no_grad():
        want, got = model(ids).logits, optimize(model, CONFIG)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
