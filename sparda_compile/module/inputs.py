"""What the tensors of a call have to be: ids, masks, positions, and which logits are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparda_compile.errors import UnsupportedInputError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparda_compile.module.cache import SpardaCache

__all__ = [
    "check_holes",
    "check_ids",
    "check_kept",
    "check_kept_tokens",
    "check_padding",
    "check_reach",
    "given_positions",
    "is_last",
    "kept_logits",
    "token_mask",
]


def check_ids(ids: Tensor, vocabulary: int | None) -> None:
    """Refuse token ids that the model has no embedding of.

    The ids of one decode step on a GPU are not looked at: that would wait for the device.

    Raises:
        UnsupportedInputError: If they are not whole numbers, or outside the vocabulary.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise UnsupportedInputError(f"input_ids are {ids.dtype}; pass int64.")
    if ids.device.type == "meta":
        raise UnsupportedInputError("input_ids are on the meta device, so they have no values.")
    if ids.is_cuda and ids.shape[1] == 1:
        return
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        most = "the size of its embedding" if vocabulary is None else vocabulary - 1
        raise UnsupportedInputError(
            f"input_ids hold {low if low < 0 else high}; this model's vocabulary is 0 to "
            f"{most}. Check that the tokenizer is the model's own."
        )


def token_mask(attention_mask: Tensor | None, cache: SpardaCache, ids: Tensor) -> Tensor:
    """Return which of the new tokens are real, [B, T] bool.

    Args:
        attention_mask: [B, columns + T], 0 for padding; None means no padding.
        cache: What holds the tokens of earlier calls.
        ids: [B, T] int64, the new tokens.

    Raises:
        UnsupportedInputError: If the mask is of another form, or says of tokens of earlier calls
            what was not said of them then.
    """
    width = cache.get_seq_length() + ids.shape[1]
    if attention_mask is None:
        if cache.has_padding and not cache.is_generating:
            raise UnsupportedInputError(
                "the cache holds padding, and without attention_mask it would be text; pass "
                f"[batch, {width}], 0 for padding, as in the call that passed it in."
            )
        return torch.ones_like(ids, dtype=torch.bool)
    _check_tensor("attention_mask", attention_mask, ids)
    if attention_mask.dim() != 2 or attention_mask.shape[1] != width:
        raise UnsupportedInputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; pass [batch, {width}], "
            "one entry for each token of the cache and each new one, 0 for padding."
        )
    if attention_mask.shape[0] != ids.shape[0]:
        raise UnsupportedInputError(
            f"attention_mask is for {attention_mask.shape[0]} sequences, input_ids for "
            f"{ids.shape[0]}."
        )
    cache.check_mask(attention_mask)
    return attention_mask[:, -ids.shape[1] :].bool()


def check_holes(attention_mask: Tensor | None, windows: Iterable[int]) -> None:
    """Refuse hidden tokens between real ones where a window of the model would count them.

    A sliding window counts columns, hidden ones too; the KV cache holds real tokens alone. Padding
    before and behind a sequence makes no difference.

    Args:
        attention_mask: [B, columns + T]; None means no padding.
        windows: Sliding window of each layer in tokens, 0 for none.

    Raises:
        UnsupportedInputError: If there are such tokens, and more columns than a window.
    """
    narrowest = min((window for window in windows if window), default=0)
    if attention_mask is None or not narrowest or attention_mask.shape[1] <= narrowest:
        return
    real = attention_mask.bool()
    before, behind = real.cumsum(1) > 0, real.flip(1).cumsum(1).flip(1) > 0
    if bool((before & behind & ~real).any()):
        raise UnsupportedInputError(
            "attention_mask hides tokens between real ones, and this model has layers with a "
            f"sliding window of {narrowest} tokens, which would count them. Leave those tokens "
            "out, and pad on the left. If you gave no attention_mask, generate has made one from "
            "pad_token_id: pass one."
        )


