"""The predicted times of a program: each stream by itself, and what streams cost each other.

A side stream has the higher priority, and what it does takes the time that it takes alone. What it
takes from the compute stream meanwhile is

    a copy          the share `Machine.copy_share` of the rate of all that is no copy: it holds
                    multiprocessors, and shares the memory system
    anything else   the share of the bandwidth that it uses, or of the device if `Cost` says more:
                    what it leaves is the most that work on the compute stream gets

so a node that uses the share m of the bandwidth while it runs alone goes on at the rate

    min(1, (1 - taken) / m) * (1 - copy_share if a copy is in flight)

and an op of ours in a decode at 1 - `Machine.crowd_share` of that beside a copy or a selection.
Copies of two streams share the link: while both are in flight, each has half of its rate.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from typing import TYPE_CHECKING, NamedTuple

from sparda_compile.graph.effects import awaited_event, started_event, stream_of
from sparda_compile.graph.nodes import call_name, is_sparda
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.streams import BEHIND, COMPUTE, SELECT, STREAM_NAMES
from sparda_compile.passes.schedule.cost import costs_of
from sparda_compile.report.schedule import ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import fx

    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.machine import Machine
    from sparda_compile.passes.schedule.cost import Cost


__all__ = ["Simulator", "end_us", "predict"]


def end_us(rows: Sequence[ScheduleRow]) -> float:
    """Return when the last row ends, microseconds."""
    return max((row.end_us for row in rows), default=0.0)


def predict(graph: fx.Graph, ctx: PassContext) -> list[ScheduleRow]:
    """Predict the times of a program as it stands, scheduled or not."""
    simulator = Simulator(costs_of(graph, ctx), ctx)
    return simulator.rows(graph.nodes, {node: stream_of(node) for node in graph.nodes})


class _Item(NamedTuple):
    """What a node is for its times."""

    us: float
    memory: float  # share of the bandwidth that it uses
    taken: float  # share of the device that it takes from what runs beside it
    is_copy: bool
    is_small: bool
    awaits: int | None
    starts: int | None


class Simulator:
    """Predicts the times of a program in any order, on any streams.

    Each stream runs its nodes in program order, a side stream behind what `streams.BEHIND` says. A
    wait holds its stream back to its event. On a machine without overlap all streams are one.

    Args:
        costs: Cost of each node.
        ctx: What the pass knows.
    """

    def __init__(self, costs: Mapping[fx.Node, Cost], ctx: PassContext) -> None:
        self._costs = costs
        self._machine = ctx.machine
        found = {n: _item(n, cost, ctx) for n, cost in costs.items() if cost.us or is_sparda(n)}
        # Most nodes are views and inputs, which take no time and hold nobody back.
        self._items = {n: item for n, item in found.items() if item.us or item[5:] != (None, None)}

    def end_us(self, nodes: Iterable[fx.Node], streams: Mapping[fx.Node, int]) -> float:
        """Return when the last node ends, microseconds; arguments as for `rows`."""
        return max((end for _, _, end in self._times(nodes, streams)), default=0.0)

    def rows(self, nodes: Iterable[fx.Node], streams: Mapping[fx.Node, int]) -> list[ScheduleRow]:
        """Return the predicted times of nodes in program order, with the stream of each."""
        nodes = list(nodes)
        times = {node: (start, end) for node, start, end in self._times(nodes, streams)}
        clock = dict.fromkeys(range(len(STREAM_NAMES)), 0.0)
        rows = []
        for node in nodes:
            if node.op in ("placeholder", "output"):
                continue
            cost, stream = self._costs[node], streams[node]
            lane = self._lane(stream)
            start, end = times.get(node, (clock[lane], clock[lane]))
            clock[lane] = end
            if cost.us or is_sparda(node):
                waits = self._machine.overlaps and awaited_event(node) is not None
                rows.append(
                    ScheduleRow(
                        node.name,
                        call_name(node),
                        int(LAYER.get(node, -1)),
                        stream,
                        start,
                        end,
                        cost.hbm_bytes,
                        cost.link_bytes,
                        end - start if waits else 0.0,
                    )
                )
        return rows

    def _lane(self, stream: int) -> int:
        return stream if self._machine.overlaps else COMPUTE

    def _times(
        self, nodes: Iterable[fx.Node], streams: Mapping[fx.Node, int]
    ) -> Iterator[tuple[fx.Node, float, float]]:
        """Yield start and end of each node that takes time, starts or awaits something.

        A copy is yielded again if it ends later, because another one takes a part of the link.
        """
        clock = [0.0] * len(STREAM_NAMES)
        beside = _Beside(self._machine)
        copying: _Copy | None = None  # the last one that was issued to a side stream
        event_end: dict[int, float] = {}
        items, overlaps = self._items, self._machine.overlaps
        for node in nodes:
            item = items.get(node)
            if item is None:
                continue
            lane = streams[node] if overlaps else COMPUTE
            if item.awaits is not None:
                start = clock[lane]
                end = max(start, event_end.get(item.awaits, 0.0)) if overlaps else start
            else:
                start = max([clock[lane], *[clock[each] for each in BEHIND[lane]]])
                is_aside = item.is_copy and lane != COMPUTE
                if is_aside and copying is not None and copying.end > start:
                    shared = min(item.us, copying.end - start)
                    item = item._replace(us=item.us + shared)
                    longer = copying._replace(end=copying.end + shared)
                    clock[longer.lane] = beside.lengthen(longer)
                    if longer.event is not None:
                        event_end[longer.event] = longer.end
                    yield longer.node, longer.start, longer.end
                end = beside.end_of(item, start, lane)
                if is_aside:
                    copying = _Copy(node, lane, start, end, item.starts)
            clock[lane] = end
            if item.starts is not None:
                event_end[item.starts] = end
            yield node, start, end


class _Copy(NamedTuple):
    """A copy on a side stream, and the event that it records."""

    node: fx.Node
    lane: int
    start: float
    end: float
    event: int | None


def _item(node: fx.Node, cost: Cost, ctx: PassContext) -> _Item:
    memory = cost.hbm_bytes / (ctx.machine.memory_gbps * 1e3 * cost.us) if cost.us else 0.0
    memory = min(memory, 1.0)
    return _Item(
        cost.us,
        memory,
        max(memory, cost.least_taken),
        is_copy=cost.link_bytes > 0,
        is_small=ctx.is_decode and is_sparda(node),
        awaits=awaited_event(node),
        starts=started_event(node),
    )


class _Span(NamedTuple):
    """Work of a side stream: when it runs, and what it takes from the compute stream meanwhile."""

    start: float
    end: float
    taken: float
    is_copy: bool


class _Beside:
    """What side streams do while the compute stream works.

    In program order all that runs beside a node of the compute stream is known when that node
    comes, and what has ended by then is forgotten.
    """

    def __init__(self, machine: Machine) -> None:
        self._copy_rate = 1.0 - machine.copy_share
        self._crowd_rate = 1.0 - machine.crowd_share
        self._spans: defaultdict[int, deque[_Span]] = defaultdict(deque)

    def end_of(self, item: _Item, start: float, lane: int) -> float:
        """Return when work that starts at a time on a stream ends, microseconds."""
        if lane == COMPUTE:
            return self._slowed(item, start) if item.us else start
        end = start + item.us
        if item.us:
            self._spans[lane].append(_Span(start, end, item.taken, item.is_copy))
        return end

    def lengthen(self, copy: _Copy) -> float:
        """Let the last work of a side stream, a copy, end later; return when it does."""
        spans = self._spans[copy.lane]
        if spans:
            spans[-1] = spans[-1]._replace(end=copy.end)
        return copy.end

    def _slowed(self, item: _Item, start: float) -> float:
        """Return when work of the compute stream ends."""
        now, left = start, item.us
        while True:
            change, taken, rate, crowd = math.inf, 0.0, 1.0, 1.0
            for lane, spans in self._spans.items():
                while spans and spans[0].end <= now:
                    spans.popleft()
                if not spans:
                    continue
                span = spans[0]  # of one stream one at a time
                if span.start > now:
                    change = min(change, span.start)
                    continue
                change = min(change, span.end)
                taken += span.taken
                if span.is_copy:
                    rate = self._copy_rate
                if item.is_small and (span.is_copy or lane == SELECT):
                    crowd = self._crowd_rate
            rate *= crowd
            if item.memory > 1.0 - taken:
                rate *= max(1.0 - taken, 0.0) / item.memory
            if left <= rate * (change - now):
                return now + left / rate
            left -= rate * (change - now)
            now = change
