"""What the cache did: hits, misses and bytes, per layer and in total."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from sparda_compile.report.text import format_bytes, html_table

__all__ = ["CacheStats", "LayerStats"]

# What a notebook shows at most.
_NUM_LAYERS: Final = 16


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


@dataclasses.dataclass(frozen=True, repr=False)
class CacheStats:
    """Counts of a cache since it was made or reset.

    Attributes:
        layers: Counts by layer.
        selection: A sentence that says from which length on steps leave blocks out.
    """

    layers: dict[int, LayerStats]
    selection: str = ""

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
        total = dataclasses.asdict(self.total)
        return {"layers": layers, "total": total, "selection": self.selection}

    def __str__(self) -> str:
        """Return the totals in one line, and below it from which length on blocks are left out."""
        return f"{self._counts}\n{self.selection}" if self.selection else self._counts

    def __repr__(self) -> str:
        """Return the same; layers are named by their number alone."""
        return f"<CacheStats of {self._what}: {self}>"

    def _repr_html_(self) -> str:
        """Return a table for a notebook: the totals, and each layer up to a screen of them."""
        rows = [("all", self.total), *list(self.layers.items())[:_NUM_LAYERS]]
        cells = [
            (
                str(layer),
                str(each.hits),
                str(each.misses),
                f"{100 * each.hit_rate:.1f}%",
                format_bytes(each.h2d_bytes),
                format_bytes(each.d2h_bytes),
            )
            for layer, each in rows
        ]
        text = f"CacheStats of {self._what}. {self.selection}".rstrip()
        return html_table(text, ("layer", "hits", "misses", "hit rate", "H2D", "D2H"), cells)

    @property
    def _what(self) -> str:
        return f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}"

    @property
    def _counts(self) -> str:
        total = self.total
        return (
            f"{total.hits} hits, {total.misses} misses ({100 * total.hit_rate:.1f}% hits), "
            f"{total.h2d_bytes} bytes H2D, {total.d2h_bytes} bytes D2H"
        )
