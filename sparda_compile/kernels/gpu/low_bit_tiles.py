"""What programs that score a prompt's tokens by low-bit keys share: keys, and products with them.

    keys     k' of full blocks, in the dtype of queries: unpacked once for all tokens
    dots     q . k' of the tokens of some blocks; query vectors are the rows
    masses   log2 sum_t 2^(q . k'[t] * factor) of a block, piece by piece

A mass has the same bits wherever its block lies in a tile, and whatever the other blocks are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.launch import (
    as_written,
    interpreting,
    launch,
    power_of_two,
    shared_bytes,
)
from sparda_compile.kernels.gpu.score_tiles import first_scored
from sparda_compile.kernels.gpu.staying import write_block
from sparda_compile.kernels.workspace import most_vectors, score_columns

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.asked import Asked

__all__ = ["Form", "add_dots", "block_dots", "unpacked_keys"]

# Keys of a product: of as many blocks as they hold, or of one, piece by piece.
_KEYS: Final = 64
_MOST_STAGES: Final = 3
_NUMBERS_OF_A_WARP: Final = 1024
# What a program of an H200 may have: where nobody can be asked.
_SHARED: Final = 227 << 10
# That sums between threads take of it.
_SUMS: Final = 8 << 10


@triton.jit(do_not_specialize=["num_keyed"])
def _unpack_keys(
    codes, spans, bases, lengths, keys, groups, num_blocks, num_keyed,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    BITS: tl.constexpr, NEW: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    each, pair = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + pair // groups)
    block = (first_scored(length, SIZE) if NEW else length * 0) + each
    if block < num_blocks:
        place = pair.to(tl.int64) * num_blocks + block
        target = keys + (pair.to(tl.int64) * num_keyed + each) * (SIZE * DIM)
        write_block(
            place, codes, spans, bases, keys, target, SIZE, SLOTS, DIM, DIMS, BITS, INTERPRETED
        )


@triton.jit
def block_dots(  # noqa: ANN201 - a part of kernels
    vectors, keys_at, block, slot, stop,
    SIZE: tl.constexpr, SPAN: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return q . k' of some tokens of blocks; -inf where a block has no such token."""
    dims, is_token = tl.arange(0, DIMS), slot < SIZE
    mask = ((block < stop) & is_token)[:, None] & (dims < DIM)[None, :]
    at = keys_at + (block * SIZE + slot).to(tl.int64)[:, None] * DIM + dims[None, :]
    keys = tl.load(at, mask=mask, other=0.0)
    if INTERPRETED:
        keys = keys.to(tl.float32)
    dots = tl.dot(vectors, tl.trans(keys), input_precision="ieee")
    if SIZE % SPAN != 0:
        dots = tl.where(is_token[None, :], dots, float("-inf"))
    return dots


@triton.jit
def add_dots(dots, most, mass, factor):  # noqa: ANN201 - a part of kernels
    """Add dots [columns, blocks * tokens] to the masses of blocks; returns the largest, and sums.

    A mass is `most` + log2 of the sum.
    """
    COLUMNS: tl.constexpr = most.shape[0]
    BLOCKS: tl.constexpr = most.shape[1]
    dots = tl.reshape(dots, [COLUMNS, BLOCKS, dots.shape[1] // BLOCKS])
    above = tl.maximum(most, tl.max(dots, axis=2) * factor)
    each = tl.exp2(dots * factor - above[:, :, None])
    return above, mass * tl.exp2(most - above) + tl.sum(each, axis=2)


class Form(NamedTuple):
    """What products are made of; by shapes alone.

    Attributes:
        room: Vectors of one token, a power of two.
        columns: Vectors of a program.
        dims: Numbers of a vector, a power of two.
        span: Tokens of each block of a tile of keys.
        blocks: Of a tile of keys.
        stages: Tiles of keys that are read at once.
    """

    room: int
    columns: int
    dims: int
    span: int
    blocks: int
    stages: int

    @classmethod
    def of(cls, query: Tensor, groups: int, size: int, tokens: int | None = None) -> Form:
        """Return that of queries [B, H, T, D] and blocks of `size` tokens.

        Args:
            query: Queries.
            groups: KV heads.
            size: P.
            tokens: The most of a program; None for as many as its vectors are.
        """
        room, dims = power_of_two(query.shape[1] // groups), power_of_two(query.shape[3], 16)
        itemsize = query.element_size()
        columns = score_columns(room, dims, itemsize)
        if tokens is not None:
            columns = max(min(columns, tokens * room), 16)
        # Numbers of 32 bits are multiplied by threads, which hold what they multiply.
        keys = min(_KEYS, most_vectors(dims, itemsize)) // (2 if itemsize == 4 else 1)
        keys = max(keys, 16)
        span = min(power_of_two(size), keys)
        free = _SHARED if query.device.type != "cuda" else shared_bytes(query.device)
        free -= columns * dims * itemsize + _SUMS
        stages = max(min(_MOST_STAGES, free // (keys * dims * itemsize)), 1)
        return cls(room, columns, dims, span, keys // span, stages)


def unpacked_keys(asked: Asked, num_blocks: int, *, is_new: bool = False) -> Tensor:
    """Return k' [pairs, n, P, D] of the first n blocks that are scored, in the dtype of spans.

    What is in a block that is not full is any number.
    """
    codes, span, base = asked.tensors[:3]
    batch, groups, all_blocks, num_bytes, dim = codes.shape
    size = asked.geometry.block_size
    slots, dims = power_of_two(size), power_of_two(dim)
    keys = span.new_empty(batch * groups, num_blocks, size, dim)
    launch(_unpack_keys, (num_blocks, batch * groups))(
        codes, span, base, asked.lengths, keys, groups, all_blocks, num_blocks, size, slots, dim,
        dims, 8 * num_bytes // size, is_new, interpreting(),
        num_warps=min(max(slots * dims // _NUMBERS_OF_A_WARP, 1), 16), **as_written(),
    )  # fmt: skip
    return keys
