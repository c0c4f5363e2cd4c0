"""The files that benchmarks of decode write."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from sparda_compile.bench.lab import ResultFile

__all__ = ["budget_file", "decode_file", "kernels_file"]


def decode_file(out: Path, shape: str, tokens: int, commit: str | None) -> ResultFile:
    """Return the file of a shape's decode steps."""
    from sparda_compile.bench.lab import ResultFile

    head = {"name": "decode", "shape": shape, "max_tokens": tokens}
    return ResultFile(out / f"decode-{shape}.json", head, "batch_size", commit)


def budget_file(out: Path, shape: str, tokens: int, commit: str | None) -> ResultFile:
    """Return the file of a shape's budgets of memory."""
    from sparda_compile.bench.lab import ResultFile

    head = {"name": "budget", "shape": shape, "max_tokens": tokens}
    return ResultFile(out / f"budget-{shape}.json", head, "budget_gib", commit)


def kernels_file(path: Path, commit: str | None) -> ResultFile:
    """Return the file of the kernels."""
    from sparda_compile.bench.lab import ResultFile

    return ResultFile(path, {"name": "kernels"}, "part", commit)
