"""What is counted on the device, and where each count stands in the tensor `counters`."""

from __future__ import annotations

from typing import Final

__all__ = ["COUNTERS", "HITS", "MISSES", "OFFLOADED", "PREFETCHED", "REPAIRED", "WASTED"]

COUNTERS: Final = (
    "hits",
    "misses",
    "prefetched_blocks",
    "repaired_blocks",
    "offloaded_blocks",
    "wasted_blocks",
)
HITS, MISSES, PREFETCHED, REPAIRED, OFFLOADED, WASTED = range(len(COUNTERS))
