"""The past blocks that a prompt's tokens read, copied side by side into one buffer.

    mark      the blocks that any token of a sequence and KV head reads
    place     a slot of the buffer for each of those of the past, in ascending order
    (copy)    what has a page, from there; the rest from CPU memory, as in decode

The buffer has room for the most that there can be, so that nobody waits for a number. A block that
nobody reads is not copied. Each other one is read and written once, 4 * P * D elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS, copy_words, gather_listed
from sparda_compile.kernels.gpu.launch import launch, power_of_two
from sparda_compile.kernels.gpu.packed import gather_listed_packed, unpack_pages
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["stage"]

_TILE: Final = 1024
# Ids that a program of `mark` takes in.
_IDS: Final = 2048
_CHUNK_WORDS: Final = 2048


@triton.jit(do_not_specialize=["num_ids"])
def _mark_blocks(block_ids, wanted, num_ids, num_blocks, TILE: tl.constexpr):
    part, pair = tl.program_id(0), tl.program_id(1)
    number = part * TILE + tl.arange(0, TILE)
    ids_at = block_ids + pair.to(tl.int64) * num_ids
    block = tl.load(ids_at + number, mask=number < num_ids, other=-1)
    one = tl.full([TILE], 1, dtype=tl.int8)
    tl.store(wanted + pair.to(tl.int64) * num_blocks + block, one, mask=block >= 0)


@triton.jit(do_not_specialize=["num_new", "num_room"])
def _place_blocks(
    wanted, lengths, block_table, slots, page_ids, missed, missed_slots, num_missed, groups,
    num_blocks, num_new, num_room, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    first = tl.load(lengths + pair // groups) // SIZE
    own, room = pair.to(tl.int64) * num_blocks, pair.to(tl.int64) * num_room
    count = tl.zeros([], dtype=tl.int32)
    absent = tl.zeros([], dtype=tl.int32)
    for start in tl.range(0, num_blocks, TILE):
        block = start + tl.arange(0, TILE)
        inside = block < num_blocks
        is_past = inside & (block < first)
        read = tl.load(wanted + own + block, mask=is_past, other=0) != 0
        page = tl.load(block_table + own + block, mask=read, other=0)
        rank = count + tl.cumsum(read.to(tl.int32), 0) - 1
        slot = num_new + rank
        tl.store(slots + own + block, tl.where(read, slot, -1), mask=inside)
        tl.store(page_ids + room + rank, page, mask=read)
        is_missed = read & (page < 0)
        place = room + absent + tl.cumsum(is_missed.to(tl.int32), 0) - 1
        tl.store(missed + place, block, mask=is_missed)
        tl.store(missed_slots + place, slot, mask=is_missed)
        count += tl.sum(read.to(tl.int32), 0)
        absent += tl.sum(is_missed.to(tl.int32), 0)
    for start in tl.range(count, num_room, TILE):
        rank = start + tl.arange(0, TILE)
        tl.store(page_ids + room + rank, tl.full([TILE], -1, dtype=tl.int32), mask=rank < num_room)
    tl.store(num_missed + pair, absent)


@triton.jit(do_not_specialize=["num_slots", "num_new"])
def _copy_pages(
    page_ids, pages, staging, num_pages, num_slots, num_new,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    rank, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    page = tl.load(page_ids + pair * tl.num_programs(0) + rank).to(tl.int64)
    if page >= 0:
        source = pages.to(tl.int64) + (pair * num_pages + page) * (WORDS * 4)
        target = staging.to(tl.int64) + (pair * num_slots + num_new + rank) * (WORDS * 4)
        for begin in tl.range(0, WORDS, CHUNK):
            copy_words(source + begin * 4, target + begin * 4, WORDS - begin, CHUNK)


def stage(
    block_ids_BGTK: Tensor | None,
    lengths_B: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
    staging: Tensor,
    slots_BGN: Tensor,
    num_room: int,
    kv_format: str = "model",
    keys: Sequence[Tensor] = (),
    tail: Tensor | None = None,
) -> None:
    """Copy the past blocks that any token has selected; see `runtime.staging`.

    Args:
        block_ids_BGTK: int32, -1 for none; None for every block.
        lengths_B: int32, tokens before this call.
        past: Pages [B, G, C, 2, P, D] or stored runs, [B, G] int64 host addresses or empty without
            offload, and the block table [B, G, N] int32.
        staging: [B, G, S, 2, P, D]; its last slots are written.
        slots_BGN: int32, written.
        num_room: Slots at the end of the buffer for blocks of the past, more than none.
        kv_format: How blocks in CPU memory are stored.
        keys: What keys that stay are read back from; see `staying.py`. Empty for others.
        tail: Beside pages of stored runs, `tail`; it is not read.
    """
    pages, host, table = past
    (batch, groups, num_pages), size = pages.shape[:3], staging.shape[4]
    num_blocks, num_slots, pairs = table.shape[2], staging.shape[2], batch * groups
    num_new = num_slots - num_room
    words = pages[0, 0, 0].numel() * pages.element_size() // 4
    if block_ids_BGTK is None:
        wanted = table.new_ones((pairs, num_blocks), dtype=torch.int8)
    else:
        wanted = table.new_zeros((pairs, num_blocks), dtype=torch.int8)
        ids, num_ids = block_ids_BGTK.contiguous(), block_ids_BGTK[0, 0].numel()
        launch(_mark_blocks, (triton.cdiv(num_ids, _IDS), pairs))(
            ids, wanted, num_ids, num_blocks, _IDS, num_warps=4
        )
    # Each with memory of its own, for a kernel is compiled anew where one begins off 16 bytes.
    listed = [table.new_empty((pairs, num_room)) for _ in range(3)]
    num_missed = table.new_empty((pairs,))
    launch(_place_blocks, (pairs,))(
        wanted, lengths_B, table, slots_BGN, *listed, num_missed, groups,
        num_blocks, num_new, num_room, size, _TILE, num_warps=4,
    )  # fmt: skip
    if host.numel() and KV_FORMATS[kv_format].rounds:
        gather_listed_packed(listed[1], listed[2], num_missed, host, staging, kv_format, keys)
    elif host.numel():
        gather_listed(listed[1], listed[2], num_missed, host, staging, GATHER_PROGRAMS)
    if tail is not None:
        page_BGL = listed[0].view(batch, groups, num_room)
        unpack_pages(pages, page_BGL, num_new, staging, kv_format)
        return
    launch(_copy_pages, (num_room, pairs))(
        listed[0], pages, staging, num_pages, num_slots, num_new, words,
        min(power_of_two(words), _CHUNK_WORDS), num_warps=4,
    )  # fmt: skip
