"""The files that benchmarks of decode write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.cli.outputs import result_file

if TYPE_CHECKING:
    from pathlib import Path

    from sparda_compile.bench.lab import ResultFile

__all__ = ["budget_file", "decode_file", "kernels_file", "trace_file"]


def decode_file(
    out: Path,
    shape: str,
    tokens: int,
    commit: str | None,
    kv_format: str = "model",
    tp: int = 1,
    *,
    top_k: int | None = None,
    page_format: str = "model",
) -> ResultFile:
    """Return the file of a shape's decode steps, with a format of blocks, on a number of ranks.

    `top_k` is that of the configuration where it is not the usual one.
    """
    own = _formats(kv_format, page_format)
    budget = {} if top_k is None else {"top_k": top_k}
    head = {"name": "decode", "shape": shape, "max_tokens": tokens, **own, **budget}
    parts = ["decode", shape, *own.values(), *(f"top{k}" for k in budget.values())]
    if tp > 1:
        head |= {"name": "decode-tp", "tp": tp}
        parts.append(f"tp{tp}")
    return result_file(out / f"{'-'.join(parts)}.json", head, "batch_size", commit)


def trace_file(
    out: Path,
    shape: str,
    tokens: int,
    commit: str | None,
    kv_format: str,
    trace: dict[str, Any],
    page_format: str = "model",
) -> ResultFile:
    """Return the file of a shape's decode steps that follow what a real model selected."""
    own = _formats(kv_format, page_format)
    head = {"name": "decode-trace", "shape": shape, "max_tokens": tokens, **own, "trace": trace}
    name = "-".join(["decode", shape, *own.values(), "trace"])
    return result_file(out / f"{name}.json", head, "batch_size", commit)


def budget_file(
    out: Path, shape: str, tokens: int, commit: str | None, kv_format: str = "model"
) -> ResultFile:
    """Return the file of a shape's budgets of memory, with a format of blocks."""
    own = _formats(kv_format)
    head = {"name": "budget", "shape": shape, "max_tokens": tokens, **own}
    name = "-".join(["budget", shape, *own.values()])
    return result_file(out / f"{name}.json", head, "budget_gib", commit)


def kernels_file(path: Path, commit: str | None) -> ResultFile:
    """Return the file of the kernels."""
    return result_file(path, {"name": "kernels"}, "part", commit)


def _formats(kv_format: str, page_format: str = "model") -> dict[str, str]:
    """Return the formats that are not those of the model; the name of a file has them, too."""
    given = {"kv_format": kv_format, "page_format": page_format}
    return {name: value for name, value in given.items() if value != "model"}
