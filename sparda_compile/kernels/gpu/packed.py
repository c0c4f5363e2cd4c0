"""Blocks of a format that rounds, from pinned CPU memory to device pages; see `copy.py`.

    gather_packed         pages[b, g, miss_pages[i]] = unpack(host[b, g, miss_blocks[i]])
    gather_listed_packed  the same for lists that are long and counted

`packed_store.py` packs them.

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
)
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Form",
    "codes_at",
    "functions_of",
    "gather_listed_packed",
    "gather_packed",
    "rounded",
    "scales_at",
]

_BYTES_IN_FLIGHT: Final = 256 * 1024
_COUNT_TILE: Final = 8192
_ELEMENTS_OF_A_WARP: Final = 1024
_MOST_WARPS: Final = 16


class Form(NamedTuple):
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
    def of(cls, pages: Tensor, kv_format: str) -> Form:
        """Return that of pages [B, G, C, 2, P, D] and a format."""
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


def functions_of(kv_format: str) -> Any:
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
def scales_at(  # noqa: ANN201 - a part of kernels
    run, pages, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Return where the scales of the keys or values of a stored block are."""
    WIDTH: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    CODES: tl.constexpr = 2 * SIZE * DIM * BITS // 8
    return (run + CODES + (0 if KEYS else SCALES * DIM * WIDTH)).to(pages.dtype)


@triton.jit
def codes_at(  # noqa: ANN201 - a part of kernels
    run, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr
):
    """Return where the codes of the keys or values of a stored block are."""
    CODES: tl.constexpr = SIZE * DIM * BITS // 8
    codes = run + (0 if KEYS else CODES)
    return tl.multiple_of(codes.to(tl.pointer_type(tl.uint8)), 16 if CODES % 16 == 0 else 8)


@triton.jit
def rounded(values, pages, CUTS: tl.constexpr):  # noqa: ANN201 - a part of kernels
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
    at_codes = codes_at(run, KEYS, SIZE, DIM, BITS) + byte[:, None] * DIM + dims[None, :]
    is_code = (byte < SIZE // PER)[:, None] & (dims < DIM)[None, :]
    codes = tl.load(at_codes, mask=is_code, other=0).to(tl.int32)
    if PER > 1:
        shift = tl.arange(0, PER) * BITS
        codes = (codes[:, None, :] >> shift[None, :, None]) & ((1 << BITS) - 1)
        codes = tl.reshape(codes, [SLOTS, DIMS])
    line = dims if KEYS else token
    LINES: tl.constexpr = DIM if KEYS else SIZE
    at_scales = scales_at(run, pages, KEYS, SIZE, DIM, BITS, SCALES) + line
    first = tl.load(at_scales, mask=line < LINES, other=0.0).to(tl.float32)
    last = tl.load(at_scales + (SCALES - 1) * LINES, mask=line < LINES, other=0.0).to(tl.float32)
    values = DECODE(codes, tl.expand_dims(first, AXIS), tl.expand_dims(last, AXIS))
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = target + token[:, None] * DIM + dims[None, :]
    tl.store(at, rounded(values, pages, CUTS), mask=inside)


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
    form = Form.of(pages, kv_format)
    num_programs = num_programs or form.num_programs
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather_packed, (num_programs,))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, pages, batch * groups, pages.shape[2],
        num_programs, selected, rows, columns, *form, functions_of(kv_format).decode,
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
    form = Form.of(staging, kv_format)
    num_programs = num_programs or form.num_programs
    launch(_gather_listed_packed, (num_programs,))(
        blocks_nL, slots_nL, counts_n, host_BG, staging, listed, num_rows, staging.shape[2],
        num_programs, power_of_two(num_rows), *form, functions_of(kv_format).decode,
        num_warps=form.num_warps, **as_written(),
    )  # fmt: skip
