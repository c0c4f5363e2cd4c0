"""A prompt's keys into the summaries that selectors score.

    pooled keys    pooled_k[j] = mean of window j, its past keys from the ring; then the ring
    key bounds     key_bounds[block] = min and max with the block's new keys
    low-bit keys   in `low_bit_keys.py`

Grids follow from shapes alone, as in `extend.py`. A mean is summed in the order in which
`append.py` sums it: a key is pooled alike by decode steps and by prompts, however those were cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two, tokens_of
from sparda_compile.kernels.gpu.low_bit_keys import extend_low_bit_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["PROMPT_SUMMARY_KERNELS"]

_ROWS: Final = 16


@triton.jit
def _pool(
    k, columns, ring, pooled, window, length, k_token,
    POOL: tl.constexpr, POOLS: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Write one window; its last key is new, and those before the step are in the ring."""
    start = window * STRIDE
    slot = tl.arange(0, POOLS)
    position = start + (slot - start % POOL + POOL) % POOL
    summed = (slot < POOL) & (position != start + POOL - 1)
    is_new = summed & (position >= length)
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    column = tl.load(columns + position - length, mask=is_new, other=0).to(tl.int64)
    new = tl.load(
        k + column[:, None] * k_token + dims, mask=is_new[:, None] & is_dim[None, :], other=0.0
    )
    is_old = summed & (position < length)
    mask = is_old[:, None] & is_dim[None, :]
    old = tl.load(ring + slot[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    keys = tl.where(is_old[:, None], old, new)
    last = tl.load(columns + start + POOL - 1 - length).to(tl.int64)
    key = tl.load(k + last * k_token + dims, mask=is_dim, other=0.0)
    mean = (tl.sum(keys.to(tl.float32), axis=0) + key.to(tl.float32)) / POOL
    target = pooled + window.to(tl.int64) * DIM + dims
    tl.store(target, mean.to(pooled.dtype.element_ty), mask=is_dim)


@triton.jit(do_not_specialize=["num_tokens"])
def _extend_pooled_keys(
    k, columns, lengths, totals, pooled, recent, k_row, k_head, k_token, groups, num_tokens,
    num_windows, POOL: tl.constexpr, POOLS: tl.constexpr, STRIDE: tl.constexpr,
    OLD: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    item, pair = tl.program_id(0), tl.program_id(1)
    row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    length = tl.load(lengths + row)
    total = tl.load(totals + row)
    key = k + row * k_row + head * k_head
    order = columns + row * num_tokens
    ring = recent + pair.to(tl.int64) * POOL * DIM
    means = pooled + pair.to(tl.int64) * num_windows * DIM
    # Windows that are complete, before this step and behind it.
    begin = tl.maximum(length - POOL + STRIDE, 0) // STRIDE
    end = tl.maximum(total - POOL + STRIDE, 0) // STRIDE
    if item > 0:
        # These begin behind the past.
        window = begin + OLD + item - 1
        if window < end:
            _pool(key, order, ring, means, window, length, k_token, POOL, POOLS, STRIDE, DIM, DIMS)
    else:
        window = begin
        while window < tl.minimum(begin + OLD, end):
            _pool(key, order, ring, means, window, length, k_token, POOL, POOLS, STRIDE, DIM, DIMS)
            window += 1
        tl.debug_barrier()
        slot = tl.arange(0, POOLS)
        position = total - 1 - (total - 1 - slot + POOL) % POOL
        is_new = (slot < POOL) & (position >= length)
        dims = tl.arange(0, DIMS)
        mask = is_new[:, None] & (dims < DIM)[None, :]
        column = tl.load(order + position - length, mask=is_new, other=0).to(tl.int64)
        newest = tl.load(key + column[:, None] * k_token + dims, mask=mask, other=0.0)
        tl.store(ring + slot[:, None] * DIM + dims[None, :], newest, mask=mask)


def _pooled_keys(
    k_BGTD: Tensor,
    tokens: Sequence[Tensor],
    lengths_B: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
) -> None:
    pooled_BGWD, recent_BGPD = tensors
    batch, groups, num_windows, dim = pooled_BGWD.shape
    num_tokens, size, stride = k_BGTD.shape[2], recent_BGPD.shape[2], geometry.pool_stride
    _, columns, totals = tokens
    k, *strides = tokens_of(k_BGTD)
    num_old = triton.cdiv(size, stride)
    items = 1 + max(triton.cdiv(num_tokens, stride) - num_old, 0)
    launch(_extend_pooled_keys, (items, batch * groups))(
        k, columns, lengths_B, totals, pooled_BGWD, recent_BGPD, *strides,
        groups, num_tokens, num_windows, size, power_of_two(size), stride, num_old, dim,
        power_of_two(dim), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _extend_key_bounds(
    k, columns, lengths, totals, bounds, k_row, k_head, k_token, groups, num_tokens, num_blocks,
    SIZE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    length = tl.load(lengths + row)
    block = length // SIZE + tl.program_id(0)
    begin = tl.maximum(block * SIZE, length)
    end = tl.minimum((block + 1) * SIZE, tl.load(totals + row))
    if begin < end:
        dims = tl.arange(0, DIMS)
        is_dim = dims < DIM
        low = bounds + (pair.to(tl.int64) * num_blocks + block) * (2 * DIM) + dims
        smallest = tl.load(low, mask=is_dim, other=0.0).to(tl.float32)
        largest = tl.load(low + DIM, mask=is_dim, other=0.0).to(tl.float32)
        for first in range(begin, end, ROWS):
            position = first + tl.arange(0, ROWS)
            column = tl.load(
                columns + row * num_tokens + position - length, mask=position < end, other=0
            ).to(tl.int64)
            mask = (position < end)[:, None] & is_dim[None, :]
            place = k + row * k_row + head * k_head + column[:, None] * k_token + dims[None, :]
            key = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            smallest = tl.minimum(smallest, tl.min(tl.where(mask, key, float("inf")), 0))
            largest = tl.maximum(largest, tl.max(tl.where(mask, key, float("-inf")), 0))
        tl.store(low, smallest.to(bounds.dtype.element_ty), mask=is_dim)
        tl.store(low + DIM, largest.to(bounds.dtype.element_ty), mask=is_dim)


def _key_bounds(
    k_BGTD: Tensor,
    tokens: Sequence[Tensor],
    lengths_B: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
) -> None:
    (bounds_BGN2D,) = tensors
    batch, groups, num_blocks, _, dim = bounds_BGN2D.shape
    num_tokens, size = k_BGTD.shape[2], geometry.block_size
    _, columns, totals = tokens
    k, *strides = tokens_of(k_BGTD)
    # The first token may be the last of its block.
    items = triton.cdiv(num_tokens - 1, size) + 1
    launch(_extend_key_bounds, (items, batch * groups))(
        k, columns, lengths_B, totals, bounds_BGN2D, *strides, groups,
        num_tokens, num_blocks, size, min(power_of_two(size), _ROWS), dim, power_of_two(dim),
        num_warps=4,
    )  # fmt: skip


# As `append.SUMMARY_KERNELS`, for many tokens: their positions, columns and totals come second.
PROMPT_SUMMARY_KERNELS: Final[dict[str, Callable[..., None]]] = {
    "pooled_keys": _pooled_keys,
    "key_bounds": _key_bounds,
    "lowbit2_keys": extend_low_bit_keys,
    "lowbit4_keys": extend_low_bit_keys,
}
