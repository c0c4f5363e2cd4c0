from __future__ import annotations

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.needle import needle_scripts


def scripts(documents, tokenizer, length=600, trials=6, depths=3, seed=0):
    return needle_scripts(tokenizer, documents, length, trials=trials, depths=depths, seed=seed)


def text(tokenizer, part):
    return tokenizer.decode(part.ids_BT[0])


def test_the_answer_is_what_the_needle_says(documents, byte_tokenizer):
    for script in scripts(documents, byte_tokenizer):
        haystack, steps = script.parts
        answer = byte_tokenizer.decode(steps.targets_BA[0])
        question = text(byte_tokenizer, steps)
        assert answer[0] == " "
        assert answer[1:].isdigit()
        place = question.partition("number of ")[2].partition("?")[0]
        needle = f"The secret number of {place} is{answer}. "
        assert text(byte_tokenizer, haystack).count(needle) == 1
        # Of the answer all but its last token is fed.
        assert question.endswith(f"{place} is{answer[:-1]}")
        assert script.num_tokens + 1 == 600


def test_depths_are_spread_and_needles_stand_behind_sentences(documents, byte_tokenizer):
    made = scripts(documents, byte_tokenizer)
    assert [script.labels for script in made] == [("0%",), ("50%",), ("100%",)] * 2
    places = []
    for script in made[:3]:
        before, _, after = text(byte_tokenizer, script.parts[0]).partition(" The secret number of")
        assert before.endswith(".")
        places.append(len(before) / (len(before) + len(after)))
    assert places[0] < 0.25 < places[1] < 0.75 < places[2]


def test_a_seed_gives_one_set_of_samples(documents, byte_tokenizer):
    digests = [[s.digest for s in scripts(documents, byte_tokenizer, seed=n)] for n in (0, 0, 1)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])
    assert len(set(digests[0])) == 6


def test_lengths_without_room_are_refused(documents, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"length=100 leaves 0 tokens of text .* use \d+ or more"):
        scripts(documents, byte_tokenizer, length=100)
    with pytest.raises(ConfigError, match="the documents have"):
        scripts(documents, byte_tokenizer, length=100_000)
