"""Scores of every block by keys in few bits: unpacked, multiplied and summed in one pass.

    masses    per block and head log2 sum_t 2^(q . k' * factor), over a part of the blocks;
              per part and head the largest, and the sum of 2^(mass - largest)
    scores    per block sum_h 2^(mass - log2 of all), for a query; a Forecast's are its masses

A tile is some words of a channel's codes, the words of a few blocks one below the other, beside all
channels. Its first codes are as many keys, its second ones others, and so on: which token of a
block is which makes no difference to a sum. A code becomes a number by being put behind the
exponent of 1.0, which takes a third of what a conversion does.

Floor: codes, spans and bases are read once, (bits / 8 * P + 2 * itemsize) * D bytes a block.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from sparda_compile.kernels.gpu.launch import (
    interpreting,
    launch,
    launch_early,
    power_of_two,
    rows_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparda_compile.selectors import Geometry

__all__ = ["score_low_bit", "score_low_bit_forecast"]

# Blocks of a tile, and the fewest words of a channel in one. Measured on one H200: 8 blocks take 3
# and 5% longer for sixteen sequences, in 2 and 4 bits, and 2 blocks as long and 5% longer;
# `benchmarks/results/2026-11-30-h200-low-bit-tiles.json`. With few heads a tile has 64 words; a
# warp alone, with 16, takes .94 to 1 of that (2026-12-01-h200-low-bit-columns.json).
_TILE_BLOCKS: Final = 4
_FEWEST_WORDS: Final = 32
# Programs that an H200 has room for at once, four of each multiprocessor; and tiles of one program.
_PROGRAMS: Final = 512
_MOST_TILES: Final = 16
_WARPS: Final = 4
# Blocks of a program of the second kernel.
_BLOCKS: Final = 64
_LOG2_E: Final = math.log2(math.e)
_LN_2: Final = tl.constexpr(math.log(2))


# Two channels of a word at once: rotate the codes wanted to the top of a mantissa, put the exponent
# of 1.0 before them, and multiply and add as pairs. By mantissa: bfloat16 7 bits, float16 10.
_UNPACK: Final = (
    "{{ .reg .b32 t; shf.r.wrap.b32 t, $1, $1, $2; lop3.b32 t, t, {mask}, {one}, 0xEA; "
    "fma.rn.{kind} $0, t, $4, $5; }}"
)
_BFLOAT_2: Final = tl.constexpr(_UNPACK.format(mask="0x00600060", one="0x3F803F80", kind="bf16x2"))
_BFLOAT_4: Final = tl.constexpr(_UNPACK.format(mask="0x00780078", one="0x3F803F80", kind="bf16x2"))
_HALF_2: Final = tl.constexpr(_UNPACK.format(mask="0x03000300", one="0x3C003C00", kind="f16x2"))
_HALF_4: Final = tl.constexpr(_UNPACK.format(mask="0x03C003C0", one="0x3C003C00", kind="f16x2"))


@triton.jit
def _key(words, span, base, i, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return the keys of the codes that stand in place i of each word."""
    if KIND.is_fp32():
        code = (words.to(tl.int32) >> (i * BITS)) & ((1 << BITS) - 1)
        return (1.0 + code.to(tl.float32) * (1.0 / (1 << BITS))) * span + base
    # The first bit of the code goes to the top of the mantissa.
    MANTISSA: tl.constexpr = 7 if KIND.is_bf16() else 10
    HALF: tl.constexpr = _HALF_2 if BITS == 2 else _HALF_4
    BFLOAT: tl.constexpr = _BFLOAT_2 if BITS == 2 else _BFLOAT_4
    UNPACK: tl.constexpr = BFLOAT if KIND.is_bf16() else HALF
    operands = [words, (i + 1) * BITS - MANTISSA, span, base]
    return tl.inline_asm_elementwise(
        UNPACK, "=r,r,r,r,r,r", operands, dtype=span.dtype, is_pure=True, pack=2
    )


@triton.jit
def _for_words(each, ROOM: tl.constexpr):
    """Repeat the channels of each block for each of its words."""
    repeated = tl.broadcast_to(each[:, None, :], [each.shape[0], ROOM, each.shape[1]])
    return tl.reshape(repeated, [each.shape[0] * ROOM, each.shape[1]])


