"""What runs the streams, and the one place that orders them.

An op that may leave the compute stream takes `stream` and hands its work to the current engine:

    submit(stream, work)    run `work` in the order of that stream, behind what was issued before to
                            the streams that `streams.BEHIND` names
    record(event, stream)   mark the point that a stream has reached
    wait(event, stream)     the stream goes on only when the mark has been passed

Selection has a stream of its own so that the link never stands still for it: while one layer's
blocks are copied, the next layer's are already chosen.

On the CPU nothing runs at the same time, so `ImmediateEngine` does all work where it is issued.
`CudaEngine` owns real streams and the events between them. `DeferredEngine` does the work of the
side streams as late as the waits allow, or at random points before that: a program that is right
under every such engine has no missing wait. Tests use it, and `DelayEngine`, which makes a GPU's
streams slow at random points.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import random
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import torch

from sparda_compile.isa.streams import ATTEND, BEHIND, COMPUTE, COPY, SELECT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

__all__ = [
    "CudaEngine",
    "DeferredEngine",
    "DelayEngine",
    "Engine",
    "ImmediateEngine",
    "current_engine",
    "submit_into",
    "use_engine",
]


_SIDE_STREAMS: Final = tuple(stream for stream in BEHIND if stream != COMPUTE)


class Engine(Protocol):
    """Orders the work of the streams."""

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run `work` in the order of `stream`."""

    def record(self, event: int, stream: int = COPY) -> None:
        """Mark the point that `stream` has reached."""

    def wait(self, event: int, stream: int = COMPUTE) -> None:
        """Let `stream` go on only when the mark has been passed."""


class ImmediateEngine:
    """Does every piece of work where it is issued."""

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run `work` now."""
        del stream
        work()

    def record(self, event: int, stream: int = COPY) -> None:
        """Do nothing: all work is done."""

    def wait(self, event: int, stream: int = COMPUTE) -> None:
        """Do nothing: all work is done."""


@dataclasses.dataclass(frozen=True)
class _Entry:
    """Something queued on a side stream.

    Attributes:
        work: What to do; None for a mark.
        event: The event of a mark, -1 for work.
        behind: How much of each other side stream has to be done before.
    """

    work: Callable[[], None] | None
    event: int
    behind: dict[int, int]


class DeferredEngine:
    """Does the side streams' work late, to show what a missing wait would do.

    Args:
        seed: None runs side work only when a wait asks for it. A number runs random amounts of
            it earlier, at every point where the compute stream does something.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._queues: dict[int, deque[_Entry]] = {stream: deque() for stream in _SIDE_STREAMS}
        self._done = dict.fromkeys(_SIDE_STREAMS, 0)
        # What a wait of a side stream adds to the next entry there.
        self._awaited: dict[int, dict[int, int]] = {stream: {} for stream in _SIDE_STREAMS}
        self._random = None if seed is None else random.Random(seed)

    @property
    def num_pending(self) -> int:
        """Pieces of side work that are not done yet."""
        return sum(e.work is not None for queue in self._queues.values() for e in queue)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Run compute work now and queue side work."""
        if stream != COMPUTE:
            self._issue(stream, work, -1)
            return
        if self._random is not None:
            for side, queue in self._queues.items():
                for _ in range(self._random.randint(0, len(queue))):
                    if queue:  # another stream's work may have asked for it
                        self._run_next(side)
        work()

    def record(self, event: int, stream: int = COPY) -> None:
        """Queue the mark behind the work issued so far; compute's is passed at once."""
        if stream != COMPUTE:
            self._issue(stream, None, event)

    def wait(self, event: int, stream: int = COMPUTE) -> None:
        """Do queued work in order until the mark is passed; a side stream does so in its turn."""
        for side, queue in self._queues.items():
            places = [i for i, entry in enumerate(queue) if entry.event == event]
            if not places:
                continue
            end = self._done[side] + places[-1] + 1
            if stream != COMPUTE:
                self._awaited[stream][side] = max(end, self._awaited[stream].get(side, 0))
            else:
                self._run_until(side, end)

    def _issue(self, stream: int, work: Callable[[], None] | None, event: int) -> None:
        behind = {s: self._num_issued(s) for s in BEHIND[stream] if s != COMPUTE}
        for side, count in self._awaited[stream].items():
            behind[side] = max(count, behind.get(side, 0))
        self._queues[stream].append(_Entry(work, event, behind))

    def _num_issued(self, stream: int) -> int:
        return self._done[stream] + len(self._queues[stream])

    def _run_until(self, stream: int, count: int) -> None:
        while self._done[stream] < count:
            self._run_next(stream)

    def _run_next(self, stream: int) -> None:
        entry = self._queues[stream].popleft()
        for side, count in entry.behind.items():
            self._run_until(side, count)
        self._done[stream] += 1
        if entry.work is not None:
            entry.work()


class CudaEngine:
    """The compute stream is whatever stream is current; the side streams are this engine's own.

    Side work starts behind everything that was issued to the compute stream before it. So it may
    use memory that the compute stream has just given back: the allocator's order is the program's.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sides: dict[int, torch.cuda.Stream] = {}
        # By stream, the side streams that have had work since it waited for them. Only those are
        # waited for: a stream that a capture has not seen yet cannot be waited for in it.
        self._news: dict[int, set[int]] = {stream: set() for stream in _SIDE_STREAMS}
        self._events: dict[int, torch.cuda.Event] = {}
        for usual in (COPY, SELECT):
            self._stream(usual)

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Issue `work` to a stream."""
        if stream == COMPUTE:
            work()
            return
        side = self._stream(stream)
        side.wait_stream(torch.cuda.current_stream(self._device))
        for other in self._news[stream].intersection(BEHIND[stream]):
            side.wait_stream(self._sides[other])
            self._news[stream].discard(other)
        for news in self._news.values():
            news.add(stream)
        with torch.cuda.stream(side):
            work()

    def record(self, event: int, stream: int = COPY) -> None:
        """Mark the point that a stream has reached."""
        if event not in self._events:
            self._events[event] = torch.cuda.Event()
        self._events[event].record(self._stream(stream))

    def wait(self, event: int, stream: int = COMPUTE) -> None:
        """Let a stream go on only when the mark has been passed."""
        self._stream(stream).wait_event(self._events[event])

    def forget(self) -> None:
        """Forget the work issued so far: it was captured, and the capture has failed."""
        for news in self._news.values():
            news.clear()

    def _stream(self, stream: int) -> torch.cuda.Stream:
        if stream == COMPUTE:
            return torch.cuda.current_stream(self._device)
        if stream not in self._sides:
            # Kernels of a copy or a selection are few and small: they should not queue behind a
            # wave of a large one. Attention that begins early is one itself, and holds up nobody
            # but the selection beside it.
            priority = 0 if stream == ATTEND else -1
            self._sides[stream] = torch.cuda.Stream(self._device, priority=priority)
        return self._sides[stream]


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


def submit_into(
    stream: int, results: tuple[Tensor, ...], work: Callable[[], tuple[Tensor, ...]]
) -> None:
    """Do work on a stream; `results`, made on the compute stream, take what it returns.

    Args:
        stream: Where it runs.
        results: Tensors to fill.
        work: Returns what goes into them.
    """

    def fill() -> None:
        for result, value in zip(results, work(), strict=True):
            result.copy_(value)

    current_engine().submit(stream, fill)


@contextlib.contextmanager
def use_engine(engine: Engine) -> Iterator[Engine]:
    """Make ops submit to `engine` inside the block."""
    token = _ENGINE.set(engine)
    try:
        yield engine
    finally:
        _ENGINE.reset(token)
