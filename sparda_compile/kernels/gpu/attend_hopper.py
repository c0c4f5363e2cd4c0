"""Attention of a tile of a prompt's tokens over the union of their blocks, for Hopper GPUs.

The same as `attend_tokens.py`, in Gluon, which says what each warp does:

    keys      one warp brings the keys of the union to shared memory, block by block
    values    one warp brings the values
    halves    two groups of four warps have half of the 128 rows each

Each block is brought once for both halves; a half multiplies those that its own tokens read, two a
turn. While it makes weights of a pair's scores, the matrix unit sums up the values of the pair
before. A half knows of each of its blocks, from one word that it loads a turn ahead, where it lies,
who reads it, and whether a token sees only some of it.

On one H200 it takes 0.86 of the time of the kernel in Triton for a layer's 1M tokens with drawn
sets (`benchmarks/results/2026-11-30-h200-prompt-hopper.json`, which has other forms too), and
multiplies at 510 TFLOP/s. Queries in registers cost ptxas some of those that sums need: 3% slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import MockTensor

from sparda_compile.kernels.gpu.attention import score_factors
from sparda_compile.kernels.gpu.hopper_blocks import (
    LAST,
    PLACE,
    PLACES,
    await_block,
    bring,
    free_pair,
    hold,
    list_entries,
)
from sparda_compile.kernels.gpu.launch import address_of, launch, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.gpu.token_blocks import Prompt, Unions

__all__ = ["attend_unions"]

_HALF = gl.constexpr(64)


@gluon.jit
def _load_queries(
    query, buffer, columns_at, first_rank, num_real, q_head, q_token,
    HALF: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    line = HALF * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, layout))
    rank, head = first_rank + line // ROOM, line % ROOM
    inside = (rank < num_real) & (head < HEADS)
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
def _seen(scores, word, position, token, factor, cap, SIZE: gl.constexpr, SOFTCAP: gl.constexpr):
    """Cap scores, and leave out those of later tokens, which the last two blocks have."""
    if SOFTCAP:
        scores = cap * (1.0 - 2.0 / (gl.exp2(scores * factor) + 1.0))
    last = word >> LAST
    if last != 0:
        limit = position - (last - 1) * SIZE
        scores = gl.where(token[None, :] <= limit[:, None], scores, float("-inf"))
    return scores


@gluon.jit
def _weights(
    a, b, word_a, word_b, reader, position, token, peak, factor, cap,
    SIZE: gl.constexpr, SOFTCAP: gl.constexpr,
):  # fmt: skip
    """Return the weights of two blocks, how much those before fade, and the new peaks."""
    a = _seen(a, word_a, position, token, factor, cap, SIZE, SOFTCAP)
    b = _seen(b, word_b, position, token, factor, cap, SIZE, SOFTCAP)
    if SOFTCAP:
        factor = 1.0
    reads_a = (word_a >> reader) & 1 != 0
    reads_b = (word_b >> reader) & 1 != 0
    peak_a = gl.where(reads_a, gl.max(a, axis=1) * factor, float("-inf"))
    peak_b = gl.where(reads_b, gl.max(b, axis=1) * factor, float("-inf"))
    new_peak = gl.maximum(peak, gl.maximum(peak_a, peak_b))
    safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights_a = gl.exp2(a * factor - gl.where(reads_a, safe, float("inf"))[:, None])
    weights_b = gl.exp2(b * factor - gl.where(reads_b, safe, float("inf"))[:, None])
    return weights_a, weights_b, gl.exp2(peak - safe), new_peak


@gluon.jit
def _scores_of(q, keys, word, SIZE: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    none = gl.full([_HALF, SIZE], 0.0, gl.float32, layout)
    keys_at = keys.index((word >> PLACE) & 15).permute((1, 0))
    return warpgroup_mma(q, keys_at, none, use_acc=False, is_async=True)


@gluon.jit
def _begin_scores(
    q, keys, a, b, phases, ready, HALF: gl.constexpr, SIZE: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Begin the products of the queries and two blocks' keys, when these are there."""
    phases = await_block(a, phases, ready, HALF, PLACES)
    scores_a = _scores_of(q, keys, a, SIZE)
    phases = await_block(b, phases, ready, HALF, PLACES)
    return scores_a, _scores_of(q, keys, b, SIZE), phases


