from __future__ import annotations

import random

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.filler import Filler, continuation


def test_text_runs_on_in_an_order_of_its_seed(documents, byte_tokenizer):
    def text(seed):
        filler = Filler(byte_tokenizer, documents.each, random.Random(seed), 300)
        return filler.take(100) + filler.take(200)

    assert text(1) == text(1)
    assert text(1) != text(2)
    whole = {tuple(each.ids_T.tolist()) for each in documents.each}
    order = [
        tuple(each.ids_T.tolist())
        for each in random.Random(1).sample(documents.each, len(documents.each))
    ]
    assert set(order) == whole
    joined = byte_tokenizer.decode([token for ids in order for token in ids])
    assert byte_tokenizer.decode(text(1)) in joined


def test_too_little_text_is_refused(documents, byte_tokenizer):
    has = sum(len(each.ids_T) for each in documents.each)
    Filler(byte_tokenizer, documents.each, random.Random(0), has)
    with pytest.raises(ConfigError, match=f"have {has} tokens in all, fewer than the {has + 1}"):
        Filler(byte_tokenizer, documents.each, random.Random(0), has + 1)


def test_cut_behind_a_sentence(documents, byte_tokenizer):
    filler = Filler(byte_tokenizer, documents.each, random.Random(0), 10)
    ids = byte_tokenizer("One two. Three four. " + 200 * "x").input_ids
    assert filler.cut(ids, 3) == len("One two.")
    assert filler.cut(ids, 9) == len("One two. Three four.")
    assert filler.cut(ids, 30) == len("One two. Three four.")
    assert filler.cut(ids, 150) == 150
    assert filler.cut(ids, len(ids)) == len(ids)
    assert filler.cut(ids, 0) == len("One two.")


def test_continuation_splits_where_tokens_do(byte_tokenizer):
    begun, answer = continuation(byte_tokenizer, "It is", " 42")
    assert byte_tokenizer.decode(begun) == "It is"
    assert byte_tokenizer.decode(answer) == " 42"


def test_letters_that_a_tokenizer_joins_belong_to_the_answer():
    def joining(text, **_):
        """Take two letters for one token."""
        return {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]}

    begun, answer = continuation(joining, "abc", "de")
    assert begun == [hash("ab")]
    assert answer == [hash("cd"), hash("e")]


def test_an_answer_without_tokens_is_refused(byte_tokenizer):
    with pytest.raises(ConfigError, match="no tokens of its own"):
        continuation(byte_tokenizer, "It is", "")
