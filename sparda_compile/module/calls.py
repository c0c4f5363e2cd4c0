"""What `forward` and `generate` of an optimized module refuse, before anything runs."""

from __future__ import annotations

import difflib
import functools
import inspect
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers import GenerationConfig

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.module.arguments import CONFIG, FORWARD, GENERATE, Argument
from sparda_compile.module.inputs import check_padding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "check_call",
    "check_generation",
    "check_prompt",
    "length_of",
    "named_as",
]

# Outputs that a model's config may ask for, too.
_OUTPUTS: Final = ("output_attentions", "output_hidden_states", "output_router_logits")

# What transformers adds to a prompt where nothing says how much.
_DEFAULT_NEW_TOKENS: Final = 20


def _row_of(name: str, tables: Iterable[dict[str, Argument]], call: str) -> Argument:
    """Return the row of an argument.

    Args:
        name: Its name.
        tables: Where it may stand, first match first.
        call: What was called.

    Raises:
        UnsupportedInputError: If it stands nowhere.
    """
    for table in tables:
        if name in table:
            return table[name]
    known = sorted({known for table in tables for known in table})
    near = difflib.get_close_matches(name, known, n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else "leave it out."
    raise UnsupportedInputError(
        f"{name} is no argument of {call} that an optimized module knows; {remedy} "
        "docs/arguments.md lists them all."
    )


def _check_argument(name: str, value: Any, row: Argument) -> None:
    """Refuse a value that the table refuses.

    Raises:
        UnsupportedInputError: If it does.
    """
    if not row.allows(value):
        shown = repr(value)
        if isinstance(value, Tensor) or len(shown) > 60:
            shown = f"a {type(value).__name__}"
        raise UnsupportedInputError(f"{name}={shown} is not supported: {row.what}.")


def named_as(
    original: Callable[[Any], Callable[..., Any]],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a method take positional arguments in the order of another function.

    Args:
        original: Gives that function for the module.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def by_name(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) > 1:
                parameters = inspect.signature(original(self)).parameters.values()
                names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
                given = dict(zip(names, args, strict=False))
                twice = sorted(given.keys() & kwargs.keys())
                if twice or len(args) > len(names):
                    wrong = f"{twice[0]} is given twice" if twice else f"{len(args)} arguments"
                    raise UnsupportedInputError(
                        f"{wrong} in a call by position; the order is {', '.join(names)}. Pass "
                        "them by name."
                    )
                args, kwargs = (), given | kwargs
            return method(self, *args, **kwargs)

        return by_name

    return decorate


def check_generation(saved: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what holds for a call of `generate`, after refusing what the tables refuse.

    Args:
        saved: The generation config of the model.
        kwargs: Arguments of the call. They win over its `generation_config`, which wins over the
            model's where it says something.

    Returns:
        The value of each attribute of a generation config.

    Raises:
        UnsupportedInputError: If something is refused.
    """
    given = kwargs.get("generation_config")
    if given is not None and not isinstance(given, GenerationConfig):
        raise UnsupportedInputError(
            f"generation_config is a {type(given).__name__}; pass a GenerationConfig, or its "
            "attributes by name."
        )
    for name, value in kwargs.items():
        row = _row_of(name, (GENERATE, CONFIG, FORWARD), "generate")
        _check_argument(name, value, row)
    values = {
        k: v
        for config in (saved, given)
        if config
        for k, v in vars(config).items()
        if v is not None
    }
    # Attributes that transformers does not have are notes of whoever saved the config.
    known = CONFIG.keys() | vars(GenerationConfig()).keys()
    for name in sorted(values.keys() & known - kwargs.keys()):
        _check_argument(name, values[name], _row_of(name, (CONFIG,), "a GenerationConfig"))
    return values | {name: value for name, value in kwargs.items() if name in known}


def check_prompt(inputs: Any, kwargs: dict[str, Any], settings: dict[str, Any]) -> Tensor | None:
    """Return the prompt of `generate`, None where it is the token that begins a text.

    Args:
        inputs: [B, T] int64, or None where `input_ids` has it.
        kwargs: Other arguments of the call.
        settings: What holds for the call.

    Raises:
        UnsupportedInputError: If it has another form, is given twice or ends in padding.
    """
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise UnsupportedInputError("inputs and input_ids are two names of the prompt; pass one.")
    ids = inputs if inputs is not None else kwargs.get("input_ids")
    mask = kwargs.get("attention_mask")
    if ids is not None:
        _check_form(ids)
        pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
        ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        if mask is None and pad is not None and int(pad) not in ends:
            mask = ids != int(pad)  # what transformers takes for padding
    if mask is not None:
        check_padding(mask)
    negative = kwargs.get("negative_prompt_attention_mask")
    if negative is not None:
        check_padding(negative)
    return ids


def length_of(num_tokens: int, settings: dict[str, Any], model_config: Any) -> int:
    """Return how many tokens a sequence has in the end, at most.

    Args:
        num_tokens: Tokens of the prompt.
        settings: What holds for the call.
        model_config: Config of the model.
    """
    if settings.get("max_new_tokens") is not None:
        return num_tokens + int(settings["max_new_tokens"])
    if settings.get("max_length") is not None:
        return int(settings["max_length"])
    limit = getattr(model_config, "max_position_embeddings", None)
    total = num_tokens + _DEFAULT_NEW_TOKENS
    return total if limit is None else max(num_tokens, min(total, limit))


def check_call(input_ids: Tensor | None, kwargs: dict[str, Any], model_config: Any) -> Tensor:
    """Return the new tokens of a forward, after refusing what the table refuses.

    Args:
        input_ids: [B, T] int64.
        kwargs: What else the forward was given.
        model_config: Config of the model.

    Raises:
        UnsupportedInputError: If something is refused, or there are no tokens.
    """
    for name, value in kwargs.items():
        _check_argument(name, value, _row_of(name, (FORWARD,), "forward"))
    for name in _OUTPUTS:
        value = getattr(model_config, name, None)
        if kwargs.get(name) is None and not FORWARD[name].allows(value):
            _check_argument(f"{name} of the model's config", value, FORWARD[name])
    _check_form(input_ids)
    assert input_ids is not None
    return input_ids


def _check_form(ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else None
        got = f"input_ids has shape {shape}" if shape else f"input_ids is a {type(ids).__name__}"
        raise UnsupportedInputError(
            f"{got}; pass a tensor [batch, tokens] with at least one of each, or what a tokenizer "
            "returns as **encoded."
        )