@gluon.jit
def _begin_sums(
    weights_a, weights_b, values, a, b, sums, phases, ready, HALF: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """Begin to add two blocks' values by their weights, when these are there."""
    phases = await_block(a, phases, ready, HALF, PLACES)
    sums = warpgroup_mma(weights_a, values.index((a >> PLACE) & 15), sums, is_async=True)
    phases = await_block(b, phases, ready, HALF, PLACES)
    return warpgroup_mma(weights_b, values.index((b >> PLACE) & 15), sums, is_async=True), phases


@gluon.jit
def _sum_half(
    q, words_at, pairs, keys, keys_ready, keys_free, values, values_ready, values_free,
    first_position, factor, cap,
    HALF: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr, DIM: gl.constexpr,
    SOFTCAP: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Return the weighted sums of values of half of the rows, and the sums of weights."""
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    sums_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_in: gl.constexpr = gl.DotOperandLayout(0, sums_in, 2)
    reader = gl.arange(0, _HALF, layout=gl.SliceLayout(1, scores_in)) // ROOM
    position = first_position % SIZE + reader
    token = gl.arange(0, SIZE, layout=gl.SliceLayout(0, scores_in))
    peak = gl.full([_HALF], float("-inf"), gl.float32, gl.SliceLayout(1, scores_in))
    sums = gl.full([_HALF, DIM], 0.0, gl.float32, sums_in)
    a, b = gl.load(words_at), gl.load(words_at + 1)
    next_a = gl.load(words_at + 2, mask=pairs > 1, other=0)
    next_b = gl.load(words_at + 3, mask=pairs > 1, other=0)
    value_phases = pairs * 0
    first_a, first_b, key_phases = _begin_scores(
        q, keys, a, b, pairs * 0, keys_ready, HALF, SIZE, PLACES
    )
    scores_a, scores_b = warpgroup_mma_wait(0, deps=(first_a, first_b))
    free_pair(a, b, keys_free, HALF, PLACES)
    weights_a, weights_b, fade, peak = _weights(
        scores_a, scores_b, a, b, reader, position, token, peak, factor, cap, SIZE, SOFTCAP
    )
    total = gl.sum(weights_a + weights_b, axis=1)
    weights_a = gl.convert_layout(weights_a.to(keys.dtype), weights_in)
    weights_b = gl.convert_layout(weights_b.to(keys.dtype), weights_in)
    for number in range(1, pairs):
        far = number + 1 < pairs
        far_a = gl.load(words_at + 2 * number + 2, mask=far, other=0)
        far_b = gl.load(words_at + 2 * number + 3, mask=far, other=0)
        coming_a, coming_b, key_phases = _begin_scores(
            q, keys, next_a, next_b, key_phases, keys_ready, HALF, SIZE, PLACES
        )
        summed, value_phases = _begin_sums(
            weights_a, weights_b, values, a, b, sums, value_phases, values_ready, HALF, PLACES
        )
        scores_a, scores_b = warpgroup_mma_wait(2, deps=(coming_a, coming_b))
        free_pair(next_a, next_b, keys_free, HALF, PLACES)
        new_a, new_b, fade, peak = _weights(
            scores_a, scores_b, next_a, next_b, reader, position, token, peak, factor, cap, SIZE,
            SOFTCAP,
        )  # fmt: skip
        total = total * fade + gl.sum(new_a + new_b, axis=1)
        hold(b, value_phases, values_ready, HALF, PLACES)
        sums, new_a, new_b = warpgroup_mma_wait(0, deps=(summed, new_a, new_b))
        free_pair(a, b, values_free, HALF, PLACES)
        sums *= gl.convert_layout(fade, gl.SliceLayout(1, sums_in))[:, None]
        weights_a = gl.convert_layout(new_a.to(keys.dtype), weights_in)
        weights_b = gl.convert_layout(new_b.to(keys.dtype), weights_in)
        a, b, next_a, next_b = next_a, next_b, far_a, far_b
    summed, _ = _begin_sums(
        weights_a, weights_b, values, a, b, sums, value_phases, values_ready, HALF, PLACES
    )
    sums = warpgroup_mma_wait(0, deps=(summed,))
    # The other half may have more blocks, which need these places.
    free_pair(a, b, values_free, HALF, PLACES)
    return sums, total


@gluon.jit
def _attend_half(
    query, out, columns_at, words, own_counts, queries, keys, values, keys_ready, keys_free,
    values_ready, values_free, length, first_rank, own, num_real, num_tokens, num_words, first_head,
    num_heads, q_head, q_token, factor, cap,
    HALF: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr,
    DIM: gl.constexpr, SOFTCAP: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """Attend for half of the rows."""
    scores_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    sums_in: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    words_at = words + (own * 2 + HALF) * num_words
    pairs = (gl.load(own_counts + own * 2 + HALF) + 1) // 2
    sums = gl.full([_HALF, DIM], 0.0, gl.float32, sums_in)
    total = gl.full([_HALF], 0.0, gl.float32, gl.SliceLayout(1, scores_in))
    if pairs > 0:
        q = queries.index(HALF)
        _load_queries(
            query, q, columns_at, first_rank, num_real, q_head, q_token, HALF, HEADS, ROOM, DIM
        )
        sums, total = _sum_half(
            q, words_at, pairs, keys, keys_ready, keys_free, values, values_ready, values_free,
            length + first_rank + HALF * _HALF // ROOM, factor, cap, HALF, ROOM, SIZE, DIM, SOFTCAP,
            PLACES,
        )  # fmt: skip
    _store(
        sums, total, out, columns_at, first_rank, num_tokens, first_head, num_heads, HALF, HEADS,
        ROOM, DIM,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tokens", "num_slots", "first_tile"])
def _attend_tile(
    staging, query, out, columns, totals, lengths, union_counts, words, own_counts, brought,
    factor, cap, q_row, q_head, q_token, groups, num_tokens, num_entries, num_words, num_slots,
    first_tile,
    HEADS: gl.constexpr, ROOM: gl.constexpr, SIZE: gl.constexpr, DIM: gl.constexpr,
    SOFTCAP: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    local_tile, pair = gl.program_id(0), gl.program_id(1)
    row, group = pair // groups, pair % groups
    keys = gl.allocate_shared_memory(staging.dtype, [PLACES, SIZE, DIM], staging.layout)
    values = gl.allocate_shared_memory(staging.dtype, [PLACES, SIZE, DIM], staging.layout)
    in_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_HALF, DIM], staging.dtype)
    queries = gl.allocate_shared_memory(staging.dtype, [2, _HALF, DIM], in_queries)
    in_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    keys_ready = gl.allocate_shared_memory(gl.int64, [3 * PLACES, 1], in_barriers)
    keys_free = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], in_barriers)
    values_ready = gl.allocate_shared_memory(gl.int64, [3 * PLACES, 1], in_barriers)
    values_free = gl.allocate_shared_memory(gl.int64, [2 * PLACES, 1], in_barriers)
    for place in gl.static_range(3 * PLACES):
        mbarrier.init(keys_ready.index(place), count=1)
        mbarrier.init(values_ready.index(place), count=1)
    for place in gl.static_range(2 * PLACES):
        mbarrier.init(keys_free.index(place), count=1)
        mbarrier.init(values_free.index(place), count=1)
    first_rank = (first_tile + local_tile) * (2 * _HALF // ROOM)
    own = pair.to(gl.int64) * gl.num_programs(0) + local_tile
    count = gl.load(union_counts + own)
    length = gl.load(lengths + row)
    num_real = gl.load(totals + row) - length
    query_at = query + row.to(gl.int64) * q_row + (group * HEADS).to(gl.int64) * q_head
    out_at = out + row.to(gl.int64) * num_tokens * (groups * HEADS * DIM)
    columns_at = columns + row.to(gl.int64) * num_tokens
    brought_at = brought + own * num_entries
    first_slot = pair * num_slots
    gl.warp_specialize(
        [
            (_attend_half, (
                query_at, out_at, columns_at, words, own_counts, queries, keys, values, keys_ready,
                keys_free, values_ready, values_free, length, first_rank, own, num_real,
                num_tokens, num_words, group * HEADS, groups * HEADS, q_head, q_token, factor, cap,
                gl.constexpr(0), HEADS, ROOM, SIZE, DIM, SOFTCAP, PLACES,
            )),
            (_attend_half, (
                query_at, out_at, columns_at, words, own_counts, queries, keys, values, keys_ready,
                keys_free, values_ready, values_free, length, first_rank, own, num_real,
                num_tokens, num_words, group * HEADS, groups * HEADS, q_head, q_token, factor, cap,
                gl.constexpr(1), HEADS, ROOM, SIZE, DIM, SOFTCAP, PLACES,
            )),
            (bring, (
                staging, brought_at, first_slot, count, keys, keys_ready, keys_free, SIZE,
                gl.constexpr(0), PLACES,
            )),
            (bring, (
                staging, brought_at, first_slot, count, values, values_ready, values_free, SIZE,
                SIZE, PLACES,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


def _descriptor(staging: Tensor) -> TensorDescriptor:
    """Return what brings a block; it has no address where launches are collected."""
    size, dim = staging.shape[4:]
    dtype = gl.bfloat16 if staging.dtype == torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([size, dim], dtype)
    lines = staging.view(-1, dim)
    base = lines if address_of(lines) else MockTensor(lines.dtype, lines.shape)
    return TensorDescriptor(base, list(lines.shape), list(lines.stride()), [size, dim], layout)


def attend_unions(
    query_BHTD: Tensor,
    prompt: Prompt,
    union: Unions,
    out: Tensor,
    first_tile: int,
    factors: tuple[float, float],
) -> None:
    """Attend for some tiles of `HALVES_ROWS` rows; see `attend_tokens.attend_unions`."""
    _, heads, num_tokens, dim = query_BHTD.shape
    groups = prompt.slots.shape[1]
    staging = prompt.staging
    room, size = power_of_two(heads // groups), staging.shape[4]
    words, own_counts, brought = list_entries(union, prompt, first_tile, room)
    pairs, tiles, num_entries = brought.shape
    launch(_attend_tile, (tiles, pairs))(
        _descriptor(staging), query_BHTD, out, prompt.columns, prompt.totals, prompt.lengths,
        union.counts, words, own_counts, brought, *score_factors(*factors),
        *query_BHTD.stride()[:3], groups, num_tokens, num_entries, num_entries + 1,
        staging.shape[2], first_tile, heads // groups, room, size, dim, factors[1] != 0.0, PLACES,
        num_warps=4,
    )  # fmt: skip
