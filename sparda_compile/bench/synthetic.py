"""A KV cache of any length without a prefill, and selections with a stated locality.

    fill       random blocks, pooled keys and bounds; every block on the host, the tail in its page
    follow     a trace: step t keeps a share `overlap` of the scored blocks of step t - 1
    rewind     back to the first step: lengths and tables as after `fill`, blocks as they are

Random weights say nothing about which blocks a model reads, so speed is measured on traces whose
step-to-step overlap is stated. Sink, local and current blocks are selected anyway and not part of
the trace. For benchmarks and tests only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.bench.trace import TRACE
from sparda_compile.formats.staying import KEY_BITS
from sparda_compile.kernels.paged import WRITTEN
from sparda_compile.runtime.block_table import assign_pages
from sparda_compile.selectors.lowbit import quantize
from sparda_compile.state.layout import LENGTHS, state_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from sparda_compile.runtime.kv_cache import KVCache
    from sparda_compile.state.layout import CacheLayout, LayerShape

__all__ = ["draw_steps", "fill", "follow", "rewind", "trace_steps_of"]

_TABLES = ("block_table", "page_block", "page_stamp")


def fill(kv: KVCache, num_tokens: int, seed: int = 0) -> None:
    """Fill a cache as if so many tokens per sequence had been taken in.

    Args:
        kv: A cache; what it held is lost. Two caches of the same sizes get the same content,
            wherever their blocks live; in a format that rounds, all of it is rounded.
        num_tokens: At least 1, less than the cache holds.
        seed: Of the random content.
    """
    device = kv.state[LENGTHS].device
    num_blocks = num_tokens // kv.layout.config.block_size + 1
    for shape in kv.layout.layers:
        if shape.kind != "sparse":
            raise ValueError(f"layer {shape.layer} has a sliding window; fill knows none")
        generator = torch.Generator(device=device).manual_seed(seed * 1000 + shape.layer)
        pages = kv.state[state_name("pages", shape.layer)]
        host = kv.host_blocks.get(state_name("host", shape.layer))
        target = host if host is not None and host.numel() else pages
        found = kv.layout.kv_format(shape.layer)
        is_model = target is pages and not kv.layout.has_stored_pages(shape.layer)
        for row in range(pages.shape[0]):
            block = (2, kv.layout.config.block_size, shape.head_dim)
            size = (pages.shape[1], num_blocks, *block)
            blocks = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            blocks = blocks.to(shape.dtype)
            stored = found.rounded(blocks) if is_model else found.pack(blocks)
            _keep_keys(kv, shape.layer, row, blocks)
            for group in range(size[0]):  # one run of memory each: a copy at the link's rate
                target[row, group, :num_blocks].copy_(stored[group])
        for name in kv.layout.tensors(shape):
            if name in ("pooled_k", "recent_k", "key_bounds"):
                tensor = kv.state[state_name(name, shape.layer)]
                tensor.normal_(generator=generator)
    rewind(kv, num_tokens)


def _staying_keys(kv: KVCache, layer: int) -> list[Tensor]:
    """Return what a layer's keys are read back from, [B, G, N, ...] each; nothing if stored."""
    return [kv.state[state_name(name, layer)] for name in kv.layout.staying_keys(layer)]


def _keep_keys(kv: KVCache, layer: int, row: int, blocks: Tensor) -> None:
    """Keep the keys of a sequence's blocks [G, n, 2, P, D] where the format leaves them."""
    kept = _staying_keys(kv, layer)
    if kept:
        found = quantize(blocks[:, :, 0], KEY_BITS)
        for tensor, new in zip(kept, found, strict=True):
            tensor[row, :, : new.shape[1]] = new


