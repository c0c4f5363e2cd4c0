"""Pick the KV blocks of every new token of a prompt: those that a decode step would pick there.

    ids[b, g, t] = select_blocks(score_blocks(query[b, :, t], summary, position[b, t]), ...)

The summary holds the keys of the new tokens already. A token sees of it what lies before its own
position, so how a prompt is cut into calls changes no selection. On CUDA: `gpu/select_tokens.py`
for selectors that it covers; any other's `score` runs there as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.kernels.prefill_attention import token_positions
from sparda_compile.kernels.select_blocks import select_blocks_reference
from sparda_compile.kernels.workspace import select_tokens_bytes
from sparda_compile.selectors import SELECTORS, Geometry

__all__ = ["select_tokens"]

# Numbers of a summary that are read at once, as often as there are tokens.
_MOST_NUMBERS = 1 << 24


@define(
    fake=lambda a: a.query.new_empty(
        (a.query.shape[0], a.summary[0].shape[1], a.query.shape[2], a.num_selected),
        dtype=torch.int32,
    ),
    behind=("update_summary",),
    workspace=select_tokens_bytes,
)
def select_tokens(
    query: Tensor,
    summary: Sequence[Tensor],
    token_mask: Tensor,
    lengths: Tensor,
    num_past: int,
    selector: str,
    scale: float,
    num_blocks: int,
    block_size: int,
    pool_size: int,
    pool_stride: int,
    num_selected: int,
    sink_blocks: int,
    local_blocks: int,
    short_list: int = 0,
) -> Tensor:
    """Score and pick the blocks of each new token.

    Args:
        query: [B, H, T, D] queries, or [B, G, T, D] forecasts.
        summary: The tensors of the selector's summary, with the new keys in them.
        token_mask: [B, T] bool, which tokens are real.
        lengths: [B] int32, tokens before this call.
        num_past: No sequence has more; blocks that nobody can have cost nothing on a GPU.
        selector: Name of the selector.
        scale: Factor on q . k.
        num_blocks: N.
        block_size: P, tokens of one block.
        pool_size: Tokens of one pooled key.
        pool_stride: Tokens between pooled keys.
        num_selected: K, blocks to pick in all.
        sink_blocks: Always-kept first blocks.
        local_blocks: Always-kept blocks before the current one.
        short_list: Blocks that the query picks; for selectors that rank the rest otherwise.

    Returns:
        [B, G, T, K] int32 block ids, ascending, -1 where fewer than K exist and for padding.
    """
    geometry = Geometry(
        num_blocks, block_size, pool_size, pool_stride, short_list, sink_blocks, local_blocks
    )
    position_BT = token_positions(lengths, token_mask, query.shape[2])
    choice = (num_selected, block_size, sink_blocks, local_blocks)
    if query.is_cuda:
        from sparda_compile.kernels.gpu import select_tokens as gpu
        from sparda_compile.kernels.gpu.select import Choice

        if gpu.covers(selector, query, summary[0].shape[1], geometry):
            asked = (selector, scale, geometry, Choice(*choice))
            return gpu.select_tokens(query, summary, position_BT.int(), *asked, num_past)
    ids = _all_blocks(position_BT // block_size, summary[0].shape[1], num_selected)
    step = max(_MOST_NUMBERS // sum(tensor[0].numel() for tensor in summary), 1)
    for row, position_T in enumerate(position_BT):
        # Earlier tokens have no more blocks than they may read.
        chosen = torch.where(position_T >= num_selected * block_size)[0]
        for columns in chosen.split(step) if len(chosen) else ():
            place = position_T[columns].int()
            scores = SELECTORS[selector].score(
                query[row].transpose(0, 1)[columns].unsqueeze(2),
                [tensor[row].expand(len(columns), *tensor.shape[1:]) for tensor in summary],
                place,
                scale,
                geometry,
            )
            picked = select_blocks_reference(scores, place, *choice)
            ids[row, :, columns] = picked.transpose(0, 1)
    return ids


def _all_blocks(current_BT: Tensor, groups: int, num_selected: int) -> Tensor:
    """Return every block up to a token's own, [B, G, T, K] int32; -1 behind them."""
    block_K = torch.arange(num_selected, device=current_BT.device)
    ids_BTK = block_K.where(block_K <= current_BT[..., None], -1).int()
    return ids_BTK[:, None].repeat(1, groups, 1, 1)
