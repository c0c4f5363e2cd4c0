"""The last step of a prompt's selection: of a token's block scores the K best, as in decode.

    NOSA    the short list is picked of these scores; then blocks are ranked by the best retention
            score of the windows that touch them

A program picks for one token of one KV head, of as many blocks as any token of the launch may have:
a tile of 2048 takes 2.5 times less than one of 4096, on an H200.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two
from sparda_compile.kernels.gpu.score import complete_windows
from sparda_compile.kernels.gpu.select import find_largest, pick
from sparda_compile.selectors.nosa import LISTED

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.select import Choice
    from sparda_compile.selectors import Geometry

__all__ = ["pick_tokens"]

_LISTED = tl.constexpr(LISTED)
_MOST = tl.constexpr(0x7FFFFFFF)
_LEAST = tl.constexpr(-(1 << 31))
# A pick for fewer blocks would be one more kernel to compile, and hardly faster.
_LEAST_BLOCKS: Final = 512


@triton.jit
def _best_of_two(
    at, block, exists, complete, next_one, RATIO: tl.constexpr, OVERHANG: tl.constexpr
):  # fmt: skip
    """Return the larger of what begins in a block and what reaches into it from the one before."""
    best = tl.load(at + block, mask=exists & (block * RATIO < complete), other=float("-inf"))
    if OVERHANG > 0:
        mask = exists & (block > 0) & (block * RATIO - OVERHANG < complete)
        best = tl.maximum(best, tl.load(next_one + block - 1, mask=mask, other=float("-inf")))
    return best


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
def _pick_tokens(
    scores, retention, positions, ids, groups, num_tokens, num_blocks, num_windows, begin, sink,
    local, listed,
    SELECTED: tl.constexpr, SIZE: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    RATIO: tl.constexpr, OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    LISTS: tl.constexpr,
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
        exists = block < num_blocks
        current = position // SIZE
        score = _best_of_two(at, block, exists, complete, at + num_blocks, RATIO, OVERHANG)
        if LISTS:
            is_listed = _short_list(score, block, exists, current, sink, local, listed)
            kept_at = retention + pair.to(tl.int64) * num_windows
            kept = _retained(kept_at, block, exists, complete, RATIO, OVERHANG)
            score = tl.where(is_listed, _LISTED, kept)
        picked = pick(score, current, num_blocks, sink, local, SELECTED, BLOCKS, COLUMNS)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids_at + rank, block, mask=picked)


def _pick_warps(num_blocks: int) -> int:
    """Return the warps of a program that picks: the fewest that hold so many scores.

    Warps divide in step, so more of them take longer: 2048 blocks of 3800 tokens took 52 us with 2
    or 4 warps and 88 with 16 on an H200.
    """
    return 1 if num_blocks <= 1024 else min(num_blocks // 1024, 16)


def pick_tokens(
    scores: Tensor,
    retention: Tensor | None,
    positions_BT: Tensor,
    ids_BGTK: Tensor,
    tokens: tuple[int, int, int],
    geometry: Geometry,
    choice: Choice,
) -> None:
    """Pick the blocks of some tokens.

    Args:
        scores: [pairs, t, 2, n] fp32, for each block the best window that begins in it, and the
            best of those that reach into the next one.
        retention: [B, G, W] fp32 of each window; None for a selector without a short list.
        positions_BT: int32, -1 where no token is.
        ids_BGTK: int32; those of the tokens are written.
        tokens: The first, the one behind the last, and the blocks that any of them may have.
        geometry: Sizes.
        choice: What to pick.
    """
    (begin, end, seen), (_, groups, num_tokens, selected) = tokens, ids_BGTK.shape
    pairs, _, _, num_blocks = scores.shape
    size, stride, pool = geometry.block_size, geometry.pool_stride, geometry.pool_size
    blocks = power_of_two(max(min(num_blocks, seen), selected), _LEAST_BLOCKS)
    launch(_pick_tokens, (end - begin, pairs))(
        scores, scores if retention is None else retention, positions_BT, ids_BGTK, groups,
        num_tokens, num_blocks, 0 if retention is None else retention.shape[2], begin,
        choice.sink_blocks, choice.local_blocks, geometry.short_list, selected, size, pool, stride,
        size // stride, max(pool // stride - 1, 0), blocks, power_of_two(selected),
        retention is not None, num_warps=_pick_warps(blocks),
    )  # fmt: skip
