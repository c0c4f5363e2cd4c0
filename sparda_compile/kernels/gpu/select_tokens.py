"""The blocks that each new token of a prompt reads, by their scores (`token_scores.py`).

    pick        per token: the better of the two scores that touch a block, then the K best, as in
                decode
    pick_past   the same of the blocks before the new tokens, with the scores of those picked
    pick_near   of what that has picked and of the blocks that new tokens change: the K best

The last two together pick what the first does, at two times. A program takes one token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two
from sparda_compile.kernels.gpu.score import complete_windows
from sparda_compile.kernels.gpu.select import Choice, pick, pick_listed
from sparda_compile.kernels.gpu.token_scores import (
    Asked,
    Blocks,
    covers,
    first_scored,
    scored_tokens,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Asked", "Choice", "covers", "select_near", "select_past", "select_tokens"]


@triton.jit
def _score(at, block, exists, complete, width, RATIO: tl.constexpr, OVERHANG: tl.constexpr):
    """Return the best score of the windows that touch each block."""
    mask = exists & (block * RATIO < complete)
    score = tl.load(at + block, mask=mask, other=float("-inf"))
    if OVERHANG > 0:
        mask = exists & (block > 0) & (block * RATIO - OVERHANG < complete)
        before = tl.load(at + width + block - 1, mask=mask, other=float("-inf"))
        score = tl.maximum(score, before)
    return score


@triton.jit
def _pick_tokens(
    scores, positions, ids, groups, num_tokens, num_blocks, begin, sink, local,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    local_token, pair = tl.program_id(0), tl.program_id(1)
    token = begin + local_token
    position = tl.load(positions + pair // groups * num_tokens + token)
    column = tl.arange(0, COLUMNS)
    inside = column < SELECTED
    ids_at = ids + (pair.to(tl.int64) * num_tokens + token) * SELECTED
    if position < SELECTED * SIZE:
        # As many blocks as there are; none where no token is.
        current = tl.where(position < 0, -1, position // SIZE)
        tl.store(ids_at + column, tl.where(column <= current, column, -1), mask=inside)
    else:
        complete = complete_windows(position, POOL, STRIDE)
        at = scores + (pair.to(tl.int64) * tl.num_programs(0) + local_token) * (2 * num_blocks)
        block = tl.arange(0, BLOCKS)
        score = _score(at, block, block < num_blocks, complete, num_blocks, RATIO, OVERHANG)
        current = position // SIZE
        picked = pick(score, current, num_blocks, sink, local, SELECTED, BLOCKS, COLUMNS)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids_at + rank, block, mask=picked)


@triton.jit
def _pick_past(
    scores, positions, lengths, ids, kept, groups, num_tokens, width, begin, sink, local,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    local_token, pair = tl.program_id(0), tl.program_id(1)
    token, row = begin + local_token, pair // groups
    position, length = tl.load(positions + row * num_tokens + token), tl.load(lengths + row)
    first = length // SIZE
    column = tl.arange(0, COLUMNS)
    inside = column < SELECTED
    own = (pair.to(tl.int64) * num_tokens + token) * SELECTED
    if position < SELECTED * SIZE:
        # It reads all blocks that there are, by no score.
        last = tl.where(position < 0, -1, first)
        tl.store(ids + own + column, tl.where(column <= last, column, -1), mask=inside)
    else:
        at = scores + (pair.to(tl.int64) * tl.num_programs(0) + local_token) * (2 * width)
        block = tl.arange(0, BLOCKS)
        complete = complete_windows(length, POOL, STRIDE)
        score = _score(at, block, block < width, complete, width, RATIO, OVERHANG)
        picked = pick(score, first, width, sink, local, SELECTED, BLOCKS, COLUMNS)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids + own + rank, block, mask=picked)
        tl.store(kept + own + rank, score, mask=picked)
        count = tl.sum(picked.to(tl.int32), 0)
        tl.store(
            ids + own + column, tl.full([COLUMNS], -1, tl.int32), mask=inside & (column >= count)
        )


@triton.jit
def _pick_near(
    scores, positions, lengths, near_ids, near_scores, ids, groups, num_tokens, width, begin, sink,
    local,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    local_token, pair = tl.program_id(0), tl.program_id(1)
    token, row = begin + local_token, pair // groups
    position, length = tl.load(positions + row * num_tokens + token), tl.load(lengths + row)
    current = tl.where(position < 0, -1, position // SIZE)
    entry = tl.arange(0, LISTED)
    inside = entry < SELECTED
    own = (pair.to(tl.int64) * num_tokens + token) * SELECTED
    if position < SELECTED * SIZE:
        tl.store(ids + own + entry, tl.where(entry <= current, entry, -1), mask=inside)
    else:
        # Near blocks that no new token changes, then all others.
        bound = tl.maximum(length // SIZE - 1, 0)
        near = tl.load(near_ids + own + entry, mask=inside, other=-1)
        is_near = inside & (near >= 0) & (near < bound)
        block = tl.where(inside, near, bound + entry - SELECTED)
        is_new = (entry >= SELECTED) & (block <= current)
        exists = is_near | is_new
        at = scores + (pair.to(tl.int64) * tl.num_programs(0) + local_token) * (2 * width)
        at -= first_scored(length, SIZE, True)
        complete = complete_windows(position, POOL, STRIDE)
        score = _score(at, block, is_new, complete, width, RATIO, OVERHANG)
        known = tl.load(near_scores + own + entry, mask=is_near, other=float("-inf"))
        forced = (block < sink) | (block >= current - local)
        picked = pick_listed(tl.where(is_near, known, score), forced, exists, SELECTED)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids + own + rank, block, mask=picked)
        count = tl.sum(picked.to(tl.int32), 0)
        tl.store(ids + own + entry, tl.full([LISTED], -1, tl.int32), mask=inside & (entry >= count))


def _warps(entries: int) -> int:
    return 4 if entries <= 4096 else 8 if entries <= 8192 else 16


def select_tokens(asked: Asked, choice: Choice, ids: Tensor) -> None:
    """Score and pick; see `kernels.select_tokens`.

    Args:
        asked: Queries and summary, with the keys of the new tokens.
        choice: What to pick.
        ids: [B, G, T, K] int32, written.
    """
    batch, groups = ids.shape[:2]
    num_blocks, selected = asked.geometry.num_blocks, choice.num_selected
    for it in scored_tokens(asked, Blocks.ALL, num_blocks, selected * choice.block_size):
        launch(_pick_tokens, (it.end - it.begin, batch * groups))(
            it.scores, asked.positions, ids, groups, ids.shape[2], num_blocks, it.begin,
            choice.sink_blocks, choice.local_blocks, selected, choice.block_size, *it.sizes,
            power_of_two(max(num_blocks, selected)), power_of_two(selected),
            num_warps=_warps(num_blocks),
        )  # fmt: skip


def select_past(asked: Asked, choice: Choice, width: int, ids: Tensor, scores: Tensor) -> None:
    """Score and pick of the past; see `kernels.select_tokens.select_past`.

    Args:
        asked: Queries and summary.
        choice: What to pick.
        width: Blocks that may have tokens of the past, or the first new one.
        ids: [B, G, T, K] int32, written.
        scores: [B, G, T, K] float32, written where they are needed.
    """
    batch, groups, num_tokens, selected = ids.shape
    for it in scored_tokens(asked, Blocks.PAST, width, selected * choice.block_size):
        launch(_pick_past, (it.end - it.begin, batch * groups))(
            it.scores, asked.positions, asked.lengths, ids, scores, groups, num_tokens, width,
            it.begin, choice.sink_blocks, choice.local_blocks, selected, choice.block_size,
            *it.sizes, power_of_two(max(width, selected)), power_of_two(selected),
            num_warps=_warps(width),
        )  # fmt: skip


def select_near(
    asked: Asked, choice: Choice, width: int, near: tuple[Tensor, Tensor], ids: Tensor
) -> None:
    """Pick of what `select_past` has picked, and of the blocks that new tokens change.

    Args:
        asked: Queries and summary, with the keys of the new tokens.
        choice: What to pick.
        width: Blocks that are scored, at most.
        near: What `select_past` returned.
        ids: [B, G, T, K] int32, written.
    """
    batch, groups, num_tokens, selected = ids.shape
    for it in scored_tokens(asked, Blocks.NEW, width, selected * choice.block_size):
        launch(_pick_near, (it.end - it.begin, batch * groups))(
            it.scores, asked.positions, asked.lengths, *near, ids, groups, num_tokens, width,
            it.begin, choice.sink_blocks, choice.local_blocks, selected, choice.block_size,
            *it.sizes, power_of_two(selected + width), num_warps=_warps(selected + width),
        )  # fmt: skip
