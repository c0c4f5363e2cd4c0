"""Of candidates for each new token of a prompt the K best, by every head and low-bit keys.

    union     for each tile of neighbouring tokens, the candidates of any of them
    masses    log2 sum_t 2^(q . k'[t] * factor) of a head and block, for the tokens that name it
    pick      per token: score = sum_h 2^(mass - log2 of all its candidates'), then the K best

A program of `masses` walks a union, part by part. What it keeps lies where a token has the block in
its own list: so its sums, and its choice, do not depend on the tokens beside it, nor on where a
prompt is cut.

Floor, of T tokens with C candidates each: 2 * T * C * P * D FLOP for each head, and what neighbours
name and a token does not. Masses are written and read once, 8 * T * C bytes for each head.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import interpreting, launch, power_of_two
from sparda_compile.kernels.gpu.low_bit_tiles import Form, add_dots, block_dots, unpacked_keys
from sparda_compile.kernels.gpu.score_tiles import log2_sums, query_vectors
from sparda_compile.kernels.gpu.select import pick_listed
from sparda_compile.kernels.gpu.token_blocks import listed_unions
from sparda_compile.kernels.selection_bytes import CANDIDATE_TOKENS, candidate_tiles
from sparda_compile.kernels.union_sizes import union_entries

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.asked import Asked
    from sparda_compile.kernels.gpu.select import Choice

__all__ = ["pick_candidates"]

_LOG2_E: Final = math.log2(math.e)
# Where fewer unions than that are walked, programs share each, so many blocks a program.
_ENOUGH_TILES: Final = 256
_PART: Final = 32
_WARPS: Final = 4
# Heads of a token whose masses are there at once, and their numbers in a warp.
_HEADS: Final = 16
_NUMBERS_OF_A_WARP: Final = 1024
# Readers of a union that are counted at once.
_COUNTED = tl.constexpr(64)


@triton.jit
def _num_named(readers_at, stop, token):
    """Return how many of a union's blocks before `stop` each row's token names."""
    found = token * 0
    for start in tl.range(0, stop, _COUNTED):
        entry = start + tl.arange(0, _COUNTED)
        bits = tl.load(readers_at + entry, mask=entry < stop, other=0)
        found += tl.sum((bits[None, :] >> token[:, None]) & 1, axis=1)
    return found


@triton.jit
def _named(
    ids_at, readers_at, start, stop, num_keyed, SPAN: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """Return blocks of a union: of each key of a tile, of each block, and its readers."""
    key = start + tl.arange(0, BLOCKS * SPAN) // SPAN
    entry = start + tl.arange(0, BLOCKS)
    block = tl.load(ids_at + key, mask=key < stop, other=num_keyed)
    named = tl.load(ids_at + entry, mask=entry < stop, other=num_keyed)
    return block, named, tl.load(readers_at + entry, mask=entry < stop, other=0)


@triton.jit(do_not_specialize=["num_tokens", "num_keyed", "first", "end", "per_part"])
def _candidate_masses(
    query, keys, positions, counts, union_ids, readers, masses, factor, q_row, q_head, q_token,
    groups, num_tokens, num_keyed, num_entries, first, end, per_part,
    LISTED: tl.constexpr, HEADS: tl.constexpr, ROOM: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    wide, row, group = pair.to(tl.int64), pair // groups, pair % groups
    own = wide * tl.num_programs(0) + tile
    begin, stop = part * per_part, tl.minimum(tl.load(counts + own), (part + 1) * per_part)
    if begin < stop:
        TOKENS: tl.constexpr = COLUMNS // ROOM
        vectors, position, there = query_vectors(
            query, positions, row, group, first + tile * TOKENS, end, q_row, q_head, q_token,
            num_tokens, HEADS, ROOM, COLUMNS, DIM, DIMS, INTERPRETED,
        )  # fmt: skip
        full = position // SIZE
        keys_at = keys + wide * num_keyed * (SIZE * DIM)
        ids_at, readers_at = union_ids + own * num_entries, readers + own * num_entries
        token, head = tl.arange(0, COLUMNS) // ROOM, tl.arange(0, COLUMNS) % ROOM
        # Where each row's token has what it names, of those of this pair and launch.
        list_at = (wide * (end - first) + tile * TOKENS + token) * LISTED
        rank = _num_named(readers_at, begin, token)
        place = tl.arange(0, BLOCKS * SPAN)
        none = tl.full([COLUMNS, BLOCKS], float("-inf"), dtype=tl.float32)
        most, mass = none, tl.zeros([COLUMNS, BLOCKS], dtype=tl.float32)
        # A block that is longer than a tile is summed piece by piece.
        PIECES: tl.constexpr = (SIZE + SPAN - 1) // SPAN
        steps = (stop - begin + BLOCKS - 1) // BLOCKS * PIECES
        block, named, bits = _named(ids_at, readers_at, begin, stop, num_keyed, SPAN, BLOCKS)
        for step in tl.range(steps, num_stages=STAGES):
            piece = step % PIECES
            dots = block_dots(
                vectors, keys_at, block, piece * SPAN + place % SPAN, num_keyed, SIZE, SPAN, DIM,
                DIMS, INTERPRETED,
            )  # fmt: skip
            most, mass = add_dots(dots, most, mass, factor)
            if piece == PIECES - 1:
                is_named = (bits[None, :] >> token[:, None]) & 1
                mass = tl.where(named[None, :] < full[:, None], most + tl.log2(mass), none)
                at = list_at[:, None] + rank[:, None] + tl.cumsum(is_named, axis=1) - 1
                is_kept = (is_named > 0) & there[:, None]
                tl.store(masses + at * ROOM + head[:, None], mass, mask=is_kept)
                rank += tl.sum(is_named, axis=1)
                most, mass = none, tl.zeros([COLUMNS, BLOCKS], dtype=tl.float32)
            # Known a step before its keys are asked for, so that these are asked for early.
            start = begin + (step + 1) // PIECES * BLOCKS
            block, named, bits = _named(ids_at, readers_at, start, stop, num_keyed, SPAN, BLOCKS)


@triton.jit(do_not_specialize=["num_tokens", "first"])
def _pick_candidates(
    masses, candidates, positions, ids, groups, num_tokens, first, sink, local,
    SELECTED: tl.constexpr, LISTED: tl.constexpr, ENTRIES: tl.constexpr, HEADS: tl.constexpr,
    ROOM: tl.constexpr, TOGETHER: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    local_token, pair = tl.program_id(0), tl.program_id(1)
    token = first + local_token
    position = tl.load(positions + pair // groups * num_tokens + token)
    if position >= 0:
        entry = tl.arange(0, ENTRIES)
        own = pair.to(tl.int64) * num_tokens + token
        block = tl.load(candidates + own * LISTED + entry, mask=entry < LISTED, other=-1)
        exists = block >= 0
        list_at = pair.to(tl.int64) * tl.num_programs(0) + local_token
        masses_at = masses + (list_at * LISTED + entry) * ROOM
        score = tl.zeros([ENTRIES], dtype=tl.float32)
        for start in tl.static_range(0, ROOM, TOGETHER):
            head = start + tl.arange(0, TOGETHER)
            mask = exists[:, None] & (head < HEADS)[None, :]
            mass = tl.load(masses_at[:, None] + head[None, :], mask=mask, other=float("-inf"))
            normal = log2_sums(mass, tl.full([ENTRIES, TOGETHER], 1.0, dtype=tl.float32))
            score += tl.sum(tl.exp2(mass - normal[None, :]), axis=1)
        current = position // SIZE
        forced = (block < sink) | (block >= current - local)
        picked = pick_listed(score, forced, exists, SELECTED)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(ids + own * SELECTED + rank, block, mask=picked)


def pick_candidates(asked: Asked, candidates_BGTC: Tensor, choice: Choice, ids: Tensor) -> None:
    """Pick of what each token has been proposed.

    Args:
        asked: Queries and low-bit keys, with those of the new tokens; of a softmax. Tokens that
            have position -1 pick nothing, and have no candidates.
        candidates_BGTC: int32 ids, ascending, forced ones among them: K or more of each other.
        choice: What to pick.
        ids: [B, G, T, K] int32; those of tokens that pick are written.
    """
    query, geometry = asked.query, asked.geometry
    query = query if query.stride(-1) == 1 else query.contiguous()
    batch, groups, num_tokens, listed = candidates_BGTC.shape
    pairs, heads, size = batch * groups, query.shape[1] // groups, geometry.block_size
    form = Form.of(query, groups, size, CANDIDATE_TOKENS)
    tokens, together, entries = (
        form.columns // form.room,
        min(form.room, _HEADS),
        power_of_two(listed),
    )
    tiles = triton.cdiv(num_tokens, tokens)
    at_once = candidate_tiles(pairs, geometry.num_blocks, (tokens, form.room), listed, tiles)
    keys = unpacked_keys(asked, asked.blocks_of(num_tokens))
    most = min(at_once * tokens, num_tokens)
    masses = query.new_empty((pairs, most, listed, form.room), dtype=torch.float32)
    for first_tile in range(0, tiles, at_once):
        count = min(at_once, tiles - first_tile)
        union = listed_unions(
            candidates_BGTC, asked.lengths, (geometry.num_blocks, size, asked.spread),
            (tokens, first_tile, count),
        )  # fmt: skip
        first, end = first_tile * tokens, min((first_tile + count) * tokens, num_tokens)
        most_named = union_entries(geometry.num_blocks, min(tokens, num_tokens), listed)
        per_part = most_named if count * pairs >= _ENOUGH_TILES else _PART
        launch(_candidate_masses, (count, triton.cdiv(most_named, per_part), pairs))(
            query, keys, asked.positions, union.counts, union.block_ids, union.readers, masses,
            asked.scale * _LOG2_E, *query.stride()[:3], groups, num_tokens, keys.shape[1],
            union.block_ids.shape[2], first, end, per_part, listed, heads, form.room, form.columns,
            size, form.span, form.blocks, query.shape[3], form.dims, interpreting(), form.stages,
            num_warps=_WARPS,
        )  # fmt: skip
        launch(_pick_candidates, (end - first, pairs))(
            masses, candidates_BGTC, asked.positions, ids, groups, num_tokens, first,
            choice.sink_blocks, choice.local_blocks, choice.num_selected, listed, entries, heads,
            form.room, together, size,
            num_warps=min(max(entries * together // _NUMBERS_OF_A_WARP, 1), 8),
        )  # fmt: skip
        del union  # before the next one is made
