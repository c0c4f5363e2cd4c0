"""Tokens of a prompt take turns in one scratch of scores.

    `Blocks`   which blocks are scored
    `Turns`    as many tokens at a time as `SCORE_BYTES` has room for
    `Scores`   what is made for them, and picked from

Kernels that score windows (`token_scores.py`) and low-bit keys (`token_masses.py`) go by them.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton

from sparda_compile.kernels.workspace import (
    SCORED_TOGETHER,
    STRIP_BLOCKS,
    ScoreRoom,
    num_runs,
    score_room,
    score_widths,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparda_compile.kernels.asked import Asked

__all__ = ["Blocks", "Scores", "Turn", "Turns"]


class Blocks(enum.Enum):
    """Which blocks are scored, and by which windows."""

    ALL = "all, by the windows before a token"
    PAST = "those up to that of the first new token, by the windows before it"
    NEW = "those that new tokens change, by the windows before a token"


class Scores(NamedTuple):
    """Scores of blocks for some tokens.

    Attributes:
        blocks: [pairs, t, n] float32, the best window that touches each block, in whole strips,
            where `score_tiles.place_of` says; what is behind the last block is any number.
        runs: [pairs, t, r] float32, the best of each run of `RUN_BLOCKS` blocks, in their order, in
            whole eights; None where nobody picks by them.
    """

    blocks: Tensor
    runs: Tensor | None

    @classmethod
    def of(cls, scratch: Tensor, rows: tuple[int, int], widths: tuple[int, int]) -> Scores:
        """Return those that lie in some memory, of pairs and tokens; see `score_widths`."""
        ends = [*itertools.accumulate((math.prod(rows) * width for width in widths), initial=0)]
        found = [
            scratch[i:j].view(*rows, width)
            for (i, j), width in zip(itertools.pairwise(ends), widths, strict=True)
        ]
        return cls(found[0], found[1] if widths[1] else None)


class Turn(NamedTuple):
    """Tokens whose scores are there at once.

    Attributes:
        begin: The first one.
        end: The one behind the last.
        num_blocks: Of those that are scored, as many as any of these tokens may have.
        scores: Theirs.
    """

    begin: int
    end: int
    num_blocks: int
    scores: Scores

    @property
    def runs(self) -> Tensor:
        """Where scores of runs go; any tensor where there are none."""
        return self.scores.blocks if self.scores.runs is None else self.scores.runs

    @property
    def widths(self) -> tuple[int, int]:
        """Strips of blocks, and eights of runs, of a token."""
        runs = self.scores.runs
        num_eights = 0 if runs is None else runs.shape[2] // SCORED_TOGETHER
        return self.scores.blocks.shape[2] // STRIP_BLOCKS, num_eights


@dataclasses.dataclass(frozen=True)
class Turns:
    """All tokens, turn by turn; the next ones take the same room.

    Attributes:
        asked: Queries and summary.
        blocks: Which blocks are scored.
        in_runs: Whether runs of them are, too.
        room: How many tokens take a turn, and what that takes.
    """

    asked: Asked
    blocks: Blocks
    in_runs: bool
    room: ScoreRoom

    @classmethod
    def of(
        cls,
        asked: Asked,
        blocks: Blocks,
        selected: int | None,
        vectors: tuple[int, int],
        masses: int = 0,
    ) -> Turns:
        """Return those of all tokens.

        Args:
            asked: Queries and summary.
            blocks: Which blocks.
            selected: Blocks that a token picks, of so many that it picks by runs; None by none.
            vectors: Of a program and of a token, as for `score_room`.
            masses: Numbers of each token and block that are kept beside its score.
        """
        num_tokens, pairs = asked.query.shape[2], asked.query.shape[0] * asked.num_groups
        count = partial(_num_blocks, asked, blocks)
        in_runs = selected is not None and num_runs(count(num_tokens), selected) > 0
        room = score_room(count, (pairs, *vectors), num_tokens, in_runs=in_runs, masses=masses)
        return cls(asked, blocks, in_runs, room)

    def __iter__(self) -> Iterator[Turn]:
        """Yield them, in one scratch."""
        scratch = self.numbers(self.room.scores)
        pairs = self.asked.query.shape[0] * self.asked.num_groups
        for begin, end in self.room.chunks:
            count = _num_blocks(self.asked, self.blocks, end)
            widths = score_widths(count, in_runs=self.in_runs)
            yield Turn(begin, end, count, Scores.of(scratch, (pairs, end - begin), widths))

    @property
    def num_blocks(self) -> int:
        """Blocks that are scored for any token, from the first that is."""
        return _num_blocks(self.asked, self.blocks, self.asked.query.shape[2])

    def numbers(self, count: int) -> Tensor:
        """Return room for so many, float32."""
        return self.asked.query.new_empty(count, dtype=torch.float32)

    def sums(self) -> list[Tensor]:
        """Return room for maxima and sums of parts of the blocks; one number without a softmax."""
        return [self.numbers(self.room.sums if self.asked.softmax else 1) for _ in range(2)]


def _num_blocks(asked: Asked, blocks: Blocks, end: int) -> int:
    """Return how many blocks may be scored for the tokens up to one, from the first that is."""
    size, num_tokens = asked.geometry.block_size, end * asked.spread
    most: dict[Blocks, int] = {
        Blocks.ALL: asked.blocks_of(end),
        Blocks.PAST: asked.num_past // size + 1,
        # New tokens lie in one block more than they fill, behind another one.
        Blocks.NEW: triton.cdiv(num_tokens, size) + 2,
    }
    return min(most[blocks], asked.geometry.num_blocks)
