"""From scores to a miss list in one launch: pick blocks, look them up, give the absent ones pages.

    threshold   the K-th largest key, between two bounds that close in; no sort
                (two thresholds a step: four and eight took longer on an H200)
    ids         blocks above it and, by ascending id, as many at it as fit
    victims     the pages not selected for longest, up to 254 steps; protected ones never
    tables      block -> page, page -> block, stamps; updated in place

One program per sequence and group. Steps of a program talk through global memory, between
barriers; a small tensor is held by several warps at once, so a load and a later store to the same
place need one too. `select_blocks` runs the first half, `plan_pages` the second, `select_pages`
both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import triton
import triton.language as tl

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.isa.counters import HITS, MISSES, PREFETCHED, REPAIRED
from sparda_compile.kernels.gpu.launch import launch, power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "MOST_BLOCKS",
    "Choice",
    "Planned",
    "Tables",
    "check_num_blocks",
    "find_largest",
    "keys_of",
    "pick",
    "pick_listed",
    "plan",
    "select",
    "select_and_plan",
]

# Counts of blocks are added up in 16 bits.
MOST_BLOCKS: Final = 1 << 15
_HITS = tl.constexpr(HITS)
_MISSES = tl.constexpr(MISSES)
_PREFETCHED = tl.constexpr(PREFETCHED)
_REPAIRED = tl.constexpr(REPAIRED)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_MOST = tl.constexpr(0x7FFFFFFF)
_LEAST = tl.constexpr(-(1 << 31))
_IN_USE = tl.constexpr(0x7FFFFFFF)


class Choice(NamedTuple):
    """What to pick: K blocks of P tokens, which of them always."""

    num_selected: int
    block_size: int
    sink_blocks: int
    local_blocks: int


class Tables(NamedTuple):
    """Where blocks are: [B, G, N], [B, G, C], [B, G, C] int32, and [6] int64 counters."""

    block_table: Tensor
    page_block: Tensor
    page_stamp: Tensor
    counters: Tensor


class Planned(NamedTuple):
    """Outputs of a plan: [B, G, K] each (is_miss bool, else int32), and [B, G] int32."""

    page_ids: Tensor
    is_miss: Tensor
    miss_blocks: Tensor
    miss_pages: Tensor
    tail_page: Tensor


@triton.jit
def find_largest(key, low, span, found, wanted):  # noqa: ANN201 - a part of kernels
    """Mark the `wanted` largest keys; ties go to the lower position.

    As many keys as wanted, or more, are at least `low`, of `found` in all; fewer reach `low` +
    `span`. If `found` are not more than wanted, `low` is below them all. Two thresholds at a time
    narrow that down, counted in the halves of one integer, until only the wanted are left, or ties.
    """
    low = low.to(tl.int64)
    high = low + span
    while (found > wanted) & (high - low > 1):
        step = tl.maximum((high - low) // 3, 1)
        first = tl.minimum(low + step, high - 1)
        second = tl.minimum(low + 2 * step, high - 1)
        reach_first = (key >= first.to(tl.int32)).to(tl.int32)
        reach_second = (key >= second.to(tl.int32)).to(tl.int32)
        # One sum of 32 bits: warps add that up in one instruction, and 64 bits in ten.
        counts = tl.sum(reach_first + (reach_second << 16), 0)
        num_first, num_second = counts & 0xFFFF, (counts >> 16) & 0xFFFF
        high = tl.where(num_second < wanted, second, high)
        high = tl.where(num_first < wanted, first, high)
        low = tl.where(num_first >= wanted, first, low)
        low = tl.where(num_second >= wanted, second, low)
        found = tl.where(num_first >= wanted, num_first, found)
        found = tl.where(num_second >= wanted, num_second, found)
    cut = low.to(tl.int32)
    marked = key >= cut
    if found > wanted:
        above = key > cut
        tie = key == cut
        free = wanted - tl.sum(above.to(tl.int32), 0)
        marked = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= free))
    return marked


@triton.jit
def keys_of(score, forced, exists):  # noqa: ANN201 - a part of kernels
    """Return integers in the order of scores: forced ones first, what does not exist last."""
    score = tl.where(score == 0.0, 0.0, tl.maximum(score, _LOWEST))
    score = tl.where(forced, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(exists, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _LEAST)


@triton.jit
def pick_listed(score, forced, exists, SELECTED: tl.constexpr):  # noqa: ANN201
    """Mark the SELECTED best of a list that is in the order of block ids; ties go to the first."""
    key = keys_of(score, forced, exists)
    low = tl.min(tl.where(exists, key, _MOST), 0)
    # Fewer than are wanted are above the best that is not forced; or forced ones alone are wanted.
    enough = tl.sum((forced & exists).to(tl.int32), 0) >= SELECTED
    high = tl.max(tl.where(forced, _LEAST, key), 0)
    low = tl.where(enough, tl.max(key, 0), low)
    span = tl.maximum(high.to(tl.int64) - low + 1, 1)
    return find_largest(key, low, span, tl.sum(exists.to(tl.int32), 0), SELECTED)


@triton.jit
def pick(  # noqa: ANN201
    score, current, num_blocks, sink, local, wanted, SELECTED: tl.constexpr, BLOCKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Mark the best blocks; `score` may be anything where there is none.

    As many as are wanted: SELECTED itself, or a number that the device knows, not more than that.
    """
    block = tl.arange(0, BLOCKS)
    exists = (block <= current) & (block < num_blocks)
    forced = (block < sink) | (block >= current - local)
    key = keys_of(score, forced, exists)
    # Every run of blocks has a best one, so as many blocks as there are runs reach the lowest of
    # these: a near bound, where there are runs enough.
    RUN: tl.constexpr = BLOCKS // COLUMNS
    best = tl.max(tl.reshape(key, [COLUMNS, RUN]), 1)
    is_run = tl.arange(0, COLUMNS) * RUN <= current
    low = tl.min(tl.where(is_run, best, _MOST), 0)
    low = tl.where(current + 1 >= SELECTED * RUN, low, _LEAST + 1)
    high = tl.max(tl.where(forced, _LEAST, key), 0)
    span = tl.maximum(high.to(tl.int64) - low + 1, 1)
    if sink + local + 1 >= wanted:
        # No more than the forced ones are wanted, which are the largest.
        low = tl.max(key, 0)
        span = low.to(tl.int64) * 0 + 1
    return find_largest(key, low, span, current + 1, wanted)


