"""Mixed scores and what their share is learned from; the reference is `kernels/mixture.py`.

    _mix_scores      a part of a sequence's and group's blocks in each program; all, to standardise
    _learn_mixture   one program for each sequence and group, which sums over all blocks

Floor: 12 bytes read and 4 written a block to mix, 16 read to learn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import as_written, launch, power_of_two
from sparda_compile.kernels.gpu.predict import standardised
from sparda_compile.kernels.gpu.select import check_num_blocks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["learn", "mix"]

# Blocks of one program that needs no mean.
_BLOCKS: Final = 1024
_NEVER = tl.constexpr(float("-inf"))


@triton.jit
def _past(level, trend, calibrated, damping, sequence, place, inside):
    """Return what past steps predict of some blocks, -inf for one that was never scored."""
    if calibrated is not None:
        weights = calibrated + sequence * 3
        damping = tl.where(tl.load(weights) > 0.0, tl.load(weights + 2), damping)
    known = tl.load(level + place, mask=inside, other=_NEVER)
    slope = tl.load(trend + place, mask=inside, other=0.0)
    return known + damping * slope


@triton.jit
def _mix_scores(
    asked, level, trend, mixture, calibrated, mixed, damping, start, groups, num_blocks,
    COMPARABLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    both, own = tl.load(mixture + pair * 2), tl.load(mixture + pair * 2 + 1)
    learned = tl.minimum(tl.maximum(both / tl.where(own > 0.0, own, 1.0), 0.0), 1.0)
    share = tl.where(own > 0.0, learned, start)
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = pair * num_blocks + block
    score = tl.load(asked + place, mask=inside, other=_NEVER)
    scored = score > _NEVER
    if not COMPARABLE:
        score = standardised(score, scored)
    past = _past(level, trend, calibrated, damping, pair // groups, place, inside)
    known = scored & (past > _NEVER)
    sum_of = share * tl.where(known, score, 0.0) + (1.0 - share) * tl.where(known, past, 0.0)
    tl.store(mixed + place, tl.where(known, sum_of, _NEVER), mask=inside)


@triton.jit
def _learn_mixture(
    scores, asked, level, trend, lengths, mixture, calibrated, damping, decay, groups, num_blocks,
    sink, local, SIZE: tl.constexpr, COMPARABLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    current = tl.load(lengths + pair // groups) // SIZE
    block = tl.arange(0, BLOCKS)
    inside = block < num_blocks
    place = pair * num_blocks + block
    right = tl.load(scores + place, mask=inside, other=_NEVER)
    early = tl.load(asked + place, mask=inside, other=_NEVER)
    past = _past(level, trend, calibrated, damping, pair // groups, place, inside)
    has_right, has_early = right > _NEVER, early > _NEVER
    used = has_right & has_early & (past > _NEVER) & (block >= sink) & (block < current - local)
    if not COMPARABLE:
        right, early = standardised(right, has_right), standardised(early, has_early)
    ahead = tl.where(used, early - past, 0.0)
    found = tl.where(used, right - past, 0.0)
    sums = mixture + pair * 2
    tl.store(sums, decay * tl.load(sums) + tl.sum(ahead * found, 0))
    tl.store(sums + 1, decay * tl.load(sums + 1) + tl.sum(ahead * ahead, 0))


def _warps(blocks: int) -> int:
    return 4 if blocks <= 1024 else 8 if blocks <= 8192 else 16


def mix(
    asked_BGN: Tensor,
    past: tuple[Tensor, Tensor, float, Tensor | None],
    mixture_BG2: Tensor,
    mixed_BGN: Tensor,
    start: float,
    *,
    are_comparable: bool,
) -> None:
    """Mix scores; see `kernels.mixture`. Writes `mixed_BGN`.

    Args:
        asked_BGN: Scores by the early query, float32, contiguous as all are.
        past: Level, trend, damping, and what prompts were calibrated to or None.
        mixture_BG2: What was learned, float32.
        mixed_BGN: float32, written.
        start: Share of the early query where nothing was learned.
        are_comparable: Whether scores of two steps can be compared.
    """
    batch, groups, num_blocks = asked_BGN.shape
    check_num_blocks(num_blocks)
    level, trend, damping, calibrated = past
    blocks = power_of_two(num_blocks)
    if are_comparable:
        blocks = min(blocks, _BLOCKS)
    launch(_mix_scores, (batch * groups, triton.cdiv(num_blocks, blocks)))(
        asked_BGN, level, trend, mixture_BG2, calibrated, mixed_BGN, damping, start, groups,
        num_blocks, are_comparable, blocks, num_warps=_warps(blocks), **as_written(),
    )  # fmt: skip


def learn(
    scores_BGN: Tensor,
    asked_BGN: Tensor,
    past: tuple[Tensor, Tensor, float, Tensor | None],
    lengths_B: Tensor,
    mixture_BG2: Tensor,
    choice: tuple[int, int, int],
    decay: float,
    *,
    are_comparable: bool,
) -> None:
    """Take a step into the sums; see `kernels.mixture`. Updates `mixture_BG2`.

    Args:
        scores_BGN: Of the layer's own selection, float32, contiguous as all are.
        asked_BGN: By the early query, float32.
        past: Level, trend, damping, and what prompts were calibrated to or None.
        lengths_B: Tokens before the step, int32.
        mixture_BG2: Both sums, float32, updated.
        choice: Tokens of a block, sink blocks and local blocks.
        decay: Of both sums, a step.
        are_comparable: Whether scores of two steps can be compared.
    """
    batch, groups, num_blocks = scores_BGN.shape
    check_num_blocks(num_blocks)
    level, trend, damping, calibrated = past
    size, sink, local = choice
    blocks = power_of_two(num_blocks)
    launch(_learn_mixture, (batch * groups,))(
        scores_BGN, asked_BGN, level, trend, lengths_B, mixture_BG2, calibrated, damping, decay,
        groups, num_blocks, sink, local, size, are_comparable, blocks,
        num_warps=_warps(blocks), **as_written(),
    )  # fmt: skip
