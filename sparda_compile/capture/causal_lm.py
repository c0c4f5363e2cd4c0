"""Any causal LM as transformers sees one: checks, plain modules, sliding windows."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from sparda_compile.capture.adapters import check_adapters, without_wrapper
from sparda_compile.capture.cache_name import output_with_cache, take_cache
from sparda_compile.errors import AttentionNotFoundError, UnsupportedInputError

if TYPE_CHECKING:
    from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["WrappedCausalLM", "as_causal_lm", "reach_of", "register_causal_lm", "sliding_windows"]

_TRACEABLE = ("sdpa", "eager")


class WrappedCausalLM(PreTrainedModel, GenerationMixin):
    """A module `forward(input_ids, position_ids) -> logits` with transformers' generate.

    Args:
        module: The module; shared, not copied.
    """

    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__(PretrainedConfig())
        self.module = module
        self.takes_positions = "position_ids" in inspect.signature(module.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the module's logits."""
        given = {"position_ids": position_ids} if self.takes_positions else {}
        out = self.module(input_ids, **given)
        logits = out if isinstance(out, Tensor) else out.logits
        return output_with_cache(logits, take_cache(kwargs))


class _RegisteredConfig(PretrainedConfig):
    """What transformers registers a class under. No model has it."""

    model_type = "sparda_compile"


def register_causal_lm(module_class: type[nn.Module]) -> None:
    """Tell transformers that a class is a causal LM, so that its pipelines take it without a word.

    Else `pipeline(model=...)` logs an error with the names of all classes that it knows.
    """
    AutoModelForCausalLM.register(_RegisteredConfig, module_class, exist_ok=True)


def as_causal_lm(model: nn.Module) -> PreTrainedModel:
    """Return a model that can be traced with a cache; plain modules are wrapped.

    Of a model that PEFT has wrapped, it is the one inside.

    Raises:
        UnsupportedInputError: For encoder-decoders, modules without parameters, and models that
            have no causal LM head; for adapters that are more than modules of the model, and
            modules that change their weights while they run.
        AttentionNotFoundError: For layers that carry a recurrent state.
    """
    model = without_wrapper(model)
    check_adapters(model)
    name = type(model).__name__
    if next(model.parameters(), None) is None:
        raise AttentionNotFoundError(f"{name} has no parameters, so it has no attention.")
    if not isinstance(model, PreTrainedModel):
        # Under the module's own name, which every message then gives.
        wrapped: PreTrainedModel = type(name, (WrappedCausalLM,), {})(model)
        wrapped.eval()
        return wrapped
    if model.config.is_encoder_decoder:
        raise UnsupportedInputError(
            f"{name} is an encoder-decoder; sparda_compile rewrites decoder-only causal LMs."
        )
    if not model.can_generate():
        raise UnsupportedInputError(
            f"{name} has no causal LM head; load it with AutoModelForCausalLM."
        )
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise AttentionNotFoundError(
            f"{name} has layers of kind {', '.join(sorted(unknown))}, which sparda_compile does "
            "not implement; it rewrites full_attention and keeps sliding_attention dense."
        )
    if config._attn_implementation not in _TRACEABLE:
        raise UnsupportedInputError(
            f"{name} uses attn_implementation={config._attn_implementation!r}, which cannot be "
            "traced into a graph; call model.set_attn_implementation('sdpa') first."
        )
    return model


def sliding_windows(model: PreTrainedModel) -> dict[int, int]:
    """Return the sliding window of each layer in tokens, 0 for none.

    A window that holds all the positions that a model has is none; see `reach_of`.
    """
    config = model.config.get_text_config()
    window = 0 if _holds_all(config) else getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {i: window if kind == "sliding_attention" else 0 for i, kind in enumerate(kinds)}
    return dict.fromkeys(range(getattr(config, "num_hidden_layers", 0) or 0), window)


def reach_of(model: PreTrainedModel) -> int:
    """Return how many tokens a text may have, where a window holds all positions; 0 for any number.

    As long as a text is within such a window, as of Phi-3 with 128K positions, it changes nothing.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if not _holds_all(config) or (kinds and "sliding_attention" not in kinds):
        return 0
    return int(config.sliding_window)


def _holds_all(config: Any) -> bool:
    window = getattr(config, "sliding_window", None) or 0
    positions = getattr(config, "max_position_embeddings", None) or 0
    return 0 < positions <= window