@triton.jit
def _assign(
    block_id, page, wanted, column, num_absent, length, current, pair, block_table, page_block,
    page_stamp, page_ids, miss_blocks, miss_pages, tail_page, num_blocks, num_pages,
    SELECTED: tl.constexpr, PAGES: tl.constexpr, TOUCH: tl.constexpr,
):  # fmt: skip
    """Give the absent blocks, one or more, the pages that leave: the i-th takes the i-th victim."""
    number = tl.arange(0, PAGES)
    is_page = number < num_pages
    owned = pair * num_pages + number
    block = tl.load(page_block + owned, mask=is_page, other=-1)
    hit = wanted & (page >= 0)
    absent = wanted & (page < 0)
    rank = pair * SELECTED + tl.cumsum(absent.to(tl.int32), 0) - 1
    # What the other side has to know: which blocks need a page, where their page is written down,
    # and, by a stamp that no step has, which pages are in use now.
    tl.store(miss_blocks + rank, block_id, mask=absent)
    tl.store(miss_pages + rank, column, mask=absent)
    stamped = page_stamp + pair * num_pages + page
    stamp_of_hit = tl.load(stamped, mask=hit, other=0)
    tl.debug_barrier()
    tl.store(stamped, _IN_USE, mask=hit)
    tl.debug_barrier()
    stamp = tl.load(page_stamp + owned, mask=is_page, other=_IN_USE)
    candidate = is_page & (stamp != _IN_USE) & ((block != current) | (block < 0))
    age = tl.where(stamp < 0, 255, tl.minimum(tl.maximum(length - stamp, 0), 254))
    num_candidates = tl.sum(candidate.to(tl.int32), 0)
    key = tl.where(candidate, age, -1)
    victim = find_largest(key, num_absent * 0, 256, num_candidates, num_absent)
    turn = pair * SELECTED + tl.cumsum(victim.to(tl.int32), 0) - 1
    new = tl.load(miss_blocks + turn, mask=victim, other=-1)
    listed = tl.load(miss_pages + turn, mask=victim, other=0)
    tl.store(block_table + pair * num_blocks + block, -1, mask=victim & (block >= 0))
    tl.debug_barrier()
    tl.store(block_table + pair * num_blocks + new, number, mask=victim)
    tl.store(page_block + owned, new, mask=victim)
    tl.store(page_stamp + owned, length, mask=victim)
    tl.store(page_ids + pair * SELECTED + listed, number, mask=victim)
    tl.store(miss_pages + turn, number, mask=victim)
    tl.store(stamped, length if TOUCH else stamp_of_hit, mask=hit)
    tl.store(tail_page + pair + number * 0, number, mask=victim & (new == current))
    tl.debug_barrier()


