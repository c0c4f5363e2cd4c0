"""What a prompt reads where the configuration leaves it open."""

from __future__ import annotations

import types

import pytest
import torch

from sparda_compile import SpardaConfig, explain
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.program.prompt_cost import prompt_cost, prompt_phase
from sparda_compile.selectors import SELECTORS

MODES = ("query", "forecast", "exact")
LOW_BIT = ("lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast")


@pytest.fixture
def captures(traced_llama):
    return traced_llama.captures


def phase(captures, num_past, num_tokens, **settings):
    config = SpardaConfig(**{"mode": "query", "machine": "h200", **settings})
    return prompt_phase(captures, config, 1, num_past, num_tokens)


@pytest.mark.parametrize("mode", MODES)
def test_long_prompts_are_sparse_where_that_is_faster(captures, mode):
    """Dense attention grows with the square of a prompt, sparse attention with the prompt."""
    phases = [phase(captures, 0, 1 << n, mode=mode) for n in range(10, 21)]
    assert phases == sorted(phases)  # `prefill` comes first, and never again
    assert {phases[0], phases[-1]} == {"prefill", "sparse_prefill"}


@pytest.mark.parametrize("mode", MODES)
def test_what_is_chosen_is_what_costs_less(captures, mode):
    config = SpardaConfig(mode=mode, machine="h200")
    for num_past in (0, 1 << 17):
        for num_tokens in (2, 200, 1 << 13, 1 << 16):
            if num_past + num_tokens < config.selection_starts_at:
                continue
            cost = prompt_cost(captures, config, 1, num_past, num_tokens)
            is_sparse = phase(captures, num_past, num_tokens, mode=mode) == "sparse_prefill"
            assert is_sparse == (cost.sparse_us < cost.dense_us)


def test_a_past_in_cpu_memory_has_to_cross_the_link(captures):
    def dense_us(offload):
        config = SpardaConfig(mode="query", machine="h200", offload=offload)
        return prompt_cost(captures, config, 1, 1 << 17, 2).dense_us

    assert dense_us("always") > 10 * dense_us("never")


def test_costs_count_sequences(captures):
    config = SpardaConfig(mode="query", machine="h200")
    one, four = (prompt_cost(captures, config, n, 0, 1 << 15) for n in (1, 4))
    assert four.dense_us == pytest.approx(4 * one.dense_us)
    assert four.sparse_us == pytest.approx(4 * one.sparse_us)


def test_what_is_asked_for_is_what_happens(captures):
    """From the first token on that leaves a block out."""
    begins = SpardaConfig(mode="query").selection_starts_at
    assert phase(captures, 0, begins, prefill="sparse") == "sparse_prefill"
    assert phase(captures, 0, begins - 1, prefill="sparse") == "prefill"
    assert phase(captures, 0, 1 << 20, prefill="dense") == "prefill"
    assert phase(captures, 0, 1 << 20, mode="dense") == "prefill"
    assert phase(captures, 0, 1 << 20, top_k=None) == "prefill"


def test_on_a_cpu_a_prompt_is_dense_unless_it_is_asked_for(captures):
    assert phase(captures, 0, 1 << 20, machine="cpu") == "prefill"
    assert phase(captures, 0, 1 << 20, machine="cpu", prefill="sparse") == "sparse_prefill"


