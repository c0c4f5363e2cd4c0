from __future__ import annotations

import copy

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.chat import NUM_QUESTIONS, chat_scripts


def conversations(documents, tokenizer, length=1800, chats=3, seed=0):
    return chat_scripts(tokenizer, documents, length, chats=chats, seed=seed)


def whole(tokenizer, script):
    return "".join(tokenizer.decode(part.ids_BT[0]) for part in script.parts)


def test_every_answer_was_said_in_an_earlier_turn(documents, byte_tokenizer):
    for script in conversations(documents, byte_tokenizer):
        assert len(script.parts) == 2 * NUM_QUESTIONS
        said = ""
        for place in range(NUM_QUESTIONS):
            turn, steps = script.parts[2 * place : 2 * place + 2]
            asked = byte_tokenizer.decode(turn.ids_BT[0])
            assert script.labels[place] in asked
            answer = byte_tokenizer.decode(steps.targets_BA[0])
            # The last one is told in the first turn that asks, all others before it.
            assert f"{answer}." in said + (asked if not place else "")
            said += asked + byte_tokenizer.decode(steps.ids_BT[0])
        assert script.num_tokens + 1 == 1800


def test_turns_are_in_the_template(documents, byte_tokenizer):
    (script,) = conversations(documents, byte_tokenizer, chats=1)
    text = whole(byte_tokenizer, script)
    assert text.startswith("<user>")
    turns = NUM_QUESTIONS - 1 + NUM_QUESTIONS
    assert text.count("<user>") == text.count("</><assistant>") == turns
    assert text.count("<assistant>Thank you, I will remember that.</><user>") == NUM_QUESTIONS - 1


def test_without_a_template_there_are_words(documents, byte_tokenizer):
    plain = copy.deepcopy(byte_tokenizer)
    plain.chat_template = None
    (script,) = conversations(documents, plain, chats=1)
    text = whole(plain, script)
    assert text.startswith("User: ")
    assert text.count("\nAssistant:\n") == 2 * NUM_QUESTIONS - 1
    assert script.num_tokens + 1 == 1800


def test_a_template_that_forgets_is_refused(documents, byte_tokenizer):
    forgets = copy.deepcopy(byte_tokenizer)
    forgets.chat_template = "<user>{{ messages[-1].content }}<assistant>"
    with pytest.raises(ConfigError, match="leaves out what was said in earlier turns"):
        conversations(documents, forgets)


def test_a_seed_gives_one_set_of_conversations(documents, byte_tokenizer):
    digests = [
        [s.digest for s in conversations(documents, byte_tokenizer, seed=n)] for n in (0, 0, 1)
    ]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])


def test_lengths_without_room_are_refused(documents, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"length=300 leaves 0 tokens of text in a conversation"):
        conversations(documents, byte_tokenizer, length=300)
