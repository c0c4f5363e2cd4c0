"""Adapters of PEFT: the model that runs inside of a wrapper, and what a trace would lose.

Most adapters are modules of the model itself, in the place of those that they adapt: LoRA, DoRA,
IA3 and their like are traced with it, active, disabled or merged as they are then. A wrapper around
such a model only hands its calls on, and is left out. What a wrapper adds to the input, to the
cache or to each call is refused.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_adapters", "without_wrapper"]


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper of PEFT runs; any other model as it is.

    Raises:
        UnsupportedInputError: If the wrapper does more than to hand its calls on.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    wrapper: Any = model
    _check_wrapper(wrapper)
    inner: nn.Module = wrapper.get_base_model()
    if "generation_config" in vars(wrapper):
        # PEFT writes it into the model with each call of generate; the model is not ours to change.
        inner = copy.copy(inner)
        inner.generation_config = wrapper.generation_config
    return inner


def _check_wrapper(wrapper: Any) -> None:
    active = wrapper.active_adapter
    configs = [wrapper.peft_config[n] for n in ([active] if isinstance(active, str) else active)]
    for config in configs:
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning:
            raise UnsupportedInputError(
                f"{type(wrapper).__name__} has an adapter of type {kind}, which puts tokens of its "
                "own before the prompt or into the cache; sparda_compile runs adapters that change "
                "weights, such as LoRA. Use one of those, or pass get_base_model() to run without "
                "the adapter."
            )
        if getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedInputError(
                f"{type(wrapper).__name__} has an activated LoRA (alora_invocation_tokens), which "
                "begins where certain tokens stand in a prompt; one graph serves every prompt. Use "
                "a plain LoRA."
            )
        if not _hands_on(wrapper.base_model) and kind != "ADALORA":
            raise UnsupportedInputError(
                f"{type(wrapper).__name__} has an adapter of type {kind}, which does something of "
                "its own in each call of the model; sparda_compile runs adapters that are modules "
                "of the model, such as LoRA. Use one of those, or merge it into the model."
            )


def _hands_on(tuner: Any) -> bool:
    """Whether a tuner's forward is that of its model."""
    base: Any = sys.modules["peft.tuners.tuners_utils"]
    return type(tuner).forward is base.BaseTuner.forward


def check_adapters(model: nn.Module) -> None:
    """Refuse modules whose next forward would change weights of the model.

    Raises:
        UnsupportedInputError: If there is one.
    """
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith("bitsandbytes."):
            raise UnsupportedInputError(
                f"{path} is a {kind.__name__} of bitsandbytes, which packs its weight anew while "
                "it runs; a graph holds the weights as they are. Load the model in another "
                "format, such as torchao's int8, or call model.dequantize() first."
            )
        is_adapted = kind.__module__.startswith("peft.")
        if is_adapted and _says(module, "merged") and _says(module, "disable_adapters"):
            raise UnsupportedInputError(
                f"{path} has a merged adapter that is disabled: its next forward would take it out "
                "of the weights. Call unmerge_adapter() first, or enable the adapter."
            )


def _says(module: nn.Module, name: str) -> bool:
    return getattr(module, name, False) is True
