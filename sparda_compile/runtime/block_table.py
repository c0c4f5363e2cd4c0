"""Block -> page: the only writer of residency. Plans ids; moves no bytes.

`plan_pages` looks selected blocks up, gives the absent ones pages, and lists what to fetch:

    hit    table[id] >= 0                      stays where it is
    miss   table[id] <  0                      i-th miss takes the i-th page of those that leave
    tail   the block being written, if new     takes a page too, but nothing is fetched for it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from sparda_compile.isa.counters import HITS, MISSES, PREFETCHED, REPAIRED
from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.isa.table import Part
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.runtime.eviction import TOUCHES_HITS, victim_order

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["assign_pages", "plan_pages", "select_pages"]

# What a plan updates, and what it returns.
TABLES: Final = ("block_table", "page_block", "page_stamp", "counters")
PLAN_RESULTS: Final = ("page_ids", "is_miss", "miss_blocks", "miss_pages", "tail_page")


def assign_pages(
    ids_BGK: Tensor,
    stamp_B: Tensor,
    block_table: Tensor,
    page_block: Tensor,
    page_stamp: Tensor,
    eviction: str,
    written_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give every block of `ids` a page. Updates the three tables.

    Args:
        ids_BGK: int32 block ids, each at most once, -1 for none; no more than there are pages.
        stamp_B: int32, what selected (or loaded) pages are stamped with.
        block_table: [B, G, N] int32.
        page_block: [B, G, C] int32.
        page_stamp: [B, G, C] int32.
        eviction: Policy.
        written_B: Blocks that keep their page although they are not in `ids`: the host has not
            got them yet. One page more than ids must be there for it. None for no block.

    Returns:
        The page of each id [B, G, K] int32 (-1 for none), and which ids were absent [B, G, K].
    """
    wanted = ids_BGK >= 0
    safe_ids = ids_BGK.clamp(min=0).long()
    page = block_table.gather(-1, safe_ids).masked_fill(~wanted, -1)
    hit, miss = page >= 0, wanted & (page < 0)
    num_pages = page_block.shape[-1]

    def mark(positions: Tensor, mask: Tensor) -> Tensor:
        """Return [B, G, C] bool: pages named in `positions` where `mask`."""
        padded = page_block.new_zeros((*page_block.shape[:2], num_pages + 1), dtype=torch.bool)
        padded.scatter_(-1, positions.long().masked_fill(~mask, num_pages), True)
        return padded[..., :num_pages]

    kept = mark(page, hit)
    if written_B is not None:
        written = block_table.gather(-1, written_B.long()[:, None, None].expand(*page.shape[:2], 1))
        kept |= mark(written, written >= 0)
    # Those that leave are handed out by page number.
    order = victim_order(page_stamp, kept, stamp_B)[..., : page.shape[-1]]
    turn = torch.arange(order.shape[-1], device=order.device)
    leaving = turn < miss.sum(-1, keepdim=True)
    order = order.masked_fill(~leaving, num_pages).sort(-1).values.clamp(max=num_pages - 1)
    rank = (miss.long().cumsum(-1) - 1).clamp(min=0, max=order.shape[-1] - 1)
    page = torch.where(miss, order.gather(-1, rank).int(), page)

    evicted = page_block.gather(-1, page.clamp(min=0).long()).masked_fill(~miss, -1)
    _scatter(block_table, evicted, torch.full_like(page, -1), evicted >= 0)
    _scatter(block_table, ids_BGK, page, miss)
    _scatter(page_block, page, ids_BGK, miss)
    touched = miss | hit if TOUCHES_HITS[eviction] else miss
    _scatter(page_stamp, page, stamp_B[:, None, None].expand_as(page), touched)
    return page, miss


def _scatter(target: Tensor, index: Tensor, values: Tensor, mask: Tensor) -> None:
    """Write `values` at `index` along the last dimension where `mask`, in place."""
    size = target.shape[-1]
    padded = torch.cat([target, target[..., :1]], dim=-1)
    padded.scatter_(-1, index.long().masked_fill(~mask, size), values.to(target.dtype))
    target.copy_(padded[..., :size])


def _is_resident(arguments: Mapping[str, Any]) -> bool:
    """Whether there is a page for every block: then none leaves, and only new ones get theirs."""
    return bool(arguments["page_block"].shape == arguments["block_table"].shape)


# Of a decode step, the one new block is the current one.
_CURRENT: Final = Part("block_table", "current", by="lengths", holds=_is_resident)


def _fake_plan(arguments: Any) -> tuple[Tensor, ...]:
    block_ids = arguments.block_ids
    ids = [torch.empty_like(block_ids) for _ in range(3)]
    is_miss = torch.empty_like(block_ids, dtype=torch.bool)
    return ids[0], is_miss, ids[1], ids[2], block_ids.new_empty(block_ids.shape[:2])


