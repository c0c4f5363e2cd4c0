"""Keys into the summaries of low-bit keys: in a decode step, and of a prompt.

    open_k[p % P] = k                                     the block that is being written
    codes, span, base of block n  <-  its P keys         when its last one comes

A block is quantised by one function, from the same P keys, wherever they come from: so its bits are
the same however a sequence was cut into steps. Programs share out the channels, which have nothing
to do with each other. Most steps of a decode fill no block, and store one key.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two, rows_of, tokens_of
from sparda_compile.kernels.gpu.packed_form import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["append_low_bit_keys", "extend_low_bit_keys", "quantize_keys"]

# Channels of a program.
_CHANNELS: Final = 64


@triton.jit
def quantize_keys(  # noqa: ANN201 - a part of kernels
    keys, like, SIZE: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
    LARGEST: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Return codes [SLOTS, DIMS] int32, span and base [DIMS] of the keys of a block.

    Span and base have the dtype of what `like` points to. A channel that has a NaN gets a span
    that is NaN. `CUTS` as for `packed_form.rounded`.
    """
    LEVELS: tl.constexpr = 1 << BITS
    is_slot = (tl.arange(0, SLOTS) < SIZE)[:, None]
    keys = keys.to(tl.float32)
    low = tl.min(tl.where(is_slot, keys, float("inf")), axis=0)
    high = tl.max(tl.where(is_slot, keys, float("-inf")), axis=0)
    is_broken = tl.max((is_slot & (keys != keys)).to(tl.int32), axis=0) > 0
    span = tl.minimum((high - low) * (LEVELS / (LEVELS - 1)), LARGEST)
    span = rounded(tl.where(is_broken, float("nan"), span), like, CUTS)
    wide = span.to(tl.float32)
    base = rounded(tl.maximum(low - wide, -LARGEST), like, CUTS)
    step = (wide * (1.0 / LEVELS))[None, :]
    above = keys - base.to(tl.float32)[None, :]
    steps = tl.div_rn(above, tl.where(step > 0, step, 1.0) + tl.zeros_like(keys)) - LEVELS
    steps = tl.floor(tl.where(step > 0, steps, 0.0) + 0.5)
    code = tl.where(is_slot, tl.clamp(steps, 0.0, LEVELS - 1.0), 0.0).to(tl.int32)
    return code, span, base


