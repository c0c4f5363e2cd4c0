"""transformers' pipelines take an optimized module as they take the model, without a word."""

from __future__ import annotations

import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, pipeline

from sparda_compile import SpardaConfig, optimize
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")
TEXTS = [" ".join(f"w{i % 200 + 2}" for i in range(0, 3 * n, 3)) for n in (90, 25)]


def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")


def answers(model, **kwargs):
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer())
    found = generator(TEXTS, max_new_tokens=6, do_sample=False, **kwargs)
    return [generated["generated_text"] for (generated,) in found]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_answers_as_with_the_model_and_says_nothing(batch_size, transformers_log, capfd):
    model = tiny_llama()
    right = answers(model, batch_size=batch_size)
    time.sleep(1)  # calls that follow each other at once are shown as one that takes long
    before, printed = list(transformers_log), capfd.readouterr()
    fast = optimize(model, CONFIG)
    assert answers(fast, batch_size=batch_size) == right
    assert transformers_log == before == []
    assert capfd.readouterr().err == printed.err


def test_pipeline_still_names_what_it_does_not_know(transformers_log):
    """Else the test above could not fail."""
    model = tiny_llama()
    model.__class__ = type("Unknown", (type(model),), {})
    answers(model)
    assert any("'Unknown' is not supported" in message for message in transformers_log)


def test_what_transformers_loads_by_its_own_classes_is_as_before():
    optimize(tiny_llama(num_hidden_layers=1), CONFIG)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model(torch.ones(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 64)
