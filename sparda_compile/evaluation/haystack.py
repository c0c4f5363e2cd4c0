"""What the tasks share: a batch, the noise, and places for records in it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.evaluation.vocabulary import (
    BEGIN,
    FIRST_KEY,
    FIRST_NOISE,
    FIRST_VALUE,
    NUM_KEYS,
    NUM_NOISE,
    NUM_VALUES,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Maker", "TaskBatch"]

_SENTENCE: Final = 16


@dataclasses.dataclass(frozen=True)
class TaskBatch:
    """Sequences of one task. B sequences, T tokens, A answer tokens.

    Attributes:
        ids_BT: [B, T] int64; haystack, then questions with their answers.
        answer_positions_A: [A] int64, ascending; where the answer tokens stand. The token at
            p is to be predicted from the tokens before p.
        evidence_BA: [B, A] int64; where each answer token stands in the haystack. In counting
            tasks that is its first occurrence.
        question_start: Place of the first token of the first question: the haystack is before.
        any_order: Whether the answer tokens count in any order.
        copies: Whether each answer token is copied from its evidence; otherwise it is counted.
    """

    ids_BT: Tensor
    answer_positions_A: Tensor
    evidence_BA: Tensor
    question_start: int
    any_order: bool = False
    copies: bool = True

    @property
    def answers_BA(self) -> Tensor:
        """The right tokens, [B, A] int64."""
        return self.ids_BT[:, self.answer_positions_A]

    def prompt(self, row: int) -> list[int]:
        """Return what one sequence has before its first answer."""
        ids: list[int] = self.ids_BT[row, : int(self.answer_positions_A[0])].tolist()
        return ids


class Maker:
    """Draws what a batch is made of, on the device of its generator.

    Args:
        batch_size: B, sequences.
        length: T, tokens of each.
        generator: Where all randomness comes from.
    """

    def __init__(self, batch_size: int, length: int, generator: torch.Generator) -> None:
        self.batch_size = batch_size
        self.length = length
        self.generator = generator
        self.device = generator.device

    def uniform(self, *shape: int) -> Tensor:
        """Return [B, ...] float32 in [0, 1)."""
        return torch.rand(self.batch_size, *shape, generator=self.generator, device=self.device)

    def distinct(self, count: int, total: int) -> Tensor:
        """Return [B, count] int64 distinct numbers below `total`, in random order."""
        return self.uniform(total).topk(count, dim=1).indices

    def keys(self, count: int) -> Tensor:
        """Return [B, count] distinct key tokens.

        Raises:
            ConfigError: If there are not so many.
        """
        if count > NUM_KEYS:
            raise ConfigError(
                f"{count} different keys were asked for, but the vocabulary has {NUM_KEYS}; ask "
                f"for {NUM_KEYS} or fewer."
            )
        return FIRST_KEY + self.distinct(count, NUM_KEYS)

    def values(self, count: int) -> Tensor:
        """Return [B, count] value tokens, each drawn on its own."""
        return FIRST_VALUE + (self.uniform(count) * NUM_VALUES).long()

    def noise(self) -> Tensor:
        """Return [B, T]: a beginning, then one sentence of noise per sequence, over and over."""
        sentence = FIRST_NOISE + self.distinct(_SENTENCE, NUM_NOISE)
        repeats = -(-self.length // _SENTENCE)
        ids = sentence.repeat(1, repeats)[:, : self.length].contiguous()
        ids[:, 0] = BEGIN
        return ids

    def room(self, tail: int, needed: int) -> int:
        """Return the haystack's tokens behind its beginning, with `tail` for the questions.

        Raises:
            ConfigError: If they are fewer than needed.
        """
        room = self.length - 1 - tail
        if room < needed:
            raise ConfigError(
                f"length={self.length} is too small: the haystack needs {needed} tokens, the "
                f"question and its answer {tail}, and the beginning 1; use "
                f"{needed + tail + 1} or more."
            )
        return room

    def places(self, room: int, count: int, width: int) -> Tensor:
        """Return [B, count] ascending starts of runs of `width` tokens that do not overlap.

        Every way to place them is equally likely; the first token of the sequence stays free.
        """
        free = room - count * width
        starts = self.distinct(count, free + count).sort(dim=1).values
        return 1 + starts + torch.arange(count, device=self.device) * (width - 1)
