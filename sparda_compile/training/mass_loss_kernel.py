"""The loss on low-bit keys as three Triton kernels; `mass_loss.py` says what is computed.

    log[h, p, n] = log2 sum_{t in n} 2^(q_h[p] . k[t] * scale * log2(e))       by the first
    lse[h, p]    = log2 sum_n 2^log[h, p, n]                                   of counted blocks
    T[g, p, n]   = sum_{h in g} 2^(log[h, p, n] - lse[h, p]), over its sum     by the second
    S[g, p, n]   = 2^(log of f_g - lse of f_g)
    push         = 1 - T / S
    gradient     = scale * sum_t 2^(f_g . k'[t] * scale * log2(e) - lse of f_g) push[n] k'[t]

The first kernel runs twice: with true queries and the teacher's keys, and with Forecasts and
low-bit keys. The third multiplies Forecasts and low-bit keys again. So a score is made once for
each query head and twice for each Forecast, and never leaves the registers. In memory are a number
for each query, head and block, and one for each query, Forecast and block, over which the second
kernel writes `push`; queries come in ranges, as many as fit into half a GiB of them. Queries are
their last dimension, so that each program writes whole lines.

A block counts for the query at p if its number is from `first` to p // P - `behind`: all blocks
that p sees have first = behind = 0, the full ones before it behind = 1, those that are free the
number of sink blocks and that of local ones plus one. Only they are multiplied.

FLOPs: 2 * D * B * (H + 3 * G) * (visible pairs). Limit: head_dim up to 256.

Dimensions: B batch, H heads, G groups, R = H / G, T tokens, Q queries of a range, N blocks, P
tokens of a block, S tokens of keys, D head dim.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import torch

from sparda_compile.errors import BackendUnavailableError, ConfigError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import interpreting, power_of_two, tokens_of
    from sparda_compile.training.teacher_kernel import grow, logits
except ImportError as error:
    raise BackendUnavailableError(
        "the fused loss needs Triton, which is not installed; install triton, or pass "
        "backend='plain'."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["block_logs", "launch_mass_loss"]

_MAX_HEAD_DIM: Final = 256
# Numbers by query and block that are held at once: 512 MiB of float32.
_HELD: Final = 1 << 27
_TILE_TOKENS: Final = 64
_LN_2: Final = tl.constexpr(0.6931471805599453)
_SMALLEST: Final = tl.constexpr(1e-20)


@triton.jit
def _vectors(base, offs_t, stride_t, is_there, D: tl.constexpr, DIMS: tl.constexpr,
             INTERPRETED: tl.constexpr):  # fmt: skip
    """Load vectors [tokens, DIMS]; the interpreter multiplies float32 alone."""
    dims = tl.arange(0, DIMS)
    found = tl.load(
        base + offs_t[:, None].to(tl.int64) * stride_t + dims[None, :],
        mask=is_there[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    return found.to(tl.float32) if INTERPRETED else found


@triton.jit
def _tokens(block, SIZE: tl.constexpr, ROOM: tl.constexpr, BLOCKS: tl.constexpr):
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
    token, is_token = _tokens(block, SIZE, ROOM, BLOCKS)
    k = _vectors(k_base, token, k_stride_t, is_token & (token < num_tokens), D, DIMS, INTERPRETED)
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
    q = _vectors(
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


@triton.jit
def _mass(
    logs, lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R: tl.constexpr,
):  # fmt: skip
    """Return a group's attention on blocks, summed over its heads, in the shape of `at`."""
    mass = tl.zeros(at.shape, tl.float32)
    for r in tl.static_range(R):
        of_head = tl.load(lse + r * num_queries + offs_q, mask=in_q, other=0.0)
        start = logs + tl.cast(r, tl.int64) * num_blocks * num_queries
        log = tl.load(start + at, mask=is_free, other=-1.0e30)
        mass += tl.exp2(log - of_head[None, :])
    return mass


