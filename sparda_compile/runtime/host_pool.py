"""Bytes in CPU memory: allocate them exactly, and say early when there are too few."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from sparda_compile.errors import HostPoolFullError
from sparda_compile.runtime.numa import ANYWHERE, Placement
from sparda_compile.runtime.pinned import PinnedMemory

if TYPE_CHECKING:
    from sparda_compile.state.layout import TensorSpec

__all__ = ["HostPool", "free_host_bytes"]


def free_host_bytes() -> int:
    """Return the CPU memory that the machine can still give."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", maxsplit=1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class HostPool:
    """Owns the blocks that live in CPU memory.

    Args:
        limit_bytes: Most that may be taken; None is what the machine has free.
        pinned: Whether a GPU will read and write the blocks.
        place: Where pinned blocks are to be.

    Attributes:
        place: The same.
        num_bytes: What was taken so far.
    """

    def __init__(
        self, limit_bytes: int | None, *, pinned: bool = False, place: Placement = ANYWHERE
    ) -> None:
        self._limit_bytes = limit_bytes
        self._pinned = pinned
        self.place = place
        self._regions: list[PinnedMemory] = []
        self.num_bytes = 0

    def check(self, num_bytes: int, batch_size: int, max_tokens: int) -> None:
        """Raise HostPoolFullError if so many bytes are not to be had.

        Args:
            num_bytes: What the cache will take.
            batch_size: Sequences, for the message.
            max_tokens: Tokens per sequence, for the message.
        """
        free = free_host_bytes()
        limit = free if self._limit_bytes is None else min(free, self._limit_bytes)
        if num_bytes <= limit:
            return
        mib = 1 << 20
        whose = "host_bytes allows" if limit != free else "the machine has free"
        raise HostPoolFullError(
            f"the KV cache of {batch_size} sequences of {max_tokens} tokens needs "
            f"{num_bytes / mib:.0f} MiB of CPU memory, but {whose} {limit / mib:.0f} MiB; lower "
            "max_tokens or the batch size, or raise host_bytes."
        )

    def allocate(self, spec: TensorSpec) -> torch.Tensor:
        """Return the blocks of one layer; they live as long as the pool."""
        if not self._pinned or not spec.num_bytes:
            self.num_bytes += spec.num_bytes
            return torch.zeros(spec.shape, dtype=spec.dtype)
        region = PinnedMemory(spec.num_bytes, self.place)
        self._regions.append(region)
        self.num_bytes += region.num_bytes
        return region.tensor.view(spec.dtype).view(spec.shape)
