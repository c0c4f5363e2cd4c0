from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.text.recording import record_document

SIZES = {"mode": "query", "block_size": 16, "sink_blocks": 1, "local_blocks": 1}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_it_is_what_the_steps_read_beside_what_they_always_read(model, documents):
    document = documents.each[0]
    rules = ("infllm2", "lowbit2")
    configs = {0.3: [SpardaConfig(selector=rule, top_k=2, **SIZES) for rule in rules]}
    said = []
    found = [*record_document(model, document, [], configs, 170, 20, said.append)]
    assert [each.selector for each in found] == list(rules)
    assert said[0] == f"{document.name}: reading 170 tokens"
    reading = read(model, document.ids_T[None, :170])
    for each, config in zip(found, configs[0.3], strict=True):
        assert tuple(each.ids_LSGK.shape) == (2, 20, 2, 2)
        assert (each.sink_blocks, each.num_free) == (1, 9)
        decoded = decode(model, reading, document.ids_T[None, 170:190], config)
        for step, layers in enumerate(decoded.records):
            for layer, record in enumerate(layers):
                for group in range(2):
                    chosen = record.read_BGN[0, group] & ~record.forced_BGN[0, group]
                    ids = torch.where(chosen)[0].tolist()
                    assert each.ids_LSGK[layer, step, group].tolist() == ids
    assert not torch.equal(found[0].ids_LSGK, found[1].ids_LSGK)


@pytest.mark.parametrize(("top_k", "chosen"), [(None, "all"), (0, "0"), (9, "9")])
def test_a_budget_that_leaves_no_choice(model, documents, top_k, chosen):
    configs = {0.3: [SpardaConfig(top_k=top_k, **SIZES)]}
    with pytest.raises(ConfigError, match=f"chooses {chosen}; a trace needs 1 to 8"):
        next(record_document(model, documents.each[0], [], configs, 170, 20, print))


def test_ids_beyond_a_byte(model, documents):
    document = documents.each[0]
    many = dataclasses.replace(document, ids_T=document.ids_T.repeat(3)[:4400])
    config = SpardaConfig(top_k=2, **SIZES)
    (found,) = record_document(model, many, [], {0.1: [config]}, 4390, 2, lambda text: None)
    assert found.ids_LSGK.dtype == torch.int16
