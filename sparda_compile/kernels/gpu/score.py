"""Scores of every block, split over the blocks of a sequence.

    forecast   max over the windows of a block of f . pooled_k                       one launch
    infllm2    logits and, per part, their maxima and sums; then weights, max        two launches
    quest      sum_d max(qbar_d * min_d, qbar_d * max_d)                             one launch
    lowbit     in `low_bit_score.py`

Floor: the summary is read once, W*D elements per sequence and group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from sparda_compile.kernels.gpu.launch import (
    interpreting,
    launch,
    launch_early,
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
_WINDOWS: Final = 128
# Logits of a head begin at a multiple of so many, whatever the number of windows.
_ALIGNED: Final = 16


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


@triton.jit
def _infllm2_logits(
    query, pooled, lengths, logits, maxima, sums, scale, q_row, q_head, groups, num_windows, room,
    parts, HEADS: tl.constexpr, ROWS: tl.constexpr, POOL: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, WINDOWS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    complete = complete_windows(tl.load(lengths + row), POOL, STRIDE)
    head = tl.arange(0, ROWS)
    is_head = head < HEADS
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    if part * WINDOWS < complete:
        dims = tl.arange(0, DIMS)
        is_dim = dims < DIM
        heads = group * HEADS + head
        q = tl.load(
            query + row * q_row + heads[:, None] * q_head + dims[None, :],
            mask=is_head[:, None] & is_dim[None, :],
            other=0.0,
        )
        window = part * WINDOWS + tl.arange(0, WINDOWS)
        exists = window < complete
        keys = tl.load(
            pooled + (pair.to(tl.int64) * num_windows + window[:, None]) * DIM + dims[None, :],
            mask=exists[:, None] & is_dim[None, :],
            other=0.0,
        )
        if INTERPRETED:
            q, keys = q.to(tl.float32), keys.to(tl.float32)
        dots = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        dots = tl.where(exists[None, :], dots, float("-inf"))
        place = (pair.to(tl.int64) * HEADS + head[:, None]) * room + window[None, :]
        tl.store(logits + place, dots, mask=is_head[:, None] & exists[None, :])
        peak = tl.max(dots, axis=1)
        total = tl.sum(tl.exp(dots - peak[:, None]), axis=1)
    if not INTERPRETED:
        cuda.gdc_launch_dependents()
    place = (pair * parts + part) * ROWS + head
    tl.store(maxima + place, peak)
    tl.store(sums + place, total)


@triton.jit
def _infllm2_blocks(
    logits, maxima, sums, lengths, scores, groups, room, num_blocks, parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, POOL: tl.constexpr,
    STRIDE: tl.constexpr, RATIO: tl.constexpr, RATIOS: tl.constexpr, OVERHANG: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    if not INTERPRETED:
        cuda.gdc_wait()
    complete = complete_windows(tl.load(lengths + pair // groups), POOL, STRIDE)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    best = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    if part * BLOCKS * RATIO - OVERHANG < complete:
        head = tl.arange(0, ROWS)
        each = tl.arange(0, PARTS)
        place = (pair * parts + each[:, None]) * ROWS + head[None, :]
        peaks = tl.load(maxima + place, mask=each[:, None] < parts, other=float("-inf"))
        totals = tl.load(sums + place, mask=each[:, None] < parts, other=0.0)
        peak = tl.max(peaks, axis=0)
        normal = peak + tl.log(tl.sum(totals * tl.exp(peaks - peak[None, :]), axis=0))
        rows = (pair.to(tl.int64) * HEADS + head[:, None]) * room
        is_head = head[:, None] < HEADS
        # Windows that begin in a block lie side by side; those that begin before it do not.
        each = tl.arange(0, RATIOS)
        begun = block[:, None] * RATIO + each[None, :]
        exists = (each < RATIO)[None, :] & (begun < complete)
        mask = is_head[:, :, None] & exists[None, :, :]
        dots = tl.load(logits + rows[:, :, None] + begun[None, :, :], mask=mask, other=0.0)
        weight = tl.where(mask, tl.exp(dots - normal[:, None, None]), 0.0)
        best = tl.max(tl.where(exists, tl.sum(weight, axis=0), float("-inf")), axis=1)
        for i in tl.static_range(OVERHANG):
            window = block * RATIO - OVERHANG + i
            is_there = (window >= 0) & (window < complete)
            mask = is_head & is_there[None, :]
            dots = tl.load(logits + rows + window[None, :], mask=mask, other=0.0)
            weight = tl.where(mask, tl.exp(dots - normal[:, None]), 0.0)
            best = tl.maximum(best, tl.where(is_there, tl.sum(weight, axis=0), float("-inf")))
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
    heads = query.shape[1] // groups
    rows, parts = power_of_two(heads, 16), triton.cdiv(num_windows, _WINDOWS)
    pairs = batch * groups
    new = lengths_B.new_empty
    room = triton.cdiv(num_windows, _ALIGNED) * _ALIGNED
    logits = new((pairs, heads, room), dtype=torch.float32)
    maxima, sums = (new((pairs, parts, rows), dtype=torch.float32) for _ in range(2))
    pool = (geometry.pool_size, geometry.pool_stride)
    launch(_infllm2_logits, (pairs, parts))(
        query, pooled, lengths_B, logits, maxima, sums, scale, q_row, q_head, groups, num_windows,
        room, parts, heads, rows, *pool, dim, power_of_two(dim, 16), _WINDOWS, interpreting(),
        num_warps=4,
    )  # fmt: skip
    ratio, overhang = geometry.block_size // pool[1], pool[0] // pool[1] - 1
    launch(_infllm2_blocks, (pairs, triton.cdiv(geometry.num_blocks, _BLOCKS)))(
        logits, maxima, sums, lengths_B, scores_BGN, groups, room, geometry.num_blocks, parts,
        heads, rows, power_of_two(parts), *pool, ratio, power_of_two(ratio), overhang,
        _BLOCKS, interpreting(),
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
