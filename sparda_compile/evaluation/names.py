"""Names of the tasks; a command line that offers them need not import what makes them."""

from __future__ import annotations

from typing import Literal

__all__ = ["PromptName", "TaskName", "TextPromptName", "TextTaskName"]

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

TextTaskName = Literal["perplexity", "needle", "chat"]
"""What `sparda eval text` measures on real text."""

TextPromptName = Literal["dense", "sparse"]
"""What the tokens of its prompts read."""
