"""Many new tokens per sequence: pages for their blocks, and keys and values into those.

    number_tokens    position of each token, and the tokens of each sequence in order
    extend_kv        which blocks stay resident, and in which pages; then the tokens that have one

Grids follow from shapes alone. How many tokens are real is on the device, so a program that has
none ends early, and nobody waits. Kernels are not specialized for the number of tokens: a prompt of
another length compiles nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparda_compile.kernels.gpu.launch import launch, power_of_two, tokens_of
from sparda_compile.kernels.gpu.select import check_num_blocks, find_largest
from sparda_compile.kernels.gpu.tiles import tail_at
from sparda_compile.kernels.paged import FOUND

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Numbered", "Resident", "extend_kv", "number_tokens"]

_IN_USE = tl.constexpr(0x7FFFFFFF)
_FOUND = tl.constexpr(FOUND)
# Tokens that are counted at once, and numbers of a tile of keys.
_COUNTED: Final = 2048
_TILE: Final = 4096


class Numbered(NamedTuple):
    """The new tokens of each sequence, counted on the device.

    Attributes:
        positions: [B, T] int32 position of each token, -1 for padding.
        columns: [B, T] int32, first the column of each real token, by position; then the others'.
        totals: [B] int32, tokens behind this step.
    """

    positions: Tensor
    columns: Tensor
    totals: Tensor


class Resident(NamedTuple):
    """Which of the blocks that get new tokens stay on the device.

    Attributes:
        block_ids: [B, G, T, K] int32 blocks that each token has selected, -1 for none, or None.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the last.
        eviction: `lru` or `fifo`.
    """

    block_ids: Tensor | None
    sink_blocks: int
    local_blocks: int
    eviction: str


@triton.jit(do_not_specialize=["num_tokens"])
def _number_tokens(
    token_mask, lengths, positions, columns, totals, num_tokens, TILE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    begin = row.to(tl.int64) * num_tokens
    count = length * 0
    for tile in range(0, num_tokens, TILE):
        token = tile + tl.arange(0, TILE)
        inside = token < num_tokens
        real = tl.load(token_mask + begin + token, mask=inside, other=0) != 0
        rank = count + tl.cumsum(real.to(tl.int32), 0) - 1
        tl.store(positions + begin + token, tl.where(real, length + rank, -1), mask=inside)
        # Padding fills the columns from the end, so that each of them is there once.
        place = tl.where(real, rank, num_tokens - token + rank)
        tl.store(columns + begin + place, token, mask=inside)
        count += tl.sum(real.to(tl.int32), 0)
    tl.store(totals + row, length + count)


def number_tokens(token_mask_BT: Tensor, lengths_B: Tensor) -> Numbered:
    """Count the new tokens; see `kernels.number_tokens`.

    Args:
        token_mask_BT: bool, which tokens are real.
        lengths_B: int32, tokens before this step.
    """
    batch, num_tokens = token_mask_BT.shape
    positions = lengths_B.new_empty((batch, num_tokens))
    columns, totals = torch.empty_like(positions), torch.empty_like(lengths_B)
    launch(_number_tokens, (batch,))(
        token_mask_BT.contiguous().view(torch.uint8), lengths_B, positions, columns, totals,
        num_tokens, _COUNTED, num_warps=8,
    )  # fmt: skip
    return Numbered(positions, columns, totals)


@triton.jit
def _keep_selected(
    block_ids, columns, flags, block, keep, first, last, row, head, num_new, num_tokens,
    num_blocks, ids_row, ids_head, ids_token, SELECTED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the blocks that the last real token has selected, by a flag for each block."""
    tl.store(flags + block, keep.to(tl.int8), mask=block < num_blocks)
    tl.debug_barrier()
    newest = tl.maximum(num_new - 1, 0)
    token = tl.load(columns + row.to(tl.int64) * num_tokens + newest).to(tl.int64)
    place = tl.arange(0, COLUMNS)
    ids = block_ids + row.to(tl.int64) * ids_row + head.to(tl.int64) * ids_head + token * ids_token
    chosen = tl.load(ids + place, mask=place < tl.where(num_new > 0, SELECTED, 0), other=-1)
    tl.store(flags + chosen, 1, mask=(chosen >= first) & (chosen <= last))
    tl.debug_barrier()
    return tl.load(flags + block, mask=block < num_blocks, other=0) != 0


