"""Blocks whose keys stay on the device, to device pages: values from CPU memory, keys from codes.

    gather_staying         pages[b, g, miss_pages[i]] = keys, unpack(host[b, g, miss_blocks[i]])
    gather_listed_staying  the same for lists that are long and counted

As in `packed.py` a program has the keys or the values of a block as one tile. Keys are made of
codes, spans and bases by the function with which `packed_store.py` rounds a block that fills, so
that both give the same bits. The formats are those of `formats/staying.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS, count_listed, find_listed
from sparda_compile.kernels.gpu.launch import as_written, launch, power_of_two
from sparda_compile.kernels.gpu.packed_form import Form, codes_at, functions_of, rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["gather_listed_staying", "gather_staying", "keys_of", "value_scales_at"]

_COUNT_TILE: Final = 8192
_WORD_BITS: Final = tl.constexpr(16)


@triton.jit
def keys_of(code, span, base, BITS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return keys [P, D] float32 of codes [P, D], spans and bases [D], as `selectors/lowbit.py`."""
    factor = 1.0 + code.to(tl.float32) * (1.0 / (1 << BITS))
    return factor * span.to(tl.float32)[None, :] + base.to(tl.float32)[None, :]


@triton.jit
def value_scales_at(  # noqa: ANN201 - a part of kernels
    run, pages, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr
):
    """Return where the scales of the values of a stored block are."""
    # Of the pointer to the run, then moved, as `packed.codes_at` has it.
    WIDTH: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth
    return tl.multiple_of(run.to(pages.dtype), 16) + SIZE * DIM * BITS // WIDTH


