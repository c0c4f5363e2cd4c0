"""Score every KV block against a query or a Forecast.

    scores[b, g, m] = selector.score(query, summary of block m)              (see `selectors/`)

Reads the summary once: W*D elements per sequence and group for pooled keys. On CUDA a selector
has a Triton kernel in `gpu/score.py`, or its `score` runs there as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.isa.engines import current_engine
from sparda_compile.selectors import SELECTORS, Geometry

__all__ = ["score_blocks", "write_scores"]


def _kernel(selector: str) -> Callable[..., None] | None:
    from sparda_compile.kernels.gpu.score import SCORE_KERNELS

    return SCORE_KERNELS.get(selector)


def _launched(arguments: Mapping[str, Any], batch_size: int) -> tuple[str, ...]:
    del batch_size
    own: tuple[str, ...] = SELECTORS[arguments["selector"]].kernels
    return own


@define(
    fake=lambda a: a.query.new_empty((*a.summary[0].shape[:2], a.num_blocks), dtype=torch.float32),
    kernels=[name for selector in SELECTORS for name in selector.kernels],
    launched=_launched,
    before=("update_summary",),  # the new token's block is selected whatever its score
)
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
    short_list: int = 0,
    sink_blocks: int = 0,
    local_blocks: int = 0,
) -> Tensor:
    """Score the blocks of one layer.

    Args:
        query: [B, H, 1, D] queries, or [B, G*F, 1, D] forecasts.
        summary: The tensors of the selector's summary.
        lengths: [B] int32, tokens whose keys the summary holds.
        selector: Name of the selector.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: Tokens of one block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        stream: 0 compute, 2 select.
        after: Result of the fork that starts the select stream's work, if this op is first on it.
        short_list: Blocks that the query picks; for selectors that rank the rest otherwise.
        sink_blocks: First blocks, which are not on the short list.
        local_blocks: Blocks before the current one, which are not on the short list either.

    Returns:
        [B, G, N] float32, -inf for a block without a summary.
    """
    del after
    geometry = Geometry(
        num_blocks, block_size, pool_size, pool_stride, short_list, sink_blocks, local_blocks
    )
    batch, groups = summary[0].shape[:2]
    scores = torch.empty(batch, groups, num_blocks, dtype=torch.float32, device=query.device)

    current_engine().submit(
        stream, lambda: write_scores(query, summary, lengths, selector, scale, geometry, scores)
    )
    return scores


def write_scores(
    query: Tensor,
    summary: Sequence[Tensor],
    lengths: Tensor,
    selector: str,
    scale: float,
    geometry: Geometry,
    scores: Tensor,
) -> None:
    """Write what `score_blocks` returns to `scores`, contiguous, on the stream that is current."""
    kernel = _kernel(selector) if query.is_cuda else None
    if kernel is not None:
        kernel(query, summary, lengths, scale, geometry, scores)
    else:
        scores.copy_(SELECTORS[selector].score(query, summary, lengths, scale, geometry))
