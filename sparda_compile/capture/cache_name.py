"""What transformers calls the cache: `cache` from 5.24 on, `past_key_values` before.

An optimized module takes both names. Whoever calls a model of transformers passes the cache under
`CACHE_NAME`, and `cache_of` reads it from what the model returns.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

from transformers.modeling_outputs import CausalLMOutputWithPast

from sparda_compile.errors import UnsupportedInputError

__all__ = ["CACHE_NAME", "OLD_CACHE_NAME", "cache_of", "output_with_cache", "take_cache"]

OLD_CACHE_NAME: Final = "past_key_values"
CACHE_NAME: Final = (
    "cache" if "cache" in inspect.signature(CausalLMOutputWithPast).parameters else OLD_CACHE_NAME
)


def cache_of(output: Any) -> Any:
    """Return the cache of a model's output."""
    return getattr(output, CACHE_NAME)


def output_with_cache(logits: Any, cache: Any) -> CausalLMOutputWithPast:
    """Return a causal LM's output with logits and cache."""
    named: dict[str, Any] = {CACHE_NAME: cache}
    return CausalLMOutputWithPast(logits=logits, **named)


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from keyword arguments, by either name, and return it or None.

    Raises:
        UnsupportedInputError: If both names have one.
    """
    given = [kwargs.pop(name, None) for name in (OLD_CACHE_NAME, "cache")]
    if None not in given:
        raise UnsupportedInputError(
            "both past_key_values and cache are given; they are two names of one argument. Pass "
            "one of them."
        )
    return next((cache for cache in given if cache is not None), None)
