"""Pick the KV blocks that each group attends to: sink + local + current + top-k by score.

    forced[m] = m < sink  or  current - local <= m <= current         current = length // P
    ids       = the K best of (forced: +inf, existing: score, else: never), ascending

Source: SparDA (arXiv 2606.04511) section 3; `reference` constants 1 + 32 + 1 + 62 = 96 blocks.
On CUDA: `gpu/select.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine

__all__ = ["all_blocks", "select_blocks", "select_blocks_reference"]


def select_blocks_reference(
    scores_BGN: Tensor,
    lengths_B: Tensor,
    num_selected: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    among_BGN: Tensor | None = None,
) -> Tensor:
    """Pick blocks; ties go to the lower id. Returns [B, G, K] int32, ascending, then -1.

    Of `among_BGN` alone, bool, where that is given: K of them, or more, exist. A score that is NaN,
    as all of a group are where one of its keys is, counts as none: forced blocks are picked all
    the same.
    """
    num_blocks = scores_BGN.shape[-1]
    block_N = torch.arange(num_blocks, device=scores_BGN.device)
    current_B1 = (lengths_B.long() // block_size)[:, None]
    exists_BN = block_N <= current_B1
    forced_BN = exists_BN & ((block_N < sink_blocks) | (block_N >= current_B1 - local_blocks))
    # An existing block without a summary comes after all scored ones, before those that do not
    # exist.
    lowest = torch.finfo(torch.float32).min
    ranked = scores_BGN.masked_fill(scores_BGN.isnan(), lowest)
    ranked = ranked.masked_fill(forced_BN[:, None], float("inf"))
    exists_BGN = exists_BN[:, None] if among_BGN is None else exists_BN[:, None] & among_BGN
    ranked = ranked.clamp(min=lowest).masked_fill(~exists_BGN, float("-inf"))
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :num_selected]
    picked = exists_BGN.expand_as(ranked).gather(-1, best)
    ids = best.masked_fill(~picked, num_blocks).sort(-1).values
    return ids.masked_fill(ids == num_blocks, -1).int()


@define(
    fake=lambda a: a.scores.new_empty((*a.scores.shape[:2], a.num_selected), dtype=torch.int32),
    kernels=("_select_pages",),
)
def select_blocks(
    scores: Tensor,
    lengths: Tensor,
    num_selected: int,
    block_size: int,
    sink_blocks: int,
    local_blocks: int,
    stream: int = 0,
    after: Tensor | None = None,
) -> Tensor:
    """Pick the KV blocks that each group will attend to.

    Args:
        scores: [B, G, N] float32, higher is better; -inf marks a block without a summary.
        lengths: [B] int32, tokens before this step; the new token is in block length // P.
        num_selected: K, blocks to pick in all.
        block_size: P, tokens of one block.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the current one.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.

    Returns:
        [B, G, K] int32 block ids, ascending, -1 where fewer than K exist.
    """
    del after
    ids = torch.empty(*scores.shape[:2], num_selected, dtype=torch.int32, device=scores.device)

    def work() -> None:
        choice = (num_selected, block_size, sink_blocks, local_blocks)
        if scores.is_cuda:
            from sparda_compile.kernels.gpu.select import Choice, select

            select(scores, lengths, ids, Choice(*choice))
        else:
            ids.copy_(select_blocks_reference(scores, lengths, *choice))

    current_engine().submit(stream, work)
    return ids


@define(fake=lambda a: torch.empty_like(a.block_table))
def all_blocks(block_table: Tensor, lengths: Tensor, block_size: int) -> Tensor:
    """Pick every existing block, for mode `dense`.

    Args:
        block_table: [B, G, N] int32; only its shape is read.
        lengths: [B] int32, tokens before this step.
        block_size: P, tokens of one block.

    Returns:
        [B, G, N] int32 block ids, ascending, then -1.
    """
    block_N = torch.arange(block_table.shape[-1], dtype=torch.int32, device=lengths.device)
    ids_BN = block_N.where(block_N <= (lengths // block_size)[:, None], -1)
    return ids_BN[:, None].expand(block_table.shape).contiguous()
