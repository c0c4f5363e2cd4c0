"""What kernels of packed blocks share: what they are compiled for, and where a stored run has what.

`packed.py` gathers and unpacks, `packed_store.py` packs and stores. A format gives two functions:

    encode(x, inside, AXIS)             codes of a tile [P, D], int32, and two numbers for each line
                                        along AXIS; x is 0 where it is not finite, or not inside
    decode(codes, first, last, AXIS)    values, given those numbers along the same axis

AXIS is 0 for keys and 1 for values. Of a line that has one number, `first` and `last` are the same.

Each product and sum rounds by itself, so that what is written to a page when a block fills is what
the gather makes of the stored block.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import triton
import triton.language as tl

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.formats.staying import KEY_BITS
from sparda_compile.kernels.gpu.launch import interpreting, power_of_two
from sparda_compile.registry import KV_FORMATS

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Form", "codes_at", "functions_of", "rounded", "scales_at"]

# Bytes of codes that a program of a gather has at once: it reads one such tile while it writes the
# one before. Measured in whole steps of 16 sequences, half and nine tenths of the blocks resident:
# `benchmarks/results/2026-11-30-h200-kv-formats.json`.
_TILE_BYTES: Final = 4096
# Codes of 8 bits that are read as one number.
_WORD: Final = 4
_ELEMENTS_OF_A_WARP: Final = 1024
_MOST_WARPS: Final = 16


class Form(NamedTuple):
    """What kernels are compiled for: sizes of a block and of its run, and the codes.

    `scales` are the numbers of a channel of keys and of a token of values. `cuts` says that a cast
    to bfloat16 does not round, as that of the interpreter. `kept` is the bits in which keys stay on
    the device, 0 where they are stored.
    """

    size: int
    slots: int
    dim: int
    dims: int
    run: int
    bits: int
    scales: tuple[int, int]
    cuts: bool
    kept: int

    @classmethod
    def of(cls, pages: Tensor, kv_format: str) -> Form:
        """Return that of pages [B, G, C, 2, P, D] and a format."""
        found, (size, dim) = KV_FORMATS[kv_format], pages.shape[4:]
        if dim % _WORD:
            raise UnsupportedInputError(
                f"kv_format={kv_format!r} has kernels for head dims that are multiples of {_WORD}, "
                f"and the model's is {dim}; use kv_format='model'."
            )
        run = found.num_bytes(size, dim, pages.dtype)
        sides = (size, power_of_two(size), dim, power_of_two(dim))
        kept = 0 if found.summary is None else KEY_BITS
        return cls(*sides, run, found.code_bits, found.num_scales, interpreting(), kept)

    @property
    def num_warps(self) -> int:
        """Warps of a program that has the keys or the values of a block."""
        return min(max(self.slots * self.dims // _ELEMENTS_OF_A_WARP, 1), _MOST_WARPS)

    @property
    def tokens(self) -> int:
        """Tokens whose keys or values a program of a gather has at once."""
        fitting = power_of_two(_TILE_BYTES * 8 // (self.dims * self.bits))
        return min(max(fitting, 8 // self.bits), self.slots)

    @property
    def gather_warps(self) -> int:
        """Warps of a program of a gather."""
        return min(max(self.tokens * self.dims // _ELEMENTS_OF_A_WARP, 1), _MOST_WARPS)


def functions_of(kv_format: str) -> Any:
    """Return the module with the functions of a format.

    Raises:
        UnsupportedInputError: If it has none.
    """
    module = KV_FORMATS[kv_format].kernels
    if module is None:
        raise UnsupportedInputError(
            f"kv_format={kv_format!r} has no kernels, so it works on a CPU alone; use one of "
            f"{', '.join(found.name for found in KV_FORMATS if found.kernels)}, or 'model'."
        )
    return importlib.import_module(module)


@triton.jit
def _at(run, AFTER: tl.constexpr, element: tl.constexpr):
    """Return the address that is AFTER bytes behind the beginning of a run, of elements."""
    # Of the pointer to the run, then moved: the compiler forgets it of a sum that becomes a pointer
    # and reads byte by byte.
    begin = tl.multiple_of(run.to(tl.pointer_type(element)), 16)
    return begin + AFTER * 8 // element.primitive_bitwidth


@triton.jit
def scales_at(  # noqa: ANN201 - a part of kernels
    run, pages, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr,
    SCALES: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """Return where the scales of the keys or values of a stored block are."""
    WIDTH: tl.constexpr = pages.dtype.element_ty.primitive_bitwidth // 8
    HALVES: tl.constexpr = 1 if KEPT else 2
    CODES: tl.constexpr = HALVES * SIZE * DIM * BITS // 8
    BEFORE: tl.constexpr = 0 if KEYS else SCALES[0] * DIM * WIDTH
    return _at(run, CODES + BEFORE, pages.dtype.element_ty)


@triton.jit
def codes_at(  # noqa: ANN201 - a part of kernels
    run, KEYS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """Return where the codes of the keys or values of a stored block are."""
    IS_FIRST: tl.constexpr = KEYS | (KEPT > 0)
    return _at(run, 0 if IS_FIRST else SIZE * DIM * BITS // 8, tl.uint8)


@triton.jit
def rounded(values, pages, CUTS: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Return float32 values in the dtype of pages, each the nearest one; ties go to the even."""
    if CUTS & (pages.dtype.element_ty == tl.bfloat16):
        bits = values.to(tl.int32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(values == values, near, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return values.to(pages.dtype.element_ty)
