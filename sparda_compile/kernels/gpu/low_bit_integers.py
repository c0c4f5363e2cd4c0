"""Masses of blocks by low-bit keys, of products of 8-bit integers: one warp a program, in Gluon.

    width[d]    the largest span of a channel among 16 blocks, the same 16 wherever programs begin
    u[n, d]     span[n, d] / width[d], float16
    v[h, d]     q[h, d] width[d] * 127 / a[h], float16           a[h] = max_d |q[h, d] width[d]|
    w[n, h, d]  round(v[h, d] u[n, d]), at most 127

    q . k'[t] = q . (base[n] + (1 + c / L) span[n])              c = (L - 1) / 2
                + a[h] / (127 L) * sum_d w[n, h, d] (code[t, d] - c)

The sums over channels are exact. Rounding w moves a logit by at most a 254th part of the largest
product of a channel for each channel whose code is at an end, where codes are off by an eighth (2
bits) or a 32nd of each product. As codes lie about c, a block is hardly moved as a whole. Four
codes of a register become operands by one mask, where keys of 16 bits take three instructions for
two codes, and a product multiplies twice as many numbers.

Codes are masked where they stand: those of a byte have different weights, which the exponent's
factor takes out. Sums begin at the float 1.5 * 2^23, to whose mantissa integers add up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra import cuda
from triton.language.target_info import cuda_capability_geq

from sparda_compile.kernels.gpu.launch import interpreting, launch, power_of_two, rows_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["fits_integers", "integer_masses", "integer_parts"]

# Blocks whose channels have one width, and of a program at most; and at least.
_GROUP, _FEWEST_BLOCKS = 16, 4
# Programs that an H200 has room for at once, 16 of each multiprocessor.
_PROGRAMS: Final = 2048
# So that there are so many: registers of a thread, where the codes of a block leave room.
_REGISTERS: Final = 128
_FEW_CODES: Final = 4096
_MOST_ROWS, _MOST_DIMS = 16, 256

# What Triton 3.6 calls otherwise.
_NAMES_IT = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
_begin_copy: Any = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
_barrier: Any = getattr(gl, "barrier", None) or gl.thread_barrier
_LARGEST = gl.constexpr(127.0)
_LN_2 = gl.constexpr(0.6931471805599453)
_ZERO = gl.constexpr(12582912.0)  # 1.5 * 2^23, and its bits
_ZERO_BITS = gl.constexpr(0x4B400000)
# Four numbers at once: 1536 is 0x6600 in float16, whose last bits are then an integer.
_MULTIPLY = gl.constexpr(
    "{ .reg .b32 a, b; fma.rn.f16x2 a, $1, $3, $5; fma.rn.f16x2 b, $2, $4, $6; "
    "prmt.b32 $0, a, b, 0x6420; }"
)


@gluon.jit
def _lines(table):
    """Return a table in shared memory as lines that can be told by their number."""
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if _NAMES_IT:
        lines = table.reinterpret(table.dtype, table.shape, LINE)
    else:
        lines = table._reinterpret(table.dtype, table.shape, LINE)
    return lines


@gluon.jit
def _whole_products(v, u):
    """Return round(v u) in 8 bits."""
    u, _ = gl.broadcast(u, v)
    offset = gl.full(v.shape, 1536.0, gl.float16, v.type.layout)
    return gl.inline_asm_elementwise(
        _MULTIPLY, "=r,r,r,r,r,r,r", [v, u, offset], dtype=gl.int8, is_pure=True, pack=4
    )


@gluon.jit
def _sums(w, codes, TEXT: gl.constexpr, SUMS: gl.constexpr, FEW: gl.constexpr):
    """Return sum_d w code * weight of the codes that TEXT takes out of each byte, float32."""
    part = gl.inline_asm_elementwise(TEXT, "=r,r", [codes], dtype=gl.int8, is_pure=True, pack=4)
    if FEW:
        begin = gl.full([codes.shape[0], w.shape[1]], _ZERO_BITS, gl.int32, SUMS)
        found = mma_v2(part, w, begin)
    else:
        begin = gl.full([w.shape[0], codes.shape[1]], _ZERO_BITS, gl.int32, SUMS)
        found = mma_v2(w, part, begin)
    return found.to(gl.float32, bitcast=True) - _ZERO


@gluon.jit
def _total(w, CODES: gl.constexpr, SUMS: gl.constexpr, FEW: gl.constexpr):
    """Return sum_d w of each head, float32."""
    if FEW:
        ones = gl.full([16, w.shape[0]], 1, gl.int8, CODES)
        found = mma_v2(ones, w, gl.zeros([16, w.shape[1]], gl.int32, SUMS))
    else:
        ones = gl.full([w.shape[1], 8], 1, gl.int8, CODES)
        found = mma_v2(w, ones, gl.zeros([w.shape[0], 8], gl.int32, SUMS))
    return gl.max(found, axis=0 if FEW else 1).to(gl.float32)


@gluon.jit
def _near(x, TEXT: gl.constexpr):
    """Return a function of x as the GPU approximates it, to 22 bits."""
    return gl.inline_asm_elementwise(TEXT, "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _exp2(x):
    return _near(x, "ex2.approx.ftz.f32 $0, $1;")


@gluon.jit
def _load_channels(at, dims, DIM: gl.constexpr, DIMS: gl.constexpr):
    """Load vectors of DIM numbers, with zeros behind them; what `at` points to exists."""
    if DIM == DIMS:
        return gl.load(at)
    return gl.load(at, mask=gl.broadcast(at, dims < DIM)[1], other=0.0)


@gluon.jit
def _shares(w, codes, factor, is_row, SUMS: gl.constexpr, BITS: gl.constexpr, FEW: gl.constexpr):
    """Return of a block log2 of its largest exponential, and the sum of all over that one.

    `factor`: [heads], log2 of an exponential over a sum; `is_row` says which bytes there are.
    """
    AXIS: gl.constexpr = 0 if FEW else 1
    each = gl.expand_dims(factor, AXIS)
    if BITS == 2:
        one = _sums(w, codes, "and.b32 $0, $1, 0x03030303;", SUMS, FEW)
        two = _sums(w, codes, "and.b32 $0, $1, 0x0c0c0c0c;", SUMS, FEW)
        three = _sums(w, codes, "and.b32 $0, $1, 0x30303030;", SUMS, FEW)
        four = _sums(
            w, codes, "{ .reg .b32 a; shr.b32 a, $1, 2; and.b32 $0, a, 0x30303030; }", SUMS, FEW
        )
        most = gl.maximum(gl.maximum(one, two * 0.25), gl.maximum(three, four) * 0.0625)
        most = gl.where(is_row, most, float("-inf"))
        top = gl.max(most, axis=AXIS) * factor
        less = gl.expand_dims(top, AXIS)
        found = _exp2(one * each - less) + _exp2(two * (each * 0.25) - less)
        found += _exp2(three * (each * 0.0625) - less) + _exp2(four * (each * 0.0625) - less)
    else:
        one = _sums(w, codes, "and.b32 $0, $1, 0x0f0f0f0f;", SUMS, FEW)
        two = _sums(
            w, codes, "{ .reg .b32 a; shr.b32 a, $1, 4; and.b32 $0, a, 0x0f0f0f0f; }", SUMS, FEW
        )
        most = gl.where(is_row, gl.maximum(one, two), float("-inf"))
        top = gl.max(most, axis=AXIS) * factor
        less = gl.expand_dims(top, AXIS)
        found = _exp2(one * each - less) + _exp2(two * each - less)
    return top, gl.sum(gl.where(is_row, found, 0.0), axis=AXIS)


@gluon.jit
def _spread(spans_at, begin, full, GROUP: gl.constexpr, DIM: gl.constexpr, DIMS: gl.constexpr):
    """Return the widths [DIMS] of channels among a group of blocks, and u [GROUP, DIMS].

    The last full block stands for those that are not: it makes no channel wider.
    """
    SPANS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIMS, DIMS // 8], [1, 1], [1, 0])
    block = begin + gl.arange(0, GROUP, gl.SliceLayout(1, SPANS))[:, None]
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, SPANS))[None, :]
    at = spans_at + gl.minimum(block, full - 1) * DIM + dims
    span = _load_channels(at, dims, DIM, DIMS).to(gl.float32)
    width = gl.max(span, axis=0)
    return width, (span * gl.where(width > 0, 1.0 / width, 0.0)[None, :]).to(gl.float16)


@gluon.jit
def _scaled(
    query_at, q_head, width, IN: gl.constexpr, FEW: gl.constexpr, HEADS: gl.constexpr,
    ROWS: gl.constexpr, DIM: gl.constexpr, DIMS: gl.constexpr,
):  # fmt: skip
    """Return v in the layout of an operand, and a [ROWS]."""
    AXIS: gl.constexpr = 0 if FEW else 1
    head = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(AXIS, IN)), AXIS)
    dims = gl.expand_dims(gl.arange(0, DIMS, gl.SliceLayout(1 - AXIS, IN)), 1 - AXIS)
    at = query_at + gl.minimum(head, HEADS - 1) * q_head + dims
    q = _load_channels(at, dims, DIM, DIMS).to(gl.float32)
    wide = gl.convert_layout(width, gl.SliceLayout(1 - AXIS, IN))
    q = q * gl.expand_dims(wide, 1 - AXIS)
    largest = gl.max(gl.abs(q), axis=AXIS)
    scale = gl.where(largest > 0, _LARGEST / largest, 0.0)
    return (q * gl.expand_dims(scale, AXIS)).to(gl.float16), largest


@gluon.jit
def _middles(
    query_at, q_head, spans_at, bases_at, begin, full, SUMS: gl.constexpr, GROUP: gl.constexpr,
    BITS: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr, DIM: gl.constexpr,
    DIMS: gl.constexpr,
):  # fmt: skip
    """Return q . (base + (1 + c / L) span) of a group of blocks, [GROUP, ROWS]."""
    BLOCKS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 8)
    VECTORS: gl.constexpr = gl.DotOperandLayout(1, SUMS, 8)
    head = gl.arange(0, ROWS, gl.SliceLayout(0, VECTORS))[None, :]
    channel = gl.arange(0, DIMS, gl.SliceLayout(1, VECTORS))[:, None]
    at = query_at + gl.minimum(head, HEADS - 1) * q_head + channel
    q = _load_channels(at, channel, DIM, DIMS)
    block = begin + gl.arange(0, GROUP, gl.SliceLayout(1, BLOCKS))[:, None]
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, BLOCKS))[None, :]
    at = gl.minimum(block, full - 1) * DIM + dims
    none = gl.zeros([GROUP, ROWS], gl.float32, SUMS)
    by_base = mma_v2(_load_channels(bases_at + at, dims, DIM, DIMS), q, none)
    by_span = mma_v2(_load_channels(spans_at + at, dims, DIM, DIMS), q, none)
    LEVELS: gl.constexpr = 1 << BITS
    return by_base + by_span * (1 + (LEVELS - 1) / 2 / LEVELS)


@gluon.jit
def _bring(codes_at, block, place, ring, BYTES: gl.constexpr, DIM: gl.constexpr):
    """Begin to copy the codes of a block to a place of the ring."""
    DIMS: gl.constexpr = ring.shape[2]
    IN: gl.constexpr = gl.BlockedLayout([1, 16], [512 // DIMS, DIMS // 16], [1, 1], [1, 0])
    row = gl.arange(0, ring.shape[1], gl.SliceLayout(1, IN))[:, None]
    dims = gl.arange(0, DIMS, gl.SliceLayout(0, IN))[None, :]
    at = codes_at + block.to(gl.int64) * (BYTES * DIM) + row * DIM + dims
    mask = (row < BYTES) & (dims < DIM)
    _begin_copy(ring.index(place), at, mask=mask)
    async_copy.commit_group()


@gluon.jit
def _group_shares(
    codes_at, first, stop, begin, v, factor, us, tops, totals, SUMS: gl.constexpr,
    BITS: gl.constexpr, BYTES: gl.constexpr, ROOM: gl.constexpr, FEW: gl.constexpr,
    DIM: gl.constexpr, DIMS: gl.constexpr,
):  # fmt: skip
    """Keep the shares of blocks; the codes of one are brought while those of another are used."""
    AXIS: gl.constexpr = 0 if FEW else 1
    CODES: gl.constexpr = gl.DotOperandLayout(AXIS if FEW else 1, SUMS, 8 if DIMS < 128 else 16)
    VECTORS: gl.constexpr = v.type.layout
    IN: gl.constexpr = gl.SwizzledSharedLayout(16, 1, DIMS // 16 if DIMS < 128 else 8, [1, 0])
    ring = gl.allocate_shared_memory(gl.int8, [2, ROOM, DIMS], IN)
    row = gl.arange(0, ROOM, gl.SliceLayout(1 - AXIS, SUMS))
    is_row = gl.expand_dims(row < BYTES, 1 - AXIS)
    _bring(codes_at, first, 0, ring, BYTES, DIM)
    for block in range(first, stop):
        async_copy.wait_group(0)
        _barrier()
        here = ring.index((block - first) % 2)
        codes = here.load(CODES) if FEW else here.permute((1, 0)).load(CODES)
        _bring(codes_at, gl.minimum(block + 1, stop - 1), (block - first + 1) % 2, ring, BYTES, DIM)
        u = us.index(block - begin).load(gl.SliceLayout(1 - AXIS, VECTORS))
        w = _whole_products(v, gl.expand_dims(u, 1 - AXIS))
        top, total = _shares(w, codes, factor, is_row, SUMS, BITS, FEW)
        middle = _total(w, CODES, SUMS, FEW) * (factor * (((1 << BITS) - 1) / 2))
        tops.index(block - begin).store(top - middle)
        totals.index(block - begin).store(total)
    async_copy.wait_group(0)
    _barrier()


@gluon.jit
def _integer_masses(
    query, codes, spans, bases, lengths, masses, maxima, sums, factor, q_row, q_head, groups,
    num_blocks, parts,
    HEADS: gl.constexpr, ROWS: gl.constexpr, SIZE: gl.constexpr, BYTES: gl.constexpr,
    ROOM: gl.constexpr, BLOCKS: gl.constexpr, GROUP: gl.constexpr, DIM: gl.constexpr,
    DIMS: gl.constexpr, SOFTMAX: gl.constexpr,
):  # fmt: skip
    pair, part = gl.program_id(0), gl.program_id(1)
    row, group = pair // groups, pair % groups
    full = gl.load(lengths + row) // SIZE
    first = part * BLOCKS
    begin, stop = first // GROUP * GROUP, gl.minimum(full, first + BLOCKS)
    FEW: gl.constexpr = ROWS == 8
    BITS: gl.constexpr = 8 * BYTES // SIZE
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])
    OPERAND: gl.constexpr = gl.DotOperandLayout(1 if FEW else 0, SUMS, 8 if DIMS < 128 else 16)
    OF_HEADS: gl.constexpr = gl.SliceLayout(0 if FEW else 1, SUMS)
    TABLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    at = pair.to(gl.int64) * num_blocks
    shared_tops = gl.allocate_shared_memory(gl.float32, [GROUP, ROWS], TABLE)
    shared_totals = gl.allocate_shared_memory(gl.float32, [GROUP, ROWS], TABLE)
    middles = gl.zeros([GROUP, ROWS], gl.float32, SUMS)
    if first < stop:
        query_at = query + row * q_row + group * HEADS * q_head
        width, u = _spread(spans + at * DIM, begin, full, GROUP, DIM, DIMS)
        us = gl.allocate_shared_memory(gl.float16, [GROUP, DIMS], TABLE, u)
        v, largest = _scaled(query_at, q_head, width, OPERAND, FEW, HEADS, ROWS, DIM, DIMS)
        each = gl.convert_layout(largest, OF_HEADS) * (factor / (_LARGEST * (1 << BITS)))
        middles = _middles(
            query_at, q_head, spans + at * DIM, bases + at * DIM, begin, full, SUMS, GROUP, BITS,
            HEADS, ROWS, DIM, DIMS,
        )  # fmt: skip
        _group_shares(
            codes + at * (BYTES * DIM), first, stop, begin, v, each,
            _lines(us), _lines(shared_tops), _lines(shared_totals), SUMS, BITS, BYTES, ROOM, FEW,
            DIM, DIMS,
        )  # fmt: skip
    block = begin + gl.arange(0, GROUP, gl.SliceLayout(1, SUMS))
    head = gl.arange(0, ROWS, gl.SliceLayout(0, SUMS))
    is_own = (block >= first) & (block < stop)
    mass = middles * factor + shared_tops.load(SUMS)
    mass += _near(shared_totals.load(SUMS), "lg2.approx.f32 $0, $1;")
    mass = gl.where(is_own[:, None], mass, float("-inf"))
    if SOFTMAX:
        gl.store(masses + (at + block)[:, None] * ROWS + head[None, :], mass, mask=is_own[:, None])
        peak = gl.max(mass, axis=0)
        total = gl.where(is_own[:, None], _exp2(mass - peak[None, :]), 0.0)
        if cuda_capability_geq(9, 0):
            cuda.gdc_launch_dependents()
        place = (pair * parts + part) * ROWS + head
        gl.store(maxima + place, peak)
        gl.store(sums + place, gl.sum(total, axis=0))
    else:
        best = gl.sum(gl.where((head < HEADS)[None, :], mass, 0.0), axis=1) * _LN_2
        is_own = (block >= first) & (block < first + BLOCKS) & (block < num_blocks)
        gl.store(masses + at + block, best, mask=is_own)


def fits_integers(query_BHTD: Tensor, codes_BGNCD: Tensor) -> bool:
    """Whether products of integers score such queries: by dtype, sizes and device.

    Queries of 16 bits, at most 16 of a KV head; channels in runs of 16, at most 256.
    """
    groups, dim = codes_BGNCD.shape[1], codes_BGNCD.shape[4]
    if interpreting() or query_BHTD.dtype not in (torch.bfloat16, torch.float16):
        return False
    fits = query_BHTD.shape[1] // groups <= _MOST_ROWS and dim % 16 == 0 and dim <= _MOST_DIMS
    return fits and _has_integers(query_BHTD.device)


def _has_integers(device: torch.device) -> bool:
    """Whether the matrix unit multiplies integers as asked: Ampere and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class _Split(NamedTuple):
    """How the blocks of a sequence and group are shared out; by shapes alone.

    Attributes:
        parts: Programs.
        blocks: Of each program.
        rows: Query heads, with room for a product.
    """

    parts: int
    blocks: int
    rows: int

    @classmethod
    def of(cls, query: Tensor, codes: Tensor) -> _Split:
        batch, groups, num_blocks = codes.shape[:3]
        wanted = batch * groups * num_blocks // _PROGRAMS
        blocks = min(max(1 << max(wanted.bit_length() - 1, 0), _FEWEST_BLOCKS), _GROUP)
        rows = 8 if query.shape[1] // groups <= 8 else _MOST_ROWS
        return cls(triton.cdiv(num_blocks, blocks), blocks, rows)


