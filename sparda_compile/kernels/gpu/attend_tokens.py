"""Attention of a prompt's tokens, each over its own selected blocks of the past and of the prompt.

A program takes neighbouring tokens of one KV head, whose query heads are the rows of a tile, and
walks the union of the blocks that they read, with an online softmax. A row that does not read a
block has no weight there: what a token gets depends on no other token, nor on the tile, the call
or the chunk that it is in. `token_blocks.py` says what the union is, and `stage.py` where past
blocks come from.

Neighbours read nearly the same blocks, so a tile of R tokens multiplies for a union of U blocks
where a token has K. With a group of H heads, of each of U * 2 * P * D elements that are read,
R * H * K * 4 * P * D useful FLOP are made. With the 34 forced blocks of 96 in all sets and 62 of
which each token replaces a tenth, on one H200 (matrix products: 791 TFLOP/s):

    group   tokens   rows     U   useful share   useful TFLOP/s   all TFLOP/s
       16        4     64   114            84%              365           433
       16        8    128   138            70%              274           394
        4       16     64   185            52%              220           424
        4       32    128   276            35%              137           394

All rows multiply at one rate, so fewer rows, which multiply less for others, win: 64, the least
that the matrix unit takes. Where neighbours share less, they win by more. For Hopper GPUs there is
`attend_hopper.py`, which has 128 rows but multiplies for 64 of them what these read. It takes two
blocks at a time, so there a weight is rounded by a peak that depends on which block is beside its
own: what a token gets depends on its neighbours' blocks, but only by how weights are rounded.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.attention import score_factors
from sparda_compile.kernels.gpu.extend import number_tokens
from sparda_compile.kernels.gpu.launch import interpreting, launch, power_of_two, shared_bytes
from sparda_compile.kernels.gpu.stage import stage
from sparda_compile.kernels.gpu.token_blocks import (
    all_blocks,
    pack_prompt,
    unions,
)
from sparda_compile.kernels.paged import block_pool, num_new_slots, tail_pages
from sparda_compile.kernels.workspace import (
    HALVES_ROWS,
    QUERY_BYTES,
    in_halves,
    tile_rows,
    unions_at_once,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.kernels.gpu.token_blocks import Prompt, Unions

__all__ = ["attend_all", "attend_tokens", "attend_unions", "covers", "tile_rows"]

# Keys of a turn, and as many values.
_TILE: Final = 64
# Of keys, and as many of values.
_TILE_BYTES: Final = 32 * 1024
_MOST_STAGES: Final = 3


@triton.jit
def _entry(
    block_ids, slots, readers, entry, count, word, WORDS: tl.constexpr,
):  # fmt: skip
    """Return a block of the union, its slot, and for each row a word of the bits of readers."""
    there = entry < count
    block = tl.load(block_ids + entry, mask=there, other=0)
    slot = tl.load(slots + entry, mask=there, other=0)
    each = entry + word * 0
    bits = tl.load(readers + each * WORDS + word, mask=each < count, other=0)
    return block, slot, bits


@triton.jit
def _load_tile(
    source, token, dims, SIZE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return some keys, or values, of a block."""
    at = source + token[:, None] * DIM + dims[None, :]
    if (SIZE % TOKENS == 0) & (DIM == DIMS):
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(token < SIZE)[:, None] & (dims < DIM)[None, :], other=0.0)
    if INTERPRETED:
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _scores(q, keys, token, limit, factor, cap, SOFTCAP: tl.constexpr):
    """Return scores times log2(e): their exponential is then a power of two, which is one step."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return tl.where(token[None, :] <= limit[:, None], scores, float("-inf"))


@triton.jit
def _queries(
    query, columns, begin, num_tokens, q_head, q_token, dims,
    HEADS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the rows of a tile: queries, token and head of each, its column, and a mask."""
    line = tl.arange(0, ROWS)
    reader, head = line // ROOM, line % ROOM
    inside = (begin + reader < num_tokens) & (head < HEADS)
    column = tl.load(columns + begin + reader, mask=inside, other=0).to(tl.int64)
    mask = inside[:, None] & (dims < DIM)[None, :]
    place = head.to(tl.int64) * q_head + column * q_token
    q = tl.load(query + place[:, None] + dims[None, :], mask=mask, other=0.0)
    if INTERPRETED:
        q = q.to(tl.float32)
    return q, reader, head, column, mask


