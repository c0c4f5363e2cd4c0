"""Scores of every block by keys in few bits: unpacked, multiplied and summed in one pass.

    masses    per block and head log2 sum_t 2^(q . k' * factor), over a part of the blocks;
              per part and head the largest, and the sum of 2^(mass - largest)
    scores    per block sum_h 2^(mass - log2 of all), for a query; a Forecast's are its masses

Queries of 16 bits are multiplied as integers (`low_bit_integers.py`), where these fit. Here masses
are of other queries: a tile is some bytes of a channel's codes, the bytes of a few blocks one below
the other, beside all channels. Its first codes are as many keys, its second ones others, and so on:
which token of a block is which makes no difference to a sum.

Floor: codes, spans and bases are read once, (bits / 8 * P + 2 * itemsize) * D bytes a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl

from sparda_compile.kernels.gpu.early import await_last, begin_next, launch_early
from sparda_compile.kernels.gpu.launch import (
    interpreting,
    launch,
    power_of_two,
    rows_of,
)
from sparda_compile.kernels.gpu.low_bit_integers import (
    fits_integers,
    integer_masses,
    integer_parts,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["score_low_bit", "score_low_bit_forecast"]

# Blocks of a tile, and the fewest bytes of a channel in one.
_TILE_BLOCKS: Final = 4
_FEWEST_BYTES: Final = 32
# Programs that an H200 has room for at once, four of each multiprocessor; and tiles of one program.
_PROGRAMS: Final = 512
_MOST_TILES: Final = 16
# Of the second kernel: blocks of a program, and parts that are read at once.
_BLOCKS: Final = 64
_MOST_BLOCKS: Final = 256
_PARTS: Final = 256
_LOG2_E: Final = math.log2(math.e)
_LN_2: Final = tl.constexpr(math.log(2))


@triton.jit
def _key(codes, span, base, i, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return the keys of the codes that stand in place i of each byte."""
    code = (codes.to(tl.int32) >> (i * BITS)) & ((1 << BITS) - 1)
    factor = 1.0 + code.to(tl.float32) * (1.0 / (1 << BITS))
    return (factor * span.to(tl.float32) + base.to(tl.float32)).to(KIND)


@triton.jit
def _for_bytes(each, ROOM: tl.constexpr):
    """Repeat the channels of each block for each of its bytes."""
    repeated = tl.broadcast_to(each[:, None, :], [each.shape[0], ROOM, each.shape[1]])
    return tl.reshape(repeated, [each.shape[0] * ROOM, each.shape[1]])


