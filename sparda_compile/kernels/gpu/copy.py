"""Blocks between pinned CPU memory and device pages, read and written by the GPU itself.

    gather       pages[b, g, miss_pages[i]] = host[b, g, miss_blocks[i]]      long programs
    gather_listed  the same for lists that are long and counted
    store_tail   host[b, g, length // P] = pages[b, g, tail_page]             of blocks just filled
    copy_runs    *target[i] = *source[i]                                      runs of equal length

CPU memory is reached by address: `host` is [B, G] int64, where each sequence's and head's blocks
begin. A block is one contiguous run. 128 KiB in flight reach the link's rate by themselves; beside
compute, which takes the memory system, a read lasts longer and it takes twice that. More is at the
cost of everything else: what waits for the link is in the way of what waits for device memory, most
of all on the same multiprocessor, so that a gather is many programs with little in flight each.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import launch, power_of_two

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "GATHER_PROGRAMS",
    "block_bytes",
    "chunk_words",
    "copy_runs",
    "copy_words",
    "count_listed",
    "find_listed",
    "gather",
    "gather_listed",
    "store_tail",
]

# Measured in whole steps of 16 sequences, half to 97% of the blocks resident, and beside attention:
# `benchmarks/results/2026-11-26-h200-gather-beside-compute.json`.
GATHER_PROGRAMS: Final = 64
_WORDS_IN_FLIGHT: Final = 64 * 1024
_CHUNK_WORDS: Final = 8192
_WORDS_OF_A_WARP: Final = 256
_COUNT_TILE: Final = 8192


@triton.jit
def copy_words(source, target, words, CHUNK: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Copy up to CHUNK words from one address to another."""
    offsets = tl.arange(0, CHUNK)
    # Of the pointer, not of the integer: a cast forgets it, and then every access is of 4 bytes.
    source = tl.multiple_of(source.to(tl.pointer_type(tl.int32)), 16)
    target = tl.multiple_of(target.to(tl.pointer_type(tl.int32)), 16)
    data = tl.load(source + offsets, mask=offsets < words)
    tl.store(target + offsets, data, mask=offsets < words)


