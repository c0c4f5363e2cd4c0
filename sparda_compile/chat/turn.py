"""What is known of a turn when it has ended."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from sparda_compile.report.text import format_bytes

__all__ = ["Ending", "Turn"]

Ending = Literal["end", "max_new_tokens", "interrupted", "positions"]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question, its answer and what that took.

    Attributes:
        question: As it was asked.
        answer: As far as it was written.
        ending: Why it ended: the model ended it, or `max_new_tokens`, the user or the model's
            `positions` did.
        read_tokens: Tokens that were read before it: what the cache did not hold.
        answer_tokens: Tokens that were written, one that ends an answer included.
        cache_tokens: Tokens that the cache holds now.
        first_token_s: Seconds from the question to the first token; None where there was none.
        tokens_per_s: Tokens a second behind the first; None where there was no other.
        h2d_bytes: Bytes copied to the device.
        d2h_bytes: Bytes copied to CPU memory.
        hit_rate: Share of selected blocks that were on the device.
        blocks_read: Blocks that each KV head of the last step read.
        blocks: Blocks that the text has.
        note: What was done before the question was read; empty for nothing.
    """

    question: str
    answer: str
    ending: Ending
    read_tokens: int
    answer_tokens: int
    cache_tokens: int
    first_token_s: float | None
    tokens_per_s: float | None
    h2d_bytes: int
    d2h_bytes: int
    hit_rate: float
    blocks_read: int
    blocks: int
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """Return what it took in one line."""
        endings = {
            "end": "",
            "max_new_tokens": "cut at the most tokens of an answer",
            "interrupted": "interrupted",
            "positions": "the model's positions are used up",
        }
        pace = "-" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        first = "-" if self.first_token_s is None else f"{self.first_token_s:.2f}"
        facts = [
            f"{pace} tokens/s",
            f"first token after {first} s ({self.read_tokens:,} tokens read)",
            f"{format_bytes(self.h2d_bytes)} to the device, {format_bytes(self.d2h_bytes)} back",
            f"{self.blocks_read} of {self.blocks} blocks read",
            f"cache {self.cache_tokens:,} tokens",
        ]
        return ", ".join(filter(None, [*facts, endings[self.ending]]))
