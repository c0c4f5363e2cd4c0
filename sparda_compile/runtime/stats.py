"""What the cache did: hits, misses and bytes, per layer and in total."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from sparda_compile.report.text import format_bytes, html_table

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CacheStats", "LayerStats"]

# What a notebook shows at most.
_NUM_LAYERS: Final = 16
_PREDICTIONS: Final = ("repaired", "in vain", "coverage", "precision")


@dataclasses.dataclass(frozen=True)
class LayerStats:
    """Counts of one sparse layer, summed over sequences, groups and steps.

    Attributes:
        hits: Selected blocks that were resident.
        misses: Selected blocks that had to be fetched after the selection was known.
        h2d_bytes: Bytes copied to the device, hints included.
        d2h_bytes: Bytes copied to CPU memory.
        repaired: Selected blocks that mode `speculate` had not predicted. The one that is being
            written never is, so a layer that speculates repairs something in every step.
        wasted: Blocks that it predicted and that were not selected.
    """

    hits: int
    misses: int
    h2d_bytes: int
    d2h_bytes: int
    repaired: int = 0
    wasted: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of selected blocks that were resident; 1.0 when nothing was selected."""
        selected = self.hits + self.misses
        return self.hits / selected if selected else 1.0

    @property
    def coverage(self) -> float | None:
        """Share of selected blocks that were predicted; None of a layer that predicts nothing."""
        return self._used / (self._used + self.repaired) if self.repaired else None

    @property
    def precision(self) -> float | None:
        """Share of predicted blocks that were selected; None where nothing was predicted."""
        early = self._used + self.wasted
        return self._used / early if self.repaired and early else None

    @property
    def _used(self) -> int:
        return self.hits + self.misses - self.repaired


@dataclasses.dataclass(frozen=True, repr=False)
class CacheStats:
    """Counts of a cache since it was made or reset.

    Attributes:
        layers: Counts by layer.
        selection: A sentence that says from which length on steps leave blocks out.
        speculates: Whether blocks are predicted, so that it is shown how well.
        formats: How full blocks of each layer are written.
        host_memory: Where the blocks in CPU memory are that a GPU reads, in words; else empty.
        page_format: What pages hold of full blocks in a format that rounds, `model` or `stored`.
    """

    layers: dict[int, LayerStats]
    selection: str = ""
    speculates: bool = False
    formats: dict[int, str] = dataclasses.field(default_factory=dict)
    host_memory: str = ""
    page_format: str = "model"

    @property
    def total(self) -> LayerStats:
        """Sum over layers."""
        return _sum(self.layers.values())

    @property
    def predicted(self) -> LayerStats:
        """Sum over the layers that predict blocks."""
        return _sum(layer for layer in self.layers.values() if layer.repaired)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        layers = {str(i): dataclasses.asdict(s) for i, s in self.layers.items()}
        total = dataclasses.asdict(self.total)
        formats = {str(layer): name for layer, name in self.formats.items()}
        words = {"selection": self.selection, "host_memory": self.host_memory}
        written = {"kv_format": formats, "page_format": self.page_format}
        return {"layers": layers, "total": total, **words, **written}

    def __str__(self) -> str:
        """Return the totals, and in lines of their own what else there is to say.

        From which length on blocks are left out, formats that round, and where CPU memory is.
        """
        where = f"CPU memory is {self.host_memory}." if self.host_memory else ""
        lines = (self._counts, self.selection, self._formats, where)
        return "\n".join(line for line in lines if line)

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
                *self._predictions(self.predicted if layer == "all" else each),
            )
            for layer, each in rows
        ]
        text = f"CacheStats of {self._what}. {self.selection} {self._formats}".rstrip()
        head = ("layer", "hits", "misses", "hit rate", "H2D", "D2H")
        return html_table(text, (*head, *(_PREDICTIONS if self.speculates else ())), cells)

    def _predictions(self, stats: LayerStats) -> tuple[str, ...]:
        """Return what a row says of predictions."""
        if not self.speculates:
            return ()
        counts = (stats.repaired, stats.wasted) if stats.repaired else (None, None)
        shares = (_percent(stats.coverage), _percent(stats.precision))
        return (*("-" if n is None else str(n) for n in counts), *shares)

    @property
    def _formats(self) -> str:
        names = list(dict.fromkeys(self.formats.values()))
        if names in ([], ["model"]):
            return ""
        where = ", in pages too" if self.page_format == "stored" else ""
        return f"Full blocks are written in {', '.join(names)}{where}."

    @property
    def _what(self) -> str:
        return f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}"

    @property
    def _counts(self) -> str:
        total = self.total
        text = (
            f"{total.hits} hits, {total.misses} misses ({100 * total.hit_rate:.1f}% hits), "
            f"{total.h2d_bytes} bytes H2D, {total.d2h_bytes} bytes D2H"
        )
        if not self.speculates:
            return text
        found = self.predicted
        if not found.repaired:
            return f"{text}, nothing predicted"
        return (
            f"{text}, {found.repaired} blocks repaired ({_percent(found.coverage)} predicted), "
            f"{found.wasted} predicted in vain ({_percent(found.precision)} of predictions read)"
        )


def _sum(layers: Iterable[LayerStats]) -> LayerStats:
    counts = [dataclasses.astuple(layer) for layer in layers]
    return LayerStats(*map(sum, zip(*counts, strict=True))) if counts else LayerStats(0, 0, 0, 0)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