@triton.jit
def find_listed(entry, count, end, listed, ROWS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return the row of the `entry`-th block of all lists, and its place in them."""
    rows = tl.arange(0, ROWS)
    row = tl.sum((end <= entry).to(tl.int32), 0)
    return row, row.to(tl.int64) * listed + entry - tl.sum(tl.where(rows < row, count, 0), 0)


@triton.jit
def count_listed(  # noqa: ANN201 - a part of kernels
    blocks, num_rows, SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Return how many blocks each row lists, up to the first -1."""
    rows = tl.arange(0, ROWS)
    count = tl.zeros([ROWS], dtype=tl.int32)
    for first in tl.static_range(0, SELECTED, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = (rows[:, None] < num_rows) & (columns[None, :] < SELECTED)
        listed = rows[:, None] * SELECTED + columns[None, :]
        count += tl.sum((tl.load(blocks + listed, mask=inside, other=-1) >= 0).to(tl.int32), 1)
    return count


@triton.jit
def _copy_listed(
    count, blocks, slots, host, target, listed, num_slots, programs,
    ROWS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Copy the first `count` listed blocks of each row to their slots: this program's share."""
    end = tl.cumsum(count, 0)
    chunks: tl.constexpr = (WORDS + CHUNK - 1) // CHUNK
    total = tl.sum(count, 0) * chunks
    item = tl.program_id(0)
    while item < total:
        entry, chunk = item // chunks, item % chunks
        row, place = find_listed(entry, count, end, listed, ROWS)
        block = tl.load(blocks + place).to(tl.int64)
        slot = tl.load(slots + place).to(tl.int64)
        from_at = tl.load(host + row) + (block * WORDS + chunk * CHUNK) * 4
        to_at = target.to(tl.int64) + ((row.to(tl.int64) * num_slots + slot) * WORDS
                                       + chunk * CHUNK) * 4  # fmt: skip
        copy_words(from_at, to_at, WORDS - chunk * CHUNK, CHUNK)
        item += programs


@triton.jit
def _gather(
    miss_blocks, miss_pages, host, pages, num_rows, num_pages, programs,
    SELECTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    count = count_listed(miss_blocks, num_rows, SELECTED, ROWS, COLUMNS)
    _copy_listed(
        count, miss_blocks, miss_pages, host, pages, SELECTED, num_pages, programs,
        ROWS, WORDS, CHUNK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["listed", "num_slots"])
def _gather_listed(
    blocks, slots, counts, host, staging, listed, num_rows, num_slots, programs,
    ROWS: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    count = tl.load(counts + rows, mask=rows < num_rows, other=0)
    _copy_listed(
        count, blocks, slots, host, staging, listed, num_slots, programs, ROWS, WORDS, CHUNK
    )


def block_bytes(pages: Tensor) -> int:
    """Return the bytes of one block of `pages` [B, G, C, 2, P, D]."""
    return math.prod(pages.shape[3:]) * pages.element_size()


def chunk_words(block_words: int, num_programs: int) -> int:
    """Return how many words a program of a gather has in flight: a block, or a part of it."""
    share = _WORDS_IN_FLIGHT // power_of_two(num_programs)
    return min(power_of_two(block_words), max(share, _WORDS_OF_A_WARP), _CHUNK_WORDS)


def gather(
    miss_blocks_BGK: Tensor,
    miss_pages_BGK: Tensor,
    host_BG: Tensor,
    pages: Tensor,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch the missed blocks to their pages.

    Args:
        miss_blocks_BGK: int32, compacted, then -1.
        miss_pages_BGK: int32.
        host_BG: int64 addresses.
        pages: [B, G, C, 2, P, D], updated.
        num_programs: Programs, which have 256 KiB in flight together and 32 KiB each at most.
    """
    batch, groups, selected = miss_blocks_BGK.shape
    words = block_bytes(pages) // 4
    chunk = chunk_words(words, num_programs)
    rows = power_of_two(batch * groups)
    columns = min(power_of_two(selected), max(_COUNT_TILE // rows, 1))
    launch(_gather, (num_programs,))(
        miss_blocks_BGK, miss_pages_BGK, host_BG, pages, batch * groups, pages.shape[2],
        num_programs, selected, rows, columns, words, chunk,
        num_warps=max(chunk // (2 * _WORDS_OF_A_WARP), 1),
    )  # fmt: skip


def gather_listed(
    blocks_nL: Tensor,
    slots_nL: Tensor,
    counts_n: Tensor,
    host_BG: Tensor,
    staging: Tensor,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Fetch as many blocks of each sequence and head as a count says; lists may be long.

    Args:
        blocks_nL: int32, a list for each of the n sequences times heads.
        slots_nL: int32, where each goes.
        counts_n: int32, entries of each list.
        host_BG: int64 addresses.
        staging: [B, G, S, 2, P, D], updated.
        num_programs: As for `gather`.
    """
    num_rows, listed = blocks_nL.shape
    words = block_bytes(staging) // 4
    chunk = chunk_words(words, num_programs)
    launch(_gather_listed, (num_programs,))(
        blocks_nL, slots_nL, counts_n, host_BG, staging, listed, num_rows, staging.shape[2],
        num_programs, power_of_two(num_rows), words, chunk,
        num_warps=max(chunk // (2 * _WORDS_OF_A_WARP), 1),
    )  # fmt: skip


@triton.jit
def _store_tail(
    tail_page, lengths, pages, host, counter, groups, num_pages,
    SIZE: tl.constexpr, WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    pair, chunk = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    page = tl.load(tail_page + pair).to(tl.int64)
    if ((length + 1) % SIZE == 0) & (page >= 0):
        offset = (chunk * CHUNK).to(tl.int64)
        block = (length // SIZE).to(tl.int64)
        source = pages.to(tl.int64) + ((pair.to(tl.int64) * num_pages + page) * WORDS + offset) * 4
        target = tl.load(host + pair) + (block * WORDS + offset) * 4
        copy_words(source, target, WORDS - chunk * CHUNK, CHUNK)
        if chunk == 0:
            tl.atomic_add(counter, 1)


def store_tail(
    tail_page_BG: Tensor, lengths_B: Tensor, pages: Tensor, host_BG: Tensor, counter: Tensor
) -> None:
    """Copy each block that the current token has filled to the host, and count it.

    Args:
        tail_page_BG: int32 page of the current block, -1 if it has none.
        lengths_B: int32, position of the current token.
        pages: [B, G, C, 2, P, D].
        host_BG: int64 addresses; what they point to is written.
        counter: One int64, raised by the number of blocks.
    """
    batch, groups, num_pages, _, size, _ = pages.shape
    words = block_bytes(pages) // 4
    chunk = min(power_of_two(words), _CHUNK_WORDS)
    launch(_store_tail, (batch * groups, triton.cdiv(words, chunk)))(
        tail_page_BG, lengths_B, pages, host_BG, counter, groups, num_pages, size, words, chunk,
        num_warps=16,
    )  # fmt: skip


@triton.jit
def _copy_runs(source, target, words, CHUNK: tl.constexpr):
    run, chunk = tl.program_id(0), tl.program_id(1)
    offset = (chunk * CHUNK).to(tl.int64) * 4
    copy_words(
        tl.load(source + run) + offset, tl.load(target + run) + offset, words - chunk * CHUNK, CHUNK
    )


def copy_runs(source_n: Tensor, target_n: Tensor, num_bytes: int) -> None:
    """Copy runs of memory by address, on the device or in pinned CPU memory.

    Args:
        source_n: int64 addresses, multiples of 16.
        target_n: int64 addresses, multiples of 16.
        num_bytes: Length of every run, a multiple of 16.
    """
    words = num_bytes // 4
    chunk = min(power_of_two(words), _CHUNK_WORDS)
    if source_n.numel():
        launch(_copy_runs, (source_n.numel(), triton.cdiv(words, chunk)))(
            source_n, target_n, words, chunk, num_warps=16
        )
