"""KVCache: all KV state of one batch of sequences, as the tensors that a program takes.

Ownership:

    bytes in CPU memory          HostPool
    bytes on the device          DevicePool
    block -> page                block_table.py, the only writer of residency
    streams, events, copies      isa/engines.py and transfer.py
    who leaves                   eviction.py
    the whole                    KVCache
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.checks import whole
from sparda_compile.errors import ConfigError, KVCacheError
from sparda_compile.isa.counters import COUNTERS
from sparda_compile.kernels.paged import WRITTEN
from sparda_compile.report.text import selection_sentence
from sparda_compile.runtime.block_table import assign_pages
from sparda_compile.runtime.device_pool import DevicePool
from sparda_compile.runtime.empty_state import EmptyState
from sparda_compile.runtime.held import held_blocks
from sparda_compile.runtime.host_pool import HostPool
from sparda_compile.runtime.numa import ANYWHERE, placement_near
from sparda_compile.runtime.pinned import check_host_access
from sparda_compile.runtime.stats import CacheStats, LayerStats
from sparda_compile.selectors import summary_named
from sparda_compile.state.layout import LENGTHS, CacheLayout, LayerShape, state_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KVCache", "check_budgets"]

# What holds blocks, and what says where they are.
_POOLS: Final = ("pages", "host", "tail")
_PAGED: Final = ("pages", "host", "block_table", "page_block", "page_stamp", "tail")


class KVCache:
    """State of `layout.batch_size` sequences of up to `layout.max_tokens` tokens.

    Args:
        layout: Sizes.
        device: Where the program runs.

    Attributes:
        layout: Sizes.
        state: Every state tensor, by graph input name; addresses never change.
        host_blocks: The blocks in CPU memory, [B, G, N, 2, P, D] each, or [B, G, N, bytes] in a
            format that rounds, by graph input name. On the CPU they are in `state` too; on CUDA
            `state` has their addresses, [B, G] int64.
        num_columns: Tokens per sequence that were passed in, padding included.
        is_broken: Whether a step began and did not end, so that nobody knows what is here.
        longest: Tokens of the longest sequence, padding left out.
        num_issued: Columns of steps that were issued and not counted by `advance` yet.

    Raises:
        HostPoolFullError: If there is not enough CPU memory.
        DevicePoolFullError: If `device_bytes` is not enough.
    """

    def __init__(self, layout: CacheLayout, device: torch.device) -> None:
        self.layout = layout
        config = layout.config
        size = (layout.batch_size, layout.max_tokens)
        on_cpu = device.type == "cpu"
        self.device_pool = DevicePool(device, config.device_bytes)
        device_bytes = layout.num_bytes(on_host=False)
        host_bytes = layout.num_bytes(on_host=True)
        place = ANYWHERE
        if host_bytes and not on_cpu:
            check_host_access(device)
            place = placement_near(device)
        self.host_pool = HostPool(config.host_bytes, pinned=not on_cpu, place=place)
        self.device_pool.check(device_bytes, *size)
        self.host_pool.check(host_bytes + (device_bytes if on_cpu else 0), *size)
        self.state: dict[str, Tensor] = {}
        self.host_blocks: dict[str, Tensor] = {}
        for name, spec in layout.all_tensors().items():
            if spec.on_host:
                self.host_blocks[name] = self.host_pool.allocate(spec)
                self.state[name] = _as_input(self.host_blocks[name], device)
            else:
                self.state[name] = self.device_pool.allocate(spec)
        self.num_columns = 0
        self.longest = 0
        self.num_issued = 0
        self.is_broken = False
        self._reset_summaries()
        self._empty = EmptyState(layout, self.state)

    def reset(self) -> None:
        """Forget every sequence and zero the counters; memory stays."""
        self._empty.restore()
        self.num_columns = 0
        self.longest = 0
        self.num_issued = 0
        self.is_broken = False

    @property
    def most_past(self) -> int:
        """No sequence has more tokens than this; known without asking the device."""
        return min(self.longest + self.num_issued, self.layout.max_tokens)

    def issue(self, num_columns: int) -> None:
        """Note that a step with so many tokens per sequence begins, padding included."""
        self.num_issued += num_columns

    def advance(self, num_columns: int, num_tokens: int) -> None:
        """Note that the steps issued so far have taken in tokens.

        Args:
            num_columns: Tokens per sequence, padding included.
            num_tokens: Most real tokens that any sequence got.
        """
        self.num_columns += num_columns
        self.longest += num_tokens
        self.num_issued = 0

    def check_ended(self) -> None:
        """Raise KVCacheError if the last step began and did not end."""
        if self.is_broken:
            raise KVCacheError(
                "the last step on this cache began and did not end, so nobody knows what it holds. "
                "Call its reset() and pass the whole text again, or start a new cache."
            )

    def check_room(self, num_tokens: int) -> None:
        """Raise KVCacheError if so many more tokens do not fit."""
        if self.longest + num_tokens <= self.layout.max_tokens:
            return
        raise KVCacheError(
            f"{num_tokens} more tokens do not fit: the cache holds {self.longest} and was reserved "
            f"for {self.layout.max_tokens} per sequence. Raise max_tokens in SpardaConfig, or pass "
            "fewer tokens."
        )

    def grow(self, layout: CacheLayout) -> KVCache:
        """Return another cache with the same content.

        Full blocks are rounded where the larger one has another format.

        Args:
            layout: As this one's, or with more `max_tokens`, and then maybe another place or format
                of blocks, as `auto` chooses by size.
        """
        device = self.state[LENGTHS].device
        larger = KVCache(layout, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the CPU is about to read what the GPU wrote
        written_anew = set()
        for shape in self.layout.layers:
            if shape.kind == "sparse" and _form(layout, shape) != _form(self.layout, shape):
                written_anew |= _write_anew(self, larger, shape)
        for name, old in (self.state | self.host_blocks).items():
            if name not in written_anew:
                new = larger.host_blocks.get(name, larger.state[name])
                new[tuple(slice(0, size) for size in old.shape)] = old
        larger.num_columns, larger.longest = self.num_columns, self.longest
        larger.num_issued = self.num_issued
        return larger

    def reorder(self, rows: Tensor) -> None:
        """Let sequences go on from what others hold, as beams do; waits for the device.

        Only sequences that change are copied, in place: addresses never change.

        Args:
            rows: [B] int64, the sequence whose keys each one takes over.
        """
        device = self.state[LENGTHS].device
        rows = rows.to(device)
        changed = torch.where(rows != torch.arange(len(rows), device=device))[0]
        if not len(changed):
            return
        taken = rows[changed]
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the CPU is about to read what the GPU wrote
        specs = self.layout.all_tensors()
        shared = {name for name, spec in specs.items() if spec.is_shared}
        # On CUDA the state has the addresses of the blocks in CPU memory; those stay.
        for name, tensor in (self.state | self.host_blocks).items():
            if name not in shared and tensor.numel():
                tensor[changed.to(tensor.device)] = tensor[taken.to(tensor.device)]

    def lengths(self) -> list[int]:
        """Return the tokens of each sequence; waits for the device."""
        return [int(n) for n in self.state[LENGTHS].tolist()]

    def stats(self) -> CacheStats:
        """Return the counts since the last reset; waits for the device."""
        layers, layout = {}, self.layout
        speculates = layout.strategy.predictor is not None
        for shape in self.layout.layers:
            if shape.kind != "sparse":
                continue
            counters = self.state[state_name("counters", shape.layer)].tolist()
            count = dict(zip(COUNTERS, counters, strict=True))
            block_bytes = layout.stored_bytes(shape.layer, shape.head_dim, shape.dtype)
            fetched = count["prefetched_blocks"] + count["repaired_blocks"]
            layers[shape.layer] = LayerStats(
                hits=count["hits"],
                misses=count["misses"],
                h2d_bytes=fetched * block_bytes if self.layout.offload else 0,
                d2h_bytes=count["offloaded_blocks"] * block_bytes,
                repaired=count["repaired_blocks"] if speculates else 0,
                wasted=count["wasted_blocks"],
            )
        sentence = selection_sentence(layout.config, layout.max_tokens)
        formats = {layer: layout.kv_format(layer).name for layer in layers}
        where, pages = self.host_pool.place.sentence, layout.config.page_format
        return CacheStats(layers, sentence, speculates, formats, where, pages)

    def set_budgets(self, budgets: Mapping[int, int]) -> None:
        """Set how many blocks layers predict for a step, from the next prediction on.

        They are read on the device, so nothing is compiled or captured anew.

        Args:
            budgets: By layer; see `check_budgets`.
        """
        check_budgets(self.layout, budgets)
        for layer, blocks in budgets.items():
            self.state[state_name("budget", layer)].fill_(blocks)

    def reset_stats(self) -> None:
        """Zero the counters."""
        for shape in self.layout.layers:
            if shape.kind == "sparse":
                self.state[state_name("counters", shape.layer)].zero_()

    def _reset_summaries(self) -> None:
        for shape in self.layout.layers:
            if shape.kind != "sparse":
                continue
            for summary in self.layout.summaries(shape.layer):
                names = self.layout.summary_tensors(summary, shape)
                tensors = [self.state[state_name(n, shape.layer)] for n in names]
                summary_named(summary).reset(tensors)


def check_budgets(layout: CacheLayout, budgets: Mapping[int, int]) -> None:
    """Check how many blocks layers are to predict.

    Args:
        layout: Sizes of the cache.
        budgets: By layer: 0 to W blocks, sink, local and current ones among them.

    Raises:
        ConfigError: If the mode predicts nothing, a layer does not, or a number is not allowed.
    """
    if layout.strategy.predictor is None:
        raise ConfigError(
            f"budgets are how many blocks mode='speculate' predicts, and this cache is one of "
            f"mode={layout.config.mode!r}, which predicts none; leave them out."
        )
    layers = [shape.layer for shape in layout.layers if shape.kind == "sparse"]
    if not isinstance(budgets, Mapping):
        raise ConfigError(
            f"budgets are a {type(budgets).__name__}; give them by layer, such as {{{layers[0]}: "
            f"{layout.num_predicted}}}."
        )
    for layer, blocks in budgets.items():
        if layer not in layers:
            raise ConfigError(
                f"a budget is given for layer {layer!r}, but those that predict blocks are "
                f"{', '.join(map(str, layers))}."
            )
        whole(f"the budget of layer {layer}", blocks, 0, layout.num_predicted)


def _as_input(blocks: Tensor, device: torch.device) -> Tensor:
    """Return what a program takes for blocks in CPU memory; see `transfer`."""
    if device.type == "cpu":
        return blocks
    if not blocks.numel():
        return blocks.to(device)
    batch, groups = blocks.shape[:2]
    stride = blocks.stride(1) * blocks.element_size()
    pairs = torch.arange(batch * groups, dtype=torch.int64).view(batch, groups)
    return (blocks.data_ptr() + pairs * stride).to(device)


def _form(layout: CacheLayout, shape: LayerShape) -> tuple[bool, str, bool]:
    """Return what decides where blocks of a layer are, and how they are written."""
    layer = shape.layer
    return layout.offload, layout.kv_format(layer).name, layout.has_stored_pages(layer)


def _write_anew(old: KVCache, new: KVCache, shape: LayerShape) -> set[str]:
    """Copy a layer's blocks to a larger cache of another form; returns the tensors that are done.

    In CPU memory all blocks are written, and only those that are still open get pages. On the
    device each block keeps the number of its page.
    """
    layer, layout = shape.layer, new.layout
    assert layout.offload or not old.layout.offload, "a larger cache does not come back"
    pages, _, table, page_block, page_stamp = (
        new.state[state_name(name, layer)] for name in _PAGED[:5]
    )
    blocks = held_blocks(old, shape)
    # Full blocks that were rounded before stay what they are. Nobody reads an open one from there.
    stored = layout.kv_format(layer).pack(blocks)
    lengths, size = old.state[LENGTHS], layout.config.block_size
    open_B = torch.where(lengths % size > 0, lengths // size, -1)
    ids_BG1 = open_B[:, None, None].expand(*table.shape[:2], 1).contiguous()
    if layout.offload:
        host = new.host_blocks[state_name("host", layer)]
        host[:, :, : stored.shape[2]] = stored.to(host.device)
        stamp_B, eviction = (lengths - 1).clamp(min=0), layout.config.eviction
        page_BG1, _ = assign_pages(ids_BG1, stamp_B, table, page_block, page_stamp, eviction)
        done: tuple[str, ...] = _PAGED
    else:
        before = old.state[state_name("block_table", layer)]
        row, head, block = torch.where(before[:, :, : blocks.shape[2]] >= 0)
        whole = stored if layout.has_stored_pages(layer) else blocks
        pages[row, head, before[row, head, block].long()] = whole[row, head, block]
        page_BG1 = torch.where(ids_BG1 < 0, -1, before.gather(2, ids_BG1.clamp(min=0).long()))
        done = _POOLS
    row, head, entry = torch.where(page_BG1 >= 0)
    opened = blocks[row, head, ids_BG1[row, head, entry].long()]
    if layout.has_stored_pages(layer):
        new.state[state_name("tail", layer)][row, head, WRITTEN] = opened
    else:
        pages[row, head, page_BG1[row, head, entry].long()] = opened
    return {state_name(name, layer) for name in done}
