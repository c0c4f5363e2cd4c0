"""Decode attention over the selected blocks: partial results of splits, then their merge.

    split s = blocks of the ids s*n .. s*n + n-1                    n = `blocks_per_split`
    o_s, lse_s = softmax(q K^T * scale) V over the split            one program, online softmax
    merge      : lse = logsumexp_s lse_s ;  o = sum_s exp(lse_s - lse) o_s

Query heads of a group are the rows of one tile, so every key and value is read once. Attending in
two parts, to hits and then to what was missed, gives the bits of attending at once: each split and
the merge compute the same in every form of the kernels.
Floor: K*2*P*D elements per sequence and group at the device's bandwidth.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.early import await_last, begin_next, launch_early
from sparda_compile.kernels.gpu.launch import (
    as_written,
    interpreting,
    launch,
    power_of_two,
    rows_of,
    shared_bytes,
)
from sparda_compile.kernels.gpu.tiles import (
    PageForm,
    first_page,
    page_size,
    pages_of,
    read_tile,
    tail_at,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.paged import Stored


__all__ = ["attend", "merge", "partials", "scaled_scores", "score_factors"]

# Measured on H200s (head_dim 128, blocks of 64, bf16) with 2 to 256 pairs of sequence and KV head.
# A program takes two tiles a turn, with one softmax, and has two turns in flight: it has a
# multiprocessor to itself. Ids are read a turn ahead: Triton divides the stages among loads that
# wait for each other. They are read before the tiles of their turn, behind which they would queue.
# What a turn waits for itself, a sum across warps above all, is late for the memory, too.
# `benchmarks/results/2026-11-26-h200-attention-turns.json`
_STAGES: Final = 3
_WARPS: Final = 4
_TILE: Final = 64
# Of keys, and as many of values; vectors that are too long for it are read fewer at a time.
_TILE_BYTES: Final = 16 * 1024
_MERGE_TILE: Final = 8192
_LOG2_E: Final = math.log2(math.e)
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def _ids_of(block_ids, page_ids, tile, end, ROOM: tl.constexpr, TOKENS: tl.constexpr):
    """Return block and page of a tile, or of each of its tokens if it is of many blocks."""
    if TOKENS > ROOM:
        entry = tile * (TOKENS // ROOM) + tl.arange(0, TOKENS) // ROOM
    else:
        entry = tile // (ROOM // TOKENS)
    block = tl.load(block_ids + entry, mask=entry < end, other=-1)
    page = tl.load(page_ids + entry, mask=entry < end, other=0)
    return block, page


@triton.jit
def scaled_scores(q, keys, seen, factor, cap, SOFTCAP: tl.constexpr):  # noqa: ANN201
    """Return scores times log2(e): their exponential is then a power of two, which is one step."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * factor
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends
        scores = cap * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))
    return tl.where(seen[None, :], scores, float("-inf"))


def score_factors(scale: float, softcap: float) -> tuple[float, float]:
    """Return the factor on q . k, and the cap, with which scores come out times log2(e)."""
    return _LOG2_E * (2.0 * scale / softcap if softcap else scale), softcap * _LOG2_E


