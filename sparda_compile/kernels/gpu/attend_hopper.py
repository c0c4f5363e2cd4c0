"""Attention of a tile of a prompt's tokens over the union of their blocks, for Hopper GPUs.

The same as `attend_tokens.py`, in Gluon, which says what each warp does:

    keys      one warp brings the keys of the union to shared memory, block by block
    values    one warp brings the values
    halves    two groups of four warps have half of the 128 rows each

A half multiplies the blocks that its own tokens read, so that it multiplies no more than a tile of
64 rows would, and each block is read for both. While it makes weights of one block's scores, the
matrix unit makes the scores of the next one, and sums up the values of the one before.

A half passes by the blocks that it does not read: it waits until they are there and frees their
place. So it is never more than a round of places ahead of a copy, which is as much as a barrier of
this kind can tell apart. Keys and values have barriers and a warp of their own: a half that waits
for its next keys still has values to free.

Nobody waits for ever. Let S be the places, o1 < o2 < ... the blocks of a half. While it waits for
keys y <= o(n+1), it has freed the values before o(n-1). The other one can only be in its way if it
waits for values x >= o(n-1) + S and has not freed the keys y - S > x: then y > o(n-1) + 2 S. That
is impossible where neighbouring blocks of a half are at most S apart; so of a longer run of blocks
that a half does not read, it multiplies some, without any weight.

Behind the last block lie keys of any block, which nobody uses: the next scores are always begun.

On one H200, for 16384 tokens behind 131072 with 96 blocks each, of which neighbours share nine
tenths: `benchmarks/results/2026-11-29-h200-prompt-attention-variants.json` has the kernel that
multiplies all blocks of the union for both halves, as `B`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparda_compile.kernels.gpu.launch import launch, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.token_blocks import Prompt, Unions

__all__ = ["ROWS", "attend_unions", "covers", "list_entries"]

ROWS: Final = 128
# Places for keys, and as many for values; no run of blocks that a half leaves out is as long.
_STAGES: Final = 5
_TILE: Final = 512
_LOG2_E: Final = math.log2(math.e)
_HALF = gl.constexpr(64)
# Triton 3.6 has it under the first name, 3.9 under the second.
_load: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@triton.jit
def _own_entries(
    readers, union_counts, entries, own_counts, num_blocks, num_entries,
    READERS: tl.constexpr, SHARED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List the entries of a union that tokens of one half read, and of others every fifth or so.

    An entry that nobody reads, like the two before it, is listed if its number is divisible by 3:
    so two neighbours of the list are at most 5 apart, and the first is entry 0 where nobody reads.
    """
    tile, pair, half = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own = pair.to(tl.int64) * tl.num_programs(0) + tile
    readers_at, entries_at = readers + own * num_blocks, entries + (own * 2 + half) * num_entries
    total = tl.load(union_counts + own)
    first = 0 if SHARED else half * READERS
    count = total * 0
    for start in tl.range(0, total, TILE):
        entry = start + tl.arange(0, TILE)
        inside = entry < total
        near = tl.load(readers_at + entry, mask=inside, other=0)
        near |= tl.load(readers_at + entry - 1, mask=inside & (entry > 0), other=0)
        near |= tl.load(readers_at + entry - 2, mask=inside & (entry > 1), other=0)
        bits = tl.load(readers_at + entry, mask=inside, other=0)
        every = (1 << READERS) - 1
        is_read = ((bits >> first) & every) != 0
        is_listed = inside & (is_read | ((((near >> first) & every) == 0) & (entry % 3 == 0)))
        rank = count + tl.cumsum(is_listed.to(tl.int32), 0) - 1
        tl.store(entries_at + rank, entry, mask=is_listed)
        count += tl.sum(is_listed.to(tl.int32), 0)
    tl.store(own_counts + own * 2 + half, count)


