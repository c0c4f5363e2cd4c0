"""Partial results of attention: of each block alone, merged, and removed.

    _attend_blocks     o_b, lse_b = softmax(q K_b^T * scale) V_b        some blocks a program
    _merge_partials    o = sum_s exp(lse_s - lse) o_s                   in the order of s
    _remove_partial    o' = (o - r o_n) / (1 - r)

A program takes every n-th block of a sequence and KV head, so that all have as much to do where
there are fewer blocks than places, and reads keys and values some blocks ahead. Query heads of a
group are the rows of one tile. `attend_each` is shared with `speculation.py`: a block's partial has
the same bits wherever it is made, and whatever other blocks its program takes. A merge has a
program for each query head and some columns, which sums up all partials.
Floor: 2*P*D elements read and R*D*4 bytes written per block; a merge reads these again, a removal
twice as much as it writes. The reference is `kernels/partials.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.attention import scaled_scores, score_factors
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

__all__ = [
    "WARPS",
    "Tiles",
    "attend_blocks",
    "attend_each",
    "merge",
    "merge_tiles",
    "remove",
    "run_length",
    "tiles_of",
]

# As of `attention.py`: a tile of a block of 64 tokens, two of them on their way behind the one that
# is computed. Two such programs have room on a multiprocessor, beside each other.
WARPS: Final = 4
_STAGES: Final = 3
_TILE: Final = 64
_TILE_BYTES: Final = 16 * 1024
_PROGRAMS_AT_ONCE: Final = 2 * 132
_LONGEST_RUN: Final = 64
# Of a merge: columns of a program, and elements of a tile of partials.
_COLUMNS: Final = 32
_MERGE_TILE: Final = 4096
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LN_2 = tl.constexpr(math.log(2.0))


@triton.jit
def attend_each(  # noqa: ANN201 - a part of kernels
    query, pages, tail, block, page, entry, wanted, length, out, lse, factor, cap, q_row, q_head,
    pair, groups, num_pages, num_entries,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    TOKENS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Attend to each wanted block of a list; write the partial of each to its entry of a pair."""
    PARTS: tl.constexpr = ROOM // TOKENS
    count = tl.sum(wanted.to(tl.int32), 0)
    if count > 0:
        row, group = pair // groups, pair % groups
        head = tl.arange(0, ROWS)
        dims = tl.arange(0, DIMS)
        is_dim = dims < DIM
        q = tl.load(
            query + row * q_row + (group * HEADS + head[:, None]) * q_head + dims[None, :],
            mask=(head < HEADS)[:, None] & is_dim[None, :],
            other=0.0,
        )
        if INTERPRETED:
            q = q.to(tl.float32)
        mine = first_page(pages, pair, num_pages, SIZE, DIM, RUN)
        written = tail_at(tail, pair, SIZE, DIM)
        rank = tl.cumsum(wanted.to(tl.int32), 0) - 1
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        acc = tl.zeros([ROWS, DIMS], dtype=tl.float32)
        for turn in tl.range(count * PARTS, num_stages=STAGES):
            part = turn % PARTS
            # Its numbers come out of registers: a load that waits for a load has a stage less.
            chosen = wanted & (rank == turn // PARTS)
            block_id = tl.sum(tl.where(chosen, block, 0), 0)
            page_id = tl.sum(tl.where(chosen, page, 0), 0)
            number = tl.sum(tl.where(chosen, entry, 0), 0)
            keys, values, seen = read_tile(
                mine, written, block_id, page_id, part, length, dims, SIZE, ROOM, TOKENS, DIM,
                INTERPRETED, RUN, BITS, SCALES, CUTS, DECODE,
            )  # fmt: skip
            scores = scaled_scores(q, keys, seen, factor, cap, SOFTCAP)
            old_peak = tl.where(part == 0, float("-inf"), peak)
            peak = tl.maximum(old_peak, tl.max(scores, axis=1))
            safe = tl.where(peak == float("-inf"), 0.0, peak)
            weight = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(old_peak - safe)
            total = tl.where(part == 0, 0.0, total) * fade + tl.sum(weight, axis=1)
            acc = tl.where(part == 0, 0.0, acc) * fade[:, None]
            acc += tl.dot(weight.to(values.dtype), values, input_precision="ieee")
            nothing = total == 0.0
            sure = tl.where(nothing, 1.0, total)
            log_sum = tl.where(nothing, float("-inf"), peak * _LN_2 + tl.log(sure))
            place = (pair.to(tl.int64) * num_entries + number) * HEADS + head
            ends = head < tl.where(part == PARTS - 1, HEADS, 0)
            tl.store(
                out + place[:, None] * DIM + dims[None, :],
                acc / sure[:, None],
                mask=ends[:, None] & is_dim[None, :],
            )
            tl.store(lse + place, log_sum, mask=ends)


@triton.jit
def _attend_blocks(
    query, pages, tail, page_ids, block_ids, lengths, out, lse, factor, cap, q_row, q_head,
    groups, num_pages, num_blocks, num_entries, splits, EACH: tl.constexpr, EARLY: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    TOKENS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    entry = split + tl.arange(0, EACH) * splits
    inside = entry < num_entries
    row = pair.to(tl.int64) * num_entries
    block = tl.load(block_ids + row + entry, mask=inside, other=-1)
    if EARLY:
        # The pages are those of a block table; the new token's block is not complete.
        wanted = (block >= 0) & (block < length // SIZE)
        page = tl.load(page_ids + pair.to(tl.int64) * num_blocks + block, mask=wanted, other=0)
        head = tl.arange(0, ROWS)
        absent = (inside & (wanted == 0))[:, None] & (head < HEADS)[None, :]
        place = (row + entry)[:, None] * HEADS + head[None, :]
        tl.store(lse + place, float("-inf"), mask=absent)
    else:
        wanted = inside
        page = tl.load(page_ids + row + entry, mask=inside, other=0)
    attend_each(
        query, pages, tail, block, tl.maximum(page, 0), entry, wanted, length, out, lse, factor,
        cap, q_row, q_head, pair, groups, num_pages, num_entries, HEADS, ROWS, SIZE, ROOM, TOKENS,
        DIM, DIMS, SOFTCAP, STAGES, INTERPRETED, RUN, BITS, SCALES, CUTS, DECODE,
    )  # fmt: skip


class Tiles(NamedTuple):
    """Constants of `attend_each`, in their order."""

    heads: int
    rows: int
    size: int
    room: int
    tokens: int
    dim: int
    dims: int
    softcap: bool
    stages: int
    interpreted: bool
    run: int
    bits: int
    scales: tuple[int, int]
    cuts: bool
    decode: Any


def tiles_of(pages: Tensor, num_heads: int, softcap: float, stored: Stored | None = None) -> Tiles:
    """Return the constants for R query heads of each KV head; results hang on none of `stages`."""
    (size, dim), form = page_size(pages, stored), PageForm.of(stored)
    rows, dims, room = power_of_two(num_heads, 16), power_of_two(dim, 16), power_of_two(size, 16)
    width = pages_of(pages, stored)[1].element_size()
    tokens = min(_TILE, max(_TILE_BYTES // (dims * width), 16), room)
    stages = _STAGES
    if pages.device.type == "cuda":
        turn, made = form.tile_bytes(2 * tokens * dims, width)
        others = rows * (dims * (width + 4) + tokens * 4) + made
        free = max(shared_bytes(pages.device) - others, 0)
        stages = 1 + min(_STAGES - 1, free // turn)
    return Tiles(
        num_heads, rows, size, room, tokens, dim, dims, softcap != 0.0, stages, interpreting(),
        *form,
    )  # fmt: skip


def run_length(num_pairs: int, num_entries: int) -> int:
    """Return how many blocks a program takes: no more programs than run at once, if that is enough.

    Args:
        num_pairs: Sequences times KV heads.
        num_entries: Blocks of each.
    """
    splits = max(_PROGRAMS_AT_ONCE // num_pairs, 1)
    return min(-(-num_entries // splits), _LONGEST_RUN)


def attend_blocks(
    query_BH1D: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids_BGK: Tensor,
    lengths_B: Tensor,
    scale: float,
    softcap: float,
    results: tuple[Tensor, Tensor],
    stored: Stored | None = None,
    *,
    early: bool,
) -> None:
    """Attend to each block alone.

    Args:
        query_BH1D: Queries.
        pages: [B, G, C, 2, P, D], or stored runs.
        page_ids: [B, G, K] int32, page of each block; with `early` [B, G, N], the block table.
        block_ids_BGK: int32, -1 for none.
        lengths_B: int32, position of the new token.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        results: [B, G, K, R, D] and [B, G, K, R] fp32, written: 0 and -inf where there is no block.
        stored: What goes with pages of stored runs.
        early: Whether the block of the new token, and what is behind it, counts as no block. Where
            there is none, the output is left as it is.
    """
    batch, groups, num_pages = pages.shape[:3]
    query, q_row, q_head = rows_of(query_BH1D)
    pairs, entries = batch * groups, block_ids_BGK.shape[-1]
    if not pairs * entries:
        return
    run = run_length(pairs, entries)
    splits = triton.cdiv(entries, run)
    launch(_attend_blocks, (pairs, splits))(
        query, *pages_of(pages, stored), page_ids, block_ids_BGK, lengths_B, *results,
        *score_factors(scale, softcap), q_row, q_head, groups, num_pages, page_ids.shape[-1],
        entries, splits, power_of_two(run), early,
        *tiles_of(pages, query.shape[1] // groups, softcap, stored),
        num_warps=WARPS, **as_written(),
    )  # fmt: skip


@triton.jit
def _merge_partials(
    out, lse, keep, merged, merged_lse, num_partials,
    HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, PARTIALS: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    row, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first = row * num_partials
    every = tl.arange(0, PARTIALS)
    is_there = every < num_partials
    if MASKED:
        is_there = is_there & (tl.load(keep + first + every, mask=is_there, other=0) != 0)
    logs = tl.load(lse + (first + every) * HEADS + head, mask=is_there, other=float("-inf"))
    peak = tl.max(logs, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(logs - peak), 0)
    dims = part * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in tl.range(0, num_partials, TILE):
        # Other names than above: a tile has another shape, and a loop carries what it renames.
        number = start + tl.arange(0, TILE)
        inside = number < num_partials
        if MASKED:
            inside = inside & (tl.load(keep + first + number, mask=inside, other=0) != 0)
        at = (first + number) * HEADS + head
        weight = tl.exp(tl.load(lse + at, mask=inside, other=float("-inf")) - peak)
        mask = (weight > 0.0)[:, None] & (dims < DIM)[None, :]
        values = tl.load(out + at[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
        acc += tl.sum(values * weight[:, None], axis=0)
    nothing = total == 0.0
    sure = tl.where(nothing, 1.0, total)
    place = row * HEADS + head
    tl.store(merged + place * DIM + dims, acc / sure, mask=dims < DIM)
    if part == 0:
        tl.store(merged_lse + place, tl.where(nothing, float("-inf"), peak + tl.log(sure)))


def merge_tiles(num_partials: int, dim: int) -> tuple[int, int, int]:
    """Return the columns of a program of a merge, the partials it takes, padded, and those a turn.

    Args:
        num_partials: S.
        dim: D.
    """
    columns, padded = min(power_of_two(dim), _COLUMNS), power_of_two(max(num_partials, 1))
    return columns, padded, min(padded, max(_MERGE_TILE // columns, 1))


def merge(
    partial_out: Tensor,
    partial_lse: Tensor,
    keep: Tensor | None,
    results: tuple[Tensor, Tensor],
) -> None:
    """Merge partials in their order.

    Args:
        partial_out: [..., S, R, D] fp32.
        partial_lse: [..., S, R] fp32.
        keep: [..., S] bool, those that count; None for all.
        results: [..., R, D] and [..., R] fp32, written.
    """
    num_partials, heads, dim = partial_out.shape[-3:]
    if not results[1].numel():
        return
    rows = results[1].numel() // heads
    columns, padded, tile = merge_tiles(num_partials, dim)
    flags = partial_lse if keep is None else keep.contiguous().view(torch.int8)
    launch(_merge_partials, (rows, heads, max(triton.cdiv(dim, columns), 1)))(
        partial_out.contiguous(), partial_lse.contiguous(), flags, *results, num_partials, heads,
        dim, columns, padded, tile, keep is not None, **as_written(),
    )  # fmt: skip


@triton.jit
def _remove_partial(
    out, lse, part_out, part_lse, left_out, left_lse, is_usable, limit, num_rows,
    ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    of_all = tl.load(lse + row, mask=inside, other=float("-inf"))
    of_part = tl.load(part_lse + row, mask=inside, other=float("-inf"))
    share = tl.exp(of_part - tl.maximum(of_all, _LOWEST))
    # A limit next to 1 is 1 in fp32, and of all of it nothing is left.
    fine = (share <= limit) & (share < 1.0)
    left = tl.where(fine, 1.0 - share, 1.0)
    dims = tl.arange(0, DIMS)
    place = row[:, None] * DIM + dims[None, :]
    mask = (inside & fine)[:, None] & (dims < DIM)[None, :]
    whole = tl.load(out + place, mask=mask, other=0.0)
    part = tl.load(part_out + place, mask=mask & (share > 0.0)[:, None], other=0.0)
    rest = tl.where(fine[:, None], whole - share[:, None] * part, 0.0) / left[:, None]
    tl.store(left_out + place, rest, mask=inside[:, None] & (dims < DIM)[None, :])
    tl.store(left_lse + row, tl.where(fine, of_all + tl.log(left), float("-inf")), mask=inside)
    tl.store(is_usable + row, fine.to(tl.int8), mask=inside)


def remove(
    merged: tuple[Tensor, Tensor],
    part: tuple[Tensor, Tensor],
    limit: float,
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Take a partial out of a merged one.

    Args:
        merged: [..., R, D] and [..., R] fp32.
        part: The same of what goes.
        limit: Share of the mass that may go.
        results: [..., R, D] and [..., R] fp32 and [..., R] bool, written.
    """
    num_rows, dim = merged[1].numel(), merged[0].shape[-1]
    if not num_rows:
        return
    dims = power_of_two(max(dim, 1))
    rows = max(_MERGE_TILE // dims, 1)
    launch(_remove_partial, (triton.cdiv(num_rows, rows),))(
        *(t.contiguous() for t in (*merged, *part)), results[0], results[1],
        results[2].view(torch.int8), limit, num_rows, rows, dim, dims, **as_written(),
    )  # fmt: skip