@define(
    mutates=TABLES,
    fake=_fake_plan,
    results=PLAN_RESULTS,
    kernels=("_select_pages",),
    parts=(_CURRENT,),
)
def plan_pages(
    block_ids: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    page_block: Tensor,
    page_stamp: Tensor,
    counters: Tensor,
    block_size: int,
    eviction: str,
    is_hint: bool,
    stream: int = 0,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Decide where the selected blocks will be, and which have to come from the host.

    Args:
        block_ids: [B, G, K] int32, -1 for none.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32, updated.
        page_block: [B, G, C] int32, updated.
        page_stamp: [B, G, C] int32, updated.
        counters: [6] int64, updated; see `isa.counters`.
        block_size: P.
        eviction: `lru` or `fifo`.
        is_hint: Whether the ids are a guess; guesses do not count as hits or misses.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.

    Returns:
        page_ids [B, G, K] int32, page of each id; is_miss [B, G, K] bool, ids to fetch;
        miss_blocks and miss_pages [B, G, K] int32, the same as a compacted list, then -1;
        tail_page [B, G] int32, page of the block that the new token goes to, -1 if not planned.
    """
    del after
    page_ids, miss_blocks, miss_pages = (torch.empty_like(block_ids) for _ in range(3))
    is_miss = torch.empty_like(block_ids, dtype=torch.bool)
    tail_page = block_ids.new_empty(block_ids.shape[:2])
    out = (page_ids, is_miss, miss_blocks, miss_pages, tail_page)
    tables = (block_table, page_block, page_stamp, counters)

    def work() -> None:
        if block_ids.is_cuda:
            from sparda_compile.kernels.gpu.select import Planned, Tables, plan

            plan(
                block_ids,
                lengths,
                Tables(*tables),
                Planned(*out),
                block_size,
                eviction,
                is_hint=is_hint,
            )
        else:
            _plan(block_ids, lengths, tables, out, block_size, eviction, is_hint=is_hint)

    current_engine().submit(stream, work)
    return out


def _plan(
    block_ids: Tensor,
    lengths: Tensor,
    tables: tuple[Tensor, Tensor, Tensor, Tensor],
    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    block_size: int,
    eviction: str,
    *,
    is_hint: bool,
) -> None:
    """Fill the results of `plan_pages` and update its tables."""
    page_ids, is_miss, miss_blocks, miss_pages, tail_page = out
    table, owner, stamp, counters = tables
    current_B = lengths // block_size
    # A hint may have been made before the current block: it must not push that one out.
    page, absent = assign_pages(block_ids, lengths, table, owner, stamp, eviction, current_B)
    current = current_B[:, None, None]
    is_tail = block_ids == current
    fetch = absent & (block_ids < current)
    page_ids.copy_(page)
    is_miss.copy_(fetch)
    tail_page.copy_(torch.where(is_tail, page, -1).amax(-1))
    order = (~fetch).byte().sort(dim=-1, stable=True).indices
    listed = fetch.gather(-1, order)
    miss_blocks.copy_(block_ids.gather(-1, order).masked_fill(~listed, -1))
    miss_pages.copy_(page.gather(-1, order).masked_fill(~listed, -1))
    num_fetched = fetch.sum()
    if is_hint:
        counters[PREFETCHED] += num_fetched
    else:
        counters[HITS] += ((block_ids >= 0) & ~fetch).sum()
        counters[MISSES] += num_fetched
        counters[REPAIRED] += num_fetched


def _fake_selection(arguments: Any) -> tuple[Tensor, ...]:
    shape = (*arguments.scores.shape[:2], arguments.num_selected)
    ids = [arguments.lengths.new_empty(shape) for _ in range(4)]
    is_miss = ids[0].new_empty(shape, dtype=torch.bool)
    return ids[0], ids[1], is_miss, ids[2], ids[3], ids[0].new_empty(shape[:2])


@define(
    mutates=TABLES,
    fake=_fake_selection,
    results=("block_ids", *PLAN_RESULTS),
    kernels=("_select_pages",),
    parts=(_CURRENT,),
)
def select_pages(
    scores: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    page_block: Tensor,
    page_stamp: Tensor,
    counters: Tensor,
    num_selected: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    eviction: str,
    is_hint: bool,
    stream: int = 0,
    after: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Do `select_blocks` and then `plan_pages`, on CUDA in one launch.

    Args:
        scores: [B, G, N] float32; as for `select_blocks`.
        lengths: [B] int32, tokens before this step.
        block_table: [B, G, N] int32, updated.
        page_block: [B, G, C] int32, updated.
        page_stamp: [B, G, C] int32, updated.
        counters: [6] int64, updated.
        num_selected: K.
        block_size: P.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the current one.
        eviction: `lru` or `fifo`.
        is_hint: Whether the ids are a guess.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.

    Returns:
        block_ids [B, G, K] int32, then the results of `plan_pages`.
    """
    del after
    ids, page_ids, miss_blocks, miss_pages = (
        lengths.new_empty((*scores.shape[:2], num_selected)) for _ in range(4)
    )
    is_miss = torch.empty_like(ids, dtype=torch.bool)
    tail_page = ids.new_empty(ids.shape[:2])
    out = (page_ids, is_miss, miss_blocks, miss_pages, tail_page)
    tables = (block_table, page_block, page_stamp, counters)
    choice = (num_selected, block_size, sink_blocks, local_blocks)

    def work() -> None:
        if scores.is_cuda:
            from sparda_compile.kernels.gpu.select import Choice, Planned, Tables, select_and_plan

            select_and_plan(
                scores,
                lengths,
                ids,
                Tables(*tables),
                Planned(*out),
                Choice(*choice),
                eviction,
                is_hint=is_hint,
            )
        else:
            ids.copy_(select_blocks_reference(scores, lengths, *choice))
            _plan(ids, lengths, tables, out, block_size, eviction, is_hint=is_hint)

    current_engine().submit(stream, work)
    return ids, *out
