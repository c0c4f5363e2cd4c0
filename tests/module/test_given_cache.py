"""What a caller gives as a cache: whose it is, and whether the conversation goes on from it."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import KVCacheError
from sparda_compile.module.given_cache import (
    check_owner,
    check_reserved,
    check_turn,
    keys_and_values,
)

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager", max_tokens=256)


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


@pytest.fixture(scope="module")
def filled(fast):
    cache = fast.new_cache()
    fast(torch.arange(9)[None], past_key_values=cache)
    return cache


def test_owner(fast, filled):
    check_owner(filled, fast)
    check_owner(fast.new_cache(), fast)
    with pytest.raises(KVCacheError, match="that of another model"):
        check_owner(filled, torch.nn.Linear(1, 1))
    with pytest.raises(KVCacheError, match="is a DynamicCache; pass None"):
        check_owner(DynamicCache(), fast)


def test_a_step_that_did_not_end(fast):
    cache = fast.new_cache()
    fast(torch.arange(9)[None], past_key_values=cache)
    cache.kv.is_broken = True
    with pytest.raises(KVCacheError, match="began and did not end"):
        check_owner(cache, fast)


def test_reserved():
    check_reserved(CONFIG, 256)
    check_reserved(CONFIG.replace(max_tokens=None), 1 << 20)
    with pytest.raises(KVCacheError, match="need 257 tokens per sequence, more than max_tokens"):
        check_reserved(CONFIG, 257)


def test_turn(fast, filled):
    check_turn(fast.new_cache(), None)
    check_turn(filled, torch.arange(10)[None])
    with pytest.raises(KVCacheError, match="has 9 tokens but the cache holds 9"):
        check_turn(filled, torch.arange(9)[None])
    with pytest.raises(KVCacheError, match="first at token 3"):
        check_turn(filled, torch.tensor([[0, 1, 2, 4, 4, 5, 6, 7, 8, 9]]))


def test_keys_and_values(shared_llama):
    past = shared_llama(torch.arange(6)[None], use_cache=True).past_key_values
    pairs, mask = keys_and_values(past, None)
    assert [tuple(k.shape) for k, _ in pairs.values()] == [(1, 2, 6, 16)] * 2
    assert torch.equal(mask, torch.ones(1, 6, dtype=torch.bool))
    with pytest.raises(KVCacheError, match="holds no token"):
        keys_and_values(DynamicCache(), None)
