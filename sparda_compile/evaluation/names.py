"""Names of the tasks; a command line that offers them need not import what makes them."""

from __future__ import annotations

from typing import Literal

__all__ = ["TaskName"]

TaskName = Literal[
    "single_needle",
    "multi_key",
    "multi_value",
    "multi_query",
    "variable_tracking",
    "common_words",
    "frequent_words",
    "key_value",
]
