"""One layer's loss: how far the Forecast's spread over windows is from the attention's own.

    T[g, p, :] = cell / (sum(cell) + 1e-8)                    a teacher, see `teacher.py`
    S[g, p, :] = softmax_c(f_g[p] . pooled_k[g, c] / sqrt(D))      over c with stride * c <= p
    M[g, p]    = the top_k blocks by max-pooled T that are neither sink nor local nor current
    buckets    = the cells stride-aligned to the blocks of M, and one bucket for all the rest
    loss       = sum_{g, p} KL(buckets of T || buckets of S) / (G * T)              mean over B

Buckets are clamped to at least 1e-8 and normalised again. A query whose blocks are all forced has
one bucket and adds nothing. Teacher, keys and queries are constants; the gradient reaches the
Forecast alone.

Differs from the released recipe: float32 throughout (there the teacher and the student's softmax
are rounded to bfloat16); a cell that no block of M has is left out of the clamp.

Source: SparDA (arXiv 2606.04511), Forecast training; teacher-selected support with a rest bucket.

Dimensions: B batch, H heads, G groups, T tokens, Q queries of a tile, N blocks, W pooled windows,
K selected cells, D head dim.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F

from sparda_compile.selectors import Geometry
from sparda_compile.training.teacher import (
    Backend,
    Teacher,
    aligned_teacher,
    fine_keys,
    num_windows,
    query_teacher,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = [
    "backward_loss",
    "best_blocks",
    "first_supervised",
    "free_blocks",
    "geometry_of",
    "pool_keys",
    "tile_loss",
]

_SMALLEST: Final = 1e-8
# Elements of one [B, G, Q, W] tensor; a dozen of them are alive at once, 64 MiB each.
_TILE_ELEMENTS: Final = 1 << 24


def geometry_of(config: SpardaConfig, num_tokens: int) -> Geometry:
    """Return the block geometry of a sequence."""
    num_blocks = -(-num_tokens // config.block_size)
    return Geometry(num_blocks, config.block_size, config.pool_size, config.pool_stride)


def first_supervised(config: SpardaConfig) -> int:
    """Return the first position that has a block which is neither sink nor local nor current."""
    return config.num_forced * config.block_size


def pool_keys(k_BGTD: Tensor, config: SpardaConfig) -> Tensor:
    """Return the deployed pooled keys of a whole sequence, [B, G, W, D], in the keys' dtype."""
    windows = k_BGTD.float().unfold(2, config.pool_size, config.pool_stride)
    return windows.mean(-1).to(k_BGTD.dtype)


