"""The conversation of `sparda chat` at a terminal, or with what a pipe gives it.

Answers go to standard output, and everything else to standard error. At a terminal an error is
said and the conversation goes on; in a pipe it ends it, so that a script sees it.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import typer

from sparda_compile.cli.chat_commands import in_commands, run_command
from sparda_compile.cli.console import INTERRUPTED, fail, make_console, print_json, progress
from sparda_compile.errors import ConfigError, SpardaError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparda_compile.chat.conversation import Conversation
    from sparda_compile.chat.streaming import Stop
    from sparda_compile.chat.turn import Turn

__all__ = ["ChatLoop", "interruptible", "lines_of_a_pipe", "lines_of_a_terminal"]

_PROMPT: Final = "> "
_STOPPING: Final = b"\n(stops behind the next token; Ctrl-C again stops at once)\n"


def lines_of_a_pipe() -> Iterator[str]:
    """Yield the lines of standard input; each is a turn."""
    _let_all_bytes_in()
    yield from sys.stdin


def lines_of_a_terminal() -> Iterator[str]:
    """Yield what is typed, until Ctrl-D; Ctrl-C clears the line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history
    _let_all_bytes_in()
    while (line := _typed()) is not None:
        yield line


def _let_all_bytes_in() -> None:
    """Let standard input hold bytes that are not UTF-8: the line that has them is refused."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")


def _check_text(line: str) -> None:
    try:
        line.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the line is no text: its character {error.start + 1} is not UTF-8; give it in UTF-8."
        ) from error


def _typed() -> str | None:
    """Return a line, an empty one for Ctrl-C, or None for Ctrl-D."""
    try:
        return input(_PROMPT)
    except EOFError:
        typer.echo()
        return None
    except KeyboardInterrupt:
        typer.echo("\n(Ctrl-D leaves)", err=True)
        return ""


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Let the first Ctrl-C inside the block end an answer, and the second one the block."""
    from sparda_compile.chat.streaming import Stop

    stop = Stop()

    def on_interrupt(*_: Any) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.is_set = True
        os.write(2, _STOPPING)  # all that a signal handler may safely do

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


class ChatLoop:
    """Takes turns.

    Args:
        conversation: Of which they are.
        is_terminal: Whether somebody sits in front of it.
        as_json: Whether to print an object for each turn, in the place of its answer.
    """

    def __init__(self, conversation: Conversation, *, is_terminal: bool, as_json: bool) -> None:
        self._conversation = conversation
        self._is_terminal, self._as_json = is_terminal, as_json
        self._facts = make_console(stderr=True)

    def run(self, lines: Iterator[str]) -> None:
        """Answer lines until there are no more, or one says so; blank ones are left out."""
        for line in lines:
            words = line.strip()
            if not words:
                continue
            try:
                if not self._take(words):
                    return
            except SpardaError as error:
                self._refuse(error)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    fail("interrupted.", INTERRUPTED)
                self.say("\nstopped at once: the question is taken back, and all is read again.")

    def say(self, text: str) -> None:
        """Say something that is no answer."""
        self._facts.print(text, style="dim", markup=False, soft_wrap=True)

    def _take(self, words: str) -> bool:
        """Take a turn; returns whether there may be another."""
        _check_text(words)
        if words.startswith("/"):
            with contextlib.ExitStack() as waiting:
                if self._is_terminal:
                    waiting.enter_context(progress())(words)
                said = run_command(words, self._conversation)
            if said is not None:
                self.say(said)
            return said is not None
        turn = self._ask(words)
        if self._as_json:
            print_json(turn.to_dict())
        else:
            typer.echo()
        if turn.note:
            self.say(turn.note)
        self.say(str(turn))
        return True

    def _ask(self, question: str) -> Turn:
        with contextlib.ExitStack() as waiting, self._stop() as stop:
            if self._is_terminal:
                waiting.enter_context(progress())("reading")

            def show(text: str) -> None:
                waiting.close()  # a status line and an answer do not share a terminal
                if not self._as_json:
                    typer.echo(text, nl=False)

            return self._conversation.ask(question, show, stop)

    def _stop(self) -> contextlib.AbstractContextManager[Stop | None]:
        return interruptible() if self._is_terminal else contextlib.nullcontext()

    def _refuse(self, error: SpardaError) -> None:
        message = in_commands(str(error))
        if not self._is_terminal:
            fail(message, 2 if isinstance(error, ConfigError) else 1)
        self._facts.print(f"Error: {message}", style="red", markup=False, soft_wrap=True)
