"""Counters stand where they are named."""

from __future__ import annotations

from sparda_compile.isa import counters
from sparda_compile.isa.counters import COUNTERS


def test_places_are_those_of_the_names():
    places = (
        counters.HITS, counters.MISSES, counters.PREFETCHED, counters.REPAIRED, counters.OFFLOADED,
        counters.WASTED,
    )  # fmt: skip
    assert [COUNTERS[place].split("_")[0] for place in places] == [
        "hits", "misses", "prefetched", "repaired", "offloaded", "wasted",
    ]  # fmt: skip
    assert sorted(places) == list(range(len(COUNTERS)))
