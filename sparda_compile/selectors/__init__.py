"""Selectors: one small file each. To add one, write the file and name it here and in config."""

from sparda_compile.selectors.base import Geometry, Selector, Summary
from sparda_compile.selectors.forecast import Forecast
from sparda_compile.selectors.infllm2 import InfLLM2
from sparda_compile.selectors.nosa import Nosa, NosaForecast
from sparda_compile.selectors.quest import Quest

__all__ = ["SELECTORS", "SUMMARIES", "Geometry", "Selector", "Summary"]

_ALL: tuple[Selector, ...] = (InfLLM2(), Quest(), Nosa(), Forecast(), NosaForecast())

SELECTORS: dict[str, Selector] = {selector.name: selector for selector in _ALL}
SUMMARIES: dict[str, Summary] = {s.summary.name: s.summary for s in _ALL}
