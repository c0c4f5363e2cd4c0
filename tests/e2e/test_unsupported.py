"""What would be computed wrongly is refused by name, and left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparda_compile import SpardaConfig, explain, optimize
from sparda_compile.errors import AttentionNotFoundError, SpardaError, UnsupportedInputError
from sparda_compile.testing import UNSUPPORTED_MODELS, build

CONFIG = SpardaConfig(mode="query", lowering="eager")
IDS = torch.arange(40).remainder(11).reshape(1, 40)
ENCODER_DECODERS = ("bart", "t5")

# What else the sentence must say, so that a model is not refused for a reason that is not its own.
REASONS = {
    "deepseek_v3": "latent attention",
    "gpt_oss": "sinks",
    "bloom": "ALiBi",
    "qwen3_next": "linear_attention",
    "mamba": "linear_attention",
    "lfm2": "layers of kind conv",
    "t5": "encoder-decoder",
    "bart": "encoder-decoder",
    "bidirectional": "not causal attention",
    "alibi_bias": "a bias",
    "interleaved_groups": "grouping of heads",
    "no_position_ids": "position_ids argument",
    "prefix_lm": "another mask",
}


@torch.no_grad()
def logits_of(name: str, model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS} if name in ENCODER_DECODERS else {}
    out = model(IDS, **extra)
    return getattr(out, "logits", out).clone()


@pytest.mark.parametrize("name", UNSUPPORTED_MODELS)
def test_model_is_refused_by_name_and_left_as_it_was(name: str, models_page: Any) -> None:
    make, word = UNSUPPORTED_MODELS[name]
    model = make()
    logits = logits_of(name, model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = set(vars(model))

    with pytest.raises(SpardaError, match=REASONS[name]) as refusal:
        optimize(model, CONFIG)
    assert word in str(refusal.value)
    report = explain(model, CONFIG)
    assert word in report.error
    assert report.sites == ()
    assert word in str(report)
    # A refusal may list the ops of a traced graph, which other versions of torch choose otherwise.
    if torch.__version__.startswith("2.13"):
        row = models_page.rows()[type(model).__name__]
        assert row[2] == models_page.reason(model, report.error)

    assert torch.equal(logits_of(name, model), logits)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert set(vars(model)) == attributes
    assert not model.training


def test_every_refused_model_has_its_reason() -> None:
    assert REASONS.keys() == UNSUPPORTED_MODELS.keys()


@pytest.mark.parametrize("name", ["deepseek_v3", "bidirectional"])
def test_refusal_names_layer_and_module(name: str) -> None:
    make, _ = UNSUPPORTED_MODELS[name]
    with pytest.raises(AttentionNotFoundError, match=r"layer 0 \(\w[\w.]*, \w+Attention\)"):
        optimize(make(), CONFIG)


def test_modules_without_attention_are_refused() -> None:
    class Bigram(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(256, 256)

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids) + position_ids[..., None]

    with pytest.raises(AttentionNotFoundError, match="has no attention"):
        optimize(Bigram().eval(), CONFIG)
    with pytest.raises(AttentionNotFoundError, match="no parameters"):
        optimize(torch.nn.Identity().eval(), CONFIG)


def test_what_is_no_model_in_eval_mode_is_refused() -> None:
    with pytest.raises(UnsupportedInputError, match=r"call model\.eval"):
        optimize(build("llama").train(), CONFIG)
    with pytest.raises(UnsupportedInputError, match="is a str"):
        optimize("llama", CONFIG)  # type: ignore[arg-type]
