"""Attention that begins before the blocks are known: predict, attend, repair.

    predict_ahead       the blocks that the next step will read, as far as past scores tell
    attend_predicted    one partial result for each predicted block, beside selection
    repair_predicted    the selected blocks that were not predicted, then the merge

    partial   :  o_b, lse_b = softmax(q K_b^T * scale) V_b               fp32, of one block
    merge     :  lse = logsumexp_b lse_b ;  o = sum_b exp(lse_b - lse) o_b

A block's partial is the same whether it was predicted or repaired, and partials are merged in the
order of the selected blocks: so what a step returns does not depend on the prediction, and a block
that was predicted and is not selected leaves nothing behind. `union` merges those too, as the paper
does; its result is attention over more blocks than were selected.

The block that the new token is written to is never attended early: it is not complete.

Source: PRR (arXiv 2606.30389) sections 4.1 and 4.3, equations 6 to 8. Differs from the paper, which
keeps one partial for all predicted blocks, and so what it should not have read. On CUDA:
`gpu/speculation.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparda_compile.isa.counters import REPAIRED, WASTED
from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine, submit_into
from sparda_compile.isa.streams import COMPUTE
from sparda_compile.isa.table import Part, Work
from sparda_compile.kernels.paged import block_pool, stored_or_none
from sparda_compile.kernels.partials import block_partials, merge
from sparda_compile.kernels.predict_blocks import calibrated_or, predict_blocks_reference

__all__ = ["attend_predicted", "find_predicted", "predict_ahead", "repair_predicted"]


def find_predicted(
    block_ids_BGK: Tensor, predicted_BGW: Tensor, lengths_B: Tensor, block_size: int
) -> Tensor:
    """Return [B, G, K] int64: where each selected block stands among the predicted, -1 if nowhere.

    Args:
        block_ids_BGK: Selected blocks, -1 for none.
        predicted_BGW: Predicted blocks, ascending, then -1.
        lengths_B: Position of the new token; its block counts as not predicted.
        block_size: P.
    """
    current_B111 = (lengths_B.long() // block_size)[:, None, None, None]
    same = block_ids_BGK[..., None] == predicted_BGW[..., None, :]
    same &= (block_ids_BGK[..., None] >= 0) & (block_ids_BGK[..., None] < current_B111)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


@define(mutates=("predicted",), kernels=("_predict_blocks",), is_for_later=True)
def predict_ahead(
    level: Tensor,
    trend: Tensor,
    lengths: Tensor,
    budget: Tensor,
    predicted: Tensor,
    num_new: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    damping: float,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    calibrated: Tensor | None = None,
) -> None:
    """Predict the blocks of the next step, for `attend_predicted` to begin with.

    Args:
        level: [B, G, N] float32, -inf for a block that was never scored.
        trend: [B, G, N] float32.
        lengths: [B] int32, tokens before this call.
        budget: [1] int32, most blocks to predict in all; it may change from step to step. Sink,
            local and current blocks come first: with less room than they need, the first of them
            alone are predicted; with 0, none.
        predicted: [B, G, W] int32, written: ids, ascending, then -1; W is the largest budget.
        num_new: Tokens of this call: the next step has `num_new` more before it.
        block_size: P.
        sink_blocks: Always-read first blocks.
        local_blocks: Always-read blocks before the current one.
        damping: Factor on the trend, 0 to 1.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        calibrated: As for `predict_blocks`.
    """
    del after

    def work() -> None:
        before = lengths + num_new
        choice = (predicted.shape[-1], block_size, sink_blocks, local_blocks)
        if level.is_cuda:
            from sparda_compile.kernels.gpu.predict import predict
            from sparda_compile.kernels.gpu.select import Choice

            of = Choice(*choice)
            predict(level, trend, before, predicted, of, damping, budget, calibrated=calibrated)
            return
        width = min(max(int(budget), 0), choice[0])
        factor = calibrated_or((0.0, 0.0, damping), calibrated)[2]
        ids = predict_blocks_reference(level, trend, before, (width, *choice[1:]), factor)
        predicted.fill_(-1)
        predicted[..., :width] = ids

    current_engine().submit(stream, work)


def _empty_partials(query: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*predicted.shape, query.shape[1] // predicted.shape[1])
    lse = query.new_empty(shape, dtype=torch.float32)
    return query.new_empty((*shape, query.shape[-1]), dtype=torch.float32), lse


@define(
    fake=lambda a: _empty_partials(a.query, a.predicted),
    results=("partial_out", "partial_lse"),
    work=Work.PREDICTED,
    kernels=("_attend_blocks",),
    parts=tuple(Part(name, "past", by="lengths") for name in ("pages", "tail", "block_table")),
    before=("predict_ahead",),  # else it read with the next step's prediction
)
def attend_predicted(
    query: Tensor,
    pages: Tensor,
    block_table: Tensor,
    predicted: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
    stream: int = COMPUTE,
    after: Tensor | None = None,
    tail: Tensor | None = None,
    kv_format: str = "model",
) -> tuple[Tensor, Tensor]:
    """Attend to each predicted block alone, before the selection is known.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D], with every block of the cache; or stored runs, see `paged.py`.
        block_table: [B, G, N] int32, page of each block.
        predicted: [B, G, W] int32, ascending, then -1.
        lengths: [B] int32, position of the new token; its block is left out.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        stream: 0 compute, 3 attend.
        after: Result of the fork that starts the side stream's work, if this op is first on it.
        tail: [B, G, 2, 2, P, D] beside stored runs; it is not read, for no tail is attended early.
        kv_format: Beside stored runs, how they are written.

    Returns:
        Partial outputs [B, G, W, R, D] fp32 and their log-sum-exps [B, G, W, R] fp32. Where there
        is no block, the log-sum-exp is -inf, and what the output holds means nothing.
    """
    del after
    out, lse = _empty_partials(query, predicted)
    stored = stored_or_none(tail, kv_format)

    def work() -> tuple[Tensor, Tensor]:
        current_B11 = (lengths // block_pool(pages, tail).shape[4])[:, None, None]
        blocks = predicted.masked_fill(predicted >= current_B11, -1)
        page_ids = block_table.gather(-1, blocks.clamp(min=0).long())
        return block_partials(query, pages, page_ids, blocks, lengths, scale, softcap, stored)

    if query.is_cuda:
        from sparda_compile.kernels.gpu import speculation

        operands = (query, pages, block_table, predicted, lengths, scale, softcap, (out, lse))
        current_engine().submit(stream, lambda: speculation.attend_predicted(*operands, stored))
    else:
        submit_into(stream, (out, lse), work)
    return out, lse


def _late_bytes(a: Any) -> int:
    """Return the bytes of the partials of what is repaired, and of the list of all sources."""
    late = math.prod(a.block_ids.shape) * (a.query.shape[1] // a.block_ids.shape[1])
    sources = math.prod(a.block_ids.shape) + (math.prod(a.predicted.shape) if a.union else 0)
    return int(4 * (late * (a.query.shape[3] + 1) + sources))


@define(
    mutates=("counters",),
    fake=lambda a: torch.empty_like(a.query, memory_format=torch.contiguous_format),
    work=Work.REPAIRED,
    kernels=("_repair_predicted", "_merge_predicted"),
    behind=("append_kv",),
    workspace=_late_bytes,
)
def repair_predicted(
    query: Tensor,
    pages: Tensor,
    page_ids: Tensor,
    block_ids: Tensor,
    predicted: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse: Tensor,
    counters: Tensor,
    scale: float,
    softcap: float,
    union: bool,
    tail: Tensor | None = None,
    kv_format: str = "model",
) -> Tensor:
    """Attend to the selected blocks that were not predicted, and merge all that were selected.

    Args:
        query: [B, H, 1, D].
        pages: [B, G, C, 2, P, D]; or stored runs, see `paged.py`.
        page_ids: [B, G, K] int32, page of each selected block.
        block_ids: [B, G, K] int32, selected blocks, ascending, then -1.
        predicted: [B, G, W] int32, what `attend_predicted` took.
        lengths: [B] int32, position of the new token.
        partial_out: [B, G, W, R, D] fp32, from `attend_predicted`.
        partial_lse: [B, G, W, R] fp32.
        counters: int64, updated: blocks repaired, and blocks predicted in vain.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        union: Whether predicted blocks that were not selected count too.
        tail: [B, G, 2, 2, P, D] beside stored runs, the block that is being written.
        kv_format: Beside stored runs, how they are written.

    Returns:
        [B, H, 1, D] in the query's dtype.
    """
    scaling, stored = (scale, softcap), stored_or_none(tail, kv_format)
    if query.is_cuda:
        from sparda_compile.kernels.gpu import speculation

        chosen = (page_ids, block_ids, predicted)
        partials = (partial_out, partial_lse)
        return speculation.repair_predicted(
            query, pages, chosen, lengths, partials, counters, scaling, stored, union=union
        )
    size = block_pool(pages, tail).shape[4]
    place = find_predicted(block_ids, predicted, lengths, size)
    is_hit = place >= 0
    missed = block_ids.masked_fill(is_hit, -1)
    ids = (page_ids, missed)
    late_out, late_lse = block_partials(query, pages, *ids, lengths, *scaling, stored)
    at = place.clamp(min=0)[..., None].expand(*late_lse.shape)
    early_lse = partial_lse.gather(2, at)
    early_out = partial_out.gather(2, at[..., None].expand(*late_out.shape))
    out = torch.where(is_hit[..., None, None], early_out, late_out)
    lse = torch.where(is_hit[..., None], early_lse, late_lse)
    is_early = (predicted >= 0) & (predicted < (lengths // size)[:, None, None])
    used = (predicted[..., None] == block_ids[..., None, :]).any(-1) & is_early
    counters[REPAIRED] += (missed >= 0).sum()
    counters[WASTED] += (is_early & ~used).sum()
    if union:
        wasted_lse = partial_lse.masked_fill(used[..., None], float("-inf"))
        out, lse = torch.cat([out, partial_out], 2), torch.cat([lse, wasted_lse], 2)
    merged, _ = merge(out, lse)
    result: Tensor = merged.flatten(1, 2)[:, :, None].to(query.dtype)
    return result
