"""Times of the device, by events; medians with their spread."""

from __future__ import annotations

import dataclasses
import statistics
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "Spread",
    "graph_us",
    "graphs_us",
    "matmul_tflops",
    "time_calls",
    "time_turns",
    "wait_for",
]

# Rows and columns of a large product.
_SIZE: Final = 8192


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
    return time_turns([call], runs)[0]


def time_turns(calls: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the times of calls that take turns, `rounds` of each; as `time_calls`."""
    order = [call for _ in range(rounds) for call in calls]
    if not torch.cuda.is_available():
        times = [time.perf_counter()]
        for call in order:
            call()
            times.append(time.perf_counter())
        spans = [1e6 * (b - a) for a, b in pairwise(times)]
    else:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(order) + 1)]
        events[0].record()
        for call, event in zip(order, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        spans = [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]
    return [spans[place :: len(calls)] for place in range(len(calls))]


def graph_us(calls: Sequence[Callable[[], object]], rounds: int = 20) -> Spread:
    """Return the time of one call, from CUDA graphs of all of them in a row.

    Args:
        calls: The same work on different data, so that no cache serves it.
        rounds: Replays.
    """

    def every() -> None:
        for call in calls:
            call()

    times = graphs_us({"": every}, rounds)[""]
    return Spread.of([us / len(calls) for us in times])


def graphs_us(programs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the times of programs, each one CUDA graph, that take turns.

    Args:
        programs: By name; each is called once as it is, and once while it is captured.
        rounds: Replays of each.
    """
    graphs = {}
    for name, program in programs.items():
        program()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            program()
        graphs[name].replay()
    times = time_turns([graph.replay for graph in graphs.values()], rounds)
    return dict(zip(graphs, times, strict=True))


def matmul_tflops(device: torch.device) -> float:
    """Return the rate of a large matrix multiplication in bf16."""
    a, b = (torch.randn(_SIZE, _SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    out = torch.empty_like(a)
    multiply = partial(torch.mm, a, b, out=out)
    time_calls(multiply, 5)  # clocks rise
    us = Spread.of(time_calls(multiply, 20)).median
    return round(2 * _SIZE**3 / us / 1e6, 1)
