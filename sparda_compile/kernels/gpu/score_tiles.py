"""What programs that score a prompt's tokens read and write: vectors, windows, and scores.

A row of scores is of whole strips of `STRIP_BLOCKS` blocks, in which each fourth block is beside
the one before it, and its neighbours follow in turn:

    0 4 8 .. 252   1 5 9 .. 253   2 6 10 .. 254   3 7 11 .. 255

A tile of a product is 64 of them. What reaches from a block into the next one is at the same place
of the next tile, in the same thread, which writes as many scores side by side as one instruction
takes. `place_of` says where a block's is.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from sparda_compile.kernels.workspace import SCORED_TOGETHER, STRIP_BLOCKS

__all__ = [
    "IN_TURN",
    "best_of_runs",
    "first_scored",
    "is_between",
    "log2_sums",
    "normals",
    "place_of",
    "query_vectors",
    "store_runs",
    "store_scores",
    "window_keys",
]

IN_TURN: Final = 4
"""Neighbouring blocks that are scored one after another: what reaches over is handed on."""
_EIGHT = tl.constexpr(SCORED_TOGETHER)
_IN_TURN = tl.constexpr(IN_TURN)
_STRIP = tl.constexpr(STRIP_BLOCKS)


@triton.jit
def query_vectors(  # noqa: ANN201 - a part of kernels
    query, positions, row, group, first, last, q_row, q_head, q_token, num_tokens,
    HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return query vectors of the tokens from `first` to `last`, and the position of each."""
    column = tl.arange(0, COLUMNS)
    token, head = first + column // ROOM, column % ROOM
    there = (token < last) & (head < HEADS)
    position = tl.load(positions + row * num_tokens + token, mask=token < last, other=-1)
    dims = tl.arange(0, DIMS)
    place = row.to(tl.int64) * q_row + token.to(tl.int64) * q_token
    place += (group * HEADS + head).to(tl.int64) * q_head
    vectors = tl.load(
        query + place[:, None] + dims[None, :],
        mask=there[:, None] & (dims < DIM)[None, :],
        other=0.0,
    )
    if INTERPRETED:
        vectors = vectors.to(tl.float32)
    return vectors, position, there


@triton.jit
def first_scored(length, SIZE: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the first block that is scored where new tokens alone are.

    It is the last before that of the first new token, whose windows may reach into that one.
    """
    return tl.maximum(length // SIZE - 1, 0)


@triton.jit
def is_between(window, end):  # noqa: ANN201 - a part of kernels
    """Whether a window is before `end`, and not before the first one, in one comparison."""
    return window.to(tl.uint32) < end.to(tl.uint32)


@triton.jit
def normals(  # noqa: ANN201 - a part of kernels
    maxima, sums, pair, tile, columns, parts,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Return the binary logarithm of the sum of each column's weights."""
    column = tile * COLUMNS + tl.arange(0, COLUMNS)
    each = tl.arange(0, PARTS)
    place = (pair.to(tl.int64) * parts + each[:, None]) * columns + column[None, :]
    mask = (each < parts)[:, None] & (column < columns)[None, :]
    peaks = tl.load(maxima + place, mask=mask, other=float("-inf"))
    return log2_sums(peaks, tl.load(sums + place, mask=mask, other=0.0))


@triton.jit
def log2_sums(peaks, totals):  # noqa: ANN201 - a part of kernels
    """Return log2 sum_i totals[i] * 2^peaks[i] of each column; 0 of nothing."""
    peak = tl.max(peaks, axis=0)
    safe = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(totals * tl.exp2(peaks - safe[None, :]), axis=0)
    return safe + tl.log2(tl.where(total == 0.0, 1.0, total))


@triton.jit
def window_keys(  # noqa: ANN201 - a part of kernels
    keys, window, end, WIDTH: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the first numbers of the pooled keys of some windows; zeros where none is."""
    dims = tl.arange(0, DIMS)
    mask = is_between(window, end)[:, None] & (dims < DIM)[None, :]
    tile = tl.load(keys + window[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def place_of(block):  # noqa: ANN201 - a part of kernels
    """Return where the score of each block lies in a row of scores."""
    turn = block % _IN_TURN * (_STRIP // _IN_TURN)
    return block // _STRIP * _STRIP + turn + block % _STRIP // _IN_TURN


@triton.jit
def store_scores(  # noqa: ANN201 - a part of kernels
    at, values, first_block, turn, stop, token, tokens, num_strips,
    BLOCKS: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Write scores of the blocks whose turn it is: each `IN_TURN`-th from the first one on."""
    each = tl.arange(0, BLOCKS)
    # Whole eights: behind the last block nobody reads, and there is room.
    count = (stop - first_block + _IN_TURN - 1) // _IN_TURN
    is_there = each < (count + _EIGHT - 1) // _EIGHT * _EIGHT
    mask = tl.expand_dims(is_there, 1 - AXIS) & tl.expand_dims(token < tokens, AXIS)
    # [token, block] of one pair: 32 bits count its scores.
    row = tl.expand_dims(token * (_STRIP * num_strips), AXIS)
    # The same as `place_of`, of products alone: the compiler sees what they are divisible by.
    TILES: tl.constexpr = _STRIP // (_IN_TURN * BLOCKS)
    tile = first_block // (_IN_TURN * BLOCKS)
    first = tile // TILES * _STRIP + turn * (_STRIP // _IN_TURN) + tile % TILES * BLOCKS
    tl.store(at + row + tl.expand_dims(first + each, 1 - AXIS), values, mask=mask)


@triton.jit
def best_of_runs(values, RUN: tl.constexpr, AXIS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the best of each run's blocks that are in a tile, for each token."""
    COLUMNS: tl.constexpr = RUN // _IN_TURN
    RUNS: tl.constexpr = values.shape[AXIS] // COLUMNS
    TOKENS: tl.constexpr = values.shape[1 - AXIS]
    if AXIS == 1:
        best = tl.max(tl.reshape(values, [TOKENS, RUNS, COLUMNS]), axis=2)
    else:
        best = tl.max(tl.reshape(values, [RUNS, COLUMNS, TOKENS]), axis=1)
    return best


@triton.jit
def store_runs(  # noqa: ANN201 - a part of kernels
    at, values, first_block, stop, token, tokens, num_eights,
    RUN: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Write scores of runs, from that of a block to the last that begins before `stop`."""
    run = first_block // RUN + tl.arange(0, values.shape[AXIS])
    mask = tl.expand_dims(run * RUN < stop, 1 - AXIS) & tl.expand_dims(token < tokens, AXIS)
    row = tl.expand_dims(token * (_EIGHT * num_eights), AXIS)
    tl.store(at + row + tl.expand_dims(run, 1 - AXIS), values, mask=mask)
