"""Scores of blocks for each new token of a prompt by keys in few bits, in one pass over products.

    keys      k' of all full blocks, in the dtype of queries: unpacked once for all tokens
    masses    per token, head and full block log2 sum_t 2^(q . k'[t] * factor); per part of the
              blocks and head the largest, and the sum of 2^(mass - largest)
    scores    per token and block sum_h 2^(mass - log2 of all); a Forecast's are its masses

A token scores the blocks that are full before its own position, as a decode step would there
(`selectors/lowbit.py`); those that new tokens have filled are among them. Its own has no score.

As in `token_scores.py` a program takes `SCORE_COLUMNS` query vectors and a part of the blocks, and
scores are laid out for the same pick. Its products are other ones: vectors are the rows, and the
tokens of whole blocks the columns, so that a block's sum is mostly made inside a thread. A mass has
4 bytes for as many products as a block has tokens: to keep them is cheaper than to multiply twice.

Keys of a block have the same bits, and the same tiles, whether the past is scored by itself or with
new tokens, and so have a Forecast's scores. Factors are positive.

Floor, of T tokens over S keys, half of them before the mean token of a prompt from nothing: 2 * T *
S * D FLOP for each head and as many exponentials as products have results, T * S; a Forecast has
one head for each KV head. Dense attention has twice those FLOP. Masses are written and read once,
8 * T * S / P bytes for each head; k' once, D numbers for each key and KV head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import as_written, interpreting, launch, power_of_two
from sparda_compile.kernels.gpu.low_bit_tiles import Form, add_dots, block_dots, unpacked_keys
from sparda_compile.kernels.gpu.score_tiles import (
    IN_TURN,
    best_of_runs,
    first_scored,
    normals,
    query_vectors,
    store_runs,
    store_scores,
)
from sparda_compile.kernels.gpu.score_turns import Blocks, Turns
from sparda_compile.kernels.gpu.select import MOST_BLOCKS
from sparda_compile.kernels.workspace import (
    MASS_PART_BLOCKS,
    RUN_BLOCKS,
    SCORE_COLUMNS,
    SCORED_TOGETHER,
    STRIP_BLOCKS,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparda_compile.kernels.asked import Asked
    from sparda_compile.kernels.gpu.score_turns import Scores
    from sparda_compile.selectors import Geometry

__all__ = ["covers_low_bit", "massed_tokens"]

# Query vectors of a program that adds up heads.
_ADDED_COLUMNS: Final = 32
_LOG2_E: Final = math.log2(math.e)
_LN_2: Final = tl.constexpr(math.log(2))
_STRIP = tl.constexpr(STRIP_BLOCKS)
_EIGHT = tl.constexpr(SCORED_TOGETHER)
_TURNS = tl.constexpr(IN_TURN)


@triton.jit(do_not_specialize=["num_tokens", "num_keyed", "num_rows", "begin", "end"])
def _token_masses(
    query, keys, positions, lengths, masses, maxima, sums, factor, q_row, q_head, q_token, groups,
    num_tokens, num_keyed, num_rows, begin, end, scored_from,
    HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    SPAN: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    PART: tl.constexpr, SOFTMAX: tl.constexpr, PAST: tl.constexpr, NEW: tl.constexpr,
    INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, group = pair // groups, pair % groups
    first = begin + tile * (COLUMNS // ROOM)
    vectors, position, _ = query_vectors(
        query, positions, row, group, first, end, q_row, q_head, q_token, num_tokens,
        HEADS, ROOM, COLUMNS, DIM, DIMS, INTERPRETED,
    )  # fmt: skip
    length = tl.load(lengths + row)
    origin = first_scored(length, SIZE) if NEW else length * 0
    full = (tl.minimum(position, length) if PAST else position) // SIZE - origin
    is_scored = tl.max(position, 0) >= scored_from
    stop = tl.where(is_scored, tl.minimum(tl.max(full, 0), (part + 1) * PART), 0)
    keys_at = keys + pair.to(tl.int64) * num_keyed * (SIZE * DIM)
    place = tl.arange(0, BLOCKS * SPAN)
    column, columns = tile * COLUMNS + tl.arange(0, COLUMNS), (end - begin) * ROOM
    peak = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    none = tl.full([COLUMNS, BLOCKS], float("-inf"), dtype=tl.float32)
    most, mass = none, tl.zeros([COLUMNS, BLOCKS], dtype=tl.float32)
    # A block that is longer than a tile is summed piece by piece.
    PIECES: tl.constexpr = (SIZE + SPAN - 1) // SPAN
    steps = (tl.maximum(stop - part * PART, 0) + BLOCKS - 1) // BLOCKS * PIECES
    for step in tl.range(steps, num_stages=STAGES):
        start, piece = part * PART + step // PIECES * BLOCKS, step % PIECES
        block, slot = start + place // SPAN, piece * SPAN + place % SPAN
        dots = block_dots(vectors, keys_at, block, slot, stop, SIZE, SPAN, DIM, DIMS, INTERPRETED)
        most, mass = add_dots(dots, most, mass, factor)
        if piece == PIECES - 1:
            own = start + tl.arange(0, BLOCKS)
            mass = tl.where(own[None, :] < full[:, None], most + tl.log2(mass), float("-inf"))
            kept = (pair.to(tl.int64) * num_rows + own)[None, :] * columns + column[:, None]
            tl.store(masses + kept, mass, mask=(own < stop)[None, :] & (column < columns)[:, None])
            if SOFTMAX:
                above_all = tl.maximum(peak, tl.max(mass, axis=1))
                safe = tl.where(above_all == float("-inf"), 0.0, above_all)
                total *= tl.exp2(peak - safe)
                total += tl.sum(tl.exp2(mass - safe[:, None]), axis=1)
                peak = above_all
            most, mass = none, tl.zeros([COLUMNS, BLOCKS], dtype=tl.float32)
    if SOFTMAX:
        to = (pair.to(tl.int64) * tl.num_programs(1) + part) * columns + column
        tl.store(maxima + to, peak, mask=column < columns)
        tl.store(sums + to, total, mask=column < columns)


@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_strips", "num_eights", "begin", "end",
                       "sum_parts"]
)  # fmt: skip
def _mass_scores(
    masses, maxima, sums, positions, lengths, scores, runs, groups, num_tokens, num_rows,
    num_strips, num_eights, begin, end, scored_from, sum_parts,
    HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr, SUM_PARTS: tl.constexpr,
    SIZE: tl.constexpr, RUN: tl.constexpr, SOFTMAX: tl.constexpr, PAST: tl.constexpr,
    NEW: tl.constexpr,
):  # fmt: skip
    tile, strip, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, wide = pair // groups, pair.to(tl.int64)
    TOKENS: tl.constexpr = COLUMNS // ROOM
    BLOCKS: tl.constexpr = _STRIP // _TURNS
    local = tile * TOKENS + tl.arange(0, TOKENS)
    token = begin + local
    position = tl.load(positions + row * num_tokens + token, mask=token < end, other=-1)
    length = tl.load(lengths + row)
    origin = first_scored(length, SIZE) if NEW else length * 0
    full = (tl.minimum(position, length) if PAST else position) // SIZE - origin
    stop = tl.where(tl.max(position, 0) >= scored_from, tl.max(full, 0), 0)
    first = strip * _STRIP
    if first < stop:
        column, columns = tile * COLUMNS + tl.arange(0, COLUMNS), (end - begin) * ROOM
        is_head = (column < columns) & (column % ROOM < HEADS)
        normal = length * 0.0
        if SOFTMAX:
            normal = normals(maxima, sums, pair, tile, columns, sum_parts, COLUMNS, SUM_PARTS)
        at = scores + wide * (end - begin) * (_STRIP * num_strips)
        runs_at = runs + wide * (end - begin) * (_EIGHT * num_eights)
        none = tl.full([BLOCKS, TOKENS], float("-inf"), dtype=tl.float32)
        best_run = best_of_runs(none, RUN, 0) if RUN > 0 else none
        for turn in tl.static_range(_TURNS):
            block = first + turn + tl.arange(0, BLOCKS) * _TURNS
            kept = (wide * num_rows + block)[:, None] * columns + column[None, :]
            mask = (block < stop)[:, None] & is_head[None, :]
            mass = tl.load(masses + kept, mask=mask, other=float("-inf"))
            if SOFTMAX:
                share = tl.exp2(mass - normal[None, :])
                score = tl.sum(tl.reshape(share, [BLOCKS, TOKENS, ROOM]), axis=2)
            else:
                score = mass * _LN_2
            store_scores(at, score, first, turn, stop, local, end - begin, num_strips, BLOCKS, 0)
            if RUN > 0:
                best_run = tl.maximum(best_run, best_of_runs(score, RUN, 0))
        if RUN > 0:
            store_runs(runs_at, best_run, first, stop, local, end - begin, num_eights, RUN, 0)


def covers_low_bit(query_BHTD: Tensor, groups: int, geometry: Geometry) -> bool:
    """Whether these kernels select for such queries and blocks.

    Not for a group of more than 128 heads.
    """
    fits: bool = query_BHTD.shape[1] <= SCORE_COLUMNS * groups
    return fits and geometry.num_blocks <= MOST_BLOCKS


def massed_tokens(
    asked: Asked, blocks: Blocks, scored_from: int, selected: int | None = None
) -> Iterator[tuple[int, int, Scores]]:
    """Score by low-bit keys; arguments, and what it yields, as for `token_scores.scored_tokens`.

    Which blocks: a Forecast's may be scored in two parts.
    """
    query, geometry = asked.query, asked.geometry
    query = query if query.stride(-1) == 1 else query.contiguous()
    groups, num_tokens = asked.num_groups, query.shape[2]
    pairs, heads, softmax = query.shape[0] * groups, query.shape[1] // groups, asked.softmax
    form = Form.of(query, groups, geometry.block_size)
    turns = Turns.of(asked, blocks, selected, (form.columns, form.room), masses=form.room)
    keys = unpacked_keys(asked, turns.num_blocks, is_new=blocks is Blocks.NEW)
    masses, (maxima, sums) = turns.numbers(turns.room.masses), turns.sums()
    # A Forecast's parts are compiled in two forms, whose scores are compared.
    same_bits = {} if softmax else as_written()
    when = (softmax, blocks is Blocks.PAST, blocks is Blocks.NEW)
    part = triton.cdiv(MASS_PART_BLOCKS, form.blocks) * form.blocks
    all_parts = power_of_two(triton.cdiv(geometry.num_blocks, part))
    added = max(min(_ADDED_COLUMNS, form.columns), form.room)
    shape = (geometry.block_size, form.span, form.blocks, query.shape[3], form.dims)
    for turn in turns:
        begin, end, rows, scores = turn
        columns, parts = (end - begin) * form.room, triton.cdiv(rows, part)
        launch(_token_masses, (triton.cdiv(columns, form.columns), parts, pairs))(
            query, keys, asked.positions, asked.lengths, masses, maxima, sums,
            asked.scale * _LOG2_E, *query.stride()[:3], groups, num_tokens, keys.shape[1], rows,
            begin, end, scored_from, heads, form.room, form.columns, *shape, part, *when,
            interpreting(), form.stages, num_warps=4, **same_bits,
        )  # fmt: skip
        launch(_mass_scores, (triton.cdiv(columns, added), turn.widths[0], pairs))(
            masses, maxima, sums, asked.positions, asked.lengths, scores.blocks, turn.runs, groups,
            num_tokens, rows, *turn.widths, begin, end, scored_from, parts, heads, form.room,
            added, all_parts, geometry.block_size, RUN_BLOCKS if turns.in_runs else 0, *when,
            num_warps=4,
        )  # fmt: skip
        yield begin, end, scores
