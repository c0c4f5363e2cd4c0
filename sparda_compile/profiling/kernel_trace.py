"""From a profiler's trace to the nodes of a plan: which kernel belongs to which node.

    trace    kernels of one replay by start time:  _score_forecast, nvjet.., _select_pages, ..
    plan     kernels that the nodes launch:        score_blocks -> _score_forecast, _raise_scores
                                                   select_pages -> _select_pages

A replayed CUDA graph does not say which stream a kernel was recorded on: the profiler gives each
branch of the graph a number of its own. But recording keeps the order of each stream as
dependences, so the kernels of our nodes on one stream start one after the other: those of one name
in program order, and each behind what its node depends on. A compiler may have changed the places
of others. What the trace shows is an interleaving of known sequences, one for each stream, and is
taken apart as one. Where a kernel's name would fit several streams, the way in which kernels of one
stream overlap least is taken.

Everything else is the model: matmuls, kernels that Inductor fused, ops of PyTorch.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any, Final

from torch import fx

from sparda_compile.errors import UnsupportedInputError
from sparda_compile.graph.dependences import dependence_graph
from sparda_compile.graph.effects import (
    argument,
    awaited_event,
    instruction,
    started_event,
    stream_of,
    takes,
)
from sparda_compile.graph.nodes import call_name, fake_value, is_sparda
from sparda_compile.graph.tags import LAYER
from sparda_compile.isa.streams import BEHIND, COMPUTE, STREAM_NAMES
from sparda_compile.isa.table import INSTRUCTIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = [
    "Kernel",
    "PlannedNode",
    "assign_kernels",
    "own_kernels",
    "planned_nodes",
    "read_kernels",
    "split_replays",
]

_DEVICE_WORK: Final = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_TIE_US: Final = 1e-3


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One piece of work on the device.

    Attributes:
        name: As the profiler gives it.
        start_us: Start, microseconds on the profiler's clock.
        end_us: End.
        launch: Number that it shares with what launched it: one for all kernels of a replay.
        stream: Number of its stream, or of its branch of a replayed graph; -1 if not known.
    """

    name: str
    start_us: float
    end_us: float
    launch: int
    stream: int = -1


@dataclasses.dataclass(frozen=True)
class PlannedNode:
    """A sparda node of a plan, and what it launches.

    Attributes:
        node: Name of the FX node.
        op: What it calls, `sparda.select_pages`.
        layer: Layer that it belongs to, -1 if none.
        stream: 0 compute, 1 copy, 2 select, 3 attend, 4 repair.
        kernels: Names of its kernels, in order; empty where it has none of its own.
        event: Event that it records or waits for, -1 for none.
        behind: Nodes with kernels that it depends on, directly or through nodes without.
    """

    node: str
    op: str
    layer: int
    stream: int
    kernels: tuple[str, ...]
    event: int = -1
    behind: frozenset[str] = frozenset()


def read_kernels(events: Iterable[Mapping[str, Any]]) -> list[Kernel]:
    """Return the work of the device in the events of a Chrome trace, by start time."""
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _DEVICE_WORK:
            start, launch = float(event["ts"]), int(event["args"].get("correlation", -1))
            end = start + float(event["dur"])
            stream = int(event["args"].get("stream", -1))
            found.append(Kernel(str(event["name"]), start, end, launch, stream))
    return sorted(found, key=lambda kernel: kernel.start_us)


def split_replays(kernels: Iterable[Kernel]) -> list[list[Kernel]]:
    """Return the kernels of each replay of a CUDA graph, in the order of the replays.

    All kernels of a replay carry the number of its launch; a kernel launched alone has one of its
    own, and is left out.
    """
    launches: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        launches.setdefault(kernel.launch, []).append(kernel)
    return [group for launch, group in launches.items() if launch >= 0 and len(group) > 1]


def planned_nodes(graph: fx.Graph, batch_size: int) -> tuple[PlannedNode, ...]:
    """Return the sparda nodes of a decode plan's graph, in program order."""
    dag = dependence_graph(graph)
    planned = []
    behind: dict[fx.Node, frozenset[str]] = {}
    for node in graph.nodes:
        nearest = [behind[source] for source in dag.pred.get(node, ())]
        behind[node] = frozenset().union(*nearest)
        if not is_sparda(node):
            continue
        kernels = _kernels(node, batch_size)
        layer = int(LAYER.get(node, -1))
        planned.append(
            PlannedNode(
                node.name,
                call_name(node),
                layer,
                stream_of(node),
                kernels,
                _event(node),
                behind[node],
            )
        )
        if kernels:
            behind[node] = frozenset((node.name,))
    return tuple(planned)