def backward_loss(
    forecast_BGTD: Tensor,
    query_BHTD: Tensor,
    k_BGTD: Tensor,
    config: SpardaConfig,
    scale: float,
    *,
    softcap: float = 0.0,
    weight: float = 1.0,
    last_tokens: int | None = None,
    teacher: Teacher = "attention",
    backend: Backend = "auto",
) -> Tensor:
    """Compute the loss of one layer and send its gradient into the Forecast at once.

    Works in tiles of queries, so that memory is linear in T.

    Args:
        forecast_BGTD: Predicted queries, after rotation; if they need no gradient, only the loss
            is computed.
        query_BHTD: The layer's true queries, after rotation.
        k_BGTD: Its keys, after rotation.
        config: Sizes of blocks and windows; `top_k` is a number.
        scale: Factor on q . k of the model.
        softcap: Soft cap on the scores, 0.0 for none.
        weight: Factor on the gradient, not on what is returned.
        last_tokens: Queries to learn from, at the end of each sequence; None is all. The loss is
            the mean over them.
        teacher: What to learn: `attention` or `query`, see `teacher.py`.
        backend: Of teacher `attention`.

    Returns:
        The loss, a float32 scalar in nats without a graph.
    """
    batch, groups, num_tokens, _ = forecast_BGTD.shape
    query_BHTD, k_BGTD = query_BHTD.detach(), k_BGTD.detach()
    needs_gradient = forecast_BGTD.requires_grad
    pool = (config.pool_size, config.pool_stride)
    pooled_BGWD = pool_keys(k_BGTD, config)
    if teacher == "query":
        target_of = partial(query_teacher, query_BHTD, pooled_BGWD, pool=pool, scale=scale)
    else:
        target_of = partial(
            aligned_teacher,
            query_BHTD,
            fine_keys(k_BGTD),
            pool=pool,
            scale=scale,
            softcap=softcap,
            backend=backend,
        )
    pooled_BGWD = pooled_BGWD.float()
    width = num_windows(num_tokens, *pool)
    step = max(1, _TILE_ELEMENTS // max(batch * groups * width, 1))
    step = min(step, 8192)
    # The fused teacher works in tiles of 128 queries.
    step -= step % 128 if step > 128 else 0
    total = torch.zeros((), dtype=torch.float32, device=k_BGTD.device)
    gradient = torch.zeros_like(forecast_BGTD, dtype=torch.float32) if needs_gradient else None
    counted = min(last_tokens or num_tokens, num_tokens)
    for start in range(max(first_supervised(config), num_tokens - counted), num_tokens, step):
        queries = range(start, min(start + step, num_tokens))
        with torch.no_grad():
            target = target_of(queries)
        leaf = forecast_BGTD[:, :, queries.start : queries.stop].detach().float()
        with torch.set_grad_enabled(needs_gradient):
            leaf.requires_grad_(needs_gradient)
            pooled = pooled_BGWD[:, :, : target.shape[-1]]
            loss = tile_loss(leaf, pooled, target, queries, config) / counted
            if gradient is not None:
                (part,) = torch.autograd.grad(loss, leaf)
                gradient[:, :, queries.start : queries.stop] = part
        total += loss.detach()
    if gradient is not None:
        forecast_BGTD.backward((gradient * weight).to(forecast_BGTD.dtype))
    return total


def tile_loss(
    forecast_BGQD: Tensor,
    pooled_BGWD: Tensor,
    cells_BGQW: Tensor,
    queries: range,
    config: SpardaConfig,
) -> Tensor:
    """Return the divergence of a range of queries, summed, over B * G; a float32 scalar.

    Args:
        forecast_BGQD: Float32 Forecasts of these queries.
        pooled_BGWD: Float32 pooled keys of the windows that `cells_BGQW` has.
        cells_BGQW: The teacher's mass, as `aligned_teacher` and `query_teacher` return it.
        queries: Positions.
        config: Sizes.
    """
    position_Q = torch.arange(queries.start, queries.stop, device=forecast_BGQD.device)
    with torch.no_grad():
        # The order of the cells is that of their shares: only what is picked is normalised.
        sums = cells_BGQW.sum(-1, keepdim=True)
        cell_BGQK, is_cell = _supervised_cells(cells_BGQW, position_Q, config, queries.stop)
        target_BGQK = cells_BGQW.gather(-1, cell_BGQK).where(is_cell, 0.0) / (sums + _SMALLEST)
        target_rest = sums / (sums + _SMALLEST) - target_BGQK.sum(-1, keepdim=True)
        target = _normalised(torch.cat([target_BGQK, target_rest.clamp(min=0.0)], dim=-1), is_cell)
    logits_BGQK, log_total = _CellLogits.apply(  # type: ignore[no-untyped-call]
        forecast_BGQD, pooled_BGWD, cell_BGQK, queries, config.pool_stride
    )
    student_BGQK = (logits_BGQK - log_total).exp().where(is_cell, 0.0)
    student_rest = (1.0 - student_BGQK.sum(-1, keepdim=True)).clamp(min=0.0)
    student = _normalised(torch.cat([student_BGQK, student_rest], dim=-1), is_cell)
    divergence = (target * (target.clamp(min=1e-30).log() - student.clamp(min=1e-30).log())).sum()
    batch, groups = forecast_BGQD.shape[:2]
    return divergence / (batch * groups)


class _CellLogits(torch.autograd.Function):
    """The student's logits of some cells, and the logarithm of its sum over all of them.

    Autograd would go over all [B, G, Q, W] logits a dozen times: here four passes do it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        forecast_BGQD: Tensor,
        pooled_BGWD: Tensor,
        cell_BGQK: Tensor,
        queries: range,
        stride: int,
    ) -> tuple[Tensor, Tensor]:
        """Return [B, G, Q, K] and [B, G, Q, 1]; cells that begin behind their query are out."""
        scaled = forecast_BGQD / math.sqrt(forecast_BGQD.shape[-1])
        logits_BGQW = scaled @ pooled_BGWD.transpose(-1, -2)
        first = min(queries.start // stride + 1, logits_BGQW.shape[-1])
        position_Q1 = torch.arange(queries.start, queries.stop, device=logits_BGQW.device)[:, None]
        starts_W = torch.arange(first, logits_BGQW.shape[-1], device=logits_BGQW.device) * stride
        logits_BGQW[..., first:].masked_fill_(starts_W > position_Q1, float("-inf"))
        log_total = logits_BGQW.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(pooled_BGWD, cell_BGQK, log_total)
        # Overwritten by the backward, so it is kept where autograd does not look after it.
        ctx.logits_BGQW = logits_BGQW
        return logits_BGQW.gather(-1, cell_BGQK), log_total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the Forecast; the graph cannot be gone through twice."""
        pooled_BGWD, cell_BGQK, log_total = ctx.saved_tensors
        of_cells, of_total = gradients
        gradient_BGQW = ctx.logits_BGQW.sub_(log_total).exp_().mul_(of_total)
        del ctx.logits_BGQW
        gradient_BGQW.scatter_add_(-1, cell_BGQK, of_cells)
        dim = pooled_BGWD.shape[-1]
        return gradient_BGQW @ pooled_BGWD / math.sqrt(dim), None, None, None, None


def _supervised_cells(
    cells_BGQW: Tensor, position_Q: Tensor, config: SpardaConfig, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the cells of the blocks that the teacher selects, and which of them there are.

    Both [B, G, Q, K], K = top_k * block_size / pool_stride at most.
    """
    geometry = geometry_of(config, num_tokens)
    blocks_BGQN = _block_peaks(cells_BGQW, geometry)
    free_QN = free_blocks(position_Q, config, geometry.num_blocks)
    assert config.top_k is not None
    count = min(config.top_k, geometry.num_blocks)
    best = best_blocks(blocks_BGQN, free_QN, count)
    picked = free_QN.expand_as(blocks_BGQN).gather(-1, best)
    ratio = config.block_size // config.pool_stride
    offsets = torch.arange(ratio, device=best.device)
    cell = (best[..., None] * ratio + offsets).flatten(-2)
    width = cells_BGQW.shape[-1]
    is_cell = picked[..., None].expand(*picked.shape, ratio).flatten(-2) & (cell < width)
    return cell.clamp(max=width - 1), is_cell


def _block_peaks(cells_BGQW: Tensor, geometry: Geometry) -> Tensor:
    """Do what `windows_to_blocks` does, for values that are not negative, in one pass over them."""
    ratio = geometry.block_size // geometry.pool_stride
    whole = cells_BGQW.shape[-1] // ratio
    parts = [cells_BGQW[..., : whole * ratio].unflatten(-1, (whole, ratio)).amax(-1)]
    if cells_BGQW.shape[-1] % ratio:
        parts.append(cells_BGQW[..., whole * ratio :].amax(-1, keepdim=True))
    peaks_BGQN = torch.cat(parts, dim=-1)
    missing = geometry.num_blocks - peaks_BGQN.shape[-1]
    peaks_BGQN = F.pad(peaks_BGQN, (0, missing)) if missing else peaks_BGQN
    for back in range(1, geometry.pool_size // geometry.pool_stride):
        # The windows that begin `back` strides before a block also reach into it.
        before = cells_BGQW[..., (-back) % ratio :: ratio]
        later = peaks_BGQN[..., -(-back // ratio) :]
        count = min(before.shape[-1], later.shape[-1])
        later[..., :count] = torch.maximum(later[..., :count], before[..., :count])
    return peaks_BGQN


def free_blocks(position_Q: Tensor, config: SpardaConfig, num_blocks: int) -> Tensor:
    """Return [Q, N] bool: the blocks that a query may pick beyond those it always reads."""
    block_N = torch.arange(num_blocks, device=position_Q.device)
    current_Q1 = (position_Q // config.block_size)[:, None]
    return (block_N >= config.sink_blocks) & (block_N < current_Q1 - config.local_blocks)


def best_blocks(scores_BGQN: Tensor, free_QN: Tensor, count: int) -> Tensor:
    """Return the ids of the best free blocks, [B, G, Q, count] int64, others if there are fewer.

    Ties go to the lower id, as in `select_blocks`. They are common: two neighbouring blocks share
    the window that touches both.
    """
    bits = scores_BGQN.float().contiguous().view(torch.int32)
    # Makes the order of the bits, read as integers, that of the floats.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    num_blocks = scores_BGQN.shape[-1]
    later_N = torch.arange(num_blocks, device=bits.device)
    key = (ordered * num_blocks - later_N).masked_fill(~free_QN, torch.iinfo(torch.int64).min)
    return key.topk(count, dim=-1, sorted=False).indices


def _normalised(buckets: Tensor, is_cell: Tensor) -> Tensor:
    """Clamp the buckets that there are and make them sum to one; the others stay zero."""
    clamped = buckets.clamp(min=_SMALLEST)
    exists = torch.cat([is_cell, torch.ones_like(is_cell[..., :1])], dim=-1)
    clamped = clamped.where(exists, 0.0)
    return clamped / clamped.sum(-1, keepdim=True)
