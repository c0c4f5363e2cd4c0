"""`optimize` refuses what it cannot do: an error has value, limit and remedy."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import DynamicCache

from sparda_compile import SpardaConfig, SpardaError, explain, optimize
from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import (
    ConfigError,
    DevicePoolFullError,
    HostPoolFullError,
    KVCacheError,
    UnsupportedInputError,
)
from sparda_compile.testing import tiny_llama

MAX_TOKENS = 64
CONFIG = SpardaConfig(
    mode="query", top_k=None, block_size=16, max_tokens=MAX_TOKENS, lowering="eager"
)
FORECAST = CONFIG.replace(mode="forecast")
HIDDEN, ROWS = 64, 32  # of tiny_llama: hidden size, KV heads x head_dim


def prompt(num_tokens, batch_size=1):
    generator = torch.Generator().manual_seed(num_tokens)
    return torch.randint(256, (batch_size, num_tokens), generator=generator)


@pytest.fixture(scope="module")
def model(shared_llama):
    return shared_llama


@pytest.fixture(scope="module")
def fast(traced_llama):
    return optimize(traced_llama, CONFIG)


@pytest.fixture(scope="module")
def expected(model):
    return model.generate(prompt(20), max_new_tokens=5, do_sample=False)


@pytest.fixture
def works(fast, expected):
    """Return a check that an optimized module still generates the right tokens."""

    def check(module=fast):
        assert torch.equal(module.generate(prompt(20), max_new_tokens=5, do_sample=False), expected)

    return check


def refuses(error, call, *words):
    """Check that a call raises `error` with a message that has all the words and is a sentence."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, SpardaError)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert message.endswith((".", "?"))


class TestConfiguration:
    def test_budget_beyond_the_blocks(self):
        words = ("top_k=9", "4 blocks", "max_tokens=64", "lower top_k")
        refuses(ConfigError, lambda: CONFIG.replace(top_k=9), *words)

    def test_block_size_that_does_not_divide_the_cache(self):
        words = ("max_tokens=70", "block_size=16", "use 80")
        refuses(ConfigError, lambda: CONFIG.replace(max_tokens=70), *words)

    def test_speculation_that_nothing_gains_by_is_said(self, fast):
        config = CONFIG.replace(mode="speculate", offload="never", machine="cpu")
        with pytest.warns(UserWarning, match="no layer: on cpu .* speculate_where='always'"):
            optimize(fast, config)
        silent = (
            config.replace(speculate_where="always"),
            config.replace(disable_passes=("insert_speculation",)),
            config.replace(mode="query"),
        )
        for each in silent:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                optimize(fast, each)

    def test_unknown_pass(self, fast, works):
        config = CONFIG.replace(disable_passes=("schedule_transfer",))
        words = ("'schedule_transfer'", "insert_prefetch", "Did you mean 'schedule_transfers'?")
        refuses(ConfigError, lambda: optimize(fast, config), *words)
        refuses(ConfigError, lambda: explain(fast, config), *words)
        works()

    @pytest.mark.parametrize("name", ["replace_attention", "verify_transfers", "insert_forecast"])
    def test_pass_that_cannot_be_left_out(self, fast, name):
        words = (f"'{name}'", "cannot be left out", "insert_speculation, schedule_transfers")
        config = CONFIG.replace(disable_passes=(name,))
        refuses(ConfigError, lambda: optimize(fast, config), *words)

    @pytest.mark.parametrize("offload", ["always", "never"])
    def test_too_little_cpu_memory(self, fast, works, offload):
        small = optimize(fast, CONFIG.replace(host_bytes=1000, offload=offload))
        words = ("1 sequences of 64 tokens", "host_bytes allows", "raise host_bytes")
        for _ in range(2):
            refuses(HostPoolFullError, lambda: small.generate(prompt(20), max_new_tokens=1), *words)
        works(optimize(small, CONFIG))

    def test_too_little_device_memory(self, fast, works):
        small = optimize(fast, CONFIG.replace(device_bytes=1000))
        words = ("1 sequences of 64 tokens", "device_bytes allows", "raise device_bytes")
        refuses(DevicePoolFullError, lambda: small(prompt(20)), *words)
        works()