def _kernels(node: fx.Node, batch_size: int) -> tuple[str, ...]:
    it = instruction(node)
    assert it is not None
    if it.launched is None:
        return it.kernels
    given = {name: argument(node, name) for name in it.places}
    tensors = {n: fake_value(v) for n, v in given.items() if isinstance(v, fx.Node)}
    return it.launched({**given, **tensors}, batch_size)


def own_kernels() -> frozenset[str]:
    """Return the names of all kernels that ops of ours may launch in a decode step."""
    return frozenset(name for it in INSTRUCTIONS.values() for name in it.kernels)


def _event(node: fx.Node) -> int:
    events = (started_event(node), awaited_event(node))
    forked = argument(node, "event") if takes(node, "event") else -1
    return next((event for event in events if event is not None), int(forked))


def assign_kernels(
    kernels: Sequence[Kernel], nodes: Sequence[PlannedNode]
) -> dict[str, list[Kernel]]:
    """Return the kernels of each node that has some, by node.

    Args:
        kernels: Of one replay, by start time.
        nodes: The plan's sparda nodes, in program order.

    Raises:
        UnsupportedInputError: If the kernels are not those of the plan.
    """
    lanes = _lanes(nodes)
    known = {*own_kernels(), *(name for node in nodes for name in node.kernels)}
    ours = [kernel for kernel in kernels if kernel.name in known]
    _check_counts(ours, lanes)
    model = [kernel for kernel in kernels if kernel.name not in known]
    assigned: dict[str, list[Kernel]] = {}
    for kernel, entry in zip(ours, _take_apart(ours, lanes, _covered(ours, model)), strict=True):
        assigned.setdefault(entry.node, []).append(kernel)
    return assigned


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A kernel that a stream is to launch.

    Attributes:
        name: Of the kernel.
        node: Whose it is.
        issued: How many kernels of each stream were issued before it.
        needs: Entries that it depends on, by stream and place there.
    """

    name: str
    node: str
    issued: tuple[int, ...]
    needs: tuple[tuple[int, int], ...]


def _lanes(nodes: Sequence[PlannedNode]) -> list[list[_Entry]]:
    """Return what each stream is to launch, in program order."""
    lanes: list[list[_Entry]] = [[] for _ in STREAM_NAMES]
    last: dict[str, tuple[int, int]] = {}  # by node, its last entry
    for node in nodes:
        issued = tuple(map(len, lanes))
        lane = lanes[node.stream]
        needs = tuple(last[each] for each in sorted(node.behind))
        for name in node.kernels:
            lane.append(_Entry(name, node.node, issued, needs))
            last[node.node] = (node.stream, len(lane) - 1)
            needs = (last[node.node],)
    return lanes


def _check_counts(ours: Sequence[Kernel], lanes: Sequence[Sequence[_Entry]]) -> None:
    measured = collections.Counter(kernel.name for kernel in ours)
    planned = collections.Counter(entry.name for lane in lanes for entry in lane)
    wrong = [
        f"{measured[name]} of {name}, not {planned[name]}"
        for name in sorted(measured.keys() | planned.keys())
        if measured[name] != planned[name]
    ]
    if wrong:
        raise UnsupportedInputError(
            f"the kernels of the replay are not those of the plan: {'; '.join(wrong)}. Profile "
            "whole replays of the program that was made from this plan."
        )


def _covered(ours: Sequence[Kernel], model: Sequence[Kernel]) -> list[float]:
    """Return how long each kernel runs beside the model's, which are all on one stream."""
    shares, first = [], 0
    for kernel in ours:
        while first < len(model) and model[first].end_us <= kernel.start_us:
            first += 1
        beside, i = 0.0, first
        while i < len(model) and model[i].start_us < kernel.end_us:
            beside += _overlap(kernel, model[i].start_us, model[i].end_us)
            i += 1
        shares.append(beside)
    return shares


def _overlap(kernel: Kernel, start_us: float, end_us: float) -> float:
    return max(min(kernel.end_us, end_us) - max(kernel.start_us, start_us), 0.0)


