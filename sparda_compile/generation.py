"""What `generate` of an optimized module refuses, before anything runs."""

from __future__ import annotations

from typing import Any

from sparda_compile.cache import NO_BEAMS, NO_CROP
from sparda_compile.errors import UnsupportedInputError

__all__ = ["check_generation"]


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
