"""A module that stays as it was made: its programs hold its weights, its device and its dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparda_compile.errors import BypassError, UnsupportedInputError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FrozenModule"]


class FrozenModule(nn.Module):
    """Refuses what would move, cast, train, copy or compile it."""

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: pieces are compiled already, and what lies between them must not be."""
        del args, kwargs
        raise BypassError(
            "an optimized module has no compile: it is compiled piece by piece, as "
            "SpardaConfig.lowering says; to compile around it would reorder its streams."
        )

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode: the rewritten graph has no gradient."""
        if mode:
            raise UnsupportedInputError(
                "an optimized module cannot be trained; train the model and optimize it again."
            )
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return self when device and dtype are as they are; refuse any other."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        weight = next(self.parameters())
        here = weight.device
        same_device = device is None or (
            device.type == here.type and device.index in (None, here.index or 0)
        )
        if same_device and dtype in (None, weight.dtype):
            return self
        raise UnsupportedInputError(
            "an optimized module cannot be moved or cast: its graphs and its KV cache are made "
            f"for {here} and {weight.dtype}. Move the model and optimize it again."
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        del fn, recurse
        raise UnsupportedInputError(
            "an optimized module cannot be moved or cast; move the model and optimize it again."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse pickling: compiled programs and live caches do not survive it."""
        raise UnsupportedInputError(
            "an optimized module cannot be pickled or deep-copied; save the model with "
            "save_pretrained and optimize it again after loading."
        )
