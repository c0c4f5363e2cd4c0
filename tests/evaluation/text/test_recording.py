from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile import SpardaConfig
from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.decode import decode
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.text.recording import (
    check_choices,
    record_document,
    record_talk,
)
from sparda_compile.evaluation.text.talk import Talk

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


def test_of_a_talk_it_is_what_the_steps_of_each_answer_read(model, documents):
    document = documents.each[0]
    ids_1T = document.ids_T[None, :230]
    # The second answer is empty: the model ended it at once.
    talk = Talk(ids_1T, ((170, 179), (190, 190), (200, 211)), read(model, ids_1T))
    config = SpardaConfig(top_k=2, **SIZES)
    said = []
    (found,) = record_talk(model, document, talk, {0.3: [config]}, said.append)
    assert said == [f"{document.name} (talk): infllm2, 30% of the blocks"]
    assert (found.text, found.sha256) == (f"{document.name} (talk)", document.sha256)
    assert (found.num_tokens, found.answers) == (170, (9, 0, 11))
    assert found.num_free == 210 // 16 - 2
    step = 0
    for begin, end in ((170, 179), (200, 211)):
        decoded = decode(model, talk.reading.before(begin), ids_1T[:, begin:end], config)
        for layers in decoded.records:
            for layer, record in enumerate(layers):
                chosen = record.read_BGN[0] & ~record.forced_BGN[0]
                ids = torch.where(chosen)[1].view(2, 2).tolist()
                assert found.ids_LSGK[layer, step].tolist() == ids
            step += 1
    assert found.ids_LSGK.shape[1] == step


def test_a_talk_without_answers(model, documents):
    ids_1T = documents.each[0].ids_T[None, :230]
    talk = Talk(ids_1T, ((170, 170), (200, 201)), read(model, ids_1T))
    configs = {0.3: [SpardaConfig(top_k=2, **SIZES)]}
    with pytest.raises(ConfigError, match="have 1 tokens, and a trace is of 2 steps or more"):
        next(record_talk(model, documents.each[0], talk, configs, print))


@pytest.mark.parametrize(("top_k", "chosen"), [(None, "all"), (0, "0"), (9, "9")])
def test_a_budget_that_leaves_no_choice(top_k, chosen):
    with pytest.raises(ConfigError, match=f"chooses {chosen}; a trace needs 1 to 8"):
        check_choices({0.3: [SpardaConfig(top_k=top_k, **SIZES)]}, 170)
    check_choices({0.3: [SpardaConfig(top_k=8, **SIZES)]}, 170)


def test_ids_beyond_a_byte(model, documents):
    document = documents.each[0]
    many = dataclasses.replace(document, ids_T=document.ids_T.repeat(3)[:4400])
    config = SpardaConfig(top_k=2, **SIZES)
    (found,) = record_document(model, many, [], {0.1: [config]}, 4390, 2, lambda text: None)
    assert found.ids_LSGK.dtype == torch.int16
