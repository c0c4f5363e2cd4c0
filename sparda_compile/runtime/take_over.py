"""Take over keys and values that the model itself computed, as if a prefill had just run.

The ops are those of the prefill program, one layer after the other, so what the cache holds
afterwards does not depend on who computed the keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import KVCacheError
from sparda_compile.kernels.number_tokens import number_tokens
from sparda_compile.kernels.paged import block_pool
from sparda_compile.runtime.append import advance_lengths, extend_kv, update_summary
from sparda_compile.runtime.transfer import store_blocks
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import LayerShape

__all__ = ["take_over"]


def take_over(
    kv: KVCache, keys_values: Mapping[int, tuple[Tensor, Tensor]], token_mask_BT: Tensor
) -> None:
    """Put the keys and values of every layer into an empty cache.

    Args:
        kv: An empty cache of B sequences.
        keys_values: By layer: keys after rotation and values, [B, G, T, D] each, on any device. A
            layer with a sliding window may hold its last tokens alone.
        token_mask_BT: [B, T] bool, which tokens are real.

    Raises:
        KVCacheError: If a layer is missing, or has another shape or dtype than the model's.
    """
    wanted = {shape.layer for shape in kv.layout.layers}
    if set(keys_values) != wanted:
        raise KVCacheError(
            f"the given cache holds {len(keys_values)} layers but the model has {len(wanted)} with "
            "attention; pass a cache that this very model filled."
        )
    for shape in kv.layout.layers:
        _check(shape, keys_values[shape.layer], token_mask_BT)
    kv.check_room(int(token_mask_BT.sum(1).max()))
    device = kv.state[LENGTHS].device
    mask_BT = token_mask_BT.to(device)
    tokens = number_tokens(mask_BT, kv.state[LENGTHS])
    for shape in kv.layout.layers:
        k, v = (part.to(device) for part in keys_values[shape.layer])
        if shape.kind == "window":
            _take_window(kv, shape.layer, k, v, tokens[0].long())
        else:
            _take_blocks(kv, shape, k, v, tokens)
    advance_lengths(mask_BT, kv.state[LENGTHS])
    kv.advance(mask_BT.shape[1], int(token_mask_BT.sum(1).max()))


def _check(shape: LayerShape, pair: tuple[Tensor, Tensor], mask_BT: Tensor) -> None:
    batch_size, num_tokens = mask_BT.shape
    held = pair[0].shape[2] if pair[0].dim() == 4 else -1
    all_there = held == num_tokens
    if shape.kind == "window":
        all_there = min(num_tokens, shape.window - 1) <= held <= num_tokens
        if held < num_tokens and not bool((mask_BT[:, 1:] >= mask_BT[:, :-1]).all()):
            raise KVCacheError(
                f"layer {shape.layer} of the given cache holds the last {held} columns alone, and "
                "attention_mask has padding behind real tokens: a sequence's last tokens may be "
                "gone. Fill the cache from prompts with padding on the left."
            )
    expected = (batch_size, shape.num_groups, held, shape.head_dim)
    for part in pair:
        if part.shape != expected or part.dtype != shape.dtype or not all_there:
            raise KVCacheError(
                f"the given cache holds {tuple(part.shape)} of {part.dtype} for layer "
                f"{shape.layer}, but the model's keys and values of {num_tokens} tokens are "
                f"{(*expected[:2], num_tokens, expected[3])} of {shape.dtype}; pass a cache that "
                "this very model filled, with an attention_mask of its width."
            )


def _take_blocks(
    kv: KVCache, shape: LayerShape, k: Tensor, v: Tensor, tokens: Sequence[Tensor]
) -> None:
    def state(name: str) -> Tensor:
        return kv.state[state_name(name, shape.layer)]

    config, geometry = kv.layout.config, kv.layout.geometry
    lengths, pages, table = kv.state[LENGTHS], state("pages"), state("block_table")
    tail = state("tail") if kv.layout.has_stored_pages(shape.layer) else None
    extend_kv(
        k,
        v,
        None,
        tokens,
        lengths,
        block_pool(pages, tail),
        table,
        state("page_block"),
        state("page_stamp"),
        config.sink_blocks,
        config.local_blocks,
        config.eviction,
        tail is not None,
    )
    for summary in kv.layout.summaries(shape.layer):
        tensors = [state(name) for name in kv.layout.summary_tensors(summary, shape)]
        update_summary(
            k,
            lengths,
            tokens,
            tensors,
            summary,
            geometry.num_blocks,
            geometry.block_size,
            geometry.pool_size,
            geometry.pool_stride,
        )
    if kv.layout.stores(shape.layer):
        counters, kv_format = state("counters"), kv.layout.kv_format(shape.layer).name
        stored = (pages, state("host"), counters, kv_format, tail)
        store_blocks([k, v], None, tokens, lengths, table, *stored)


def _take_window(kv: KVCache, layer: int, k: Tensor, v: Tensor, position_BT: Tensor) -> None:
    """Put the last tokens into the ring, each in the slot of its position."""
    rings = (kv.state[state_name(name, layer)] for name in ("ring_k", "ring_v"))
    position_BT = position_BT[:, position_BT.shape[1] - k.shape[2] :]
    for ring, part in zip(rings, (k, v), strict=True):
        window = ring.shape[2]
        kept = (position_BT >= 0) & (position_BT > position_BT.amax(1, keepdim=True) - window)
        row, column = torch.where(kept)
        ring[row, :, position_BT[row, column] % window] = part[row, :, column]
