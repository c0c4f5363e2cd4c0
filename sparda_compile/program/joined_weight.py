"""A weight that several projections share, and what it is made of: the parts stay the model's."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["JoinedWeight"]


class JoinedWeight:
    """Weights put together, one above the other, in step with the model's own.

    Args:
        sources: The weights; in-place changes to them are noticed.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        self._sources = tuple(sources)
        self._versions = self._now()

    @cached_property
    def tensor(self) -> Tensor:
        """The copy; made when first asked for, its address never changes."""
        return torch.cat([source.detach() for source in self._sources])

    def _now(self) -> list[int]:
        # A tensor made in inference mode counts no versions, and cannot be changed outside of it.
        return [0 if source.is_inference() else source._version for source in self._sources]

    def refresh(self, *, is_sure: bool = False) -> None:
        """Copy the sources again if one of them has changed.

        Args:
            is_sure: Whether to copy them anyway: torch counts no change that is made through
                `.data`.
        """
        if is_sure or self._now() != self._versions:
            self._versions = self._now()
            self.tensor.copy_(torch.cat([source.detach() for source in self._sources]))
