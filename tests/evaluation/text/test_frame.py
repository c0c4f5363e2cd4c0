from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.frame import (
    Frame,
    answer_ends,
    opening_ids,
    template_frame,
    turn_frame,
)


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def test_frame_is_what_the_template_writes_around_words(byte_tokenizer):
    frame = template_frame(byte_tokenizer)
    assert frame == Frame("<user>", "</><assistant>", "</><user>")
    messages = [
        {"role": role, "content": words}
        for role, words in (("user", "One?"), ("assistant", "Two."), ("user", "Three?"))
    ]
    whole = byte_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    between = (frame.to_assistant, frame.to_user, frame.to_assistant)
    words = ("One?", "Two.", "Three?")
    pieces = [piece for pair in zip(words, between, strict=True) for piece in pair]
    assert frame.opening + "".join(pieces) == whole


def test_no_template_is_no_frame(byte_tokenizer):
    plain = with_template(byte_tokenizer, None)
    assert template_frame(plain) is None
    assert turn_frame(plain) == Frame("User: ", "\nAssistant:\n", "\nUser: ")
    assert turn_frame(byte_tokenizer) == template_frame(byte_tokenizer)


def test_a_template_may_write_what_a_text_begins_with(byte_tokenizer):
    frame = turn_frame(byte_tokenizer)
    words = byte_tokenizer("<user>")["input_ids"]
    assert opening_ids(byte_tokenizer, frame, [7]) == [7, *words]
    own = copy.deepcopy(byte_tokenizer)
    own.bos_token = "<"
    assert opening_ids(own, frame, [7]) == words


@pytest.mark.parametrize(
    ("own", "theirs", "ends"), [(3, None, {3}), ([3, 4], "a", {3, 4, 64}), (None, None, set())]
)
def test_what_ends_an_answer(byte_tokenizer, own, theirs, ends):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = theirs
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert answer_ends(model, tokenizer) == ends


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("<user>{{ messages[-1].content }}<assistant>", "leaves out what was said"),
        ("{{ raise_exception('one turn alone') }}", "of two turns: one turn alone; use"),
    ],
)
def test_templates_that_cannot_go_on_are_refused(byte_tokenizer, template, said):
    with pytest.raises(ConfigError, match=said):
        template_frame(with_template(byte_tokenizer, template))
