"""Files that a command is to write: checked before its work begins, written when it is done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparda_compile.errors import BackendUnavailableError, ConfigError
from sparda_compile.files import check_writable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sparda_compile.bench.result_file import ResultFile

__all__ = ["check_folder", "check_outputs", "check_plot", "result_file", "write_file"]


def check_outputs(**paths: Path | None) -> None:
    """Refuse files that cannot be written, and leave nothing behind.

    Args:
        **paths: By the names of their options; None is no file.

    Raises:
        ConfigError: If one is a folder, or neither it nor a folder for it can be made.
    """
    for name, path in paths.items():
        if path is not None:
            _check(path, f"--{name.replace('_', '-')}")


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that no file can be written to, and leave nothing behind.

    Raises:
        ConfigError: If it is none, or cannot be made or written to.
    """
    _check(path / "result.json", option)


def check_plot(path: Path | None) -> None:
    """Refuse a plot that cannot be drawn or written; None is no plot.

    Raises:
        BackendUnavailableError: If matplotlib is not installed.
        ConfigError: If matplotlib does not know the format, or the file cannot be written.
    """
    if path is None:
        return
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailableError(
            "a plot needs matplotlib, which is not installed; install sparda-compile[plot], or "
            "leave --plot out."
        ) from error
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(
            f"--plot {path} does not end in a format that matplotlib knows; use one of "
            f"{', '.join('.' + each for each in known)}."
        )
    check_outputs(plot=path)


def write_file(write: Callable[[Path], Path], path: Path | None) -> Path | None:
    """Write a file with `write`, its folder too; None is no file.

    Raises:
        ConfigError: If it cannot be written.
    """
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return write(path)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written: {error.strerror or error}; use another path."
        ) from error


def _check(path: Path, option: str) -> None:
    try:
        check_writable(path)
    except ConfigError as error:
        raise ConfigError(f"{option} {error}") from error


def result_file(path: Path, head: dict[str, Any], key: str, commit: str | None) -> ResultFile:
    """Return a file of results; arguments are those of `ResultFile`."""
    from sparda_compile.bench.result_file import ResultFile

    return ResultFile(path, head, key, commit)
