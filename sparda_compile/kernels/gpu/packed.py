"""Blocks of a format that rounds, from pinned CPU memory to device pages; see `copy.py`.

    gather_packed         pages[b, g, miss_pages[i]] = unpack(host[b, g, miss_blocks[i]])
    gather_listed_packed  the same for lists that are long and counted
    unpack_pages          the same of pages that hold stored runs

A program has the keys or the values of a block, or of some of its tokens, as one tile: what scales
them lies on one of its axes. Codes are read from CPU memory once, side by side. Keys that stay on
the device are made of their codes there (`staying.py`). `packed_form.py` says what a format gives,
`packed_store.py` packs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS, count_listed, find_listed
from sparda_compile.kernels.gpu.launch import address_of, as_written, launch, power_of_two
from sparda_compile.kernels.gpu.packed_form import Form, codes_at, functions_of, rounded, scales_at
from sparda_compile.kernels.gpu.staying import write_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["gather_listed_packed", "gather_packed", "unpack_pages"]

_COUNT_TILE: Final = 8192
# Four for each multiprocessor: device memory is not far away, as CPU memory is.
_PAGE_PROGRAMS: Final = 528


def _grid(num_programs: int) -> tuple[int, int]:
    return max(num_programs // 2, 1), 2


@triton.jit
def _find(
    item, total, count, end, blocks, slots, host, target, listed, num_slots, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """Return the stored run of an item, and where its keys or values go; anything if none is."""
    is_item = item < total
    row, place = find_listed(item // PARTS, count, end, listed, ROWS)
    block = tl.load(blocks + place, mask=is_item, other=0).to(tl.int64)
    slot = tl.load(slots + place, mask=is_item, other=0).to(tl.int64)
    run = tl.load(host + row, mask=is_item, other=0) + block * RUN
    to = target + (row.to(tl.int64) * num_slots + slot) * (2 * SIZE * DIM)
    return run, to if KEYS else to + SIZE * DIM


@triton.jit
def _read(
    run, begin, is_item, pages, KEYS: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Return four bytes of codes each, and scales, of TOKENS keys or values from `begin` on."""
    PER: tl.constexpr = 8 // BITS
    LINES: tl.constexpr = DIM if KEYS else SIZE
    NUMBERS: tl.constexpr = SCALES[0] if KEYS else SCALES[1]
    dims, byte = tl.arange(0, DIMS // 4), begin // PER + tl.arange(0, TOKENS // PER)
    at_codes = codes_at(run, KEYS, SIZE, DIM, BITS, KEPT).to(tl.pointer_type(tl.int32))
    at_codes += byte[:, None] * (DIM // 4) + dims[None, :]
    is_code = (byte < tl.where(is_item, SIZE // PER, 0))[:, None] & (dims < DIM // 4)[None, :]
    joined = tl.load(at_codes, mask=is_code, other=0)
    line = tl.arange(0, DIMS) if KEYS else begin + tl.arange(0, TOKENS)
    is_line = line < tl.where(is_item, LINES, 0)
    at_scales = scales_at(run, pages, KEYS, SIZE, DIM, BITS, SCALES, KEPT) + line
    first = tl.load(at_scales, mask=is_line, other=0.0)
    last = tl.load(at_scales + (NUMBERS - 1) * LINES, mask=is_line, other=0.0)
    return joined, first, last


@triton.jit
def _write(
    joined, first, last, target, begin, KEYS: tl.constexpr, TOKENS: tl.constexpr,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, BITS: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Write what those codes and scales stand for to keys or values [P, D] of a page."""
    PER: tl.constexpr = 8 // BITS
    AXIS: tl.constexpr = 0 if KEYS else 1
    token, dims = begin + tl.arange(0, TOKENS), tl.arange(0, DIMS)
    shift = tl.arange(0, PER)[:, None] * BITS + tl.arange(0, 4)[None, :] * 8
    codes = (joined[:, None, :, None] >> shift[None, :, None, :]) & ((1 << BITS) - 1)
    codes = tl.reshape(codes, [TOKENS, DIMS])
    low, high = first.to(tl.float32), last.to(tl.float32)
    values = DECODE(codes, tl.expand_dims(low, AXIS), tl.expand_dims(high, AXIS), AXIS)
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = target + token[:, None] * DIM + dims[None, :]
    tl.store(at, rounded(values, target, CUTS), mask=inside)


@triton.jit
def _unpack_half(
    count, blocks, slots, host, target, listed, num_slots, KEYS: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Unpack this program's share of the keys or the values of all listed blocks.

    An item is read while the one before it is written, and found while the one before that is: what
    is far away is asked for early.
    """
    PARTS: tl.constexpr = SLOTS // TOKENS
    end = tl.cumsum(count, 0)
    total = tl.sum(count, 0) * PARTS
    item, programs = tl.program_id(0), tl.num_programs(0)
    run, to = _find(
        item, total, count, end, blocks, slots, host, target, listed, num_slots, KEYS, PARTS,
        ROWS, SIZE, DIM, RUN,
    )  # fmt: skip
    joined, first, last = _read(
        run, item % PARTS * TOKENS, item < total, target, KEYS, TOKENS, SIZE, DIM, DIMS, BITS,
        SCALES, KEPT,
    )  # fmt: skip
    next_run, next_to = _find(
        item + programs, total, count, end, blocks, slots, host, target, listed, num_slots, KEYS,
        PARTS, ROWS, SIZE, DIM, RUN,
    )  # fmt: skip
    while item < total:
        coming = item + programs
        next_joined, next_first, next_last = _read(
            next_run, coming % PARTS * TOKENS, coming < total, target, KEYS, TOKENS, SIZE, DIM,
            DIMS, BITS, SCALES, KEPT,
        )  # fmt: skip
        later_run, later_to = _find(
            coming + programs, total, count, end, blocks, slots, host, target, listed, num_slots,
            KEYS, PARTS, ROWS, SIZE, DIM, RUN,
        )  # fmt: skip
        _write(
            joined, first, last, to, item % PARTS * TOKENS, KEYS, TOKENS, SIZE, DIM, DIMS, BITS,
            CUTS, DECODE,
        )  # fmt: skip
        item, to = coming, next_to
        joined, first, last = next_joined, next_first, next_last
        next_run, next_to = later_run, later_to


@triton.jit
def _unpack_listed(
    count, blocks, slots, host, codes, spans, bases, target, listed, num_slots, num_blocks,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Unpack the first `count` listed blocks of each row to their slots: this program's share."""
    if tl.program_id(1) == 0:
        if KEPT > 0:
            write_keys(
                count, blocks, slots, codes, spans, bases, target, listed, num_slots, num_blocks,
                ROWS, SIZE, SLOTS, DIM, DIMS, CUTS, KEPT,
            )  # fmt: skip
        else:
            _unpack_half(
                count, blocks, slots, host, target, listed, num_slots, True, ROWS, SIZE, SLOTS,
                DIM, DIMS, RUN, BITS, SCALES, CUTS, KEPT, DECODE, TOKENS,
            )  # fmt: skip
    else:
        _unpack_half(
            count, blocks, slots, host, target, listed, num_slots, False, ROWS, SIZE, SLOTS, DIM,
            DIMS, RUN, BITS, SCALES, CUTS, KEPT, DECODE, TOKENS,
        )  # fmt: skip


@triton.jit
def _gather_packed(
    miss_blocks, miss_pages, host, codes, spans, bases, pages, num_rows, num_pages, num_blocks,
    SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr, KEPT: tl.constexpr,
    DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    count = count_listed(miss_blocks, num_rows, SELECTED, ROWS, COLUMNS)
    _unpack_listed(
        count, miss_blocks, miss_pages, host, codes, spans, bases, pages, SELECTED, num_pages,
        num_blocks, ROWS, SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, KEPT, DECODE, TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["listed", "num_slots"])
def _gather_listed_packed(
    blocks, slots, counts, host, codes, spans, bases, staging, listed, num_rows, num_slots,
    num_blocks, ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, KEPT: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < num_rows, other=0)
    _unpack_listed(
        count, blocks, slots, host, codes, spans, bases, staging, listed, num_slots, num_blocks,
        ROWS, SIZE, SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, KEPT, DECODE, TOKENS,
    )  # fmt: skip


def _kept(keys: Sequence[Tensor], unused: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Return codes, spans and bases of keys that stay, and how many blocks they are of."""
    return (tuple(keys), keys[0].shape[2]) if keys else ((unused,) * 3, 0)


def gather_packed(
    miss_blocks_BGK: Tensor,
    miss_pages_BGK: Tensor,
    host_BG: Tensor,
    pages: Tensor,
    kv_format: str,
    keys: Sequence[Tensor] = (),
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch the missed blocks to their pages.

    Args:
        miss_blocks_BGK: int32, compacted, then -1.
        miss_pages_BGK: int32.
        host_BG: int64 addresses.
        pages: [B, G, C, 2, P, D], updated.
        kv_format: How the blocks are stored.
        keys: Of keys that stay, codes [B, G, N, C, D] uint8, span and base [B, G, N, D]; else none.
        num_programs: Programs, half of them for keys.
    """
    batch, groups, selected = miss_blocks_BGK.shape
    form = Form.of(pages, kv_format)
    kept, num_blocks = _kept(keys, miss_blocks_BGK)
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather_packed, _grid(num_programs))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, *kept, pages, batch * groups, pages.shape[2],
        num_blocks, selected, rows, columns, *form, functions_of(kv_format).decode, form.tokens,
        num_warps=form.gather_warps, **as_written(),
    )  # fmt: skip


def gather_listed_packed(
    blocks_nL: Tensor,
    slots_nL: Tensor,
    counts_n: Tensor,
    host_BG: Tensor,
    staging: Tensor,
    kv_format: str,
    keys: Sequence[Tensor] = (),
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch as many blocks of each sequence and head as a count says; see `copy.gather_listed`.

    Args:
        blocks_nL: int32, a list for each of the n sequences times heads.
        slots_nL: int32, where each goes.
        counts_n: int32, entries of each list.
        host_BG: int64 addresses.
        staging: [B, G, S, 2, P, D], updated.
        kv_format: How the blocks are stored.
        keys: As for `gather_packed`, like the next one.
        num_programs: Programs.
    """
    num_rows, listed = blocks_nL.shape
    form = Form.of(staging, kv_format)
    kept, num_blocks = _kept(keys, blocks_nL)
    launch(_gather_listed_packed, _grid(num_programs))(
        blocks_nL, slots_nL, counts_n, host_BG, *kept, staging, listed, num_rows,
        staging.shape[2], num_blocks, power_of_two(num_rows), *form,
        functions_of(kv_format).decode, form.tokens, num_warps=form.gather_warps, **as_written(),
    )  # fmt: skip


def unpack_pages(
    pages: Tensor, page_BGL: Tensor, first_slot: int, staging: Tensor, kv_format: str
) -> None:
    """Unpack pages of stored runs to a buffer: entry i of a list to slot `first_slot` + i.

    Args:
        pages: [B, G, C, bytes] uint8.
        page_BGL: Pages, -1 for none.
        first_slot: Where the first one goes.
        staging: [B, G, S, 2, P, D], updated.
        kv_format: How the runs are written.
    """
    page_nL = page_BGL.flatten(0, 1).int()
    pairs = torch.arange(page_nL.shape[0], device=pages.device)
    at = address_of(pages) + pairs * (pages.stride(1) * pages.element_size())
    order_nL = (page_nL < 0).byte().argsort(dim=-1, stable=True)
    lists = (page_nL.gather(-1, order_nL), (order_nL + first_slot).int())
    count_n = (page_nL >= 0).sum(-1, dtype=torch.int32)
    most = min(_PAGE_PROGRAMS, 2 * page_nL.numel())
    gather_listed_packed(*lists, count_n, at, staging, kv_format, num_programs=most)
