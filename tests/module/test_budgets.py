"""Budgets of mode `speculate` follow what is counted on the device, and change no result."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.module import budgets as module
from sparda_compile.testing import tiny_llama

SMALL = {
    "mode": "speculate", "block_size": 16, "pool_size": 8, "pool_stride": 4, "local_blocks": 1,
    "top_k": 4, "machine": "h200", "lowering": "eager", "max_tokens": 512, "offload": "never",
    "prefill": "dense", "speculate_where": "always",
}  # fmt: skip
FORCED, MOST = 3, 9
IDS = torch.randint(2, 250, (2, 150), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _short_period(monkeypatch):
    monkeypatch.setattr(module, "PERIOD", 4)


@pytest.fixture(scope="module")
def fast():
    return optimize(tiny_llama(), SpardaConfig(**SMALL))


@pytest.fixture
def times(monkeypatch):
    """Let the parts of all layers take what a test says."""

    def put(**changed):
        plan = module.Budgets.__init__

        def init(self, given, *rest):
            changed_times = {
                layer: dataclasses.replace(each, **changed)
                for layer, each in given.speculated.items()
            }
            plan(self, dataclasses.replace(given, speculated=changed_times), *rest)

        monkeypatch.setattr(module.Budgets, "__init__", init)

    return put


def decode(fast, cache, steps=40):
    """Return the logits of some steps behind a prompt."""
    given = fast(IDS, past_key_values=cache).logits[:, -1]
    found = []
    for _ in range(steps):
        given = fast(given.argmax(-1, keepdim=True), past_key_values=cache).logits[:, -1]
        found.append(given)
    return torch.stack(found)


def on_device(cache):
    """Return the budgets that the device reads, by layer."""
    return {
        int(name.rpartition("_")[2]): int(tensor)
        for name, tensor in cache.kv.state.items()
        if name.startswith("sparda_budget")
    }


def test_budgets_shrink_where_prediction_costs_more_than_repair(fast, times):
    wanted = decode(fast, fast.new_cache())
    times(block_us=50.0, miss_us=0.0)
    cache = fast.new_cache()
    assert cache.budgets == {}
    assert torch.equal(decode(fast, cache), wanted)
    assert cache.budgets == on_device(cache) == {0: FORCED, 1: FORCED}


def test_budgets_stay_large_where_misses_cost_more(fast, times):
    times(block_us=0.0, miss_us=50.0)
    cache = fast.new_cache()
    decode(fast, cache)
    assert cache.budgets == on_device(cache) == {0: MOST, 1: MOST}


def test_what_was_set_by_hand_stays(fast, times):
    times(block_us=50.0, miss_us=0.0)
    cache = fast.new_cache()
    cache.set_budgets({1: 7})
    decode(fast, cache, 20)
    assert cache.budgets == on_device(cache) == {0: FORCED, 1: 7}
    cache.set_budgets({0: 8})
    decode_more = fast(IDS[:, :1], past_key_values=cache)
    assert decode_more.logits.isfinite().all()
    assert cache.budgets == on_device(cache) == {0: 8, 1: 7}


def test_counters_that_begin_anew_mislead_nobody(fast, times):
    times(block_us=0.0, miss_us=50.0)
    cache = fast.new_cache()
    decode(fast, cache, 10)
    cache.kv.reset_stats()
    decode_more = fast(IDS[:, :1], past_key_values=cache)
    for _ in range(12):
        decode_more = fast(
            decode_more.logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache
        )
    assert on_device(cache) == {0: MOST, 1: MOST}


def test_the_union_keeps_its_budget(times):
    times(block_us=50.0, miss_us=0.0)
    fast = optimize(tiny_llama(), SpardaConfig(**{**SMALL, "repair": "union"}))
    cache = fast.new_cache()
    decode(fast, cache, 20)
    assert on_device(cache) == {0: MOST, 1: MOST}
    assert cache.budgets == {}
