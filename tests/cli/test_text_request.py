from __future__ import annotations

import pytest
from transformers import AutoConfig, LlamaForCausalLM

from sparda_compile import SpardaConfig
from sparda_compile.cli.text_request import TextRequest
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.cases import Budget
from sparda_compile.evaluation.text.results import digest_of
from sparda_compile.registry import SELECTORS

SMALL = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture
def request_of(tmp_path, byte_tokenizer):
    """Return a function that makes a request of a model of one layer."""
    config = AutoConfig.for_model("llama", **SMALL, num_attention_heads=2, num_key_value_heads=1)
    model = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    byte_tokenizer.save_pretrained(model)
    (tmp_path / "it.txt").write_text("A sentence of this text. " * 20)
    base = SpardaConfig(
        mode="query", top_k=None, block_size=16, local_blocks=1, lowering="eager", offload="never"
    )

    def make(**changes):
        plain = {
            "target": str(model), "paths": (tmp_path / "it.txt",), "tasks": ("perplexity",),
            "lengths": (200, 160), "bases": (base,), "budgets": (Budget(top_k=1),),
            "prefills": ("dense",), "oracle": True, "forecast": None,
            "counts": {"scored": 2, "trials": 1, "depths": 1, "seed": 0},
        }  # fmt: skip
        return TextRequest(**plain | changes)

    return make


def test_every_length_is_measured_and_the_oracle_is_gone_behind_it(request_of, tmp_path):
    import torch

    request, said = request_of(), []
    file = request.measure(torch.device("cpu"), 1, None, None, said.append)
    assert [(r.length, r.case) for r in file.records] == [
        (length, case)
        for length in (200, 160)
        for case in ("dense", "oracle top 1", "query infllm2 top 1")
    ]
    head = file.to_dict()
    assert head["model"] == {
        "name": "model", "class": "LlamaForCausalLM", "dtype": "float32",
        "weights_sha256": digest_of(tmp_path / "model"),
    }  # fmt: skip
    assert head["settings"]["block_size"] == 16
    assert "oracle" not in SELECTORS
    assert any(line.startswith("loading") for line in said)


def test_what_cannot_be_is_refused_before_the_model_is_loaded(request_of):
    import torch

    said = []
    request = request_of(budgets=(Budget(share=0.01),))
    with pytest.raises(ConfigError, match="fewer than the 3"):
        request.measure(torch.device("cpu"), 1, None, None, said.append)
    assert said == ["reading documents"]
