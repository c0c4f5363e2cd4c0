"""Selectors: one small file each. To add one, write the file and name it here and in config."""

from sparda_compile.selectors.base import Geometry, Selector, Summary
from sparda_compile.selectors.forecast import Forecast
from sparda_compile.selectors.infllm2 import InfLLM2
from sparda_compile.selectors.pooled_keys import PooledKeys
from sparda_compile.selectors.quest import KeyBounds, Quest

__all__ = ["SELECTORS", "SUMMARIES", "Geometry", "Selector", "Summary"]

SELECTORS: dict[str, Selector] = {s.name: s for s in (InfLLM2(), Quest(), Forecast())}
SUMMARIES: dict[str, Summary] = {s.name: s for s in (PooledKeys(), KeyBounds())}
