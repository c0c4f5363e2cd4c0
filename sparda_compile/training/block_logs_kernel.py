"""Scores of whole blocks of keys as one Triton kernel: their log-sum-exps, and nothing else.

    log[h, p, n] = log2 sum_{t in n, t <= p} 2^(q_h[p] . k[t] * scale * log2(e))
    lse[h, p]    = log2 sum_n 2^log[h, p, n]                                   of counted blocks

A block counts for the query at p if its number is from `first` to p // P - `behind`: all blocks
that p sees have first = behind = 0, the full ones before it behind = 1, those that are free the
number of sink blocks and that of local ones plus one. Only they are multiplied.

Scores stay in registers. What is written has queries as its last dimension, so that each program
writes whole lines. FLOPs: 2 * D * B * H * (counted pairs). Limit: head_dim up to 256.

Dimensions: B batch, H heads, G groups, R = H / G, T tokens, Q queries of a range, N blocks, P
tokens of a block, S tokens of keys, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import BackendUnavailableError, ConfigError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import (
        device_of,
        interpreting,
        power_of_two,
        tokens_of,
    )
    from sparda_compile.training.teacher_kernel import grow, logits
except ImportError as error:
    raise BackendUnavailableError(
        "the fused loss needs Triton, which is not installed; install triton, or pass "
        "backend='plain'."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["block_logs", "places", "sizes_of", "vectors"]

_MAX_HEAD_DIM: Final = 256
# Keys of a tile; a block that has more is one.
_TILE_TOKENS: Final = 64


@triton.jit
def vectors(  # noqa: ANN201 - a part of kernels
    base, offs_t, stride_t, is_there, D: tl.constexpr, DIMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Load vectors [tokens, DIMS]; the interpreter multiplies float32 alone."""
    dims = tl.arange(0, DIMS)
    found = tl.load(
        base + offs_t[:, None].to(tl.int64) * stride_t + dims[None, :],
        mask=is_there[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    return found.to(tl.float32) if INTERPRETED else found


@triton.jit
def places(block, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCKS: tl.constexpr):  # noqa: ANN201
    """Return the tokens of some blocks, and which of the places hold one of them."""
    place = tl.arange(0, BLOCKS * ROOM)
    return (block + place // ROOM) * SIZE + place % ROOM, place % ROOM < SIZE


@triton.jit
def _logs_of_tile(
    q, k_base, k_stride_t, logs, block, position, offs_q, in_q, num_queries, num_tokens, num_blocks,
    scale, softcap, D: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, HIDES: tl.constexpr, HAS_CAP: tl.constexpr,
    IEEE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Store the logs of a tile of blocks, and return them, [BLOCK_Q, BLOCKS]."""
    token, is_token = places(block, SIZE, ROOM, BLOCKS)
    k = vectors(k_base, token, k_stride_t, is_token & (token < num_tokens), D, DIMS, INTERPRETED)
    s = logits(q, tl.trans(k), scale, softcap, HAS_CAP, IEEE)
    if HIDES:
        s = tl.where(token[None, :] <= position[:, None], s, -1.0e30)
    if ROOM != SIZE:
        s = tl.where(is_token[None, :], s, -1.0e30)
    if BLOCKS == 1:
        peak = tl.max(s, 1)
        log = (peak + tl.log2(tl.sum(tl.exp2(s - peak[:, None]), 1)))[:, None]
    else:
        parts = tl.reshape(s, [BLOCK_Q, BLOCKS, ROOM])
        peaks = tl.max(parts, 2)
        log = peaks + tl.log2(tl.sum(tl.exp2(parts - peaks[:, :, None]), 2))
    number = block + tl.arange(0, BLOCKS)
    tl.store(
        logs + number[None, :].to(tl.int64) * num_queries + offs_q[:, None], log,
        mask=in_q[:, None] & (number < num_blocks)[None, :],
    )  # fmt: skip
    return log


@triton.jit(do_not_specialize=["start", "num_tokens", "num_blocks", "first", "behind"])
def _block_logs(
    q_ptr, k_ptr, logs_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_g, k_stride_t,
    start, num_queries, num_tokens, num_blocks, num_heads, first, behind, scale, softcap,
    R: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, SEES_OPEN: tl.constexpr, HAS_CAP: tl.constexpr,
    IEEE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    # The last queries, which see most, begin first; heads of a group run beside each other.
    row, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < num_queries
    position = start + offs_q
    q = vectors(
        q_ptr + b * q_stride_b + h * q_stride_h, position, q_stride_t, in_q, D, DIMS, INTERPRETED
    )
    k_base = k_ptr + b * k_stride_b + (h // R) * k_stride_g
    logs = logs_ptr + row.to(tl.int64) * num_blocks * num_queries
    peak = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    last = position // SIZE - behind
    begin = first // BLOCKS * BLOCKS
    # Every query of the tile sees all of the blocks before `whole`.
    whole = (start + tile * BLOCK_Q) // SIZE - behind + (0 if SEES_OPEN else 1)
    whole = tl.maximum(whole, begin) // BLOCKS * BLOCKS
    last_q = tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1
    end = (start + last_q) // SIZE - behind + 1
    for block in range(begin, whole, BLOCKS):
        log = _logs_of_tile(
            q, k_base, k_stride_t, logs, block, position, offs_q, in_q, num_queries, num_tokens,
            num_blocks, scale, softcap, D, DIMS, SIZE, ROOM, BLOCKS, BLOCK_Q, False, HAS_CAP, IEEE,
            INTERPRETED,
        )  # fmt: skip
        number = (block + tl.arange(0, BLOCKS))[None, :]
        peak, total = grow(peak, total, tl.where(number >= first, log, -1.0e30))
    for block in range(whole, end, BLOCKS):
        log = _logs_of_tile(
            q, k_base, k_stride_t, logs, block, position, offs_q, in_q, num_queries, num_tokens,
            num_blocks, scale, softcap, D, DIMS, SIZE, ROOM, BLOCKS, BLOCK_Q, SEES_OPEN, HAS_CAP,
            IEEE, INTERPRETED,
        )  # fmt: skip
        number = (block + tl.arange(0, BLOCKS))[None, :]
        counts = (number >= first) & (number <= last[:, None])
        peak, total = grow(peak, total, tl.where(counts, log, -1.0e30))
    # A query for which no block counts has a sum that nobody reads.
    lse = peak + tl.log2(tl.maximum(total, 1.0e-30))
    tl.store(lse_ptr + row.to(tl.int64) * num_queries + offs_q, lse, mask=in_q)


def sizes_of(like: Tensor, size: int) -> dict[str, Any]:
    """Return what kernels that multiply vectors with the keys of blocks are compiled for.

    Args:
        like: Vectors, [..., D].
        size: P.

    Raises:
        ConfigError: If the head dim is outside the limit.
    """
    dim = like.shape[-1]
    if dim > _MAX_HEAD_DIM:
        raise ConfigError(
            f"head_dim={dim} is more than the {_MAX_HEAD_DIM} that the fused loss takes; pass "
            "backend='plain'."
        )
    dims, room = power_of_two(dim, 16), power_of_two(size)
    is_ieee = like.dtype == torch.float32
    rows, tokens = (128 if dims <= 128 else 64), _TILE_TOKENS
    if is_ieee:
        rows, tokens = rows // 2, tokens // 2
    return {
        "D": dim, "DIMS": dims, "SIZE": size, "ROOM": room, "BLOCKS": max(tokens // room, 1),
        "BLOCK_Q": rows, "IEEE": is_ieee, "INTERPRETED": interpreting(), "num_warps": 8,
        "num_stages": 3 if dims <= 128 and not is_ieee else 2,
    }  # fmt: skip


def block_logs(
    query_BHTD: Tensor,
    k_BGSD: Tensor,
    queries: range,
    size: int,
    scale: float,
    softcap: float,
    counted: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return the logarithms to base 2 of the summed exponentials of scores, by block.

    Args:
        query_BHTD: Queries, or Forecasts, of a whole sequence.
        k_BGSD: Keys, of the same dtype, those of all blocks that count.
        queries: Positions to compute, step 1.
        size: P.
        scale: Factor on q . k.
        softcap: Soft cap on the scores, 0.0 for none.
        counted: `first` and `behind` of the blocks that count.

    Returns:
        [B, H, N, Q] float32, N the blocks up to the last query, of which those that count are
        written, and their log-sum-exp, [B, H, Q] float32, which is any number where none counts.

    Raises:
        ConfigError: If the head dim is outside the limit.
    """
    batch, heads = query_BHTD.shape[:2]
    groups, num_tokens = k_BGSD.shape[1:3]
    query, *q_strides = tokens_of(query_BHTD)
    keys, *k_strides = tokens_of(k_BGSD)
    num_blocks = -(-queries.stop // size)
    shape = (batch, heads, num_blocks, len(queries))
    logs = torch.empty(shape, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch, heads, len(queries), dtype=torch.float32, device=query.device)
    sizes = sizes_of(query, size)
    grid = (batch * heads, triton.cdiv(len(queries), sizes["BLOCK_Q"]))
    with device_of(query):
        _block_logs[grid](
            query, keys, logs, lse, *q_strides, *k_strides, queries.start, len(queries),
            num_tokens, num_blocks, heads, *counted, scale, softcap, R=heads // groups,
            SEES_OPEN=counted[1] == 0, HAS_CAP=bool(softcap), **sizes,
        )  # fmt: skip
    return logs, lse
