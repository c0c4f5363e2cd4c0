"""Names of the tasks; a command line that offers them need not import what makes them."""

from __future__ import annotations

from typing import Literal

__all__ = ["PromptName", "TaskName"]

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

PromptName = Literal["dense", "sparse", "alone"]
"""What selects blocks: the decode steps alone, the prompt's tokens too, or the prompt's alone."""
