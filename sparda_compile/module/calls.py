"""What `forward` and `generate` of an optimized module refuse, before anything runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.cache import NO_BEAMS, NO_CROP

__all__ = ["check_call", "check_generation", "positions_of", "token_mask"]


def check_generation(config: Any, kwargs: dict[str, Any]) -> None:
    """Refuse what a call of `generate` asks for and an optimized module does not do.

    Args:
        config: The generation config of the call, or of the model.
        kwargs: Arguments of the call; they win over the config.

    Raises:
        UnsupportedInputError: For beam search, assisted generation, input embeddings and a cache
            of another kind.
    """

    def setting(name: str) -> Any:
        return kwargs.get(name, getattr(config, name, None))

    if (setting("num_beams") or 1) > 1:
        raise UnsupportedInputError(NO_BEAMS)
    if kwargs.get("assistant_model") is not None or setting("prompt_lookup_num_tokens"):
        raise UnsupportedInputError(NO_CROP)
    if kwargs.get("inputs_embeds") is not None:
        raise UnsupportedInputError("inputs_embeds is not supported; pass input_ids to generate.")
    if setting("cache_implementation"):
        raise UnsupportedInputError(
            f"cache_implementation={setting('cache_implementation')!r} is not supported: an "
            "optimized module brings its own cache. Leave it unset."
        )


def check_call(input_ids: Tensor | None, kwargs: dict[str, Any]) -> Tensor:
    """Return the new tokens of a forward, after refusing what it does not take.

    Args:
        input_ids: [B, T] int64.
        kwargs: What else the forward was given; must be None or False.

    Raises:
        UnsupportedInputError: If something else is given, or there are no tokens.
    """
    for name, value in kwargs.items():
        if value is not None and value is not False:
            raise UnsupportedInputError(
                f"{name} is not supported by an optimized module; it takes input_ids, "
                "attention_mask, position_ids, past_key_values or cache, and logits_to_keep."
            )
    if input_ids is None or input_ids.dim() != 2 or input_ids.shape[1] < 1:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise UnsupportedInputError(
            f"input_ids has shape {shape}; pass [batch, tokens] with at least one token."
        )
    return input_ids


def token_mask(attention_mask: Tensor | None, num_columns: int, ids: Tensor) -> Tensor:
    """Return which of the new tokens are real, [B, T] bool.

    Args:
        attention_mask: [B, T] or [B, columns + T], 0 for padding; None means no padding.
        num_columns: Columns that earlier calls have passed.
        ids: [B, T] int64, the new tokens.

    Raises:
        UnsupportedInputError: If the mask is of another shape.
    """
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    width = num_columns + ids.shape[1]
    if attention_mask.dim() != 2 or attention_mask.shape[1] not in (width, ids.shape[1]):
        raise UnsupportedInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; pass [batch, {width}], "
            "one entry for each token of the cache and each new one, 0 for padding."
        )
    if attention_mask.shape[0] != ids.shape[0]:
        raise UnsupportedInputError(
            f"attention_mask is for {attention_mask.shape[0]} sequences, input_ids for "
            f"{ids.shape[0]}."
        )
    return attention_mask[:, -ids.shape[1] :].bool()


def positions_of(given: Tensor | None, mask: Tensor, lengths: Tensor) -> Tensor:
    """Return the position of each new token, [B, T] int64.

    Args:
        given: What the caller passes; None counts the real tokens of each sequence.
        mask: [B, T] bool, which tokens are real.
        lengths: [B] int32, tokens before this call.
    """
    if given is not None:
        return given.expand(mask.shape).long().contiguous()
    past = lengths.long()[:, None]
    return (past + mask.long().cumsum(1) - 1).clamp(min=0)
