"""Scores of blocks for each new token of a prompt, tile by tile.

    sums     per token and head, over a part of the windows: peak, sum of 2^(logit - peak)   infllm2
    blocks   per token and block: the best window that touches it; of a long sequence the same of
             each run of blocks

No [heads, tokens, windows] exists: what two kernels hand on is a block's score, in a scratch for as
many tokens as `SCORE_BYTES` has room for. The tokens of a prompt are taken that many at a time, the
first ones, with few blocks before them, many (`workspace.score_room`).

A program takes `SCORE_COLUMNS` query vectors (tokens of one KV head times the heads of its group)
and a part of the windows, so that a long prompt and one of few tokens both fill the device. The
vectors are the columns of a product, its rows the windows that lie at one place of 64 blocks: the
heads of a token are then summed mostly inside a thread, and the best window of a block is an
elementwise maximum over as many products as a block has windows. What reaches over into the next
block is handed on in the same way: the rows of a tile are each fourth block (`score_tiles.py`), and
those of the next tile are their neighbours. Each pooled key is read, and multiplied, once per pass,
but for those that reach into the first of four tiles, which are twice.

Quest's bound is a product, too: sum_d max(q_d * min_d, q_d * max_d) is that of a block's bounds,
as one vector, with the negative and the positive part of q. A mean of heads has more bits than a
summary of 16: it goes in as three vectors that add up to it, summed like heads. Its windows are
the blocks.

NOSA's short list is picked of those scores, in the last kernel, which then ranks blocks by the best
retention score of the windows that touch them: the last number of each pooled key.

Blocks may be scored in two parts, at two times: those of the past by the windows that it has
completed, and from the last block before that of the first new token on, by all. A product is the
same in both, bit for bit.

Floor, of T tokens over W windows, half of them before the mean token of a prompt from nothing:
2 * T * W * D FLOP for each head and pass, one pass for a Forecast, two for InfLLM-V2, which at a
group of 16 and D = 128 takes as many exponentials as a multiprocessor does beside the products.
Scores of blocks are written and read once, T * W bytes for 4 windows a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparda_compile.kernels.gpu.launch import interpreting, launch, power_of_two, shared_bytes
from sparda_compile.kernels.gpu.score import complete_windows
from sparda_compile.kernels.gpu.score_tiles import (
    IN_TURN,
    best_of_runs,
    first_scored,
    is_between,
    normals,
    query_vectors,
    store_runs,
    store_scores,
    window_keys,
)
from sparda_compile.kernels.gpu.score_turns import Blocks, Turns
from sparda_compile.kernels.gpu.select import MOST_BLOCKS
from sparda_compile.kernels.workspace import (
    PART_BLOCKS,
    RUN_BLOCKS,
    SCORE_COLUMNS,
    SCORED_TOGETHER,
    STRIP_BLOCKS,
    most_vectors,
    score_columns,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparda_compile.kernels.asked import Asked
    from sparda_compile.kernels.gpu.score_turns import Scores
    from sparda_compile.selectors import Geometry

__all__ = ["covers_windows", "scored_tokens"]

_SELECTORS: Final = frozenset({"forecast", "infllm2", "quest", "nosa", "nosa_forecast"})
# Windows of one product: a warp group multiplies 64 rows.
_WINDOWS: Final = 64
_MOST_STAGES: Final = 3
_LOG2_E: Final = math.log2(math.e)
_STRIP = tl.constexpr(STRIP_BLOCKS)
_EIGHT = tl.constexpr(SCORED_TOGETHER)


@triton.jit(do_not_specialize=["num_tokens", "begin", "end"])
def _token_sums(
    query, pooled, positions, maxima, sums, factor, q_row, q_head, q_token, groups, num_tokens,
    num_windows, begin, end, scored_from,
    HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, POOL: tl.constexpr,
    STRIDE: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    PART: tl.constexpr, WINDOWS: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, group = pair // groups, pair % groups
    first = begin + tile * (COLUMNS // ROOM)
    vectors, position, _ = query_vectors(
        query, positions, row, group, first, end, q_row, q_head, q_token, num_tokens,
        HEADS, ROOM, COLUMNS, DIM, DIMS, INTERPRETED,
    )  # fmt: skip
    complete = complete_windows(position, POOL, STRIDE)
    is_scored = tl.max(position, 0) >= scored_from
    stop = tl.where(is_scored, tl.minimum(tl.max(complete, 0), (part + 1) * PART), 0)
    own_stop = tl.minimum(complete, stop)
    keys_at = pooled + pair.to(tl.int64) * num_windows * WIDTH
    peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in tl.range(part * PART, stop, WINDOWS, num_stages=STAGES):
        window = start + tl.arange(0, WINDOWS)
        keys = window_keys(keys_at, window, stop, WIDTH, DIM, DIMS, INTERPRETED)
        logits = tl.dot(vectors, tl.trans(keys), input_precision="ieee") * factor
        logits = tl.where(window[None, :] < own_stop[:, None], logits, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(logits, axis=1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp2(peak - safe) + tl.sum(tl.exp2(logits - safe[:, None]), axis=1)
        peak = new_peak
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    columns = (end - begin) * ROOM
    place = (pair.to(tl.int64) * tl.num_programs(1) + part) * columns + column
    tl.store(maxima + place, peak, mask=column < columns)
    tl.store(sums + place, total, mask=column < columns)


@triton.jit
def _score_part(
    vectors, normal, keys_at, at, runs_at, token, complete, there, factor, origin, part, stop,
    begin, end, num_strips, num_eights,
    ROOM: tl.constexpr, TOKENS: tl.constexpr, RATIO: tl.constexpr, OVERHANG: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, PART: tl.constexpr,
    BLOCKS: tl.constexpr, TURNS: tl.constexpr, RUN: tl.constexpr, SOFTMAX: tl.constexpr,
    INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Score the blocks of a part for a tile of tokens, window by window of every fourth block."""
    # The dimension of blocks: of one vector a token, tokens are the rows of the product.
    AXIS: tl.constexpr = 1 if ROOM == 1 else 0
    # Of so many blocks all windows, behind those that reach into each fourth of them.
    TOGETHER: tl.constexpr = TURNS * BLOCKS
    STEPS: tl.constexpr = OVERHANG + TURNS * RATIO
    most = tl.max(complete, 0)
    none = tl.full([TOKENS, BLOCKS], float("-inf"), dtype=tl.float32)
    none = none if AXIS == 1 else tl.trans(none)
    best, next_one, best_run = none, none, best_of_runs(none, RUN, AXIS) if RUN > 0 else none
    # Before this window nothing is masked: each token that is there sees all.
    seen = tl.min(tl.where(token < end, complete, most), 0)
    tiles = (stop - part * PART + TOGETHER - 1) // TOGETHER
    for step in tl.range(tiles * STEPS, num_stages=STAGES):
        first_block = part * PART + step // STEPS * TOGETHER
        ahead = step % STEPS - OVERHANG
        turn, place = (ahead + RATIO) // RATIO - 1, (ahead + RATIO) % RATIO
        first_window = (origin + first_block) * RATIO + ahead
        window = first_window + tl.arange(0, BLOCKS) * (TURNS * RATIO)
        keys = window_keys(keys_at, window, most, WIDTH, DIM, DIMS, INTERPRETED)
        if AXIS == 1:
            weight = tl.dot(vectors, tl.trans(keys), input_precision="ieee")
        else:
            weight = tl.dot(keys, tl.trans(vectors), input_precision="ieee")
        if SOFTMAX:
            weight = tl.exp2(weight * factor - tl.expand_dims(normal, AXIS))
            weight = tl.where(tl.expand_dims(there, AXIS), weight, 0.0)
        if ROOM > 1:
            weight = tl.sum(tl.reshape(weight, [BLOCKS, TOKENS, ROOM]), axis=2)
        if (first_window < 0) | (first_window + (BLOCKS - 1) * (TURNS * RATIO) >= seen):
            exists = is_between(tl.expand_dims(window, 1 - AXIS), tl.expand_dims(complete, AXIS))
            weight = tl.where(exists, weight, float("-inf"))
        if OVERHANG > 1:  # noqa: SIM102 - known when it is compiled
            if place + OVERHANG >= RATIO:
                next_one = tl.maximum(next_one, weight)
        best = tl.maximum(best, weight)
        if place == RATIO - 1:
            if turn >= 0:
                store_scores(
                    at, best, first_block, turn, stop, token - begin, end - begin, num_strips,
                    BLOCKS, AXIS,
                )  # fmt: skip
                if RUN > 0:
                    best_run = tl.maximum(best_run, best_of_runs(best, RUN, AXIS))
                    if turn == TURNS - 1:
                        store_runs(
                            runs_at, best_run, first_block, stop, token - begin, end - begin,
                            num_eights, RUN, AXIS,
                        )  # fmt: skip
                        best_run = best_of_runs(none, RUN, AXIS)
            # Where one window reaches over, it is the last: a minimum, as a copy costs each step.
            last = tl.minimum(best, weight) if OVERHANG == 1 else next_one
            best, next_one = last if OVERHANG > 0 else none, none


