"""Blocks as the model made them: its own dtype, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from sparda_compile.formats.base import BlockFormat

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ModelFormat"]


class ModelFormat(BlockFormat):
    """Keys, then values, [2, P, D] of the model's dtype."""

    name: ClassVar[str] = "model"
    rounds: ClassVar[bool] = False
    error: ClassVar[float] = 0.0

    def stored(
        self, size: int, dim: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the block's own shape and dtype."""
        return (2, size, dim), dtype

    def pack(self, blocks: Tensor) -> Tensor:
        """Return the blocks."""
        return blocks

    def unpack(self, stored: Tensor, size: int, dim: int, dtype: torch.dtype) -> Tensor:
        """Return the blocks."""
        del size, dim, dtype
        return stored

    def bound(self, blocks: Tensor) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(blocks, dtype=torch.float32)
