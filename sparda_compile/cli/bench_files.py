"""The files that benchmarks of decode write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.cli.outputs import result_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparda_compile.bench.lab import ResultFile

__all__ = ["budget_file", "decode_file", "kernels_file", "trace_file"]

_AS_THEY_ARE = ("top_k", "page_ratio", "hint")


def decode_file(
    out: Path,
    shape: str,
    tokens: int,
    commit: str | None,
    fields: Mapping[str, Any] | None = None,
    tp: int = 1,
) -> ResultFile:
    """Return the file of a shape's decode steps.

    Args:
        out: Folder.
        shape: A key of `SHAPES`.
        tokens: Of a sequence.
        commit: Of this package, where it is not a git checkout.
        fields: Of SpardaConfig; what is as usual is not noted.
        tp: Ranks.
    """
    own = _own(fields)
    head = {"name": "decode", "shape": shape, "max_tokens": tokens, **own}
    parts = ["decode", shape, *_words(own)]
    if tp > 1:
        head |= {"name": "decode-tp", "tp": tp}
        parts.append(f"tp{tp}")
    return result_file(out / f"{'-'.join(parts)}.json", head, "batch_size", commit)


def trace_file(
    out: Path,
    shape: str,
    tokens: int,
    commit: str | None,
    fields: Mapping[str, Any] | None,
    trace: dict[str, Any],
) -> ResultFile:
    """Return the file of a shape's decode steps that follow what a real model selected."""
    own = _own(fields)
    head = {"name": "decode-trace", "shape": shape, "max_tokens": tokens, **own, "trace": trace}
    name = "-".join(["decode", shape, *_words(own), "trace"])
    return result_file(out / f"{name}.json", head, "batch_size", commit)


def budget_file(
    out: Path, shape: str, tokens: int, commit: str | None, fields: Mapping[str, Any] | None = None
) -> ResultFile:
    """Return the file of a shape's budgets of memory."""
    own = _own(fields)
    head = {"name": "budget", "shape": shape, "max_tokens": tokens, **own}
    name = "-".join(["budget", shape, *_words(own)])
    return result_file(out / f"{name}.json", head, "budget_gib", commit)


def kernels_file(path: Path, commit: str | None) -> ResultFile:
    """Return the file of the kernels."""
    return result_file(path, {"name": "kernels"}, "part", commit)


def _own(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields that are not as usual, in an order of their own."""
    usual = {"mode": "forecast", "hint": None, "kv_format": "model", "page_format": "model"}
    usual |= {"selector": None, "top_k": None, "page_ratio": None}
    given = {name: (fields or {}).get(name, value) for name, value in usual.items()}
    plain = {name: value for name, value in given.items() if value != usual[name]}
    if "hint" in plain:
        plain["hint"] = [*plain["hint"]]
    return {n: v if n in _AS_THEY_ARE else str(v) for n, v in plain.items()}


def _words(own: Mapping[str, Any]) -> list[str]:
    """Return how the name of a file says them."""
    said = {"top_k": "top{}".format, "page_ratio": "pages{}".format, "hint": "-".join}
    return [said.get(name, str)(value) for name, value in own.items()]
