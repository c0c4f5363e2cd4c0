"""The two streams that sparda ops run on, and the one place that orders them.

An op that may leave the compute stream takes `stream` and hands its work to the current engine:

    submit(stream, work)   run `work` in the order of that stream
    record(event)          mark the point that the copy stream has reached
    wait(event)            the compute stream goes on only when the copy stream has passed the mark

On the CPU nothing runs at the same time, so `ImmediateEngine` does all work where it is issued.
`CudaEngine` owns a real copy stream and the events between it and the compute stream.
`DeferredEngine` does the copy stream's work as late as its waits allow, or at random points before
that: a program that is right under every such engine has no missing wait. Tests use it, and
`DelayEngine`, which makes a GPU's streams slow at random points.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from sparda_compile.schedule import COMPUTE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "CudaEngine",
    "DeferredEngine",
    "DelayEngine",
    "Engine",
    "ImmediateEngine",
    "current_engine",
    "use_engine",
]


class Engine(Protocol):
    """Orders the work of the two streams."""

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run `work` in the order of `stream`."""

    def record(self, event: int) -> None:
        """Mark the point that the copy stream has reached."""

    def wait(self, event: int) -> None:
        """Let the compute stream go on only when the copy stream has passed `event`."""


class ImmediateEngine:
    """Does every piece of work where it is issued."""

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run `work` now."""
        del stream
        work()

    def record(self, event: int) -> None:
        """Do nothing: all work is done."""

    def wait(self, event: int) -> None:
        """Do nothing: all work is done."""


class DeferredEngine:
    """Does the copy stream's work late, to show what a missing wait would do.

    Args:
        seed: None runs copy work only when a wait asks for it. A number runs random amounts of
            it earlier, at every point where the compute stream does something.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._queue: deque[Callable[[], None] | int] = deque()
        self._random = None if seed is None else random.Random(seed)

    @property
    def num_pending(self) -> int:
        """Pieces of copy work that are not done yet."""
        return sum(callable(entry) for entry in self._queue)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run compute work now and queue copy work."""
        if stream != COMPUTE:
            self._queue.append(work)
            return
        if self._random is not None:
            for _ in range(self._random.randint(0, len(self._queue))):
                self._step()
        work()

    def record(self, event: int) -> None:
        """Queue the mark behind the work issued so far."""
        self._queue.append(event)

    def wait(self, event: int) -> None:
        """Do queued work in order until the mark is passed."""
        while event in self._queue:
            self._step()

    def _step(self) -> None:
        entry = self._queue.popleft()
        if callable(entry):
            entry()


class CudaEngine:
    """The compute stream is whatever stream is current; the copy stream is this engine's own.

    Copy work starts behind everything that was issued to the compute stream before it. So it may
    use memory that the compute stream has just given back: the allocator's order is the program's.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Its kernels are few and small: they should not queue behind a wave of a large one.
        self._copy = torch.cuda.Stream(device, priority=-1)
        self._events: dict[int, torch.cuda.Event] = {}

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Issue `work` to a stream."""
        if stream == COMPUTE:
            work()
            return
        self._copy.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copy):
            work()

    def record(self, event: int) -> None:
        """Mark the point that the copy stream has reached."""
        if event not in self._events:
            self._events[event] = torch.cuda.Event()
        self._events[event].record(self._copy)

    def wait(self, event: int) -> None:
        """Let the compute stream go on only when the copy stream has passed `event`."""
        torch.cuda.current_stream(self._device).wait_event(self._events[event])


class DelayEngine(CudaEngine):
    """A CudaEngine whose streams idle at random points, to show what a missing wait would do.

    Args:
        device: A CUDA device.
        seed: Of the points and lengths.
        longest_us: Longest delay, microseconds.
    """

    def __init__(self, device: torch.device, seed: int, longest_us: float = 200.0) -> None:
        super().__init__(device)
        self._random = random.Random(seed)
        self._cycles = int(longest_us * 1e3)  # of about a nanosecond

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Issue `work` behind a delay, now and then."""
        super().submit(stream, self._idle)
        super().submit(stream, work)
        super().submit(stream, self._idle)

    def _idle(self) -> None:
        if self._random.random() < 0.5:
            torch.cuda._sleep(self._random.randrange(1, self._cycles))


_IMMEDIATE = ImmediateEngine()
_ENGINE: contextvars.ContextVar[Engine] = contextvars.ContextVar("engine", default=_IMMEDIATE)


def current_engine() -> Engine:
    """Return the engine that ops submit to."""
    return _ENGINE.get()


@contextlib.contextmanager
def use_engine(engine: Engine) -> Iterator[Engine]:
    """Make ops submit to `engine` inside the block."""
    token = _ENGINE.set(engine)
    try:
        yield engine
    finally:
        _ENGINE.reset(token)
