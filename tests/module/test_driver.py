from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.cache import SpardaCache
from sparda_compile.module.driver import drive, make_driver
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, lowering="eager", block_size=16)


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


def prompt(num_tokens, batch_size=1):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(2, 256, (batch_size, num_tokens), generator=generator)


def test_a_driver_shares_the_model_and_does_not_keep_the_module():
    model = tiny_llama(num_hidden_layers=1)
    fast = optimize(model, CONFIG)
    driver = make_driver(fast, model)
    assert driver.lm_head is model.lm_head
    assert driver.config is model.config
    assert "forward" not in vars(model)
    gone = weakref.ref(fast)
    del fast
    gc.collect()
    assert gone() is None


def test_the_mask_of_the_first_step_alone_is_looked_at(fast, monkeypatch):
    seen = []
    forward = type(fast).forward

    def noted(self, input_ids, **kwargs):
        seen.append((input_ids.shape[1], kwargs.get("attention_mask") is not None))
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(type(fast), "forward", noted)
    cache = fast.new_cache(64)
    ids, mask = prompt(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    asked = {"max_new_tokens": 3, "do_sample": False, "past_key_values": cache}
    fast.generate(ids, attention_mask=mask, **asked)
    assert seen == [(9, True), (1, False), (1, False)]
    assert not cache.is_generating


def test_a_mask_that_changes_what_the_cache_holds_is_refused_for_one_new_token_too(fast):
    ids, mask = prompt(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    cache = fast.new_cache(64)
    fast(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(UnsupportedInputError, match="attention_mask"):
        fast.generate(
            torch.cat([ids, ids[:, :1]], 1), past_key_values=cache, max_new_tokens=2,
            attention_mask=torch.ones(2, 10, dtype=torch.long),
        )  # fmt: skip
    assert not cache.is_generating
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("wants_cache", [True, False])
def test_the_output_has_a_cache_if_it_is_wanted(fast, wants_cache):
    cache = SpardaCache(fast, 64)
    asked = {"inputs": prompt(9), "max_new_tokens": 2, "return_dict_in_generate": True}
    output = drive(fast._driver, cache, wants_cache, asked)
    kept = output.get("cache", output.get("past_key_values"))
    assert kept is (cache if wants_cache else None)


@pytest.mark.parametrize("returned", [{"text": 1}, (1, 2), "text", None])
def test_what_a_function_of_the_user_returns_is_handed_on(fast, returned):
    def loop(model, input_ids, **kwargs):
        return returned

    for use_cache in (True, False):
        assert fast.generate(prompt(9), custom_generate=loop, use_cache=use_cache) is returned
