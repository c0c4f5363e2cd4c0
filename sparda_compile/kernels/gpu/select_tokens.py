"""The blocks that each new token of a prompt reads: scores, then the K best.

Scores are those of `token_scores.py`, and of low-bit keys those of `token_masses.py`.

    select_tokens    of all blocks, at once; or of candidates, which a look at all proposes, see
                     `candidates.py`
    select_past      of those before the new tokens, with the scores of those picked
    select_near      of what that has picked, and of the blocks that new tokens change

The last two together pick what the first does, at two times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

from sparda_compile.kernels.asked import LOW_BIT, Asked
from sparda_compile.kernels.gpu.candidates import pick_candidates
from sparda_compile.kernels.gpu.pick_tokens import pick_near, pick_past, pick_tokens
from sparda_compile.kernels.gpu.score_turns import Blocks
from sparda_compile.kernels.gpu.select import Choice
from sparda_compile.kernels.gpu.token_masses import covers_low_bit, massed_tokens
from sparda_compile.kernels.gpu.token_scores import covers_windows, scored_tokens
from sparda_compile.selectors import SELECTORS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparda_compile.kernels.gpu.score_turns import Scores
    from sparda_compile.selectors import Geometry

__all__ = ["Asked", "Choice", "covers", "select_near", "select_past", "select_tokens"]


def covers(selector: str, query_BHTD: Tensor, groups: int, geometry: Geometry) -> bool:
    """Whether these kernels select for a selector, for such queries and windows."""
    if selector in LOW_BIT:
        return covers_low_bit(query_BHTD, groups, geometry)
    return covers_windows(selector, query_BHTD, groups, geometry)


def _scored(
    asked: Asked, blocks: Blocks, choice: Choice, selected: int | None
) -> Iterator[tuple[int, int, Scores]]:
    """Score tokens that have more blocks than they may read."""
    score = massed_tokens if asked.is_low_bit else scored_tokens
    return score(asked, blocks, choice.num_selected * choice.block_size, selected)


def select_tokens(asked: Asked, choice: Choice, ids: Tensor, num_candidates: int = 0) -> None:
    """Score and pick; see `kernels.select_tokens`.

    Args:
        asked: Queries and summary, with the keys of the new tokens.
        choice: What to pick.
        ids: [B, G, T, K] int32, written.
        num_candidates: C, blocks that are scored; 0 for all.
    """
    num_tokens = ids.shape[2]
    if not num_candidates or asked.blocks_of(num_tokens) <= num_candidates:
        _select_of_all(asked, choice, ids)
        return
    # A token's blocks are scored by the same kernels, whatever other tokens have.
    with_few, with_many = asked.apart(num_candidates)
    _select_of_all(with_few, choice, ids)
    candidates = ids.new_empty((*ids.shape[:3], num_candidates))
    look = with_many.look(SELECTORS[asked.selector].forecast_selector)
    _select_of_all(look, choice._replace(num_selected=num_candidates), candidates)
    del look
    pick_candidates(with_many, candidates, choice, ids)


def _select_of_all(asked: Asked, choice: Choice, ids: Tensor) -> None:
    """Score all blocks, and pick."""
    retention = asked.tensors[0][..., -1].float().contiguous() if asked.lists else None
    selected = None if asked.lists else choice.num_selected
    for begin, end, scores in _scored(asked, Blocks.ALL, choice, selected):
        tokens = (begin, end, asked.blocks_of(end))
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
    for begin, end, scores in _scored(asked, Blocks.PAST, choice, choice.num_selected):
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
    for begin, end, scores in _scored(asked, Blocks.NEW, choice, None):
        # Blocks that any of these tokens may have, behind those that no new token changes.
        seen = triton.cdiv(end * asked.spread, choice.block_size) + 1
        pick_near(scores, places, near, ids, (begin, end, seen), asked.windows, choice)
