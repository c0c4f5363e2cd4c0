"""What programs that score a prompt's tokens read and write: vectors, windows, and scores.

A row of scores has whole eights of blocks, and of runs of blocks, so that a thread writes as many
side by side as one instruction takes. To say where each one goes took two fifths of the
instructions of a Forecast's kernel before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparda_compile.kernels.workspace import SCORED_TOGETHER

__all__ = ["query_vectors", "store_scores", "window_keys"]

_EIGHT = tl.constexpr(SCORED_TOGETHER)


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
def window_keys(  # noqa: ANN201 - a part of kernels
    keys, window, end, WIDTH: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the first numbers of the pooled keys of some windows."""
    dims = tl.arange(0, DIMS)
    mask = (window < end)[:, None] & (dims < DIM)[None, :]
    tile = tl.load(keys + window[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_scores(  # noqa: ANN201 - a part of kernels
    at, runs_at, own, next_one, first_block, stop, token, tokens, num_eights, eight_runs,
    OVERHANG: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr, RUN: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Write scores of blocks; of each run of them, as of a block, what is in it and reaches out."""
    block = first_block + tl.arange(0, BLOCKS)
    # Whole eights: behind the last block nobody reads, and there is room.
    is_block = block < (stop + _EIGHT - 1) // _EIGHT * _EIGHT
    is_token = tl.expand_dims(token < tokens, AXIS)
    # [token, which of the two, block] of one pair: 32 bits count its scores.
    row = tl.expand_dims(token * (2 * _EIGHT * num_eights), AXIS)
    mask = tl.expand_dims(is_block, 1 - AXIS) & is_token
    place = row + tl.expand_dims(block, 1 - AXIS)
    tl.store(at + place, own, mask=mask)
    if OVERHANG > 0:
        tl.store(at + _EIGHT * num_eights + place, next_one, mask=mask)
    if RUN > 0:
        RUNS: tl.constexpr = BLOCKS // RUN
        run = first_block // RUN + tl.arange(0, RUNS)
        row = tl.expand_dims(token * (2 * _EIGHT * eight_runs), AXIS)
        place = runs_at + row + tl.expand_dims(run, 1 - AXIS)
        mask = tl.expand_dims(run * RUN < stop, 1 - AXIS) & is_token
        best = own
        if OVERHANG > 0:
            is_last = tl.expand_dims(block % RUN == RUN - 1, 1 - AXIS)
            reaches_out = tl.where(is_last, next_one, float("-inf"))
            reaches_out = _best_of_runs(reaches_out, RUNS, RUN, TOKENS, AXIS)
            tl.store(place + _EIGHT * eight_runs, reaches_out, mask=mask)
            best = tl.maximum(best, tl.where(is_last, float("-inf"), next_one))
        tl.store(place, _best_of_runs(best, RUNS, RUN, TOKENS, AXIS), mask=mask)


@triton.jit
def _best_of_runs(
    values, RUNS: tl.constexpr, RUN: tl.constexpr, TOKENS: tl.constexpr, AXIS: tl.constexpr
):  # fmt: skip
    """Return the largest value of each run of blocks, for each token."""
    if AXIS == 1:
        best = tl.max(tl.reshape(values, [TOKENS, RUNS, RUN]), axis=2)
    else:
        best = tl.max(tl.reshape(values, [RUNS, RUN, TOKENS]), axis=1)
    return best