@triton.jit
def _add(acc, weights, peak, scores, values):
    """Add values by their scores; returns the sums of both, and the largest score so far."""
    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(scores - safe[:, None])
    fade = tl.exp2(peak - safe)
    acc = acc * fade[:, None]
    acc += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
    return acc, weights * fade + tl.sum(weight, axis=1), new_peak


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "first_tile"])
def _attend_tokens(
    query, out, columns, totals, lengths, union_counts, union_ids, readers, union_slots, staging,
    factor, cap, q_row, q_head, q_token, groups, num_tokens, num_entries, num_slots, first_tile,
    HEADS: tl.constexpr, ROOM: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, SOFTCAP: tl.constexpr, ALL: tl.constexpr, INTERPRETED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    local_tile, pair = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    begin = (first_tile + local_tile) * (ROWS // ROOM)
    dims = tl.arange(0, DIMS)
    query_at = query + row.to(tl.int64) * q_row + (group * HEADS).to(tl.int64) * q_head
    q, reader, head, column, mask = _queries(
        query_at, columns + row.to(tl.int64) * num_tokens, begin, num_tokens, q_head, q_token, dims,
        HEADS, ROOM, ROWS, DIM, INTERPRETED,
    )  # fmt: skip
    length = tl.load(lengths + row)
    position = length + begin + reader
    own = pair.to(tl.int64) * tl.num_programs(0) + local_tile
    if ALL:
        # One union for all tiles, up to the block of the last real token; other rows see nothing.
        own = pair.to(tl.int64)
        total = tl.load(totals + row)
        end = tl.minimum(total, length + begin + ROWS // ROOM)
        count = tl.where(length + begin < end, (end - 1) // SIZE + 1, 0)
        position = tl.where(position < total, position, -1)
    else:
        count = tl.load(union_counts + own)
    ids_at, slots_at = union_ids + own * num_entries, union_slots + own * num_entries
    staging_at = staging + pair.to(tl.int64) * num_slots * (2 * SIZE * DIM)
    readers_at = readers + own * num_entries * WORDS
    word, shift = reader // 32, reader % 32
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    weights = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, DIMS], dtype=tl.float32)
    block, slot, bits = _entry(ids_at, slots_at, readers_at, count * 0, count, word, WORDS)
    for turn in tl.range(count * PARTS, num_stages=STAGES):
        # A turn ahead: loads that wait for each other would have the stages of the loop.
        coming = (turn + 1) // PARTS
        next_block, next_slot, next_bits = _entry(
            ids_at, slots_at, readers_at, coming, count, word, WORDS
        )
        token = turn % PARTS * TOKENS + tl.arange(0, TOKENS)
        start = staging_at + slot.to(tl.int64) * (2 * SIZE * DIM)
        keys = _load_tile(start, token, dims, SIZE, TOKENS, DIM, DIMS, INTERPRETED)
        values = _load_tile(start + SIZE * DIM, token, dims, SIZE, TOKENS, DIM, DIMS, INTERPRETED)
        # The last token of the block that a row sees.
        limit = tl.where((bits >> shift) & 1 != 0, position - block * SIZE, -1)
        if SIZE % TOKENS != 0:
            limit = tl.minimum(limit, SIZE - 1)
        scores = _scores(q, keys, token, limit, factor, cap, SOFTCAP)
        acc, weights, peak = _add(acc, weights, peak, scores, values)
        block, slot, bits = next_block, next_slot, next_bits
    result = acc / tl.where(weights == 0.0, 1.0, weights)[:, None]
    at = (row.to(tl.int64) * num_tokens + column) * (groups * HEADS) + group * HEADS + head
    tl.store(out + at[:, None] * DIM + dims[None, :], result.to(out.dtype.element_ty), mask=mask)


def covers(query_BHTD: Tensor, pages: Tensor, block_table: Tensor) -> bool:
    """Whether the kernel attends for such queries and pages: not if a group's heads are too large.

    Args:
        query_BHTD: Queries.
        pages: [B, G, C, 2, P, D].
        block_table: [B, G, N] int32.
    """
    heads = query_BHTD.shape[1] // block_table.shape[1]
    vector_bytes = power_of_two(query_BHTD.shape[3]) * query_BHTD.element_size()
    return power_of_two(heads) * vector_bytes <= QUERY_BYTES and query_BHTD.dtype == pages.dtype


def _stages(staging: Tensor, rows: int, tokens: int, dims: int) -> int:
    """Return how many tiles of keys and of values fit beside queries and weights."""
    if staging.device.type != "cuda":
        return _MOST_STAGES
    width = staging.element_size()
    others = rows * (dims + tokens) * width
    free = shared_bytes(staging.device) - others
    return max(min(_MOST_STAGES, free // (2 * tokens * dims * width)), 1)


def attend_unions(
    query_BHTD: Tensor,
    prompt: Prompt,
    union: Unions,
    out: Tensor,
    first_tile: int,
    factors: tuple[float, float],
    rows: int,
) -> None:
    """Attend for some tiles; writes their tokens of `out`, 0 where none is real.

    Args:
        query_BHTD: Queries; the last dimension is contiguous.
        prompt: The tokens, with the staging buffer.
        union: What the tiles read.
        out: [B, H, T, D], a token's heads side by side.
        first_tile: Of the union.
        factors: Factor on q . k, and soft cap on the scores, 0.0 for none.
        rows: Of a tile, see `tile_rows`.
    """
    batch, heads, num_tokens, dim = query_BHTD.shape
    groups = prompt.slots.shape[1]
    size = prompt.staging.shape[4]
    room, dims = power_of_two(heads // groups), power_of_two(dim, 16)
    tokens = min(_TILE, _TILE_BYTES // (dims * prompt.staging.element_size()))
    tokens = min(tokens, power_of_two(size, 16))
    counts = union.counts
    tiles = triton.cdiv(num_tokens, rows // room) if counts is None else counts.shape[1]
    launch(_attend_tokens, (tiles, batch * groups))(
        query_BHTD, out, prompt.columns, prompt.totals, prompt.lengths,
        prompt.totals if counts is None else counts, union.block_ids, union.readers, union.slots,
        prompt.staging, *score_factors(*factors), *query_BHTD.stride()[:3], groups, num_tokens,
        union.block_ids.shape[2], prompt.staging.shape[2], first_tile,
        heads // groups, room, rows, union.readers.shape[3], size, tokens,
        triton.cdiv(size, tokens), dim, dims, factors[1] != 0.0, counts is None, interpreting(),
        _stages(prompt.staging, rows, tokens, dims), num_warps=4 if rows <= 64 else 8,
    )  # fmt: skip


def _fastest(query: Tensor, staging: Tensor, rows: int) -> tuple[Callable[..., None], int]:
    """Return the kernel that attends for unions, and the rows of its tiles; `rows` if not 0."""
    if not rows and in_halves(query, staging):
        from sparda_compile.kernels.gpu import attend_hopper

        return attend_hopper.attend_unions, HALVES_ROWS
    rows = rows or tile_rows(query.shape[1] // staging.shape[1], query.shape[3], query.dtype)
    return partial(attend_unions, rows=rows), rows


def attend_tokens(
    query_BHTD: Tensor,
    kv: tuple[Tensor, Tensor],
    block_ids_BGTK: Tensor,
    numbered: Sequence[Tensor],
    lengths_B: Tensor,
    staged: tuple[Tensor, Tensor],
    paged: tuple[Tensor, Tensor],
    factors: tuple[float, float],
    rows: int = 0,
) -> Tensor:
    """Attend; see `kernels.prefill_attention`.

    Args:
        query_BHTD: Queries.
        kv: [B, G, T, D] new keys and values.
        block_ids_BGTK: int32, -1 for none.
        numbered: Positions [B, T], columns [B, T] and totals [B], int32.
        lengths_B: int32, tokens in the cache.
        staged: The buffer [B, G, S, 2, P, D], whose first slots are written, and [B, G, N] int32
            slots of past blocks.
        paged: Pages [B, G, C, 2, P, D] and the block table [B, G, N] int32.
        factors: Factor on q . k, and soft cap on the scores, 0.0 for none.
        rows: Of a tile, at least a group's heads; 0 for what is best.

    Returns:
        [B, H, T, D], a token's heads side by side; zero for tokens that are not real.
    """
    query = query_BHTD if query_BHTD.stride(-1) == 1 else query_BHTD.contiguous()
    ids = block_ids_BGTK.contiguous()
    batch, groups, num_tokens, selected = ids.shape
    prompt = pack_prompt(kv, numbered, lengths_B, staged, paged)
    attend, rows = _fastest(query, prompt.staging, rows)
    tokens = rows // power_of_two(query.shape[1] // groups)
    tiles = triton.cdiv(num_tokens, tokens)
    at_once = unions_at_once(batch * groups, prompt.slots.shape[2], tokens, selected, tiles)
    batch, heads, _, dim = query.shape
    out = query.new_empty((batch, num_tokens, heads, dim)).transpose(1, 2)
    for first in range(0, tiles, at_once):
        union = unions(prompt, ids, tokens, first, min(at_once, tiles - first))
        attend(query, prompt, union, out, first, factors)
        del union  # before the next one is made
    return out


def attend_all(
    query_BHTD: Tensor,
    kv: tuple[Tensor, Tensor],
    token_mask_BT: Tensor,
    lengths_B: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
    num_past: int,
    factors: tuple[float, float],
    kv_format: str = "model",
    keys: Sequence[Tensor] = (),
    tail: Tensor | None = None,
) -> Tensor:
    """Attend to all that is before each token; see `kernels.prefill_attention`.

    Args:
        query_BHTD: Queries.
        kv: [B, G, T, D] new keys and values.
        token_mask_BT: bool, which tokens are real.
        lengths_B: int32, tokens in the cache.
        past: Pages [B, G, C, 2, P, D] or stored runs, [B, G] int64 host addresses or empty without
            offload, and the block table [B, G, N] int32.
        num_past: No sequence has more tokens in the cache.
        factors: Factor on q . k, and soft cap on the scores, 0.0 for none.
        kv_format: How blocks in CPU memory are stored.
        keys: What keys that stay are read back from; see `staying.py`. Empty for others.
        tail: [B, G, 2, 2, P, D] beside pages of stored runs, the block that is being written.

    Returns:
        [B, H, T, D], a token's heads side by side; zero for tokens that are not real.
    """
    query = query_BHTD if query_BHTD.stride(-1) == 1 else query_BHTD.contiguous()
    (pages, _, table), (batch, heads, num_tokens, dim) = past, query.shape
    pool = block_pool(pages, tail)
    size, groups = pool.shape[4], pool.shape[1]
    room = num_past // size
    num_slots = num_new_slots(num_tokens, size) + room
    staging = pool.new_empty((batch, groups, num_slots, *pool.shape[3:]))
    slots = torch.empty_like(table)
    if room:
        stage(None, lengths_B, past, staging, slots, room, kv_format, keys, tail)
    tokens = number_tokens(token_mask_BT, lengths_B)
    paged = (pool, tail_pages(table, is_tail=tail is not None))
    prompt = pack_prompt(kv, tokens, lengths_B, (staging, slots), paged)
    rows = tile_rows(heads // groups, dim, query.dtype)
    union = all_blocks(prompt, rows // power_of_two(heads // groups))
    out = query.new_empty((batch, num_tokens, heads, dim)).transpose(1, 2)
    attend_unions(query, prompt, union, out, 0, factors, rows)
    return out
