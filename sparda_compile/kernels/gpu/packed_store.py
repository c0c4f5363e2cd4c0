"""Blocks that just became full, in a format that rounds: packed to CPU memory, rounded in place.

    store_tail      host = pack(pages[.., tail_page]), and the page as it will be read back
    store_prefix    the same of the blocks that a prompt has filled, from where the model left them

A program has the keys or the values of a block as one tile, see `packed_form.py`. Without
offload the pages alone are written. Pages that hold stored runs get the same run; the numbers of a
block that was open come from `tail` then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS
from sparda_compile.kernels.gpu.launch import as_written, launch, tokens_of
from sparda_compile.kernels.gpu.low_bit_keys import quantize_keys
from sparda_compile.kernels.gpu.packed_form import Form, codes_at, functions_of, rounded, scales_at
from sparda_compile.kernels.gpu.staying import keys_of
from sparda_compile.kernels.gpu.tiles import tail_at
from sparda_compile.kernels.paged import FOUND, WRITTEN, block_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["store_prefix", "store_tail"]

_FOUND = tl.constexpr(FOUND)
_WRITTEN = tl.constexpr(WRITTEN)


@triton.jit
def _round_half(
    x, run, pool, target, page, KEYS: tl.constexpr, RUNS: tl.constexpr, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr, LARGEST: tl.constexpr,
    HAS_HOST: tl.constexpr, ENCODE: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Store keys or values [SLOTS, DIMS] of a block, and write to its page what is read back.

    That is a run with RUNS; else `target` is where the page has the half. Keys that stay, in `KEPT`
    bits, are written to the page alone.
    """
    AXIS: tl.constexpr = 0 if KEYS else 1
    if KEYS & (KEPT > 0):
        code, span, base = quantize_keys(x, pool, SIZE, SLOTS, KEPT, LARGEST, CUTS)
        values = keys_of(code, span, base, KEPT)
    else:
        codes, first, last = _encode_half(x, AXIS, SIZE, SLOTS, DIM, DIMS, BITS, ENCODE)
        if HAS_HOST:
            _write_run(
                codes, first, last, run, pool, True, KEYS, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                KEPT,
            )  # fmt: skip
        if RUNS:
            _write_run(
                codes, first, last, target, pool, page >= 0, KEYS, SIZE, SLOTS, DIM, DIMS, BITS,
                SCALES, KEPT,
            )  # fmt: skip
        values = DECODE(codes, tl.expand_dims(first, AXIS), tl.expand_dims(last, AXIS), AXIS)
    if RUNS == 0:
        token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
        at = target + token[:, None] * DIM + dims[None, :]
        kept = (token < tl.where(page >= 0, SIZE, 0))[:, None] & (dims < DIM)[None, :]
        tl.debug_barrier()  # the tile may have been read from the same page
        tl.store(at, rounded(values, pool, CUTS), mask=kept)


@triton.jit
def _encode_half(
    x, AXIS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, BITS: tl.constexpr, ENCODE: tl.constexpr,
):  # fmt: skip
    """Return the codes of keys or values [SLOTS, DIMS] of a block, and two scales of each line."""
    token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    x = x.to(tl.float32)
    is_finite = (x - x) == 0.0
    codes, first, last = ENCODE(tl.where(inside & is_finite, x, 0.0), inside, AXIS)
    is_broken = tl.max((inside & (is_finite == 0)).to(tl.int32), AXIS) > 0
    first = tl.where(is_broken, float("nan"), first)
    last = tl.where(is_broken, float("nan"), last)
    codes = tl.where(tl.expand_dims(is_broken, AXIS), 0, codes) & ((1 << BITS) - 1)
    return codes, first, last


