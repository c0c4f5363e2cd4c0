"""Blocks of a format that rounds, between pinned CPU memory and device pages; see `copy.py`.

    gather_packed         pages[b, g, miss_pages[i]] = unpack(host[b, g, miss_blocks[i]])
    gather_listed_packed  the same for lists that are long and counted
    store_tail            host = pack(pages[.., tail_page]), and the page as it will be read back
    store_prefix          the same of the blocks that a prompt has filled

A program has the keys or the values of a block as one tile: what scales them lies on one of its
axes. Its codes are read from CPU memory once, side by side. A format gives two functions:

    encode(x, inside, AXIS)       codes of a tile [P, D], int32, and two numbers for each line along
                                  AXIS; x is 0 where it is not finite, or not inside
    decode(codes, first, last)    values, given those numbers along the same axis

Each product and sum rounds by itself, so that what is written to a page when a block fills is what
the gather makes of the stored block.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import triton
import triton.language as tl

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS, count_listed, find_listed
from sparda_compile.kernels.gpu.launch import (
    as_written,
    interpreting,
    launch,
    power_of_two,
    tokens_of,
)
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["gather_listed_packed", "gather_packed", "store_prefix", "store_tail"]

_BYTES_IN_FLIGHT: Final = 256 * 1024
_COUNT_TILE: Final = 8192
_ELEMENTS_OF_A_WARP: Final = 1024
_MOST_WARPS: Final = 16


class _Form(NamedTuple):
    """What kernels are compiled for: sizes of a block and of its run, and the codes.

    `cuts` says that a cast to bfloat16 does not round, as that of the interpreter.
    """

    size: int
    slots: int
    dim: int
    dims: int
    run: int
    bits: int
    scales: int
    cuts: bool

    @classmethod
    def of(cls, pages: Tensor, kv_format: str) -> _Form:
        found, (size, dim) = KV_FORMATS[kv_format], pages.shape[4:]
        run = found.num_bytes(size, dim, pages.dtype)
        sides = (size, power_of_two(size), dim, power_of_two(dim))
        return cls(*sides, run, found.code_bits, found.num_scales, interpreting())

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return min(max(self.slots * self.dims // _ELEMENTS_OF_A_WARP, 1), _MOST_WARPS)

    @property
    def num_programs(self) -> int:
        """Programs that have enough in flight together."""
        return min(max(2 * _BYTES_IN_FLIGHT // self.run, 1), GATHER_PROGRAMS)


def _functions(kv_format: str) -> Any:
    """Return the module with the functions of a format.

    Raises:
        UnsupportedInputError: If it has none.
    """
    module = KV_FORMATS[kv_format].kernels
    if module is None:
        raise UnsupportedInputError(
            f"kv_format={kv_format!r} has no kernels, so it works on a CPU alone; use one of "
            f"{', '.join(found.name for found in KV_FORMATS if found.kernels)}, or 'model'."
        )
    return importlib.import_module(module)


@triton.jit
def _scales_at(run, pages, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
               BITS: tl.constexpr, SCALES: tl.constexpr):  # fmt: skip
    """Return where the scales of the keys or values of a stored block are."""
    WIDTH: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    CODES: tl.constexpr = 2 * SIZE * DIM * BITS // 8
    return (run + CODES + (0 if KEYS else SCALES * DIM * WIDTH)).to(pages.dtype)


@triton.jit
def _codes_at(run, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr):
    """Return where the codes of the keys or values of a stored block are."""
    CODES: tl.constexpr = SIZE * DIM * BITS // 8
    codes = run + (0 if KEYS else CODES)
    return tl.multiple_of(codes.to(tl.pointer_type(tl.uint8)), 16 if CODES % 16 == 0 else 8)


@triton.jit
def _rounded(values, pages, CUTS: tl.constexpr):
    """Return float32 values in the dtype of pages, each the nearest one; ties go to the even."""
    if CUTS & (pages.dtype.element_ty == tl.bfloat16):
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, near, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(pages.dtype.element_ty)


@triton.jit
def _unpack_half(
    run, pages, target, KEYS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Write the keys or values of a stored block to [P, D] in a page."""
    PER: tl.constexpr = 8 // BITS
    AXIS: tl.constexpr = 0 if KEYS else 1
    token, dims, byte = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    codes_at = _codes_at(run, KEYS, SIZE, DIM, BITS) + byte[:, None] * DIM + dims[None, :]
    is_code = (byte < SIZE // PER)[:, None] & (dims < DIM)[None, :]
    codes = tl.load(codes_at, mask=is_code, other=0).to(tl.int32)
    if PER > 1:
        shift = tl.arange(0, PER) * BITS
        codes = (codes[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [SLOTS, DIMS])
    line = dims if KEYS else token
    LINES: tl.constexpr = DIM if KEYS else SIZE
    scales_at = _scales_at(run, pages, KEYS, SIZE, DIM, BITS, SCALES) + line
    first = tl.load(scales_at, mask=line < LINES, other=0.0).to(tl.float32)
    last = tl.load(scales_at + (SCALES - 1) * LINES, mask=line < LINES, other=0.0).to(tl.float32)
    values = DECODE(codes, tl.expand_dims(first, AXIS), tl.expand_dims(last, AXIS))
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = target + token[:, None] * DIM + dims[None, :]
    tl.store(at, _rounded(values, pages, CUTS), mask=inside)


@triton.jit
def _round_half(
    x, run, pages, target, page, KEYS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, HAS_HOST: tl.constexpr, ENCODE: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Store keys or values [SLOTS, DIMS] of a block, and write to its page what is read back."""
    PER: tl.constexpr = 8 // BITS
    AXIS: tl.constexpr = 0 if KEYS else 1
    token, dims, byte = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    x = x.to(tl.float32)
    is_finite = (x - x) == 0.0
    codes, first, last = ENCODE(tl.where(inside & is_finite, x, 0.0), inside, AXIS)
    is_broken = tl.max((inside & (is_finite == 0)).to(tl.int32), AXIS) > 0
    first = tl.where(is_broken, float("nan"), first)
    last = tl.where(is_broken, float("nan"), last)
    codes = tl.where(tl.expand_dims(is_broken, AXIS), 0, codes) & ((1 << BITS) - 1)
    if HAS_HOST:
        joined = codes
        if PER > 1:
            shift = tl.arange(0, PER) * BITS
            parts = tl.reshape(codes, [SLOTS // PER, PER, DIMS]) << shift[None, :, None]
            joined = tl.sum(parts, axis=1)
        codes_at = _codes_at(run, KEYS, SIZE, DIM, BITS) + byte[:, None] * DIM + dims[None, :]
        is_code = (byte < SIZE // PER)[:, None] & (dims < DIM)[None, :]
        tl.store(codes_at, joined.to(tl.uint8), mask=is_code)
        line = dims if KEYS else token
        LINES: tl.constexpr = DIM if KEYS else SIZE
        scales_at = _scales_at(run, pages, KEYS, SIZE, DIM, BITS, SCALES) + line
        tl.store(scales_at, first.to(pages.dtype.element_ty), mask=line < LINES)
        if SCALES > 1:
            tl.store(scales_at + LINES, last.to(pages.dtype.element_ty), mask=line < LINES)
    values = DECODE(codes, tl.expand_dims(first, AXIS), tl.expand_dims(last, AXIS))
    at = target + token[:, None] * DIM + dims[None, :]
    kept = (token < tl.where(page >= 0, SIZE, 0))[:, None] & (dims < DIM)[None, :]
    tl.debug_barrier()  # the tile may have been read from the same page
    tl.store(at, _rounded(values, pages, CUTS), mask=kept)


@triton.jit
def _unpack_listed(
    count, blocks, slots, host, target, listed, num_slots, programs,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Unpack the first `count` listed blocks of each row to their slots: this program's share."""
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0) * 2
    item = tl.program_id(0)
    while item < total:
        row, place = find_listed(item // 2, count, end, listed, ROWS)
        block, slot = tl.load(blocks + place).to(tl.int64), tl.load(slots + place).to(tl.int64)
        run = tl.load(host + row) + block * RUN
        to = target + (row.to(tl.int64) * num_slots + slot) * (2 * SIZE * DIM)
        if item % 2 == 0:
            _unpack_half(run, target, to, True, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS, DECODE)
        else:
            to += SIZE * DIM
            _unpack_half(run, target, to, False, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS, DECODE)
        item += programs


@triton.jit
def _gather_packed(
    miss_blocks, miss_pages, host, pages, num_rows, num_pages, programs,
    SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    count = count_listed(miss_blocks, num_rows, SELECTED, ROWS, COLUMNS)
    _unpack_listed(
        count, miss_blocks, miss_pages, host, pages, SELECTED, num_pages, programs, ROWS,
        SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, DECODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["listed", "num_slots"])
def _gather_listed_packed(
    blocks, slots, counts, host, staging, listed, num_rows, num_slots, programs,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < num_rows, other=0)
    _unpack_listed(
        count, blocks, slots, host, staging, listed, num_slots, programs, ROWS,
        SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, DECODE,
    )  # fmt: skip


def gather_packed(
    miss_blocks_BGK: Tensor,
    miss_pages_BGK: Tensor,
    host_BG: Tensor,
    pages: Tensor,
    kv_format: str,
    num_programs: int = 0,
) -> None:
    """Fetch the missed blocks to their pages.

    Args:
        miss_blocks_BGK: int32, compacted, then -1.
        miss_pages_BGK: int32.
        host_BG: int64 addresses.
        pages: [B, G, C, 2, P, D], updated.
        kv_format: How the blocks are stored.
        num_programs: Programs; 0 for as many as have 256 KiB in flight together.
    """
    batch, groups, selected = miss_blocks_BGK.shape
    form = _Form.of(pages, kv_format)
    num_programs = num_programs or form.num_programs
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather_packed, (num_programs,))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, pages, batch * groups, pages.shape[2],
        num_programs, selected, rows, columns, *form, _functions(kv_format).decode,
        num_warps=form.num_warps, **as_written(),
    )  # fmt: skip


def gather_listed_packed(
    blocks_nL: Tensor,
    slots_nL: Tensor,
    counts_n: Tensor,
    host_BG: Tensor,
    staging: Tensor,
    kv_format: str,
    num_programs: int = 0,
) -> None:
    """Fetch as many blocks of each sequence and head as a count says; see `copy.gather_listed`.

    Args:
        blocks_nL: int32, a list for each of the n sequences times heads.
        slots_nL: int32, where each goes.
        counts_n: int32, entries of each list.
        host_BG: int64 addresses.
        staging: [B, G, S, 2, P, D], updated.
        kv_format: How the blocks are stored.
        num_programs: As for `gather_packed`.
    """
    num_rows, listed = blocks_nL.shape
    form = _Form.of(staging, kv_format)
    num_programs = num_programs or form.num_programs
    launch(_gather_listed_packed, (num_programs,))(
        blocks_nL, slots_nL, counts_n, host_BG, staging, listed, num_rows, staging.shape[2],
        num_programs, power_of_two(num_rows), *form, _functions(kv_format).decode,
        num_warps=form.num_warps, **as_written(),
    )  # fmt: skip


@triton.jit
def _store_tail_packed(
    tail_page, lengths, pages, host, counter, groups, num_pages, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr, HAS_HOST: tl.constexpr, ENCODE: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    pair, half = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    page = tl.load(tail_page + pair)
    if ((length + 1) % SIZE == 0) & (page >= 0):
        run = pair.to(tl.int64)
        if HAS_HOST:
            run = tl.load(host + pair) + (length // SIZE).to(tl.int64) * RUN
        to = pages + ((pair.to(tl.int64) * num_pages + page) * 2 + half) * (SIZE * DIM)
        token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
        inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
        x = tl.load(to + token[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        if half == 0:
            _round_half(
                x, run, pages, to, page, True, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS, HAS_HOST,
                ENCODE, DECODE,
            )  # fmt: skip
            if HAS_HOST:
                tl.atomic_add(counter, 1)
        else:
            _round_half(
                x, run, pages, to, page, False, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS, HAS_HOST,
                ENCODE, DECODE,
            )  # fmt: skip


def store_tail(
    tail_page_BG: Tensor,
    lengths_B: Tensor,
    pages: Tensor,
    host_BG: Tensor,
    counter: Tensor,
    kv_format: str,
) -> None:
    """Store and round each block that the current token has filled; see `runtime.packed`.

    Args:
        tail_page_BG: int32 page of the current block, -1 if it has none.
        lengths_B: int32, position of the current token.
        pages: [B, G, C, 2, P, D], updated.
        host_BG: int64 addresses; what they point to is written. Empty without offload.
        counter: One int64, raised by the number of blocks that went to CPU memory.
        kv_format: How blocks are stored.
    """
    batch, groups, num_pages = pages.shape[:3]
    form, functions = _Form.of(pages, kv_format), _functions(kv_format)
    has_host = host_BG.numel() > 0
    launch(_store_tail_packed, (batch * groups, 2))(
        tail_page_BG, lengths_B, pages, host_BG if has_host else tail_page_BG, counter, groups,
        num_pages, *form, has_host, functions.encode, functions.decode,
        num_warps=form.num_warps, **as_written(),
    )  # fmt: skip


@triton.jit
def _tile(
    source, column, to, is_new, is_old, dims, s_token, DIM: tl.constexpr, SLOTS: tl.constexpr
):
    """Return keys or values of a block: new ones by column, older ones from its page."""
    is_dim = (dims < DIM)[None, :]
    new = tl.load(
        source + column[:, None] * s_token + dims[None, :], mask=is_new[:, None] & is_dim, other=0.0
    )
    at = to + tl.arange(0, SLOTS)[:, None] * DIM + dims[None, :]
    old = tl.load(at, mask=is_old[:, None] & is_dim, other=0.0)
    return tl.where(is_old[:, None], old, new)


@triton.jit(do_not_specialize=["num_tokens", "num_items"])
def _store_prefix_packed(
    k, v, columns, lengths, totals, block_table, pages, host, counter, k_row, k_head, k_token,
    v_row, v_head, v_token, groups, num_tokens, num_blocks, num_pages, num_items,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr, HAS_HOST: tl.constexpr,
    ENCODE: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    most = (num_tokens - 1) // SIZE + 1
    token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    item = tl.program_id(0)
    while item < num_items:
        half, number, pair = item % 2, item // 2 % most, item // 2 // most
        row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
        length = tl.load(lengths + row)
        first, end = length // SIZE, tl.load(totals + row) // SIZE
        block = first + number
        if block < end:
            page = tl.load(block_table + pair.to(tl.int64) * num_blocks + block)
            owned = pair.to(tl.int64) * num_pages + tl.maximum(page, 0)
            to = pages + (owned * 2 + half) * (SIZE * DIM)
            position = block * SIZE + token
            is_new = (token < SIZE) & (position >= length)
            is_old = (token < SIZE) & (position < length)
            order = columns + row * num_tokens + position - length
            column = tl.load(order, mask=is_new, other=0).to(tl.int64)
            run = pair.to(tl.int64)
            if HAS_HOST:
                run = tl.load(host + pair) + block.to(tl.int64) * RUN
            if half == 0:
                source = k + row * k_row + head * k_head
                x = _tile(source, column, to, is_new, is_old, dims, k_token, DIM, SLOTS)
                _round_half(
                    x, run, pages, to, page, True, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                    CUTS, HAS_HOST, ENCODE, DECODE,
                )  # fmt: skip
                if HAS_HOST:
                    tl.atomic_add(counter, 1)
            else:
                source = v + row * v_row + head * v_head
                x = _tile(source, column, to, is_new, is_old, dims, v_token, DIM, SLOTS)
                _round_half(
                    x, run, pages, to, page, False, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                    CUTS, HAS_HOST, ENCODE, DECODE,
                )  # fmt: skip
        item += tl.num_programs(0)


def store_prefix(
    k: Tensor,
    v: Tensor,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor,
    pages: Tensor,
    host: Tensor,
    counter: Tensor,
    kv_format: str,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Store and round every block that new tokens have filled; see `runtime.packed`.

    Args:
        k: [B, G, T, D] new keys, of any strides.
        v: [B, G, T, D] new values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D], updated.
        host: [B, G] int64 addresses; what they point to is written. Empty without offload.
        counter: One int64, raised by the number of blocks that went to CPU memory.
        kv_format: How blocks are stored.
        num_programs: Programs; each stores the keys or the values of one block at a time.
    """
    batch, groups, num_pages, _, size, _ = pages.shape
    num_tokens, has_host = k.shape[2], host.numel() > 0
    _, columns, totals = tokens
    k, *k_strides = tokens_of(k)
    v, *v_strides = tokens_of(v)
    form, functions = _Form.of(pages, kv_format), _functions(kv_format)
    items = 2 * batch * groups * ((num_tokens - 1) // size + 1)
    launch(_store_prefix_packed, (min(num_programs, items),))(
        k, v, columns, lengths, totals, block_table, pages, host if has_host else totals, counter,
        *k_strides, *v_strides, groups, num_tokens, block_table.shape[2], num_pages, items,
        *form, has_host, functions.encode, functions.decode,
        num_warps=form.num_warps, **as_written(),
    )  # fmt: skip