def test_a_report_is_of_the_longest_prompt(traced_llama):
    config = SpardaConfig(mode="query", machine="h200")
    for max_tokens, want in ((1 << 13, "prefill"), (1 << 18, "sparse_prefill")):
        report = explain(traced_llama, config, max_tokens=max_tokens)
        assert {summary.phase for summary in report.passes} == {want, "decode"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_a_selector_without_a_kernel_for_prompts_reads_them_densely_or_refuses(
    captures, mode, selector, monkeypatch
):
    for name in LOW_BIT:
        monkeypatch.setattr(type(SELECTORS[name]), "selects_prompts", False)
    settings = {"mode": mode, "selector": selector}
    assert phase(captures, 0, 1 << 20, **settings) == "prefill"
    assert phase(captures, 0, 1 << 20, prefill="sparse", **settings) == "sparse_prefill"
    config = SpardaConfig(prefill="sparse", **settings)
    on_gpu = types.SimpleNamespace(
        get=lambda phase: types.SimpleNamespace(device=torch.device("cuda"))
    )
    with pytest.raises(UnsupportedInputError, match=f"'sparse' with selector='{selector}' runs on"):
        prompt_phase(on_gpu, config, 1, 0, 1 << 20)
    assert prompt_phase(on_gpu, config, 1, 0, 100) == "prefill"  # each token reads all blocks
    named = config.replace(prefill_selector="infllm2")
    assert prompt_phase(on_gpu, named, 1, 0, 1 << 20) == "sparse_prefill"
    with pytest.raises(UnsupportedInputError, match="with prefill_selector='lowbit4' runs on"):
        prompt_phase(on_gpu, named.replace(prefill_selector="lowbit4"), 1, 0, 1 << 20)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_that_another_selector_selects_for_are_sparse_where_that_is_faster(captures, mode):
    settings = {"mode": mode, "selector": "lowbit2", "prefill_selector": "infllm2"}
    for num_tokens in (1 << n for n in range(10, 21)):
        usual = phase(captures, 0, num_tokens, mode=mode)
        assert phase(captures, 0, num_tokens, **settings) == usual


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("selector", ["lowbit2", "lowbit4"])
def test_low_bit_selectors_select_for_prompts_on_a_gpu(captures, mode, selector):
    on_gpu = types.SimpleNamespace(
        get=lambda phase: types.SimpleNamespace(device=torch.device("cuda"))
    )
    for settings in ({"selector": selector}, {"prefill_selector": selector}):
        config = SpardaConfig(mode=mode, prefill="sparse", **settings)
        assert prompt_phase(on_gpu, config, 1, 0, 1 << 20) == "sparse_prefill"


@pytest.mark.parametrize("named", ["selector", "prefill_selector"])
def test_products_with_each_token_cost_half_of_dense_attention_or_a_heads_share(
    captures, named, monkeypatch
):
    """So a query's selection pays later than a Forecast's, and sooner behind a past."""
    site = types.SimpleNamespace(head_dim=128, num_heads=32, num_groups=2, window=None)
    monkeypatch.setattr("sparda_compile.program.prompt_cost.sites_of", lambda _: [site])

    def is_faster(num_past, num_tokens, **settings):
        settings[named] = "lowbit2"
        return phase(captures, num_past, num_tokens, **settings) == "sparse_prefill"

    sizes = [1 << n for n in range(13, 23)]
    by_query, by_forecast = (
        [is_faster(0, size, mode=mode) for size in sizes] for mode in ("query", "forecast")
    )
    for faster in (by_query, by_forecast):
        assert faster == sorted(faster)
        assert not faster[0]
    assert sum(by_query) < sum(by_forecast)
    assert by_forecast[-1]
    assert is_faster(1 << 17, 1 << 14, mode="query")
    assert is_faster(1 << 17, 2, mode="query", offload="always")


def test_candidates_cost_a_look_of_one_head_and_their_own_keys(captures, monkeypatch):
    site = types.SimpleNamespace(head_dim=128, num_heads=32, num_groups=2, window=None)
    monkeypatch.setattr("sparda_compile.program.prompt_cost.sites_of", lambda _: [site])

    def sparse_us(num_past, **settings):
        config = SpardaConfig(machine="h200", selector="lowbit2", **settings)
        return prompt_cost(captures, config, 1, num_past, 1 << 14).sparse_us

    of_all, of_some, of_more = (
        sparse_us(1 << 17, mode="query", prefill_candidates=times) for times in (None, 2.0, 4.0)
    )
    assert sparse_us(1 << 17, mode="forecast") < of_some < of_more < of_all / 2
    # Few blocks are all scored.
    few = [sparse_us(0, mode="query", prefill_candidates=times) for times in (None, 4.0)]
    assert few[0] == few[1]


def test_several_heads_of_a_forecast_cost_as_many_products(captures):
    def sparse_us(heads):
        config = SpardaConfig(
            mode="forecast", machine="h200", selector="lowbit2", forecast_heads=heads
        )
        return prompt_cost(captures, config, 1, 0, 1 << 20).sparse_us

    assert 1.5 * sparse_us(2) < sparse_us(4) < 2 * sparse_us(2)
    assert sparse_us(1) < sparse_us(2)
