"""Tasks that count words over the whole haystack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.haystack import Maker, TaskBatch
from sparda_compile.evaluation.vocabulary import BEGIN, COMMON, FREQUENT, NUM_KEYS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["common_words", "frequent_words"]

_NUM_COMMON: Final = 4
_COMMON_SHARE: Final = 0.1
_MIN_COMMON: Final = 4
_NUM_FREQUENT: Final = 3
_NUM_RANKS: Final = 12


def common_words(maker: Maker) -> TaskBatch:
    """Ask for the four words that are each a tenth of the haystack; the others are rare.

    Raises:
        ConfigError: If the length is too small for rare words to be rarer.
    """
    tail = 1 + _NUM_COMMON
    room = maker.room(tail, int(_MIN_COMMON / _COMMON_SHARE))
    repeats = int(room * _COMMON_SHARE)
    num_rare = min(NUM_KEYS - _NUM_COMMON, room)
    words_BM = maker.keys(_NUM_COMMON + num_rare)
    common = torch.arange(_NUM_COMMON, device=maker.device).repeat(repeats)
    others = torch.arange(room - len(common), device=maker.device)
    order = torch.cat([common, _NUM_COMMON + others % num_rare])
    answers = words_BM[:, :_NUM_COMMON].sort(dim=1).values
    return _shuffled(maker, words_BM[:, order], COMMON, answers, any_order=True)


def frequent_words(maker: Maker) -> TaskBatch:
    """Ask for the three words that are most frequent: the word of rank r has a share of 1/r^2.

    Raises:
        ConfigError: If the length is too small for the ranks to differ.
    """
    tail = 1 + _NUM_FREQUENT
    weights = [rank**-2.0 for rank in range(1, _NUM_RANKS + 1)]
    room = maker.room(tail, 0)
    counts = [int(room * weight / sum(weights)) for weight in weights]
    top = counts[: _NUM_FREQUENT + 1]
    if len(set(top)) < len(top):
        raise ConfigError(
            f"length={maker.length} is too small for the three most frequent words to differ in "
            "number; use 64 or more."
        )
    # What rounding down left over belongs to the first.
    counts[0] += room - sum(counts)
    words_BM = maker.keys(_NUM_RANKS)
    order = torch.cat(
        [torch.full((count,), rank, device=maker.device) for rank, count in enumerate(counts)]
    )
    return _shuffled(maker, words_BM[:, order], FREQUENT, words_BM[:, :_NUM_FREQUENT])


def _shuffled(
    maker: Maker, words_BT: Tensor, question: int, answers_BA: Tensor, *, any_order: bool = False
) -> TaskBatch:
    """Put the words in random order before the question."""
    shuffle = maker.distinct(words_BT.shape[1], words_BT.shape[1])
    begin = torch.full((maker.batch_size, 1), BEGIN, device=maker.device)
    asked = torch.full_like(begin, question)
    haystack = torch.cat([begin, words_BT.gather(1, shuffle)], dim=1)
    start, num_answers = haystack.shape[1], answers_BA.shape[1]
    is_answer = haystack[:, None] == answers_BA[..., None]
    return TaskBatch(
        ids_BT=torch.cat([haystack, asked, answers_BA], dim=1),
        answer_positions_A=start + 1 + torch.arange(num_answers, device=maker.device),
        evidence_BA=is_answer.long().argmax(2),
        question_start=start,
        any_order=any_order,
        copies=False,
    )
