"""What a model can do that would go past an optimized module, and what to do instead.

An optimized module hands on what the model knows: its config, its device, its embeddings. It does
not hand on what would run the model as it was, or change it behind the programs' back.
"""

from __future__ import annotations

from typing import Final

from sparda_compile.errors import BypassError

__all__ = ["BYPASSES", "check_bypass"]

_DENSE: Final = "it would run the model as it was, densely; call generate or forward"
_BEHIND: Final = (
    "it would change the model behind the programs that were made from it; change the model and "
    "optimize it again"
)
_SAVE: Final = "an optimized module is no checkpoint; save or push the model that it was made from"

BYPASSES: Final[dict[str, str]] = {
    **dict.fromkeys(
        (
            "generate_batch",
            "init_continuous_batching",
            "continuous_batching_context_manager",
            "greedy_search",
            "sample",
            "beam_search",
            "contrastive_search",
            "assisted_decoding",
        ),
        _DENSE,
    ),
    **dict.fromkeys(
        (
            "add_adapter",
            "load_adapter",
            "set_adapter",
            "delete_adapter",
            "enable_adapters",
            "disable_adapters",
            "disable_adapter",
            "merge_adapter",
            "unmerge_adapter",
            "merge_and_unload",
            "resize_token_embeddings",
            "set_input_embeddings",
            "set_output_embeddings",
            "set_attn_implementation",
            "gradient_checkpointing_enable",
            "dequantize",
        ),
        _BEHIND,
    ),
    **dict.fromkeys(("save_pretrained", "push_to_hub"), _SAVE),
}
"""Name -> why an optimized module does not have it."""


def check_bypass(name: str) -> None:
    """Refuse to hand on what would go past the optimized module.

    Raises:
        BypassError: If it would.
    """
    if name in BYPASSES:
        raise BypassError(f"an optimized module has no {name}: {BYPASSES[name]}.")
