"""The last step of a prompt's selection: of a token's block scores the K best, as in decode.

    NOSA    the short list is picked of these scores; then blocks are ranked by the best retention
            score of the windows that touch them

A program picks for one token of one KV head, of as many blocks as any token of the launch may have:
a tile of 2048 takes 2.5 times less than one of 4096, on an H200. Where there are many, it picks the
K best runs of neighbouring blocks first, by the best score of each, and then of their blocks alone.
These hold the K best blocks: for a block of any other run there is a better one, or an equal one
before it, in each of the K.

Blocks may be picked at two times: of the past, with the scores of those picked; and then of these
and of the blocks that new tokens change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two
from sparda_compile.kernels.gpu.score import complete_windows
from sparda_compile.kernels.gpu.score_tiles import IN_TURN, first_scored, place_of
from sparda_compile.kernels.gpu.select import find_largest, keys_of, pick, pick_listed
from sparda_compile.kernels.workspace import (
    LEAST_BLOCKS,
    RUN_BLOCKS,
    SCORED_TOGETHER,
    STRIP_BLOCKS,
    num_runs,
)
from sparda_compile.selectors.nosa import LISTED

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.score_turns import Scores
    from sparda_compile.kernels.gpu.select import Choice
    from sparda_compile.selectors import Geometry

__all__ = ["pick_near", "pick_past", "pick_tokens"]

_LISTED = tl.constexpr(LISTED)
_STRIP = tl.constexpr(STRIP_BLOCKS)
_EIGHT = tl.constexpr(SCORED_TOGETHER)
_MOST = tl.constexpr(0x7FFFFFFF)
_LEAST = tl.constexpr(-(1 << 31))
# Of a program that picks by runs: of 8192 blocks for 4096 tokens it took 166 us, with one 240, and
# of 16384 243, with two 277, on an H200; of all blocks, without runs, 687 and 1461.
_RUN_WARPS: Final = 2


@triton.jit
def _scores_of(
    at, block, origin, exists, complete, RATIO: tl.constexpr, OVERHANG: tl.constexpr
):  # fmt: skip
    """Return the scores of blocks, `origin` being the first of the row; -inf where no window is."""
    mask = exists & (block * RATIO - OVERHANG < complete)
    return tl.load(at + place_of(block - origin), mask=mask, other=float("-inf"))


@triton.jit
def _all_scores(
    at, num_blocks, complete, RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr,
    TURNS: tl.constexpr,
):  # fmt: skip
    """Return those of the first blocks; a thread has neighbours, and reads beside other threads."""
    column, turn = tl.arange(0, BLOCKS // TURNS)[:, None], tl.arange(0, TURNS)[None, :]
    block = column * TURNS + turn
    score = _scores_of(at, block, 0, block < num_blocks, complete, RATIO, OVERHANG)
    return tl.reshape(score, [BLOCKS])


@triton.jit
def _retained(
    retention, block, exists, complete, RATIO: tl.constexpr, OVERHANG: tl.constexpr
):  # fmt: skip
    """Return the best retention score of the windows that touch each block."""
    best = tl.where(exists, float("-inf"), float("-inf"))
    for place in tl.static_range(-OVERHANG, RATIO):
        window = block * RATIO + place
        there = exists & (window >= 0) & (window < complete)
        best = tl.maximum(best, tl.load(retention + window, mask=there, other=float("-inf")))
    return best


@triton.jit
def _short_list(asked, block, exists, current, sink, local, listed):
    """Mark the `listed` best blocks that are not forced; ties go to the lower one."""
    asked = tl.where(asked == 0.0, 0.0, asked)
    bits = asked.to(tl.int32, bitcast=True)
    is_candidate = exists & (block >= sink) & (block < current - local) & (asked > float("-inf"))
    # Integers in the order of the scores.
    key = tl.where(is_candidate, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LEAST)
    low, high = tl.min(tl.where(is_candidate, key, _MOST), 0), tl.max(key, 0)
    span = tl.maximum(high.to(tl.int64) - low + 1, 1)
    return find_largest(key, low, span, tl.sum(is_candidate.to(tl.int32), 0), listed)


@triton.jit
def _best_runs(
    at, list_at, current, complete, num_runs, sink, local, SELECTED: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return the blocks of the SELECTED best runs, ascending, -1 for none, and a bound of theirs.

    So many blocks, or all, have keys that are not less than the bound. Runs are listed in memory.
    """
    run = tl.arange(0, RUNS)
    exists = (run * RUN <= current) & (run < num_runs)
    touched = exists & (run * (RUN * RATIO) - OVERHANG < complete)
    best = tl.load(at + run, mask=touched, other=float("-inf"))
    forced = (run * RUN < sink) | (run * RUN + RUN - 1 >= current - local)
    chosen = pick_listed(best, forced, exists, SELECTED)
    count = tl.sum(chosen.to(tl.int32), 0)
    low = tl.min(tl.where(chosen, keys_of(best, forced, exists), _MOST), 0)
    low = tl.where(count >= SELECTED, low, _LEAST + 1)
    tl.store(list_at + tl.cumsum(chosen.to(tl.int32), 0) - 1, run, mask=chosen)
    tl.debug_barrier()
    entry = tl.arange(0, COLUMNS * RUN)
    there = entry < count * RUN
    block = tl.load(list_at + entry // RUN, mask=there, other=0) * RUN + entry % RUN
    # What is picked is written to the same place.
    tl.debug_barrier()
    return tl.where(there & (block <= current), block, -1), low


@triton.jit
def _pick_by_runs(
    at, runs_at, list_at, current, complete, num_runs, sink, local,
    SELECTED: tl.constexpr, RATIO: tl.constexpr, OVERHANG: tl.constexpr, RUN: tl.constexpr,
    RUNS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Return blocks of the best runs, their scores, and a mark on the SELECTED best of them."""
    block, low = _best_runs(
        runs_at, list_at, current, complete, num_runs, sink, local, SELECTED, RATIO, OVERHANG, RUN,
        RUNS, COLUMNS,
    )  # fmt: skip
    exists = block >= 0
    score = _scores_of(at, block, 0, exists, complete, RATIO, OVERHANG)
    forced = (block < sink) | (block >= current - local)
    key = keys_of(score, forced, exists)
    if sink + local + 1 >= SELECTED:
        # No more than the forced ones are wanted, which are the largest.
        low = tl.max(key, 0)
    high = tl.maximum(tl.max(tl.where(forced, _LEAST, key), 0), low)
    span = high.to(tl.int64) - low + 1
    found = tl.sum(exists.to(tl.int32), 0)
    return block, score, find_largest(key, low, span, found, SELECTED)


@triton.jit(do_not_specialize=["num_tokens", "num_strips", "num_eights", "begin"])
def _pick_tokens(
    scores, runs, retention, positions, ids, groups, num_tokens, num_strips, num_eights,
    num_windows, begin, sink, local, listed,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNS: tl.constexpr, RUN: tl.constexpr, LISTS: tl.constexpr,
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
        own_row = pair.to(tl.int64) * tl.num_programs(0) + local_token
        num_blocks = num_strips * _STRIP
        at = scores + own_row * num_blocks
        current = position // SIZE
        if RUN > 0:
            block, score, picked = _pick_by_runs(
                at, runs + own_row * (num_eights * _EIGHT), ids_at, current, complete,
                num_eights * _EIGHT, sink, local, SELECTED, RATIO, OVERHANG, RUN, BLOCKS // RUN,
                COLUMNS,
            )  # fmt: skip
        else:
            block = tl.arange(0, BLOCKS)
            exists = block < num_blocks
            score = _all_scores(at, num_blocks, complete, RATIO, OVERHANG, BLOCKS, TURNS)
            if LISTS:
                is_listed = _short_list(score, block, exists, current, sink, local, listed)
                kept_at = retention + pair.to(tl.int64) * num_windows
                kept = _retained(kept_at, block, exists, complete, RATIO, OVERHANG)
                score = tl.where(is_listed, _LISTED, kept)
            picked = pick(
                score, current, num_blocks, sink, local, SELECTED, SELECTED, BLOCKS, COLUMNS
            )
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids_at + rank, block, mask=picked)


@triton.jit(do_not_specialize=["num_tokens", "num_strips", "num_eights", "begin"])
def _pick_past(
    scores, runs, positions, lengths, ids, known, groups, num_tokens, num_strips, num_eights,
    begin, sink, local,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    TURNS: tl.constexpr, RUN: tl.constexpr,
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
        own_row = pair.to(tl.int64) * tl.num_programs(0) + local_token
        num_blocks = num_strips * _STRIP
        at = scores + own_row * num_blocks
        complete = complete_windows(length, POOL, STRIDE)
        if RUN > 0:
            block, score, picked = _pick_by_runs(
                at, runs + own_row * (num_eights * _EIGHT), ids + own, first, complete,
                num_eights * _EIGHT, sink, local, SELECTED, RATIO, OVERHANG, RUN, BLOCKS // RUN,
                COLUMNS,
            )  # fmt: skip
        else:
            block = tl.arange(0, BLOCKS)
            score = _all_scores(at, num_blocks, complete, RATIO, OVERHANG, BLOCKS, TURNS)
            picked = pick(
                score, first, num_blocks, sink, local, SELECTED, SELECTED, BLOCKS, COLUMNS
            )
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids + own + rank, block, mask=picked)
        tl.store(known + own + rank, score, mask=picked)
        is_left = inside & (column >= tl.sum(picked.to(tl.int32), 0))
        tl.store(ids + own + column, tl.full([COLUMNS], -1, tl.int32), mask=is_left)


@triton.jit(do_not_specialize=["num_tokens", "num_strips", "begin"])
def _pick_near(
    scores, positions, lengths, near_ids, near_scores, ids, groups, num_tokens, num_strips, begin,
    sink, local,
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
        bound = first_scored(length, SIZE)
        near = tl.load(near_ids + own + entry, mask=inside, other=-1)
        is_near = inside & (near >= 0) & (near < bound)
        block = tl.where(inside, near, bound + entry - SELECTED)
        is_new = (entry >= SELECTED) & (block <= current)
        at = scores + (pair.to(tl.int64) * tl.num_programs(0) + local_token) * (num_strips * _STRIP)
        complete = complete_windows(position, POOL, STRIDE)
        score = _scores_of(at, block, bound, is_new, complete, RATIO, OVERHANG)
        known = tl.load(near_scores + own + entry, mask=is_near, other=float("-inf"))
        forced = (block < sink) | (block >= current - local)
        score = tl.where(is_near, known, score)
        picked = pick_listed(score, forced, is_near | is_new, SELECTED)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids + own + rank, block, mask=picked)
        is_left = inside & (entry >= tl.sum(picked.to(tl.int32), 0))
        tl.store(ids + own + entry, tl.full([LISTED], -1, tl.int32), mask=is_left)


def _pick_warps(num_blocks: int) -> int:
    """Return the warps of a program that picks: the fewest that hold so many scores.

    Warps divide in step, so more of them take longer: 2048 blocks of 3800 tokens took 52 us with 2
    or 4 warps and 88 with 16 on an H200.
    """
    return 1 if num_blocks <= 1024 else min(num_blocks // 1024, 16)


def pick_tokens(
    scores: Scores,
    retention: Tensor | None,
    positions_BT: Tensor,
    ids_BGTK: Tensor,
    tokens: tuple[int, int, int],
    geometry: Geometry,
    choice: Choice,
) -> None:
    """Pick the blocks of some tokens.

    Args:
        scores: Of those tokens.
        retention: [B, G, W] fp32 of each window; None for a selector without a short list, which
            alone may have scores of runs.
        positions_BT: int32, -1 where no token is.
        ids_BGTK: int32; those of the tokens are written.
        tokens: The first, the one behind the last, and the blocks that any of them may have.
        geometry: Sizes.
        choice: What to pick.
    """
    (begin, end, seen), (_, groups, num_tokens, selected) = tokens, ids_BGTK.shape
    (pairs, _, num_blocks), unused = scores.blocks.shape, scores.blocks
    blocks = power_of_two(max(min(num_blocks, seen), selected), LEAST_BLOCKS)
    run, count, warps = _by_runs(scores, blocks, selected)
    launch(_pick_tokens, (end - begin, pairs))(
        scores.blocks, scores.runs if run else unused, unused if retention is None else retention,
        positions_BT, ids_BGTK, groups, num_tokens, num_blocks // STRIP_BLOCKS,
        count // SCORED_TOGETHER, 0 if retention is None else retention.shape[2], begin,
        choice.sink_blocks, choice.local_blocks, geometry.short_list, *_sizes(geometry, choice),
        blocks, power_of_two(selected), IN_TURN, run, retention is not None, num_warps=warps,
    )  # fmt: skip


def _by_runs(scores: Scores, blocks: int, selected: int) -> tuple[int, int, int]:
    """Return the blocks of a run to pick by, 0 for none, how many runs there are, and warps.

    Args:
        scores: Of runs, too, or not.
        blocks: That a program picks of.
        selected: That it picks.
    """
    if scores.runs is None or not num_runs(blocks, selected):
        return 0, 0, _pick_warps(blocks)
    return RUN_BLOCKS, scores.runs.shape[-1], _RUN_WARPS


def _sizes(geometry: Geometry, choice: Choice) -> tuple[int, ...]:
    """Return what kernels are compiled for: blocks of a token, and windows of a block."""
    size, stride, pool = geometry.block_size, geometry.pool_stride, geometry.pool_size
    return choice.num_selected, size, pool, stride, size // stride, max(pool // stride - 1, 0)


def pick_past(
    scores: Scores,
    places: tuple[Tensor, Tensor],
    picked: tuple[Tensor, Tensor],
    tokens: tuple[int, int],
    geometry: Geometry,
    choice: Choice,
) -> None:
    """Pick what some tokens would read at the first new position, and note its scores.

    Args:
        scores: Of the blocks up to that of the first new token.
        places: [B, T] int32 positions, -1 where no token is, and [B] int32 tokens before the call.
        picked: [B, G, T, K] int32 ids and fp32 scores; those of the tokens are written.
        tokens: The first, and the one behind the last.
        geometry: Sizes.
        choice: What to pick.
    """
    (begin, end), (_, groups, num_tokens, selected) = tokens, picked[0].shape
    pairs, _, num_blocks = scores.blocks.shape
    blocks = power_of_two(max(num_blocks, selected), LEAST_BLOCKS)
    run, count, warps = _by_runs(scores, blocks, selected)
    launch(_pick_past, (end - begin, pairs))(
        scores.blocks, scores.runs if run else scores.blocks, *places, *picked, groups, num_tokens,
        num_blocks // STRIP_BLOCKS, count // SCORED_TOGETHER, begin, choice.sink_blocks,
        choice.local_blocks, *_sizes(geometry, choice), blocks, power_of_two(selected), IN_TURN,
        run, num_warps=warps,
    )  # fmt: skip


def pick_near(
    scores: Scores,
    places: tuple[Tensor, Tensor],
    near: tuple[Tensor, Tensor],
    ids_BGTK: Tensor,
    tokens: tuple[int, int, int],
    geometry: Geometry,
    choice: Choice,
) -> None:
    """Pick of what `pick_past` has picked, and of the blocks that new tokens change.

    Args:
        scores: Of those blocks.
        places: As for `pick_past`.
        near: What `pick_past` has written.
        ids_BGTK: int32; those of the tokens are written.
        tokens: The first, the one behind the last, and the blocks that any of them may have, of
            those that are scored.
        geometry: Sizes.
        choice: What to pick.
    """
    (begin, end, seen), (_, groups, num_tokens, selected) = tokens, ids_BGTK.shape
    pairs, _, num_blocks = scores.blocks.shape
    listed = power_of_two(selected + min(num_blocks, seen), LEAST_BLOCKS)
    launch(_pick_near, (end - begin, pairs))(
        scores.blocks, *places, *near, ids_BGTK, groups, num_tokens, num_blocks // STRIP_BLOCKS,
        begin, choice.sink_blocks, choice.local_blocks, *_sizes(geometry, choice), listed,
        num_warps=_pick_warps(listed),
    )  # fmt: skip
