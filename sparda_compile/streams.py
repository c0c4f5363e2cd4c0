"""The three streams that sparda ops run on, and the one place that orders them.

    compute   the model and all that its tokens need at once
    select    which blocks a layer to come will read: scores, ids, pages
    copy      blocks between CPU and device

Selection has a stream of its own so that the link never stands still for it: while one layer's
blocks are copied, the next layer's are already chosen. An op that may leave the compute stream
takes `stream` and hands its work to the current engine:

    submit(stream, work)   run `work` in the order of that stream; what is issued to `select` starts
                           behind all compute issued before it, what is issued to `copy` behind all
                           compute and selection
    record(event)          mark the point that the copy stream has reached
    wait(event)            the compute stream goes on only when the copy stream has passed the mark

On the CPU nothing runs at the same time, so `ImmediateEngine` does all work where it is issued.
`CudaEngine` owns real streams and the events between them. `DeferredEngine` does the work of the
side streams as late as the waits allow, or at random points before that: a program that is right
under every such engine has no missing wait. Tests use it, and `DelayEngine`, which makes a GPU's
streams slow at random points.
"""

from __future__ import annotations

import contextlib
import contextvars
import random
from collections import deque
from typing import TYPE_CHECKING, Protocol

import torch

from sparda_compile.schedule import COMPUTE, COPY, SELECT

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
    """Orders the work of the streams."""

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
    """Does the side streams' work late, to show what a missing wait would do.

    Args:
        seed: None runs side work only when a wait asks for it. A number runs random amounts of
            it earlier, at every point where the compute stream does something.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._copies: deque[Callable[[], None] | int] = deque()
        # Each with the number of entries of the copy stream that were issued before it.
        self._selections: deque[tuple[int, Callable[[], None]]] = deque()
        self._issued = self._copied = 0
        self._random = None if seed is None else random.Random(seed)

    @property
    def num_pending(self) -> int:
        """Pieces of side work that are not done yet."""
        return sum(callable(entry) for entry in self._copies) + len(self._selections)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run compute work now and queue side work."""
        if stream == SELECT:
            self._selections.append((self._issued, work))
        elif stream == COPY:
            self._issue(work)
        else:
            if self._random is not None:
                for _ in range(self._random.randint(0, len(self._selections))):
                    self._select()
                for _ in range(self._random.randint(0, len(self._copies))):
                    self._copy()
            work()

    def record(self, event: int) -> None:
        """Queue the mark behind the work issued so far."""
        self._issue(event)

    def wait(self, event: int) -> None:
        """Do queued work in order until the mark is passed."""
        while event in self._copies:
            self._copy()

    def _issue(self, entry: Callable[[], None] | int) -> None:
        self._copies.append(entry)
        self._issued += 1

    def _select(self) -> None:
        _, work = self._selections.popleft()
        work()

    def _copy(self) -> None:
        entry = self._copies.popleft()
        while self._selections and self._selections[0][0] <= self._copied:
            self._select()
        self._copied += 1
        if callable(entry):
            entry()


class CudaEngine:
    """The compute stream is whatever stream is current; the side streams are this engine's own.

    Side work starts behind everything that was issued to the compute stream before it. So it may
    use memory that the compute stream has just given back: the allocator's order is the program's.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Their kernels are few and small: they should not queue behind a wave of a large one.
        self._copy = torch.cuda.Stream(device, priority=-1)
        self._select = torch.cuda.Stream(device, priority=-1)
        self._has_selected = False
        self._events: dict[int, torch.cuda.Event] = {}

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Issue `work` to a stream."""
        if stream == COMPUTE:
            work()
            return
        side = self._select if stream == SELECT else self._copy
        side.wait_stream(torch.cuda.current_stream(self._device))
        if stream == SELECT:
            self._has_selected = True
        elif self._has_selected:
            # Only where there is something to wait for: a stream that a capture has not seen yet
            # cannot be waited for in it.
            side.wait_stream(self._select)
            self._has_selected = False
        with torch.cuda.stream(side):
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