@dataclasses.dataclass(frozen=True)
class _State:
    """A way to read the kernels so far.

    Attributes:
        cost_us: How much speaks against it.
        ends: When the last kernel of each stream ended.
        path: The entries chosen, the last one with all before it.
    """

    cost_us: float
    ends: tuple[float, ...]
    path: tuple[Any, ...]

    def then(
        self, kernel: Kernel, entry: _Entry, counts: Sequence[int], stream: int, covered_us: float
    ) -> _State:
        """Return the state after a kernel that is an entry of a stream.

        A stream does one thing at a time. Side streams start behind work that was issued before
        theirs; what need not be behind other work follows the program's order in ties alone.

        Args:
            kernel: What ran.
            entry: What it is taken for.
            counts: Kernels of each stream before it.
            stream: Of the entry.
            covered_us: How long it ran beside the model's kernels.
        """
        early = [each for each, count in enumerate(counts) if count < entry.issued[each]]
        cost = self.cost_us + max(self.ends[stream] - kernel.start_us, 0.0)
        cost += covered_us if stream == COMPUTE else 0.0
        if any(each in BEHIND[stream] for each in early):
            cost += kernel.end_us - kernel.start_us
        elif early:
            cost += _TIE_US
        ends = (*self.ends[:stream], kernel.end_us, *self.ends[stream + 1 :])
        return _State(cost, ends, (self.path, entry))


@dataclasses.dataclass(frozen=True)
class _Taken:
    """What was taken of a lane: the first `begin` entries, and some behind them."""

    begin: int = 0
    ahead: frozenset[int] = frozenset()

    @property
    def count(self) -> int:
        return self.begin + len(self.ahead)

    def has(self, number: int) -> bool:
        return number < self.begin or number in self.ahead

    def next_of(self, lane: Sequence[_Entry], name: str) -> int | None:
        """Return the first entry left of a name, None if there is none."""
        left = (i for i in range(self.begin, len(lane)) if i not in self.ahead)
        return next((i for i in left if lane[i].name == name), None)

    def with_(self, number: int) -> _Taken:
        begin, ahead = self.begin, self.ahead | {number}
        while begin in ahead:
            begin += 1
        return _Taken(begin, frozenset(i for i in ahead if i >= begin))


def _may_run(entry: _Entry, taken: Sequence[_Taken]) -> bool:
    """Return whether all that an entry depends on has run."""
    return all(taken[stream].has(number) for stream, number in entry.needs)


def _take_apart(
    ours: Sequence[Kernel], lanes: Sequence[Sequence[_Entry]], covered: Sequence[float]
) -> list[_Entry]:
    """Return the entry of each kernel: the interleaving of the lanes that overlaps least."""
    none = (_Taken(),) * len(lanes)
    states = {none: _State(0.0, (0.0,) * len(lanes), ())}  # by what was taken of each lane so far
    for place, kernel in enumerate(ours):
        following: dict[tuple[_Taken, ...], _State] = {}
        for taken, state in states.items():
            counts = [each.count for each in taken]
            for stream, lane in enumerate(lanes):
                number = taken[stream].next_of(lane, kernel.name)
                if number is None or not _may_run(lane[number], taken):
                    continue
                new = state.then(kernel, lane[number], counts, stream, covered[place])
                key = (*taken[:stream], taken[stream].with_(number), *taken[stream + 1 :])
                if key not in following or new.cost_us < following[key].cost_us:
                    following[key] = new
        if not following:
            raise UnsupportedInputError(
                f"kernel {place + 1} of the replay, {kernel.name}, is not next on any stream; "
                f"next are {_next_names(states, lanes)}. The program's ops run in an order that "
                "the plan forbids: profile the program that was made from this plan."
            )
        states = following
    best = min(states.values(), key=lambda state: state.cost_us)
    entries, path = [], best.path
    while path:
        path, entry = path
        entries.append(entry)
    return entries[::-1]


def _next_names(states: Iterable[tuple[_Taken, ...]], lanes: Sequence[Sequence[_Entry]]) -> str:
    names = {
        entry.name
        for taken in states
        for lane, each in zip(lanes, taken, strict=True)
        for i, entry in enumerate(lane)
        if not each.has(i) and _may_run(entry, taken)
    }
    return ", ".join(sorted(names))