@triton.jit
def _write_run(
    codes, first, last, run, pool, is_there, KEYS: tl.constexpr, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Write codes and scales of keys or values to a stored run, if there is one."""
    PER: tl.constexpr = 8 // BITS
    LINES: tl.constexpr = DIM if KEYS else SIZE
    NUMBERS: tl.constexpr = SCALES[0] if KEYS else SCALES[1]
    token, dims, byte = tl.arange(0, SLOTS), tl.arange(0, DIMS), tl.arange(0, SLOTS // PER)
    joined = codes
    if PER > 1:
        shift = tl.arange(0, PER) * BITS
        parts = tl.reshape(codes, [SLOTS // PER, PER, DIMS]) << shift[None, :, None]
        joined = tl.sum(parts, axis=1)
    at_codes = codes_at(run, KEYS, SIZE, DIM, BITS, KEPT) + byte[:, None] * DIM + dims[None, :]
    is_code = (byte < tl.where(is_there, SIZE // PER, 0))[:, None] & (dims < DIM)[None, :]
    tl.store(at_codes, joined.to(tl.uint8), mask=is_code)
    line = dims if KEYS else token
    is_line = line < tl.where(is_there, LINES, 0)
    at_scales = scales_at(run, pool, KEYS, SIZE, DIM, BITS, SCALES, KEPT) + line
    tl.store(at_scales, first.to(pool.dtype.element_ty), mask=is_line)
    if NUMBERS > 1:
        tl.store(at_scales + LINES, last.to(pool.dtype.element_ty), mask=is_line)


@triton.jit
def _places(
    pages, pool, pair, owned, half, open_page: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Return where a half of a block that was open is, and what `_round_half` writes of its page.

    They are one and the same but for pages of stored runs: beside these it is a page of `tail`.
    """
    if RUNS:
        source = tail_at(pool, pair, SIZE, DIM) + (open_page * 2 + half) * (SIZE * DIM)
        target = pages.to(tl.int64) + owned * RUN
    else:
        source = pages + (owned * 2 + half) * (SIZE * DIM)
        target = source
    return source, target


@triton.jit
def _store_tail_packed(
    tail_page, lengths, pages, pool, host, counter, groups, num_pages, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr,
    RUNS: tl.constexpr, LARGEST: tl.constexpr, HAS_HOST: tl.constexpr, ENCODE: tl.constexpr,
    DECODE: tl.constexpr,
):  # fmt: skip
    pair, half = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    page = tl.load(tail_page + pair)
    if ((length + 1) % SIZE == 0) & (page >= 0):
        run = pair.to(tl.int64)
        if HAS_HOST:
            run = tl.load(host + pair) + (length // SIZE).to(tl.int64) * RUN
        owned = pair.to(tl.int64) * num_pages + page
        source, target = _places(pages, pool, pair, owned, half, _WRITTEN, SIZE, DIM, RUN, RUNS)
        token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
        inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
        x = tl.load(source + token[:, None] * DIM + dims[None, :], mask=inside, other=0.0)
        if half == 0:
            _round_half(
                x, run, pool, target, page, True, RUNS, SIZE, SLOTS, DIM, DIMS, BITS, SCALES, CUTS,
                KEPT, LARGEST, HAS_HOST, ENCODE, DECODE,
            )  # fmt: skip
            if HAS_HOST:
                tl.atomic_add(counter, 1)
        else:
            _round_half(
                x, run, pool, target, page, False, RUNS, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                CUTS, KEPT, LARGEST, HAS_HOST, ENCODE, DECODE,
            )  # fmt: skip


def store_tail(
    tail_page_BG: Tensor,
    lengths_B: Tensor,
    pages: Tensor,
    host_BG: Tensor,
    counter: Tensor,
    kv_format: str,
    tail: Tensor | None = None,
) -> None:
    """Store and round each block that the current token has filled; see `runtime.packed`.

    Args:
        tail_page_BG: int32 page of the current block, -1 if it has none.
        lengths_B: int32, position of the current token.
        pages: [B, G, C, 2, P, D], or stored runs; updated.
        host_BG: int64 addresses; what they point to is written. Empty without offload.
        counter: One int64, raised by the number of blocks that went to CPU memory.
        kv_format: How blocks are stored.
        tail: [B, G, 2, 2, P, D] beside pages of stored runs.
    """
    batch, groups, num_pages = pages.shape[:3]
    pool = block_pool(pages, tail)
    form, functions = Form.of(pool, kv_format), functions_of(kv_format)
    has_host = host_BG.numel() > 0
    launch(_store_tail_packed, (batch * groups, 2))(
        tail_page_BG, lengths_B, pages, pool, host_BG if has_host else tail_page_BG, counter,
        groups, num_pages, *form, tail is not None, torch.finfo(pool.dtype).max, has_host,
        functions.encode, functions.decode, num_warps=form.num_warps, **as_written(),
    )  # fmt: skip


@triton.jit
def _tile(
    source, column, old_at, is_new, is_old, dims, s_token, DIM: tl.constexpr, SLOTS: tl.constexpr
):
    """Return keys or values of a block: new ones by column, older ones from where it was open."""
    is_dim = (dims < DIM)[None, :]
    new = tl.load(
        source + column[:, None] * s_token + dims[None, :], mask=is_new[:, None] & is_dim, other=0.0
    )
    at = old_at + tl.arange(0, SLOTS)[:, None] * DIM + dims[None, :]
    old = tl.load(at, mask=is_old[:, None] & is_dim, other=0.0)
    return tl.where(is_old[:, None], old, new)


@triton.jit(do_not_specialize=["num_tokens", "num_items"])
def _store_prefix_packed(
    k, v, columns, lengths, totals, block_table, pages, pool, host, counter, k_row, k_head, k_token,
    v_row, v_head, v_token, groups, num_tokens, num_blocks, num_pages, num_items,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    KEPT: tl.constexpr, RUNS: tl.constexpr, LARGEST: tl.constexpr, HAS_HOST: tl.constexpr,
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
            old, target = _places(pages, pool, pair, owned, half, _FOUND, SIZE, DIM, RUN, RUNS)
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
                x = _tile(source, column, old, is_new, is_old, dims, k_token, DIM, SLOTS)
                _round_half(
                    x, run, pool, target, page, True, RUNS, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                    CUTS, KEPT, LARGEST, HAS_HOST, ENCODE, DECODE,
                )  # fmt: skip
                if HAS_HOST:
                    tl.atomic_add(counter, 1)
            else:
                source = v + row * v_row + head * v_head
                x = _tile(source, column, old, is_new, is_old, dims, v_token, DIM, SLOTS)
                _round_half(
                    x, run, pool, target, page, False, RUNS, SIZE, SLOTS, DIM, DIMS, BITS, SCALES,
                    CUTS, KEPT, LARGEST, HAS_HOST, ENCODE, DECODE,
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
    tail: Tensor | None = None,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Store and round every block that new tokens have filled; see `runtime.packed`.

    Args:
        k: [B, G, T, D] new keys, of any strides.
        v: [B, G, T, D] new values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D], or stored runs; updated.
        host: [B, G] int64 addresses; what they point to is written. Empty without offload.
        counter: One int64, raised by the number of blocks that went to CPU memory.
        kv_format: How blocks are stored.
        tail: [B, G, 2, 2, P, D] beside pages of stored runs.
        num_programs: Programs; each stores the keys or the values of one block at a time.
    """
    (batch, groups, num_pages), pool = pages.shape[:3], block_pool(pages, tail)
    size = pool.shape[4]
    num_tokens, has_host = k.shape[2], host.numel() > 0
    _, columns, totals = tokens
    k, *k_strides = tokens_of(k)
    v, *v_strides = tokens_of(v)
    form, functions = Form.of(pool, kv_format), functions_of(kv_format)
    items = 2 * batch * groups * ((num_tokens - 1) // size + 1)
    launch(_store_prefix_packed, (min(num_programs, items),))(
        k, v, columns, lengths, totals, block_table, pages, pool, host if has_host else totals,
        counter, *k_strides, *v_strides, groups, num_tokens, block_table.shape[2], num_pages, items,
        *form, tail is not None, torch.finfo(pool.dtype).max, has_host, functions.encode,
        functions.decode, num_warps=form.num_warps, **as_written(),
    )  # fmt: skip
