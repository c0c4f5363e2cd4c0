"""Prefill's copies on CUDA, where blocks in CPU memory are reached by address.

    store_prefix   full blocks of the new tokens, from where the model left them
    load_prefix    all past blocks of a layer, from pages and from the host, in order

A store is few programs, like a gather: it runs beside compute, at the pace of the link. How many
tokens are real and which blocks they fill is on the device; nobody waits for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparda_compile.kernels.gpu.copy import GATHER_PROGRAMS, block_bytes, copy_runs, copy_words
from sparda_compile.kernels.gpu.launch import address_of, launch, power_of_two, tokens_of
from sparda_compile.kernels.gpu.packed import gather_listed_packed, unpack_pages
from sparda_compile.kernels.paged import block_pool
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["load_prefix", "store_prefix"]

_TILE: Final = 2048
_CHUNK_WORDS: Final = 1024


def _addresses(blocks_nX: Tensor) -> Tensor:
    """Return the address of each entry of the first dimension, [n] int64, on the device."""
    count = torch.arange(blocks_nX.shape[0], device=blocks_nX.device)
    return address_of(blocks_nX) + count * (blocks_nX.stride(0) * blocks_nX.element_size())


@triton.jit(do_not_specialize=["num_tokens", "num_items"])
def _store_prefix(
    k, v, positions, lengths, totals, block_table, pages, host, counter, k_row, k_head, k_token,
    v_row, v_head, v_token, groups, num_tokens, num_blocks, num_pages, num_items,
    SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, TOKENS: tl.constexpr,
    WORDS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    tiles = (num_tokens + TOKENS - 1) // TOKENS + 1
    item = tl.program_id(0)
    while item < num_items:
        pair, tile = item // tiles, item % tiles
        row, head = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
        first = tl.load(lengths + row) // SIZE
        end = tl.load(totals + row) // SIZE
        if end > first:
            home = tl.load(host + pair)
            if tile == 0:
                # Only its page has the older tokens of the first block.
                page = tl.load(block_table + pair.to(tl.int64) * num_blocks + first)
                source = (pair.to(tl.int64) * num_pages + page) * WORDS
                target = first.to(tl.int64) * WORDS
                for begin in range(0, WORDS, CHUNK):
                    copy_words(
                        pages.to(tl.int64) + (source + begin) * 4, home + (target + begin) * 4,
                        WORDS - begin, CHUNK,
                    )  # fmt: skip
                tl.atomic_add(counter, (end - first).to(tl.int64))
            else:
                token = (tile - 1) * TOKENS + tl.arange(0, TOKENS)
                position = tl.load(
                    positions + row * num_tokens + token, mask=token < num_tokens, other=-1
                )  # fmt: skip
                is_stored = (position >= (first + 1) * SIZE) & (position < end * SIZE)
                if tl.max(is_stored.to(tl.int32), 0) > 0:
                    dims = tl.arange(0, DIMS)
                    mask = is_stored[:, None] & (dims < DIM)[None, :]
                    column = token.to(tl.int64)[:, None]
                    key = k + row * k_row + head * k_head + column * k_token + dims[None, :]
                    value = v + row * v_row + head * v_head + column * v_token + dims[None, :]
                    slot = position.to(tl.int64) // SIZE * (2 * SIZE) + position % SIZE
                    blocks = tl.multiple_of(home.to(pages.dtype), 16)
                    target = blocks + slot[:, None] * DIM + dims[None, :]
                    tl.store(target, tl.load(key, mask=mask), mask=mask)
                    tl.store(target + SIZE * DIM, tl.load(value, mask=mask), mask=mask)
        item += tl.num_programs(0)


def store_prefix(
    k: Tensor,
    v: Tensor,
    tokens: Sequence[Tensor],
    lengths: Tensor,
    block_table: Tensor,
    pages: Tensor,
    host: Tensor,
    counter: Tensor,
    num_programs: int = GATHER_PROGRAMS,
) -> None:
    """Copy every block that new tokens have filled to the host, and count them.

    Args:
        k: [B, G, T, D] new keys, of any strides.
        v: [B, G, T, D] new values.
        tokens: Their positions [B, T], columns [B, T] and totals [B], int32.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32.
        pages: [B, G, C, 2, P, D]; have the first new block of each sequence, with its old tokens.
        host: [B, G] int64 addresses; what they point to is written.
        counter: One int64, raised by the number of blocks.
        num_programs: Programs; each stores a few tokens at a time.
    """
    batch, groups, num_pages, _, size, dim = pages.shape
    num_tokens = k.shape[2]
    positions, _, totals = tokens
    k, *k_strides = tokens_of(k)
    v, *v_strides = tokens_of(v)
    dims = power_of_two(dim)
    tile = max(_TILE // dims, 1)
    items = batch * groups * (triton.cdiv(num_tokens, tile) + 1)
    words = block_bytes(pages) // 4
    launch(_store_prefix, (min(num_programs, items),))(
        k, v, positions, lengths, totals, block_table, pages, host, counter,
        *k_strides, *v_strides, groups, num_tokens, block_table.shape[2], num_pages, items,
        size, dim, dims, tile, words, min(power_of_two(words), _CHUNK_WORDS),
        num_warps=4,
    )  # fmt: skip


def load_prefix(
    pages: Tensor,
    host: Tensor,
    block_table: Tensor,
    num_blocks: int,
    kv_format: str = "model",
    keys: Sequence[Tensor] = (),
    tail: Tensor | None = None,
) -> Tensor:
    """Return the first blocks of each sequence, [B, G, n, 2, P, D].

    Args:
        pages: [B, G, C, 2, P, D], or stored runs.
        host: [B, G] int64 addresses, or empty without offload.
        block_table: [B, G, N] int32; a block without a page comes from the host.
        num_blocks: n.
        kv_format: How blocks in CPU memory are stored.
        keys: What keys that stay are read back from; see `staying.py`. Empty for others.
        tail: [B, G, 2, 2, P, D] beside pages of stored runs; the block that is being written has
            no meaning then.
    """
    batch, groups, num_pages = pages.shape[:3]
    pool = block_pool(pages, tail)
    num_bytes = block_bytes(pool)
    blocks = pool.new_empty((batch, groups, num_blocks, *pool.shape[3:]))
    page = block_table[:, :, :num_blocks].long()
    is_packed = host.numel() > 0 and KV_FORMATS[kv_format].rounds
    if is_packed:
        absent = (page < 0).flatten(0, 1)
        listed = (~absent).byte().argsort(dim=-1, stable=True).int()
        lists = (listed, listed, absent.sum(-1, dtype=torch.int32))
    if tail is not None:
        unpack_pages(pages, page, 0, blocks, kv_format)
        if is_packed:
            gather_listed_packed(*lists, host, blocks, kv_format, keys)
        return blocks
    pairs = torch.arange(batch * groups, device=pages.device).view(batch, groups, 1)
    source = address_of(pages) + (pairs * num_pages + page.clamp(min=0)) * num_bytes
    if host.numel() and not is_packed:
        numbers = torch.arange(num_blocks, device=pages.device) * num_bytes
        source = source.where(page >= 0, host[:, :, None] + numbers)
    # What is stored in another form gets a page's bytes first, and then its own.
    copy_runs(source.flatten().contiguous(), _addresses(blocks.flatten(0, 2)), num_bytes)
    if is_packed:
        gather_listed_packed(*lists, host, blocks, kv_format, keys)
    return blocks
