"""Score every KV block against a query or a Forecast.

    scores[b, g, m] = selector.score(query, summary of block m)              (see `selectors/`)

Reads the summary once: W*D elements per sequence and group for pooled keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparda_compile.selectors import SELECTORS, Geometry
from sparda_compile.streams import current_engine

__all__ = ["score_blocks"]


@torch.library.custom_op("sparda::score_blocks", mutates_args=())
def score_blocks(
    query: Tensor,
    summary: Sequence[Tensor],
    lengths: Tensor,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    stream: int = 0,
    after: Tensor | None = None,
) -> Tensor:
    """Score the blocks of one layer.

    Args:
        query: [B, H, 1, D] queries, or [B, G, 1, D] forecasts.
        summary: The tensors of the selector's summary.
        lengths: [B] int32, tokens whose keys the summary holds.
        selector: Name of the selector.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: Tokens of one block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        stream: 0 compute, 1 copy.
        after: Result of the fork that starts the copy stream's work, if this op is first on it.

    Returns:
        [B, G, N] float32, -inf for a block without a summary.
    """
    del after
    geometry = Geometry(num_blocks, block_size, pool_size, pool_stride)
    batch, groups = summary[0].shape[:2]
    scores = torch.empty(batch, groups, num_blocks, dtype=torch.float32, device=query.device)

    def work() -> None:
        scores.copy_(SELECTORS[selector].score(query, summary, lengths, scale, geometry))

    current_engine().submit(stream, work)
    return scores


@score_blocks.register_fake
def _(
    query: Tensor,
    summary: Sequence[Tensor],
    lengths: Tensor,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    stream: int = 0,
    after: Tensor | None = None,
) -> Tensor:
    batch, groups = summary[0].shape[:2]
    return query.new_empty(batch, groups, num_blocks, dtype=torch.float32)
