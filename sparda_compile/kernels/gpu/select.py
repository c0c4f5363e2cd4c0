"""From scores to a miss list in one launch: pick blocks, look them up, give the absent ones pages.

    threshold   the K-th largest key, found by halving over 32 bits; no sort
    ids         blocks above it and, by ascending id, as many at it as fit
    victims     the pages not selected for longest, up to 254 steps; protected ones never
    tables      block -> page, page -> block, stamps; updated in place

One program per sequence and group. Steps of a program talk through global memory, between
barriers; a small tensor is held by several warps at once, so a load and a later store to the same
place need one too. `select_blocks` runs the first half, `plan_pages` the second, `select_pages`
both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import power_of_two

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Choice", "Planned", "Tables", "plan", "select", "select_and_plan"]

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_IN_USE = tl.constexpr(0x7FFFFFFF)
_SIGN = tl.constexpr(-(1 << 31))


class Choice(NamedTuple):
    """What to pick: K blocks of P tokens, which of them always."""

    num_selected: int
    block_size: int
    sink_blocks: int
    local_blocks: int


class Tables(NamedTuple):
    """Where blocks are: [B, G, N], [B, G, C], [B, G, C] int32, and [5] int64 counters."""

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
def _pick(
    scores, block_ids, pair, current, num_blocks, sink, local,
    SELECTED: tl.constexpr, BLOCKS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the ids of the SELECTED best blocks, ascending, then -1."""
    block = tl.arange(0, BLOCKS)
    exists = (block <= current) & (block < num_blocks)
    score = tl.load(scores + pair * num_blocks + block, mask=exists, other=float("-inf"))
    score = tl.where(score == 0.0, 0.0, tl.maximum(score, _LOWEST))
    score = tl.where((block < sink) | (block >= current - local), float("inf"), score)
    # Order-preserving integers: the sign bit of an unsigned key says positive.
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(exists, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), _SIGN)
    # Two bits of the threshold at a time: the largest digit that leaves enough blocks above it.
    # Done as soon as exactly enough are.
    threshold = 0
    found = 0
    shift = 30
    digit = tl.arange(0, 4)
    while (shift >= 0) & (found != SELECTED):
        trial = threshold | (digit << shift)
        count = tl.sum((key[:, None] >= (trial ^ _SIGN)[None, :]).to(tl.int32), 0)
        enough = count >= SELECTED
        threshold |= tl.max(tl.where(enough, digit, 0), 0) << shift
        found = tl.min(tl.where(enough, count, 0x7FFFFFFF), 0)
        shift -= 2
    cut = threshold ^ _SIGN
    above = exists & (key > cut)
    tie = exists & (key == cut)
    free = SELECTED - tl.sum(above.to(tl.int32), 0)
    picked = above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= free))
    place = tl.cumsum(picked.to(tl.int32), 0) - 1
    tl.store(block_ids + pair * SELECTED + place, block, mask=picked)
    column = tl.arange(0, COLUMNS)
    missing = (column >= tl.sum(picked.to(tl.int32), 0)) & (column < SELECTED)
    tl.store(block_ids + pair * SELECTED + column, -1, mask=missing)


@triton.jit
def _leaving(key, candidate, wanted, DIGITS: tl.constexpr):
    """Mark the `wanted` candidates with the lowest 8-bit keys; ties by position."""
    digit = tl.arange(0, DIGITS)
    high, low = key >> 4, key & 15
    upto = candidate[:, None] & (high[:, None] <= digit[None, :])
    first = tl.sum((tl.sum(upto.to(tl.int32), 0) < wanted).to(tl.int32), 0)
    below = candidate & (high < first)
    rest = wanted - tl.sum(below.to(tl.int32), 0)
    same = candidate & (high == first)
    upto = same[:, None] & (low[:, None] <= digit[None, :])
    second = tl.sum((tl.sum(upto.to(tl.int32), 0) < rest).to(tl.int32), 0)
    below = below | (same & (low < second))
    tie = same & (low == second)
    rest = wanted - tl.sum(below.to(tl.int32), 0)
    return below | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= rest))


