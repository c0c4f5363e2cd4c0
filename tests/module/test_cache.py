"""`SpardaCache`: what transformers asks of a cache, and what it may not do with this one."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers.cache_utils import Cache, DynamicCache

from sparda_compile import SpardaConfig, optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import ConfigError, KVCacheError, UnsupportedInputError
from sparda_compile.module.cache import SpardaCache

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")


def tokens(length, batch_size=1):
    return torch.zeros(batch_size, length, dtype=torch.long)


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


def test_new_cache_is_empty_and_has_its_capacity(fast):
    cache = fast.new_cache(100)
    assert isinstance(cache, Cache)
    assert cache.owner() is fast
    assert cache.kv is None
    assert (len(cache), cache.get_seq_length(), cache.get_seq_length(1)) == (0, 0, 0)
    assert cache.get_max_cache_shape() == cache.get_max_length() == cache.max_tokens == 512
    assert not cache.is_compileable


def test_it_counts_what_was_passed_in(fast):
    cache = fast.new_cache(100)
    fast(tokens(9, 2), past_key_values=cache)
    assert (len(cache), cache.get_seq_length()) == (2, 9)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 9:12] = 0
    fast(tokens(5, 2), past_key_values=cache, attention_mask=mask)
    assert cache.get_seq_length() == 14
    assert cache.kv.lengths() == [11, 14]
    assert cache.kv.longest == 14


def test_what_transformers_asks_of_its_form(fast):
    cache = fast.new_cache(100)
    assert (cache.is_initialized, cache.batch_size, cache.get_mask_sizes(3, 0)) == (
        False,
        -1,
        (3, 0),
    )
    fast(tokens(9, 2), past_key_values=cache)
    assert (cache.is_initialized, cache.batch_size, cache.get_mask_sizes(3, 0)) == (
        True,
        2,
        (12, 0),
    )


class TestDeepCopies:
    @pytest.mark.parametrize("offload", ["always", "never"])
    @pytest.mark.parametrize(
        "settings",
        [
            {"mode": "query"},
            {"mode": "exact", "hint": "ema"},
            {"mode": "exact", "hint": "previous_step", "selector": "lowbit2"},
        ],
    )
    def test_each_goes_on_by_itself(self, traced_llama, settings, offload):
        config = SpardaConfig(
            **settings, top_k=1, local_blocks=1, block_size=16, lowering="eager", offload=offload
        )
        fast = optimize(traced_llama, config)
        drawn = torch.Generator().manual_seed(3)
        prompt, one, other = (torch.randint(0, 256, (2, n), generator=drawn) for n in (90, 7, 22))
        steps = torch.randint(0, 256, (9, 2, 1), generator=drawn)
        mask = torch.ones(2, 90, dtype=torch.long)
        mask[0, :20] = 0

        def ask(cache, turn):
            masks = torch.cat([mask, torch.ones_like(turn)], dim=1)
            found = [fast(turn, masks, past_key_values=cache).logits]
            for step in steps:
                masks = torch.cat([masks, torch.ones_like(step)], dim=1)
                found.append(fast(step, masks, past_key_values=cache).logits)
            return torch.cat(found, dim=1)

        def read():
            cache = fast.new_cache(200)
            fast(prompt, mask, past_key_values=cache)
            return cache

        first = read()
        second = copy.deepcopy(first)
        assert (second.kv is first.kv, second.get_seq_length()) == (False, 90)
        found = ask(second, other), ask(first, one)
        assert torch.equal(found[0], ask(read(), other))
        assert torch.equal(found[1], ask(read(), one))

    def test_an_empty_one(self, fast):
        cache = copy.deepcopy(fast.new_cache(100))
        assert (cache.kv, cache.max_tokens, cache.owner()) == (None, 512, fast)

    def test_the_memory_of_one_does_not_go_back_with_the_other(self, traced_llama):
        fast = optimize(traced_llama, CONFIG)
        first = fast.new_cache(100)
        fast(tokens(9), past_key_values=first)
        second = copy.deepcopy(first)
        del first
        gc.collect()
        third = fast.new_cache(100)
        fast(tokens(3), past_key_values=third)
        assert third.kv is not second.kv
        assert second.get_seq_length() == 9

    def test_one_whose_step_did_not_end_is_refused(self, fast):
        cache = fast.new_cache(100)
        fast(tokens(9), past_key_values=cache)
        cache.kv.is_broken = True
        with pytest.raises(KVCacheError, match="began and did not end"):
            copy.deepcopy(cache)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"max_tokens": 0}, ConfigError, "max_tokens=0 is too small; use 1 to 2147483647"),
        ({"max_tokens": -1}, ConfigError, "max_tokens=-1 is too small"),
        ({"max_tokens": float("nan")}, ConfigError, "max_tokens=nan is not a whole number"),
        ({"max_tokens": "many"}, ConfigError, "max_tokens='many' is not a whole number"),
        ({"max_tokens": 10**12}, ConfigError, "max_tokens=1000000000000 is too large"),
        ({"past": "text"}, KVCacheError, "past is a str; pass the DynamicCache"),
        ({"attention_mask": torch.ones(1, 3)}, KVCacheError, "past is not given"),
        ({"past": DynamicCache(), "attention_mask": [1]}, KVCacheError, "attention_mask is a list"),
    ],
)
def test_new_caches_that_cannot_be_made(fast, arguments, error, words):
    with pytest.raises(error, match=words):
        fast.new_cache(**arguments)


def test_it_grows(fast):
    cache = fast.new_cache(100)
    fast(tokens(500), past_key_values=cache)
    assert cache.get_max_cache_shape() == 512
    fast(tokens(13), past_key_values=cache)
    assert cache.get_max_cache_shape() == 1024
    assert cache.get_seq_length() == 513


@pytest.mark.parametrize(
    ("asked", "reserved"), [(1, 512), (512, 512), (513, 1024), (8192, 8192), (8193, 16384)]
)
def test_few_capacities_serve_all_lengths(fast, asked, reserved):
    assert fast.new_cache(asked).max_tokens == reserved


def test_fixed_capacity(fast):
    module = optimize(fast, CONFIG.replace(max_tokens=128))
    assert module.new_cache().max_tokens == module.new_cache(5).max_tokens == 128
    with pytest.raises(KVCacheError, match=r"129 tokens .* max_tokens=128"):
        module.new_cache(129)


def test_what_it_refuses(fast, model):
    cache = fast.new_cache(100)
    with pytest.raises(UnsupportedInputError, match=r"crop is not supported: .* reset"):
        cache.crop(-1)
    with pytest.raises(KVCacheError, match="pass it to the module that made it"):
        cache.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(KVCacheError, match="not optimized"):
        model(tokens(3), **{CACHE_NAME: cache})
    assert cache.get_seq_length() == 0


def test_it_does_not_keep_its_module_alive():
    module = torch.nn.Linear(1, 1)
    cache = SpardaCache(module, 64)
    del module
    assert cache.owner() is None


@pytest.mark.parametrize(
    ("mode", "selector"),
    [
        *((mode, "infllm2") for mode in ("query", "exact", "forecast", "dense")),
        *((mode, "lowbit2") for mode in ("query", "forecast")),
        ("exact", "lowbit4"),
    ],
)
@pytest.mark.parametrize("rows", [[1, 1, 0], [0, 1, 2], [2, 0, 0]])
def test_sequences_go_on_from_others(traced_llama, mode, selector, rows):
    settings = {"local_blocks": 1, "top_k": 2, "hint": "previous_step", "offload": "always"}
    settings["selector"] = selector
    if mode == "dense":
        settings = {"top_k": None}
    sparse = optimize(traced_llama, CONFIG.replace(mode=mode, **settings))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 250, (3, 130), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :20] = mask[2, :70] = 0
    caches, rows = [], torch.tensor(rows)
    for order in (torch.arange(3), rows):
        caches.append(sparse.new_cache())
        sparse(ids[order, :120], attention_mask=mask[order, :120], past_key_values=caches[-1])
    for column in range(120, 130):
        if column == 123:
            caches[0].reorder_cache(rows)
        found = []
        for order, cache in zip(
            (rows if column >= 123 else torch.arange(3), rows), caches, strict=True
        ):
            seen = mask[order, : column + 1]
            step = sparse(ids[order, column, None], attention_mask=seen, past_key_values=cache)
            found.append(step.logits)
        got, want = found
        if column >= 123:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert caches[0].kv.lengths() == [[130, 110, 60][row] for row in rows]
    caches[0].check_mask(mask[rows])
    caches[0].check_ids(ids[rows])
    with pytest.raises(KVCacheError, match="differs from the tokens of the cache"):
        caches[0].check_ids(ids[rows.flip(0)])


def test_an_empty_cache_is_reordered(fast):
    cache = fast.new_cache(100)
    cache.reorder_cache(torch.tensor([0, 0]))
    assert cache.kv is None


def test_a_reorder_that_did_not_end_breaks_the_cache(fast, monkeypatch):
    cache = fast.new_cache(100)
    fast(tokens(9, 2), past_key_values=cache)

    def stop(rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.kv, "reorder", stop)
    with pytest.raises(KeyboardInterrupt):
        cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(KVCacheError, match="began and did not end"):
        fast(tokens(1, 2), past_key_values=cache)


@pytest.fixture(scope="module")
def speculating(traced_llama):
    config = SpardaConfig(
        mode="speculate", offload="never", top_k=4, local_blocks=1, block_size=16, machine="h200",
        lowering="eager", speculate_where="always",
    )  # fmt: skip
    return optimize(traced_llama, config)


class TestBudgets:
    """Blocks that layers predict in mode `speculate`: top_k=4, so that 1.5 times as many fit."""

    def budgets(self, cache):
        return [cache.kv.state[f"sparda_budget_{layer}"].item() for layer in range(2)]

    def test_set_before_and_between_calls(self, speculating):
        cache = speculating.new_cache(100)
        cache.set_budgets({1: 5})
        speculating(tokens(300), past_key_values=cache)
        assert self.budgets(cache) == [9, 5]
        predicted = [cache.kv.state[f"sparda_predicted_{layer}"] for layer in range(2)]
        assert [(ids >= 0).sum(-1).max().item() for ids in predicted] == [9, 5]
        cache.set_budgets({0: 0})
        speculating(tokens(1), past_key_values=cache)
        assert self.budgets(cache) == [0, 5]
        assert (predicted[0] == -1).all()

    def test_they_outlive_growth_and_reset(self, speculating):
        cache = speculating.new_cache(100)
        cache.set_budgets({0: 7})
        speculating(tokens(500), past_key_values=cache)
        speculating(tokens(100), past_key_values=cache)
        assert cache.get_max_cache_shape() == 1024
        assert self.budgets(cache) == [7, 9]
        cache.reset()
        assert self.budgets(cache) == [7, 9]

    def test_another_cache_has_its_own(self, speculating):
        cache = speculating.new_cache(100)
        speculating(tokens(20), past_key_values=cache)
        cache.set_budgets({0: 2})
        del cache
        other = speculating.new_cache(100)
        speculating(tokens(20), past_key_values=other)
        assert self.budgets(other) == [9, 9]

    @pytest.mark.parametrize("has_memory", [False, True])
    @pytest.mark.parametrize(
        ("budgets", "words"),
        [
            ({2: 3}, "given for layer 2, but those that predict blocks are 0, 1"),
            ({0: 10}, "the budget of layer 0=10 is too large; use 0 to 9"),
            ({0: -1}, "is too small"),
            ({0: 1.5}, "is not a whole number"),
            (None, "budgets are a NoneType; give them by layer, such as {0: 9}"),
            ([9, 9], "budgets are a list; give them by layer"),
        ],
    )
    def test_refused(self, speculating, has_memory, budgets, words):
        cache = speculating.new_cache(100)
        if has_memory:
            speculating(tokens(20), past_key_values=cache)
        with pytest.raises(ConfigError, match=words):
            cache.set_budgets(budgets)

    def test_other_modes_predict_nothing(self, fast):
        cache = fast.new_cache(100)
        with pytest.raises(ConfigError, match="mode='query', which predicts none"):
            cache.set_budgets({0: 1})
