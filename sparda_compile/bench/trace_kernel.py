"""A trace followed on the GPU: one launch behind the scores of a selector."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.early import await_last, launch_early
from sparda_compile.kernels.gpu.launch import interpreting, launch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["raise_scores"]


@triton.jit
def _raise_scores(
    trace, lengths, scores, best, groups, num_steps, num_blocks,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    step = tl.load(lengths + pair // groups) % num_steps
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    place = (pair.to(tl.int64) * num_steps + step) * num_blocks + block
    named = tl.load(trace + place, mask=block < num_blocks, other=0) != 0
    rows = tl.zeros([BLOCKS], dtype=tl.float32) + best
    # What is read above was there before the scores were begun.
    await_last(INTERPRETED)
    tl.store(scores + pair * num_blocks + block, rows, mask=named)


def raise_scores(trace_BGSN: Tensor, lengths_B: Tensor, scores_BGN: Tensor, best: float) -> None:
    """Set the scores that a trace names for the present step; see `bench.trace`."""
    batch, groups, num_steps, num_blocks = trace_BGSN.shape
    launch(_raise_scores, (batch * groups, triton.cdiv(num_blocks, 1024)))(
        trace_BGSN.view(torch.int8), lengths_B, scores_BGN, best, groups, num_steps, num_blocks,
        1024, interpreting(), num_warps=4, **launch_early(),
    )  # fmt: skip
