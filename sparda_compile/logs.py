"""The log on standard error, asked for by `SPARDA_LOGS`.

    SPARDA_LOGS=info                     what was built, what was compiled and how long it took
    SPARDA_LOGS=debug                    every pass and every stage of the start-up work too
    SPARDA_LOGS=passes=debug             of the room `passes` all, of the others warnings
    SPARDA_LOGS=info,passes=debug        both

The variable is read when the package is imported. Without it the package adds no handler to any
logger, as a library should; the program that uses it may add its own.

Imports neither torch nor rich.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Final

from sparda_compile.checks import one_of
from sparda_compile.errors import ConfigError

__all__ = ["LOG_VARIABLE", "show_logs", "show_logs_from_environment"]

LOG_VARIABLE: Final = "SPARDA_LOGS"

_LEVELS: Final = ("debug", "info", "warning", "error")
_PACKAGE: Final = __name__.partition(".")[0]
_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _Handler(logging.Handler):
    """Writes to whatever standard error is at the time, so a status line there stays whole.

    Levels are kept here too: a command that listens to a room more closely shows no more of it.
    """

    def __init__(self, levels: dict[str, int]) -> None:
        super().__init__()
        self.levels = levels
        self.setFormatter(logging.Formatter(_FORMAT))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record that its room's level lets through."""
        name = record.name
        while name not in self.levels:
            name = name.rpartition(".")[0]
        if record.levelno >= self.levels[name] and sys.stderr is not None:
            sys.stderr.write(self.format(record) + "\n")


def show_logs(text: str) -> None:
    """Show the package's log on standard error; the last call counts.

    Args:
        text: `LEVEL` and `ROOM=LEVEL`, separated by commas. A level is debug, info, warning or
            error; a room is a folder or a file of the package, such as `passes` or `progress`.
            Empty shows nothing.

    Raises:
        ConfigError: If a level or a room is not known; the log stays as it was then.
    """
    levels = _parse(text)
    top = logging.getLogger(_PACKAGE)
    for handler in list(top.handlers):
        if isinstance(handler, _Handler):
            top.removeHandler(handler)
            for name in handler.levels:
                logging.getLogger(name).setLevel(logging.NOTSET)
    if text:
        top.addHandler(_Handler(levels))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def show_logs_from_environment() -> None:
    """Do what `SPARDA_LOGS` says; a value that is not allowed gives a warning and no log."""
    try:
        show_logs(os.environ.get(LOG_VARIABLE, ""))
    except ConfigError as error:
        warnings.warn(f"no log is shown: {error}", stacklevel=2)


def _parse(text: str) -> dict[str, int]:
    """Return levels by name of the logger; that of the package is always there."""
    levels = {_PACKAGE: logging.WARNING}
    for part in text.split(",") if text else ():
        room, equals, level = part.strip().rpartition("=")
        one_of(f"{LOG_VARIABLE}={text}: level", level.lower(), _LEVELS)
        if equals:
            _check_room(text, room)
        levels[f"{_PACKAGE}.{room}" if equals else _PACKAGE] = getattr(logging, level.upper())
    return levels


def _check_room(text: str, room: str) -> None:
    package = Path(__file__).parent
    path = package.joinpath(*room.split("."))
    if re.fullmatch(r"[a-z_]\w*([.][a-z_]\w*)*", room) and (
        path.is_dir() or path.with_suffix(".py").is_file()
    ):
        return
    names = (each.name for each in package.iterdir())
    rooms = {name.partition(".")[0] for name in names if re.fullmatch(r"[a-z]\w*([.]py)?", name)}
    one_of(f"{LOG_VARIABLE}={text}: room", room, sorted(rooms))
