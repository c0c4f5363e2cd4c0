from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparda_compile.capture.cache_name import CACHE_NAME, cache_of
from sparda_compile.capture.causal_lm import (
    WrappedCausalLM,
    as_causal_lm,
    reach_of,
    sliding_windows,
)
from sparda_compile.capture.forward import share_weights
from sparda_compile.errors import AttentionNotFoundError, UnsupportedInputError
from sparda_compile.testing import UNSUPPORTED_MODELS, PlainCausalLM, build, tiny_llama

IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def llama() -> Any:
    return tiny_llama()


@torch.no_grad()
def test_plain_module_is_wrapped_and_answers_the_same() -> None:
    module = PlainCausalLM()
    model = as_causal_lm(module)
    assert isinstance(model, WrappedCausalLM)
    assert model.module is module
    assert not model.training
    assert model.can_generate()
    positions = torch.arange(6).expand(2, 6) + 40
    out = model(input_ids=IDS, position_ids=positions, **{CACHE_NAME: "cache"}, use_cache=True)
    assert torch.equal(out.logits, module(IDS, positions))
    assert not torch.equal(out.logits, module(IDS))
    assert cache_of(out) == "cache"


def test_wrapper_goes_by_the_name_of_the_module() -> None:
    model = as_causal_lm(PlainCausalLM())
    assert type(model).__name__ == "PlainCausalLM"

    class Abacus(PlainCausalLM):
        pass

    wrapped = as_causal_lm(Abacus())
    assert type(wrapped).__name__ == "Abacus"
    assert isinstance(wrapped, WrappedCausalLM)
    assert type(share_weights(wrapped)) is type(wrapped)


@torch.no_grad()
def test_module_may_take_tokens_alone_or_return_an_object() -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class TokensAlone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(12, 5)

        def forward(self, input_ids: Tensor) -> Output:
            return Output(self.table(input_ids))

    module = TokensAlone().eval()
    model = as_causal_lm(module)
    assert isinstance(model, WrappedCausalLM)
    assert not model.takes_positions
    out = model(input_ids=IDS, position_ids=IDS)
    assert torch.equal(out.logits, module.table(IDS))


def test_models_of_transformers_are_taken_as_they_are(llama: Any) -> None:
    assert as_causal_lm(llama) is llama


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_are_refused(name: str) -> None:
    model = UNSUPPORTED_MODELS[name][0]()
    with pytest.raises(UnsupportedInputError, match=rf"{type(model).__name__} is an encoder-dec"):
        as_causal_lm(model)


def test_models_without_a_head_are_refused(llama: Any) -> None:
    with pytest.raises(UnsupportedInputError, match="LlamaModel has no causal LM head"):
        as_causal_lm(llama.model)


def test_modules_without_parameters_are_refused() -> None:
    with pytest.raises(AttentionNotFoundError, match="Identity has no parameters"):
        as_causal_lm(nn.Identity())


def test_recurrent_layers_are_refused_by_kind() -> None:
    with pytest.raises(AttentionNotFoundError, match=r"Qwen3Next\w* has layers of kind linear"):
        as_causal_lm(UNSUPPORTED_MODELS["qwen3_next"][0]())


@pytest.mark.parametrize("attn", ["flash_attention_2", "flex_attention"])
def test_attention_that_cannot_be_traced_is_refused(llama: Any, attn: str) -> None:
    llama.config._attn_implementation_internal = attn
    with pytest.raises(UnsupportedInputError, match=rf"'{attn}'.*set_attn_implementation"):
        as_causal_lm(llama)


def test_windows_follow_the_kind_of_each_layer() -> None:
    model = build("gemma3", 3)
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    assert sliding_windows(as_causal_lm(model)) == {0: 0, 1: 0, 2: 96}


def test_windows_hold_for_all_layers_where_kinds_are_not_named(llama: Any) -> None:
    assert sliding_windows(llama) == {0: 0, 1: 0}
    mistral: Any = build("mistral")
    assert sliding_windows(mistral) == {0: 0, 1: 0}
    mistral.config.sliding_window = 32
    assert sliding_windows(mistral) == {0: 32, 1: 32}


def test_windows_that_are_not_in_use_do_not_count() -> None:
    model: Any = build("qwen2")
    model.config.sliding_window = 4096
    assert set(model.config.layer_types) == {"full_attention"}
    assert sliding_windows(model) == {0: 0, 1: 0}


@pytest.mark.parametrize(
    ("name", "window", "windows", "reach"),
    [
        ("mistral", 4095, {0: 4095, 1: 4095}, 0),
        ("mistral", 4096, {0: 0, 1: 0}, 4096),
        ("mistral", 9000, {0: 0, 1: 0}, 9000),
        ("mistral", None, {0: 0, 1: 0}, 0),
        ("qwen2", 9000, {0: 0, 1: 0}, 0),
        ("gemma3", 9000, {0: 0, 1: 0}, 9000),
    ],
)
def test_a_window_that_holds_all_positions_is_how_far_a_text_reaches(
    name: str, window: int | None, windows: dict[int, int], reach: int
) -> None:
    model: Any = build(name)
    assert model.config.max_position_embeddings == 4096
    model.config.sliding_window = window
    assert sliding_windows(model) == windows
    assert reach_of(model) == reach


def test_plain_modules_have_no_windows() -> None:
    assert sliding_windows(as_causal_lm(PlainCausalLM())) == {}
    assert reach_of(as_causal_lm(PlainCausalLM())) == 0
