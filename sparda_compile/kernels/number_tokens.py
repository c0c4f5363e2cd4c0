"""Number the new tokens of a prompt, once for all its layers.

    positions[b, t] = lengths[b] + real tokens of sequence b before column t,  -1 for padding
    columns[b]      = columns of the real tokens, by position; then the others
    totals[b]       = lengths[b] + real tokens of sequence b

On CUDA: `gpu/extend.py`. Reads one byte a token, and writes eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparda_compile.isa.define import define
from sparda_compile.kernels.prefill_attention import real_columns, token_positions

__all__ = ["number_tokens"]


@define(
    fake=lambda a: (
        *(a.lengths.new_empty(a.token_mask.shape) for _ in range(2)),
        torch.empty_like(a.lengths),
    ),
    results=("positions", "columns", "totals"),
)
def number_tokens(token_mask: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count the new tokens of each sequence.

    Args:
        token_mask: [B, T] bool, which tokens are real.
        lengths: [B] int32, tokens before this call.

    Returns:
        Positions [B, T] int32, -1 for padding; columns [B, T] int32, those of real tokens by
        position and then the others; and totals [B] int32, tokens behind this call.
    """
    if token_mask.is_cuda:
        from sparda_compile.kernels.gpu.extend import number_tokens as launch_number_tokens

        numbered = launch_number_tokens(token_mask, lengths)
        return numbered.positions, numbered.columns, numbered.totals
    positions = token_positions(lengths, token_mask, token_mask.shape[1]).int()
    columns = real_columns(token_mask).int()
    return positions, columns, lengths + token_mask.sum(1, dtype=torch.int32)