@triton.jit
def _select_pages(
    scores, lengths, block_ids, block_table, page_block, page_stamp, counters,
    page_ids, is_miss, miss_blocks, miss_pages, tail_page,
    groups, num_blocks, num_pages, sink, local,
    SIZE: tl.constexpr, SELECTED: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
    PAGES: tl.constexpr, SELECT: tl.constexpr, PLAN: tl.constexpr, RESIDENT: tl.constexpr,
    TOUCH: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    length = tl.load(lengths + pair // groups)
    current = length // SIZE
    column = tl.arange(0, COLUMNS)
    inside = column < SELECTED
    listed = pair * SELECTED + column
    if SELECT:
        block = tl.arange(0, BLOCKS)
        exists = (block <= current) & (block < num_blocks)
        score = tl.load(scores + pair * num_blocks + block, mask=exists, other=float("-inf"))
        picked = pick(score, current, num_blocks, sink, local, SELECTED, SELECTED, BLOCKS, COLUMNS)
        rank = tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(block_ids + pair * SELECTED + rank, block, mask=picked)
        num_picked = tl.minimum(current + 1, SELECTED)
        tl.store(block_ids + listed, -1, mask=inside & (column >= num_picked))
        tl.debug_barrier()
    if PLAN:
        table = block_table + pair * num_blocks
        block_id = tl.load(block_ids + listed, mask=inside, other=-1)
        wanted = block_id >= 0
        page = tl.load(table + block_id, mask=wanted, other=-1)
        absent = wanted & (page < 0)
        fetch = absent & (block_id < current)
        # Four counts in one sum: every sum is a round of messages between warps.
        is_current = wanted & (block_id == current)
        both = absent.to(tl.int64) + (fetch.to(tl.int64) << 16) + (wanted.to(tl.int64) << 32)
        counts = tl.sum(both + (is_current.to(tl.int64) << 48), 0)
        num_absent = (counts & 0xFFFF).to(tl.int32)
        num_fetched = ((counts >> 16) & 0xFFFF).to(tl.int32)
        num_wanted = ((counts >> 32) & 0xFFFF).to(tl.int32)
        # Stored once: no barrier is between this and what stores the tail's page.
        tl.store(tail_page + pair, -1, mask=counts >> 48 == 0)
        tl.store(is_miss + listed, fetch.to(tl.int8), mask=inside)
        if RESIDENT:
            # Nothing ever leaves, so blocks and pages are handed out in step: they are the same.
            page = block_id
        tl.store(page_ids + listed, page, mask=inside)
        if RESIDENT:
            tl.debug_barrier()
            tl.store(table + block_id, page, mask=absent)
            tl.store(page_block + pair * num_pages + page, block_id, mask=absent)
            tl.store(page_stamp + pair * num_pages + page, length, mask=wanted & (absent | TOUCH))
            rank = pair * SELECTED + tl.cumsum(fetch.to(tl.int32), 0) - 1
            tl.store(miss_blocks + rank, block_id, mask=fetch)
            tl.store(miss_pages + rank, page, mask=fetch)
        elif num_absent > 0:
            _assign(
                block_id, page, wanted, column, num_absent, length, current, pair, block_table,
                page_block, page_stamp, page_ids, miss_blocks, miss_pages, tail_page, num_blocks,
                num_pages, SELECTED, PAGES, TOUCH,
            )  # fmt: skip
        elif TOUCH:
            # Often so where hints have fetched before: no page leaves.
            tl.store(page_stamp + pair * num_pages + page, length, mask=wanted)
        tl.store(tail_page + pair + column * 0, page, mask=is_current & (page >= 0))
        unused = inside & (column >= num_fetched)
        tl.store(miss_blocks + listed, -1, mask=unused)
        tl.store(miss_pages + listed, -1, mask=unused)
        if HINT:
            tl.atomic_add(counters + _PREFETCHED, num_fetched.to(tl.int64))
        else:
            tl.atomic_add(counters + _HITS, (num_wanted - num_fetched).to(tl.int64))
            tl.atomic_add(counters + _MISSES, num_fetched.to(tl.int64))
            tl.atomic_add(counters + _REPAIRED, num_fetched.to(tl.int64))


def check_num_blocks(num_blocks: int) -> None:
    """Raise UnsupportedInputError if a sequence has more blocks than a program counts."""
    if num_blocks > MOST_BLOCKS:
        raise UnsupportedInputError(
            f"a sequence of up to {num_blocks} KV blocks is too long for selection on a GPU, which "
            f"counts up to {MOST_BLOCKS}; use a larger block_size or a smaller max_tokens."
        )


def _launch(
    scores: Tensor,
    lengths: Tensor,
    ids: Tensor,
    tables: Sequence[Tensor],
    out: Sequence[Tensor],
    choice: Choice,
    *,
    do_select: bool,
    do_plan: bool,
    eviction: str,
    is_hint: bool,
) -> None:
    batch, groups = ids.shape[:2]
    num_blocks = tables[0].shape[-1] if do_plan else scores.shape[-1]
    num_pages = tables[1].shape[-1] if do_plan else 1
    check_num_blocks(num_blocks)
    resident = num_pages == num_blocks
    # 8 was the fastest of 4 to 16 warps on one H200 at 2048 blocks.
    warps = 4 if not do_select or num_blocks <= 1024 else 8 if num_blocks <= 8192 else 16
    launch(_select_pages, (batch * groups,))(
        scores, lengths, ids, *tables, *out, groups, num_blocks, num_pages,
        choice.sink_blocks, choice.local_blocks, choice.block_size, choice.num_selected,
        power_of_two(num_blocks), power_of_two(choice.num_selected),
        1 if resident else power_of_two(num_pages),
        do_select, do_plan, resident, eviction == "lru", is_hint, num_warps=warps,
    )  # fmt: skip


def select(scores_BGN: Tensor, lengths_B: Tensor, ids_BGK: Tensor, choice: Choice) -> None:
    """Pick blocks; see `kernels.select_blocks`. Writes `ids_BGK`."""
    none = [lengths_B] * 4
    _launch(
        scores_BGN, lengths_B, ids_BGK, none, [*none, lengths_B], choice,
        do_select=True, do_plan=False, eviction="lru", is_hint=False,
    )  # fmt: skip


def plan(
    ids_BGK: Tensor,
    lengths_B: Tensor,
    tables: Tables,
    out: Planned,
    block_size: int,
    eviction: str,
    *,
    is_hint: bool,
) -> None:
    """Give pages to given blocks; see `runtime.block_table.plan_pages`."""
    choice = Choice(ids_BGK.shape[-1], block_size, 0, 0)
    _launch(
        lengths_B, lengths_B, ids_BGK, tables, out, choice,
        do_select=False, do_plan=True, eviction=eviction, is_hint=is_hint,
    )  # fmt: skip


def select_and_plan(
    scores_BGN: Tensor,
    lengths_B: Tensor,
    ids_BGK: Tensor,
    tables: Tables,
    out: Planned,
    choice: Choice,
    eviction: str,
    *,
    is_hint: bool,
) -> None:
    """Pick blocks and give them pages in one launch; writes `ids_BGK`, the tables and `out`."""
    _launch(
        scores_BGN, lengths_B, ids_BGK, tables, out, choice,
        do_select=True, do_plan=True, eviction=eviction, is_hint=is_hint,
    )  # fmt: skip
