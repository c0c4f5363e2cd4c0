"""An optimized module whose model is changed: followed, or refused by name."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from torch import nn

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import ModelChangedError, UnsupportedInputError
from sparda_compile.module.version import Version
from sparda_compile.testing import PlainCausalLM, tiny_llama

CONFIG = SpardaConfig(mode="dense", lowering="eager", block_size=16)
IDS = torch.randint(2, 256, (1, 9), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 3, "do_sample": False}


def same_as(fast, model):
    assert torch.equal(fast.generate(IDS, **GREEDY), model.generate(IDS, **GREEDY))
    torch.testing.assert_close(fast(IDS).logits, model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def shared():
    model = tiny_llama(num_hidden_layers=2)
    return model, optimize(model, CONFIG)


class TestModule:
    @pytest.fixture
    def pair(self, shared):
        model, fast = shared
        return model, optimize(fast, CONFIG)

    def test_every_kind_of_call_refuses_and_goes_on_when_it_is_put_back(self, pair):
        model, fast = pair
        cache = fast(IDS).past_key_values
        decode = {"past_key_values": cache, "use_cache": True}
        hook = model.model.layers[0].register_forward_pre_hook(lambda *_: None)
        for call in (
            lambda: fast(IDS),
            lambda: fast(IDS[:, :1], **decode),
            lambda: fast.generate(IDS, **GREEDY),
            lambda: optimize(fast, CONFIG),
        ):
            with pytest.raises(ModelChangedError, match=r"layers\.0 has other"):
                call()
        hook.remove()
        got = fast(IDS[:, :1], **decode).logits
        want = model(torch.cat([IDS, IDS[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)

    def test_weights_that_are_edited_in_place_are_followed(self, pair):
        model, fast = pair
        before = fast(IDS).logits
        with torch.no_grad():
            attention = model.model.layers[0].self_attn
            attention.q_proj.weight.mul_(3)
            attention.v_proj.weight.data.mul_(2)
        assert not torch.equal(fast(IDS).logits, before)
        same_as(fast, model)

    def test_a_hook_of_a_streamer_stops_the_loop(self, pair):
        model, fast = pair
        added = []

        class Meddler:
            def put(self, _):
                if not added:
                    added.append(model.model.norm.register_forward_hook(lambda *_: None))

            def end(self):
                pass

        with pytest.raises(ModelChangedError, match="norm has other"):
            fast.generate(IDS, **GREEDY, streamer=Meddler())
        added[0].remove()
        same_as(fast, model)

    def test_a_generation_looks_at_everything_once(self, pair, monkeypatch):
        """Its first step does not look again; a step that follows one that failed does."""
        model, fast = pair
        looks = []
        check = Version.check
        monkeypatch.setattr(
            Version, "check", lambda self, **how: (looks.append(how), check(self, **how))
        )
        fast.generate(IDS, **GREEDY)
        assert looks == [{"thorough": True}]

        def fails(*_, **__):
            raise RuntimeError("before the first step")

        cache = fast.new_cache(64)
        monkeypatch.setattr(type(model), "_prepare_generation_config", fails)
        with pytest.raises(RuntimeError, match="first step"):
            fast.generate(IDS, past_key_values=cache, **GREEDY)
        fast(IDS, past_key_values=cache)
        assert looks == [{"thorough": True}] * 3

    def test_hooks_of_the_optimized_module_run_once_a_step(self, pair):
        _, fast = pair
        calls = []
        hook = fast.register_forward_hook(lambda *_: calls.append(1))
        fast.generate(IDS, **GREEDY)
        hook.remove()
        assert len(calls) == GREEDY["max_new_tokens"]

    def test_its_children_are_those_of_the_model(self, pair):
        model, fast = pair
        assert fast.lm_head is model.lm_head
        assert fast.get_input_embeddings() is model.get_input_embeddings()
        hook = fast.model.norm.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelChangedError, match="norm has other"):
            fast(IDS)
        hook.remove()

    def test_what_is_set_on_it_is_refused_where_the_model_would_read_it(self, pair):
        model, fast = pair
        fast.note = "x"
        fast(IDS)
        fast.lm_head = nn.Linear(64, 256)
        with pytest.raises(ModelChangedError, match="lm_head was set on the optimized module"):
            fast(IDS)
        fast.lm_head = model.lm_head
        fast.loss_type = fast.vocab_size = 7
        with pytest.raises(ModelChangedError, match="vocab_size was set on"):
            fast.generate(IDS, **GREEDY)
        del fast.vocab_size
        same_as(fast, model)

    def test_the_generation_config_is_followed_until_one_is_assigned(self, pair, monkeypatch):
        model, fast = pair
        monkeypatch.setattr(model, "generation_config", copy.deepcopy(model.generation_config))
        model.generation_config.max_new_tokens = 2
        assert fast.generate(IDS, do_sample=False).shape == (1, 11)
        model.generation_config = transformers.GenerationConfig(max_new_tokens=4, do_sample=False)
        assert fast.generation_config is model.generation_config
        assert torch.equal(fast.generate(IDS), model.generate(IDS))
        assert fast.generate(IDS).shape == (1, 13)
        fast.generation_config = transformers.GenerationConfig(max_new_tokens=1, do_sample=False)
        assert fast.generate(IDS).shape == (1, 10)
        assert model.generate(IDS).shape == (1, 13)
        fast.generation_config = model.generation_config
        model.generation_config = transformers.GenerationConfig(max_new_tokens=3, do_sample=False)
        assert fast.generate(IDS).shape == (1, 12)

    def test_the_config_is_the_models(self, pair, monkeypatch):
        model, fast = pair
        assert fast.config is model.config
        monkeypatch.setattr(model, "config", copy.deepcopy(model.config))
        fast.config.return_dict = False
        assert isinstance(fast(IDS), tuple)
        assert isinstance(model(IDS), tuple)
        assert fast.generate(IDS, **GREEDY).shape == (1, 12)
        model.config.return_dict, model.config.use_cache = True, False
        assert fast(IDS).past_key_values is None
        fast.config = copy.deepcopy(model.config)
        assert model.config is fast.config
        fast.config.output_hidden_states = True
        with pytest.raises(UnsupportedInputError, match="output_hidden_states"):
            fast(IDS)

    def test_methods_that_generate_asks_for_are_followed(self, pair, monkeypatch):
        model, fast = pair
        prepare, calls = model.prepare_inputs_for_generation, []

        def noted(*args, **kwargs):
            calls.append(1)
            return prepare(*args, **kwargs)

        monkeypatch.setattr(model, "prepare_inputs_for_generation", noted, raising=False)
        fast.generate(IDS, **GREEDY)
        assert calls

    def test_threads_that_use_the_model_meanwhile_raise_no_alarm(self, pair):
        model, fast = pair
        errors = []

        def run(module):
            try:
                for _ in range(5):
                    module.generate(IDS, **GREEDY)
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=run, args=(m,)) for m in (model, fast, fast)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def test_a_plain_module_is_watched_too():
    model = PlainCausalLM().eval()
    fast = optimize(model, CONFIG)
    fast(IDS)
    name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    hook = layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelChangedError, match=f"{name} has other forward hooks"):
        fast(IDS)
    hook.remove()
    fast(IDS)


def test_adapters_that_are_switched_are_refused_and_followed_when_optimized_again(adapted):
    fast = optimize(adapted, CONFIG)
    same_as(fast, adapted)
    adapted.lm_head.scales["one"] = 30.0
    with pytest.raises(ModelChangedError, match=r"lm_head\.scales\.one is 30\.0"):
        fast(IDS)
    same_as(optimize(adapted, CONFIG), adapted)
