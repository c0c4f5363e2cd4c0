"""Before attention of a prompt's tokens: the new blocks, and what neighbouring tokens read.

    pack       the new keys and values as whole blocks, behind the past tokens of the first one
    union      for each tile of tokens, the blocks that any of them reads, and which tokens do

Behind them every block that somebody reads is a slot of one buffer: attention knows neither pages
nor hosts, holes nor strides. Past blocks are there already (`stage.py`), behind the slots of the
new ones, of which the first is the block of the first new token. New tokens are read and written
once, 4 * T * D elements for each KV head.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two
from sparda_compile.kernels.union_sizes import mark_words, union_entries, union_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Prompt", "Unions", "all_blocks", "listed_unions", "pack_prompt", "unions"]

_TILE: Final = 1024
# Elements that a program of `pack` holds of keys, and as many of values.
_PACK_TILE: Final = 4096
# Ids that a program of `union` takes in at once.
_IDS: Final = 2048


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The new tokens of each sequence, and where the blocks are that they may read.

    Attributes:
        columns: [B, T] int32, columns in the order of positions, then those of no token.
        totals: [B] int32, tokens behind them.
        lengths: [B] int32, tokens before them.
        staging: [B, G, S, 2, P, D], all blocks that somebody reads.
        slots: [B, G, N] int32, where those are that have no new token; any number elsewhere.
    """

    columns: Tensor
    totals: Tensor
    lengths: Tensor
    staging: Tensor
    slots: Tensor


