"""The blocks that each new token of a prompt reads: scores (`token_scores.py`), then the K best.

    select_tokens    of all blocks, at once
    select_past      of those before the new tokens, with the scores of those picked
    select_near      of what that has picked, and of the blocks that new tokens change

The last two together pick what the first does, at two times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from sparda_compile.kernels.gpu.pick_tokens import pick_near, pick_past, pick_tokens
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.gpu.token_scores import Asked, Blocks, covers, scored_tokens

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Asked", "Choice", "covers", "select_near", "select_past", "select_tokens"]


def select_tokens(asked: Asked, choice: Choice, ids: Tensor) -> None:
    """Score and pick; see `kernels.select_tokens`.

    Args:
        asked: Queries and summary, with the keys of the new tokens.
        choice: What to pick.
        ids: [B, G, T, K] int32, written.
    """
    retention = asked.tensors[0][..., -1].float().contiguous() if asked.lists else None
    scored_from = choice.num_selected * choice.block_size
    selected = None if asked.lists else choice.num_selected
    for begin, end, scores in scored_tokens(asked, Blocks.ALL, scored_from, selected):
        # Blocks that any of these tokens may have.
        seen = triton.cdiv(asked.num_past + end * asked.spread, choice.block_size)
        tokens = (begin, end, seen)
        pick_tokens(scores, retention, asked.positions, ids, tokens, asked.windows, choice)


def select_past(asked: Asked, choice: Choice, ids: Tensor, known: Tensor) -> None:
    """Score and pick of the past; see `kernels.select_tokens.select_past`.

    Args:
        asked: Queries and summary; not for a softmax, nor a short list.
        choice: What to pick.
        ids: [B, G, T, K] int32, written.
        known: [B, G, T, K] float32 scores, written where they are needed.
    """
    places = (asked.positions, asked.lengths)
    scored_from = choice.num_selected * choice.block_size
    for begin, end, scores in scored_tokens(asked, Blocks.PAST, scored_from, choice.num_selected):
        pick_past(scores, places, (ids, known), (begin, end), asked.windows, choice)


def select_near(asked: Asked, choice: Choice, near: tuple[Tensor, Tensor], ids: Tensor) -> None:
    """Pick of what `select_past` has picked, and of the blocks that new tokens change.

    Args:
        asked: Queries and summary, with the keys of the new tokens.
        choice: What to pick.
        near: What `select_past` has written.
        ids: [B, G, T, K] int32, written.
    """
    places = (asked.positions, asked.lengths)
    scored_from = choice.num_selected * choice.block_size
    for begin, end, scores in scored_tokens(asked, Blocks.NEW, scored_from):
        # Blocks that any of these tokens may have, behind those that no new token changes.
        seen = triton.cdiv(end * asked.spread, choice.block_size) + 1
        pick_near(scores, places, near, ids, (begin, end, seen), asked.windows, choice)