@triton.jit(do_not_specialize=["start", "num_blocks", "first", "behind"])
def _compare_masses(
    taught_ptr, taught_lse_ptr, student_ptr, student_lse_ptr, loss_ptr,
    start, num_queries, num_blocks, first, behind,
    R: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < num_queries
    last = tl.where(in_q, (start + offs_q) // SIZE - behind, -1)
    end = (start + tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1) // SIZE - behind + 1
    taught = taught_ptr + row * R * num_blocks * num_queries
    taught_lse = taught_lse_ptr + row * R * num_queries
    student = student_ptr + row * num_blocks * num_queries
    lse = tl.load(student_lse_ptr + row * num_queries + offs_q, mask=in_q, other=0.0)
    masses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        number = block + tl.arange(0, BLOCK_N)[:, None]
        at = number.to(tl.int64) * num_queries + offs_q[None, :]
        is_free = number <= last[None, :]
        masses += _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
    total = tl.maximum(tl.sum(masses, 0), _SMALLEST)[None, :]
    losses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        number = block + tl.arange(0, BLOCK_N)[:, None]
        at = number.to(tl.int64) * num_queries + offs_q[None, :]
        is_free = number <= last[None, :]
        mass = _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
        target = mass / total
        log = tl.load(student + at, mask=is_free, other=0.0)
        share = tl.maximum(tl.exp2(tl.minimum(log - lse[None, :], 0.0)), _SMALLEST)
        surprise = tl.log2(tl.maximum(target, _SMALLEST)) - tl.log2(share)
        losses += tl.where(is_free, target * surprise, 0.0)
        tl.store(student + at, 1.0 - target / share, mask=is_free)
    tl.store(loss_ptr + row * num_queries + offs_q, tl.sum(losses, 0) * _LN_2, mask=in_q)


@triton.jit(do_not_specialize=["start", "num_tokens", "num_blocks", "first", "behind"])
def _mass_gradient(
    f_ptr, k_ptr, push_ptr, lse_ptr, gradient_ptr,
    f_stride_b, f_stride_h, f_stride_t, k_stride_b, k_stride_g, k_stride_t,
    g_stride_b, g_stride_h, g_stride_t,
    start, num_queries, num_tokens, num_blocks, num_groups, first, behind, scale, factor,
    D: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, IEEE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, g = (row // num_groups).to(tl.int64), (row % num_groups).to(tl.int64)
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < num_queries
    position = start + offs_q
    f = _vectors(
        f_ptr + b * f_stride_b + g * f_stride_h, position, f_stride_t, in_q, D, DIMS, INTERPRETED
    )
    k_base = k_ptr + b * k_stride_b + g * k_stride_g
    push_base = push_ptr + row.to(tl.int64) * num_blocks * num_queries
    lse = tl.load(lse_ptr + row.to(tl.int64) * num_queries + offs_q, mask=in_q, other=0.0)
    last = tl.where(in_q, position // SIZE - behind, -1)
    end = (start + tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1) // SIZE - behind + 1
    acc = tl.zeros([BLOCK_Q, DIMS], tl.float32)
    for block in range(first // BLOCKS * BLOCKS, end, BLOCKS):
        token, is_token = _tokens(block, SIZE, ROOM, BLOCKS)
        is_token = is_token & (token < num_tokens)
        k = _vectors(k_base, token, k_stride_t, is_token, D, DIMS, INTERPRETED)
        s = logits(f, tl.trans(k), scale, 0.0, False, IEEE)
        number = block + tl.arange(0, BLOCKS)[None, :]
        push = tl.load(
            push_base + number.to(tl.int64) * num_queries + offs_q[:, None],
            mask=(number >= first) & (number <= last[:, None]), other=0.0,
        )  # fmt: skip
        # A share is at most 1; where a block is not free, a score may be far above the sum.
        shares = tl.exp2(tl.minimum(s - lse[:, None], 0.0))
        if BLOCKS == 1:
            pushed = shares * push
        else:
            pushed = tl.reshape(shares, [BLOCK_Q, BLOCKS, ROOM]) * push[:, :, None]
            pushed = tl.reshape(pushed, [BLOCK_Q, BLOCKS * ROOM])
        if IEEE:
            acc += tl.dot(pushed.to(k.dtype), k, input_precision="ieee")
        else:
            acc = tl.dot(pushed.to(k.dtype), k, acc)
    dims = tl.arange(0, DIMS)
    target = gradient_ptr + b * g_stride_b + g * g_stride_h
    tl.store(
        target + position[:, None].to(tl.int64) * g_stride_t + dims[None, :],
        (acc * factor).to(gradient_ptr.dtype.element_ty),
        mask=in_q[:, None] & (dims < D)[None, :],
    )


def _sizes(like: Tensor, size: int) -> dict[str, Any]:
    """Return what the kernels that multiply are compiled for."""
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
    sizes = _sizes(query, size)
    grid = (batch * heads, triton.cdiv(len(queries), sizes["BLOCK_Q"]))
    with _device_of(query):
        _block_logs[grid](
            query, keys, logs, lse, *q_strides, *k_strides, queries.start, len(queries),
            num_tokens, num_blocks, heads, *counted, scale, softcap, R=heads // groups,
            SEES_OPEN=counted[1] == 0, HAS_CAP=bool(softcap), **sizes,
        )  # fmt: skip
    return logs, lse


def launch_mass_loss(
    forecast_BGTD: Tensor,
    query_BHTD: Tensor,
    keys: tuple[Tensor, Tensor],
    queries: range,
    config: SpardaConfig,
    scale: float,
    softcap: float,
    *,
    full_only: bool,
    push: tuple[Tensor, float] | None,
) -> Tensor:
    """Return the divergence of a range of queries, summed, a float32 scalar in nats.

    Args:
        forecast_BGTD: Predicted queries of whole sequences.
        query_BHTD: True queries.
        keys: The teacher's keys, and low-bit keys, [B, G, S, D], all of one dtype.
        queries: Positions to compute, step 1.
        config: Sizes.
        scale: Factor on q . k.
        softcap: Soft cap on the teacher's scores, 0.0 for none.
        full_only: Whether the teacher's softmax is over the blocks that are full before a query.
        push: Gradient [B, G, T, D] to write at those positions, and a factor on it; None for none.

    Raises:
        ConfigError: If the head dim is outside the limit.
    """
    batch, groups, num_tokens, _ = forecast_BGTD.shape
    heads, size = query_BHTD.shape[1], config.block_size
    taught, near = keys
    free = config.sink_blocks, config.local_blocks + 1
    num_blocks = -(-num_tokens // size)
    total = torch.zeros((), dtype=torch.float32, device=near.device)
    step = _HELD // (batch * (heads + groups) * num_blocks)
    step = max(step // 128 * 128, 128)
    for start in range(queries.start, queries.stop, step):
        part = range(start, min(start + step, queries.stop))
        counted = 0, int(full_only)
        logs = block_logs(query_BHTD, taught, part, size, scale, softcap, counted)
        shares = block_logs(forecast_BGTD, near, part, size, scale, 0.0, free)
        total += _compare(logs, shares, part, size, free).sum()
        if push is not None:
            _push(forecast_BGTD, near, shares, part, size, scale, free, push)
    return total


def _compare(
    taught: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    queries: range,
    size: int,
    free: tuple[int, int],
) -> Tensor:
    """Return the divergences [B, G, Q], and write 1 - T / S over the student's logs."""
    batch, groups, num_blocks, num_queries = student[0].shape
    loss = torch.empty(batch, groups, num_queries, dtype=torch.float32, device=student[0].device)
    with _device_of(loss):
        _compare_masses[(batch * groups, triton.cdiv(num_queries, 32))](
            *taught, *student, loss, queries.start, num_queries, num_blocks, *free,
            R=taught[0].shape[1] // groups, SIZE=size, BLOCK_N=32, BLOCK_Q=32, num_warps=4,
        )  # fmt: skip
    return loss


def _push(
    forecast_BGTD: Tensor,
    near_BGSD: Tensor,
    student: tuple[Tensor, Tensor],
    queries: range,
    size: int,
    scale: float,
    free: tuple[int, int],
    push: tuple[Tensor, float],
) -> None:
    gradient, factor = push
    batch, groups, num_blocks, num_queries = student[0].shape
    forecast, *f_strides = tokens_of(forecast_BGTD)
    near, *k_strides = tokens_of(near_BGSD)
    sizes = _sizes(forecast, size)
    with _device_of(near):
        _mass_gradient[(batch * groups, triton.cdiv(num_queries, sizes["BLOCK_Q"]))](
            forecast, near, *student, gradient, *f_strides, *k_strides, *gradient.stride()[:3],
            queries.start, num_queries, near.shape[2], num_blocks, groups, *free, scale,
            scale * factor, **sizes,
        )  # fmt: skip


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
