"""Readings: dense as the model's, and selected as a sparse prefill of the optimized module."""

from __future__ import annotations

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import Reading, read, read_selected
from sparda_compile.testing import build, random_forecast, tiny_llama, tiny_nosa

CONFIG = SpardaConfig(
    top_k=2, local_blocks=1, block_size=16, pool_size=8, pool_stride=4, lowering="eager",
    prefill="sparse",
)  # fmt: skip


def ids_of(num_tokens):
    return torch.randint(0, 256, (2, num_tokens), generator=torch.Generator().manual_seed(0))


def forecast_of(model):
    named = random_forecast(model, seed=1)
    return {0 if name == "bootstrap" else name + 1: w for name, w in named.items()}


CASES = {
    "query": (tiny_llama, {"mode": "query"}),
    "quest": (tiny_llama, {"mode": "query", "selector": "quest"}),
    "forecast": (tiny_llama, {"mode": "forecast"}),
    "lowbit4": (tiny_llama, {"mode": "query", "selector": "lowbit4"}),
    "lowbit2 by forecast": (tiny_llama, {"mode": "forecast", "selector": "lowbit2"}),
    "lowbit2, its prompt by infllm2": (
        tiny_llama, {"mode": "query", "selector": "lowbit2", "prefill_selector": "infllm2"},
    ),
    "lowbit2, its prompt by candidates": (
        tiny_llama, {"mode": "query", "selector": "lowbit2", "prefill_candidates": 1.5},
    ),
    "lowbit4 by forecast, its prompt by pooled keys": (
        tiny_llama, {"mode": "forecast", "selector": "lowbit4", "prefill_selector": "infllm2"},
    ),
    "norms": (lambda: build("qwen3"), {"mode": "query"}),
    "nosa": (tiny_nosa, {"mode": "query", "selector": "nosa", "short_list": 1}),
    "nosa by forecast": (tiny_nosa, {"mode": "forecast", "selector": "nosa", "short_list": 1}),
}  # fmt: skip


@pytest.mark.parametrize(("make", "settings"), CASES.values(), ids=CASES)
def test_steps_behind_a_selected_reading_are_those_of_the_module(make, settings):
    model, config = make(), CONFIG.replace(**settings)
    forecast = forecast_of(model) if config.mode == "forecast" else None
    ids = ids_of(150)
    reading = read_selected(model, ids[:, :140], config, forecast=forecast)
    got = decode(model, reading, ids[:, 140:], config, forecast=forecast).logits_BSV
    fast = optimize(model, config, forecast=forecast)
    cache = fast.new_cache(256)
    fast(ids[:, :140], past_key_values=cache)
    want = [fast(token, past_key_values=cache).logits for token in ids[:, 140:].split(1, dim=1)]
    torch.testing.assert_close(got, torch.cat(want, dim=1), rtol=0, atol=1e-3)
    dense = decode(model, read(model, ids[:, :140]), ids[:, 140:], config, forecast=forecast)
    assert not torch.allclose(got, dense.logits_BSV, atol=1e-2)


def test_a_budget_of_everything_is_a_dense_reading():
    model, ids = tiny_llama(), ids_of(100)
    dense, all_of_it = read(model, ids), read_selected(model, ids, CONFIG.replace(
        mode="query", top_k=None,
    ))  # fmt: skip
    for mine, other in zip(
        dense.keys + dense.values, all_of_it.keys + all_of_it.values, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)


def test_models_that_are_not_built_like_llama_are_refused():
    with pytest.raises(UnsupportedInputError, match="cannot be evaluated offline"):
        read_selected(build("gpt2"), ids_of(20), CONFIG.replace(mode="query"))


def test_a_part_of_a_reading_is_its_first_tokens():
    keys = [torch.randn(1, 2, 30, 4) for _ in range(2)]
    part = Reading(tuple(keys), tuple(keys)).before(12)
    assert part.length == 12
    assert torch.equal(part.values[1], keys[1][:, :, :12])