def rewind(kv: KVCache, num_tokens: int) -> None:
    """Make a filled cache hold `num_tokens` per sequence; the last block alone is resident."""
    layout = kv.layout
    lengths = kv.state[LENGTHS]
    lengths.fill_(num_tokens)
    current = num_tokens // layout.config.block_size
    for shape in layout.layers:
        table, page_block, page_stamp = (
            kv.state[state_name(name, shape.layer)] for name in _TABLES
        )
        for tensor in (table, page_block, page_stamp):
            tensor.fill_(-1)
        batch, groups = table.shape[:2]
        if layout.offload:
            ids = torch.full((batch, groups, 1), current, dtype=torch.int32, device=table.device)
        else:
            ids = torch.arange(current + 1, dtype=torch.int32, device=table.device)
            ids = ids.expand(batch, groups, -1).contiguous()
        assign_pages(ids, lengths - 1, table, page_block, page_stamp, layout.config.eviction)
        _reopen(kv, shape, current)
    kv.longest = kv.num_columns = num_tokens


def _reopen(kv: KVCache, shape: LayerShape, current: int) -> None:
    """Put a block where tokens are written, from where it is full: CPU memory, or its page."""
    layout, is_stored = kv.layout, kv.layout.has_stored_pages(shape.layer)
    if not layout.offload and not is_stored:
        return  # it is one and the same page
    pages, table = (kv.state[state_name(name, shape.layer)] for name in ("pages", "block_table"))
    rows = torch.arange(table.shape[0], device=table.device)[:, None]
    heads = torch.arange(table.shape[1], device=table.device)
    page = table[:, :, current].long()
    if layout.offload:
        run = kv.host_blocks[state_name("host", shape.layer)][:, :, current].to(pages.device)
    else:
        run = pages[rows, heads, page]
    keys = [each[:, :, current] for each in _staying_keys(kv, shape.layer)]
    sizes = (layout.config.block_size, shape.head_dim)
    block = layout.kv_format(shape.layer).read(run, keys, *sizes, shape.dtype)
    if is_stored:
        kv.state[state_name("tail", shape.layer)][:, :, WRITTEN] = block
    else:
        pages[rows, heads, page] = block


def trace_steps_of(layout: CacheLayout) -> int:
    """Return the steps of the trace that a cache has room for, 0 for none."""
    for shape in layout.layers:
        spec = layout.tensors(shape).get(TRACE)
        if spec is not None:
            return spec.shape[2]
    return 0


def follow(kv: KVCache, num_tokens: int, overlap: float, seed: int = 0) -> None:
    """Write a trace into a cache whose selection follows one; see `bench.trace`.

    Args:
        kv: The cache.
        num_tokens: Tokens at the first step.
        overlap: Share of a step's scored blocks that the step before selected too, 0.0 to 1.0.
        seed: Of the choice.
    """
    config, steps = kv.layout.config, trace_steps_of(kv.layout)
    device = kv.state[LENGTHS].device
    scored = kv.layout.num_selected - config.num_forced
    first = config.sink_blocks
    end = num_tokens // config.block_size - config.local_blocks
    kept = round(overlap * scored)
    if steps <= 0 or end - first < 2 * scored:
        raise ValueError(f"a trace of {scored} of {end - first} blocks in {steps} steps cannot be")
    for shape in kv.layout.layers:
        trace = kv.state[state_name(TRACE, shape.layer)]
        generator = torch.Generator(device=device).manual_seed(seed * 1000 + shape.layer)
        trace.zero_()
        size = (*trace.shape[:2], end - first)
        for step, picked in enumerate(draw_steps(size, scored, kept, steps, generator)):
            trace[:, :, (num_tokens + step) % steps, first:end] = picked


def draw_steps(
    size: tuple[int, int, int], scored: int, kept: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield [B, G, n] bool, one for each step: which of n blocks it reads.

    Args:
        size: B, G and n.
        scored: Blocks of a step, at most half of n.
        kept: Those that the step before read too.
        steps: How many.
        generator: Of the choice; the result is on its device.
    """
    named: Tensor | None = None
    for _ in range(steps):
        order = torch.rand(size, generator=generator, device=generator.device)
        fresh = order if named is None else order.masked_fill(named, -1.0)
        count = scored if named is None else scored - kept
        picked = torch.zeros_like(order, dtype=torch.bool)
        picked.scatter_(-1, fresh.topk(count).indices, True)
        if named is not None and kept:
            stay = order.masked_fill(~named, -1.0).topk(kept).indices
            picked.scatter_(-1, stay, True)
        named = picked
        yield picked
