"""What the library does during its long first calls: a line on a terminal, a log, and times.

    with stage("compile", "piece of the decode step", done=3, total=6):
        ...

On a terminal this shows `sparda: compiling piece 3 of 6 of the decode step` on standard error, in
one line that is rewritten in place and gone when the work is done; short work shows nothing. What
is no terminal, as a notebook or a file, gets a plain line every ten seconds of long work. Every
stage that ends is logged, and counted by `stage_times`.

Imports neither torch nor rich; rich is imported by the first line that is shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

__all__ = ["STAGES", "StageTimes", "showing", "stage", "stage_times"]

STAGES: Final = ("capture", "passes", "verify", "compile", "allocate")

# What a line begins with, and what it goes on with where the caller names nothing.
_WORDS: Final = {
    "capture": ("tracing", "the model"),
    "passes": ("rewriting", "the graph"),
    "verify": ("checking", "the order of all copies"),
    "compile": ("compiling", "the program"),
    "allocate": ("allocating", "the KV cache"),
}
# Work shorter than this shows nothing; stages less apart than this are one piece of work.
_QUIET_S: Final = 0.3
# What is no terminal keeps all lines, so it gets few: one each time that so much has passed.
_PLAIN_S: Final = 10.0

_log = logging.getLogger(__name__)


@dataclasses.dataclass(eq=False)
class StageTimes:
    """What the stages inside a `stage_times` block took.

    Attributes:
        seconds: By name of stage, without the stages inside it; stages of threads add up.
        counts: How many stages of that name have ended.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        """Count a stage that has ended."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.counts[name] = self.counts.get(name, 0) + 1


@dataclasses.dataclass(eq=False)
class _Stage:
    """A stage that has begun: what the line says, and seconds of the stages inside it."""

    text: str
    inside: float = 0.0


class _Line:
    """The line on the terminal. All threads share it: it shows the stage that began last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.open: list[_Stage] = []
        self.num_silent = 0
        self.began = 0.0
        self.said = float("-inf")
        self.ended = float("-inf")
        self.status: Any = None
        self.timer: threading.Timer | None = None

    def enter(self, entered: _Stage) -> None:
        """Show a stage that begins."""
        with self.lock:
            now = time.monotonic()
            if not self.open and now - self.ended > _QUIET_S:
                self.began = now
            self.open.append(entered)
            self._draw()

    def leave(self, left: _Stage) -> None:
        """Show the stage around one that ends, or nothing."""
        with self.lock:
            self.open.remove(left)
            self.ended = time.monotonic()
            self._draw()

    def silence(self, change: int) -> None:
        """Count who wants no line: 1 more or, with -1, 1 less."""
        with self.lock:
            self.num_silent += change
            self._draw()

    def _draw(self) -> None:
        """Make the terminal show what it should; if that is too early, do it again in time."""
        if not self.open or self.num_silent or sys.stderr is None:
            self._erase()
            return
        if not sys.stderr.isatty():
            self._say()
            return
        wait = self.began + _QUIET_S - time.monotonic()
        if wait <= 0 or self.status is not None:
            self._write(self.open[-1].text)
        else:
            self._draw_in(wait)

    def _say(self) -> None:
        """Write a plain line, if the last one, or the begin of the work, is long enough ago."""
        now = time.monotonic()
        if now >= max(self.began, self.said) + _PLAIN_S:
            self.said = now
            sys.stderr.write(f"sparda: {self.open[-1].text}, {now - self.began:.0f} s so far\n")
            sys.stderr.flush()
        self._draw_in(max(self.began, self.said) + _PLAIN_S - now)

    def _draw_in(self, seconds: float) -> None:
        if self.timer is None:
            self.timer = threading.Timer(seconds, self._draw_later)
            self.timer.daemon = True
            self.timer.start()

    def _draw_later(self) -> None:
        with self.lock:
            self.timer = None
            self._draw()

    def _write(self, text: str) -> None:
        from rich.console import Console
        from rich.text import Text

        line = Text(f"sparda: {text}", no_wrap=True, overflow="ellipsis")
        if self.status is None:
            self.status = Console(stderr=True).status(line)
            self.status.start()
        else:
            self.status.update(line)

    def _erase(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.status is not None:
            status, self.status = self.status, None
            status.stop()


class _Stack(threading.local):
    """The open stages of a thread, outermost first."""

    def __init__(self) -> None:
        self.stages: list[_Stage] = []


_line: Final = _Line()
_stack: Final = _Stack()
_recorders: Final[list[StageTimes]] = []


@contextlib.contextmanager
def stage(name: str, what: str = "", *, done: int = 0, total: int = 0) -> Iterator[None]:
    """Say that a piece of start-up work is under way, and time it.

    Args:
        name: One of `STAGES`.
        what: What is worked on, such as `decode` or `piece of the decode step`.
        done: Which of `total` pieces this is, from 1 on.
        total: How many pieces there are; 0 says nothing about pieces.
    """
    assert name in STAGES, f"stage {name!r} is none of {', '.join(STAGES)}"
    here = _Stage(_sentence(name, what, done, total))
    around = _stack.stages[-1] if _stack.stages else None
    _stack.stages.append(here)
    begin = time.perf_counter()
    _line.enter(here)
    ended = "failed after"
    try:
        yield
        ended = "took"
    finally:
        _line.leave(here)
        seconds = time.perf_counter() - begin
        _stack.stages.remove(here)
        if around is not None:
            around.inside += seconds
        own = seconds - here.inside
        with _line.lock:
            for recorder in _recorders:
                recorder.add(name, own)
        level = logging.INFO if name == "compile" else logging.DEBUG
        _log.log(level, "%s: %s %s %.2f s", name, here.text, ended, own)


@contextlib.contextmanager
def stage_times() -> Iterator[StageTimes]:
    """Yield what all stages that end inside the block take, those of other threads too."""
    times = StageTimes()
    with _line.lock:
        _recorders.append(times)
    try:
        yield times
    finally:
        with _line.lock:
            _recorders.remove(times)


class showing:  # noqa: N801 - reads as the function that it is used as
    """Context manager inside which the line is shown, or is not.

    Whoever wants silence gets it: `showing(True)` inside `showing(False)` shows nothing. The log
    and the times stay as they are.

    Args:
        enabled: Usually `SpardaConfig.progress`.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        """Begin."""
        if not self.enabled:
            _line.silence(1)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End."""
        if not self.enabled:
            _line.silence(-1)


def _sentence(name: str, what: str, done: int, total: int) -> str:
    """Return what the line says: `compiling piece 3 of 6 of the decode step`."""
    verb, default = _WORDS[name]
    if not total:
        return f"{verb} {what or default}"
    thing, space, rest = (what or "piece").partition(" ")
    return f"{verb} {thing} {done} of {total}{space}{rest}"
