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
        self._versions: list[int] = []

    @cached_property
    def tensor(self) -> Tensor:
        """The copy; made when first asked for, its address never changes."""
        self._versions = self._now()
        # Nothing may write to a tensor of inference mode outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return torch.cat([source.detach() for source in self._sources])

    def _now(self) -> list[int]:
        # A tensor made in inference mode counts no versions, and cannot be changed outside of it.
        return [0 if source.is_inference() else source._version for source in self._sources]

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.tensor.split([len(source) for source in self._sources])
        return parts

    def refresh(self) -> None:
        """Copy the sources again if torch has counted a change of one of them."""
        if self._now() != self._versions:
            self.copy_all([self])

    @property
    def _is_made(self) -> bool:
        return "tensor" in self.__dict__

    @staticmethod
    def copy_all(weights: Sequence[JoinedWeight]) -> None:
        """Copy the sources of weights again; torch counts no change that is made through `.data`.

        Args:
            weights: Those whose sources may have changed; few launches for all of them. One that
                nobody has asked for yet has no copy.
        """
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for weight in weights:
            if not weight._is_made:
                continue
            weight._versions = weight._now()
            targets, sources = copies.setdefault(weight.tensor.dtype, ([], []))
            targets += weight._parts
            sources += [source.detach() for source in weight._sources]
        for targets, sources in copies.values():
            torch._foreach_copy_(targets, sources)
