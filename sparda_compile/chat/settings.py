"""What a conversation is run with, and how much of a growing text a share of its blocks is."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from sparda_compile.config import SpardaConfig

__all__ = ["ChatSettings"]


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """What a conversation is run with.

    Attributes:
        base: The configuration; its `top_k` counts where no share is given.
        budget: Share of the text's blocks that a step reads, above 0 and at most 1; None reads
            `top_k` beside sink, local and current ones.
        max_new_tokens: Tokens of an answer, at most.
    """

    base: SpardaConfig
    budget: float | None
    max_new_tokens: int

    def __post_init__(self) -> None:
        if self.budget is not None and not 0.0 < self.budget <= 1.0:
            raise ConfigError(
                f"budget={self.budget} is not a share of the blocks; use 0.01 to 1 (all)."
            )
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens={self.max_new_tokens} leaves no room for an answer; use 1 or more."
            )

    def changed(self, **changes: Any) -> ChatSettings:
        """Return settings with some fields changed, those of the configuration among them.

        Args:
            **changes: Fields of these settings or of `SpardaConfig`; `top_k` puts an end to a
                share.

        Raises:
            ConfigError: If a value is not allowed.
        """
        mine = {field.name for field in dataclasses.fields(self)}
        own = {name: value for name, value in changes.items() if name in mine}
        theirs = {name: value for name, value in changes.items() if name not in mine}
        if "top_k" in theirs:
            own["budget"] = None
        found = dataclasses.replace(self, base=self.base.replace(**theirs), **own)
        found.config(0)
        return found

    def config(self, num_tokens: int) -> SpardaConfig:
        """Return the configuration for a text.

        A share is never less than the blocks that are always read: of a short text, they are all.

        Args:
            num_tokens: Tokens of the text.

        Raises:
            ConfigError: If a selector cannot do with what the share leaves to it.
        """
        if self.budget is None or self.base.mode == "dense":
            return self.base
        if self.budget == 1.0:
            return self.base.replace(top_k=None)
        num_blocks = -(-num_tokens // self.base.block_size)
        chosen = round(self.budget * num_blocks) - self.base.num_forced
        return self.base.replace(top_k=max(chosen, 0))