@triton.jit
def _store_codes(
    keys, place, dims, is_dim, codes, spans, bases,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Quantise the keys [SLOTS, DIMS] of a block; `place` is its number among all blocks."""
    PER: tl.constexpr = 8 // BITS
    BYTES: tl.constexpr = SIZE // PER
    code, span, base = quantize_keys(keys, spans, SIZE, SLOTS, BITS, LARGEST, False)
    shift = tl.arange(0, PER) * BITS
    parts = tl.reshape(code, [SLOTS // PER, PER, DIMS]) << shift[None, :, None]
    packed = tl.sum(parts, axis=1).to(tl.uint8)
    byte = tl.arange(0, SLOTS // PER)
    target = codes + (place.to(tl.int64) * BYTES + byte[:, None]) * DIM + dims[None, :]
    tl.store(target, packed, mask=(byte < BYTES)[:, None] & is_dim[None, :])
    channel = place.to(tl.int64) * DIM + dims
    tl.store(spans + channel, span, mask=is_dim)
    tl.store(bases + channel, base, mask=is_dim)


@triton.jit
def _append_low_bit_keys(
    k, lengths, codes, spans, bases, opened, k_row, k_head, groups, num_blocks,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // groups, pair % groups
    length = tl.load(lengths + row)
    dims = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    is_dim = dims < DIM
    key = tl.load(k + row * k_row + head * k_head + dims, mask=is_dim, other=0.0)
    ring = opened + pair.to(tl.int64) * SIZE * DIM
    last = length % SIZE
    tl.store(ring + last * DIM + dims, key, mask=is_dim)
    if last == SIZE - 1:
        slot = tl.arange(0, SLOTS)
        older = (slot < last)[:, None] & is_dim[None, :]
        keys = tl.load(ring + slot[:, None] * DIM + dims[None, :], mask=older, other=0.0)
        keys = tl.where((slot == last)[:, None], key[None, :], keys)
        place = pair * num_blocks + length // SIZE
        _store_codes(
            keys, place, dims, is_dim, codes, spans, bases, SIZE, SLOTS, BITS, DIM, DIMS, LARGEST
        )


def append_low_bit_keys(
    k_BG1D: Tensor, lengths_B: Tensor, tensors: Sequence[Tensor], geometry: Geometry
) -> None:
    """Take in one token per sequence; arguments as those of `append.SUMMARY_KERNELS`."""
    del geometry
    pairs, num_blocks, groups, sizes = _sizes(tensors)
    k, k_row, k_head = rows_of(k_BG1D)
    launch(_append_low_bit_keys, (pairs, triton.cdiv(sizes[3], sizes[4])))(
        k, lengths_B, *tensors, k_row, k_head, groups, num_blocks, *sizes, num_warps=4
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _extend_low_bit_keys(
    k, columns, lengths, totals, codes, spans, bases, opened, k_row, k_head, k_token, groups,
    num_tokens, num_blocks, SIZE: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    item, pair = tl.program_id(0), tl.program_id(1)
    row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    length, total = tl.load(lengths + row), tl.load(totals + row)
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    is_dim = dims < DIM
    key = k + row * k_row + head * k_head
    order = columns + row * num_tokens
    ring = opened + pair.to(tl.int64) * SIZE * DIM
    slot = tl.arange(0, SLOTS)
    slots = ring + slot[:, None] * DIM + dims[None, :]
    block = length // SIZE + item
    if (block + 1) * SIZE <= total:
        position = block * SIZE + slot
        is_new = (slot < SIZE) & (position >= length)
        column = tl.load(order + position - length, mask=is_new, other=0).to(tl.int64)
        new = tl.load(
            key + column[:, None] * k_token + dims[None, :],
            mask=is_new[:, None] & is_dim[None, :],
            other=0.0,
        )
        is_old = (position < length)[:, None]
        old = tl.load(slots, mask=is_old & is_dim[None, :], other=0.0)
        place = pair * num_blocks + block
        _store_codes(
            tl.where(is_old, old, new), place, dims, is_dim, codes, spans, bases,
            SIZE, SLOTS, BITS, DIM, DIMS, LARGEST,
        )  # fmt: skip
    if item == 0:
        # The keys of the block that stays open, where those of the first block were read before.
        tl.debug_barrier()
        position = total // SIZE * SIZE + slot
        is_new = (position >= length) & (position < total)
        column = tl.load(order + position - length, mask=is_new, other=0).to(tl.int64)
        mask = is_new[:, None] & is_dim[None, :]
        new = tl.load(key + column[:, None] * k_token + dims[None, :], mask=mask, other=0.0)
        tl.store(slots, new, mask=mask)


def extend_low_bit_keys(
    k_BGTD: Tensor,
    tokens: Sequence[Tensor],
    lengths_B: Tensor,
    tensors: Sequence[Tensor],
    geometry: Geometry,
) -> None:
    """Take in a prompt; arguments as those of `extend_summary.PROMPT_SUMMARY_KERNELS`."""
    del geometry
    pairs, num_blocks, groups, sizes = _sizes(tensors)
    num_tokens = k_BGTD.shape[2]
    _, columns, totals = tokens
    k, *strides = tokens_of(k_BGTD)
    # The first token may be the last of its block.
    items = triton.cdiv(num_tokens - 1, sizes[0]) + 1
    launch(_extend_low_bit_keys, (items, pairs, triton.cdiv(sizes[3], sizes[4])))(
        k, columns, lengths_B, totals, *tensors, *strides, groups, num_tokens, num_blocks,
        *sizes, num_warps=4,
    )  # fmt: skip


def _sizes(tensors: Sequence[Tensor]) -> tuple[int, int, int, tuple[Any, ...]]:
    """Return pairs, N, G, and what kernels are compiled for."""
    codes, opened = tensors[0], tensors[3]
    batch, groups, num_blocks, num_bytes, dim = codes.shape
    size = opened.shape[2]
    bits = 8 * num_bytes // size
    channels = min(power_of_two(dim, 16), _CHANNELS)
    largest = torch.finfo(opened.dtype).max
    forms = (size, power_of_two(size), bits, dim, channels, largest)
    return batch * groups, num_blocks, groups, forms