@triton.jit
def _partials(
    query, pages, tail, page_ids, block_ids, is_miss, lengths, out, lse, factor, cap,
    q_row, q_head, groups, num_pages, splits,
    SELECTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, TOKENS: tl.constexpr, TURNS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, EACH: tl.constexpr, PICK: tl.constexpr,
    SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    length = tl.load(lengths + row)
    head = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    first = split * BLOCKS
    runs = True
    if PICK:
        number = tl.arange(0, EACH)
        there = (number < BLOCKS) & (first + number < SELECTED)
        flags = tl.load(is_miss + pair * SELECTED + first + number, mask=there, other=0)
        has_miss = tl.max(flags.to(tl.int32), 0)
        runs = has_miss > 0 if PICK == 2 else has_miss == 0
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    totals = tl.zeros([ROWS, TOKENS], dtype=tl.float32)  # by place in a tile
    acc = tl.zeros([ROWS, DIMS], dtype=tl.float32)
    if runs:
        q = tl.load(
            query + row * q_row + (group * HEADS + head[:, None]) * q_head + dims[None, :],
            mask=(head[:, None] < HEADS) & is_dim[None, :],
            other=0.0,
        )
        if INTERPRETED:
            q = q.to(tl.float32)
        mine = first_page(pages, pair, num_pages, SIZE, DIM, RUN)
        written = tail_at(tail, pair, SIZE, DIM)
        blocks_at = block_ids + pair * SELECTED + first
        pages_at = page_ids + pair * SELECTED + first
        end = tl.minimum(BLOCKS, SELECTED - first)
        block, page = _ids_of(blocks_at, pages_at, 0, end, ROOM, TOKENS)
        block2, page2 = _ids_of(blocks_at, pages_at, 1, end, ROOM, TOKENS)
        for turn in tl.range(TURNS, num_stages=STAGES):
            tile = 2 * turn
            next_block, next_page = _ids_of(blocks_at, pages_at, tile + 2, end, ROOM, TOKENS)
            next_block2, next_page2 = _ids_of(blocks_at, pages_at, tile + 3, end, ROOM, TOKENS)
            keys, values, seen = read_tile(
                mine, written, block, page, tile, length, dims, SIZE, ROOM, TOKENS, DIM,
                INTERPRETED, RUN, BITS, SCALES, CUTS, DECODE,
            )  # fmt: skip
            keys2, values2, seen2 = read_tile(
                mine, written, block2, page2, tile + 1, length, dims, SIZE, ROOM, TOKENS, DIM,
                INTERPRETED, RUN, BITS, SCALES, CUTS, DECODE,
            )  # fmt: skip
            scores = scaled_scores(q, keys, seen, factor, cap, SOFTCAP)
            scores2 = scaled_scores(q, keys2, seen2, factor, cap, SOFTCAP)
            new_peak = tl.maximum(peak, tl.max(tl.maximum(scores, scores2), axis=1))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weight = tl.exp2(scores - safe[:, None])
            weight2 = tl.exp2(scores2 - safe[:, None])
            fade = tl.exp2(peak - safe)
            totals = totals * fade[:, None] + (weight + weight2)
            acc = acc * fade[:, None]
            acc += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            acc += tl.dot(weight2.to(values2.dtype), values2, input_precision="ieee")
            peak = new_peak
            block, page, block2, page2 = next_block, next_page, next_block2, next_page2
    begin_next(INTERPRETED)
    place = (pair.to(tl.int64) * splits + split) * HEADS + head
    total = tl.sum(totals, axis=1)
    nothing = total == 0.0
    result = acc / tl.where(nothing, 1.0, total)[:, None]
    log_sum = tl.where(nothing, float("-inf"), peak * _LN_2 + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(
        out + place[:, None] * DIM + dims[None, :],
        result.to(out.dtype.element_ty),
        mask=(head[:, None] < HEADS) & is_dim[None, :],
    )
    tl.store(lse + place, log_sum, mask=head < HEADS)


def _stages(pool: Tensor, form: PageForm, rows: int, tokens: int, dims: int, room: int) -> int:
    """Return how many stages fit; results do not depend on it."""
    if pool.device.type != "cuda":
        return _STAGES
    width = pool.element_size()
    turn, made = form.tile_bytes(4 * tokens * dims, width, many=tokens > room)
    # Queries and outputs, and scores or weights of both tiles, as far as shared memory holds them.
    others = rows * (dims * (width + 4) + 2 * tokens * 4) + made
    return 1 + min(_STAGES - 1, max(shared_bytes(pool.device) - others, 0) // turn)


def partials(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    is_miss_BGK: Tensor | None,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
    num_blocks: int,
    stored: Stored | None = None,
    *,
    missing: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attend split by split: [B, G, S, R, D] and [B, G, S, R] fp32.

    Args:
        query_BH1D: Queries.
        pages: [B, G, C, 2, P, D], or stored runs.
        page_ids_BGK: int32.
        block_ids_BGK: int32, -1 for none.
        is_miss_BGK: bool; None attends to every split. Otherwise to those without a miss.
        lengths_B: int32, position of the new token.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        num_blocks: Blocks of one split.
        stored: What goes with pages of stored runs.
        missing: With `is_miss_BGK`: attend to the splits with a miss instead.
        dtype: Of the outputs.

    Returns:
        Outputs and log-sum-exps; 0 and -inf for a split that was left out or is empty.
    """
    (batch, groups, num_pages), (size, dim) = pages.shape[:3], page_size(pages, stored)
    selected, form = block_ids_BGK.shape[-1], PageForm.of(stored)
    query, q_row, q_head = rows_of(query_BH1D)
    heads = query.shape[1] // groups
    splits = triton.cdiv(selected, num_blocks)
    out = query.new_empty((batch, groups, splits, heads, dim), dtype=dtype)
    lse = query.new_empty((batch, groups, splits, heads), dtype=torch.float32)
    pick = 0 if is_miss_BGK is None else 2 if missing else 1
    flags = block_ids_BGK if is_miss_BGK is None else is_miss_BGK.view(torch.int8)
    rows, dims = power_of_two(heads, 16), power_of_two(dim, 16)
    room = power_of_two(size)
    pool = pages_of(pages, stored)[1]
    tokens = min(_TILE, _TILE_BYTES // (dims * pool.element_size()))
    tokens = min(tokens, max(power_of_two(room * num_blocks) // 2, 16))
    turns = triton.cdiv(room * num_blocks, 2 * tokens)
    launch(_partials, (batch * groups, splits))(
        query, pages, pool, page_ids_BGK, block_ids_BGK, flags, lengths_B, out, lse,
        *score_factors(scale, softcap), q_row, q_head, groups, num_pages, splits, selected, heads,
        rows, size, room, tokens, turns, dim, dims, num_blocks, power_of_two(num_blocks), pick,
        softcap != 0.0, interpreting(), _stages(pool, form, rows, tokens, dims, room), *form,
        num_warps=_WARPS, **as_written(),
    )  # fmt: skip
    return out, lse


@triton.jit
def _merge(
    out, lse, late_out, late_lse, merged, splits,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    TILE: tl.constexpr, LATE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0), tl.program_id(1)
    await_last(INTERPRETED)
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    rows = pair.to(tl.int64) * splits
    every = tl.arange(0, SPLITS)
    mine = (rows + every) * HEADS + head
    logs = tl.load(lse + mine, mask=every < splits, other=float("-inf"))
    if LATE:
        logs = tl.maximum(logs, tl.load(late_lse + mine, mask=every < splits, other=float("-inf")))
    peak = tl.max(logs, 0)
    total = tl.sum(tl.exp(logs - peak), 0)
    acc = tl.zeros([DIMS], dtype=tl.float32)
    for start in tl.static_range(0, SPLITS, TILE):
        split = start + tl.arange(0, TILE)
        inside = split < splits
        place = (rows + split) * HEADS + head
        log = tl.load(lse + place, mask=inside, other=float("-inf"))
        mask = inside[:, None] & is_dim[None, :]
        part = tl.load(out + place[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        if LATE:
            late = tl.load(late_lse + place, mask=inside, other=float("-inf"))
            use_late = late > log
            log = tl.maximum(log, late)
            mask = mask & use_late[:, None]
            other = tl.load(late_out + place[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
            part = tl.where(use_late[:, None], other, part)
        acc += tl.sum(part * tl.exp(log - peak)[:, None], axis=0)
    result = acc / total
    tl.store(
        merged + (pair.to(tl.int64) * HEADS + head) * DIM + dims,
        result.to(merged.dtype.element_ty),
        mask=is_dim,
    )


def merge(
    out_BGSRD: Tensor,
    lse_BGSR: Tensor,
    late: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """Merge the partial results of splits in order: [B, H, 1, D].

    Args:
        out_BGSRD: fp32 partial outputs.
        lse_BGSR: fp32 log-sum-exps, -inf for a split that is not there.
        late: The same of the splits that were left out; a split is in one of the two.
        dtype: Of the result.
    """
    batch, groups, splits, heads, dim = out_BGSRD.shape
    merged = out_BGSRD.new_empty((batch, groups * heads, 1, dim), dtype=dtype)
    late_out, late_lse = late or (out_BGSRD, lse_BGSR)
    padded = power_of_two(splits)
    dims = power_of_two(dim)
    launch(_merge, (batch * groups, heads))(
        out_BGSRD, lse_BGSR, late_out, late_lse, merged, splits, heads, padded, dim, dims,
        min(padded, max(_MERGE_TILE // dims, 1)), late is not None, interpreting(), num_warps=1,
        **launch_early(), **as_written(),
    )  # fmt: skip
    return merged


def attend(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids_BGK: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
    num_blocks: int,
    stored: Stored | None = None,
) -> Tensor:
    """Attend to all splits: [B, H, 1, D] in the query's dtype; operands as for `partials`.

    One split has nothing to be merged with and is written as the result, the bits of a merge.
    """
    operands = (query_BH1D, pages, page_ids_BGK, block_ids_BGK, None, lengths_B, scale, softcap)
    if block_ids_BGK.shape[-1] > num_blocks:
        return merge(*partials(*operands, num_blocks, stored), None, query_BH1D.dtype)
    out, _ = partials(*operands, num_blocks, stored, dtype=query_BH1D.dtype)
    return out.view(query_BH1D.shape)
