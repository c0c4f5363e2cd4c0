"""Hints: one small file each. To add one, write the file and name it here and in config."""

from sparda_compile.hints.base import Hint, HintPoint
from sparda_compile.hints.forecast import ForecastHint
from sparda_compile.hints.next_query import NextQueryHint
from sparda_compile.hints.previous_layer import PreviousLayerHint
from sparda_compile.hints.previous_step import PreviousStepHint

__all__ = ["HINTS", "Hint", "HintPoint"]

HINTS: dict[str, Hint] = {
    hint.name: hint
    for hint in (ForecastHint(), NextQueryHint(), PreviousStepHint(), PreviousLayerHint())
}
