"""`optimize` refuses models that it cannot do, with a sentence."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from sparda_compile import SpardaConfig, SpardaError, explain, optimize
from sparda_compile.errors import AttentionNotFoundError, CaptureError, UnsupportedInputError
from sparda_compile.testing import tiny_llama

CONFIG = SpardaConfig(mode="query", top_k=None, block_size=16, lowering="eager")


def refuses(error, model, *words):
    """Check that `optimize` raises a sentence with all the words."""
    with pytest.raises(error) as caught:
        optimize(model, CONFIG)
    message = str(caught.value)
    assert isinstance(caught.value, SpardaError)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert message.endswith(".")


class Perceptron(nn.Module):
    """A language model without attention."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, 32)
        self.positions = nn.Embedding(128, 32)
        self.head = nn.Linear(32, 256)

    def forward(self, input_ids, position_ids):
        return self.head(torch.relu(self.embedding(input_ids) + self.positions(position_ids)))


class Branching(Perceptron):
    """A forward that decides by a value, which no graph can hold."""

    def forward(self, input_ids, position_ids):
        hidden = self.embedding(input_ids)
        if hidden.sum() > 0:
            hidden = hidden + self.positions(position_ids)
        return self.head(hidden)


def test_without_attention():
    words = ("Perceptron", "no attention", "no KV cache")
    refuses(AttentionNotFoundError, Perceptron().eval(), *words)


def test_that_cannot_be_traced():
    words = ("cannot trace", "needs the values of a tensor", "test_api_models.py")
    refuses(CaptureError, Branching().eval(), *words)


def test_encoder_decoder():
    config = transformers.T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    t5 = transformers.T5ForConditionalGeneration(config).eval()
    words = ("T5ForConditionalGeneration", "encoder-decoder", "decoder-only")
    refuses(UnsupportedInputError, t5, *words)


def test_without_a_head(shared_llama):
    words = ("LlamaModel", "no causal LM head", "AutoModelForCausalLM")
    refuses(UnsupportedInputError, shared_llama.model, *words)


def test_in_training_mode():
    words = ("LlamaForCausalLM", "training mode", "model.eval()")
    refuses(UnsupportedInputError, tiny_llama().train(), *words)


def test_that_is_no_module():
    words = ("str", "torch.nn.Module", "from_pretrained")
    refuses(UnsupportedInputError, "llama", *words)


def test_on_another_device():
    words = ("cpu and cuda", "meta", "model.to('cuda')")
    refuses(UnsupportedInputError, tiny_llama().to("meta"), *words)


def test_with_a_kernel_that_is_not_in_the_graph():
    llama = tiny_llama()
    llama.config._attn_implementation = "flash_attention_2"
    words = ("flash_attention_2", "set_attn_implementation('sdpa')")
    refuses(UnsupportedInputError, llama, *words)


def test_explain_reports_what_optimize_refuses():
    report = explain(Perceptron().eval(), CONFIG)
    assert "no attention" in report.error
    assert report.sites == ()
