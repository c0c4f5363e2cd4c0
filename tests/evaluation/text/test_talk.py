from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.reading import read
from sparda_compile.evaluation.text.talk import hold_talk

QUESTIONS = ("Which river?", "Which stone?", "And then?")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        eos_token_id=None, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def hold(model, tokenizer, document, lengths, questions=QUESTIONS, begin=(), said=None):
    say = [].append if said is None else said.append
    return hold_talk(model, tokenizer, document, [*begin], questions, lengths, say)


def answer_texts(tokenizer, talk):
    return [tokenizer.decode(talk.ids_1T[0, begin:end]) for begin, end in talk.answers]


def test_it_is_the_template_around_the_document_questions_and_answers(
    model, documents, byte_tokenizer
):
    said = []
    document = documents.each[0]
    talk = hold(model, byte_tokenizer, document, (200, 9), said=said)
    assert said == [f"{document.name}: {question}" for question in QUESTIONS]
    assert talk.answers[0] == (200, 209)
    one, two, three = answer_texts(byte_tokenizer, talk)
    text = byte_tokenizer.decode(document.ids_T)
    first = f"\n\n{QUESTIONS[0]}</><assistant>"
    room = 200 - len("<user>") - len(first)
    whole = (
        f"<user>{text[:room]}{first}{one}</><user>{QUESTIONS[1]}</><assistant>{two}"
        f"</><user>{QUESTIONS[2]}</><assistant>{three}"
    )
    assert byte_tokenizer.decode(talk.ids_1T[0]) == whole


def test_answers_are_the_likeliest_tokens_and_the_cache_is_of_all(model, documents, byte_tokenizer):
    talk = hold(model, byte_tokenizer, documents.each[0], (200, 9))
    best_T = model(talk.ids_1T).logits[0].argmax(-1)
    for begin, end in talk.answers:
        assert end - begin == 9
        assert torch.equal(talk.ids_1T[0, begin:end], best_T[begin - 1 : end - 1])
    want = read(model, talk.ids_1T)
    assert talk.reading.length == talk.ids_1T.shape[1]
    for got, wanted in zip(talk.reading.keys, want.keys, strict=True):
        torch.testing.assert_close(got, wanted)


def test_what_ends_an_answer_is_none_of_it(model, documents, byte_tokenizer):
    talk = hold(model, byte_tokenizer, documents.each[0], (200, 9))
    begin, _ = talk.answers[0]
    ids = talk.ids_1T[0, begin:].tolist()
    place = next(i for i in range(1, 9) if ids[i] not in ids[:i])
    ends = copy.deepcopy(model)
    ends.generation_config.eos_token_id = ids[place]
    ended = hold(ends, byte_tokenizer, documents.each[0], (200, 9))
    assert ended.answers[0] == (begin, begin + place)
    after = byte_tokenizer.decode(ended.ids_1T[0, begin + place :])
    assert after.startswith(f"</><user>{QUESTIONS[1]}</><assistant>")


def test_a_tokenizer_without_a_template(model, documents, byte_tokenizer):
    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    talk = hold(model, plain, documents.each[0], (200, 4), QUESTIONS[:1], begin=[7])
    begin, _ = talk.answers[0]
    assert talk.ids_1T[0, 0] == 7
    text = plain.decode(talk.ids_1T[0, 1:begin])
    assert text.startswith("User: ")
    assert text.endswith(f"\n\n{QUESTIONS[0]}\nAssistant:\n")


def test_lengths_that_do_not_fit(model, documents, byte_tokenizer):
    document = documents.each[0]
    asked = len(f"<user>\n\n{QUESTIONS[0]}</><assistant>")
    with pytest.raises(ConfigError, match=f"leaves 0 for a document of .*; use {asked + 1} to "):
        hold(model, byte_tokenizer, document, (asked, 4))
    short = dataclasses.replace(document, ids_T=document.ids_T[:50])
    with pytest.raises(ConfigError, match=f"for a document of 50; use .* to {asked + 50}[.]"):
        hold(model, byte_tokenizer, short, (asked + 51, 4))
    hold(model, byte_tokenizer, short, (asked + 50, 4), QUESTIONS[:1])
    more = sum(len(f"</><user>{question}</><assistant>") for question in QUESTIONS[1:])
    most = 512 - 3 * 9 - more
    with pytest.raises(ConfigError, match="a talk of 513 tokens is longer than the 512 positions"):
        hold(model, byte_tokenizer, document, (most + 1, 9))
