"""Tiles of keys and values that attention of a decode step reads: from pages, whatever these hold.

    pages of the model's dtype   keys and values as they lie there
    pages of stored runs         codes and scales, which become numbers of the model's dtype by the
                                 format's own function, that of the gather; the block that is being
                                 written lies in `tail`

Both give the same numbers in tiles of the same shape, and the compiler does not know which were
made of codes: it would sum products of those in another order. So what is computed with them has
the same bits. `kernels/paged.py` says what pages hold, `packed_form.py` what a format gives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from sparda_compile.kernels.gpu.packed_form import Form, codes_at, functions_of, rounded, scales_at
from sparda_compile.state.layout import TAIL_PAGES

if TYPE_CHECKING:
    from torch import Tensor

    from sparda_compile.kernels.paged import Stored

__all__ = ["PageForm", "first_page", "page_size", "pages_of", "read_tile", "tail_at"]

_TAIL_PAGES = tl.constexpr(TAIL_PAGES)


class PageForm(NamedTuple):
    """What `read_tile` is compiled for, its last arguments: how a page has a block.

    `run` is the bytes of a stored run, and 0 for pages of the model's dtype.
    """

    run: int
    bits: int
    scales: tuple[int, int]
    cuts: bool
    decode: Any

    @classmethod
    def of(cls, stored: Stored | None) -> PageForm:
        """Return that of pages, given what goes with them."""
        if stored is None:
            return cls(0, 0, (0, 0), False, None)
        form = Form.of(stored.tail, stored.kv_format)
        decode = functions_of(stored.kv_format).decode
        return cls(form.run, form.bits, form.scales, form.cuts, decode)

    def tile_bytes(self, elements: int, width: int, *, many: bool = False) -> tuple[int, int]:
        """Return the shared memory of tiles: while they are on their way, and as they are used.

        Args:
            elements: Of all tiles.
            width: Bytes of a number of the model's dtype.
            many: Whether a tile is of many blocks: then the one that is being written is read
                ahead, too, and so are scales for each key.
        """
        if not self.run:
            return elements * width, 0
        ahead = width + self.scales[0] * width // 2 if many else 0
        return elements * (1 + ahead), elements * width


def pages_of(pages: Tensor, stored: Stored | None) -> tuple[Tensor, Tensor]:
    """Return what kernels take for pages: these, and `tail`, or anything where there is none."""
    return pages, pages if stored is None else stored.tail


def page_size(pages: Tensor, stored: Stored | None) -> tuple[int, int]:
    """Return P and D of a pool."""
    size, dim = (pages if stored is None else stored.tail).shape[4:]
    return size, dim


@triton.jit
def first_page(  # noqa: ANN201 - a part of kernels
    pages, pair, num_pages, SIZE: tl.constexpr, DIM: tl.constexpr, RUN: tl.constexpr
):  # fmt: skip
    """Return where the pages of a sequence and KV head begin."""
    ELEMENTS: tl.constexpr = RUN if RUN > 0 else 2 * SIZE * DIM
    return pages + pair.to(tl.int64) * num_pages * ELEMENTS


@triton.jit
def _opaque(codes):
    """Return codes, int32, as if nobody knew that they were read as bytes.

    For a dot on tensor cores Triton looks for the narrowest numbers that a tile was loaded as, back
    through what has no effects, and gives each thread as many neighbours of the summed dimension as
    32 bits of them hold (`kWidth`): two of 16 bits, four of 8. That decides which products one
    instruction sums, and so how the sum rounds. An instruction that may have effects ends the
    search. This one is a move between registers, of which nothing is left in the machine's code.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [codes], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _read_run(
    run, tail, token, full, dims, SIZE: tl.constexpr, DIM: tl.constexpr, MANY: tl.constexpr,
    KEYS: tl.constexpr, INTERPRETED: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Return the keys or values of the first `full` tokens of stored runs; 0 for others.

    With MANY, each token has a run of its own. Codes of 4 bits are read once for each of the two
    tokens that share a byte: taken apart in registers, they took more of these than there are.
    """
    PER: tl.constexpr = 8 // BITS
    LINES: tl.constexpr = DIM if KEYS else SIZE
    NUMBERS: tl.constexpr = SCALES[0] if KEYS else SCALES[1]
    codes = codes_at(run, KEYS, SIZE, DIM, BITS, 0)
    scales = scales_at(run, tail, KEYS, SIZE, DIM, BITS, SCALES, 0)
    mask = (token < full)[:, None] & (dims < DIM)[None, :]
    offset = (token // PER * DIM)[:, None] + dims[None, :]
    if MANY:
        code = tl.load(codes[:, None] + offset, mask=mask, other=0).to(tl.int32)
    else:
        code = tl.load(codes + offset, mask=mask, other=0).to(tl.int32)
    if not INTERPRETED:
        code = _opaque(code)
    if PER > 1:
        code = (code >> (token % PER * BITS)[:, None]) & ((1 << BITS) - 1)
    if KEYS:
        if MANY:
            at = scales[:, None] + dims[None, :]
            first = tl.load(at, mask=mask, other=0.0)
            last = tl.load(at + (NUMBERS - 1) * LINES, mask=mask, other=0.0)
        else:
            at = scales + dims
            is_line = dims < tl.where(full > 0, DIM, 0)
            first = tl.load(at, mask=is_line, other=0.0)[None, :]
            last = tl.load(at + (NUMBERS - 1) * LINES, mask=is_line, other=0.0)[None, :]
    else:
        at = scales + token
        first = tl.load(at, mask=token < full, other=0.0)[:, None]
        last = tl.load(at + (NUMBERS - 1) * LINES, mask=token < full, other=0.0)[:, None]
    AXIS: tl.constexpr = 0 if KEYS else 1
    values = DECODE(code, first.to(tl.float32), last.to(tl.float32), AXIS)
    return tl.where(mask, rounded(values, tail, CUTS), 0.0)


@triton.jit
def read_tile(  # noqa: ANN201 - a part of kernels
    pages, tail, block, page, tile, length, dims,
    SIZE: tl.constexpr, ROOM: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr,
    INTERPRETED: tl.constexpr, RUN: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr,
    CUTS: tl.constexpr, DECODE: tl.constexpr,
):  # fmt: skip
    """Return keys and values of a tile, and which of its tokens there are.

    Block and page are numbers, or one for each token where a tile is of many blocks.
    """
    MANY: tl.constexpr = TOKENS > ROOM
    if MANY:
        token = tl.arange(0, TOKENS) % ROOM
    else:
        token = tile % (ROOM // TOKENS) * TOKENS + tl.arange(0, TOKENS)
    seen = token <= tl.where(block >= 0, tl.minimum(length - block * SIZE, SIZE - 1), -1)
    is_dim = (dims < DIM)[None, :]
    offset = token[:, None] * DIM + dims[None, :]
    if RUN > 0:
        current = length // SIZE
        run = pages.to(tl.int64) + page.to(tl.int64) * RUN
        full = tl.where((block >= 0) & (block < current), SIZE, 0)
        keys = _read_run(
            run, tail, token, full, dims, SIZE, DIM, MANY, True, INTERPRETED, BITS, SCALES, CUTS,
            DECODE,
        )  # fmt: skip
        values = _read_run(
            run, tail, token, full, dims, SIZE, DIM, MANY, False, INTERPRETED, BITS, SCALES, CUTS,
            DECODE,
        )  # fmt: skip
        if MANY:
            of_tail = (seen & (block == current))[:, None] & is_dim
            keys = tl.where(of_tail, tl.load(tail + offset, mask=of_tail, other=0.0), keys)
            open_values = tl.load(tail + SIZE * DIM + offset, mask=of_tail, other=0.0)
            values = tl.where(of_tail, open_values, values)
        elif block == current:
            # One tile, or a few, in all turns: no room is kept to read them ahead.
            of_tail = seen[:, None] & is_dim
            keys = tl.load(tail + offset, mask=of_tail, other=0.0)
            values = tl.load(tail + SIZE * DIM + offset, mask=of_tail, other=0.0)
    else:
        if MANY:
            source = pages + page[:, None].to(tl.int64) * (2 * SIZE * DIM) + offset
        else:
            source = pages + page.to(tl.int64) * (2 * SIZE * DIM) + offset
        mask = seen[:, None] & is_dim
        keys = tl.load(source, mask=mask, other=0.0)
        values = tl.load(source + SIZE * DIM, mask=mask, other=0.0)
    if INTERPRETED:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    return keys, values, seen


@triton.jit
def tail_at(tail, pair, SIZE: tl.constexpr, DIM: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return where `tail` begins for a sequence and KV head, with the block being written."""
    return tail + pair.to(tl.int64) * (_TAIL_PAGES * 2 * SIZE * DIM)
