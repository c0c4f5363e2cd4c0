"""Blocks that just became full, in a format that rounds: stored, and read back into their pages.

    stored            = pack(block)
    host[b, g, n]     = stored                 where there is CPU memory
    pages[b, g, page] = unpack(stored)         where the block has a page; of stored runs, `stored`

So a block is the same from the next call on, wherever it is read: it is rounded at the end of the
call that fills it, and that call reads it as the model made it. The references, in plain PyTorch;
on CUDA: `kernels/gpu/packed_store.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.isa.counters import OFFLOADED
from sparda_compile.kernels.paged import FOUND, WRITTEN, block_pool
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = ["store", "store_prefix", "store_tail"]


def store(
    new_kv: Sequence[Tensor],
    tail_page: Tensor | None,
    tokens: Sequence[Tensor],
    block_table: Tensor | None,
    stored: tuple[Tensor, Tensor, Tensor, Tensor],
    kv_format: str,
    open_blocks: Tensor | None = None,
) -> None:
    """Store and round what became full, on any device.

    Args:
        new_kv: Prefill: the new keys and values [B, G, T, D]. Decode: empty.
        tail_page: Decode: [B, G] int32, page of the block that the new token went to.
        tokens: Prefill: positions, columns and totals of the new tokens. Decode: empty.
        block_table: Prefill: [B, G, N] int32.
        stored: Lengths, pages, what stands for CPU memory (see `transfer`), and counters.
        kv_format: Name of the format.
        open_blocks: [B, G, 2, 2, P, D], `tail`, beside pages of stored runs.
    """
    lengths, pages, host, counters = stored
    tail: Callable[..., None] = store_tail
    prefix: Callable[..., None] = store_prefix
    if pages.is_cuda:
        from sparda_compile.kernels.gpu import packed_store

        tail, prefix = packed_store.store_tail, packed_store.store_prefix
        counters = counters[OFFLOADED:]
    if tail_page is not None:
        tail(tail_page, lengths, pages, host, counters, kv_format, open_blocks)
    elif block_table is not None:
        k, v = new_kv
        written = (kv_format, open_blocks)
        prefix(k, v, tokens, lengths, block_table, pages, host, counters, *written)


def store_tail(
    tail_page: Tensor,
    lengths: Tensor,
    pages: Tensor,
    host: Tensor,
    counters: Tensor,
    kv_format: str,
    open_blocks: Tensor | None = None,
) -> None:
    """Store the tail block of each sequence whose block the current token has filled.

    Args:
        tail_page: [B, G] int32, page of the current block, -1 if it has none.
        lengths: [B] int32, position of the current token.
        pages: [B, G, C, 2, P, D], or stored runs; updated.
        host: [B, G, N, bytes] uint8, updated; empty without offload.
        counters: [6] int64, updated.
        kv_format: Name of the format.
        open_blocks: [B, G, 2, 2, P, D], `tail`, beside pages of stored runs.
    """
    pool = block_pool(pages, open_blocks)
    size = pool.shape[4]
    is_full = ((lengths + 1) % size == 0)[:, None] & (tail_page >= 0)
    row, head = torch.where(is_full)
    page, block = tail_page[row, head].long(), (lengths.long() // size)[row]
    at = page if open_blocks is None else WRITTEN
    run, kept = _packed(pool[row, head, at], kv_format, open_blocks)
    pages[row, head, page] = kept
    if host.numel():
        host[row, head, block] = run
        counters[OFFLOADED] += is_full.sum()


def store_prefix(
    k: Tensor,
    v: Tensor,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor,
    pages: Tensor,
    host: Tensor,
    counters: Tensor,
    kv_format: str,
    open_blocks: Tensor | None = None,
) -> None:
    """Store every block that the new tokens have filled.

    Args:
        k: [B, G, T, D] new keys.
        v: [B, G, T, D] new values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D], or stored runs; updated. The first block that gets new tokens has
            a page.
        host: [B, G, N, bytes] uint8, updated; empty without offload.
        counters: [6] int64, updated.
        kv_format: Name of the format.
        open_blocks: [B, G, 2, 2, P, D], `tail`, beside pages of stored runs.
    """
    size, groups = block_pool(pages, open_blocks).shape[4], pages.shape[1]
    position_BT, _, total_B = (numbers.long() for numbers in tokens)
    first_B, end_B = lengths.long() // size, total_B // size
    most = int((end_B - first_B).max())  # host-sync: the reference alone
    if most <= 0:
        return
    blocks = k.new_empty((len(lengths), groups, most, 2, size, k.shape[3]))
    row, column = torch.where((position_BT >= 0) & (position_BT < (end_B * size)[:, None]))
    position = position_BT[row, column]
    number, offset = position // size - first_B[row], position % size
    blocks[row, :, number, 0, offset] = k[row, :, column]
    blocks[row, :, number, 1, offset] = v[row, :, column]
    # Only its page, or the tail, has the older tokens of the first block.
    row, heads = torch.where(end_B > first_B)[0], torch.arange(groups, device=pages.device)
    if open_blocks is None:
        page_nG = block_table[row, :, first_B[row]].long()
        blocks[row, :, 0] = pages[row[:, None], heads, page_nG]
    else:
        is_older = torch.arange(size, device=pages.device) < (lengths % size)[row, None]
        older = open_blocks[row, :, FOUND]
        blocks[row, :, 0] = older.where(is_older[:, None, None, :, None], blocks[row, :, 0])

    row, number = torch.where(torch.arange(most, device=pages.device) < (end_B - first_B)[:, None])
    block = first_B[row] + number
    runs, kept = _packed(blocks[row, :, number], kv_format, open_blocks)
    place, head = torch.where(block_table[row, :, block] >= 0)
    page = block_table[row[place], head, block[place]].long()
    pages[row[place], head, page] = kept[place, head]
    if host.numel():
        host[row, :, block] = runs
        counters[OFFLOADED] += (end_B - first_B).sum() * groups


def _packed(blocks: Tensor, kv_format: str, open_blocks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return blocks [..., 2, P, D] as they are stored, and as their pages have them."""
    found = KV_FORMATS[kv_format]
    run = found.pack(blocks)
    return run, found.rounded(blocks) if open_blocks is None else run