@triton.jit
def _assign(
    block_id, page, wanted, length, current, pair, block_table, page_block, page_stamp,
    miss_blocks, miss_pages, num_blocks, num_pages,
    SELECTED: tl.constexpr, PAGES: tl.constexpr, TOUCH: tl.constexpr,
):  # fmt: skip
    """Give the absent blocks the pages that leave; the i-th absent takes the i-th victim."""
    hit = wanted & (page >= 0)
    absent = wanted & (page < 0)
    num_absent = tl.sum(absent.to(tl.int32), 0)
    rank = tl.cumsum(absent.to(tl.int32), 0) - 1
    tl.store(miss_blocks + pair * SELECTED + rank, block_id, mask=absent)
    # A stamp that no step has says to the other side that the page is in use now.
    stamp_of_hit = tl.load(page_stamp + pair * num_pages + page, mask=hit, other=0)
    tl.debug_barrier()
    tl.store(page_stamp + pair * num_pages + page, _IN_USE, mask=hit)
    number = tl.arange(0, PAGES)
    is_page = number < num_pages
    owned = pair * num_pages + number
    block = tl.load(page_block + owned, mask=is_page, other=-1)
    tl.debug_barrier()
    stamp = tl.load(page_stamp + owned, mask=is_page, other=_IN_USE)
    candidate = is_page & (stamp != _IN_USE) & ((block != current) | (block < 0))
    key = tl.where(stamp < 0, 0, 255 - tl.minimum(tl.maximum(length - stamp, 0), 254))
    victim = _leaving(key, candidate, num_absent, 16)
    turn = tl.cumsum(victim.to(tl.int32), 0) - 1
    new = tl.load(miss_blocks + pair * SELECTED + turn, mask=victim, other=0)
    tl.store(block_table + pair * num_blocks + block, -1, mask=victim & (block >= 0))
    tl.store(block_table + pair * num_blocks + new, number, mask=victim)
    tl.store(page_block + owned, new, mask=victim)
    tl.store(page_stamp + owned, length, mask=victim)
    tl.store(miss_pages + pair * SELECTED + turn, number, mask=victim)
    tl.debug_barrier()
    taken = tl.load(miss_pages + pair * SELECTED + rank, mask=absent, other=-1)
    renewed = length if TOUCH else stamp_of_hit
    tl.store(page_stamp + pair * num_pages + page, renewed, mask=hit)
    tl.debug_barrier()
    return tl.where(absent, taken, page)


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
    if SELECT:
        _pick(scores, block_ids, pair, current, num_blocks, sink, local, SELECTED, BLOCKS, COLUMNS)
    if PLAN:
        if SELECT:
            tl.debug_barrier()
        column = tl.arange(0, COLUMNS)
        inside = column < SELECTED
        listed = pair * SELECTED + column
        block_id = tl.load(block_ids + listed, mask=inside, other=-1)
        wanted = block_id >= 0
        page = tl.load(block_table + pair * num_blocks + block_id, mask=wanted, other=-1)
        absent = wanted & (page < 0)
        if RESIDENT:
            # Nothing ever leaves, so blocks and pages are handed out in step: they are the same.
            page = tl.where(absent, block_id, page)
            tl.debug_barrier()
            tl.store(block_table + pair * num_blocks + block_id, page, mask=absent)
            tl.store(page_block + pair * num_pages + page, block_id, mask=absent)
            tl.store(page_stamp + pair * num_pages + page, length, mask=wanted & (absent | TOUCH))
        else:
            page = _assign(
                block_id, page, wanted, length, current, pair, block_table, page_block, page_stamp,
                miss_blocks, miss_pages, num_blocks, num_pages, SELECTED, PAGES, TOUCH,
            )  # fmt: skip
        fetch = absent & (block_id < current)
        num_fetched = tl.sum(fetch.to(tl.int32), 0)
        if RESIDENT:
            place = tl.cumsum(fetch.to(tl.int32), 0) - 1
            tl.store(miss_blocks + pair * SELECTED + place, block_id, mask=fetch)
            tl.store(miss_pages + pair * SELECTED + place, page, mask=fetch)
        unused = inside & (column >= num_fetched)
        tl.store(miss_blocks + listed, -1, mask=unused)
        tl.store(miss_pages + listed, -1, mask=unused)
        tl.store(page_ids + listed, page, mask=inside)
        tl.store(is_miss + listed, fetch.to(tl.int8), mask=inside)
        tail = tl.max(tl.where(wanted & (block_id == current), page, -1), 0)
        tl.store(tail_page + pair, tail)
        if HINT:
            tl.atomic_add(counters + 2, num_fetched.to(tl.int64))
        else:
            num_hits = tl.sum((wanted & ~fetch).to(tl.int32), 0)
            tl.atomic_add(counters, num_hits.to(tl.int64))
            tl.atomic_add(counters + 1, num_fetched.to(tl.int64))
            tl.atomic_add(counters + 3, num_fetched.to(tl.int64))


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
    resident = num_pages == num_blocks
    warps = 8 if do_select and num_blocks > 1024 else 4
    _select_pages[(batch * groups,)](
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
