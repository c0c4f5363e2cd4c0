"""Files that are written whole or not at all, and paths that are checked before the work begins.

    path = check_writable(path)             # before the work
    with replacing(path) as partial:        # after it
        partial.write_text(text)

Folders that are missing are made when the file is written. What is there and is no regular file,
such as `/dev/stdout`, is written in place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparda_compile.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_writable", "replacing"]


def check_writable(path: Any) -> Path:
    """Refuse a path that no file can be written to; nothing is made.

    Args:
        path: Of the file, as text or as a path.

    Returns:
        The path.

    Raises:
        ConfigError: If it is no path, a folder, or in a place that cannot be written to.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(
            f"{path!r} is no path of a file to write; give one, for example 'page.html'."
        )
    target = Path(os.fsdecode(path))
    try:
        _try(target)
    except OSError as error:
        raise _cannot(target, error.strerror or str(error)) from error
    except ValueError as error:  # a name that cannot be encoded, or has a null byte
        raise ConfigError(f"{str(path)!r} cannot be written: {error}; use another path.") from error
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` that takes its place at the end; after an error nothing is left.

    Args:
        path: File to write; its folders are made, an old file is replaced at once.

    Raises:
        ConfigError: If it cannot be written, a full disk included.
    """
    path = check_writable(path)
    in_place = path.exists() and not path.is_file()
    target = path if in_place else path.resolve()
    partial = target if in_place else target.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if not in_place:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(target)
    except OSError as error:
        raise _cannot(path, error.strerror or str(error)) from error
    finally:
        if not in_place:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _try(target: Path) -> None:
    """Raise OSError or ValueError if a file cannot be made there."""
    folder = Path(target.anchor or ".")
    for part in [*reversed(target.parents), target]:
        try:
            is_folder = stat.S_ISDIR(os.stat(part).st_mode)
        except FileNotFoundError:
            continue
        if part == target:
            if is_folder:
                raise IsADirectoryError(0, "it is a folder, not a file")
            if not part.is_file():
                return
            if not os.access(part, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        elif not is_folder:
            raise NotADirectoryError(0, f"{part} is a file, not a folder")
        else:
            folder = part
    with tempfile.TemporaryFile(dir=folder):
        pass


def _cannot(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path} cannot be written: {why}; use another path.")
