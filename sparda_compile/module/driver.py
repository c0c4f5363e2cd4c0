"""What runs transformers' own generation loop: a copy of the model whose forward is ours."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from transformers.utils.generic import ModelOutput

from sparda_compile.capture.cache_name import CACHE_NAME, OLD_CACHE_NAME

if TYPE_CHECKING:
    from torch import nn

    from sparda_compile.module.cache import SpardaCache
    from sparda_compile.module.optimized import OptimizedModule

__all__ = ["drive", "follow", "make_driver"]

# Left by transformers among the arguments of a step; no forward reads them.
_LEFT_OVER = ("tokenizer", "assistant_tokenizer")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
# generate returns what its own config asks for.
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


def make_driver(module: OptimizedModule, model: nn.Module) -> Any:
    """Return a model whose `generate` calls an optimized module; it does not keep it alive.

    Args:
        module: What runs the steps.
        model: What it was made from; the copy shares its parameters and configs.
    """
    driver = copy.copy(model)
    owner = weakref.ref(module)

    def step(*args: Any, **kwargs: Any) -> Any:
        mine = owner()
        assert mine is not None
        return _step(mine, *args, **kwargs)

    # transformers passes on what the signature of forward names.
    step.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    driver.forward = step
    # Hooks of the model were traced; around the driver they would run once more.
    for name in _HOOKS:
        setattr(driver, name, OrderedDict())
    return driver


def follow(driver: Any, model: nn.Module, generation_config: Any) -> None:
    """Give a driver the attributes that its model has now, and a generation config."""
    own = ("forward", *_HOOKS)
    now = {name: value for name, value in vars(model).items() if name not in own}
    vars(driver).update(now | {"generation_config": generation_config})


def drive(driver: Any, cache: SpardaCache, wants_cache: bool, kwargs: dict[str, Any]) -> Any:
    """Generate; the output has a cache only if that is wanted."""
    # Tokens do not depend on use_cache; without it transformers would send them all each step.
    kwargs |= {CACHE_NAME: cache, "disable_compile": True, "use_cache": True}
    try:
        output = driver.generate(**kwargs)
    finally:
        cache.is_generating = cache.is_checked = False
    if wants_cache or not isinstance(output, ModelOutput):
        return output
    caches = (CACHE_NAME, OLD_CACHE_NAME)  # a key whose value is None would count in a tuple
    return type(output)(**{name: part for name, part in output.items() if name not in caches})


def _step(module: OptimizedModule, input_ids: Any, **kwargs: Any) -> Any:
    """Run one step of `generate`, which takes its next token behind the last column."""
    for name in _LEFT_OVER:
        kwargs.pop(name, None)
    for name in _OUTPUTS:
        kwargs.setdefault(name, False)
    cache = kwargs.get(CACHE_NAME)
    if cache is not None and cache.is_generating and input_ids.shape[1] == 1:
        # The token that was just chosen; to look at its mask would wait for the device.
        kwargs.pop("attention_mask", None)
    output = module(input_ids, **kwargs)  # with hooks that were put on it
    output[CACHE_NAME if CACHE_NAME in output else OLD_CACHE_NAME].is_generating = True
    return output
