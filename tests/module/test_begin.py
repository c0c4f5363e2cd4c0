from __future__ import annotations

import pytest
import torch
import transformers

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError, UnsupportedInputError
from sparda_compile.module.begin import begin_call, begin_generation
from sparda_compile.testing import tiny_llama
from sparda_compile.testing.building import build_from_config

IDS = torch.arange(20).view(2, 10)


@pytest.fixture(scope="module")
def fast():
    config = SpardaConfig(mode="dense", top_k=None, lowering="eager", max_tokens=64, block_size=16)
    return optimize(tiny_llama(), config)


def call(fast, ids, mask=None, kept=0):
    cache = fast.new_cache()
    return begin_call(fast, cache, fast._ready(cache, ids), ids, mask, kept)


def test_a_call_is_read_by_its_shape_and_its_longest_sequence(fast):
    reading, mask, num_real = call(fast, IDS)
    assert (reading.shape, reading.may_hide, reading.last_only, num_real) == (
        (2, 10),
        False,
        False,
        10,
    )
    assert bool(mask.all())
    hidden = torch.ones_like(IDS)
    hidden[:, :3] = 0
    reading, mask, num_real = call(fast, IDS, hidden, 1)
    assert (reading.may_hide, reading.last_only, num_real) == (True, True, 7)


def test_a_call_without_room_or_without_a_token_is_refused(fast):
    with pytest.raises(KVCacheError):
        call(fast, torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(UnsupportedInputError, match="hides the only new token"):
        call(fast, IDS[:, :1], torch.tensor([[1], [0]]))


def test_a_generation_gets_a_cache_with_room_and_says_what_ranks_compare(fast):
    facts = {}
    cache, wants = begin_generation(fast, IDS, {"max_new_tokens": 4, "use_cache": False}, facts)
    assert (cache.max_tokens, cache.is_checked, wants) == (64, True, False)
    assert facts["input_ids"] is IDS
    with pytest.raises(KVCacheError, match="need 74 tokens"):
        begin_generation(fast, IDS, {"max_new_tokens": 64}, {})


def test_a_given_cache_is_taken_and_has_to_be_of_the_module(fast):
    mine = fast.new_cache()
    given = {"past_key_values": mine, "max_new_tokens": 2}
    assert begin_generation(fast, IDS, given, {}) == (mine, True)
    assert "past_key_values" not in given
    with pytest.raises(KVCacheError, match="the cache given is a dict"):
        begin_generation(fast, IDS, {"past_key_values": {1: 2}}, {})


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_window_that_holds_all_positions_changes_nothing_within_it(attn_implementation):
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
        sliding_window=40, max_position_embeddings=32, attn_implementation=attn_implementation,
    )  # fmt: skip
    model = build_from_config(
        transformers.MistralForCausalLM, config, seed=0, attn_implementation=attn_implementation
    )
    fast = optimize(model, SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16))
    assert {site.kind for site in fast.programs.latest_plan("decode").sites} == {"sparse"}
    ids = torch.randint(0, 64, (2, 34), generator=torch.Generator().manual_seed(0))
    ask = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(ids, **ask), model.generate(ids, **ask))
    with pytest.raises(UnsupportedInputError, match=r"41 tokens .* sliding window of 40"):
        fast.generate(ids, max_new_tokens=7)
    cache = fast.new_cache()
    fast(ids, past_key_values=cache)
    with pytest.raises(UnsupportedInputError, match=r"41 tokens .* sliding window of 40"):
        fast(ids[:, :7], past_key_values=cache)
    assert cache.get_seq_length() == 34
