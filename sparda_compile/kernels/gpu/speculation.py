"""Attention to predicted blocks, and what is left to do once the selection is known.

    _attend_blocks      the partial of each predicted block             of `partials.py`
    _repair_predicted   where each selected block stands among the predicted; the partials of those
                        that do not, and of the new token's block; the merge, in order

A repair is one launch, since a second one would wait for the first. A program has some columns of a
pair of sequence and KV head: it lists the sources of what is merged, each the place of an early
partial, `_LATE` for a late one, or none; reads the keys of what was missed whole and of values and
partials its columns. The programs of a pair write the same list and the same log-sum-exps, each
for itself: a program reads nothing that another one alone wrote.
Floor: a repair reads 2*P*D elements of each missed block, and K*R*D*4 bytes per sequence and group.
The reference is `kernels/speculation.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.isa.counters import REPAIRED, WASTED
from sparda_compile.kernels.gpu.launch import as_written, launch, power_of_two, rows_of
from sparda_compile.kernels.gpu.partials import (
    WARPS,
    attend_blocks,
    attend_each,
    factors,
    tiles_of,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["attend_predicted", "repair_predicted"]

# Ids that are looked up at once, and ids of the list that they are compared with.
_ENTRIES: Final = 128
_COMPARED: Final = 256
# Of a repair: programs that run at once, columns of one, and elements that it merges at once.
_PROGRAMS: Final = 2 * 132
_FEWEST_COLUMNS: Final = 8
_MERGE_TILE: Final = 16384
_LATE = tl.constexpr(-2)
_REPAIRED = tl.constexpr(REPAIRED)
_WASTED = tl.constexpr(WASTED)


@triton.jit
def _find(wanted, listed, num_listed, RUN: tl.constexpr, COMPARED: tl.constexpr):
    """Return where in a list of ids each of some ids is, -1 for nowhere; -1 is no id.

    A thread compares an id of its own with the whole list: so none waits for another.
    """
    place = tl.full([RUN], -1, dtype=tl.int32)
    for start in tl.range(0, num_listed, COMPARED):
        number = start + tl.arange(0, COMPARED)
        value = tl.load(listed + number, mask=number < num_listed, other=-1)
        same = (value[:, None] == wanted[None, :]) & (value >= 0)[:, None]
        place = tl.maximum(place, tl.max(tl.where(same, number[:, None], -1), axis=0))
    return place


@triton.jit
def _merge_sources(
    out, lse, late_out, late_lse, sources, column, num_sources,
    HEADS: tl.constexpr, HEADS_WIDE: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Return some columns of the merge of a pair's early and late partials, in their order."""
    head = tl.arange(0, HEADS_WIDE)
    is_head = head < HEADS
    dims = column[None, None, :]
    peak = tl.full([HEADS_WIDE], float("-inf"), dtype=tl.float32)
    total = tl.zeros([HEADS_WIDE], dtype=tl.float32)
    acc = tl.zeros([HEADS_WIDE, COLUMNS], dtype=tl.float32)
    for start in tl.range(0, num_sources, TILE, num_stages=1):
        entry = start + tl.arange(0, TILE)
        at = tl.load(sources + entry, mask=entry < num_sources, other=-1)
        is_late = at == _LATE
        # Heads come first: Triton then gives lanes to heads and columns, and each sums its own.
        place = tl.where(is_late, entry, at)[None, :] * HEADS + head[:, None]
        there = (at != -1)[None, :] & is_head[:, None]
        logs = tl.load(
            tl.where(is_late, late_lse, lse)[None, :] + place, mask=there, other=float("-inf")
        )
        values = tl.load(
            (tl.where(is_late, late_out, out)[None, :] + place * DIM)[:, :, None] + dims,
            mask=there[:, :, None] & (dims < DIM),
            other=0.0,
        )
        old_peak = peak
        peak = tl.maximum(old_peak, tl.max(logs, 1))
        safe = tl.where(peak == float("-inf"), 0.0, peak)
        fade = tl.exp(old_peak - safe)
        weight = tl.exp(logs - safe[:, None])
        total = total * fade + tl.sum(weight, 1)
        acc = acc * fade[:, None] + tl.sum(values * weight[:, :, None], 1)
    return acc / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _repair_predicted(
    query, pages, page_ids, block_ids, predicted, lengths, out, lse, late_out, late_lse, source,
    counters, merged, factor, cap, q_row, q_head, groups, num_pages, num_sources, selected, width,
    ENTRIES: tl.constexpr, MOST: tl.constexpr, UNION: tl.constexpr, HEADS_WIDE: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    TOKENS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    wide_pair = pair.to(tl.int64)
    length = tl.load(lengths + pair // groups)
    current = length // SIZE
    chosen, guessed = block_ids + wide_pair * selected, predicted + wide_pair * width
    sources = source + wide_pair * num_sources
    columns = tl.arange(0, DIMS) // COLUMNS == part
    num_late, num_wasted = 0, 0
    for start in tl.range(0, selected, ENTRIES, num_stages=1):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < selected
        block = tl.load(chosen + entry, mask=inside, other=-1)
        page = tl.load(page_ids + wide_pair * selected + entry, mask=inside, other=0)
        place = _find(block, guessed, width, ENTRIES, MOST)
        place = tl.where(block < current, place, -1)
        missed = (block >= 0) & (place < 0)
        tl.store(sources + entry, tl.where(missed, _LATE, place), mask=inside)
        num_late += tl.sum(missed.to(tl.int32), 0)
        num_wasted -= tl.sum((place >= 0).to(tl.int32), 0)
        attend_each(
            query, pages, block, tl.maximum(page, 0), entry, missed, length, late_out, late_lse,
            factor, cap, q_row, q_head, pair, groups, num_pages, selected, HEADS, ROWS, SIZE, ROOM,
            TOKENS, DIM, DIMS, SOFTCAP, STAGES, INTERPRETED, columns,
        )  # fmt: skip
    if UNION or part == 0:
        for first in tl.range(0, width, ENTRIES, num_stages=1):
            number = first + tl.arange(0, ENTRIES)
            guess = tl.load(guessed + number, mask=number < width, other=-1)
            is_early = (guess >= 0) & (guess < current)
            num_wasted += tl.sum(is_early.to(tl.int32), 0)
            if UNION:
                wasted = is_early & (_find(guess, chosen, selected, ENTRIES, MOST) < 0)
                at = sources + selected + number
                tl.store(at, tl.where(wasted, number, -1), mask=number < width)
    if part == 0:
        tl.atomic_add(counters + _REPAIRED, num_late)
        tl.atomic_add(counters + _WASTED, num_wasted)
    # Sources and late partials were written by other threads of this program.
    tl.debug_barrier()
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    early_row, late_row = wide_pair * width * HEADS, wide_pair * selected * HEADS
    result = _merge_sources(
        out + early_row * DIM, lse + early_row, late_out + late_row * DIM, late_lse + late_row,
        sources, column, num_sources, HEADS, HEADS_WIDE, DIM, COLUMNS, TILE,
    )  # fmt: skip
    head = tl.arange(0, HEADS_WIDE)
    tl.store(
        merged + (wide_pair * HEADS + head[:, None]) * DIM + column[None, :],
        result.to(merged.dtype.element_ty),
        mask=(head < HEADS)[:, None] & (column < DIM)[None, :],
    )


def columns_of(num_pairs: int, dim: int) -> int:
    """Return how many columns a program of a repair merges: few, until all run at once.

    Args:
        num_pairs: Sequences times KV heads.
        dim: D.
    """
    columns = power_of_two(dim)
    while columns > _FEWEST_COLUMNS and 2 * num_pairs * triton.cdiv(dim, columns) <= _PROGRAMS:
        columns //= 2
    return columns


def attend_predicted(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    predicted: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    results: tuple[Tensor, Tensor],
) -> None:
    """Attend to each predicted block; see `kernels.speculation`. Writes `results`.

    Where there is no block, the log-sum-exp is -inf and the output is left as it is.
    """
    attend_blocks(
        query, pages, block_table, predicted, lengths, scale, softcap, results, early=True
    )


def repair_predicted(
    query: Tensor,
    pages: Tensor,
    chosen: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    partials: tuple[Tensor, Tensor],
    counters: Tensor,
    scaling: tuple[float, float],
    *,
    union: bool,
) -> Tensor:
    """Attend to what was missed, and merge; see `kernels.speculation`.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D].
        chosen: Pages and ids of the selected blocks, [B, G, K] int32, and the predicted ids,
            [B, G, W] int32.
        lengths: [B] int32, position of the new token.
        partials: [B, G, W, R, D] and [B, G, W, R] fp32; of a block that counts as not predicted
            neither is read.
        counters: int64, updated.
        scaling: Factor on q . k, and soft cap.
        union: Whether predicted blocks that were not selected count too, behind the selected ones.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    page_ids, block_ids, predicted = chosen
    (batch, groups, selected), width = block_ids.shape, predicted.shape[-1]
    num_pages, dim = pages.shape[2], pages.shape[5]
    rows, q_row, q_head = rows_of(query)
    heads, pairs = rows.shape[1] // groups, batch * groups
    num_sources = selected + width if union else selected
    late_out = rows.new_empty((pairs, selected, heads, dim), dtype=torch.float32)
    late_lse = rows.new_empty((pairs, selected, heads), dtype=torch.float32)
    source = block_ids.new_empty((pairs, num_sources))
    merged = rows.new_empty((batch, groups * heads, 1, dim))
    columns, wide = columns_of(pairs, dim), power_of_two(heads)
    tile = min(power_of_two(num_sources), max(_MERGE_TILE // (columns * wide), 1))
    most = min(power_of_two(max(width, selected if union else 0)), _COMPARED)
    launch(_repair_predicted, (pairs, triton.cdiv(dim, columns)))(
        rows, pages, page_ids, block_ids, predicted, lengths, *partials, late_out, late_lse, source,
        counters, merged, *factors(*scaling), q_row, q_head, groups, num_pages, num_sources,
        selected, width, min(power_of_two(selected), _ENTRIES), most, union, wide, columns, tile,
        *tiles_of(pages, heads, scaling[1]), num_warps=WARPS, **as_written(),
    )  # fmt: skip
    return merged