@triton.jit
def _dots(q, words, span, base, i, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return q . k' of the keys in place i of each word, [ROWS, words].

    A product of the matrix unit has 16 rows and 8 columns: few heads are its columns.
    """
    keys = _key(words, span, base, i, BITS, KIND)
    if q.shape[0] < 16:
        return tl.trans(tl.dot(keys, tl.trans(q), input_precision="ieee"))
    return tl.dot(q, tl.trans(keys), input_precision="ieee")


@triton.jit
def _four_dots(q, words, span, base, i, BITS: tl.constexpr, KIND: tl.constexpr):
    """Return q . k' of four places of each word, and the largest."""
    one = _dots(q, words, span, base, i, BITS, KIND)
    two = _dots(q, words, span, base, i + 1, BITS, KIND)
    three = _dots(q, words, span, base, i + 2, BITS, KIND)
    four = _dots(q, words, span, base, i + 3, BITS, KIND)
    largest = tl.maximum(tl.maximum(one, two), tl.maximum(three, four))
    return one, two, three, four, largest


@triton.jit
def _four_masses(one, two, three, four, factor, peak):
    """Return the sum of 2^(factor * x - peak) of four products."""
    pair = tl.exp2(one * factor - peak) + tl.exp2(two * factor - peak)
    return pair + (tl.exp2(three * factor - peak) + tl.exp2(four * factor - peak))


@triton.jit
def _block_masses(
    q, words, span, base, is_word, factor,
    BLOCKS: tl.constexpr, ROOM: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Return log2 sum_t 2^(q . k' * factor) of each block of a tile, [ROWS, BLOCKS].

    All products of a word are there before one is exponentiated, so that none is scaled twice.
    """
    ROWS: tl.constexpr = q.shape[0]
    one, two, three, four, most = _four_dots(q, words, span, base, 0, BITS, KIND)
    if BITS == 2:
        five, six, seven, eight, other = _four_dots(q, words, span, base, 4, BITS, KIND)
        most = tl.maximum(most, other) * factor
        mass = _four_masses(one, two, three, four, factor, most)
        mass += _four_masses(five, six, seven, eight, factor, most)
    else:
        most = most * factor
        mass = _four_masses(one, two, three, four, factor, most)
    # A word that a block lacks counts for nothing.
    most = tl.where(is_word[None, :], most, float("-inf"))
    most = tl.reshape(most, [ROWS, BLOCKS, ROOM])
    above = tl.max(most, axis=2)
    mass = tl.reshape(mass, [ROWS, BLOCKS, ROOM])
    return above + tl.log2(tl.sum(mass * tl.exp2(most - above[:, :, None]), axis=2))


@triton.jit(do_not_specialize=["parts", "tiles"])
def _low_bit_masses(
    query, codes, spans, bases, lengths, masses, maxima, sums, factor, q_row, q_head, groups,
    num_blocks, parts, tiles,
    HEADS: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr,
    ROOM: tl.constexpr, BLOCKS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    SOFTMAX: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    pair, part = tl.program_id(0), tl.program_id(1)
    row, group = pair // groups, pair % groups
    full = tl.load(lengths + row) // SIZE
    head = tl.arange(0, ROWS)
    peak = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    BITS: tl.constexpr = 16 * WORDS // SIZE
    KIND: tl.constexpr = tl.float32 if INTERPRETED else query.dtype.element_ty
    dims = tl.arange(0, DIMS)
    is_dim = dims < DIM
    asked = query + row * q_row + (group * HEADS + head)[:, None] * q_head + dims[None, :]
    q = tl.load(asked, mask=(head < HEADS)[:, None] & is_dim[None, :], other=0.0).to(KIND)
    place = tl.arange(0, BLOCKS * ROOM)
    word = place % ROOM
    first = part * tiles * BLOCKS
    scored = tl.minimum(tl.cdiv(tl.maximum(full - first, 0), BLOCKS), tiles)
    for tile in range(scored):
        start = first + tile * BLOCKS
        block = start + place // ROOM
        exists = ((block < full) & (word < WORDS))[:, None] & is_dim[None, :]
        number = pair.to(tl.int64) * num_blocks + block
        words = tl.load(
            codes + (number * WORDS + word)[:, None] * DIM + dims[None, :], mask=exists, other=0
        )
        each = start + tl.arange(0, BLOCKS)
        channel = (pair.to(tl.int64) * num_blocks + each)[:, None] * DIM + dims[None, :]
        mask = (each < full)[:, None] & is_dim[None, :]
        span = _for_words(tl.load(spans + channel, mask=mask, other=0.0).to(KIND), ROOM)
        base = _for_words(tl.load(bases + channel, mask=mask, other=0.0).to(KIND), ROOM)
        mass = _block_masses(q, words, span, base, word < WORDS, factor, BLOCKS, ROOM, BITS, KIND)
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
        if not INTERPRETED:
            cuda.gdc_launch_dependents()
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
    if not INTERPRETED:
        cuda.gdc_wait()
    full = tl.load(lengths + pair // groups) // SIZE
    block = part * BLOCKS + tl.arange(0, BLOCKS)
    score = tl.full([BLOCKS], float("-inf"), dtype=tl.float32)
    if part * BLOCKS < full:
        head, each = tl.arange(0, ROWS), tl.arange(0, PARTS)
        place = (pair * parts + each[:, None]) * ROWS + head[None, :]
        peaks = tl.load(maxima + place, mask=each[:, None] < parts, other=float("-inf"))
        totals = tl.load(sums + place, mask=each[:, None] < parts, other=0.0)
        peak = tl.max(peaks, axis=0)
        all_of_it = peak + tl.log2(tl.sum(totals * tl.exp2(peaks - peak[None, :]), axis=0))
        kept = (pair.to(tl.int64) * num_blocks + block)[:, None] * ROWS + head[None, :]
        mask = (block < full)[:, None] & (head < HEADS)[None, :]
        mass = tl.load(masses + kept, mask=mask, other=float("-inf"))
        share = tl.where(mask, tl.exp2(mass - all_of_it[None, :]), 0.0)
        score = tl.where(block < full, tl.sum(share, axis=1), float("-inf"))
    tl.store(scores + pair * num_blocks + block, score, mask=block < num_blocks)


def tile_blocks(room: int, rows: int) -> int:
    """Return how many blocks a tile has, each with room for so many words of a channel.

    Where keys are rows of a product, each warp has 16 words.
    """
    return max(_TILE_BLOCKS, (_FEWEST_WORDS if rows >= 16 else 16 * _WARPS) // room)


class _Split(NamedTuple):
    """How the blocks of a sequence and group are shared out; by shapes alone.

    Attributes:
        parts: Programs.
        tiles: Of each program.
        rows: Query heads, with room for a product.
        room: Words of a channel and block, with room for a power of two.
    """

    parts: int
    tiles: int
    rows: int
    room: int

    @classmethod
    def of(cls, query: Tensor, codes: Tensor) -> _Split:
        batch, groups, num_blocks, words, _ = codes.shape
        room = power_of_two(words)
        rows = power_of_two(query.shape[1] // groups, 8)
        num_tiles = triton.cdiv(num_blocks, tile_blocks(room, rows))
        wanted = batch * groups * num_tiles // _PROGRAMS
        tiles = min(1 << max(wanted.bit_length() - 1, 0), _MOST_TILES)
        return cls(triton.cdiv(num_tiles, tiles), tiles, rows, room)


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
    batch, groups, num_blocks, words, dim = codes.shape
    split = _Split.of(query_BHTD, codes)
    query, q_row, q_head = rows_of(query_BHTD)
    launch(_low_bit_masses, (batch * groups, split.parts))(
        query, *tensors[:3], lengths_B, *out, factor, q_row, q_head, groups, num_blocks,
        split.parts, split.tiles, query.shape[1] // groups, split.rows, tensors[3].shape[2], words,
        split.room, tile_blocks(split.room, split.rows), dim, power_of_two(dim, 16), softmax,
        interpreting(), num_warps=_WARPS,
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
    parts, _, rows, _ = _Split.of(query_BH1D, tensors[0])
    new = lengths_B.new_empty
    masses = new((pairs, num_blocks, rows), dtype=torch.float32)
    maxima, sums = (new((pairs, parts, rows), dtype=torch.float32) for _ in range(2))
    out = (masses, maxima, sums)
    _masses(query_BH1D, tensors, lengths_B, scale * _LOG2_E, out, softmax=True)
    launch(_low_bit_scores, (pairs, triton.cdiv(num_blocks, _BLOCKS)))(
        *out, lengths_B, scores_BGN, groups, num_blocks, parts, query_BH1D.shape[1] // groups,
        rows, power_of_two(parts), geometry.block_size, _BLOCKS, interpreting(), num_warps=4,
        **launch_early(),
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
