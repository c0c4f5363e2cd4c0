"""What every Triton kernel of this folder shares: sizes of tiles, launches, the interpreter.

A kernel that reads only what the kernel just before it wrote may begin while that one ends: its
launch is then paid for in advance. The first says `gdc_launch_dependents`, the second `gdc_wait`
before it reads anything, and is launched with `launch_early()` (CUDA's programmatic dependent
launch). Both are launched by one function, so that nothing comes between them in the stream.

A kernel that is compiled in several forms whose results must be equal bit for bit is launched with
`as_written()`: else the compiler joins a product with one sum or another as each form suggests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["as_written", "interpreting", "launch_early", "power_of_two", "rows_of"]


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return bool(triton.knobs.runtime.interpret)


def launch_early() -> dict[str, bool]:
    """Return the launch options of a kernel that begins with `gdc_wait`."""
    return {} if interpreting() else {"launch_pdl": True}


def as_written() -> dict[str, bool]:
    """Return the launch options of a kernel in which each product and sum rounds by itself."""
    return {} if interpreting() else {"enable_fp_fusion": False}


def power_of_two(size: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least `size` and `least`."""
    return max(least, 1 << (size - 1).bit_length())


def rows_of(tensor_BH1D: Tensor) -> tuple[Tensor, int, int]:
    """Return one token's vectors with their strides by sequence and by head.

    The last dimension is made contiguous, which it is where nothing odd produced it.
    """
    if tensor_BH1D.stride(-1) != 1:
        tensor_BH1D = tensor_BH1D.contiguous()
    return tensor_BH1D, tensor_BH1D.stride(0), tensor_BH1D.stride(1)
