"""What a tokenizer's chat template puts around the words of a conversation."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sparda_compile.errors import ConfigError

__all__ = ["Frame", "template_frame"]

_MARKS: Final = ("first user words", "first assistant words", "last user words")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around the words of a conversation.

    Attributes:
        opening: Before the user's first words.
        to_assistant: Between a user's words and the assistant's.
        to_user: Between the assistant's words and the user's.
    """

    opening: str
    to_assistant: str
    to_user: str


def template_frame(tokenizer: Any) -> Frame | None:
    """Return what the chat template puts around words; None where there is no template.

    Args:
        tokenizer: Of the model.

    Raises:
        ConfigError: If the template leaves out what was said before, or refuses a conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": words} for r, words in zip(roles, _MARKS, strict=True)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise ConfigError(
            f"the tokenizer's chat template refuses a conversation of two turns: {error}; use a "
            "tokenizer whose template takes one."
        ) from error
    pieces, rest = [], text
    for mark in _MARKS:
        before, found, rest = rest.partition(mark)
        if not found:
            raise ConfigError(
                "the tokenizer's chat template leaves out what was said in earlier turns, so a "
                "conversation cannot go on from its cache; use another template."
            )
        pieces.append(before)
    return Frame(pieces[0], rest, pieces[2])
