"""Keys that stay on the device: blocks' keys from their codes; see `formats/staying.py`.

A gather of `packed.py` reads the values of a block from CPU memory; its other half of the programs
makes the keys here. Both are made of codes, spans and bases by the function with which
`packed_store.py` rounds a block that fills, so that they have the same bits.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.copy import find_listed
from sparda_compile.kernels.gpu.packed_form import rounded

__all__ = ["keys_of", "write_block", "write_keys"]

_BYTE: Final = tl.constexpr(8)


@triton.jit
def keys_of(code, span, base, BITS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return keys [P, D] float32 of codes [P, D], spans and bases [D], as `selectors/lowbit.py`."""
    factor = 1.0 + code.to(tl.float32) * (1.0 / (1 << BITS))
    return factor * span.to(tl.float32)[None, :] + base.to(tl.float32)[None, :]


@triton.jit
def write_block(  # noqa: ANN201 - a part of kernels
    place, codes, spans, bases, pages, target, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, KEPT: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Write the keys of a block to [P, D] in a page; `place` is its number among all blocks."""
    PER: tl.constexpr = _BYTE // KEPT
    BYTES: tl.constexpr = SIZE // PER
    token, dims, byte = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    is_dim = dims < DIM
    at = codes + (place * BYTES + byte[:, None]) * DIM + dims[None, :]
    packed = tl.load(at, mask=(byte < BYTES)[:, None] & is_dim[None, :], other=0).to(tl.int32)
    shift = tl.arange(0, PER) * KEPT
    code = (packed[:, None, :] >> shift[None, :, None]) & ((1 << KEPT) - 1)
    channel = place * DIM + dims
    span = tl.load(spans + channel, mask=is_dim, other=0.0)
    base = tl.load(bases + channel, mask=is_dim, other=0.0)
    values = keys_of(tl.reshape(code, [SLOTS, DIMS]), span, base, KEPT)
    to = target + token[:, None] * DIM + dims[None, :]
    tl.store(to, rounded(values, pages, CUTS), mask=(token < SIZE)[:, None] & is_dim[None, :])


@triton.jit
def write_keys(  # noqa: ANN201 - a part of kernels
    count, blocks, slots, codes, spans, bases, target, listed, num_slots, num_blocks,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write the keys of the first `count` listed blocks of each row: this program's share."""
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0)
    item = tl.program_id(0)
    while item < total:
        row, place = find_listed(item, count, end, listed, ROWS)
        block, slot = tl.load(blocks + place).to(tl.int64), tl.load(slots + place).to(tl.int64)
        to = target + (row.to(tl.int64) * num_slots + slot) * (2 * SIZE * DIM)
        number = row.to(tl.int64) * num_blocks + block
        write_block(number, codes, spans, bases, target, to, SIZE, SLOTS, DIM, DIMS, KEPT, CUTS)
        item += tl.num_programs(0)
