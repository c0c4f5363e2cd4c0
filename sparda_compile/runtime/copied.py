"""Blocks that just became full, as the model made them: copied to CPU memory.

    host[b, g, n] = pages[b, g, tail_page]            of a decode step
    host[b, g, n] = new keys and values               of a prompt; older tokens come from a page

The references, in plain PyTorch; on CUDA: `kernels/gpu/copy.py`, `kernels/gpu/prefill.py`. Formats
that round have `packed.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.isa.counters import OFFLOADED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["store_prefix", "store_tail"]


def store_tail(
    tail_page: Tensor, lengths: Tensor, pages: Tensor, host: Tensor, counters: Tensor
) -> None:
    """Copy the tail block of each sequence whose block the current token has filled.

    Args:
        tail_page: [B, G] int32, page of the current block, -1 if it has none.
        lengths: [B] int32, position of the current token.
        pages: [B, G, C, 2, P, D].
        host: [B, G, N, 2, P, D], updated; empty without offload. On CUDA addresses.
        counters: [6] int64, updated.
    """
    if not host.numel():
        return
    if pages.is_cuda:
        from sparda_compile.kernels.gpu import copy

        copy.store_tail(tail_page, lengths, pages, host, counters[OFFLOADED:])
        return
    size = pages.shape[4]
    is_full = ((lengths + 1) % size == 0)[:, None] & (tail_page >= 0)
    row, head = torch.where(is_full)
    block = (lengths.long() // size)[row]
    host[row, head, block] = pages[row, head, tail_page[row, head].long()]
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
) -> None:
    """Copy every block that the new tokens have filled.

    Args:
        k: [B, G, T, D] new keys.
        v: [B, G, T, D] new values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D]; the first block that gets new tokens has a page.
        host: [B, G, N, 2, P, D], updated; empty without offload. On CUDA addresses.
        counters: [6] int64, updated.
    """
    if not host.numel():
        return
    if pages.is_cuda:
        from sparda_compile.kernels.gpu import prefill

        counter = counters[OFFLOADED:]
        prefill.store_prefix(k, v, tokens, lengths, block_table, pages, host, counter)
        return
    size = pages.shape[4]
    position_BT, _, total_B = (numbers.long() for numbers in tokens)
    first_B, end_B = lengths.long() // size, total_B // size
    # The first block may have older tokens, which only its page has.
    row = torch.where(end_B > first_B)[0]
    page_nG = block_table[row, :, first_B[row]].long()
    heads = torch.arange(pages.shape[1])
    host[row, :, first_B[row]] = pages[row[:, None], heads, page_nG]

    whole = (position_BT >= ((first_B + 1) * size)[:, None]) & (
        position_BT < (end_B * size)[:, None]
    )
    row, column = torch.where(whole)
    position = position_BT[row, column]
    block, offset = position // size, position % size
    host[row, :, block, 0, offset] = k[row, :, column]
    host[row, :, block, 1, offset] = v[row, :, column]
    counters[OFFLOADED] += (end_B - first_B).sum() * pages.shape[1]
