"""Prefill's copies on CUDA, where blocks in CPU memory are reached by address.

    store_prefix   full blocks of the new tokens, gathered on the device, then one copy to the host
    load_prefix    all past blocks of a layer, from pages and from the host, in order

A prefill waits for the device a few times per layer; decode never does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.kernels.gpu.copy import copy_runs

__all__ = ["load_prefix", "store_prefix"]


def _block_bytes(pages: Tensor) -> int:
    return pages[0, 0, 0].numel() * pages.element_size()


def _addresses(blocks_nX: Tensor) -> Tensor:
    """Return the address of each entry of the first dimension, [n] int64, on the device."""
    count = torch.arange(blocks_nX.shape[0], device=blocks_nX.device)
    return blocks_nX.data_ptr() + count * (blocks_nX.stride(0) * blocks_nX.element_size())


def store_prefix(
    k: Tensor,
    v: Tensor,
    token_mask: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    pages: Tensor,
    host: Tensor,
) -> int:
    """Copy every block that new tokens have filled to the host; returns how many.

    Args:
        k: [B, G, T, D] new keys.
        v: [B, G, T, D] new values.
        token_mask: [B, T] bool, which tokens are real.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D]; have the first new block of each sequence, with its old tokens.
        host: [B, G] int64 addresses; what they point to is written.
    """
    groups, size, dim = pages.shape[1], pages.shape[4], pages.shape[5]
    num_bytes = _block_bytes(pages)
    sources, targets = [], []
    keep = []
    totals = (lengths + token_mask.sum(1)).tolist()  # host-sync: prefill only
    starts = lengths.tolist()  # host-sync: prefill only
    for row, (length, total) in enumerate(zip(starts, totals, strict=True)):
        first, end = length // size, total // size
        if end <= first:
            continue
        blocks = pages.new_empty((groups, end - first, 2, size, dim))
        page = block_table[row, :, first].long()
        blocks[:, 0] = pages[row, torch.arange(groups, device=pages.device), page]
        if end - first > 1:
            skip = (first + 1) * size - length
            columns = torch.where(token_mask[row])[0][skip : skip + (end - first - 1) * size]
            for part, tensor in enumerate((k, v)):
                whole = tensor[row][:, columns].unflatten(1, (-1, size))
                blocks[:, 1:, part] = whole
        numbers = torch.arange(first, end, device=pages.device) * num_bytes
        sources.append(_addresses(blocks.flatten(0, 1)))
        targets.append((host[row][:, None] + numbers).flatten())
        keep.append(blocks)
    if not sources:
        return 0
    copy_runs(torch.cat(sources), torch.cat(targets), num_bytes)
    return sum(blocks.shape[0] * blocks.shape[1] for blocks in keep)


def load_prefix(pages: Tensor, host: Tensor, block_table: Tensor, num_blocks: int) -> Tensor:
    """Return the first blocks of each sequence, [B, G, n, 2, P, D].

    Args:
        pages: [B, G, C, 2, P, D].
        host: [B, G] int64 addresses, or empty without offload.
        block_table: [B, G, N] int32; a block without a page comes from the host.
        num_blocks: n.
    """
    batch, groups, num_pages = pages.shape[:3]
    num_bytes = _block_bytes(pages)
    blocks = pages.new_empty((batch, groups, num_blocks, *pages.shape[3:]))
    page = block_table[:, :, :num_blocks].long()
    pairs = torch.arange(batch * groups, device=pages.device).view(batch, groups, 1)
    source = pages.data_ptr() + (pairs * num_pages + page.clamp(min=0)) * num_bytes
    if host.numel():
        numbers = torch.arange(num_blocks, device=pages.device) * num_bytes
        source = source.where(page >= 0, host[:, :, None] + numbers)
    copy_runs(source.flatten().contiguous(), _addresses(blocks.flatten(0, 2)), num_bytes)
    return blocks
