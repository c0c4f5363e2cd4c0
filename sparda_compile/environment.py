"""Where a result comes from: versions, device, commit, date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from sparda_compile.files import replacing

__all__ = ["describe", "write_result"]


def describe(commit: str | None = None) -> dict[str, Any]:
    """Return what a number means nothing without.

    Args:
        commit: Of this package, where it is not a git checkout.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str:
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    )
    return run.stdout.strip() or "unknown"


def write_result(path: Path, result: dict[str, Any], commit: str | None = None) -> None:
    """Write a result with its environment as JSON.

    Raises:
        ConfigError: If the file cannot be written; an old one stays as it was then.
    """
    with replacing(path) as partial:
        text = json.dumps({"environment": describe(commit), **result}, indent=1)
        partial.write_text(text + "\n", encoding="utf-8")
