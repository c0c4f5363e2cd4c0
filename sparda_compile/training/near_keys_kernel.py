"""Low-bit keys of whole sequences as one Triton kernel; `selectors/lowbit.py` says what they are.

Reads each key once and writes it once, where PyTorch makes some twenty float32 copies of them. The
bits are the same.

Dimensions: B batch, G groups, T tokens, N full blocks, P tokens of a block, S = N * P, D head dim.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from sparda_compile.errors import BackendUnavailableError

try:
    import triton
    import triton.language as tl

    from sparda_compile.kernels.gpu.launch import (
        as_written,
        device_of,
        interpreting,
        power_of_two,
        tokens_of,
    )
    from sparda_compile.kernels.gpu.low_bit_keys import quantize_keys
    from sparda_compile.kernels.gpu.packed_form import rounded
except ImportError as error:
    raise BackendUnavailableError(
        "low-bit keys in one kernel need Triton, which is not installed; install triton, or pass "
        "backend='plain'."
    ) from error

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["launch_near_keys"]

# Channels of a program.
_CHANNELS: Final = 64


@triton.jit
def _near_keys(
    k_ptr, near_ptr, k_stride_b, k_stride_g, k_stride_t, groups, num_blocks,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
    DIMS: tl.constexpr, LARGEST: tl.constexpr, CUTS: tl.constexpr,
):  # fmt: skip
    block, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, g = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    slot = tl.arange(0, SLOTS)[:, None]
    dims = (tl.program_id(2) * DIMS + tl.arange(0, DIMS))[None, :]
    is_there = (slot < SIZE) & (dims < D)
    token = block * SIZE + slot
    source = k_ptr + b * k_stride_b + g * k_stride_g + token * k_stride_t + dims
    keys = tl.load(source, mask=is_there, other=0.0)
    code, span, base = quantize_keys(keys, near_ptr, SIZE, SLOTS, BITS, LARGEST, CUTS)
    factor = 1.0 + code.to(tl.float32) * (1.0 / (1 << BITS))
    near = factor * span.to(tl.float32)[None, :] + base.to(tl.float32)[None, :]
    target = near_ptr + (pair * num_blocks + block) * SIZE * D + slot * D + dims
    tl.store(target, rounded(near, near_ptr, CUTS), mask=is_there)


def launch_near_keys(k_BGTD: Tensor, size: int, bits: int) -> Tensor:
    """Return the low-bit keys of all full blocks, [B, G, S, D], in the keys' dtype.

    Args:
        k_BGTD: Keys, after rotation.
        size: P.
        bits: Of one code, 2 or 4.
    """
    batch, groups, num_tokens, dim = k_BGTD.shape
    num_blocks = num_tokens // size
    k, *strides = tokens_of(k_BGTD)
    near = k.new_empty(batch, groups, num_blocks * size, dim)
    channels = min(power_of_two(dim), _CHANNELS)
    grid = (num_blocks, batch * groups, triton.cdiv(dim, channels))
    with device_of(k):
        _near_keys[grid](
            k, near, *strides, groups, num_blocks, size, power_of_two(size), bits, dim, channels,
            torch.finfo(k.dtype).max, interpreting(), num_warps=4, **as_written(),
        )  # fmt: skip
    return near