def integer_parts(query_BHTD: Tensor, codes_BGNCD: Tensor) -> tuple[int, int]:
    """Return how many programs share out the blocks of a KV head, and the rows of a mass."""
    split = _Split.of(query_BHTD, codes_BGNCD)
    return split.parts, split.rows


def integer_masses(
    query_BHTD: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    factor: float,
    out: tuple[Tensor, Tensor, Tensor],
    *,
    softmax: bool,
) -> None:
    """Write masses, and of each part the largest and the sum: see `low_bit_score.py`.

    Args:
        query_BHTD: Queries or Forecasts, T = 1.
        tensors: Codes, spans, bases and the open block's keys.
        lengths_B: [B] int32, tokens of each sequence.
        factor: Of a logit, to the power of two.
        out: Masses [B * G, N, rows], maxima and sums [B * G, parts, rows], float32.
        softmax: Whether it is so; else masses are a Forecast's scores [B, G, N].
    """
    codes = tensors[0]
    batch, groups, num_blocks, num_bytes, dim = codes.shape
    parts, blocks, rows = _Split.of(query_BHTD, codes)
    query, q_row, q_head = rows_of(query_BHTD)
    room = power_of_two(num_bytes, 16 if rows == 8 else 8)
    dims = power_of_two(dim, 64)
    options: dict[str, Any] = {"num_warps": 1}
    if room * dims <= _FEW_CODES:
        options["maxnreg"] = _REGISTERS
    launch(_integer_masses, (batch * groups, parts))(
        query, *tensors[:3], lengths_B, *out, factor, q_row, q_head, groups, num_blocks, parts,
        query.shape[1] // groups, rows, tensors[3].shape[2], num_bytes, room, blocks, _GROUP, dim,
        dims, softmax, **options,
    )  # fmt: skip
