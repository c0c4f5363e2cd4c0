"""Selectors: one small file each. To add one, see `sparda_compile.registry`."""

from sparda_compile.registry import SELECTORS
from sparda_compile.selectors.base import Geometry, Selector, Summary

__all__ = ["SELECTORS", "Geometry", "Selector", "Summary", "summary_named"]


def summary_named(name: str) -> Summary:
    """Return the summary of that name; KeyError if no selector has it."""
    found = (selector.summary for selector in SELECTORS if selector.summary.name == name)
    summary: Summary | None = next(found, None)
    if summary is None:
        raise KeyError(name)
    return summary
