"""A prompt's tokens select by one summary, and decode steps by another, which the cache keeps both.

Low-bit selectors have no kernel for prompts; `prefill_selector="infllm2"` names blocks for them by
pooled keys. What a step reads is the low-bit selector's choice all the same.
"""

from __future__ import annotations

import functools

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.isa.engines import DeferredEngine, use_engine
from sparda_compile.state.layout import state_name
from sparda_compile.testing import random_forecast, reference_decode

SMALL = {
    "block_size": 16, "pool_size": 8, "pool_stride": 4, "sink_blocks": 1, "local_blocks": 1,
    "top_k": 2, "lowering": "eager", "prefill": "sparse", "prefill_selector": "infllm2",
    "machine": "h200",
}  # fmt: skip
MODES = {
    "query": {"mode": "query", "selector": "lowbit2"},
    "forecast": {"mode": "forecast", "selector": "lowbit4"},
}
RULES = ("block_size", "pool_size", "pool_stride", "sink_blocks", "local_blocks", "top_k")


@pytest.fixture(scope="module")
def forecast(shared_llama):
    return random_forecast(shared_llama, seed=1)


@pytest.fixture(scope="module")
def make(traced_llama, forecast):
    @functools.cache
    def made(name, **settings):
        config = SpardaConfig(**{**SMALL, **MODES[name], **settings})
        given = {0 if name == "bootstrap" else name + 1: w for name, w in forecast.items()}
        return optimize(traced_llama, config, forecast=given if config.needs_forecast else None)

    return made


def text(*lengths):
    """Return left-padded ids and their mask."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(2, 250, (len(lengths), max(lengths)), generator=generator)
    mask = torch.stack([torch.arange(max(lengths)) >= max(lengths) - n for n in lengths])
    return ids, mask.long()


def generated(fast, ids, mask, num_new=6):
    out = fast.generate(
        ids, attention_mask=mask, max_new_tokens=num_new, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("mode", MODES)
def test_prompt_and_steps_are_those_of_the_reference(shared_llama, make, forecast, mode):
    """Each by its own scores: with either selector for both, other logits come out."""
    ids, mask = text(130, 101)
    tokens, logits = generated(make(mode), ids, mask)
    rules = {name: SMALL[name] for name in RULES} | MODES[mode]
    for row, length in enumerate((130, 101)):
        want, want_logits = reference_decode(
            shared_llama, ids[row, -length:], 6, prefill="sparse", prefill_selector="infllm2",
            forecast=forecast, **rules,
        )  # fmt: skip
        assert tokens[row].tolist() == want
        torch.testing.assert_close(logits[row], torch.stack(want_logits), rtol=0, atol=1e-3)
    for other in ({"prefill_selector": None}, {"selector": "infllm2"}):
        assert (generated(make(mode, **other), ids, mask)[1] - logits).abs().max() > 1e-2


@pytest.mark.parametrize("mode", MODES)
def test_the_prompt_alone_is_that_of_the_selector_it_names(make, mode):
    ids, mask = text(130, 61)
    got = make(mode)(ids, attention_mask=mask).logits
    want = make(mode, selector="infllm2")(ids, attention_mask=mask).logits
    assert torch.equal(got[mask.bool()], want[mask.bool()])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_are_one_piece(make, mode, chunk):
    ids, mask = text(130, 61)
    tokens, logits = generated(make(mode), ids, mask)
    got_tokens, got_logits = generated(make(mode, chunk_tokens=chunk), ids, mask)
    assert torch.equal(got_tokens, tokens)
    torch.testing.assert_close(got_logits, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("offload", ["always", "never"])
@pytest.mark.parametrize("mode", MODES)
def test_a_second_turn_selects_among_what_steps_have_written(make, mode, offload):
    """As one behind a cache that takes the same keys over, and makes all summaries of them anew."""
    ids, _ = text(150)
    fast = make(mode, offload=offload)
    cache = fast.new_cache(256)
    fast(ids[:, :80], past_key_values=cache)
    for place in range(80, 115):  # two blocks that steps fill, and a part of one
        fast(ids[:, place : place + 1], past_key_values=cache)
    taken = fast.new_cache(256, past=cache)
    found = [fast(ids[:, 115:], past_key_values=each).logits for each in (cache, taken)]
    torch.testing.assert_close(*found, rtol=0, atol=1e-4)
    for layer in range(2):
        codes = {"query": "key_codes_2bit", "forecast": "key_codes"}[mode]
        for name, size in (("pooled_k", 36), (codes, 9)):  # of 150 tokens
            mine, theirs = (c.kv.state[state_name(name, layer)] for c in (cache, taken))
            assert mine[:, :, :size].any(-1).all()
            torch.testing.assert_close(mine[:, :, :size], theirs[:, :, :size])


@pytest.mark.parametrize("mode", MODES)
def test_what_moves_bytes_changes_nothing(make, mode):
    ids, mask = text(130, 61)
    want = generated(make(mode), ids, mask)[1]
    for settings in ({"offload": "never"}, {"page_ratio": 1.0}):
        assert torch.equal(generated(make(mode, **settings), ids, mask)[1], want)
    for seed in range(3):
        with use_engine(DeferredEngine(seed)):
            assert torch.equal(generated(make(mode, page_ratio=1.0), ids, mask)[1], want), seed


@pytest.mark.parametrize("mode", MODES)
def test_keys_of_the_model_itself_are_taken_over(shared_llama, make, mode):
    ids, _ = text(150)
    fast = make(mode)
    past = shared_llama(ids[:, :100], use_cache=True).past_key_values
    taken = fast.new_cache(256, past=past)
    chunks = [fast(part, past_key_values=taken).logits for part in ids[:, 100:].split(20, dim=1)]
    whole = fast(ids[:, 100:], past_key_values=fast.new_cache(256, past=past)).logits
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole, rtol=0, atol=1e-4)
    other = make(mode, selector="infllm2")
    want = other(ids[:, 100:], past_key_values=other.new_cache(256, past=past)).logits
    assert torch.equal(whole, want)


def test_hints_of_steps_begin_behind_a_sparse_prompt(make):
    """What `exact` reads does not depend on what it has fetched."""
    ids, mask = text(130, 61)
    want = generated(make("query"), ids, mask)[1]
    for hint in ("ema", "previous_step", ("ema", "next_query")):
        got = generated(make("query", mode="exact", hint=hint), ids, mask)[1]
        assert torch.equal(got, want), hint