@gluon.jit
def _bring(
    staging, slots_at, first_slot, count, loads, buffers, ready, free, SIZE: gl.constexpr,
    OFFSET: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Bring keys, or values, of the union's blocks to shared memory."""
    for entry in range(loads):
        stage = entry % STAGES
        known = gl.minimum(entry, count - 1)
        slot = gl.load(slots_at + gl.maximum(known, 0), mask=known >= 0, other=0)
        row = (first_slot + slot) * (2 * SIZE) + OFFSET
        mbarrier.wait(free.index(stage), (entry // STAGES) & 1 ^ 1)
        mbarrier.expect(ready.index(stage), staging.block_type.nbytes)
        _load(staging, [row, 0], ready.index(stage), buffers.index(stage))


@gluon.jit
def _pass_by(begin, end, ready, free, STAGES: gl.constexpr):
    """Wait for keys, or values, that this half does not read, and free their places."""
    for entry in range(begin, end):
        mbarrier.wait(ready.index(entry % STAGES), (entry // STAGES) & 1)
        mbarrier.arrive(free.index(entry % STAGES), count=1)


@gluon.jit
def _free_last(entry, free, STAGES: gl.constexpr):
    """Free the place of an entry that was read, if there was one."""
    mbarrier.arrive(free.index(gl.maximum(entry, 0) % STAGES), count=1, pred=entry >= 0)


@gluon.jit
def _load_queries(
    query, buffer, columns_at, first_rank, num_tokens, q_head, q_token,
    HALF: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    line = HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, layout))
    rank, head = first_rank + line // ROOM, line % ROOM
    inside = (rank < num_tokens) & (head < HEADS)
    column = gl.load(columns_at + rank, mask=inside, other=0).to(gl.int64)
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    at = query + head.to(gl.int64)[:, None] * q_head + column[:, None] * q_token + dims[None, :]
    buffer.store(gl.load(at, mask=inside[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def _store(
    sums, total, out, columns_at, first_rank, num_tokens, first_head, num_heads,
    HALF: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = sums.type.layout
    total = gl.convert_layout(total, gl.SliceLayout(1, layout))
    result = sums / gl.where(total == 0.0, 1.0, total)[:, None]
    line = HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, layout))
    rank, head = first_rank + line // ROOM, line % ROOM
    inside = (rank < num_tokens) & (head < HEADS)
    column = gl.load(columns_at + rank, mask=inside, other=0)
    place = column.to(gl.int64) * num_heads + first_head + head
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, layout))
    at = out + place[:, None] * DIM + dims[None, :]
    gl.store(at, result.to(out.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def _weights(scores, limit, token, peak, factor, cap, SOFTCAP: gl.constexpr):
    """Return the weights of one block, how much those before fade, and the new peaks."""
    if SOFTCAP:
        scores = cap * (1.0 - 2.0 / (gl.exp2(scores * factor) + 1.0))
        factor = 1.0
    scores = gl.where(token[None, :] <= limit[:, None], scores, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(scores, axis=1) * factor)
    safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    return gl.exp2(scores * factor - safe[:, None]), gl.exp2(peak - safe), new_peak


@gluon.jit
def _scores_of(q, keys, ready, entry, SIZE: gl.constexpr, STAGES: gl.constexpr):
    """Begin the product of the queries and an entry's keys, when these are there."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    stage = entry % STAGES
    mbarrier.wait(ready.index(stage), (entry // STAGES) & 1)
    none = gl.full([_HALF, SIZE], 0.0, gl.float32, layout)
    keys_at = keys.index(stage).permute((1, 0))
    return warpgroup_mma(q, keys_at, none, use_acc=False, is_async=True)


@gluon.jit
def _sum_half(
    q, entries_at, num_own, ids_at, readers_at, count, keys, keys_ready, keys_free, values,
    values_ready, values_free, first_position, factor, cap,
    HALF: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr, DIM: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Return the weighted sums of values of half of the rows, and the sums of weights."""
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    sums_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_in: gl.constexpr = gl.DotOperandLayout(0, sums_in, 2)
    reader = (HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, scores_in))) // ROOM
    token = gl.arange(0, SIZE, layout=gl.SliceLayout(0, scores_in))
    peak = gl.full([_HALF], float("-inf"), gl.float32, gl.SliceLayout(1, scores_in))
    total = gl.full([_HALF], 0.0, gl.float32, gl.SliceLayout(1, scores_in))
    sums = warpgroup_mma_init(gl.full([_HALF, DIM], 0.0, gl.float32, sums_in))
    entry = gl.load(entries_at, mask=num_own > 0, other=count)
    last = gl.maximum(count - 1, 0)
    block = gl.load(ids_at + gl.minimum(entry, last))
    bits = gl.load(readers_at + gl.minimum(entry, last))
    _pass_by(0, entry, keys_ready, keys_free, STAGES)
    coming = _scores_of(q, keys, keys_ready, entry, SIZE, STAGES)
    # In the loop, one product may still be under way when the scores are awaited. Here it is them.
    coming = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(coming,)))
    before = entry * 0 - 1
    for number in range(num_own):
        after = gl.load(entries_at + number + 1, mask=number + 1 < num_own, other=count)
        next_block = gl.load(ids_at + gl.minimum(after, last))
        next_bits = gl.load(readers_at + gl.minimum(after, last))
        scores = warpgroup_mma_wait(1, deps=(coming,))
        mbarrier.arrive(keys_free.index(entry % STAGES), count=1)
        _pass_by(entry + 1, after, keys_ready, keys_free, STAGES)
        coming = _scores_of(q, keys, keys_ready, after, SIZE, STAGES)
        # The last token of the block that a row sees.
        limit = first_position + reader - block * SIZE
        limit = gl.where((bits >> reader) & 1 != 0, limit, -1)
        weight, fade, peak = _weights(scores, limit, token, peak, factor, cap, SOFTCAP)
        total = total * fade + gl.sum(weight, axis=1)
        fade = gl.convert_layout(fade, gl.SliceLayout(1, sums_in))
        weight = gl.convert_layout(weight.to(keys.dtype), weights_in)
        summed = warpgroup_mma_wait(1, deps=(sums,))
        _free_last(before, values_free, STAGES)
        _pass_by(before + 1, entry, values_ready, values_free, STAGES)
        mbarrier.wait(values_ready.index(entry % STAGES), (entry // STAGES) & 1)
        faded = warpgroup_mma_init(summed * fade[:, None])
        sums = warpgroup_mma(weight, values.index(entry % STAGES), faded, is_async=True)
        before, entry, block, bits = entry, after, next_block, next_bits
    warpgroup_mma_wait(0, deps=(coming,))
    result = warpgroup_mma_wait(0, deps=(sums,))
    _free_last(before, values_free, STAGES)
    _pass_by(before + 1, count, values_ready, values_free, STAGES)
    return result, total


@gluon.jit
def _attend_half(
    query, out, columns_at, entries, own_counts, ids_at, readers_at, keys, values, queries,
    keys_ready, keys_free, values_ready, values_free, count, length, first_rank, own,
    num_tokens, num_entries, first_head, num_heads, q_head, q_token, factor, cap,
    HALF: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr,
    DIM: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attend for half of the rows."""
    q = queries.index(HALF)
    _load_queries(
        query, q, columns_at, first_rank, num_tokens, q_head, q_token, HALF, HEADS, ROOM, DIM
    )
    entries_at = entries + (own * 2 + HALF) * num_entries
    num_own = gl.load(own_counts + own * 2 + HALF)
    sums, total = _sum_half(
        q, entries_at, num_own, ids_at, readers_at, count, keys, keys_ready, keys_free, values,
        values_ready, values_free, length + first_rank, factor, cap, HALF, ROOM, SIZE, DIM,
        SOFTCAP, STAGES,
    )  # fmt: skip
    _store(
        sums, total, out, columns_at, first_rank, num_tokens, first_head, num_heads, HALF, HEADS,
        ROOM, DIM,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "num_slots", "first_tile"])
def _attend_tile(
    staging, query, out, columns, lengths, union_counts, union_ids, readers, union_slots, entries,
    own_counts, factor, cap, q_row, q_head, q_token, groups, num_tokens, num_blocks, num_entries,
    num_slots, first_tile,
    HEADS: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr, DIM: gl.constexpr,
    SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    local_tile, pair = gl.program_id(0), gl.program_id(1)
    row, group = pair // groups, pair % groups
    keys = gl.allocate_shared_memory(staging.dtype, [STAGES, SIZE, DIM], staging.layout)
    values = gl.allocate_shared_memory(staging.dtype, [STAGES, SIZE, DIM], staging.layout)
    in_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_HALF, DIM], staging.dtype)
    queries = gl.allocate_shared_memory(staging.dtype, [2, _HALF, DIM], in_queries)
    in_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    keys_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], in_barriers)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], in_barriers)
    values_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], in_barriers)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], in_barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_ready.index(stage), count=1)
        mbarrier.init(values_ready.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2)
        mbarrier.init(values_free.index(stage), count=2)
    first_rank = (first_tile + local_tile) * (2 * _HALF // ROOM)
    own = pair.to(gl.int64) * gl.num_programs(0) + local_tile
    count = gl.load(union_counts + own)
    length = gl.load(lengths + row)
    query_at = query + row.to(gl.int64) * q_row + (group * HEADS).to(gl.int64) * q_head
    out_at = out + row.to(gl.int64) * num_tokens * (groups * HEADS * DIM)
    columns_at = columns + row.to(gl.int64) * num_tokens
    ids_at, slots_at = union_ids + own * num_entries, union_slots + own * num_entries
    readers_at = readers + own * num_blocks
    first_slot = pair * num_slots
    gl.warp_specialize(
        [
            (_attend_half, (
                query_at, out_at, columns_at, entries, own_counts, ids_at, readers_at, keys, values,
                queries, keys_ready, keys_free, values_ready, values_free, count, length,
                first_rank, own, num_tokens, num_entries, group * HEADS, groups * HEADS, q_head,
                q_token, factor, cap, gl.constexpr(0), HEADS, ROOM, SIZE, DIM, SOFTCAP, STAGES,
            )),
            (_attend_half, (
                query_at, out_at, columns_at, entries, own_counts, ids_at, readers_at, keys, values,
                queries, keys_ready, keys_free, values_ready, values_free, count, length,
                first_rank, own, num_tokens, num_entries, group * HEADS, groups * HEADS, q_head,
                q_token, factor, cap, gl.constexpr(1), HEADS, ROOM, SIZE, DIM, SOFTCAP, STAGES,
            )),
            (_bring, (
                staging, slots_at, first_slot, count, count + 1, keys, keys_ready, keys_free,
                SIZE, gl.constexpr(0), STAGES,
            )),
            (_bring, (
                staging, slots_at, first_slot, count, count, values, values_ready, values_free,
                SIZE, SIZE, STAGES,
            )),
        ],
        [4, 1, 1],
        [216, 24, 24],
    )  # fmt: skip


def covers(query_BHTD: Tensor, staging: Tensor) -> bool:
    """Whether the kernel attends for such queries and blocks.

    Args:
        query_BHTD: Queries.
        staging: [B, G, S, 2, P, D].
    """
    size, dim = staging.shape[4:]
    room = power_of_two(query_BHTD.shape[1] // staging.shape[1])
    # Readers of a tile are the bits of one word.
    fits = size == 64 and dim in (64, 128) and ROWS // 32 <= room <= ROWS
    return fits and query_BHTD.dtype in (torch.float16, torch.bfloat16)


def list_entries(
    readers: Tensor, counts: Tensor, entries: Tensor, own_counts: Tensor, room: int
) -> None:
    """List the entries of unions that either half multiplies.

    Args:
        readers: [pairs, tiles, N, 1] int32, of `Unions`.
        counts: [pairs, tiles] int32, of `Unions`.
        entries: [pairs, tiles, 2, U] int32, written.
        own_counts: [pairs, tiles, 2] int32, written.
        room: Rows of a token, a power of two.
    """
    pairs, tiles, num_blocks, _ = readers.shape
    launch(_own_entries, (tiles, pairs, 2))(
        readers, counts, entries, own_counts, num_blocks, entries.shape[3], max(64 // room, 1),
        room > 64, _TILE, num_warps=4,
    )  # fmt: skip


def attend_unions(
    query_BHTD: Tensor,
    prompt: Prompt,
    union: Unions,
    out: Tensor,
    first_tile: int,
    factors: tuple[float, float],
) -> None:
    """Attend for some tiles of `ROWS` rows; see `attend_tokens.attend_unions`."""
    _, heads, num_tokens, dim = query_BHTD.shape
    groups, num_blocks = prompt.slots.shape[1:]
    staging, (scale, softcap) = prompt.staging, factors
    room, size = power_of_two(heads // groups), staging.shape[4]
    (pairs, tiles), num_entries = union.counts.shape, union.block_ids.shape[2]
    entries = union.block_ids.new_empty((pairs, tiles, 2, num_entries))
    own_counts = union.counts.new_empty((pairs, tiles, 2))
    list_entries(union.readers, union.counts, entries, own_counts, room)
    dtype = gl.bfloat16 if query_BHTD.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([size, dim], dtype)
    blocks = TensorDescriptor.from_tensor(staging.view(-1, dim), [size, dim], layout)
    factor = _LOG2_E * (2.0 * scale / softcap if softcap else scale)
    launch(_attend_tile, (tiles, pairs))(
        blocks, query_BHTD, out, prompt.columns, prompt.lengths, union.counts, union.block_ids,
        union.readers, union.slots, entries, own_counts, factor, softcap * _LOG2_E,
        *query_BHTD.stride()[:3], groups, num_tokens, num_blocks, num_entries, staging.shape[2],
        first_tile, heads // groups, room, size, dim, softcap != 0.0, _STAGES, num_warps=4,
    )  # fmt: skip
