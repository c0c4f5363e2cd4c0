"""Hints: one small file each. To add one, see `sparda_compile.registry`."""

from sparda_compile.hints.base import Hint, HintPoint
from sparda_compile.registry import HINTS

__all__ = ["HINTS", "Hint", "HintPoint"]
