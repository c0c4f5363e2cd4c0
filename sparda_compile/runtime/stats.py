"""What the cache did: hits, misses and bytes, per layer and in total."""

from __future__ import annotations

import dataclasses
from typing import Any

__all__ = ["CacheStats", "LayerStats"]


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Counts of one sparse layer, summed over sequences, groups and steps.

    Attributes:
        hits: Selected blocks that were resident.
        misses: Selected blocks that had to be fetched after the selection was known.
        h2d_bytes: Bytes copied to the device, hints included.
        d2h_bytes: Bytes copied to CPU memory.
    """

    hits: int
    misses: int
    h2d_bytes: int
    d2h_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of selected blocks that were resident; 1.0 when nothing was selected."""
        selected = self.hits + self.misses
        return self.hits / selected if selected else 1.0


@dataclasses.dataclass(frozen=True)
class CacheStats:
    """Counts of a cache since it was made or reset, by layer."""

    layers: dict[int, LayerStats]

    @property
    def total(self) -> LayerStats:
        """Sum over layers."""
        layers = self.layers.values()
        return LayerStats(
            hits=sum(layer.hits for layer in layers),
            misses=sum(layer.misses for layer in layers),
            h2d_bytes=sum(layer.h2d_bytes for layer in layers),
            d2h_bytes=sum(layer.d2h_bytes for layer in layers),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = {str(i): dataclasses.asdict(s) for i, s in self.layers.items()}
        return {"layers": layers, "total": dataclasses.asdict(self.total)}

    def __str__(self) -> str:
        """Return the totals in one line."""
        total = self.total
        return (
            f"{total.hits} hits, {total.misses} misses ({100 * total.hit_rate:.1f}% hits), "
            f"{total.h2d_bytes} bytes H2D, {total.d2h_bytes} bytes D2H"
        )
