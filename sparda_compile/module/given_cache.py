"""Caches that a caller gives: whether a module can go on from them, and what others hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.checks import whole
from sparda_compile.errors import KVCacheError
from sparda_compile.memory import MOST_TOKENS
from sparda_compile.module.cache import SpardaCache
from sparda_compile.runtime.held import HeldKeysValues

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from sparda_compile.config import SpardaConfig
    from sparda_compile.program.captures import Captures

__all__ = ["check_owner", "check_request", "check_reserved", "check_turn", "keys_and_values"]


def check_owner(cache: Any, module: nn.Module) -> None:
    """Refuse what is no cache of a module, or one whose last step did not end.

    Args:
        cache: What a call was given.
        module: The optimized module that was called.

    Raises:
        KVCacheError: If it is.
    """
    if not isinstance(cache, SpardaCache):
        raise KVCacheError(
            f"the cache given is a {type(cache).__name__}; pass None, or a cache that this "
            f"module returned: {CACHE_NAME} of an earlier output, new_cache(), or "
            "new_cache(past=...) with one that the model filled."
        )
    if cache.kv is not None:
        cache.kv.check_ended()
    if cache.owner() is not module:
        raise KVCacheError(
            "the cache given is that of another model; a cache holds the keys of the "
            "module that made it. Pass None to start a new one."
        )


def check_request(max_tokens: Any, past: Any = None, attention_mask: Any = None) -> None:
    """Refuse what a new cache cannot be made of.

    Args:
        max_tokens: Tokens per sequence to reserve, or None.
        past: A cache to take over, or None.
        attention_mask: Of its tokens, or None.

    Raises:
        ConfigError: If `max_tokens` is no number of tokens.
        KVCacheError: If `past` is no cache, or there is a mask and it is no tensor or of no cache.
    """
    if max_tokens is not None:
        whole("max_tokens", max_tokens, 1, MOST_TOKENS)
    if past is not None and not isinstance(past, Cache):
        raise KVCacheError(
            f"past is a {type(past).__name__}; pass the DynamicCache that model(input_ids, "
            "use_cache=True) returns, or a cache of a module that was optimized from the same."
        )
    if attention_mask is None:
        return
    if past is None:
        raise KVCacheError(
            "attention_mask is for the tokens of past, and past is not given; an empty cache has "
            "none. Pass it to forward or generate."
        )
    if not isinstance(attention_mask, Tensor):
        raise KVCacheError(f"attention_mask is a {type(attention_mask).__name__}; pass a tensor.")


def check_reserved(config: SpardaConfig, total: int) -> None:
    """Refuse more tokens per sequence than a configuration reserves.

    Raises:
        KVCacheError: If there are.
    """
    limit = config.max_tokens
    if limit is not None and total > limit:
        raise KVCacheError(
            f"prompt and new tokens, or a saved cache, need {total} tokens per sequence, more than "
            f"max_tokens={limit}; raise max_tokens, shorten the prompt, or lower "
            "max_new_tokens."
        )


def check_turn(cache: SpardaCache, ids: Tensor | None) -> None:
    """Refuse a conversation that does not go on from what a cache holds.

    Args:
        cache: The cache.
        ids: [B, T] int64, the whole conversation; None where it is not known.

    Raises:
        KVCacheError: If it has no new token, or an earlier one differs.
    """
    past, num_tokens = cache.get_seq_length(), 0 if ids is None else ids.shape[1]
    if past and num_tokens <= past:
        raise KVCacheError(
            f"input_ids has {num_tokens} tokens but the cache holds {past}; on a second turn "
            "pass the whole conversation: the tokens of the cache and then the new ones."
        )
    if past and ids is not None:
        cache.check_ids(ids)


def keys_and_values(
    past: Any, attention_mask: Tensor | None, captures: Captures | None = None
) -> tuple[Mapping[int, tuple[Tensor, Tensor]], Tensor]:
    """Return what a cache holds.

    Args:
        past: A DynamicCache that a model filled, or a cache of a module that was optimized from it.
        attention_mask: [B, T] of its tokens, 0 for padding; None means no padding. A cache of an
            optimized module knows its own.
        captures: Of the module that takes over, which a cache of an optimized module has to share.

    Returns:
        Keys and values [B, G, T, D] by layer, and a mask [B, T] bool of the real tokens.

    Raises:
        KVCacheError: If it is another kind of cache, or empty, or the mask is of another size; or
            that of another model, or of a step that did not end.
    """
    if isinstance(past, SpardaCache):
        return _held_by(past, attention_mask, captures)
    layers = getattr(past, "layers", [])
    if not isinstance(past, DynamicCache) or not all(isinstance(x, DynamicLayer) for x in layers):
        kinds = ", ".join(sorted({type(x).__name__ for x in layers})) or "no layers"
        raise KVCacheError(
            f"past is a {type(past).__name__} with {kinds}; pass a DynamicCache of plain or "
            "sliding-window layers, which is what model(input_ids, use_cache=True) returns."
        )
    num_tokens = past.get_seq_length()
    if not num_tokens:
        raise KVCacheError("past holds no token; leave it out to begin with an empty cache.")
    first: Any = layers[0]
    mask = torch.ones(first.keys.shape[0], num_tokens, dtype=torch.bool, device=first.keys.device)
    if attention_mask is not None:
        if attention_mask.shape != mask.shape:
            raise KVCacheError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but past holds "
                f"{tuple(mask.shape)} tokens; pass one entry for each, 0 for padding."
            )
        mask = attention_mask.bool()
    return {number: (x.keys, x.values) for number, x in enumerate(layers)}, mask


def _held_by(
    past: SpardaCache, attention_mask: Tensor | None, captures: Captures | None
) -> tuple[Mapping[int, tuple[Tensor, Tensor]], Tensor]:
    owner: Any = past.owner()
    if owner is None or owner.captures is not captures:
        raise KVCacheError(
            "past is a cache of another model; pass one of a module that was optimized from the "
            "same, as optimize(fast, config) does, while that module is there."
        )
    if attention_mask is not None:
        raise KVCacheError(
            "attention_mask is for a cache that the model itself filled; one of an optimized "
            "module knows which of its tokens are padding. Leave it out."
        )
    if past.kv is None or not past.kv.num_columns:
        raise KVCacheError("past holds no token; leave it out to begin with an empty cache.")
    past.kv.check_ended()
    mask = past.passed_mask
    return HeldKeysValues(past.kv, mask), mask
