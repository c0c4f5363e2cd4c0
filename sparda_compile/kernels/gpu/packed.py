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
_PARTS: Final = 1
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
    def tokens(self) -> int:
        """Tokens of the keys or values of a block that a program of a gather takes at once."""
        return max(self.slots // _PARTS, 8 // self.bits)

    @property
    def gather_warps(self) -> int:
        """Warps of a program of a gather."""
        return min(max(self.tokens * self.dims // _ELEMENTS_OF_A_WARP, 1), _MOST_WARPS)

    @property
    def num_programs(self) -> int:
        """Programs that have enough in flight together, half of them of keys."""
        return min(max(2 * _BYTES_IN_FLIGHT // self.run, 2), GATHER_PROGRAMS)

    def grid(self, num_programs: int) -> tuple[int, int]:
        """Return the grid of a gather, of so many programs or of as many as there should be."""
        return (max((num_programs or self.num_programs) // 2, 1), 2)


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
def _at(run, AFTER: tl.constexpr, element: tl.constexpr):
    """Return the address that is AFTER bytes behind the beginning of a run, of elements."""
    # Of the pointer to the run, then moved: the compiler forgets it of a sum that becomes a pointer
    # and reads byte by byte.
    begin = tl.multiple_of(run.to(tl.pointer_type(element)), 16)
    return begin + AFTER * 8 // element.primitive_bitwidth


@triton.jit
def scales_at(  # noqa: ANN201 - a part of kernels
    run, pages, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr,
):  # fmt: skip
    """Return where the scales of the keys or values of a stored block are."""
    WIDTH: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    CODES: tl.constexpr = 2 * SIZE * DIM * BITS // 8
    return _at(run, CODES + (0 if KEYS else SCALES * DIM * WIDTH), pages.dtype.element_ty)


@triton.jit
def codes_at(  # noqa: ANN201 - a part of kernels
    run, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr
):
    """Return where the codes of the keys or values of a stored block are."""
    return _at(run, 0 if KEYS else SIZE * DIM * BITS // 8, tl.uint8)


@triton.jit
def rounded(values, pages, CUTS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return float32 values in the dtype of pages, each the nearest one; ties go to the even."""
    if CUTS & (pages.dtype.element_ty == tl.bfloat16):
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, near, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(pages.dtype.element_ty)


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
):  # fmt: skip
    """Return four bytes of codes each, and scales, of TOKENS keys or values from `begin` on."""
    PER: tl.constexpr = 8 // BITS
    LINES: tl.constexpr = DIM if KEYS else SIZE
    dims, byte = tl.arange(0, DIMS // 4), begin // PER + tl.arange(0, TOKENS // PER)
    at_codes = codes_at(run, KEYS, SIZE, DIM, BITS).to(tl.pointer_type(tl.int32))
    at_codes += byte[:, None] * (DIM // 4) + dims[None, :]
    is_code = (byte < tl.where(is_item, SIZE // PER, 0))[:, None] & (dims < DIM // 4)[None, :]
    joined = tl.load(at_codes, mask=is_code, other=0)
    line = tl.arange(0, DIMS) if KEYS else begin + tl.arange(0, TOKENS)
    is_line = line < tl.where(is_item, LINES, 0)
    at_scales = scales_at(run, pages, KEYS, SIZE, DIM, BITS, SCALES) + line
    first = tl.load(at_scales, mask=is_line, other=0.0)
    last = tl.load(at_scales + (SCALES - 1) * LINES, mask=is_line, other=0.0)
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
    values = DECODE(codes, tl.expand_dims(low, AXIS), tl.expand_dims(high, AXIS))
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = target + token[:, None] * DIM + dims[None, :]
    tl.store(at, rounded(values, target, CUTS), mask=inside)


@triton.jit
def _unpack_half(
    count, blocks, slots, host, target, listed, num_slots, KEYS: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
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
        SCALES,
    )  # fmt: skip
    next_run, next_to = _find(
        item + programs, total, count, end, blocks, slots, host, target, listed, num_slots, KEYS,
        PARTS, ROWS, SIZE, DIM, RUN,
    )  # fmt: skip
    while item < total:
        coming = item + programs
        next_joined, next_first, next_last = _read(
            next_run, coming % PARTS * TOKENS, coming < total, target, KEYS, TOKENS, SIZE, DIM,
            DIMS, BITS, SCALES,
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
    count, blocks, slots, host, target, listed, num_slots,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Unpack the first `count` listed blocks of each row to their slots: this program's share."""
    if tl.program_id(1) == 0:
        _unpack_half(
            count, blocks, slots, host, target, listed, num_slots, True, ROWS, SIZE, SLOTS, DIM,
            DIMS, RUN, BITS, SCALES, CUTS, DECODE, TOKENS,
        )  # fmt: skip
    else:
        _unpack_half(
            count, blocks, slots, host, target, listed, num_slots, False, ROWS, SIZE, SLOTS, DIM,
            DIMS, RUN, BITS, SCALES, CUTS, DECODE, TOKENS,
        )  # fmt: skip


@triton.jit
def _gather_packed(
    miss_blocks, miss_pages, host, pages, num_rows, num_pages,
    SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, RUN: tl.constexpr,
    BITS: tl.constexpr, SCALES: tl.constexpr, CUTS: tl.constexpr,
    DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    count = count_listed(miss_blocks, num_rows, SELECTED, ROWS, COLUMNS)
    _unpack_listed(
        count, miss_blocks, miss_pages, host, pages, SELECTED, num_pages, ROWS, SIZE,
        SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, DECODE, TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["listed", "num_slots"])
def _gather_listed_packed(
    blocks, slots, counts, host, staging, listed, num_rows, num_slots,
    ROWS: tl.constexpr, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr,
    DIMS: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < num_rows, other=0)
    _unpack_listed(
        count, blocks, slots, host, staging, listed, num_slots, ROWS, SIZE,
        SLOTS, DIM, DIMS, RUN, BITS, SCALES, CUTS, DECODE, TOKENS,
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
        num_programs: Programs, half of them for keys; 0 for as many as have enough in flight.
    """
    batch, groups, selected = miss_blocks_BGK.shape
    form = Form.of(pages, kv_format)
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather_packed, form.grid(num_programs))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, pages, batch * groups, pages.shape[2], selected,
        rows, columns, *form, functions_of(kv_format).decode, form.tokens,
        num_warps=form.gather_warps, **as_written(),
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
    launch(_gather_listed_packed, form.grid(num_programs))(
        blocks_nL, slots_nL, counts_n, host_BG, staging, listed, num_rows, staging.shape[2],
        power_of_two(num_rows), *form, functions_of(kv_format).decode, form.tokens,
        num_warps=form.gather_warps, **as_written(),
    )  # fmt: skip
