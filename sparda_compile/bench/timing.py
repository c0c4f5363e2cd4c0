"""Times of the device, by events; medians with their spread."""

from __future__ import annotations

import dataclasses
import statistics
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["Spread", "graph_us", "time_calls", "wait_for"]


@dataclasses.dataclass(frozen=True)
class Spread:
    """A median with its spread, microseconds.

    Attributes:
        median: Of all runs.
        low: 10th percentile.
        high: 90th percentile.
        runs: How many.
    """

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise some times."""
        ordered = sorted(values)
        tenth = len(ordered) // 10
        return cls(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))

    def to_dict(self) -> dict[str, float]:
        """Return plain numbers."""
        return {k: round(v, 3) for k, v in dataclasses.asdict(self).items()}


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was told; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(call: Callable[[], object], runs: int) -> list[float]:
    """Return the time of each of `runs` calls, microseconds on the current stream.

    Without a GPU it is the time that the CPU takes, for tests alone.
    """
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for _ in range(runs):
            call()
            times.append(time.perf_counter())
        return [1e6 * (b - a) for a, b in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]


def graph_us(calls: Sequence[Callable[[], object]], rounds: int = 20) -> Spread:
    """Return the time of one call, from CUDA graphs of all of them in a row.

    Args:
        calls: The same work on different data, so that no cache serves it.
        rounds: Replays.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = time_calls(graph.replay, rounds)
    return Spread.of([us / len(calls) for us in times])
