"""What a tokenizer's chat template puts around the words of a conversation, and what ends them."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.documents import token_ids

__all__ = ["Frame", "answer_ends", "opening_ids", "template_frame", "turn_frame"]

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


# Of a tokenizer without a template.
_WORDS: Final = Frame("User: ", "\nAssistant:\n", "\nUser: ")


def turn_frame(tokenizer: Any) -> Frame:
    """Return what the chat template puts around words, or `User:` and `Assistant:` without one.

    Args:
        tokenizer: Of the model.

    Raises:
        ConfigError: If the template leaves out what was said before, or refuses a conversation.
    """
    return template_frame(tokenizer) or _WORDS


def opening_ids(tokenizer: Any, frame: Frame, begin: list[int]) -> list[int]:
    """Return the tokens before the user's first words.

    Args:
        tokenizer: Of the model.
        frame: What stands around words.
        begin: What the tokenizer puts before every text; a template may write it itself.
    """
    writes_it = frame.opening.startswith(tokenizer.bos_token or "\0")
    return [*([] if writes_it else begin), *token_ids(tokenizer, frame.opening)]


def answer_ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the model's and the tokenizer's."""
    own = model.generation_config.eos_token_id
    found = own if isinstance(own, list) else [own]
    return {token for token in [*found, tokenizer.eos_token_id] if token is not None}


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