@triton.jit
def _dots(q, codes, span, base, i, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return q . k' of the keys in place i of each byte, [ROWS, bytes]."""
    keys = _key(codes, span, base, i, BITS, KIND)
    return tl.dot(q, tl.trans(keys), input_precision="ieee")


@triton.jit
def _block_masses(
    q, codes, span, base, is_byte, factor, BLOCKS: tl.constexpr, ROOM: tl.constexpr,
    BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Return log2 of the sum of exponentials of each block, [ROWS, BLOCKS].

    Products are reduced by the largest, byte by byte, before they are exponentiated, so that none
    is scaled twice.
    """
    ROWS: tl.constexpr = q.shape[0]
    one = _dots(q, codes, span, base, 0, BITS, KIND)
    two = _dots(q, codes, span, base, 1, BITS, KIND)
    most = tl.maximum(one, two)
    if BITS == 2:
        three = _dots(q, codes, span, base, 2, BITS, KIND)
        four = _dots(q, codes, span, base, 3, BITS, KIND)
        most = tl.maximum(most, tl.maximum(three, four)) * factor
        mass = tl.exp2(one * factor - most) + tl.exp2(two * factor - most)
        mass += tl.exp2(three * factor - most) + tl.exp2(four * factor - most)
    else:
        most = most * factor
        mass = tl.exp2(one * factor - most) + tl.exp2(two * factor - most)
    # A byte that a block lacks counts for nothing.
    most = tl.where(is_byte[None, :], most, float("-inf"))
    most = tl.reshape(most, [ROWS, BLOCKS, ROOM])
    above = tl.max(most, axis=2)
    mass = tl.reshape(mass, [ROWS, BLOCKS, ROOM])
    return above + tl.log2(tl.sum(mass * tl.exp2(most - above[:, :, None]), axis=2))


@triton.jit(do_not_specialize=["parts", "tiles"])
def _low_bit_masses(
    query, codes, spans, bases, lengths, masses, maxima, sums, factor, q_row, q_head, groups,
    num_blocks, parts, tiles,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BYTES: tl.constexpr,
    ROOM: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    SOFTMAX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    full = tl.load(lengths + row) // SIZE
    head = tl.arange(0, ROWS)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    BITS: tl.constexpr = 8 * BYTES // SIZE
    KIND: tl.constexpr = tl.float32 if INTERPRETED else query.dtype.element_ty
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    asked = query + row * q_row + (group * HEADS + head)[:, None] * q_head + dims[None, :]
    q = tl.load(asked, mask=(head < HEADS)[:, None] & is_dim[None, :], other=0.0).to(KIND)
    place = tl.arange(0, BLOCKS * ROOM)
    byte = place % ROOM
    first = part * tiles * BLOCKS
    scored = tl.minimum(tl.cdiv(tl.maximum(full - first, 0), BLOCKS), tiles)
    for tile in range(scored):
        start = first + tile * BLOCKS
        block = start + place // ROOM
        exists = ((block < full) & (byte < BYTES))[:, None] & is_dim[None, :]
        number = pair.to(tl.int64) * num_blocks + block
        packed = tl.load(
            codes + (number * BYTES + byte)[:, None] * DIM + dims[None, :], mask=exists, other=0
        )
        each = start + tl.arange(0, BLOCKS)
        channel = (pair.to(tl.int64) * num_blocks + each)[:, None] * DIM + dims[None, :]
        mask = (each < full)[:, None] & is_dim[None, :]
        span = _for_bytes(tl.load(spans + channel, mask=mask, other=0.0).to(KIND), ROOM)
        base = _for_bytes(tl.load(bases + channel, mask=mask, other=0.0).to(KIND), ROOM)
        mass = _block_masses(q, packed, span, base, byte < BYTES, factor, BLOCKS, ROOM, BITS, KIND)
        mass = tl.where((each < full)[None, :], mass, float("-inf"))
        if SOFTMAX:
            kept = (pair.to(tl.int64) * num_blocks + each)[None, :] * ROWS + head[:, None]
            tl.store(masses + kept, mass, mask=(each < full)[None, :])
            above = tl.maximum(peak, tl.max(mass, axis=1))
            mass = tl.sum(tl.exp2(mass - above[:, None]), axis=1)
            total = total * tl.exp2(peak - above) + mass
            peak = above
        else:
            best = tl.sum(tl.where((head < HEADS)[:, None], mass, 0.0), axis=0)
            tl.store(masses + pair * num_blocks + each, best * _LN_2, mask=each < num_blocks)
    if SOFTMAX:
        begin_next(INTERPRETED)
        place = (pair * parts + part) * ROWS + head
        tl.store(maxima + place, peak)
        tl.store(sums + place, total)
    else:
        for tile in range(scored, tiles):
            each = first + tile * BLOCKS + tl.arange(0, BLOCKS)
            nothing = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
            tl.store(masses + pair * num_blocks + each, nothing, mask=each < num_blocks)


@triton.jit
def _low_bit_scores(
    masses, maxima, sums, lengths, scores, groups, num_blocks, parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    await_last(INTERPRETED)
    full = tl.load(lengths + pair // groups) // SIZE
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    score = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    if part * BLOCKS < full:
        head, each = tl.arange(0, ROWS), tl.arange(0, PARTS)
        peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([ROWS], dtype=tl.float32)
        for begin in range(0, parts, PARTS):
            here = (begin + each)[:, None]
            place = (pair * parts + here) * ROWS + head[None, :]
            peaks = tl.load(maxima + place, mask=here < parts, other=float("-inf"))
            totals = tl.load(sums + place, mask=here < parts, other=0.0)
            above = tl.maximum(peak, tl.max(peaks, axis=0))
            # A part without a full block has neither: the first one has both.
            total = total * tl.exp2(peak - above)
            total += tl.sum(totals * tl.exp2(peaks - above[None, :]), axis=0)
            peak = above
        all_of_it = peak + tl.log2(total)
        kept = (pair.to(tl.int64) * num_blocks + block)[:, None] * ROWS + head[None, :]
        mask = (block < full)[:, None] & (head < HEADS)[None, :]
        mass = tl.load(masses + kept, mask=mask, other=float("-inf"))
        share = tl.where(mask, tl.exp2(mass - all_of_it[None, :]), 0.0)
        score = tl.where(block < full, tl.sum(share, axis=1), float("-inf"))
    tl.store(scores + pair * num_blocks + block, score, mask=block < num_blocks)


class _Split(NamedTuple):
    """How the blocks of a sequence and group are shared out; by shapes alone.

    Attributes:
        parts: Programs.
        tiles: Of each program.
        rows: Query heads, with room for a product.
        room: Bytes of a channel and block, with room for a power of two.
        blocks: Of a tile.
    """

    parts: int
    tiles: int
    rows: int
    room: int
    blocks: int

    @classmethod
    def of(cls, query: Tensor, codes: Tensor) -> _Split:
        batch, groups, num_blocks, num_bytes, _ = codes.shape
        room = power_of_two(num_bytes)
        blocks = max(_TILE_BLOCKS, _FEWEST_BYTES // room)
        num_tiles = triton.cdiv(num_blocks, blocks)
        wanted = batch * groups * num_tiles // _PROGRAMS
        tiles = min(1 << max(wanted.bit_length() - 1, 0), _MOST_TILES)
        rows = power_of_two(query.shape[1] // groups, 16)
        return cls(triton.cdiv(num_tiles, tiles), tiles, rows, room, blocks)


def _parts(query: Tensor, codes: Tensor) -> tuple[int, int]:
    """Return how many programs share out the blocks of a KV head, and the rows of a mass."""
    if fits_integers(query, codes):
        return integer_parts(query, codes)
    split = _Split.of(query, codes)
    return split.parts, split.rows


def _masses(
    query_BHTD: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    factor: float,
    out: tuple[Tensor, Tensor, Tensor],
    *,
    softmax: bool,
) -> None:
    """Launch the first kernel; `out` has masses, and of parts the maxima and sums."""
    codes = tensors[0]
    if fits_integers(query_BHTD, codes):
        integer_masses(query_BHTD, tensors, lengths_B, factor, out, softmax=softmax)
        return
    batch, groups, num_blocks, num_bytes, dim = codes.shape
    split = _Split.of(query_BHTD, codes)
    query, q_row, q_head = rows_of(query_BHTD)
    launch(_low_bit_masses, (batch * groups, split.parts))(
        query, *tensors[:3], lengths_B, *out, factor, q_row, q_head, groups, num_blocks,
        split.parts, split.tiles, query.shape[1] // groups, split.rows, tensors[3].shape[2],
        num_bytes, split.room, split.blocks, dim, power_of_two(dim, 16), softmax, interpreting(),
        num_warps=4,
    )  # fmt: skip


def score_low_bit(
    query_BH1D: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    scores_BGN: Tensor,
) -> None:
    """Score by a query; arguments as those of `score.SCORE_KERNELS`."""
    batch, groups, num_blocks = tensors[0].shape[:3]
    pairs = batch * groups
    parts, rows = _parts(query_BH1D, tensors[0])
    new = lengths_B.new_empty
    masses = new((pairs, num_blocks, rows), dtype=torch.float32)
    maxima, sums = (new((pairs, parts, rows), dtype=torch.float32) for _ in range(2))
    out = (masses, maxima, sums)
    _masses(query_BH1D, tensors, lengths_B, scale * _LOG2_E, out, softmax=True)
    # Each program reads what all parts have: of many parts, fewer programs.
    blocks = _BLOCKS if parts <= 2 * _PARTS else _MOST_BLOCKS
    launch(_low_bit_scores, (pairs, triton.cdiv(num_blocks, blocks)))(
        *out, lengths_B, scores_BGN, groups, num_blocks, parts, query_BH1D.shape[1] // groups,
        rows, min(power_of_two(parts), _PARTS), geometry.block_size, blocks, interpreting(),
        num_warps=4, **launch_early(),
    )  # fmt: skip


def score_low_bit_forecast(
    query_BG1D: Tensor,
    tensors: Sequence[Tensor],
    lengths_B: Tensor,
    scale: float,
    geometry: Geometry,
    scores_BGN: Tensor,
) -> None:
    """Score by a Forecast; arguments as those of `score.SCORE_KERNELS`."""
    del geometry
    out = (scores_BGN,) * 3
    _masses(query_BG1D, tensors, lengths_B, scale * _LOG2_E, out, softmax=False)