@triton.jit
def _give_pages(
    block, keep, stamp, table, page_block, page_stamp, new_blocks, num_pages,
    PAGES: tl.constexpr, TOUCH: tl.constexpr,
):  # fmt: skip
    """Give the absent blocks the pages that leave; the i-th absent takes the i-th victim."""
    keep = keep & (tl.cumsum(keep.to(tl.int32), 0) <= num_pages)
    page = tl.load(table + block, mask=keep, other=-1)
    hit = keep & (page >= 0)
    absent = keep & (page < 0)
    num_absent = tl.sum(absent.to(tl.int32), 0)
    tl.store(new_blocks + tl.cumsum(absent.to(tl.int32), 0) - 1, block, mask=absent)
    stamp_of_hit = tl.load(page_stamp + page, mask=hit, other=0)
    tl.debug_barrier()
    # A stamp that no step has marks the pages in use.
    tl.store(page_stamp + page, _IN_USE, mask=hit)
    tl.debug_barrier()
    number = tl.arange(0, PAGES)
    old = tl.load(page_stamp + number, mask=number < num_pages, other=_IN_USE)
    candidate = old != _IN_USE
    age = tl.where(old < 0, 255, tl.minimum(tl.maximum(stamp - old, 0), 254))
    key = tl.where(candidate, age, -1)
    # With none absent, no key is as large as the threshold.
    found = tl.where(num_absent > 0, tl.sum(candidate.to(tl.int32), 0), 0)
    victim = find_largest(key, tl.where(num_absent > 0, 0, 256), 256, found, num_absent)
    leaves = tl.load(page_block + number, mask=victim, other=-1)
    comes = tl.load(new_blocks + tl.cumsum(victim.to(tl.int32), 0) - 1, mask=victim, other=-1)
    tl.store(table + leaves, -1, mask=victim & (leaves >= 0))
    tl.debug_barrier()
    tl.store(table + comes, number, mask=victim)
    tl.store(page_block + number, comes, mask=victim)
    tl.store(page_stamp + number, stamp, mask=victim)
    tl.store(page_stamp + page, stamp if TOUCH else stamp_of_hit, mask=hit)


