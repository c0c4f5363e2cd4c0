"""The teacher as two Triton kernels; `teacher.py` says what is computed.

    lse[h, p]      = log2 sum_{j <= p} 2^(s_h[p, j])           s = q_h . khat * scale * log2(e)
    peak[g, p, c]  = max_{j in cell c} sum_{h in g} 2^(s_h[p, j] - lse[h, p])
    last[g, p, c]  = the same sum at the last j of cell c, which also counts for cell c + 1

Reads q twice and khat once per tile of queries; writes two floats per query, group and cell. The
scores, 16 * R times as many, stay in registers. FLOPs: 2 * 2 * B * H * D * (visible pairs).

Limits: head_dim up to 256, pool_stride a power of two up to 64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import BackendUnavailableError, ConfigError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import device_of
except ImportError as error:
    raise BackendUnavailableError(
        "the fused teacher needs Triton, which is not installed; install triton, or pass "
        "backend='plain'."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["grow", "launch_aligned_teacher", "logits"]

_MAX_STRIDE, _MAX_HEAD_DIM = 64, 256


@triton.jit
def logits(q, k, scale, softcap, HAS_CAP: tl.constexpr, IEEE: tl.constexpr):  # noqa: ANN201
    """Return q . k * scale, capped, in units of log2."""
    dots = tl.dot(q, k, input_precision="ieee") if IEEE else tl.dot(q, k)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^2x + 1), from the only exponential that every Triton has.
        e = tl.exp2(dots * (2.0 * 1.4426950408889634 * scale / softcap))
        return (softcap * 1.4426950408889634) * (1.0 - 2.0 / (e + 1.0))
    return dots * (scale * 1.4426950408889634)


@triton.jit
def _keys(k_base, offs_j, offs_d, k_stride_j, num_fine, D: tl.constexpr):
    return tl.load(
        k_base + offs_j[None, :].to(tl.int64) * k_stride_j + offs_d[:, None],
        mask=(offs_j[None, :] < num_fine) & (offs_d[:, None] < D), other=0.0,
    )  # fmt: skip


@triton.jit
def grow(peak, total, s):  # noqa: ANN201
    """Take scores into a running maximum and a running sum of powers of two."""
    higher = tl.maximum(peak, tl.max(s, 1))
    return higher, total * tl.exp2(peak - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)


@triton.jit
def _lse_kernel(
    q_ptr, k_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_g, k_stride_j,
    start, num_queries, num_fine, num_heads, scale, softcap,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, HAS_CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1)
    b, h = (row // num_heads).to(tl.int64), (row % num_heads).to(tl.int64)
    offs_q = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, BLOCK_D)
    in_q = offs_q < num_queries
    position = start + offs_q
    k_base = k_ptr + b * k_stride_b + (h // R) * k_stride_g
    q = tl.load(
        q_ptr + b * q_stride_b + h * q_stride_h
        + position[:, None].to(tl.int64) * q_stride_t + offs_d,
        mask=in_q[:, None] & (offs_d < D), other=0.0,
    )  # fmt: skip
    peak = tl.full([BLOCK_Q], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    # Every query of the tile sees all keys before `seen`; the few behind it need a mask.
    seen = tl.minimum(start + tile * BLOCK_Q, num_fine) // BLOCK_J * BLOCK_J
    for first in range(0, seen, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        k = _keys(k_base, offs_j, offs_d, k_stride_j, num_fine, D)
        peak, total = grow(peak, total, logits(q, k, scale, softcap, HAS_CAP, IEEE))
    for first in range(seen, tl.minimum(start + (tile + 1) * BLOCK_Q, num_fine), BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        k = _keys(k_base, offs_j, offs_d, k_stride_j, num_fine, D)
        visible = (offs_j[None, :] <= position[:, None]) & (offs_j[None, :] < num_fine)
        s = tl.where(visible, logits(q, k, scale, softcap, HAS_CAP, IEEE), -1.0e30)
        peak, total = grow(peak, total, s)
    tl.store(lse_ptr + row.to(tl.int64) * num_queries + offs_q, peak + tl.log2(total), mask=in_q)


@triton.jit
def _cell_kernel(
    q_ptr, k_ptr, lse_ptr, peak_ptr, last_ptr,
    q_stride_b, q_stride_h, q_stride_t, k_stride_b, k_stride_g, k_stride_j,
    start, num_queries, num_fine, num_groups, num_cells, scale, softcap,
    R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_J: tl.constexpr, HAS_CAP: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    tile_j, tile_q, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (row // num_groups).to(tl.int64), (row % num_groups).to(tl.int64)
    offs_q = tile_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_j = tile_j * BLOCK_J + tl.arange(0, BLOCK_J)
    offs_d = tl.arange(0, BLOCK_D)
    in_q = offs_q < num_queries
    position = start + offs_q
    mass = tl.zeros([BLOCK_Q, BLOCK_J], tl.float32)
    # Tiles whose keys all come after their queries stay zero.
    if tile_j * BLOCK_J < start + (tile_q + 1) * BLOCK_Q:
        k_base = k_ptr + b * k_stride_b + g * k_stride_g
        k = _keys(k_base, offs_j, offs_d, k_stride_j, num_fine, D)
        q_base = q_ptr + b * q_stride_b + position[:, None].to(tl.int64) * q_stride_t + offs_d
        for r in range(R):
            h = g * R + r
            q = tl.load(
                q_base + h * q_stride_h, mask=in_q[:, None] & (offs_d < D), other=0.0
            )  # fmt: skip
            lse_row = b * num_groups * R + h
            lse = tl.load(lse_ptr + lse_row * num_queries + offs_q, mask=in_q, other=0.0)
            s = logits(q, k, scale, softcap, HAS_CAP, IEEE)
            # A hidden score may be far above the sum: infinity, which the mask below takes away.
            mass += tl.exp2(s - lse[:, None])
    visible = (offs_j[None, :] <= position[:, None]) & (offs_j[None, :] < num_fine)
    mass = tl.where(visible, mass, 0.0)
    CELLS: tl.constexpr = BLOCK_J // STRIDE
    cells = tl.reshape(mass, [BLOCK_Q, CELLS, STRIDE])
    is_last = (tl.arange(0, STRIDE) == STRIDE - 1)[None, None, :]
    peak = tl.max(cells, 2)
    last = tl.max(tl.where(is_last, cells, 0.0), 2)
    offs_c = tile_j * CELLS + tl.arange(0, CELLS)
    place = (row.to(tl.int64) * num_queries + offs_q[:, None]) * num_cells + offs_c
    inside = in_q[:, None] & (offs_c < num_cells)
    tl.store(peak_ptr + place, peak, mask=inside)
    tl.store(last_ptr + place, last, mask=inside)


def launch_aligned_teacher(
    query_BHTD: Tensor,
    fine_BGJD: Tensor,
    queries: range,
    pool: tuple[int, int],
    factors: tuple[float, float],
    width: int,
) -> Tensor:
    """Do what `aligned_teacher` says with two kernels.

    `factors`: scale and softcap; `width`: how many windows can have mass for these queries.

    Raises:
        ConfigError: If the stride or the head dim is outside the limits.
    """
    batch, heads, _, dim = query_BHTD.shape
    groups, num_fine = fine_BGJD.shape[1:3]
    stride = pool[1]
    if stride & (stride - 1) or stride > _MAX_STRIDE or dim > _MAX_HEAD_DIM:
        raise ConfigError(
            f"pool_stride={stride} with head_dim={dim} is outside what the fused teacher takes: a "
            f"power of two up to {_MAX_STRIDE} and head_dim up to {_MAX_HEAD_DIM}; pass "
            "backend='plain'."
        )
    query_BHTD = query_BHTD if query_BHTD.stride(-1) == 1 else query_BHTD.contiguous()
    num_queries, device = len(queries), query_BHTD.device
    scale, softcap = factors
    num_fine = min(num_fine, queries.stop)
    # Each cell's last window also counts for the next one, so there may be one cell more.
    num_cells = max(-(-num_fine // stride), width)
    lse = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=device)
    peak = torch.empty(batch, groups, num_queries, num_cells, dtype=torch.float32, device=device)
    last = torch.empty_like(peak)
    block_d = max(triton.next_power_of_2(dim), 16)
    block_q = 128 if block_d <= 128 else 64
    # Two programs of the second kernel fit a multiprocessor's shared memory and registers.
    block_j = max(64, stride)
    is_ieee = query_BHTD.dtype == torch.float32
    if is_ieee:
        block_q, block_j = block_q // 2, max(block_j // 2, stride)
    shared = {
        "R": heads // groups, "D": dim, "BLOCK_D": block_d, "BLOCK_Q": block_q,
        "BLOCK_J": block_j, "HAS_CAP": bool(softcap), "IEEE": is_ieee, "num_warps": 8,
        "num_stages": 3 if block_d <= 128 else 2,
    }  # fmt: skip
    strides = (*query_BHTD.stride()[:3], *fine_BGJD.stride()[:3])
    tiles_q = triton.cdiv(num_queries, block_q)
    with device_of(query_BHTD):
        _lse_kernel[(tiles_q, batch * heads)](
            query_BHTD, fine_BGJD, lse, *strides, queries.start, num_queries, num_fine, heads,
            scale, softcap, **shared,
        )  # fmt: skip
        _cell_kernel[(triton.cdiv(num_cells * stride, block_j), tiles_q, batch * groups)](
            query_BHTD, fine_BGJD, lse, peak, last, *strides, queries.start, num_queries, num_fine,
            groups, num_cells, scale, softcap, STRIDE=stride, **shared,
        )  # fmt: skip
    torch.maximum(peak[..., 1:], last[..., :-1], out=peak[..., 1:])
    return peak[..., :width]
