"""The loss on low-bit keys as three Triton kernels; `mass_loss.py` says what is computed.

    log, lse     = those of true queries and the teacher's keys               `block_logs_kernel.py`
    log', lse'   = those of Forecasts and low-bit keys                        the same kernel
    T[g, p, n]   = sum_{h in g} 2^(log[h, p, n] - lse[h, p]), over its sum    a second one
    S[g, p, n]   = 2^(log'[g, p, n] - lse'[g, p])
    push         = 1 - T / S
    gradient     = scale * sum_t 2^(f_g . k'[t] * scale * log2(e) - lse') push[n] k'[t]      a third

Of F heads for each KV head, F > 1, log' and lse' are those of all full blocks, and

    S[g, p, n]   = sum_{f in g} 2^(log'[f, p, n] - lse'[f, p]), over its sum on free blocks
    push         = (1 - T / S) / that sum on free blocks, 0 on others
    own[f, p]    = sum_n push[n] 2^(log'[f, p, n] - lse'[f, p])
    gradient     = scale * sum_t 2^(f_f . k'[t] * scale * log2(e) - lse') (push[n] - own) k'[t]

So a score is made once for each query head and twice for each Forecast, and never leaves the
registers. In memory are a number for each query, head and block, and one for each query, Forecast
and block, over which the second kernel writes `push`; queries come in ranges, as many as fit into
half a GiB of them; for several heads `push` has memory of its own. FLOPs: 2 * D * B * (H + 3 * E) *
(visible pairs).

Dimensions: B batch, H heads, G groups, R = H / G, F heads of a Forecast in a group, E = G * F,
T tokens, Q queries of a range, N blocks, P tokens of a block, S tokens of keys, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import BackendUnavailableError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import device_of, power_of_two, tokens_of
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
_SMALLEST_OF_HEADS: Final = tl.constexpr(1e-15)


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


@triton.jit
def _tile_of(
    tile, start, num_queries, behind, SIZE: tl.constexpr, BLOCK_Q: tl.constexpr
):  # fmt: skip
    """Return a tile's queries, which are there, the last free block of each, and where all end."""
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < num_queries
    last = tl.where(in_q, (start + offs_q) // SIZE - behind, -1)
    end = (start + tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1) // SIZE - behind + 1
    return offs_q, in_q, last, end


@triton.jit
def _blocks_of(block, offs_q, last, num_queries, BLOCK_N: tl.constexpr):
    """Return where numbers of some blocks and a tile's queries are, and which blocks are free."""
    number = block + tl.arange(0, BLOCK_N)[:, None]
    at = number.to(tl.int64) * num_queries + offs_q[None, :]
    return at, number <= last[None, :]


@triton.jit(do_not_specialize=["start", "num_blocks", "first", "behind"])
def _compare_masses(
    taught_ptr, taught_lse_ptr, student_ptr, student_lse_ptr, loss_ptr,
    start, num_queries, num_blocks, first, behind,
    R: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_q, in_q, last, end = _tile_of(tile, start, num_queries, behind, SIZE, BLOCK_Q)
    taught = taught_ptr + row * R * num_blocks * num_queries
    taught_lse = taught_lse_ptr + row * R * num_queries
    student = student_ptr + row * num_blocks * num_queries
    lse = tl.load(student_lse_ptr + row * num_queries + offs_q, mask=in_q, other=0.0)
    masses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        at, is_free = _blocks_of(block, offs_q, last, num_queries, BLOCK_N)
        masses += _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
    total = tl.maximum(tl.sum(masses, 0), _SMALLEST)[None, :]
    losses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        at, is_free = _blocks_of(block, offs_q, last, num_queries, BLOCK_N)
        mass = _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
        target = mass / total
        log = tl.load(student + at, mask=is_free, other=0.0)
        share = tl.maximum(tl.exp2(tl.minimum(log - lse[None, :], 0.0)), _SMALLEST)
        surprise = tl.log2(tl.maximum(target, _SMALLEST)) - tl.log2(share)
        losses += tl.where(is_free, target * surprise, 0.0)
        tl.store(student + at, 1.0 - target / share, mask=is_free)
    tl.store(loss_ptr + row * num_queries + offs_q, tl.sum(losses, 0) * _LN_2, mask=in_q)


@triton.jit(do_not_specialize=["start", "num_blocks", "first", "behind"])
def _compare_heads(
    taught_ptr, taught_lse_ptr, student_ptr, student_lse_ptr, push_ptr, own_ptr, loss_ptr,
    start, num_queries, num_blocks, first, behind,
    R: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_q, in_q, last, end = _tile_of(tile, start, num_queries, behind, SIZE, BLOCK_Q)
    taught = taught_ptr + row * R * num_blocks * num_queries
    taught_lse = taught_lse_ptr + row * R * num_queries
    student = student_ptr + row * F * num_blocks * num_queries
    student_lse = student_lse_ptr + row * F * num_queries
    masses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    shares = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        at, is_free = _blocks_of(block, offs_q, last, num_queries, BLOCK_N)
        masses += _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
        shares += _mass(student, student_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, F)
    total = tl.maximum(tl.sum(masses, 0), _SMALLEST)[None, :]
    free = tl.maximum(tl.sum(shares, 0), _SMALLEST_OF_HEADS)[None, :]
    losses = tl.zeros([BLOCK_N, BLOCK_Q], tl.float32)
    head = tl.arange(0, ROWS)[:, None]
    own = tl.zeros([ROWS, BLOCK_Q], tl.float32)
    for block in range(first, end, BLOCK_N):
        at, is_free = _blocks_of(block, offs_q, last, num_queries, BLOCK_N)
        mass = _mass(taught, taught_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, R)
        share = _mass(student, student_lse, at, offs_q, is_free, in_q, num_queries, num_blocks, F)
        target, share = mass / total, tl.maximum(share / free, _SMALLEST_OF_HEADS)
        surprise = tl.log2(tl.maximum(target, _SMALLEST)) - tl.log2(share)
        losses += tl.where(is_free, target * surprise, 0.0)
        push = tl.where(is_free, (1.0 - target / share) / free, 0.0)
        tl.store(push_ptr + row * num_blocks * num_queries + at, push, mask=is_free)
        for f in tl.static_range(F):
            of_head = _mass(
                student + tl.cast(f, tl.int64) * num_blocks * num_queries,
                student_lse + f * num_queries, at, offs_q, is_free, in_q, num_queries, num_blocks,
                1,
            )  # fmt: skip
            own += tl.where(head == f, tl.sum(push * of_head, 0)[None, :], 0.0)
    tl.store(loss_ptr + row * num_queries + offs_q, tl.sum(losses, 0) * _LN_2, mask=in_q)
    place = (row * F + head) * num_queries + offs_q[None, :]
    tl.store(own_ptr + place, own, mask=(head < F) & in_q[None, :])


@triton.jit(do_not_specialize=["start", "num_tokens", "num_blocks", "first", "behind"])
def _mass_gradient(
    f_ptr, k_ptr, push_ptr, lse_ptr, own_ptr, gradient_ptr,
    f_stride_b, f_stride_h, f_stride_t, k_stride_b, k_stride_g, k_stride_t,
    g_stride_b, g_stride_h, g_stride_t,
    start, num_queries, num_tokens, num_blocks, num_heads, first, behind, scale, factor,
    F: tl.constexpr, D: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr, ROOM: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr, IEEE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = offs_q < num_queries
    position = start + offs_q
    f = vectors(
        f_ptr + b * f_stride_b + h * f_stride_h, position, f_stride_t, in_q, D, DIMS, INTERPRETED
    )
    k_base = k_ptr + b * k_stride_b + (h // F) * k_stride_g
    push_base = push_ptr + (row // F).to(tl.int64) * num_blocks * num_queries
    lse = tl.load(lse_ptr + row.to(tl.int64) * num_queries + offs_q, mask=in_q, other=0.0)
    last = tl.where(in_q, position // SIZE - behind, -1)
    begin, end = first, (start + tl.minimum((tile + 1) * BLOCK_Q, num_queries) - 1) // SIZE
    if F == 1:
        end = end - behind + 1
    else:  # every full block has a part in the softmax
        begin = 0
        own = tl.load(own_ptr + row.to(tl.int64) * num_queries + offs_q, mask=in_q, other=0.0)
        is_before = tl.where(in_q, position // SIZE, 0)
    acc = tl.zeros([BLOCK_Q, DIMS], tl.float32)
    for block in range(begin // BLOCKS * BLOCKS, end, BLOCKS):
        token, is_token = places(block, SIZE, ROOM, BLOCKS)
        is_token = is_token & (token < num_tokens)
        k = vectors(k_base, token, k_stride_t, is_token, D, DIMS, INTERPRETED)
        s = logits(f, tl.trans(k), scale, 0.0, False, IEEE)
        number = block + tl.arange(0, BLOCKS)[None, :]
        push = tl.load(
            push_base + number.to(tl.int64) * num_queries + offs_q[:, None],
            mask=(number >= first) & (number <= last[:, None]), other=0.0,
        )  # fmt: skip
        if F > 1:
            push = tl.where(number < is_before[:, None], push - own[:, None], 0.0)
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
    target = gradient_ptr + b * g_stride_b + h * g_stride_h
    tl.store(
        target + position[:, None].to(tl.int64) * g_stride_t + dims[None, :],
        (acc * factor).to(gradient_ptr.dtype.element_ty),
        mask=in_q[:, None] & (dims < D)[None, :],
    )


def launch_mass_loss(
    forecast_BETD: Tensor,
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
        forecast_BETD: Predicted queries of whole sequences, one or several for each KV head.
        query_BHTD: True queries.
        keys: The teacher's keys, and low-bit keys, [B, G, S, D], all of one dtype.
        queries: Positions to compute, step 1.
        config: Sizes.
        scale: Factor on q . k.
        softcap: Soft cap on the teacher's scores, 0.0 for none.
        full_only: Whether the teacher's softmax is over the blocks that are full before a query.
        push: Gradient [B, E, T, D] to write at those positions, and a factor on it; None for none.

    Raises:
        ConfigError: If the head dim is outside the limit.
    """
    batch, predicted, num_tokens, _ = forecast_BETD.shape
    heads, size = query_BHTD.shape[1], config.block_size
    taught, near = keys
    is_one = predicted == near.shape[1]
    free = config.sink_blocks, config.local_blocks + 1
    num_blocks = -(-num_tokens // size)
    total = torch.zeros((), dtype=torch.float32, device=near.device)
    rows = heads + predicted + (0 if is_one else near.shape[1])
    step = _HELD // (batch * rows * num_blocks)
    step = max(step // 128 * 128, 128)
    for start in range(queries.start, queries.stop, step):
        part = range(start, min(start + step, queries.stop))
        counted = 0, int(full_only)
        logs = block_logs(query_BHTD, taught, part, size, scale, softcap, counted)
        scored = free if is_one else (0, 1)
        shares = block_logs(forecast_BETD, near, part, size, scale, 0.0, scored)
        compare = _compare if is_one else _compare_several
        loss, pushed = compare(logs, shares, part, size, free, near.shape[1])
        total += loss.sum()
        if push is not None:
            _push(forecast_BETD, near, pushed, part, size, scale, free, push)
    return total


def _compare(
    taught: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    queries: range,
    size: int,
    free: tuple[int, int],
    groups: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the divergences [B, G, Q], and what the gradient is made of: `push`, lse' and `own`.

    1 - T / S is written over the student's logs, and no head has an `own`.
    """
    batch, _, num_blocks, num_queries = student[0].shape
    loss = torch.empty(batch, groups, num_queries, dtype=torch.float32, device=student[0].device)
    with device_of(loss):
        _compare_masses[(batch * groups, triton.cdiv(num_queries, 32))](
            *taught, *student, loss, queries.start, num_queries, num_blocks, *free,
            R=taught[0].shape[1] // groups, SIZE=size, BLOCK_N=32, BLOCK_Q=32, num_warps=4,
        )  # fmt: skip
    return loss, (*student, student[1])


def _compare_several(
    taught: tuple[Tensor, Tensor],
    student: tuple[Tensor, Tensor],
    queries: range,
    size: int,
    free: tuple[int, int],
    groups: int,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the divergences [B, G, Q], `push` [B, G, N, Q], and lse' and `own` [B, E, Q]."""
    batch, predicted, num_blocks, num_queries = student[0].shape
    new, heads = student[0].new_empty, predicted // groups
    loss, push = new(batch, groups, num_queries), new(batch, groups, num_blocks, num_queries)
    own = torch.empty_like(student[1])
    with device_of(loss):
        _compare_heads[(batch * groups, triton.cdiv(num_queries, 32))](
            *taught, *student, push, own, loss, queries.start, num_queries, num_blocks, *free,
            R=taught[0].shape[1] // groups, F=heads, ROWS=power_of_two(heads), SIZE=size,
            BLOCK_N=32, BLOCK_Q=32, num_warps=4,
        )  # fmt: skip
    return loss, (push, student[1], own)


def _push(
    forecast_BETD: Tensor,
    near_BGSD: Tensor,
    pushed: tuple[Tensor, ...],
    queries: range,
    size: int,
    scale: float,
    free: tuple[int, int],
    push: tuple[Tensor, float],
) -> None:
    gradient, factor = push
    num_blocks, num_queries = pushed[0].shape[2:]
    batch, heads = forecast_BETD.shape[:2]
    forecast, *f_strides = tokens_of(forecast_BETD)
    near, *k_strides = tokens_of(near_BGSD)
    sizes = sizes_of(forecast, size)
    with device_of(near):
        _mass_gradient[(batch * heads, triton.cdiv(num_queries, sizes["BLOCK_Q"]))](
            forecast, near, *pushed, gradient, *f_strides, *k_strides, *gradient.stride()[:3],
            queries.start, num_queries, near.shape[2], num_blocks, heads, *free, scale,
            scale * factor, F=heads // near.shape[1], **sizes,
        )  # fmt: skip
