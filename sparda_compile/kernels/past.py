"""The keys and values of the first blocks of a cache, in order, from where they are.

A dense prompt behind a past reads them so: blocks that have a page from the pool, the others from
CPU memory, and the block that is being written from the tail. On CUDA `gpu/prefill.py` gathers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.kernels.paged import WRITTEN, read_blocks, stored_or_none
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["past_keys_values"]


def past_keys_values(
    pages: Tensor,
    host: Tensor,
    block_table: Tensor,
    lengths_B: Tensor,
    kv_format: str = "model",
    keys: Sequence[Tensor] = (),
    tail: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the first blocks of each sequence: two tensors [B, G, n * P, D].

    Args:
        pages: [B, G, C, 2, P, D], or stored runs.
        host: [B, G, N, 2, P, D], or addresses (see `runtime.transfer`), or empty without offload.
        block_table: [B, G, n] int32; a block without a page comes from the host.
        lengths_B: Tokens in the cache, int32.
        kv_format: How blocks in CPU memory are written.
        keys: What keys that stay are read back from, of at least n blocks; empty for others.
        tail: [B, G, 2, 2, P, D] beside stored runs.
    """
    num_blocks = block_table.shape[2]
    if pages.is_cuda:
        from sparda_compile.kernels.gpu.prefill import load_prefix

        blocks = load_prefix(pages, host, block_table, num_blocks, kv_format, keys, tail)
    else:
        rows = torch.arange(pages.shape[0])[:, None, None]
        heads = torch.arange(pages.shape[1])[:, None]
        page = block_table.long()
        index = (rows, heads, page.clamp(min=0))
        blocks = read_blocks(pages, index, stored_or_none(tail, kv_format))
        if host.numel():
            absent = (page < 0)[..., None, None, None]
            mine = [each[:, :, :num_blocks] for each in keys]
            size, dim = blocks.shape[4:]
            found = KV_FORMATS[kv_format]
            stored = found.read(host[:, :, :num_blocks], mine, size, dim, blocks.dtype)
            blocks = torch.where(absent, stored, blocks)
    if tail is not None:
        number = torch.arange(num_blocks, device=pages.device)
        is_tail = number == lengths_B[:, None].long() // tail.shape[4]
        is_tail = is_tail[:, None, :, None, None, None]
        blocks = torch.where(is_tail, tail[:, :, WRITTEN : WRITTEN + 1], blocks)
    k, v = blocks.unbind(3)
    return k.flatten(2, 3), v.flatten(2, 3)
