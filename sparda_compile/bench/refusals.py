"""What others raise where they cannot do what a benchmark asks of them; it is part of a result.

A benchmark compares with what torch, FlashInfer and fla offer, as far as a machine has it. These
are caught around calls of theirs, and around what makes and compares operands, which may find no
memory. Wrong types, names and indices of our own are none of them, and end the benchmark.
"""

from __future__ import annotations

from typing import Final

import triton

__all__ = ["REFUSALS", "reason_of"]

REFUSALS: Final[tuple[type[Exception], ...]] = (
    ImportError,  # it is not installed
    RuntimeError,  # torch and CUDA: no such kernel, no memory, a form that Dynamo cannot trace
    ValueError,  # FlashInfer, and torch's compiler: sizes and dtypes that it does not take
    AssertionError,  # fla: groups of query heads that it does not take
    triton.TritonError,  # a kernel of theirs that does not compile, or needs more than there is
)


def reason_of(refusal: Exception) -> str:
    """Return one line that says what was raised, and the first line of why."""
    lines = [line for line in str(refusal).splitlines() if line.strip()]
    return f"{type(refusal).__name__}: {lines[0].strip() if lines else 'no reason given'}"
