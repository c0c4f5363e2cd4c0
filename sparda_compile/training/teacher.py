"""The teachers: how the model's own attention spreads over the deployed windows.

`attention`, of all keys:

    khat[j]    = (k[j] + k[j+1]) / 2                                            fine grid, j < T - 1
    t[g, p, j] = sum_{h in g} softmax_j(q_h[p] . khat[j] * scale)               over j <= p
    cell[c]    = max_{S*c - 1 <= j < S*c + S} t[g, p, j]                        S = pool_stride

`query`, of the pooled keys, as selector `infllm2` scores them at that token, which are those of the
windows that are complete before it:

    cell[c]    = sum_{h in g} softmax_c(q_h[p] . pooled_k[c] * scale)         over S*c + size <= p

A cell stands for the deployed pooled key of the same number: W of them, as many as there are
complete windows. Queries come in ranges, and memory is linear in their number times T.

The first teaches where the attention goes, the second what the query would choose, which is less:
but that is what mode `exact` reads, where a block that is not named in advance has to be repaired.

Differs from the paper: a soft cap of the model is applied to the scores, and `scale` is the
model's own where that is not 1 / sqrt(D).

Source: SparDA (arXiv 2606.04511), Forecast training; the released recipe's teacher with windows of
2 keys at stride 1, aligned to the 32/16 grid by a max-pool of 17/16/1. `query` is our own.

Dimensions: B batch, H heads, G groups, R = H / G, T tokens, Q queries of a range, J fine windows,
W pooled windows, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, get_args

import torch
import torch.nn.functional as F

from sparda_compile.errors import ConfigError
from sparda_compile.training.names import Teacher

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Backend",
    "Teacher",
    "aligned_teacher",
    "fine_keys",
    "is_fused",
    "num_windows",
    "plain_teacher",
    "query_teacher",
    "query_weights",
    "scores",
    "visible_windows",
]

Backend = Literal["auto", "plain", "triton"]
# Scores that are held at once, over all heads: 64 Mi of them are 256 MiB of float32.
_TILE_SCORES: Final = 1 << 26


def num_windows(num_tokens: int, pool_size: int, pool_stride: int) -> int:
    """Return W, the complete windows of so many tokens."""
    return max((num_tokens - pool_size) // pool_stride + 1, 0)


def visible_windows(num_tokens: int, queries: range, pool: tuple[int, int]) -> int:
    """Return how many of a sequence's windows can have mass for these queries."""
    return min(num_windows(num_tokens, *pool), (queries.stop - 1) // pool[1] + 2)


def is_fused(backend: Backend, like: Tensor) -> bool:
    """Return whether fused kernels compute on such a tensor.

    Args:
        backend: `triton` or `plain` says it; `auto` is `triton` for half precision on a GPU.
        like: What is computed on.

    Raises:
        ConfigError: If the backend is not known.
    """
    if backend not in get_args(Backend):
        raise ConfigError(
            f"backend={backend!r} is not known; use one of {', '.join(get_args(Backend))}."
        )
    is_half = like.dtype in (torch.float16, torch.bfloat16)
    return backend == "triton" or (backend == "auto" and like.is_cuda and is_half)


def fine_keys(k_BGTD: Tensor) -> Tensor:
    """Return the means of neighbouring keys, [B, G, T - 1, D], in the dtype of the keys."""
    return torch.lerp(k_BGTD[:, :, :-1], k_BGTD[:, :, 1:], 0.5).contiguous()


def scores(query: Tensor, keys: Tensor) -> Tensor:
    """Return query @ keys^T in float32.

    Args:
        query: [B, G, M, D].
        keys: [B, G, J, D], of the same dtype; half precision is multiplied as it is and summed in
            float32.
    """
    transposed = keys.transpose(-1, -2)
    if query.dtype == torch.float32 or not query.is_cuda:
        return query.float() @ transposed.float()
    flat = torch.bmm(query.flatten(0, 1), transposed.flatten(0, 1), out_dtype=torch.float32)
    return flat.view(*query.shape[:2], *flat.shape[1:])


def aligned_teacher(
    query_BHTD: Tensor,
    fine_BGJD: Tensor,
    queries: range,
    pool: tuple[int, int],
    scale: float,
    softcap: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Return the teacher's mass on every deployed window, for a range of queries.

    Args:
        query_BHTD: Queries after rotation.
        fine_BGJD: From `fine_keys`; J = T - 1.
        queries: Positions to compute, step 1.
        pool: Tokens of a deployed window, and between the starts of two.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        backend: `triton` fuses all of it, `plain` is this file; see `is_fused`.

    Returns:
        [B, G, Q, W] float32, not negative, for the first `visible_windows`; the others have no
        mass. Rows are not normalised: a group's heads sum up, and cells are maxima.

    Raises:
        ConfigError: If the backend is not known.
    """
    if is_fused(backend, query_BHTD):
        from sparda_compile.training.teacher_kernel import launch_aligned_teacher

        width = visible_windows(fine_BGJD.shape[2] + 1, queries, pool)
        factors = (scale, softcap)
        return launch_aligned_teacher(query_BHTD, fine_BGJD, queries, pool, factors, width)
    return plain_teacher(query_BHTD, fine_BGJD, queries, pool, scale, softcap)


def plain_teacher(
    query_BHTD: Tensor,
    fine_BGJD: Tensor,
    queries: range,
    pool: tuple[int, int],
    scale: float,
    softcap: float,
) -> Tensor:
    """Do what `aligned_teacher` says in plain PyTorch, in tiles of queries."""
    batch, heads = query_BHTD.shape[:2]
    groups, num_fine = fine_BGJD.shape[1:3]
    width = visible_windows(num_fine + 1, queries, pool)
    per_query = batch * heads * min(num_fine, queries.stop)
    step = max(1, _TILE_SCORES // max(per_query, 1))
    tiles = []
    for start in range(queries.start, queries.stop, step):
        stop = min(start + step, queries.stop)
        visible = min(stop, num_fine)
        query_BGMD = query_BHTD[:, :, start:stop].unflatten(1, (groups, -1)).flatten(2, 3)
        logits = scores(query_BGMD, fine_BGJD[:, :, :visible]) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        logits_BGRQJ = logits.unflatten(2, (heads // groups, -1))
        fine_J = torch.arange(visible, device=logits.device)
        position_Q = torch.arange(start, stop, device=logits.device)
        hidden_QJ = fine_J > position_Q[:, None]
        mass_BGQJ = logits_BGRQJ.masked_fill(hidden_QJ, float("-inf")).softmax(-1).sum(2)
        tiles.append(_align(mass_BGQJ, width, pool[1]))
    return torch.cat(tiles, dim=2)


def _align(mass_BGQJ: Tensor, width: int, stride: int) -> Tensor:
    """Give each cell the largest of its stride's fine windows and of the one before them."""
    num_cells = -(-mass_BGQJ.shape[-1] // stride)
    padded = F.pad(mass_BGQJ, (0, num_cells * stride - mass_BGQJ.shape[-1]))
    cells = padded.unflatten(-1, (num_cells, stride))
    before = F.pad(cells[..., :-1, -1], (1, 0))
    best = torch.maximum(cells.amax(-1), before)
    # The last fine window of a cell also counts for the next one, visible or not.
    best = torch.cat([best, cells[..., -1:, -1]], dim=-1)
    return F.pad(best, (0, max(width - best.shape[-1], 0)))[..., :width]


def query_teacher(
    query_BHTD: Tensor, pooled_BGWD: Tensor, queries: range, pool: tuple[int, int], scale: float
) -> Tensor:
    """Return the weights of pooled keys by the true queries, for a range of them.

    Args:
        query_BHTD: Queries after rotation.
        pooled_BGWD: Pooled keys of the whole sequence, of the same dtype.
        queries: Positions to compute, step 1.
        pool: Tokens of a window, and between the starts of two.
        scale: Factor on q . k.

    Returns:
        [B, G, Q, W] float32, for the first `visible_windows`, as `aligned_teacher` has them.
    """
    batch, heads, num_tokens = query_BHTD.shape[:3]
    width = visible_windows(num_tokens, queries, pool)
    step = max(1, _TILE_SCORES // max(batch * heads * width, 1))
    tiles = []
    for start in range(queries.start, queries.stop, step):
        position_Q = torch.arange(start, min(start + step, queries.stop), device=query_BHTD.device)
        query_BHQD = query_BHTD[:, :, start : start + len(position_Q)]
        tiles.append(query_weights(query_BHQD, pooled_BGWD[:, :, :width], position_Q, pool, scale))
    return torch.cat(tiles, dim=2)


def query_weights(
    query_BHQD: Tensor,
    pooled_BGWD: Tensor,
    position_Q: Tensor,
    pool: tuple[int, int],
    scale: float,
) -> Tensor:
    """Return what selector `infllm2` gives the pooled keys at some positions, [B, G, Q, W] float32.

    Args:
        query_BHQD: The true queries there, after rotation.
        pooled_BGWD: Pooled keys, of the same dtype.
        position_Q: The positions; a window counts if it is complete before one.
        pool: Tokens of a window, and between the starts of two.
        scale: Factor on q . k.
    """
    groups, width = pooled_BGWD.shape[1:3]
    last_W = torch.arange(width, device=position_Q.device) * pool[1] + pool[0]
    absent_QW = last_W > position_Q[:, None]
    query_BGMD = query_BHQD.unflatten(1, (groups, -1)).flatten(2, 3)
    logits = (scores(query_BGMD, pooled_BGWD) * scale).unflatten(2, (-1, len(position_Q)))
    weights: Tensor = logits.masked_fill(absent_QW, float("-inf")).softmax(-1).sum(2)
    # Before the first complete window there is nothing to weigh, and the softmax has no number.
    return weights.masked_fill(absent_QW, 0.0)
