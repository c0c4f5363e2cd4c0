"""The files that benchmarks write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sparda_compile.cli.outputs import result_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from sparda_compile.bench.result_file import ResultFile

__all__ = ["REPEAT", "budget_file", "decode_file", "kernels_file", "prompt_file", "trace_file"]

REPEAT: Final = 14
"""As `bench.prompt_programs.REPEAT`, which imports torch."""

_AS_THEY_ARE: Final = ("top_k", "page_ratio", "hint", "prefill_candidates")
# What is measured of prompts -> the field that tells its results apart.
_PROMPT_KEYS: Final = {"prefill": "tokens", "turns": "past"}


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
    """Return the file of a shape's decode steps that follow what a real model selected.

    Args:
        out: Folder.
        shape: A key of `SHAPES`.
        tokens: Of a sequence.
        commit: Of this package, where it is not a git checkout.
        fields: Of SpardaConfig; what is as usual is not noted.
        trace: What is followed, with its `name`.
    """
    own = _own(fields)
    head = {"name": "decode-trace", "shape": shape, "max_tokens": tokens, **own, "trace": trace}
    name = "-".join(["decode", shape, *_words(own), "trace", trace["name"]])
    return result_file(out / f"{name}.json", head, "batch_size", commit)


def budget_file(
    out: Path, shape: str, tokens: int, commit: str | None, fields: Mapping[str, Any] | None = None
) -> ResultFile:
    """Return the file of a shape's budgets of memory."""
    own = _own(fields)
    head = {"name": "budget", "shape": shape, "max_tokens": tokens, **own}
    name = "-".join(["budget", shape, *_words(own)])
    return result_file(out / f"{name}.json", head, "budget_gib", commit)


def prompt_file(
    what: str,
    out: Path,
    shape: str,
    commit: str | None,
    fields: Mapping[str, Any] | None = None,
    repeat: int = REPEAT,
    tp: int = 1,
) -> ResultFile:
    """Return the file of a shape's prompts or turns.

    Args:
        what: `prefill` or `turns`.
        out: Folder.
        shape: A key of `SHAPES`.
        commit: Of this package, where it is not a git checkout.
        fields: Of SpardaConfig; what is as usual is not noted, nor in what chunks prompts are read.
        repeat: How often each token stands in a row.
        tp: Ranks.
    """
    own = _own(fields)
    head = {"name": what, "shape": str(shape), **own, "repeat": repeat}
    parts = [what, shape, *_words(own)]
    if repeat != REPEAT:
        parts.append(f"repeat-{repeat}")
    if tp > 1:
        head |= {"name": f"{what}-tp", "tp": tp}
        parts.append(f"tp{tp}")
    return result_file(out / f"{'-'.join(parts)}.json", head, _PROMPT_KEYS[what], commit)


def kernels_file(path: Path, commit: str | None) -> ResultFile:
    """Return the file of the kernels."""
    return result_file(path, {"name": "kernels"}, "part", commit)


def _own(fields: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields that are not as usual, in an order of their own."""
    usual = {"mode": "forecast", "hint": None, "kv_format": "model", "page_format": "model"}
    others = ("selector", "prefill_selector", "prefill_candidates", "top_k", "page_ratio")
    usual |= dict.fromkeys(others)
    given = {name: (fields or {}).get(name, value) for name, value in usual.items()}
    plain = {name: value for name, value in given.items() if value != usual[name]}
    if "hint" in plain:
        plain["hint"] = [*plain["hint"]]
    return {n: v if n in _AS_THEY_ARE else str(v) for n, v in plain.items()}


def _words(own: Mapping[str, Any]) -> list[str]:
    """Return how the name of a file says them."""
    said = {"top_k": "top{}".format, "page_ratio": "pages{}".format, "hint": "-".join}
    said |= {"prefill_selector": "prompts-{}".format, "prefill_candidates": "candidates{}".format}
    return [said.get(name, str)(value) for name, value in own.items()]
