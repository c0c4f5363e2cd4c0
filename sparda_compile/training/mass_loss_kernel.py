"""The loss on low-bit keys as three Triton kernels; `mass_loss.py` says what is computed.

    log, lse     = those of true queries and the teacher's keys               `block_logs_kernel.py`
    log', lse'   = those of Forecasts and low-bit keys                        the same kernel
    T[g, p, n]   = sum_{h in g} 2^(log[h, p, n] - lse[h, p]), over its sum    a second one
    S[g, p, n]   = 2^(log'[g, p, n] - lse'[g, p])
    push         = 1 - T / S
    gradient     = scale * sum_t 2^(f_g . k'[t] * scale * log2(e) - lse') push[n] k'[t]      a third

So a score is made once for each query head and twice for each Forecast, and never leaves the
registers. In memory are a number for each query, head and block, and one for each query, Forecast
and block, over which the second kernel writes `push`; queries come in ranges, as many as fit into
half a GiB of them. FLOPs: 2 * D * B * (H + 3 * G) * (visible pairs).

Dimensions: B batch, H heads, G groups, R = H / G, T tokens, Q queries of a range, N blocks, P
tokens of a block, S tokens of keys, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import BackendUnavailableError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import device_of, tokens_of
    from sparda_compile.training.block_logs_kernel import (
        block_logs,
        places,
        sizes_of,
        vectors,
    )
    from sparda_compile.training.teacher_kernel import logits
except ImportError as error:
    raise BackendUnavailableError(
        "the fused loss needs Triton, which is not installed; install triton, or pass "
        "backend='plain'."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.config import SpardaConfig

__all__ = ["launch_mass_loss"]

# Numbers by query and block that are held at once: 512 MiB of float32.
_HELD: Final = 1 << 27
_LN_2: Final = tl.constexpr(0.6931471805599453)
_SMALLEST: Final = tl.constexpr(1e-20)


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
    f = vectors(
        f_ptr + b * f_stride_b + g * f_stride_h, position, f_stride_t, in_q, D, DIMS, INTERPRETED
    )
    k_base = k_ptr + b * k_stride_b + g * k_stride_g
    push_base = push_ptr + row.to(tl.int64) * num_blocks * num_queries
    lse = tl.load(lse_ptr + row.to(tl.int64) * num_queries + offs_q, mask=in_q, other=0.0)
    last = tl.where(in_q, position // SIZE - behind, -1)
    end = (start + tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1) // SIZE - behind + 1
    acc = tl.zeros([BLOCK_Q, DIMS], tl.float32)
    for block in range(first // BLOCKS * BLOCKS, end, BLOCKS):
        token, is_token = places(block, SIZE, ROOM, BLOCKS)
        is_token = is_token & (token < num_tokens)
        k = vectors(k_base, token, k_stride_t, is_token, D, DIMS, INTERPRETED)
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
    with device_of(loss):
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
    sizes = sizes_of(forecast, size)
    with device_of(near):
        _mass_gradient[(batch * groups, triton.cdiv(num_queries, sizes["BLOCK_Q"]))](
            forecast, near, *student, gradient, *f_strides, *k_strides, *gradient.stride()[:3],
            queries.start, num_queries, near.shape[2], num_blocks, groups, *free, scale,
            scale * factor, **sizes,
        )  # fmt: skip
