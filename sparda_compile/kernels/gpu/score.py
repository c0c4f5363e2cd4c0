"""Scores of every block, split over the blocks of a sequence.

    forecast   max over the windows of a block of f . pooled_k                       one launch
    infllm2    logits and, per part, their maxima and sums; then weights, max        two launches
               (logits [W, heads]: a window's lie side by side, and a block's windows)
    quest      sum_d max(qbar_d * min_d, qbar_d * max_d)                             one launch
    lowbit     in `low_bit_score.py`

Floor: the summary is read once, W*D elements per sequence and group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.early import await_last, begin_next, launch_early
from sparda_compile.kernels.gpu.launch import (
    interpreting,
    launch,
    power_of_two,
    rows_of,
)
from sparda_compile.kernels.gpu.low_bit_score import score_low_bit, score_low_bit_forecast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["SCORE_KERNELS", "complete_windows"]

# Blocks of one program; a Forecast's measured on one H200, of 8 to 64, and of 2 to 8 warps.
_BLOCKS: Final = 32
_FORECAST_BLOCKS: Final = 8
# Windows of a tile, programs that are enough, most tiles of one, and tiles that are read ahead of
# one. Measured on one H200 for one sequence and sixteen, beside tiles of 128, 1 to 16 of them, and
# the product the other way round: `benchmarks/results/2026-11-30-h200-score-forms.json`.
_WINDOWS: Final = 64
_PROGRAMS: Final = 256
_MOST_TILES: Final = 16
_MOST_STAGES: Final = 3
_STAGE_BYTES: Final = 1 << 16


@triton.jit
def complete_windows(length, POOL: tl.constexpr, STRIDE: tl.constexpr):  # noqa: ANN201
    """Return how many windows so many tokens have completed."""
    return tl.where(length >= POOL, (length - POOL) // STRIDE + 1, 0)


@triton.jit
def _score_forecast(
    query, pooled, lengths, scores, q_row, q_head, groups, num_windows, num_blocks,
    POOL: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, OVERHANG: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, head = pair // groups, pair % groups
    complete = complete_windows(tl.load(lengths + row), POOL, STRIDE)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    best = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    if part * BLOCKS * RATIO - OVERHANG < complete:
        dims = tl.arange(0, DIMS)
        is_dim = dims < DIM
        q = tl.load(query + row * q_row + head * q_head + dims, mask=is_dim, other=0.0)
        keys = pooled + pair.to(tl.int64) * num_windows * DIM
        for i in tl.static_range(RATIO + OVERHANG):
            window = block * RATIO - OVERHANG + i
            exists = (window >= 0) & (window < complete)
            tile = tl.load(
                keys + window[:, None] * DIM + dims[None, :],
                mask=exists[:, None] & is_dim[None, :],
                other=0.0,
            )
            dot = tl.sum(tile.to(tl.float32) * q.to(tl.float32)[None, :], axis=1)
            best = tl.maximum(best, tl.where(exists, dot, float("-inf")))
    tl.store(scores + pair * num_blocks + block, best, mask=block < num_blocks)


def _forecast(
    query_BG1D: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    scores_BGN: Tensor,
) -> None:
    del scale
    pooled = tensors[0]
    batch, groups, num_windows, dim = pooled.shape
    query, q_row, q_head = rows_of(query_BG1D)
    ratio = geometry.block_size // geometry.pool_stride
    overhang = geometry.pool_size // geometry.pool_stride - 1
    parts = triton.cdiv(geometry.num_blocks, _FORECAST_BLOCKS)
    launch(_score_forecast, (batch * groups, parts))(
        query, pooled, lengths_B, scores_BGN, q_row, q_head, groups, num_windows,
        geometry.num_blocks, geometry.pool_size, geometry.pool_stride, ratio, overhang,
        dim, power_of_two(dim), _FORECAST_BLOCKS, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["parts"])
def _infllm2_logits(
    query, pooled, lengths, logits, maxima, sums, scale, q_row, q_head, groups, num_windows, parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, WINDOWS: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    complete = complete_windows(tl.load(lengths + row), POOL, STRIDE)
    head = tl.arange(0, ROWS)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    heads = group * HEADS + head
    q = tl.load(
        query + row * q_row + heads[:, None] * q_head + dims[None, :],
        mask=(head < HEADS)[:, None] & is_dim[None, :],
        other=0.0,
    )
    if INTERPRETED:
        q = q.to(tl.float32)
    first = part * (WINDOWS * TILES)
    tiles = tl.minimum(tl.cdiv(tl.maximum(complete - first, 0), WINDOWS), TILES)
    for tile in tl.range(tiles, num_stages=STAGES):
        window = first + tile * WINDOWS + tl.arange(0, WINDOWS)
        exists = window < complete
        place = pair.to(tl.int64) * num_windows + window
        keys = tl.load(
            pooled + place[:, None] * DIM + dims[None, :],
            mask=exists[:, None] & is_dim[None, :],
            other=0.0,
        )
        if INTERPRETED:
            keys = keys.to(tl.float32)
        dots = tl.dot(keys, tl.trans(q), input_precision="ieee") * scale
        dots = tl.where(exists[:, None], dots, float("-inf"))
        tl.store(logits + place[:, None] * ROWS + head[None, :], dots, mask=exists[:, None])
        above = tl.maximum(peak, tl.max(dots, axis=0))
        total = total * tl.exp(peak - above) + tl.sum(tl.exp(dots - above[None, :]), axis=0)
        peak = above
    begin_next(INTERPRETED)
    place = (pair * parts + part) * ROWS + head
    tl.store(maxima + place, peak)
    tl.store(sums + place, total)


@triton.jit(do_not_specialize=["parts"])
def _infllm2_blocks(
    logits, maxima, sums, lengths, scores, groups, num_windows, num_blocks, parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, POOL: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, OVERHANG: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    await_last(INTERPRETED)
    complete = complete_windows(tl.load(lengths + pair // groups), POOL, STRIDE)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    best = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    if part * BLOCKS * RATIO - OVERHANG < complete:
        head, each = tl.arange(0, ROWS), tl.arange(0, PARTS)
        place = (pair * parts + each[:, None]) * ROWS + head[None, :]
        peaks = tl.load(maxima + place, mask=each[:, None] < parts, other=float("-inf"))
        totals = tl.load(sums + place, mask=each[:, None] < parts, other=0.0)
        peak = tl.max(peaks, axis=0)
        normal = peak + tl.log(tl.sum(totals * tl.exp(peaks - peak[None, :]), axis=0))
        is_head = (head < HEADS)[None, :]
        for i in tl.static_range(RATIO + OVERHANG):
            window = block * RATIO - OVERHANG + i
            is_there = (window >= 0) & (window < complete)
            mask = is_head & is_there[:, None]
            place = pair.to(tl.int64) * num_windows + window
            dots = tl.load(logits + place[:, None] * ROWS + head[None, :], mask=mask, other=0.0)
            weight = tl.where(mask, tl.exp(dots - normal[None, :]), 0.0)
            best = tl.maximum(best, tl.where(is_there, tl.sum(weight, axis=1), float("-inf")))
    tl.store(scores + pair * num_blocks + block, best, mask=block < num_blocks)


def _infllm2(
    query_BH1D: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    scores_BGN: Tensor,
) -> None:
    pooled = tensors[0]
    batch, groups, num_windows, dim = pooled.shape
    query, q_row, q_head = rows_of(query_BH1D)
    heads, pairs = query.shape[1] // groups, batch * groups
    rows, dims = power_of_two(heads, 16), power_of_two(dim, 16)
    num_tiles = triton.cdiv(num_windows, _WINDOWS)
    wanted = max(pairs * num_tiles // _PROGRAMS, 1)
    tiles = min(1 << (wanted.bit_length() - 1), _MOST_TILES)
    tile_bytes = _WINDOWS * dims * pooled.element_size()
    stages = max(min(_STAGE_BYTES // tile_bytes, _MOST_STAGES), 1) if tiles > 1 else 1
    parts = triton.cdiv(num_tiles, tiles)
    new = lengths_B.new_empty
    logits = new((pairs, num_windows, rows), dtype=torch.float32)
    maxima, sums = (new((pairs, parts, rows), dtype=torch.float32) for _ in range(2))
    pool = (geometry.pool_size, geometry.pool_stride)
    launch(_infllm2_logits, (pairs, parts))(
        query, pooled, lengths_B, logits, maxima, sums, scale, q_row, q_head, groups, num_windows,
        parts, heads, rows, *pool, dim, dims, _WINDOWS, tiles, stages, interpreting(), num_warps=4,
    )  # fmt: skip
    ratio, overhang = geometry.block_size // pool[1], pool[0] // pool[1] - 1
    launch(_infllm2_blocks, (pairs, triton.cdiv(geometry.num_blocks, _BLOCKS)))(
        logits, maxima, sums, lengths_B, scores_BGN, groups, num_windows, geometry.num_blocks,
        parts, heads, rows, power_of_two(parts), *pool, ratio, overhang, _BLOCKS, interpreting(),
        num_warps=4, **launch_early(),
    )  # fmt: skip


@triton.jit
def _score_quest(
    query, bounds, lengths, scores, q_row, q_head, groups, num_blocks,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    length = tl.load(lengths + row)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    exists = (block * SIZE < length) & (block < num_blocks)
    score = tl.zeros([BLOCKS], dtype=tl.float32)
    if part * BLOCKS * SIZE < length:
        dims = tl.arange(0, DIMS)
        is_dim = dims < DIM
        heads = tl.arange(0, ROWS)
        places = row * q_row + (group * HEADS + heads)[:, None] * q_head + dims[None, :]
        mask = (heads < HEADS)[:, None] & is_dim[None, :]
        q = tl.load(query + places, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(q, axis=0) / HEADS
        low = bounds + (pair.to(tl.int64) * num_blocks + block[:, None]) * (2 * DIM) + dims[None, :]
        mask = exists[:, None] & is_dim[None, :]
        smallest = tl.load(low, mask=mask, other=0.0).to(tl.float32)
        largest = tl.load(low + DIM, mask=mask, other=0.0).to(tl.float32)
        score = tl.sum(tl.maximum(mean[None, :] * smallest, mean[None, :] * largest), axis=1)
    score = tl.where(exists, score, float("-inf"))
    tl.store(scores + pair * num_blocks + block, score, mask=block < num_blocks)


def _quest(
    query_BH1D: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    scores_BGN: Tensor,
) -> None:
    del scale
    (bounds,) = tensors
    batch, groups, num_blocks, _, dim = bounds.shape
    query, q_row, q_head = rows_of(query_BH1D)
    heads = query.shape[1] // groups
    launch(_score_quest, (batch * groups, triton.cdiv(num_blocks, _BLOCKS)))(
        query, bounds, lengths_B, scores_BGN, q_row, q_head, groups, num_blocks,
        heads, power_of_two(heads), geometry.block_size, dim, power_of_two(dim), _BLOCKS,
        num_warps=4,
    )  # fmt: skip


# A selector that is not here is scored by its own `score`, in plain PyTorch on the device.
SCORE_KERNELS: Final[dict[str, Callable[..., None]]] = {
    "forecast": _forecast,
    "infllm2": _infllm2,
    "quest": _quest,
    "lowbit2": score_low_bit,
    "lowbit4": score_low_bit,
    "lowbit2_forecast": score_low_bit_forecast,
    "lowbit4_forecast": score_low_bit_forecast,
}