@triton.jit(do_not_specialize=["num_tokens", "ids_row", "ids_head"])
def _keep_blocks(
    block_ids, columns, lengths, totals, flags, new_blocks, block_table, page_block, page_stamp,
    groups, num_tokens, num_blocks, num_pages, sink, local, ids_row, ids_head, ids_token,
    SIZE: tl.constexpr, SELECTED: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
    PAGES: tl.constexpr, CHOSEN: tl.constexpr, RESIDENT: tl.constexpr, TOUCH: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row, head = pair // groups, pair % groups
    length = tl.load(lengths + row)
    total = tl.load(totals + row)
    first = length // SIZE
    last = (total + SIZE - 1) // SIZE - 1
    stamp = tl.maximum(total - 1, 0)
    block = tl.arange(0, BLOCKS)
    touched = (block >= first) & (block <= last) & (block < num_blocks)
    table = block_table + pair.to(tl.int64) * num_blocks
    owned = pair.to(tl.int64) * num_pages
    if RESIDENT:
        # Nothing ever leaves, so blocks and pages are handed out in step: they are the same.
        absent = touched & (tl.load(table + block, mask=touched, other=0) < 0)
        tl.debug_barrier()
        tl.store(table + block, block, mask=absent)
        tl.store(page_block + owned + block, block, mask=absent)
        tl.store(page_stamp + owned + block, stamp, mask=touched & (absent | TOUCH))
    else:
        keep = (block < sink) | (block >= last - local) | (block == first)
        if CHOSEN:
            keep = _keep_selected(
                block_ids, columns, flags + pair.to(tl.int64) * num_blocks, block, keep, first,
                last, row, head, total - length, num_tokens, num_blocks, ids_row, ids_head,
                ids_token, SELECTED, COLUMNS,
            )  # fmt: skip
        _give_pages(
            block, keep & touched, stamp, table, page_block + owned, page_stamp + owned,
            new_blocks + owned, num_pages, PAGES, TOUCH,
        )  # fmt: skip


def _keep(
    numbered: Numbered, lengths: Tensor, tables: Sequence[Tensor], size: int, resident: Resident
) -> None:
    """Give pages to the blocks that stay resident; updates the three tables."""
    block_table, page_block, _ = tables
    batch, groups, num_blocks = block_table.shape
    num_pages = page_block.shape[2]
    check_num_blocks(num_blocks)
    all_resident = num_pages == num_blocks
    ids = resident.block_ids
    is_chosen = ids is not None and not all_resident
    # What nobody reads or writes is given as something that is there.
    flags, strides, selected = page_block, [0, 0, 0], 1
    if ids is not None and is_chosen:
        ids = ids if ids.stride(3) == 1 else ids.contiguous()
        flags = block_table.new_empty(block_table.shape, dtype=torch.int8)
        strides, selected = list(ids.stride()[:3]), ids.shape[3]
    new_blocks = page_block if all_resident else torch.empty_like(page_block)
    launch(_keep_blocks, (batch * groups,))(
        ids if is_chosen else page_block, numbered.columns, lengths, numbered.totals, flags,
        new_blocks, *tables, groups, numbered.columns.shape[1], num_blocks, num_pages,
        resident.sink_blocks, resident.local_blocks, *strides, size, selected,
        power_of_two(selected), power_of_two(num_blocks), power_of_two(num_pages), is_chosen,
        all_resident, resident.eviction == "lru", num_warps=4 if num_blocks <= 4096 else 16,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _extend_kv(
    k, v, positions, block_table, pages, k_row, k_head, k_token, v_row, v_head, v_token, groups,
    num_tokens, num_blocks, num_pages,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    position = tl.load(
        positions + row * num_tokens + token, mask=token < num_tokens, other=-1
    )  # fmt: skip
    table = block_table + pair.to(tl.int64) * num_blocks
    page = tl.load(table + position // SIZE, mask=position >= 0, other=-1)
    if tl.max(page, 0) >= 0:
        dims = tl.arange(0, DIMS)
        mask = (page >= 0)[:, None] & (dims < DIM)[None, :]
        column = token.to(tl.int64)[:, None]
        key = tl.load(k + row * k_row + head * k_head + column * k_token + dims, mask=mask)
        value = tl.load(v + row * v_row + head * v_head + column * v_token + dims, mask=mask)
        first = (pair.to(tl.int64) * num_pages + page) * (2 * SIZE * DIM)
        slot = pages + (first + position % SIZE * DIM)[:, None] + dims[None, :]
        tl.store(slot, key, mask=mask)
        tl.store(slot + SIZE * DIM, value, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _extend_tail(
    k, v, columns, lengths, totals, tail, k_row, k_head, k_token, v_row, v_head, v_token, groups,
    num_tokens, SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Keep what the open block had, and write the new tokens of the one that stays open."""
    pair, half = tl.program_id(0), tl.program_id(1)
    row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    length, total = tl.load(lengths + row), tl.load(totals + row)
    token, dims = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    inside = (token < SIZE)[:, None] & (dims < DIM)[None, :]
    at = tail_at(tail, pair, SIZE, DIM) + half * (SIZE * DIM) + token[:, None] * DIM + dims[None, :]
    tl.store(at + _FOUND * (2 * SIZE * DIM), tl.load(at, mask=inside), mask=inside)
    tl.debug_barrier()
    position = total // SIZE * SIZE + token
    is_new = (token < SIZE) & (position >= length) & (position < total)
    order = columns + row * num_tokens + position - length
    column = tl.load(order, mask=is_new, other=0).to(tl.int64)[:, None]
    mask = is_new[:, None] & (dims < DIM)[None, :]
    if half == 0:
        x = tl.load(k + row * k_row + head * k_head + column * k_token + dims, mask=mask)
    else:
        x = tl.load(v + row * v_row + head * v_head + column * v_token + dims, mask=mask)
    tl.store(at, x, mask=mask)


def extend_kv(
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    numbered: Numbered,
    lengths_B: Tensor,
    pages: Tensor,
    tables: Sequence[Tensor],
    resident: Resident,
    *,
    is_tail: bool = False,
) -> None:
    """Give pages to blocks and write the new tokens; see `runtime.append.extend_kv`.

    Args:
        k_BGTD: New keys, of any strides.
        v_BGTD: New values.
        numbered: The new tokens.
        lengths_B: int32, tokens before this step.
        pages: [B, G, C, 2, P, D], updated.
        tables: `block_table`, `page_block` and `page_stamp`, updated.
        resident: Which blocks stay.
        is_tail: Whether `pages` is `tail`, beside pages of stored runs.
    """
    batch, groups, num_pages, _, size, dim = pages.shape
    num_tokens = k_BGTD.shape[2]
    _keep(numbered, lengths_B, tables, size, resident)
    k, *k_strides = tokens_of(k_BGTD)
    v, *v_strides = tokens_of(v_BGTD)
    dims = power_of_two(dim)
    if is_tail:
        launch(_extend_tail, (batch * groups, 2))(
            k, v, numbered.columns, lengths_B, numbered.totals, pages, *k_strides, *v_strides,
            groups, num_tokens, size, power_of_two(size), dim, dims, num_warps=4,
        )  # fmt: skip
        return
    tokens = max(_TILE // dims, 1)
    launch(_extend_kv, (triton.cdiv(num_tokens, tokens), batch * groups))(
        k, v, numbered.positions, tables[0], pages, *k_strides, *v_strides, groups, num_tokens,
        tables[0].shape[2], num_pages, size, dim, dims, tokens, num_warps=4,
    )  # fmt: skip
