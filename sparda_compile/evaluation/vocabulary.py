"""The tokens of the retrieval tasks: a small integer vocabulary, and its spelling in bytes.

    0 .. 15        special tokens: padding, beginning, markers of records and of questions
    16 .. 63       noise tokens: the haystack
    64 .. 1087     key tokens: names of records, variables and words
    1088 .. 1599   value tokens: what is looked up

A model with this vocabulary reads the integers as they are. For a model whose vocabulary is bytes
every token is spelled in five: four characters and a space.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

__all__ = [
    "ASK",
    "ASK_ALL",
    "BEGIN",
    "COMMON",
    "FIRST_KEY",
    "FIRST_NOISE",
    "FIRST_VALUE",
    "FREQUENT",
    "LINK",
    "NUM_KEYS",
    "NUM_NOISE",
    "NUM_TOKENS",
    "NUM_VALUES",
    "PAD",
    "RECORD",
    "SPELLING_BYTES",
    "TRACK",
    "from_bytes",
    "spell",
    "to_bytes",
]

PAD: Final = 0
BEGIN: Final = 1
RECORD: Final = 2
ASK: Final = 3
ASK_ALL: Final = 4
LINK: Final = 5
TRACK: Final = 6
COMMON: Final = 7
FREQUENT: Final = 8

FIRST_NOISE: Final = 16
NUM_NOISE: Final = 48
FIRST_KEY: Final = FIRST_NOISE + NUM_NOISE
NUM_KEYS: Final = 1024
FIRST_VALUE: Final = FIRST_KEY + NUM_KEYS
NUM_VALUES: Final = 512
NUM_TOKENS: Final = FIRST_VALUE + NUM_VALUES

SPELLING_BYTES: Final = 5

_MARKERS: Final = {
    PAD: "",
    BEGIN: "text",
    RECORD: "note",
    ASK: "ask:",
    ASK_ALL: "all:",
    LINK: "link",
    TRACK: "hop:",
    COMMON: "com:",
    FREQUENT: "top:",
}
_CONSONANTS: Final = "bdfgklmn"
_VOWELS: Final = "aeio"


def spell(token: int) -> str:
    """Return the four characters that stand for a token, without spaces around them.

    Raises:
        ConfigError: If there is no such token.
    """
    if not 0 <= token < NUM_TOKENS:
        raise ConfigError(
            f"token {token} is not in the vocabulary of the tasks; use 0 to {NUM_TOKENS - 1}."
        )
    if token < FIRST_NOISE:
        return _MARKERS.get(token, f"<{token:02d}>")
    if token < FIRST_KEY:
        return f".{token - FIRST_NOISE:02d}."
    if token < FIRST_VALUE:
        first, second = divmod(token - FIRST_KEY, len(_CONSONANTS) * len(_VOWELS))
        return _syllable(first) + _syllable(second)
    return str(1000 + token - FIRST_VALUE)


def to_bytes(ids: Tensor) -> Tensor:
    """Spell tokens in bytes.

    Args:
        ids: [..., T] int64 tokens of the vocabulary.

    Returns:
        [..., 5 T] int64 bytes, on the device of `ids`.
    """
    spelled = _codebook().to(ids.device)[ids]
    return spelled.flatten(-2)


def from_bytes(spelled: Iterable[int]) -> list[int]:
    """Read tokens back from their bytes.

    Raises:
        ConfigError: If the bytes are not whole tokens, or spell none.
    """
    text = bytes(spelled)
    words = [text[i : i + SPELLING_BYTES] for i in range(0, len(text), SPELLING_BYTES)]
    tokens = {bytes(row): token for token, row in enumerate(_codebook().tolist())}
    unknown = next((word for word in words if word not in tokens), None)
    if unknown is not None:
        raise ConfigError(
            f"bytes {unknown!r} spell no token; a token is four characters and a space, such as "
            f"{spell(FIRST_KEY) + ' '!r}."
        )
    return [tokens[word] for word in words]


def _syllable(index: int) -> str:
    consonant, vowel = divmod(index, len(_VOWELS))
    return _CONSONANTS[consonant] + _VOWELS[vowel]


def _codebook() -> Tensor:
    """Return the bytes of every token, [vocabulary, 5] int64."""
    rows = [list(spell(token).ljust(SPELLING_BYTES).encode("ascii")) for token in range(NUM_TOKENS)]
    return torch.tensor(rows)
