"""What every command prints with: consoles, progress, JSON, and errors as one sentence."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer
from rich.console import Console

from sparda_compile.cli.wording import in_options
from sparda_compile.errors import ConfigError, SpardaError
from sparda_compile.progress import showing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "CANNOT",
    "INTERRUPTED",
    "AsJson",
    "default_page",
    "errors_as_sentences",
    "fail",
    "make_console",
    "print_json",
    "print_paths",
    "progress",
]

CANNOT: Final = 1
INTERRUPTED: Final = 130
_WRONG_USAGE: Final = 2
_WIDTH: Final = 110

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone.")]


def default_page(name: str, as_json: bool) -> Path | None:
    """Return the page to write when none was named: none beside JSON."""
    return None if as_json else Path(name)


def print_json(value: dict[str, Any]) -> None:
    """Print one line of JSON."""
    typer.echo(json.dumps(value))


def print_paths(paths: list[Path | None]) -> None:
    """Say which files were written."""
    for path in paths:
        if path is not None:
            typer.echo(f"Wrote {path}")


def make_console(*, stderr: bool = False) -> Console:
    """Return a console; what is no terminal, nor has COLUMNS, gets room enough for the tables."""
    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _WIDTH
    return console


def fail(message: str, code: int) -> NoReturn:
    """Print an error and exit with a code."""
    make_console(stderr=True).print(f"Error: {message}", markup=False, style="red", soft_wrap=True)
    raise typer.Exit(code)


@contextlib.contextmanager
def errors_as_sentences(command: Callable[..., None] | None = None) -> Iterator[None]:
    """Print the sentence of an error of ours, and nothing else, and exit.

    Args:
        command: Whose options stand in the sentence for what the library calls them.
    """
    options = inspect.signature(command).parameters if command is not None else {}
    try:
        yield
    except SpardaError as error:
        code = _WRONG_USAGE if isinstance(error, ConfigError) else CANNOT
        fail(in_options(str(error), options), code)


class _PassNames(logging.Handler):
    """Shows which pass ended last, on the status line."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__(logging.DEBUG)
        self.show = show

    def emit(self, record: logging.LogRecord) -> None:
        """Show the first words of a message: phase and pass."""
        self.show(record.getMessage().partition(":")[0])


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is being done: a status line, or plain lines."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        yield lambda text: console.print(f"{text} ...", markup=False, style="dim")
        return
    current = ""
    with showing(False), console.status("starting") as status:

        def say(text: str) -> None:
            nonlocal current
            current = text
            status.update(text)

        log = logging.getLogger("sparda_compile.passes")
        handler, level = _PassNames(lambda name: status.update(f"{current}: {name}")), log.level
        log.addHandler(handler)
        log.setLevel(logging.DEBUG)
        try:
            yield say
        finally:
            log.removeHandler(handler)
            log.setLevel(level)
