"""Where a result comes from: versions, device, commit, date."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparda_compile.errors import ConfigError
from sparda_compile.files import replacing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["describe", "kept_result", "result_to_go_on", "version_of", "write_result"]


def describe(commit: str | None = None) -> dict[str, Any]:
    """Return what a number means nothing without.

    Args:
        commit: Of this package, where it is not a git checkout.
    """
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "transformers": version_of("transformers"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if it is not installed."""
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


def kept_result(
    path: Path, head: dict[str, Any], commit: str | None = None
) -> dict[str, Any] | None:
    """Return a result that was written in this environment, the date aside.

    Args:
        path: Its file.
        head: Fields that it must have as they are here.
        commit: Of this package, where it is not a git checkout.

    Returns:
        What `write_result` was given; None if there is no file, or one of something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    then, now = found.pop("environment", {}), describe(commit)
    same = isinstance(then, dict) and all(then.get(n) == now[n] for n in now if n != "date")
    same &= all(found.get(name) == value for name, value in head.items())
    return found if same else None


def result_to_go_on(
    path: Path, head: dict[str, Any], fields: Iterable[str], commit: str | None = None
) -> dict[str, Any]:
    """Return a result that was written in this environment, the date aside, to add to it.

    Args:
        path: Its file, which is there.
        head: Fields that it must have as they are here; `name`, if there is one, is the command's.
        fields: Others that a file of the command has.
        commit: Of this package, where it is not a git checkout.

    Raises:
        ConfigError: If it is a file of something else, or of another environment or head. It stays
            as it is.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    named = {"environment", *fields}
    if not isinstance(found, dict) or found.get("name") != head.get("name") or named - found.keys():
        raise ConfigError(f"{path} is no file of this command; give another one.")
    other = [*_differences(describe(commit), found["environment"], head, found)]
    if other:
        raise ConfigError(
            f"{path} was made with other settings, so what it has cannot be added to; give another "
            f"file, or delete it. What is not as it is now: {', '.join(other)}."
        )
    return found


def _differences(
    now: dict[str, Any], then: dict[str, Any], head: dict[str, Any], found: dict[str, Any]
) -> Iterator[str]:
    """Yield what of an environment, and of a head, is another: names, with the old value of one."""
    yield from (f"{n} {then.get(n)}" for n in now if n != "date" and then.get(n) != now[n])
    for name, value in head.items():
        old = found.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            keys = [key for key in (value | old) if value.get(key) != old.get(key)]
            yield from (f"{key} {old.get(key)}" for key in keys)
        elif value != old:
            yield name