@triton.jit(
    do_not_specialize=["num_tokens", "num_strips", "num_eights", "begin", "end", "sum_parts"]
)
def _token_blocks(
    query, pooled, positions, lengths, maxima, sums, scores, runs, factor, q_row, q_head, q_token,
    groups, num_tokens, num_windows, num_strips, num_eights, begin, end, scored_from, sum_parts,
    HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, SUM_PARTS: tl.constexpr,
    POOL: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, OVERHANG: tl.constexpr,
    WIDTH: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, PART: tl.constexpr,
    BLOCKS: tl.constexpr, TURNS: tl.constexpr, RUN: tl.constexpr, SOFTMAX: tl.constexpr,
    PAST: tl.constexpr, NEW: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, group = pair // groups, pair % groups
    TOKENS: tl.constexpr = COLUMNS // ROOM
    first = begin + tile * TOKENS
    token = first + tl.arange(0, TOKENS)
    position = tl.load(positions + row * num_tokens + token, mask=token < end, other=-1)
    length = tl.load(lengths + row)
    complete = complete_windows(tl.minimum(position, length) if PAST else position, POOL, STRIDE)
    most = tl.max(complete, 0)
    is_scored = tl.max(position, 0) >= scored_from
    origin = first_scored(length, RATIO * STRIDE) if NEW else length * 0
    # Blocks are counted from the first that is scored, so that reads and writes are wide.
    last = (most + OVERHANG + RATIO - 1) // RATIO - origin
    stop = tl.where(is_scored, tl.minimum(last, (part + 1) * PART), 0)
    if part * PART < stop:
        vectors, _, there = query_vectors(
            query, positions, row, group, first, end, q_row, q_head, q_token, num_tokens,
            HEADS, ROOM, COLUMNS, DIM, DIMS, INTERPRETED,
        )  # fmt: skip
        normal = factor
        if SOFTMAX:
            columns = (end - begin) * ROOM
            normal = normals(maxima, sums, pair, tile, columns, sum_parts, COLUMNS, SUM_PARTS)
        keys_at = pooled + pair.to(tl.int64) * num_windows * WIDTH
        at = scores + pair.to(tl.int64) * (end - begin) * (_STRIP * num_strips)
        runs_at = runs + pair.to(tl.int64) * (end - begin) * (_EIGHT * num_eights)
        _score_part(
            vectors, normal, keys_at, at, runs_at, token, complete, there, factor, origin, part,
            stop, begin, end, num_strips, num_eights, ROOM, TOKENS, RATIO, OVERHANG, WIDTH, DIM,
            DIMS, PART, BLOCKS, TURNS, RUN, SOFTMAX, INTERPRETED, STAGES,
        )  # fmt: skip


def covers_windows(selector: str, query_BHTD: Tensor, groups: int, geometry: Geometry) -> bool:
    """Whether these kernels select for a selector, for such queries and windows.

    Not for a group of more than 128 heads, nor where a window reaches over more than two blocks.
    """
    if selector not in _SELECTORS or geometry.num_blocks > MOST_BLOCKS:
        return False
    reach = geometry.block_size + geometry.pool_stride
    fits = query_BHTD.shape[1] <= SCORE_COLUMNS * groups and geometry.pool_size <= reach
    return fits or selector == "quest"


def _tile(query: Tensor, room: int, dims: int) -> tuple[int, int, int]:
    """Return query vectors and keys of a product, and tiles of keys that fit beside the queries."""
    columns = score_columns(room, dims, query.element_size())
    rows = max(min(_WINDOWS, most_vectors(dims, query.element_size())), 16)
    if query.device.type != "cuda":
        return columns, rows, _MOST_STAGES
    vector = dims * query.element_size()
    free = shared_bytes(query.device) - columns * vector - 4 * rows * columns
    return columns, rows, max(min(_MOST_STAGES, free // (rows * vector)), 1)


def _quest_parts(query_BHTD: Tensor, bounds_BGN2D: Tensor) -> Tensor:
    """Return [B, G * n, T, 2D] vectors, n for each group: of the bounds' dtype, they add up to q.

    The first half, for the smallest keys, is the negative part of the mean query.
    """
    mean = query_BHTD.unflatten(1, (bounds_BGN2D.shape[1], -1)).float().mean(2)
    rest = torch.cat([mean.clamp(max=0.0), mean.clamp(min=0.0)], -1)
    parts = []
    for _ in range(1 if bounds_BGN2D.dtype == torch.float32 else 3):
        parts.append(rest.to(bounds_BGN2D.dtype))
        rest = rest - parts[-1].float()
    return torch.stack(parts, 2).flatten(1, 2)


def scored_tokens(
    asked: Asked, blocks: Blocks, scored_from: int, selected: int | None = None
) -> Iterator[tuple[int, int, Scores]]:
    """Score, as many tokens at a time as there is room for; the next ones take the same room.

    Yields the first token, the one behind the last, and what they score.

    Args:
        asked: Queries and summary.
        blocks: Which blocks; all of them for a softmax.
        scored_from: Tokens before this position have no more blocks than they may read.
        selected: Blocks that a token picks, of so many that it picks by runs; None picks by none.
    """
    pooled, query, geometry = asked.tensors[0], asked.query, asked.windows
    if asked.selector == "quest":
        query, pooled = _quest_parts(query, pooled), pooled.flatten(3)
    pool, size = (geometry.pool_size, geometry.pool_stride), geometry.block_size
    batch, groups, num_windows, width = pooled.shape
    dim = width - 1 if asked.lists else width
    query = query if query.stride(-1) == 1 else query.contiguous()
    num_tokens, pairs, softmax = query.shape[2], batch * groups, asked.softmax
    room, dims = power_of_two(query.shape[1] // groups), power_of_two(dim, 16)
    columns, rows, stages = _tile(query, room, dims)
    ratio, overhang = size // pool[1], max(pool[0] // pool[1] - 1, 0)
    vectors, strides = (query.shape[1] // groups, room, columns), query.stride()[:3]
    turns = Turns.of(asked, blocks, selected, (columns, room))
    # Of what the cache can hold, not of what it holds: a kernel for each number of parts were many.
    part = triton.cdiv(PART_BLOCKS, IN_TURN * rows) * IN_TURN * rows
    all_parts = power_of_two(triton.cdiv(geometry.num_blocks, part))
    maxima, sums = turns.sums()
    factor = asked.scale * _LOG2_E
    for turn in turns:
        begin, end = turn.begin, turn.end
        tiles = triton.cdiv((end - begin) * room, columns)
        parts = triton.cdiv(turn.num_blocks, part)
        if softmax:
            launch(_token_sums, (tiles, parts, pairs))(
                query, pooled, asked.positions, maxima, sums, factor, *strides, groups, num_tokens,
                num_windows, begin, end, scored_from, *vectors, *pool, width, dim, dims,
                part * ratio, rows, interpreting(), stages, num_warps=4,
            )  # fmt: skip
        launch(_token_blocks, (tiles, parts, pairs))(
            query, pooled, asked.positions, asked.lengths, maxima, sums, turn.scores.blocks,
            turn.runs, factor, *strides, groups, num_tokens, num_windows, *turn.widths, begin,
            end, scored_from, parts, *vectors, all_parts, *pool, ratio, overhang, width, dim, dims,
            part, rows, IN_TURN, RUN_BLOCKS if turns.in_runs else 0, softmax,
            blocks is Blocks.PAST, blocks is Blocks.NEW, interpreting(), stages, num_warps=4,
        )  # fmt: skip
        yield begin, end, turn.scores
