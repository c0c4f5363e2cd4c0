"""Past blocks of a sparse prompt, side by side in the one buffer that its attention reads.

    stage_blocks    in line, or on the copy stream while the layer before computes

    staging   [B, G, S, 2, P, D]   first ceil(T / P) + 1 slots for the blocks of new tokens, which
                                   attention fills; then a slot for each past block that is read
    slots     [B, G, N] int32      where each past block is, -1 where nobody reads it

A past block is one that has no new token: one before that of the first new token. It comes from its
page, or from CPU memory if it has none. There is room for the most that there can be, the past
blocks or as many as all tokens select: so a first prompt has no such part, and copies nothing.
On CUDA: `kernels/gpu/stage.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.table import Work
from sparda_compile.kernels.paged import (
    block_pool,
    num_new_slots,
    read_blocks,
    stored_or_none,
)
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["empty_staging", "stage_blocks"]


def empty_staging(
    block_ids: Tensor, pages: Tensor, block_table: Tensor, num_past: int
) -> tuple[Tensor, Tensor]:
    """Return the buffer, and slots in it, of no content; arguments are those of `stage_blocks`.

    Beside pages of stored runs `tail` stands for them, whose blocks have the buffer's shape.
    """
    num_tokens, selected = block_ids.shape[2:]
    size = pages.shape[4]
    room = min(num_past // size, num_tokens * selected)
    num_slots = num_new_slots(num_tokens, size) + room
    staging = pages.new_empty((*pages.shape[:2], num_slots, *pages.shape[3:]))
    return staging, torch.empty_like(block_table)


def _fake(a: Any) -> tuple[Tensor, Tensor]:
    return empty_staging(a.block_ids, block_pool(a.pages, a.tail), a.block_table, a.num_past)


def _stage(
    block_ids: Tensor,
    lengths: Tensor,
    past: tuple[Tensor, Tensor, Tensor],
    staging: Tensor,
    slots: Tensor,
    kv_format: str,
    keys: Sequence[Tensor | None],
    tail: Tensor | None,
) -> None:
    """Copy the past blocks that any token has selected, and say where they are."""
    num_new = num_new_slots(block_ids.shape[2], staging.shape[4])
    num_room = staging.shape[2] - num_new
    if not num_room:
        return
    kept = [each for each in keys if each is not None]
    if staging.is_cuda:
        from sparda_compile.kernels.gpu.stage import stage

        stage(block_ids, lengths, past, staging, slots, num_room, kv_format, kept, tail)
        return
    pages, host, block_table = past
    num_blocks = block_table.shape[2]
    ids = block_ids.flatten(2).long()
    wanted = ids.new_zeros((*ids.shape[:2], num_blocks + 1), dtype=torch.bool)
    wanted.scatter_(-1, ids.masked_fill(ids < 0, num_blocks), True)
    first_B = lengths.long() // staging.shape[4]
    wanted = wanted[..., :-1] & (torch.arange(num_blocks) < first_B[:, None, None])
    slots.copy_((num_new + wanted.long().cumsum(-1) - 1).masked_fill(~wanted, -1))
    row, head, block = torch.where(wanted)
    page = block_table[row, head, block].long()
    index = (row, head, page.clamp(min=0))
    blocks = read_blocks(pages, index, stored_or_none(tail, kv_format))
    if host.numel():
        absent = (page < 0)[:, None, None, None]
        found = KV_FORMATS[kv_format]
        mine = [each[row, head, block] for each in kept]
        fetched = found.read(host[row, head, block], mine, *staging.shape[4:], staging.dtype)
        blocks = torch.where(absent, fetched, blocks)
    staging[row, head, slots[row, head, block].long()] = blocks


@define(
    fake=_fake,
    results=("staging", "slots"),
    work=Work.TO_STAGING,
    prompt_copies=("_gather_listed", "_gather_listed_packed", "_copy_pages"),
)
def stage_blocks(
    block_ids: Tensor,
    lengths: Tensor,
    pages: Tensor,
    host: Tensor,
    block_table: Tensor,
    num_past: int,
    stream: int = 0,
    after: Tensor | None = None,
    kv_format: str = "model",
    key_codes: Tensor | None = None,
    key_span: Tensor | None = None,
    key_base: Tensor | None = None,
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy the past blocks that tokens of a prompt have selected to a buffer.

    Args:
        block_ids: [B, G, T, K] int32 blocks that each token reads, -1 for none.
        lengths: [B] int32, tokens in the cache.
        pages: [B, G, C, 2, P, D]; or stored runs, see `kernels.paged`.
        host: [B, G, N, 2, P, D], or addresses (see `runtime.transfer`), or empty without offload.
        block_table: [B, G, N] int32.
        num_past: No sequence has more tokens in the cache.
        stream: 0 compute, 1 copy.
        after: Result of the fork, if blocks were chosen on the compute stream. Otherwise the copy
            starts behind the selection.
        kv_format: How blocks in CPU memory are written.
        key_codes: As for `runtime.transfer.fetch_blocks`, like the next two.
        key_span: [B, G, N, D].
        key_base: [B, G, N, D].
        tail: [B, G, 2, 2, P, D] beside stored runs; past blocks are full, so it is not read.

    Returns:
        The buffer [B, G, S, 2, P, D], and the slot in it of each past block, [B, G, N] int32, -1
        where no token has selected it; without a past, any number.
    """
    del after
    staging, slots = empty_staging(block_ids, block_pool(pages, tail), block_table, num_past)
    past = (pages, host, block_table)
    keys = (key_codes, key_span, key_base)
    args = (block_ids, lengths, past, staging, slots, kv_format, keys, tail)
    current_engine().submit(stream, lambda: _stage(*args))
    return staging, slots
