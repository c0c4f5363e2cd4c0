"""Attention to predicted blocks, and what is left to do once the selection is known.

    _attend_blocks      the partial of each predicted block             of `partials.py`
    _repair_predicted   where each selected block stands among the predicted; the partials of those
                        that do not, and of the new token's block
    _merge_predicted    the partials of the selected blocks, in their order

A repair writes a list of sources: the place of an early partial, `_LATE` for its own, or none. Most
of its programs find that all is there, and leave. The merge is launched before the repair ends, and
is split by query head and by columns, each of which sums the same partials in the same order.
Floor: a repair reads 2*P*D elements of each missed block, a merge K*R*D*4 bytes per sequence and
group. The reference is `kernels/speculation.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from sparda_compile.isa.counters import REPAIRED, WASTED
from sparda_compile.kernels.gpu.attention import score_factors
from sparda_compile.kernels.gpu.early import await_last, begin_next, launch_early
from sparda_compile.kernels.gpu.launch import (
    as_written,
    interpreting,
    launch,
    power_of_two,
    rows_of,
)
from sparda_compile.kernels.gpu.partials import (
    WARPS,
    attend_blocks,
    attend_each,
    merge_tiles,
    run_length,
    tiles_of,
)
from sparda_compile.kernels.gpu.tiles import page_size, pages_of

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.paged import Stored

__all__ = ["attend_predicted", "repair_predicted"]

# Ids of a list that are compared at once.
_COMPARED: Final = 256
_LATE = tl.constexpr(-2)
_REPAIRED = tl.constexpr(REPAIRED)
_WASTED = tl.constexpr(WASTED)


@triton.jit
def _find(wanted, listed, num_listed, RUN: tl.constexpr, COMPARED: tl.constexpr):
    """Return where in a list of ids each of some ids is, -1 for nowhere; -1 is no id."""
    place = tl.full([RUN], -1, dtype=tl.int32)
    for start in tl.range(0, num_listed, COMPARED):
        number = start + tl.arange(0, COMPARED)
        value = tl.load(listed + number, mask=number < num_listed, other=-1)
        same = (wanted[:, None] == value[None, :]) & (value >= 0)[None, :]
        place = tl.maximum(place, tl.max(tl.where(same, number[None, :], -1), axis=1))
    return place


@triton.jit
def _repair_predicted(
    query, pages, tail, page_ids, block_ids, predicted, lengths, late_out, late_lse, source, factor,
    cap, q_row, q_head, groups, num_pages, selected, width, splits,
    EACH: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr, UNION: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    TOKENS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, SOFTCAP: tl.constexpr,
    STAGES: tl.constexpr, INTERPRETED: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    pair, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    current = length // SIZE
    wide_pair = pair.to(tl.int64)
    chosen, guessed = block_ids + wide_pair * selected, predicted + wide_pair * width
    entry = split + tl.arange(0, EACH) * splits
    inside = entry < selected
    block = tl.load(chosen + entry, mask=inside, other=-1)
    place = _find(block, guessed, width, EACH, MOST)
    place = tl.where(block < current, place, -1)
    missed = (block >= 0) & (place < 0)
    sources = source + wide_pair * (selected + width if UNION else selected)
    tl.store(sources + entry, tl.where(missed, _LATE, place), mask=inside)
    if UNION:
        other = split + tl.arange(0, WIDE) * splits
        guess = tl.load(guessed + other, mask=other < width, other=-1)
        used = _find(guess, chosen, selected, WIDE, MOST)
        wasted = (guess >= 0) & (guess < current) & (used < 0)
        tl.store(sources + selected + other, tl.where(wasted, other, -1), mask=other < width)
    page = tl.load(page_ids + wide_pair * selected + entry, mask=missed, other=0)
    attend_each(
        query, pages, tail, block, tl.maximum(page, 0), entry, missed, length, late_out, late_lse,
        factor, cap, q_row, q_head, pair, groups, num_pages, selected, HEADS, ROWS, SIZE, ROOM,
        TOKENS, DIM, DIMS, SOFTCAP, STAGES, INTERPRETED, RUN, BITS, SCALES, CUTS, DECODE,
    )  # fmt: skip
    begin_next(INTERPRETED)


@triton.jit
def _sources(source, entry, pair, head, num_sources, selected, width, HEADS: tl.constexpr):
    """Return which partials of a list are early, which late, and the row of each in its buffer."""
    at = tl.load(source + pair * num_sources + entry, mask=entry < num_sources, other=-1)
    early = (pair * width + at) * HEADS + head
    late = (pair * selected + entry) * HEADS + head
    return at >= 0, at == _LATE, early, late


@triton.jit
def _merge_predicted(
    source, out, lse, late_out, late_lse, predicted, lengths, counters, merged, groups, num_sources,
    selected, width,
    SIZE: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr,
    SOURCES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    counts = (head == 0) & (part == 0)
    num_early = 0
    if counts:
        # Neither is of the kernel that is awaited.
        current = tl.load(lengths + pair // groups) // SIZE
        number = tl.arange(0, WIDTH)
        guess = tl.load(predicted + pair * width + number, mask=number < width, other=-1)
        num_early = tl.sum(((guess >= 0) & (guess < current)).to(tl.int32), 0)
    await_last(INTERPRETED)
    entry = tl.arange(0, SOURCES)
    is_early, is_late, early, late = _sources(
        source, entry, pair, head, num_sources, selected, width, HEADS
    )
    logs = tl.maximum(
        tl.load(lse + early, mask=is_early, other=float("-inf")),
        tl.load(late_lse + late, mask=is_late, other=float("-inf")),
    )
    peak = tl.max(logs, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp(logs - peak), 0)
    dims = part * COLUMNS + tl.arange(0, COLUMNS)
    is_dim = (dims < DIM)[None, :]
    acc = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in tl.range(0, num_sources, TILE):
        of_early, of_late, early_row, late_row = _sources(
            source, start + tl.arange(0, TILE), pair, head, num_sources, selected, width, HEADS
        )
        log = tl.maximum(
            tl.load(lse + early_row, mask=of_early, other=float("-inf")),
            tl.load(late_lse + late_row, mask=of_late, other=float("-inf")),
        )
        early_at = out + early_row[:, None] * DIM + dims[None, :]
        late_at = late_out + late_row[:, None] * DIM + dims[None, :]
        one = tl.load(early_at, mask=of_early[:, None] & is_dim, other=0.0)
        other = tl.load(late_at, mask=of_late[:, None] & is_dim, other=0.0)
        values = tl.where(of_early[:, None], one, other)
        acc += tl.sum(values * tl.exp(log - peak)[:, None], axis=0)
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(
        merged + (pair * HEADS + head) * DIM + dims,
        result.to(merged.dtype.element_ty),
        mask=dims < DIM,
    )
    if counts:
        num_hits = tl.sum((is_early & (entry < selected)).to(tl.int32), 0)
        num_late = tl.sum(is_late.to(tl.int32), 0)
        tl.atomic_add(counters + _REPAIRED, num_late.to(tl.int64))
        tl.atomic_add(counters + _WASTED, (num_early - num_hits).to(tl.int64))


def attend_predicted(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    predicted: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    results: tuple[Tensor, Tensor],
    stored: Stored | None = None,
) -> None:
    """Attend to each predicted block; see `kernels.speculation`. Writes `results`.

    Where there is no block, the log-sum-exp is -inf and the output is left as it is.
    """
    attend_blocks(
        query, pages, block_table, predicted, lengths, scale, softcap, results, stored, early=True
    )


def repair_predicted(
    query: Tensor,
    pages: Tensor,
    chosen: tuple[Tensor, Tensor, Tensor],
    lengths: Tensor,
    partials: tuple[Tensor, Tensor],
    counters: Tensor,
    scaling: tuple[float, float],
    stored: Stored | None = None,
    *,
    union: bool,
) -> Tensor:
    """Attend to what was missed, and merge; see `kernels.speculation`.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D], or stored runs.
        chosen: Pages and ids of the selected blocks, [B, G, K] int32, and the predicted ids,
            [B, G, W] int32.
        lengths: [B] int32, position of the new token.
        partials: [B, G, W, R, D] and [B, G, W, R] fp32; of a block that counts as not predicted
            neither is read.
        counters: int64, updated.
        scaling: Factor on q . k, and soft cap.
        stored: What goes with pages of stored runs.
        union: Whether predicted blocks that were not selected count too, behind the selected ones.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    page_ids, block_ids, predicted = chosen
    (batch, groups, selected), width = block_ids.shape, predicted.shape[-1]
    num_pages, (size, dim) = pages.shape[2], page_size(pages, stored)
    rows, q_row, q_head = rows_of(query)
    heads, pairs = rows.shape[1] // groups, batch * groups
    num_sources = selected + width if union else selected
    late_out = rows.new_empty((pairs, selected, heads, dim), dtype=torch.float32)
    late_lse = rows.new_empty((pairs, selected, heads), dtype=torch.float32)
    source = block_ids.new_empty((pairs, num_sources))
    run = run_length(pairs, selected)
    splits = triton.cdiv(selected, run)
    most = min(power_of_two(max(width, selected if union else 0)), _COMPARED)
    launch(_repair_predicted, (pairs, splits))(
        rows, *pages_of(pages, stored), page_ids, block_ids, predicted, lengths, late_out, late_lse,
        source, *score_factors(*scaling), q_row, q_head, groups, num_pages, selected, width, splits,
        power_of_two(run), power_of_two(triton.cdiv(width, splits)), most, union,
        *tiles_of(pages, heads, scaling[1], stored), num_warps=WARPS, **as_written(),
    )  # fmt: skip
    merged = rows.new_empty((batch, groups * heads, 1, dim))
    columns, padded, tile = merge_tiles(num_sources, dim)
    launch(_merge_predicted, (pairs, heads, triton.cdiv(dim, columns)))(
        source, *partials, late_out, late_lse, predicted, lengths, counters, merged, groups,
        num_sources, selected, width, size, heads, dim, columns, padded, power_of_two(width),
        tile, interpreting(), **launch_early(), **as_written(),
    )  # fmt: skip
    return merged