class TestForecast:
    def weights(self, **changes):
        return {0: torch.zeros(ROWS, HIDDEN), 1: torch.zeros(ROWS, HIDDEN)} | {
            int(name[1:]): value for name, value in changes.items()
        }

    def test_untrained_weights_are_the_mean_query_and_warn(self, fast, model, works):
        words = r"not trained.*mean of each group's query heads.*`sparda train` or train_forecast"
        with pytest.warns(UserWarning, match=words) as warned:
            module = optimize(fast, FORECAST)
        assert [w.filename for w in warned] == [__file__]
        for number, layer in enumerate(model.model.layers):
            heads = layer.self_attn.q_proj.weight.detach().view(2, 2, 16, HIDDEN)
            weight = module.state_dict()[f"sparda_forecast.{number}"]
            torch.testing.assert_close(weight, heads.mean(1).flatten(0, 1), rtol=0, atol=1e-7)
        works(module)

    def test_given_weights_do_not_warn_and_are_used(self, fast, works, recwarn):
        given = self.weights(_1=torch.full((ROWS, HIDDEN), 0.5))
        module = optimize(fast, FORECAST, forecast=given)
        assert not [w for w in recwarn if "Forecast" in str(w.message)]
        assert torch.equal(module.state_dict()["sparda_forecast.1"], given[1])
        works(module)

    def test_of_another_model(self, fast):
        given = self.weights(_2=torch.zeros(ROWS, HIDDEN)) | {"bootstrap": torch.zeros(1, 1)}
        words = ("LlamaForCausalLM", "layers [2, 'bootstrap'] are not in it", "trained for this")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=given), *words)

    def test_of_wrong_shape(self, fast):
        given = self.weights(_1=torch.zeros(ROWS, 48))
        words = ("layer 1", "(32, 48)", "(32, 64)", "trained for this model")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=given), *words)

    def test_that_miss_a_layer(self, fast):
        given = {0: torch.zeros(ROWS, HIDDEN)}
        words = ("layers [1] are missing", "trained for this model")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=given), *words)

    def test_file_that_is_not_there(self, fast, tmp_path):
        path = tmp_path / "none.safetensors"
        words = ("none.safetensors", "no file", "pass a safetensors file")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=path), *words)

    def test_file_that_cannot_be_read(self, fast, tmp_path):
        path = tmp_path / "noise.safetensors"
        path.write_bytes(b"\x00noise" * 9)
        words = ("noise.safetensors", "cannot be read", "safetensors file")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=str(path)), *words)

    def test_file_of_something_else(self, fast, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file({"lm_head.weight": torch.zeros(2, 2)}, path)
        words = ("model.safetensors", "lm_head.weight", "layer numbers")
        refuses(ConfigError, lambda: optimize(fast, FORECAST, forecast=path), *words)

    def test_file(self, fast, works, tmp_path):
        path = tmp_path / "forecast.safetensors"
        save_file({str(layer): tensor for layer, tensor in self.weights().items()}, path)
        works(optimize(fast, FORECAST, forecast=path))

    @pytest.mark.parametrize("changes", [{}, {"mode": "exact", "hint": "previous_step"}])
    def test_for_a_mode_that_uses_none(self, fast, works, changes):
        config = CONFIG.replace(**changes)
        words = (f"mode={config.mode!r}", "uses none", "mode='forecast'")
        refuses(ConfigError, lambda: optimize(fast, config, forecast=self.weights()), *words)
        works()


def overfill(module):
    """Fill a cache to its last token with a decode step, then ask for one more."""
    cache = module(prompt(MAX_TOKENS - 1)).past_key_values
    module(prompt(1), past_key_values=cache)
    module(prompt(1), past_key_values=cache)


CALLS = {
    "prompt beyond max_tokens": (
        lambda fast, _: fast.generate(prompt(70), max_new_tokens=1),
        KVCacheError, ("71 tokens", "max_tokens=64", "raise max_tokens"),
    ),
    "forward beyond max_tokens": (
        lambda fast, _: fast(prompt(65)),
        KVCacheError, ("65 tokens", "max_tokens=64", "raise max_tokens"),
    ),
    "new tokens beyond max_tokens": (
        lambda fast, _: fast.generate(prompt(20), max_new_tokens=45),
        KVCacheError, ("65 tokens", "max_tokens=64", "max_new_tokens"),
    ),
    "a step beyond max_tokens": (
        lambda fast, _: overfill(fast),
        KVCacheError, ("1 more tokens", "holds 64", "64 per sequence", "Raise max_tokens"),
    ),
    "a turn beyond max_tokens": (
        lambda fast, _: fast(prompt(40), past_key_values=fast(prompt(30)).past_key_values),
        KVCacheError, ("40 more tokens", "holds 30", "64 per sequence", "Raise max_tokens"),
    ),
    "a cache beyond max_tokens": (
        lambda fast, _: fast.new_cache(100),
        KVCacheError, ("100 tokens", "max_tokens=64"),
    ),
    "cache of another module": (
        lambda fast, _: fast(prompt(3), past_key_values=optimize(fast, CONFIG).new_cache()),
        KVCacheError, ("another model", "Pass None"),
    ),
    "DynamicCache": (
        lambda fast, _: fast(prompt(3), past_key_values=DynamicCache()),
        KVCacheError, ("DynamicCache", "new_cache()"),
    ),
    "generate with a DynamicCache": (
        lambda fast, _: fast.generate(prompt(3), past_key_values=DynamicCache()),
        KVCacheError, ("DynamicCache", "new_cache()"),
    ),
    "another batch size on the second turn": (
        lambda fast, _: fast(prompt(1, 2), past_key_values=fast(prompt(9)).past_key_values),
        KVCacheError, ("holds 1 sequences", "passes 2", "batch size of the first"),
    ),
    "second turn without the first": (
        lambda fast, _: fast.generate(prompt(4), past_key_values=fast(prompt(9)).past_key_values),
        KVCacheError, ("4 tokens", "holds 9", "whole conversation"),
    ),
    "its cache in the original model": (
        lambda fast, model: model(prompt(3), **{CACHE_NAME: fast.new_cache()}),
        KVCacheError, ("not optimized", "module that made it"),
    ),
    "groups of beams": (
        lambda fast, _: fast.generate(prompt(9), num_beams=2, num_beam_groups=2),
        UnsupportedInputError, ("num_beam_groups=2", "from the Hub", "leave it unset"),
    ),
    "groups of beams by a generation config": (
        lambda fast, _: fast.generate(
            prompt(9), generation_config=transformers.GenerationConfig(num_beam_groups=3)
        ),
        UnsupportedInputError, ("num_beam_groups=3", "from the Hub", "leave it unset"),
    ),
    "assisted generation": (
        lambda fast, model: fast.generate(prompt(9), assistant_model=model),
        UnsupportedInputError, ("assisted", "assistant_model"),
    ),
    "prompt lookup": (
        lambda fast, _: fast.generate(prompt(9), prompt_lookup_num_tokens=3),
        UnsupportedInputError, ("prompt-lookup", "prompt_lookup_num_tokens"),
    ),
    "another cache implementation": (
        lambda fast, _: fast.generate(prompt(9), cache_implementation="static"),
        UnsupportedInputError, ("'static'", "leave it unset"),
    ),
    "embeddings to generate": (
        lambda fast, _: fast.generate(inputs_embeds=torch.zeros(1, 3, HIDDEN)),
        UnsupportedInputError, ("inputs_embeds", "input_ids"),
    ),
    "embeddings": (
        lambda fast, _: fast(inputs_embeds=torch.zeros(1, 3, HIDDEN)),
        UnsupportedInputError, ("inputs_embeds", "input_ids"),
    ),
    "labels": (
        lambda fast, _: fast(prompt(3), labels=prompt(3)),
        UnsupportedInputError, ("labels", "is not supported"),
    ),
    "attention weights": (
        lambda fast, _: fast(prompt(3), output_attentions=True),
        UnsupportedInputError, ("output_attentions", "is not supported"),
    ),
    "attention mask that is too short": (
        lambda fast, _: fast(prompt(9), attention_mask=torch.ones(1, 8).long()),
        UnsupportedInputError, ("(1, 8)", "[batch, 9]", "0 for padding"),
    ),
    "attention mask of another batch": (
        lambda fast, _: fast(prompt(9), attention_mask=torch.ones(3, 9).long()),
        UnsupportedInputError, ("3 sequences", "1"),
    ),
    "no tokens": (lambda fast, _: fast(), UnsupportedInputError, ("None", "[batch, tokens]")),
    "flat tokens": (
        lambda fast, _: fast(prompt(3)[0]), UnsupportedInputError, ("(3,)", "[batch, tokens]"),
    ),
    "empty tokens": (
        lambda fast, _: fast(prompt(3)[:, :0]), UnsupportedInputError, ("(1, 0)", "at least one"),
    ),
    "training": (
        lambda fast, _: fast.train(), UnsupportedInputError, ("trained", "optimize it again"),
    ),
    "another dtype": (
        lambda fast, _: fast.to(torch.float16),
        UnsupportedInputError, ("cast", "torch.float32", "optimize it again"),
    ),
    "half": (lambda fast, _: fast.half(), UnsupportedInputError, ("cast", "optimize it again")),
    "another device": (
        lambda fast, _: fast.to("meta"), UnsupportedInputError, ("moved", "cpu"),
    ),
    "pickle": (
        lambda fast, _: pickle.dumps(fast), UnsupportedInputError, ("pickled", "save_pretrained"),
    ),
    "deepcopy": (
        lambda fast, _: copy.deepcopy(fast), UnsupportedInputError, ("deep-copied", "optimize it"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_refused_call_leaves_the_module_in_order(fast, model, works, case):
    call, error, words = CALLS[case]
    refuses(error, lambda: call(fast, model), *words)
    works()


def test_optimize_again_traces_nothing_new(fast):
    module = optimize(fast, CONFIG.replace(top_k=1, sink_blocks=1, local_blocks=1))
    assert module.captures is fast.captures
    assert module.sparda.num_captures == fast.sparda.num_captures
    assert module.sparda.graph("decode") is not fast.sparda.graph("decode")


def test_default_configuration_is_the_papers_and_needs_no_weights_to_explain():
    report = explain(tiny_llama().to("meta"), batch_size=3)
    assert report.error == ""
    assert (report.mode, report.max_tokens, report.batch_size) == ("forecast", 4096, 3)
    assert report.forecast_parameters == 2 * ROWS * HIDDEN
    assert len(report.sites) == 2


@pytest.mark.parametrize("call", [optimize, explain])
def test_a_folder_for_graphs_that_cannot_be_made_is_refused_first(call, tmp_path):
    (tmp_path / "file").write_text("")
    config = SpardaConfig(mode="query", dump_dir=str(tmp_path / "file" / "folder"))
    with pytest.raises(ConfigError, match=r"dump_dir=.* cannot be made"):
        call(None, config)


def test_the_compiler_starts_before_the_model_is_traced(fast, monkeypatch):
    started = []
    monkeypatch.setattr("sparda_compile.api.start_compiler", lambda device: started.append(device))
    optimize(fast, CONFIG)
    assert not started
    optimize(fast, CONFIG.replace(lowering="inductor"))
    assert started == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 is too small; use 1 to"),
        ({"batch_size": "x"}, "batch_size='x' is not a whole number"),
        ({"max_tokens": -1}, "max_tokens=-1 is too small"),
        ({"max_tokens": 10**14}, "max_tokens=100000000000000 is too large"),
        ({"memory_bytes": -1}, "memory_bytes=-1 is too small; use 1 or more"),
        ({"config": {"mode": "query"}}, "config is a dict; pass a SpardaConfig"),
    ],
)
def test_sizes_to_plan_for_are_checked(shared_llama, sizes, words):
    with pytest.raises(ConfigError, match=words):
        explain(shared_llama, **sizes)


def test_what_is_no_configuration_is_refused(shared_llama):
    with pytest.raises(ConfigError, match="config is a str; pass a SpardaConfig"):
        optimize(shared_llama, "query")
