"""What is checked before anything is read: of a call of `forward`, and of one of `generate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.capture.cache_name import take_cache
from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.agreed import facts_of_generation
from sparda_compile.module.cache import SpardaCache
from sparda_compile.module.calls import check_generation, check_prompt, length_of
from sparda_compile.module.given_cache import check_owner, check_reserved, check_turn
from sparda_compile.module.inputs import (
    check_holes,
    check_kept_tokens,
    check_reach,
    is_last,
    token_mask,
)
from sparda_compile.module.prompt import Reading

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.module.optimized import OptimizedModule
    from sparda_compile.runtime.kv_cache import KVCache

__all__ = ["begin_call", "begin_generation"]


def begin_call(
    module: OptimizedModule,
    cache: SpardaCache,
    kv: KVCache,
    ids: Tensor,
    attention_mask: Tensor | None,
    logits_to_keep: int | Tensor,
) -> tuple[Reading, Tensor, int]:
    """Check new tokens of a call of `forward`; nothing has been read yet if it raises.

    Args:
        module: Whose forward was called.
        cache: The cache of the call.
        kv: Its state, with room for the tokens.
        ids: [B, T] int64.
        attention_mask: As for `forward`.
        logits_to_keep: As for `forward`.

    Returns:
        How they are read, which of them are real [B, T] bool, and how many of the longest sequence
        are.

    Raises:
        UnsupportedInputError: If a mask is not supported, the text is too long for the model, or
            logits of tokens are asked for that are not passed in.
        KVCacheError: If there is no room for the tokens.
    """
    batch_size, num_tokens = ids.shape
    check_reach(kv.num_columns + num_tokens, module.captures.reach)
    check_kept_tokens(logits_to_keep, num_tokens)
    mask = token_mask(attention_mask, cache, ids)
    check_holes(attention_mask, module.captures.windows.values())
    hides = attention_mask is not None and not bool(mask.all())  # asks the device, once
    is_decode = num_tokens == 1
    if is_decode and hides:
        raise UnsupportedInputError(
            "attention_mask hides the only new token of a sequence; pass at least one real "
            "token for each."
        )
    num_real = num_tokens
    if num_tokens > 1:
        num_real = int(mask.sum(1).max()) if hides else num_tokens
        kv.check_room(num_real)
    last_only = is_decode or is_last(logits_to_keep)
    reading = Reading(module.programs, kv, (batch_size, num_tokens), hides, last_only)
    return reading, mask, num_real


def begin_generation(
    module: OptimizedModule, inputs: Tensor | None, kwargs: dict[str, Any], facts: dict[str, Any]
) -> tuple[SpardaCache, bool]:
    """Check a call of `generate`.

    Args:
        module: Whose generate was called.
        inputs: The prompt, or None.
        kwargs: Arguments of the call; the cache is removed.
        facts: Where to enter what all ranks have to pass.

    Returns:
        The cache of the call, and whether to return it.

    Raises:
        UnsupportedInputError: If an argument is not supported.
        KVCacheError: If the cache does not fit, or the text does not.
    """
    settings = check_generation(module.generation_config, kwargs)
    ids = check_prompt(inputs, kwargs, settings)
    facts |= facts_of_generation(module.ranks, ids, kwargs, settings)
    total = length_of(1 if ids is None else ids.shape[1], settings, module.config)
    check_reach(total, module.captures.reach)
    cache = take_cache(kwargs)
    is_given = cache is not None
    if not is_given:
        check_reserved(module.sparda_config, total)
        cache = SpardaCache(module, module.programs.capacity(total))
    else:
        check_owner(cache, module)
        check_reserved(module.sparda_config, total)
        check_turn(cache, ids)
        mask = kwargs.get("attention_mask")
        if mask is not None and ids is not None:
            token_mask(mask, cache, ids[:, cache.get_seq_length() :])
    cache.is_checked = True
    return cache, settings.get("use_cache") is not False or is_given
