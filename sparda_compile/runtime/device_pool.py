"""Bytes in device memory: pages, tables, summaries, rings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import DevicePoolFullError

if TYPE_CHECKING:
    from sparda_compile.state.layout import TensorSpec

__all__ = ["DevicePool", "free_device_bytes"]


def free_device_bytes(device: torch.device) -> int | None:
    """Return what the driver and torch's own allocator can still give; it waits for no kernel.

    Args:
        device: A CUDA device. Of any other nothing is known: None.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class DevicePool:
    """Owns the state tensors on the device.

    Args:
        device: Where.
        limit_bytes: Most that may be taken; None is no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self._device = device
        self._limit_bytes = limit_bytes
        self.num_bytes = 0

    def check(self, num_bytes: int, batch_size: int, max_tokens: int) -> None:
        """Raise DevicePoolFullError if so many bytes are not allowed, or not there."""
        limit, whose = self._limit_bytes, "device_bytes allows"
        free = free_device_bytes(self._device)
        if free is not None and (limit is None or free < limit):
            limit, whose = free, f"{self._device} has free"
        if limit is None or num_bytes <= limit:
            return
        mib = 1 << 20
        raise DevicePoolFullError(
            f"the KV cache of {batch_size} sequences of {max_tokens} tokens needs "
            f"{num_bytes / mib:.1f} MiB on the device, but {whose} {limit / mib:.1f} MiB; lower "
            "top_k, page_ratio, max_tokens or the batch size, use offload='always', or raise "
            "device_bytes."
        )

    def allocate(self, spec: TensorSpec) -> torch.Tensor:
        """Return one state tensor, filled as in an empty cache."""
        self.num_bytes += spec.num_bytes
        return torch.full(spec.shape, spec.fill, dtype=spec.dtype, device=self._device)
