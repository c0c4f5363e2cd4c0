"""An answer while it is written: its text in pieces, its tokens, its times, and how to stop it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, TextStreamer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = ["AnswerStreamer", "Stop"]


class AnswerStreamer(TextStreamer):
    """Gives text to a function as soon as it is settled, and keeps the tokens with their times.

    Args:
        tokenizer: Of the model.
        show: Gets pieces of the answer, without special tokens.

    Attributes:
        ids: Tokens of the answer so far.
        text: Text of the answer so far.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show
        self._begin = time.perf_counter()
        self._times: list[float] = []
        self.ids: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, which comes first, or a token [1] int64."""
        if not self.next_tokens_are_prompt:
            self._times.append(time.perf_counter())
            self.ids += value.flatten().tolist()
        parent: Any = super()  # transformers brings no types
        parent.put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on text that no later token changes."""
        del stream_end
        if text:
            self.text += text
            self._show(text)

    @property
    def first_s(self) -> float | None:
        """Seconds from the question to the first token; None before it."""
        return self._times[0] - self._begin if self._times else None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second behind the first one; None where there is no other."""
        if len(self._times) < 2:
            return None
        return (len(self._times) - 1) / (self._times[-1] - self._times[0])


class Stop(StoppingCriteria):
    """Ends an answer behind the token that is being written, once it is told to.

    Attributes:
        is_set: Whether it was told to.
    """

    def __init__(self) -> None:
        self.is_set = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each sequence ends, [B] bool."""
        del scores, kwargs
        size = (input_ids.shape[0],)
        return torch.full(size, self.is_set, dtype=torch.bool, device=input_ids.device)