@dataclasses.dataclass(frozen=True)
class Unions:
    """What some tiles of tokens read, for each pair of a sequence and a KV head.

    Attributes:
        counts: [pairs, tiles] int32, blocks; None where each token reads all up to its own. Then
            one tile stands for all of them.
        block_ids: [pairs, tiles, U] int32, ascending.
        readers: [pairs, tiles, U, w] int32: bit t % 32 of word t // 32 is set where token t of
            the tile reads the block.
        slots: [pairs, tiles, U] int32, where each lies among the slots of its pair.
    """

    counts: Tensor | None
    block_ids: Tensor
    readers: Tensor
    slots: Tensor


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def _pack_blocks(
    k, v, columns, totals, lengths, block_table, pages, staging,
    k_row, k_head, k_token, v_row, v_head, v_token, groups, num_tokens, num_blocks, num_pages,
    num_slots,
    SIZE: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    slot, part, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = pair // groups, pair % groups
    length = tl.load(lengths + row)
    count = tl.load(totals + row) - length
    block = length // SIZE + slot
    if block * SIZE < length + count:
        token = part * TOKENS + tl.arange(0, TOKENS)
        dims = tl.arange(0, DIMS)
        inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
        offset = token[:, None] * DIM + dims[None, :]
        rank = block * SIZE + token - length
        is_new = (token < SIZE) & (rank >= 0) & (rank < count)
        columns_at = columns + row.to(tl.int64) * num_tokens
        column = tl.load(columns_at + rank, mask=is_new, other=0).to(tl.int64)
        mask = is_new[:, None] & (dims < DIM)[None, :]
        k_at = k + row.to(tl.int64) * k_row + head.to(tl.int64) * k_head
        v_at = v + row.to(tl.int64) * v_row + head.to(tl.int64) * v_head
        keys = tl.load(k_at + column[:, None] * k_token + dims[None, :], mask=mask, other=0.0)
        values = tl.load(v_at + column[:, None] * v_token + dims[None, :], mask=mask, other=0.0)
        if block * SIZE < length:
            # Only its page has the older tokens of a block that is not full.
            page = tl.load(block_table + pair.to(tl.int64) * num_blocks + block).to(tl.int64)
            old = pages + (pair.to(tl.int64) * num_pages + page) * (2 * SIZE * DIM)
            is_old = inside & (rank < 0)[:, None]
            keys = tl.where(is_old, tl.load(old + offset, mask=is_old, other=0.0), keys)
            old_values = tl.load(old + SIZE * DIM + offset, mask=is_old, other=0.0)
            values = tl.where(is_old, old_values, values)
        target = staging + (pair.to(tl.int64) * num_slots + slot) * (2 * SIZE * DIM)
        tl.store(target + offset, keys, mask=inside)
        tl.store(target + SIZE * DIM + offset, values, mask=inside)


def pack_prompt(
    kv: tuple[Tensor, Tensor],
    tokens: Sequence[Tensor],
    lengths_B: Tensor,
    staged: tuple[Tensor, Tensor],
    paged: tuple[Tensor, Tensor],
) -> Prompt:
    """Write the blocks of the new tokens to their slots.

    Args:
        kv: [B, G, T, D] new keys and values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths_B: int32.
        staged: The buffer [B, G, S, 2, P, D], whose first slots are written, and [B, G, N] int32
            slots of past blocks.
        paged: Pages [B, G, C, 2, P, D] and the block table [B, G, N] int32, for the older tokens
            of the first block.
    """
    (k, v), (staging, slots) = (_rows(tensor) for tensor in kv), staged
    pages, table = paged
    batch, groups, num_pages, _, size, dim = pages.shape
    num_tokens, num_blocks = k.shape[2], table.shape[2]
    _, columns, totals = tokens
    num_new = min(triton.cdiv(num_tokens, size) + 1, num_blocks)
    dims = power_of_two(dim)
    tile = min(power_of_two(size), max(_PACK_TILE // dims, 1))
    launch(_pack_blocks, (num_new, triton.cdiv(size, tile), batch * groups))(
        k, v, columns, totals, lengths_B, table, pages, staging, *k.stride()[:3],
        *v.stride()[:3], groups, num_tokens, num_blocks, num_pages, staging.shape[2], size, tile,
        dim, dims, num_warps=4,
    )  # fmt: skip
    return Prompt(columns, totals, lengths_B, staging, slots)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@triton.jit
def _mark_blocks(
    block_ids, columns_at, marks_at, first, end, num_words,
    SELECTED: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
    BITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Set a bit for each block and token of a tile that reads it."""
    BLOCKS: tl.constexpr = 32 // BITS
    for start in tl.range(0, num_words, TILE):
        word = start + tl.arange(0, TILE)
        tl.store(marks_at + word, word * 0, mask=word < num_words)
    tl.debug_barrier()
    entry = tl.arange(0, LISTED)
    for start in tl.range(first, end, ROWS):
        rank = start + tl.arange(0, ROWS)
        token = rank - first
        real = rank < end
        column = tl.load(columns_at + rank, mask=real, other=0)
        ids_at = block_ids + column.to(tl.int64)[:, None] * SELECTED
        mask = real[:, None] & (entry < SELECTED)[None, :]
        block = tl.load(ids_at + entry[None, :], mask=mask, other=-1)
        shift = (token % 32)[:, None] + block % BLOCKS * BITS
        bit = tl.full([ROWS, LISTED], 1, dtype=tl.int32) << shift
        word = block // BLOCKS * WORDS + (token // 32)[:, None]
        tl.atomic_or(marks_at + word, bit, mask=block >= 0, sem="relaxed")
    tl.debug_barrier()


@triton.jit
def _list_groups(
    marks_at, list_at, num_groups, WORDS: tl.constexpr, BITS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """List the groups of neighbouring blocks of which any is read; return how many, and blocks.

    A group has the blocks that one word has bits of, or one block and several words. Most have
    none that is read: behind a million tokens a tile of 8 reads some 170 blocks, which lie in as
    many of 4,096 groups at most.
    """
    num_listed = tl.zeros([], dtype=tl.int32)
    count = tl.zeros([], dtype=tl.int32)
    every = tl.arange(0, WORDS)
    for start in tl.range(0, num_groups, TILE):
        group = start + tl.arange(0, TILE)
        bits = tl.load(
            marks_at + group[:, None] * WORDS + every[None, :], mask=(group < num_groups)[:, None],
            other=0, cache_modifier=".cg",
        )  # fmt: skip
        is_listed = tl.max((bits != 0).to(tl.int32), axis=1)
        read = is_listed
        if BITS < 32:
            read = tl.zeros([TILE], dtype=tl.int32)
            for place in tl.static_range(32 // BITS):
                own = (bits >> (place * BITS)) & ((1 << BITS) - 1)
                read += tl.max((own != 0).to(tl.int32), axis=1)
        tl.store(list_at + num_listed + tl.cumsum(is_listed, 0) - 1, group, mask=is_listed > 0)
        num_listed += tl.sum(is_listed, 0)
        count += tl.sum(read, 0)
    return num_listed, count


@triton.jit(do_not_specialize=["num_tokens", "first_tile"])
def _tile_unions(
    block_ids, columns, totals, lengths, slots, marks, union_counts, union_ids, readers,
    union_slots, groups, num_tokens, num_blocks, num_marks, num_entries, first_tile, spread,
    SELECTED: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, STAGED: tl.constexpr,
):  # fmt: skip
    # Bits of a block, of which a word has as many as it holds.
    BITS: tl.constexpr = 32 if TOKENS > 32 else TOKENS
    BLOCKS: tl.constexpr = 32 // BITS
    local_tile, pair = tl.program_id(0), tl.program_id(1)
    row, wide, first = pair // groups, pair.to(tl.int64), (first_tile + local_tile) * TOKENS
    length = tl.load(lengths + row)
    end = tl.minimum(tl.load(totals + row) - length, first + TOKENS)
    own = wide * tl.num_programs(0) + local_tile
    marks_at, ids_at = marks + own * num_marks, union_ids + own * num_entries
    readers_at = readers + own * num_entries * WORDS
    # Blocks up to the last token's own; columns of no token may lie behind the last block.
    stop = tl.where(first < end, (length + end * spread - 1) // SIZE + 1, 0)
    stop = stop if STAGED else tl.minimum(stop, num_blocks)
    num_groups = (stop + BLOCKS - 1) // BLOCKS
    _mark_blocks(
        block_ids + wide * num_tokens * SELECTED, columns + row.to(tl.int64) * num_tokens, marks_at,
        first, end, num_groups * WORDS, SELECTED, LISTED, ROWS, WORDS, BITS, TILE,
    )  # fmt: skip
    num_listed, count = _list_groups(marks_at, ids_at, num_groups, WORDS, BITS, TILE)
    tl.store(union_counts + own, count)
    tl.debug_barrier()
    # From the last one on, and all blocks of a group in one turn: so nothing is written where a
    # group is still listed.
    tl.static_assert(TILE % BLOCKS == 0)
    every = tl.arange(0, WORDS)
    tiles = (num_listed * BLOCKS + TILE - 1) // TILE
    for turn in tl.range(0, tiles):
        place = (tiles - 1 - turn) * TILE + tl.arange(0, TILE)
        there = place < num_listed * BLOCKS
        group = tl.load(ids_at + place // BLOCKS, mask=there, other=0, cache_modifier=".cg")
        block = group * BLOCKS + place % BLOCKS
        bits = tl.load(
            marks_at + group[:, None] * WORDS + every[None, :], mask=there[:, None], other=0,
            cache_modifier=".cg",
        )  # fmt: skip
        if BLOCKS > 1:
            bits = (bits >> (block % BLOCKS * BITS)[:, None]) & ((1 << BITS) - 1)
        read = tl.max((bits != 0).to(tl.int32), axis=1) > 0
        count -= tl.sum(read.to(tl.int32), 0)
        rank = count + tl.cumsum(read.to(tl.int32), 0) - 1
        if STAGED:
            new = block - length // SIZE
            staged = tl.load(slots + wide * num_blocks + block, mask=read & (new < 0), other=0)
            tl.store(
                union_slots + own * num_entries + rank, tl.where(new < 0, staged, new), mask=read
            )
        # Ids are written where this turn's groups were listed.
        tl.debug_barrier()
        tl.store(
            readers_at + rank[:, None] * WORDS + every[None, :], bits,
            mask=read[:, None] & (every < WORDS)[None, :],
        )  # fmt: skip
        tl.store(ids_at + rank, block, mask=read)


def unions(
    prompt: Prompt, block_ids_BGTK: Tensor, tokens: int, first_tile: int, num_tiles: int
) -> Unions:
    """Return what tiles of neighbouring tokens read.

    Args:
        prompt: The tokens and the buffer.
        block_ids_BGTK: int32, contiguous.
        tokens: Of one tile, a power of two.
        first_tile: Tile to begin with.
        num_tiles: How many.
    """
    order = (prompt.columns, prompt.totals, prompt.lengths)
    sizes = (prompt.slots.shape[2], prompt.staging.shape[4], 1)
    return _unions(order, block_ids_BGTK, prompt.slots, sizes, (tokens, first_tile, num_tiles))


def listed_unions(
    block_ids_BGTK: Tensor,
    lengths_B: Tensor,
    sizes: tuple[int, int, int],
    tiles: tuple[int, int, int],
) -> Unions:
    """Return what tiles of neighbouring columns name, where blocks lie in their own order.

    Args:
        block_ids_BGTK: int32, contiguous; -1 for none.
        lengths_B: int32, tokens before them.
        sizes: N, P, and how many positions a column may stand for.
        tiles: Columns of one, a power of two; the tile to begin with; and how many.
    """
    batch, _, num_tokens, _ = block_ids_BGTK.shape
    columns = torch.arange(num_tokens, dtype=torch.int32, device=lengths_B.device)
    order = (columns.repeat(batch, 1), lengths_B + num_tokens, lengths_B)
    return _unions(order, block_ids_BGTK, None, sizes, tiles)


def _unions(
    order: tuple[Tensor, Tensor, Tensor],
    block_ids_BGTK: Tensor,
    slots_BGN: Tensor | None,
    sizes: tuple[int, int, int],
    tiles: tuple[int, int, int],
) -> Unions:
    """Return unions; `sizes` and `tiles` as for `listed_unions`.

    Args:
        order: Columns [B, T], totals [B] and lengths [B], as `Prompt` has them.
        block_ids_BGTK: int32.
        slots_BGN: Of past blocks; None where a block's slot is its id.
        sizes: N, P, and how many positions a column may stand for.
        tiles: Tokens of one, the first one, and how many.
    """
    batch, groups, num_tokens, selected = block_ids_BGTK.shape
    (num_blocks, size, spread), (tokens, first_tile, num_tiles) = sizes, tiles
    num_entries, words = union_entries(num_blocks, tokens, selected), union_words(tokens)
    pairs = batch * groups
    shape, new = (pairs, num_tiles), order[0].new_empty
    counts, ids = new(shape), new((*shape, num_entries))
    is_staged = slots_BGN is not None
    slots = new((*shape, num_entries)) if is_staged else ids
    readers = new((*shape, num_entries, words))
    num_marks = mark_words(num_blocks, tokens)
    marks = new((*shape, num_marks))
    listed = power_of_two(selected)
    launch(_tile_unions, (num_tiles, pairs))(
        block_ids_BGTK, *order, ids if slots_BGN is None else slots_BGN, marks,
        counts, ids, readers, slots, groups, num_tokens, num_blocks, num_marks, num_entries,
        first_tile, spread,
        selected, listed, min(max(_IDS // listed, 1), tokens), tokens, words, size, _TILE,
        is_staged, num_warps=4,
    )  # fmt: skip
    return Unions(counts, ids, readers, slots)


def all_blocks(prompt: Prompt, tokens: int) -> Unions:
    """Return what tiles read where each token reads all blocks up to its own.

    Args:
        prompt: The tokens and the buffer, with a slot for each past block.
        tokens: Of one tile, a power of two.
    """
    batch, groups, num_blocks = prompt.slots.shape
    block = torch.arange(num_blocks, dtype=torch.int32, device=prompt.slots.device)
    new = block - (prompt.lengths // prompt.staging.shape[4])[:, None, None]
    shape = (batch * groups, 1, num_blocks)
    slots = torch.where(new < 0, prompt.slots, new).reshape(shape)
    readers = prompt.slots.new_full((*shape, union_words(tokens)), -1)
    return Unions(None, block.expand(shape).contiguous(), readers, slots)