@triton.jit
def _read_keys(
    place, codes, spans, bases, pages, target, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, KEPT: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    """Write the keys of a block to [P, D] in a page; `place` is its number among all blocks."""
    PER: tl.constexpr = _WORD_BITS // KEPT
    WORDS: tl.constexpr = SIZE // PER
    token, dims, word = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    is_dim = dims < DIM
    at = codes + (place * WORDS + word[:, None]) * DIM + dims[None, :]
    words = tl.load(at, mask=(word < WORDS)[:, None] & is_dim[None, :], other=0).to(tl.int32)
    shift = tl.arange(0, PER) * KEPT
    code = (words[:, None, :] >> shift[None, :, None]) & ((1 << KEPT) - 1)
    channel = place * DIM + dims
    span = tl.load(spans + channel, mask=is_dim, other=0.0)
    base = tl.load(bases + channel, mask=is_dim, other=0.0)
    values = keys_of(tl.reshape(code, [SLOTS, DIMS]), span, base, KEPT)
    to = target + token[:, None] * DIM + dims[None, :]
    tl.store(to, rounded(values, pages, CUTS), mask=(token < SIZE)[:, None] & is_dim[None, :])


@triton.jit
def _read_values(
    run, pages, target, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    """Write the values of a stored block to [P, D] in a page."""
    PER: tl.constexpr = 8 // BITS
    token, dims, byte = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    at_codes = codes_at(run, True, SIZE, DIM, BITS) + byte[:, None] * DIM + dims[None, :]
    is_code = (byte < SIZE // PER)[:, None] & (dims < DIM)[None, :]
    codes = tl.load(at_codes, mask=is_code, other=0).to(tl.int32)
    if PER > 1:
        shift = tl.arange(0, PER) * BITS
        codes = (codes[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [SLOTS, DIMS])
    at_scales = value_scales_at(run, pages, SIZE, DIM, BITS) + token
    first = tl.load(at_scales, mask=token < SIZE, other=0.0).to(tl.float32)
    last = tl.load(at_scales + (SCALES - 1) * SIZE, mask=token < SIZE, other=0.0).to(tl.float32)
    values = DECODE(codes, tl.expand_dims(first, 1), tl.expand_dims(last, 1))
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = target + token[:, None] * DIM + dims[None, :]
    tl.store(at, rounded(values, pages, CUTS), mask=inside)


@triton.jit
def _read_listed(
    count, blocks, slots, host, key_codes, key_span, key_base, target, listed, num_slots,
    num_blocks, programs, ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Read the first `count` listed blocks of each row to their slots: this program's share."""
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0) * 2
    item = tl.program_id(0)
    while item < total:
        row, place = find_listed(item // 2, count, end, listed, ROWS)
        block, slot = tl.load(blocks + place).to(tl.int64), tl.load(slots + place).to(tl.int64)
        to = target + (row.to(tl.int64) * num_slots + slot) * (2 * SIZE * DIM)
        if item % 2 == 0:
            number = row.to(tl.int64) * num_blocks + block
            _read_keys(
                number, key_codes, key_span, key_base, target, to, SIZE, SLOTS, DIM, DIMS, KEPT,
                CUTS,
            )  # fmt: skip
        else:
            run = tl.load(host + row) + block * RUN
            to += SIZE * DIM
            _read_values(run, target, to, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS, DECODE)
        item += programs


@triton.jit
def _gather_staying(
    miss_blocks, miss_pages, host, key_codes, key_span, key_base, pages, num_rows, num_pages,
    num_blocks, programs, SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    KEPT: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    count = count_listed(miss_blocks, num_rows, SELECTED, ROWS, COLUMNS)
    _read_listed(
        count, miss_blocks, miss_pages, host, key_codes, key_span, key_base, pages, SELECTED,
        num_pages, num_blocks, programs, ROWS, SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS,
        KEPT, DECODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["listed", "num_slots"])
def _gather_listed_staying(
    blocks, slots, counts, host, key_codes, key_span, key_base, staging, listed, num_rows,
    num_slots, num_blocks, programs, ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < num_rows, other=0)
    _read_listed(
        count, blocks, slots, host, key_codes, key_span, key_base, staging, listed, num_slots,
        num_blocks, programs, ROWS, SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, KEPT, DECODE,
    )  # fmt: skip


def _key_bits(key_codes: Tensor, size: int) -> int:
    return 16 * key_codes.shape[3] // size


def gather_staying(
    miss_blocks_BGK: Tensor,
    miss_pages_BGK: Tensor,
    host_BG: Tensor,
    keys: Sequence[Tensor],
    pages: Tensor,
    kv_format: str,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch the missed blocks to their pages.

    Args:
        miss_blocks_BGK: int32, compacted, then -1.
        miss_pages_BGK: int32.
        host_BG: int64 addresses.
        keys: Codes [B, G, N, C, D] int16, span and base [B, G, N, D].
        pages: [B, G, C, 2, P, D], updated.
        kv_format: How the values are stored.
        num_programs: Programs.
    """
    batch, groups, selected = miss_blocks_BGK.shape
    form, bits = Form.of(pages, kv_format), _key_bits(keys[0], pages.shape[4])
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather_staying, (num_programs,))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, *keys, pages, batch * groups, pages.shape[2],
        keys[0].shape[2], num_programs, selected, rows, columns, *form, bits,
        functions_of(kv_format).decode, num_warps=form.num_warps, **as_written(),
    )  # fmt: skip


def gather_listed_staying(
    blocks_nL: Tensor,
    slots_nL: Tensor,
    counts_n: Tensor,
    host_BG: Tensor,
    keys: Sequence[Tensor],
    staging: Tensor,
    kv_format: str,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch as many blocks of each sequence and head as a count says; see `copy.gather_listed`.

    Args:
        blocks_nL: int32, a list for each of the n sequences times heads.
        slots_nL: int32, where each goes.
        counts_n: int32, entries of each list.
        host_BG: int64 addresses.
        keys: As for `gather_staying`.
        staging: [B, G, S, 2, P, D], updated.
        kv_format: How the values are stored.
        num_programs: As for `gather_staying`.
    """
    num_rows, listed = blocks_nL.shape
    form, bits = Form.of(staging, kv_format), _key_bits(keys[0], staging.shape[4])
    launch(_gather_listed_staying, (num_programs,))(
        blocks_nL, slots_nL, counts_n, host_BG, *keys, staging, listed, num_rows,
        staging.shape[2], keys[0].shape[2], num_programs, power_of_two(num_rows), *form, bits,
        functions_of(kv_format).decode, num_warps=form.num_warps, **as_written(),
    )  # fmt: skip
