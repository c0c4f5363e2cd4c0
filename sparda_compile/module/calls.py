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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "check_call",
    "check_generation",
    "check_ids",
    "check_padding",
    "check_prompt",
    "is_last",
    "kept_logits",
    "length_of",
    "named_as",
    "positions_of",
    "token_mask",
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


def token_mask(attention_mask: Tensor | None, num_columns: int, ids: Tensor) -> Tensor:
    """Return which of the new tokens are real, [B, T] bool.

    Args:
        attention_mask: [B, T] or [B, columns + T], 0 for padding; None means no padding.
        num_columns: Columns that earlier calls have passed.
        ids: [B, T] int64, the new tokens.

    Raises:
        UnsupportedInputError: If the mask is of another shape.
    """
    if attention_mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    width = num_columns + ids.shape[1]
    if attention_mask.dim() != 2 or attention_mask.shape[1] not in (width, ids.shape[1]):
        raise UnsupportedInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; pass [batch, {width}], "
            "one entry for each token of the cache and each new one, 0 for padding."
        )
    if attention_mask.shape[0] != ids.shape[0]:
        raise UnsupportedInputError(
            f"attention_mask is for {attention_mask.shape[0]} sequences, input_ids for "
            f"{ids.shape[0]}."
        )
    return attention_mask[:, -ids.shape[1] :].bool()


def positions_of(given: Tensor | None, mask: Tensor, num_columns: int) -> Tensor:
    """Return the position of each new token, [B, T] int64.

    Args:
        given: What the caller passes; None counts columns, padding too, as the model itself does.
        mask: [B, T] bool, which tokens are real.
        num_columns: Columns that earlier calls have passed.
    """
    if given is not None:
        return given.expand(mask.shape).long().contiguous()
    columns = torch.arange(num_columns, num_columns + mask.shape[1], device=mask.device)
    return columns.expand(mask.shape).contiguous()


def check_ids(ids: Tensor, vocabulary: int | None) -> None:
    """Refuse token ids that the model has no embedding of.

    The ids of one decode step on a GPU are not looked at: that would wait for the device.

    Raises:
        UnsupportedInputError: If they are not whole numbers, or outside the vocabulary.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise UnsupportedInputError(f"input_ids are {ids.dtype}; pass int64.")
    if ids.is_cuda and ids.shape[1] == 1:
        return
    low, high = (int(n) for n in torch.aminmax(ids))
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        most = "the size of its embedding" if vocabulary is None else vocabulary - 1
        raise UnsupportedInputError(
            f"input_ids hold {low if low < 0 else high}; this model's vocabulary is 0 to "
            f"{most}. Check that the tokenizer is the model's own."
        )


def check_padding(attention_mask: Tensor) -> None:
    """Refuse a prompt that ends in padding: the next token would be that of the padding.

    Raises:
        UnsupportedInputError: If a sequence's last token is hidden.
    """
    if attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all()):
        raise UnsupportedInputError(
            "a sequence ends in padding, so generate would go on from the padding and not from "
            "the text. Pad on the left: tokenizer.padding_side = 'left'."
        )


def is_last(logits_to_keep: int | Tensor) -> bool:
    """Whether the logits of the last token alone are asked for."""
    return isinstance(logits_to_keep, int) and logits_to_keep == 1


def kept_logits(logits: Tensor, logits_to_keep: int | Tensor, *, is_cut: bool) -> Tensor:
    """Return the logits that are asked for, as the model itself would.

    Args:
        logits: [B, T, vocabulary], or [B, 1, vocabulary] where it is cut.
        logits_to_keep: 0 for all, n for those of the last n tokens, or indices [n] int64.
        is_cut: Whether only those of the last token are there, because only they are asked for.

    Raises:
        UnsupportedInputError: If it is neither a number nor indices.
    """
    if is_cut or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return logits
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise UnsupportedInputError(
                f"logits_to_keep has shape {tuple(logits_to_keep.shape)} and dtype "
                f"{logits_to_keep.dtype}; pass a number, or indices of tokens [n] int64."
            )
        return logits[:, logits_to_keep.to(logits.device)]
    return logits[:, -logits_to_keep:]
