"""Text between what is to be found: running text of the documents, cut at the ends of sentences."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.text.documents import token_ids

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from sparda_compile.evaluation.text.documents import Document

__all__ = ["Filler", "continuation"]

# How far around a place the end of a sentence is looked for, tokens.
_REACH: Final = 64
_ENDINGS: Final = (".", "!", "?", "\n")


class Filler:
    """Running text of documents, in an order and from a place that a seed decides.

    Args:
        tokenizer: Of the model.
        documents: Whose text it is.
        generator: Decides the order, and where the text begins.
        least: Tokens that it must have.

    Raises:
        ConfigError: If the documents have fewer.
    """

    def __init__(
        self, tokenizer: Any, documents: Sequence[Document], generator: random.Random, least: int
    ) -> None:
        self._tokenizer = tokenizer
        order = generator.sample(documents, len(documents))
        self._ids = [token for each in order for token in each.ids_T.tolist()]
        if len(self._ids) < least:
            raise ConfigError(
                f"the documents have {len(self._ids)} tokens in all, fewer than the {least} that "
                "one sample takes; name more or longer texts, or lower length."
            )
        self._place = generator.randint(0, len(self._ids) - least)

    def take(self, count: int) -> list[int]:
        """Return the next tokens of the text."""
        begin, self._place = self._place, self._place + count
        return self._ids[begin : self._place]

    def cut(self, ids: Sequence[int], place: int) -> int:
        """Return the place nearest behind `place` that ends a sentence, else the nearest before.

        It is `place` itself where the text has no such end nearby, as code has not.
        """
        last = min(place + _REACH, len(ids))
        behind = range(max(place, 1), last + 1)
        before = range(place - 1, max(place - _REACH, 0), -1)
        for here in itertools.chain(behind, before):
            if self._tokenizer.decode([ids[here - 1]]).endswith(_ENDINGS):
                return here
        return place


def continuation(tokenizer: Any, begun: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a text that is begun, and those that its answer adds.

    Tokenizers may join the last letters of one to the first of the other; then these belong to the
    answer.

    Raises:
        ConfigError: If the answer adds no token, or nothing is left of the begin.
    """
    before, whole = token_ids(tokenizer, begun), token_ids(tokenizer, begun + answer)
    same = 0
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    if not 0 < same < len(whole):
        raise ConfigError(
            f"the tokenizer gives {answer!r} behind {begun!r} no tokens of its own, so it cannot "
            "be checked; use the tokenizer of the model."
        )
    return whole[:same], whole[same:]
