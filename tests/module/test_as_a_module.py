"""The optimized module as a torch module: its state, its memory and its model."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
from torch.testing import assert_close

from sparda_compile import SpardaConfig, optimize, progress
from sparda_compile.errors import HostPoolFullError, KVCacheError
from sparda_compile.program import plan
from sparda_compile.program.program import Program
from sparda_compile.testing import random_forecast, tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")


def prompt(num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(256, (1, num_tokens), generator=generator)


def greedy(module, ids, num_new=8):
    return module.generate(ids, max_new_tokens=num_new, do_sample=False)


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


class TestModule:
    def test_state_dict_has_the_models_keys_and_the_forecast(self, fast, model):
        assert list(fast.state_dict()) == list(model.state_dict())
        weights = dict(enumerate(random_forecast(model).values()))  # by target layer
        module = optimize(fast, CONFIG.replace(mode="forecast"), forecast=weights)
        added = set(module.state_dict()) - set(model.state_dict())
        assert added == {"sparda_forecast.0", "sparda_forecast.1"}
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert module.state_dict()[name].data_ptr() == tensor.data_ptr()

    def test_modes_and_moves_that_change_nothing(self, fast):
        assert fast.eval() is fast
        assert fast.train(False) is fast
        assert fast.to("cpu") is fast
        assert fast.to(torch.float32) is fast
        assert fast.to("cpu", torch.float32) is fast

    def test_attributes_of_the_model(self, fast, model):
        assert fast.config.to_dict() == model.config.to_dict()
        assert fast.device == model.device
        assert fast.dtype == torch.float32
        with pytest.raises(AttributeError, match="nonsense"):
            _ = fast.nonsense

    def test_original_is_untouched(self, fast, model):
        fresh = tiny_llama()
        greedy(fast, prompt(20))
        assert isinstance(model.forward, types.MethodType)
        assert vars(model).keys() == vars(fresh).keys()
        assert model.config.to_dict() == fresh.config.to_dict()
        assert torch.equal(model(prompt(20)).logits, fresh(prompt(20)).logits)
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
        assert torch.equal(greedy(model, prompt(20)), greedy(fresh, prompt(20)))

    def test_weights_are_shared(self):
        original = tiny_llama(seed=1, num_key_value_heads=4)
        module = optimize(original, CONFIG)
        before = module(prompt(20)).logits
        with torch.no_grad():
            original.lm_head.weight.mul_(-1.0)
        assert_close(module(prompt(20)).logits, -before)
        assert_close(-before, original(prompt(20)).logits, rtol=1e-4, atol=1e-4)

    def test_counts(self, fast):
        module = optimize(fast, CONFIG.replace(max_tokens=128))
        with pytest.raises(KVCacheError, match="nothing has run"):
            module.sparda.stats()
        greedy(module, prompt(60), 9)
        total = module.sparda.stats().total
        # Blocks 0 to 3 go to the CPU: three in the prefill, one when token 64 came; x 2 KV heads.
        block_bytes = 2 * 16 * 16 * 4
        assert total.d2h_bytes == 2 * 2 * 4 * block_bytes
        assert total.hits > 0
        module.sparda.reset_stats()
        assert module.sparda.stats().total.d2h_bytes == 0
        assert module.sparda.num_compilations == {"prefill": 1, "decode": 1}

    def test_kernels_are_compiled_once_for_a_cache_and_behind_its_limits(self, fast, monkeypatch):
        begun = []

        def noted(self, *sizes):
            if not sizes:  # of a decode
                begun.append(self.plan.layout)

        monkeypatch.setattr(Program, "compile_kernels", noted)
        module = optimize(fast, CONFIG)
        kept = module(prompt(5)).past_key_values
        module(prompt(1), past_key_values=kept)
        assert begun == [kept.kv.layout]
        small = optimize(fast, CONFIG.replace(host_bytes=1000, offload="always"))
        with pytest.raises(HostPoolFullError):
            small(prompt(5))
        assert len(begun) == 1

    def test_progress_is_shown_unless_it_is_turned_off(self, fast, monkeypatch):
        seen = []

        def noted(function):
            def call(*args, **kwargs):
                seen.append(progress._line.num_silent)
                return function(*args, **kwargs)

            return call

        monkeypatch.setattr(progress, "_line", progress._Line())
        monkeypatch.setattr(plan, "run_passes", noted(plan.run_passes))
        monkeypatch.setattr(Program, "__call__", noted(Program.__call__))
        for shows in (True, False):
            greedy(optimize(fast, CONFIG.replace(progress=shows)), prompt(5), 2)
            assert len(seen) >= 4  # two plans, a prefill and a step
            assert {num_silent > 0 for num_silent in seen} == {not shows}
            seen.clear()
        assert progress._line.num_silent == 0


def test_memory_returns_with_the_last_reference():
    """No cycle holds a module: its pools go when it goes, not when Python looks for garbage."""
    fast = optimize(tiny_llama(num_hidden_layers=1), CONFIG)
    fast.generate(torch.arange(2, 32)[None], max_new_tokens=3, do_sample=False)
    gc.collect()
    gc.disable()
    try:
        module, memory = weakref.ref(fast), weakref.ref(fast.last_cache)
        del fast
        assert module() is None
        assert memory() is None
    finally:
        gc.enable()


def test_the_pool_of_a_cache_that_has_grown_is_let_go_of():
    fast = optimize(tiny_llama(num_hidden_layers=1), CONFIG)
    cache = fast.new_cache(max_tokens=512)
    fast(torch.zeros(1, 500, dtype=torch.long), past_key_values=cache)
    first = weakref.ref(cache.kv)
    fast(torch.zeros(1, 100, dtype=torch.long), past_key_values=cache)
    gc.collect()
    assert first() is None
    assert fast.last_cache is cache.kv
