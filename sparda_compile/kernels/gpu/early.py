"""Kernels that begin while the one before them ends, on GPUs that can: Hopper and later.

A kernel that reads only what the kernel just before it wrote may begin while that one ends: its
launch is then paid for in advance (CUDA's programmatic dependent launch). The first says
`begin_next`, the second `await_last` before it reads anything, and is launched with
`launch_early()`. Both are launched by one function, so that nothing comes between them in the
stream. On a GPU that cannot, both kernels say nothing, and run one after the other.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.language.target_info import cuda_capability_geq

from sparda_compile.kernels.gpu.launch import interpreting

__all__ = ["await_last", "begin_next", "launch_early"]

_HOPPER: Final = 90


@triton.jit
def begin_next(INTERPRETED: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Let the kernel that is launched behind this one begin."""
    if not INTERPRETED and cuda_capability_geq(9, 0):
        cuda.gdc_launch_dependents()


@triton.jit
def await_last(INTERPRETED: tl.constexpr):  # noqa: ANN201 - a part of kernels
    """Wait until the kernel before this one has ended, and what it wrote can be read."""
    if not INTERPRETED and cuda_capability_geq(9, 0):
        cuda.gdc_wait()


def launch_early() -> dict[str, bool]:
    """Return the launch options of a kernel that begins with `await_last`."""
    if interpreting():
        return {}
    device = torch.cuda.current_device() if torch.cuda.is_available() else -1
    return {"launch_pdl": True} if _begins_early(device) else {}


@functools.cache
def _begins_early(device: int) -> bool:
    """Whether the current device, which has this number, launches kernels so."""
    del device
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch >= _HOPPER)
