"""What pages hold, and how blocks are read from them: the references.

    pages of         pages                  tail
    the model's      [B, G, C, 2, P, D]     none: the block that is being written has a page
    stored runs      [B, G, C, bytes]       [B, G, 2, 2, P, D] of the model's dtype

A stored run is what CPU memory has of a full block, in a `kv_format` that rounds; here it becomes
numbers of the model's dtype, the same that a copy would have made of it. The block that is being
written is not full, so nothing is rounded: it is the first page of `tail`. It has a page of the
pool, too, which no other block gets and to which its run goes when it is full: so the block table
is the same for both kinds of pages. On CUDA `gpu/tiles.py` reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FOUND",
    "WRITTEN",
    "Stored",
    "block_pool",
    "num_new_slots",
    "read_blocks",
    "read_pages",
    "stored_or_none",
    "tail_pages",
]

WRITTEN: Final = 0
"""Page of `tail` of the block that is being written."""
FOUND: Final = 1
"""That of the same block as it was before the tokens of a prompt, which may fill it and others."""


class Stored(NamedTuple):
    """What goes with pages of stored runs.

    Attributes:
        tail: [B, G, 2, 2, P, D] of the model's dtype.
        kv_format: Name of the format of the runs.
    """

    tail: Tensor
    kv_format: str


def stored_or_none(tail: Tensor | None, kv_format: str) -> Stored | None:
    """Return what goes with pages of stored runs; None for pages of the model's dtype.

    Args:
        tail: As ops take it, None beside pages of the model's dtype.
        kv_format: How full blocks are written.
    """
    return None if tail is None else Stored(tail, kv_format)


def block_pool(pages: Tensor, tail: Tensor | None) -> Tensor:
    """Return the pool whose last dimensions and dtype are those of a block, [2, P, D]."""
    return pages if tail is None else tail


def num_new_slots(num_tokens: int, block_size: int) -> int:
    """Return how many blocks new tokens may lie in, of which the first may have older ones."""
    return -(-num_tokens // block_size) + 1


def tail_pages(block_table: Tensor, *, is_tail: bool) -> Tensor:
    """Return the page of each block in the pool that an op was given, [B, G, N] int32.

    Args:
        block_table: That of `pages`.
        is_tail: Whether the pool is `tail`, of which nobody asks but for the block being written.
    """
    return torch.full_like(block_table, WRITTEN) if is_tail else block_table


def read_blocks(pages: Tensor, index: tuple[Tensor, ...], stored: Stored | None) -> Tensor:
    """Return full blocks from their pages, [..., 2, P, D] of the model's dtype.

    Args:
        pages: The pool.
        index: Sequence, KV head and page of each block, int64 tensors that broadcast.
        stored: What goes with pages of stored runs.
    """
    blocks = pages[index]
    if stored is not None:
        size, dim = stored.tail.shape[4:]
        blocks = KV_FORMATS[stored.kv_format].unpack(blocks, size, dim, stored.tail.dtype)
    return blocks


def read_pages(
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    lengths_B: Tensor,
    stored: Stored | None,
) -> Tensor:
    """Return blocks of each sequence and KV head, [B, G, ..., 2, P, D] of the model's dtype.

    Args:
        pages: The pool.
        page_ids: [B, G, ...] page of each block; any where there is no block.
        block_ids: [B, G, ...] the blocks.
        lengths_B: Tokens before this step; they end in the block that is being written.
        stored: What goes with pages of stored runs.
    """
    batch, groups, *others = page_ids.shape
    ones = [1] * len(others)
    rows = torch.arange(batch, device=pages.device).view(batch, 1, *ones)
    heads = torch.arange(groups, device=pages.device).view(1, groups, *ones)
    blocks = read_blocks(pages, (rows, heads, page_ids.clamp(min=0).long()), stored)
    if stored is None:
        return blocks
    written_B = lengths_B.long() // stored.tail.shape[4]
    is_tail = block_ids == written_B.view(batch, 1, *ones)
    return torch.where(is_tail[..., None, None, None], stored.tail[rows, heads, WRITTEN], blocks)