def check_reach(num_tokens: int, reach: int) -> None:
    """Refuse a text that is longer than a window which was left out because it holds all positions.

    Args:
        num_tokens: Of the longest sequence, columns of padding included.
        reach: `Captures.reach`; 0 for any number.

    Raises:
        UnsupportedInputError: If it is.
    """
    if reach and num_tokens > reach:
        raise UnsupportedInputError(
            f"a text of {num_tokens} tokens is longer than this model's sliding window of {reach}, "
            "which holds all its positions (max_position_embeddings), so its attention was "
            "rewritten without a window. Pass a shorter text, or ask for fewer new tokens."
        )


def check_padding(attention_mask: Tensor) -> None:
    """Refuse a prompt that ends in padding: the next token would be that of the padding.

    Raises:
        UnsupportedInputError: If a sequence's last token is hidden.
    """
    if not bool(attention_mask[:, -1].all()):
        raise UnsupportedInputError(
            "a sequence ends in padding, so generate would go on from the padding and not from "
            "the text. Pad on the left: tokenizer.padding_side = 'left'."
        )


def given_positions(positions: Tensor, mask: Tensor) -> Tensor:
    """Return the position of each new token, [B, T] int64, as the caller gave them.

    Args:
        positions: [B, T] or [1, T] whole numbers.
        mask: [B, T] bool.

    Raises:
        UnsupportedInputError: If they are something else.
    """
    _check_tensor("position_ids", positions, mask)
    shapes = (tuple(mask.shape), (1, mask.shape[1]))
    if tuple(positions.shape) not in shapes or positions.dtype not in (torch.int64, torch.int32):
        raise UnsupportedInputError(
            f"position_ids have shape {tuple(positions.shape)} and dtype {positions.dtype}; pass "
            f"{shapes[0]} int64, one whole number for each new token."
        )
    return positions.expand(mask.shape).long().contiguous()


def check_kept(logits_to_keep: int | Tensor) -> None:
    """Refuse what is neither a number of tokens nor indices of tokens.

    Raises:
        UnsupportedInputError: If it is not.
    """
    if isinstance(logits_to_keep, int):
        return
    if not isinstance(logits_to_keep, Tensor):
        raise UnsupportedInputError(
            f"logits_to_keep={logits_to_keep!r} is neither a whole number nor a tensor; pass 0 for "
            "all, n for the last n tokens, or indices of tokens [n] int64."
        )
    if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
        raise UnsupportedInputError(
            f"logits_to_keep has shape {tuple(logits_to_keep.shape)} and dtype "
            f"{logits_to_keep.dtype}; pass a number, or indices of tokens [n] int64."
        )


def check_kept_tokens(logits_to_keep: int | Tensor, num_tokens: int) -> None:
    """Refuse indices of tokens that a call does not pass in; asks the device for those of a tensor.

    Raises:
        UnsupportedInputError: If there is one.
    """
    if not isinstance(logits_to_keep, Tensor) or not logits_to_keep.numel():
        return
    low, high = torch.stack(torch.aminmax(logits_to_keep)).tolist()
    if low < -num_tokens or high >= num_tokens:
        raise UnsupportedInputError(
            f"logits_to_keep holds {low if low < -num_tokens else high}, and this call passes "
            f"{num_tokens} tokens; use indices of -{num_tokens} to {num_tokens - 1}, which count "
            "the new tokens alone."
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
    """
    if is_cut or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return logits
    if isinstance(logits_to_keep, Tensor):
        return logits[:, logits_to_keep.to(logits.device)]
    return logits[:, -logits_to_keep:]


def _check_tensor(name: str, value: Any, beside: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise UnsupportedInputError(f"{name} is a {type(value).__name__}; pass a tensor.")
    if value.device.type == "meta":
        raise UnsupportedInputError(
            f"{name} is on the meta device, so it has no values; pass a tensor on {beside.device}."
        )
