"""What a selection of a prompt's blocks is asked for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["LOW_BIT", "NOSA", "SOFTMAX", "Asked"]

NOSA: Final = frozenset({"nosa", "nosa_forecast"})
"""Selectors whose keys end with a retention score."""

LOW_BIT: Final = frozenset({"lowbit2", "lowbit4", "lowbit2_forecast", "lowbit4_forecast"})
"""Selectors by the key of each token, in few bits, that kernels select for."""

SOFTMAX: Final = frozenset({"infllm2", "nosa", "lowbit2", "lowbit4"})
"""Selectors by which a head's scores are weights."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for scores.

    Attributes:
        query: [B, H, T, D] queries, or Forecasts, as `selector` takes them.
        tensors: Of the summary; the first are pooled keys or bounds.
        positions: [B, T] int32, -1 where no token is.
        lengths: [B] int32, tokens before this call.
        num_past: No sequence has more.
        selector: One that `covers` has.
        scale: Factor on q . k.
        geometry: Sizes.
        spread: A token's position is less than `num_past` and so many times one more than its
            place.
        most_blocks: No token has more; None where positions and sizes alone say so.
    """

    query: Tensor
    tensors: Sequence[Tensor]
    positions: Tensor
    lengths: Tensor
    num_past: int
    selector: str
    scale: float
    geometry: Geometry
    spread: int = 1
    most_blocks: int | None = None

    @property
    def softmax(self) -> bool:
        """Whether a head's scores are weights."""
        return self.selector in SOFTMAX

    @property
    def lists(self) -> bool:
        """Whether the last number of a key is its retention score, which no query multiplies."""
        return self.selector in NOSA

    @property
    def is_low_bit(self) -> bool:
        """Whether scores are made of each token's key, in few bits."""
        return self.selector in LOW_BIT

    def blocks_of(self, end: int) -> int:
        """Return how many blocks any of the tokens up to one may have."""
        size, most = self.geometry.block_size, self.geometry.num_blocks
        most = most if self.most_blocks is None else min(most, self.most_blocks)
        return min(-(-(self.num_past + end * self.spread) // size), most)

    def apart(self, num_blocks: int) -> tuple[Asked, Asked]:
        """Return what is asked of the tokens with so many blocks before theirs, and of the others.

        First of those with fewer; the other tokens have position -1.
        """
        is_first = self.positions < num_blocks * self.geometry.block_size
        first = dataclasses.replace(
            self, positions=self.positions.where(is_first, -1), most_blocks=num_blocks
        )
        return first, dataclasses.replace(self, positions=self.positions.where(~is_first, -1))

    def look(self, selector: str) -> Asked:
        """Return what is asked of one query for each KV head, the mean of its group.

        Args:
            selector: Scores it as it does a Forecast of one head.
        """
        mean_BGTD = self.query.unflatten(1, (self.num_groups, -1)).mean(2, dtype=torch.float32)
        return dataclasses.replace(self, query=mean_BGTD.to(self.query.dtype), selector=selector)

    @property
    def num_groups(self) -> int:
        """KV heads."""
        return self.tensors[0].shape[1]

    @property
    def windows(self) -> Geometry:
        """Sizes of the windows that are scored: a bound is of a block, low-bit keys a full one."""
        size = self.geometry.block_size
        if self.selector == "quest":
            return dataclasses.replace(self.geometry, pool_size=1, pool_stride=size)
        if self.is_low_bit:
            return dataclasses.replace(self.geometry, pool_size=size, pool_stride=size)
        return self.geometry
