"""What a cache has to be for a call, and whether there is room for the tokens that it brings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.capture.cache_name import CACHE_NAME
from sparda_compile.errors import KVCacheError
from sparda_compile.module.cache import SpardaCache

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.module.optimized import OptimizedModule

__all__ = ["check_owner", "check_reserved", "check_second_turn"]


def check_owner(module: OptimizedModule, cache: Any) -> None:
    """Refuse what is no cache of a module, or one whose last step broke.

    Raises:
        KVCacheError: If it is.
    """
    if not isinstance(cache, SpardaCache):
        raise KVCacheError(
            f"the cache given is a {type(cache).__name__}; pass None, or a cache that this "
            f"module returned: {CACHE_NAME} of an earlier output, new_cache(), or "
            "new_cache(past=...) with one that the model filled."
        )
    if cache.kv is not None and cache.kv.is_broken:
        raise KVCacheError(
            "the last step on this cache began and did not end, so nobody knows what it holds. "
            "Call its reset() and pass the whole text again, or start a new cache."
        )
    if cache.owner() is not module:
        raise KVCacheError(
            "the cache given is that of another model; a cache holds the keys of the "
            "module that made it. Pass None to start a new one."
        )


def check_reserved(limit: int | None, total: int) -> None:
    """Refuse more tokens than are reserved for a sequence.

    Args:
        limit: `SpardaConfig.max_tokens`.
        total: Tokens that a sequence has in the end.

    Raises:
        KVCacheError: If there are more.
    """
    if limit is not None and total > limit:
        raise KVCacheError(
            f"prompt and new tokens need {total} tokens per sequence, more than "
            f"max_tokens={limit}; raise max_tokens, shorten the prompt, or lower "
            "max_new_tokens."
        )


def check_second_turn(
    cache: SpardaCache, ids: Tensor | None, limit: int | None, total: int
) -> None:
    """Refuse a prompt that does not begin with what the cache holds.

    Args:
        cache: Of this module.
        ids: [B, T] the whole text.
        limit: `SpardaConfig.max_tokens`.
        total: Tokens that a sequence has in the end.

    Raises:
        KVCacheError: If it does not, or there is no room for it.
    """
    past, num_tokens = cache.get_seq_length(), 0 if ids is None else ids.shape[1]
    check_reserved(limit, total)
    if past and num_tokens <= past:
        raise KVCacheError(
            f"input_ids has {num_tokens} tokens but the cache holds {past}; on a second turn "
            "pass the whole conversation: the tokens of the cache and then the new ones."
        )
    if past and ids is not None:
        cache.check_ids(ids)
