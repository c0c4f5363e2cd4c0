"""The files that benchmarks of decode write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparda_compile.cli.outputs import result_file

if TYPE_CHECKING:
    from pathlib import Path

    from sparda_compile.bench.lab import ResultFile

__all__ = ["budget_file", "decode_file", "kernels_file"]


def decode_file(
    out: Path, shape: str, tokens: int, commit: str | None, kv_format: str = "model", tp: int = 1
) -> ResultFile:
    """Return the file of a shape's decode steps, with a format of blocks, on a number of ranks."""
    own = {} if kv_format == "model" else {"kv_format": kv_format}
    head = {"name": "decode", "shape": shape, "max_tokens": tokens, **own}
    parts = ["decode", shape, *own.values()]
    if tp > 1:
        head |= {"name": "decode-tp", "tp": tp}
        parts.append(f"tp{tp}")
    return result_file(out / f"{'-'.join(parts)}.json", head, "batch_size", commit)


def budget_file(out: Path, shape: str, tokens: int, commit: str | None) -> ResultFile:
    """Return the file of a shape's budgets of memory."""
    head = {"name": "budget", "shape": shape, "max_tokens": tokens}
    return result_file(out / f"budget-{shape}.json", head, "budget_gib", commit)


def kernels_file(path: Path, commit: str | None) -> ResultFile:
    """Return the file of the kernels."""
    return result_file(path, {"name": "kernels"}, "part", commit)
