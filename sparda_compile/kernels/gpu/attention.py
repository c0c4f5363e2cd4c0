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

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from sparda_compile.kernels.gpu.launch import (
    as_written,
    interpreting,
    launch_early,
    power_of_two,
    rows_of,
)

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["merge", "partials"]

# Measured on one H200 (head_dim 128, blocks of 64, bf16): of 2 to 11 stages, 1 to 8 warps and tiles
# of 16 to 128 tokens, and of merging 2048 to 16384 elements at a time by 1 to 8 warps. A short
# split is read in one tile or two, of several blocks. The tiles of a long one follow each other, so
# that they may be of one block, which takes fewer addresses (100 us instead of 103 at batch 16 with
# 8 KV heads), if that is large enough. Three programs have room on one multiprocessor.
_STAGES: Final = 3
_WARPS: Final = 4
_SHORT_SPLIT: Final = 256
_TILE: Final = 128
_TILE_OF_A_BLOCK: Final = 64
# Of keys, and as many of values; vectors that are too long for it are read fewer at a time.
_TILE_BYTES: Final = 32 * 1024
_MERGE_TILE: Final = 8192


@triton.jit
def _partials(
    query, pages, page_ids, block_ids, is_miss, lengths, out, lse, scale, softcap,
    q_row, q_head, groups, num_pages, splits,
    SELECTED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, ROOM: tl.constexpr, TOKENS: tl.constexpr, TILES: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr,
    BLOCKS: tl.constexpr, EACH: tl.constexpr, PICK: tl.constexpr,
    SOFTCAP: tl.constexpr, INTERPRETED: tl.constexpr, STAGES: tl.constexpr,
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
        mine = (number < BLOCKS) & (first + number < SELECTED)
        flags = tl.load(is_miss + pair * SELECTED + first + number, mask=mine, other=0)
        has_miss = tl.max(flags.to(tl.int32), 0)
        runs = has_miss > 0 if PICK == 2 else has_miss == 0
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    acc = tl.zeros([ROWS, DIMS], dtype=tl.float32)
    if runs:
        q = tl.load(
            query + row * q_row + (group * HEADS + head[:, None]) * q_head + dims[None, :],
            mask=(head[:, None] < HEADS) & is_dim[None, :],
            other=0.0,
        )
        if INTERPRETED:
            q = q.to(tl.float32)
        for tile in tl.range(TILES, num_stages=STAGES):
            if TOKENS > ROOM:  # of many blocks
                place = tile * TOKENS + tl.arange(0, TOKENS)
                nth, token = place // ROOM, place % ROOM
            else:
                nth = tile * TOKENS // ROOM
                token = tile * TOKENS % ROOM + tl.arange(0, TOKENS)
            entry = first + nth
            inside = (nth < BLOCKS) & (entry < SELECTED)
            block = tl.load(block_ids + pair * SELECTED + entry, mask=inside, other=-1)
            page = tl.load(page_ids + pair * SELECTED + entry, mask=inside, other=0)
            seen = token <= tl.where(block >= 0, tl.minimum(length - block * SIZE, SIZE - 1), -1)
            start = pages + (pair.to(tl.int64) * num_pages + tl.maximum(page, 0)) * (2 * SIZE * DIM)
            if TOKENS > ROOM:
                start = start[:, None]
            source = start + token[:, None] * DIM + dims[None, :]
            mask = seen[:, None] & is_dim[None, :]
            keys = tl.load(source, mask=mask, other=0.0)
            values = tl.load(source + SIZE * DIM, mask=mask, other=0.0)
            if INTERPRETED:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            dots = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            if SOFTCAP:
                # tanh(x) = 1 - 2 / (exp(2x) + 1), which is right at both ends
                dots = softcap * (1.0 - 2.0 / (tl.exp(2.0 * dots / softcap) + 1.0))
            dots = tl.where(seen[None, :], dots, float("-inf"))
            new_peak = tl.maximum(peak, tl.max(dots, axis=1))
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            weight = tl.exp(dots - safe[:, None])
            fade = tl.exp(peak - safe)
            total = total * fade + tl.sum(weight, axis=1)
            acc = acc * fade[:, None] + tl.dot(
                weight.to(values.dtype), values, input_precision="ieee"
            )
            peak = new_peak
    if not INTERPRETED:
        cuda.gdc_launch_dependents()
    place = (pair.to(tl.int64) * splits + split) * HEADS + head
    nothing = total == 0.0
    result = acc / tl.where(nothing, 1.0, total)[:, None]
    log_sum = tl.where(nothing, float("-inf"), peak + tl.log(tl.where(nothing, 1.0, total)))
    tl.store(
        out + place[:, None] * DIM + dims[None, :],
        result,
        mask=(head[:, None] < HEADS) & is_dim[None, :],
    )
    tl.store(lse + place, log_sum, mask=head < HEADS)


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
    *,
    missing: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend split by split: [B, G, S, R, D] and [B, G, S, R], fp32.

    Args:
        query_BH1D: Queries.
        pages: [B, G, C, 2, P, D].
        page_ids_BGK: int32.
        block_ids_BGK: int32, -1 for none.
        is_miss_BGK: bool; None attends to every split. Otherwise to those without a miss.
        lengths_B: int32, position of the new token.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        num_blocks: Blocks of one split.
        missing: With `is_miss_BGK`: attend to the splits with a miss instead.

    Returns:
        Outputs and log-sum-exps; 0 and -inf for a split that was left out or is empty.
    """
    batch, groups, num_pages, _, size, dim = pages.shape
    selected = block_ids_BGK.shape[-1]
    query, q_row, q_head = rows_of(query_BH1D)
    heads = query.shape[1] // groups
    splits = triton.cdiv(selected, num_blocks)
    out = query.new_empty((batch, groups, splits, heads, dim), dtype=torch.float32)
    lse = query.new_empty((batch, groups, splits, heads), dtype=torch.float32)
    pick = 0 if is_miss_BGK is None else 2 if missing else 1
    flags = block_ids_BGK if is_miss_BGK is None else is_miss_BGK.view(torch.int8)
    dims = power_of_two(dim, 16)
    room = power_of_two(size)
    length = room * num_blocks
    many = length <= _SHORT_SPLIT or room < _TILE_OF_A_BLOCK
    tokens = min(
        _TILE if many else _TILE_OF_A_BLOCK,
        _TILE_BYTES // (dims * pages.element_size()),
        power_of_two(length),
    )
    _partials[(batch * groups, splits)](
        query, pages, page_ids_BGK, block_ids_BGK, flags, lengths_B, out, lse, scale, softcap,
        q_row, q_head, groups, num_pages, splits, selected, heads, power_of_two(heads, 16), size,
        room, tokens, triton.cdiv(length, tokens), dim, dims, num_blocks, power_of_two(num_blocks),
        pick, softcap != 0.0, interpreting(), _STAGES, num_warps=_WARPS, **as_written(),
    )  # fmt: skip
    return out, lse


@triton.jit
def _merge(
    out, lse, late_out, late_lse, merged, splits,
    HEADS: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    TILE: tl.constexpr, LATE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, head = tl.program_id(0), tl.program_id(1)
    if not INTERPRETED:
        cuda.gdc_wait()
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
    _merge[(batch * groups, heads)](
        out_BGSRD, lse_BGSR, late_out, late_lse, merged, splits, heads, padded, dim, dims,
        min(padded, max(_MERGE_TILE // dims, 1)), late is not None, interpreting(), num_warps=1,
        **launch_early(), **as_written(),
    )  # fmt: skip
    return merged
