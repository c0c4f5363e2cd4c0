"""What a cache holds as keys and values by layer, so that a cache of another form can take it over.

A layer is read when it is asked for: one layer at a time exists besides the two caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparda_compile.kernels.paged import WRITTEN, Stored, read_blocks
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import LayerShape

__all__ = ["HeldKeysValues", "held_blocks"]


class HeldKeysValues(Mapping[int, tuple[Tensor, Tensor]]):
    """Keys after rotation and values of a cache, [B, G, T, D] each, by layer.

    A layer with a sliding window gives its last tokens alone. What stands at columns of padding has
    no meaning.

    Args:
        kv: The cache, with no step under way.
        mask_BT: [B, T] bool, which of the columns that were passed in are real tokens.
    """

    def __init__(self, kv: KVCache, mask_BT: Tensor) -> None:
        self._kv = kv
        self._shapes = {shape.layer: shape for shape in kv.layout.layers}
        self._position_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
        if mask_BT.is_cuda:
            torch.cuda.synchronize(mask_BT.device)  # the CPU is about to read what the GPU wrote

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a layer."""
        shape = self._shapes[layer]
        if shape.kind == "window":
            return self._of_ring(shape)
        blocks = held_blocks(self._kv, shape)
        k, v = (blocks[:, :, :, part].flatten(2, 3) for part in (0, 1))
        return _at(k, self._position_BT), _at(v, self._position_BT)

    def __iter__(self) -> Iterator[int]:
        """Yield the layers."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self._shapes)

    def _of_ring(self, shape: LayerShape) -> tuple[Tensor, Tensor]:
        position_BT = self._position_BT[:, -shape.window :] % shape.window
        k, v = (self._kv.state[state_name(n, shape.layer)] for n in ("ring_k", "ring_v"))
        return _at(k, position_BT), _at(v, position_BT)


def held_blocks(kv: KVCache, shape: LayerShape) -> Tensor:
    """Return the blocks that have tokens, [B, G, n, 2, P, D], from wherever each one is.

    Args:
        kv: The cache, with no step under way.
        shape: A layer with blocks.
    """
    layout, layer = kv.layout, shape.layer
    size, dim = layout.config.block_size, shape.head_dim
    table = kv.state[state_name("block_table", layer)]
    used = -(-kv.longest // size)
    if layout.offload:
        host = kv.host_blocks[state_name("host", layer)]
        stored = host[:, :, :used].to(table.device, copy=True)
        names = layout.staying_keys(layer)
        keys = [kv.state[state_name(name, layer)][:, :, :used] for name in names]
        blocks = layout.kv_format(layer).read(stored, keys, size, dim, shape.dtype)
    else:
        sizes = (*table.shape[:2], used, 2, size, dim)
        blocks = torch.zeros(sizes, dtype=shape.dtype, device=table.device)
    # The block that is being written is on the device alone; others are the same in both.
    row, head, block = torch.where(table[:, :, :used] >= 0)
    blocks[row, head, block] = _resident_blocks(kv, layer, (row, head, block))
    return blocks


def _resident_blocks(kv: KVCache, layer: int, index: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return blocks that have a page as the model's dtype has them, [n, 2, P, D].

    Args:
        kv: The cache, with no step under way.
        layer: A layer with blocks.
        index: Sequence, KV head and number of each block, [n] int64 each.
    """
    pages, table = (kv.state[state_name(name, layer)] for name in ("pages", "block_table"))
    row, head, block = index
    page = table[row, head, block].long()
    if not kv.layout.has_stored_pages(layer):
        return read_blocks(pages, (row, head, page), None)
    stored = Stored(kv.state[state_name("tail", layer)], kv.layout.kv_format(layer).name)
    blocks = read_blocks(pages, (row, head, page), stored)
    is_tail = block == kv.state[LENGTHS][row].long() // kv.layout.config.block_size
    return torch.where(is_tail[:, None, None, None], stored.tail[row, head, WRITTEN], blocks)


def _at(x_BGSD: Tensor, position_BT: Tensor) -> Tensor:
    """Return what stands at positions, [B, G, T, D]."""
    index = position_BT[:, None, :, None].expand(-1, x_BGSD.shape[1], -1, x_BGSD.shape[3])
    return x_BGSD.gather(2, index)
