from __future__ import annotations

import copy

import pytest

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.frame import Frame, template_frame


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
    assert template_frame(with_template(byte_tokenizer, None)) is None


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
