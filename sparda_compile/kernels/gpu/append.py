"""One new token per sequence: its key and value into the tail page, its key into the summary.

    pages[b, g, tail_page, :, length % P] = k, v
    recent_k[length % size] = k ;  pooled_k[j] = mean(recent_k)     when token length ends window j
    key_bounds[block, 0 or 1] = min or max with k
    low-bit keys in `low_bit_keys.py`

One program per sequence and group. Moves a few hundred bytes each: the launch is what it costs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two, rows_of
from sparda_compile.kernels.gpu.low_bit_keys import append_low_bit_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["SUMMARY_KERNELS", "append_kv"]


@triton.jit
def _append_kv(
    k, v, tail_page, lengths, pages, k_row, k_head, v_row, v_head, groups, num_pages,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // groups, pair % groups
    length = tl.load(lengths + row)
    page = tl.load(tail_page + pair)
    if TAIL:
        page = tl.minimum(page, 0)  # the first page of `tail`, where the block has one
    dims = tl.arange(0, DIMS)
    mask = dims < tl.where(page >= 0, DIM, 0)
    key = tl.load(k + row * k_row + head * k_head + dims, mask=mask)
    value = tl.load(v + row * v_row + head * v_head + dims, mask=mask)
    first = (pair.to(tl.int64) * num_pages + page) * (2 * SIZE * DIM) + (length % SIZE) * DIM
    tl.store(pages + first + dims, key, mask=mask)
    tl.store(pages + first + SIZE * DIM + dims, value, mask=mask)


def append_kv(
    k_BG1D: Tensor,
    v_BG1D: Tensor,
    tail_page_BG: Tensor,
    lengths_B: Tensor,
    pages: Tensor,
    *,
    is_tail: bool = False,
) -> None:
    """Write one token per sequence to its tail page; see `runtime.append.append_kv`."""
    batch, groups, num_pages, _, size, dim = pages.shape
    k, k_row, k_head = rows_of(k_BG1D)
    v, v_row, v_head = rows_of(v_BG1D)
    launch(_append_kv, (batch * groups,))(
        k, v, tail_page_BG, lengths_B, pages, k_row, k_head, v_row, v_head, groups, num_pages,
        size, dim, power_of_two(dim), is_tail, num_warps=1,
    )  # fmt: skip


@triton.jit
def _append_pooled_keys(
    k, lengths, pooled, recent, k_row, k_head, groups, num_windows,
    POOL: tl.constexpr, POOLS: tl.constexpr, STRIDE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // groups, pair % groups
    length = tl.load(lengths + row)
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    key = tl.load(k + row * k_row + head * k_head + dims, mask=is_dim)
    ring = recent + pair.to(tl.int64) * POOL * DIM
    slot = length % POOL
    tl.store(ring + slot * DIM + dims, key, mask=is_dim)
    start = length + 1 - POOL
    if (start >= 0) & (start % STRIDE == 0):
        slots = tl.arange(0, POOLS)
        others = (slots[:, None] < POOL) & (slots[:, None] != slot) & is_dim[None, :]
        keys = tl.load(ring + slots[:, None] * DIM + dims[None, :], mask=others, other=0.0)
        mean = (tl.sum(keys.to(tl.float32), axis=0) + key.to(tl.float32)) / POOL
        window = pair.to(tl.int64) * num_windows + start // STRIDE
        tl.store(pooled + window * DIM + dims, mean.to(pooled.dtype.element_ty), mask=is_dim)


def _pooled_keys(
    k_BG1D: Tensor, lengths_B: Tensor, tensors: Sequence[Tensor], geometry: Geometry
) -> None:
    pooled_BGWD, recent_BGPD = tensors
    batch, groups, num_windows, dim = pooled_BGWD.shape
    size = recent_BGPD.shape[2]
    k, k_row, k_head = rows_of(k_BG1D)
    launch(_append_pooled_keys, (batch * groups,))(
        k, lengths_B, pooled_BGWD, recent_BGPD, k_row, k_head, groups, num_windows,
        size, power_of_two(size), geometry.pool_stride, dim, power_of_two(dim), num_warps=4,
    )  # fmt: skip


@triton.jit
def _append_key_bounds(
    k, lengths, bounds, k_row, k_head, groups, num_blocks,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // groups, pair % groups
    block = tl.load(lengths + row) // SIZE
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    key = tl.load(k + row * k_row + head * k_head + dims, mask=is_dim)
    low = bounds + (pair.to(tl.int64) * num_blocks + block) * (2 * DIM) + dims
    smallest = tl.minimum(tl.load(low, mask=is_dim).to(tl.float32), key.to(tl.float32))
    largest = tl.maximum(tl.load(low + DIM, mask=is_dim).to(tl.float32), key.to(tl.float32))
    tl.store(low, smallest.to(bounds.dtype.element_ty), mask=is_dim)
    tl.store(low + DIM, largest.to(bounds.dtype.element_ty), mask=is_dim)


def _key_bounds(
    k_BG1D: Tensor, lengths_B: Tensor, tensors: Sequence[Tensor], geometry: Geometry
) -> None:
    (bounds_BGN2D,) = tensors
    batch, groups, num_blocks, _, dim = bounds_BGN2D.shape
    k, k_row, k_head = rows_of(k_BG1D)
    launch(_append_key_bounds, (batch * groups,))(
        k, lengths_B, bounds_BGN2D, k_row, k_head, groups, num_blocks,
        geometry.block_size, dim, power_of_two(dim), num_warps=1,
    )  # fmt: skip


# A summary that is not here takes keys in by its own `extend`, in plain PyTorch on the device.
SUMMARY_KERNELS: Final[dict[str, Callable[..., None]]] = {
    "pooled_keys": _pooled_keys,
    "key_bounds": _key_bounds,
    "lowbit2_keys": append_low_bit_keys,
    "lowbit4_keys": append_low_bit_keys,
}
