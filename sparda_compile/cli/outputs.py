"""Files that a command is to write: checked before its work begins, written when it is done."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from sparda_compile.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["check_folder", "check_outputs", "check_plot", "write_file"]


def check_outputs(**paths: Path | None) -> None:
    """Refuse files that cannot be written, and leave nothing behind.

    Args:
        **paths: By the names of their options; None is no file.

    Raises:
        ConfigError: If one is a folder, or neither it nor a folder for it can be made.
    """
    for name, path in paths.items():
        if path is None:
            continue
        option = f"--{name.replace('_', '-')} {path}"
        try:
            if path.is_dir():
                raise ConfigError(f"{option} is a folder; pass the name of a file in it.")
            if _exists(path) and not os.access(path, os.W_OK):
                raise PermissionError(13, "Permission denied")
            _try_folder(path.parent)
        except OSError as error:
            raise _refused(option, error) from error


def check_folder(path: Path, option: str = "--out") -> None:
    """Refuse a folder that no file can be written to, and leave nothing behind.

    Raises:
        ConfigError: If it is none, or cannot be made or written to.
    """
    try:
        _try_folder(path)
    except OSError as error:
        raise _refused(f"{option} {path}", error) from error


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
        raise _refused(str(path), error) from error


def _exists(path: Path) -> bool:
    """Return whether there is one; what cannot be looked up is an OSError."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _try_folder(folder: Path) -> None:
    """Make a file without a name in a folder, or in the one that it would be made in."""
    while not _exists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(20, f"{folder} is no folder")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _refused(what: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"{what} cannot be written ({error.strerror or type(error).__name__}); use a path in a "
        "folder that can."
    )
