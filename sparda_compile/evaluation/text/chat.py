"""A conversation over a long text, with questions about what was said in earlier turns.

    user       <text> My dog is called Otto. I live in ...                  told, turn by turn
    assistant  Thank you, I will remember that.
    ...
    user       <text> What is my dog called? And one thing more: ...        asked
    assistant  Your dog is called| Otto                                     counts
    user       <text> ...

What is told first is a prompt of several turns. Each question is a turn of its own on the same
cache; its reply is begun for the assistant and fed step by step, and what counts is the word or
number that it ends in. The last question is about what a question's turn has told. Turns are in the
tokenizer's chat template; a tokenizer without one gets the words `User:` and `Assistant:`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.documents import token_ids
from sparda_compile.evaluation.text.filler import Filler, continuation
from sparda_compile.evaluation.text.frame import opening_ids, turn_frame
from sparda_compile.evaluation.text.scripts import Part, Script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparda_compile.evaluation.text.documents import Documents
    from sparda_compile.evaluation.text.frame import Frame

__all__ = ["NUM_QUESTIONS", "chat_scripts"]

NUM_QUESTIONS: Final = 4
_DONE: Final = "Thank you, I will remember that."
# Of the text, what stands in the turns that ask, one part each; the rest is in those that tell.
_ASKED_PARTS: Final = 12


@dataclasses.dataclass(frozen=True)
class _Fact:
    """What is told, what is asked, how the reply begins, and what it may be."""

    told: str
    asked: str
    reply: str
    values: tuple[str, ...]


_FACTS: Final = (
    _Fact(
        "My dog is called {}.",
        "What is my dog called?",
        "Your dog is called",
        ("Otto", "Bella", "Rex", "Luna", "Felix", "Milo"),
    ),
    _Fact(
        "I live in the city of {}.",
        "In which city do I live?",
        "You live in the city of",
        ("Lisbon", "Oslo", "Vienna", "Cairo", "Lima", "Kyoto"),
    ),
    _Fact(
        "The code of my locker is {}.",
        "What is the code of my locker?",
        "The code of your locker is",
        tuple(map(str, range(1013, 9999, 577))),
    ),
    _Fact(
        "My sister works as a {}.",
        "What does my sister work as?",
        "Your sister works as a",
        ("baker", "pilot", "nurse", "lawyer", "farmer", "painter"),
    ),
    _Fact(
        "My favourite colour is {}.",
        "What is my favourite colour?",
        "Your favourite colour is",
        ("green", "yellow", "purple", "orange", "black", "white"),
    ),
    _Fact(
        "My train leaves from platform {}.",
        "From which platform does my train leave?",
        "Your train leaves from platform",
        tuple(map(str, range(11, 99, 7))),
    ),
)


def chat_scripts(
    tokenizer: Any, documents: Documents, length: int, *, chats: int, seed: int
) -> list[Script]:
    """Make conversations.

    Args:
        tokenizer: Of the model.
        documents: Whose text the turns hold.
        length: Tokens of each conversation.
        chats: Conversations, each with `NUM_QUESTIONS` questions.
        seed: Decides facts, their values and texts.

    Raises:
        ConfigError: If the length leaves no room for text, the documents are too short, or the
            chat template changes what was said before.
    """
    frame = turn_frame(tokenizer)
    return [
        _script(tokenizer, documents, length, frame, number, random.Random(f"{seed} {number}"))
        for number in range(chats)
    ]


def _script(
    tokenizer: Any,
    documents: Documents,
    length: int,
    frame: Frame,
    number: int,
    generator: random.Random,
) -> Script:
    facts = [
        (fact, generator.choice(fact.values)) for fact in generator.sample(_FACTS, NUM_QUESTIONS)
    ]
    writer = _Writer(tokenizer, frame, facts)
    begin = opening_ids(tokenizer, frame, documents.begin)
    nothing: list[list[int]] = [[] for _ in range(2 * NUM_QUESTIONS - 1)]
    room = length - sum(map(len, writer.flat(begin, nothing)))
    if room < _ASKED_PARTS:
        raise ConfigError(
            f"length={length} leaves {max(room, 0)} tokens of text in a conversation; use "
            f"{length - room + _ASKED_PARTS} or more."
        )
    filler = Filler(tokenizer, documents.each, generator, room)
    asked = [room // _ASKED_PARTS] * NUM_QUESTIONS
    told, left = divmod(room - sum(asked), NUM_QUESTIONS - 1)
    counts = [told + left, *[told] * (NUM_QUESTIONS - 2), *asked]
    texts = [filler.take(count) for count in counts]
    name = f"chat {number}"
    labels = tuple(fact.asked for fact, _ in facts)
    return Script(name, writer.parts(begin, texts), labels)


class _Writer:
    """Puts the turns of a conversation into tokens.

    Args:
        tokenizer: Of the model.
        frame: What stands around the words.
        facts: With their values, in the order of the questions. All but the last are told before
            the first question, the last one in its turn.
    """

    def __init__(self, tokenizer: Any, frame: Frame, facts: Sequence[tuple[_Fact, str]]) -> None:
        self._tokenizer, self._frame, self._facts = tokenizer, frame, facts

    def flat(self, begin: list[int], texts: Sequence[list[int]]) -> list[list[int]]:
        """Return the tokens of each part, and the last one of the last answer."""
        parts = self.parts(begin, texts)
        assert parts[-1].targets_BA is not None
        return [*(part.ids_BT[0].tolist() for part in parts), parts[-1].targets_BA[0, -1:].tolist()]

    def parts(self, begin: list[int], texts: Sequence[list[int]]) -> tuple[Part, ...]:
        """Return the parts.

        Args:
            begin: What a conversation begins with.
            texts: Tokens of each turn that tells, then of each that asks.
        """
        frame, facts = self._frame, self._facts
        *told, (last, last_value) = facts
        read = [*begin]
        for (fact, value), text in zip(told, texts, strict=False):
            words = f"\n\n{fact.told.format(value)}{frame.to_assistant}{_DONE}{frame.to_user}"
            read += [*text, *self._ids(words)]
        parts: list[Part] = []
        for place, (fact, value) in enumerate(facts):
            more = f" Remember one thing more: {last.told.format(last_value)}" if not place else ""
            words = f"\n\n{fact.asked}{more}{frame.to_assistant}"
            read += [*texts[len(told) + place], *self._ids(words)]
            begun, answer = continuation(self._tokenizer, fact.reply, f" {value}")
            fed = [*begun, *answer[:-1]]
            parts += [Part(_row(read)), Part(_row(fed), _row(answer))]
            read = [answer[-1], *self._ids(f".{frame.to_user}")]
        return tuple(parts)

    def _ids(self, text: str) -> list[int]:
        return token_ids(self._tokenizer, text)


def _row(ids: Sequence[int]) -> torch.Tensor:
    return torch.tensor([ids])
