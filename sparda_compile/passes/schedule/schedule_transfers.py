"""ScheduleTransfers: decide where each copy starts, where it is awaited, and what runs beside.

A chain is what leads to one prefetch: forecast, scores, ids, plan, fork, prefetch. Before, and
after (layer l's part of the program; `|` marks what runs on the copy stream, `:` what may run on
the select stream):

    layer l-1   ...                              layer l-1   %forecast_l
                                                             fork
                                                           : %scores_l
                                                           : %block_ids_l
                                                           : %plan_l
                                                           | prefetch_l
                                                             q, k, v, attention, ffn
    layer l     %scores_l %block_ids_l %plan_l   layer l     q, k, v
                fork prefetch_l wait_l                       wait_l
                append_kv attention                          append_kv attention

The dependences are a networkx graph: data edges, and an edge between every two ops that use the
same state when one of them writes it. Within them the pass moves each chain up, tries each place
and each cut (which ops of the chain go to the select stream) against the cost model, and keeps the
fastest; waits sink to their consumer. It moves nodes, sets `stream` and `after`, and renews the
keepalive lists; it creates and deletes nothing.

In a prefill the offload of a layer's keys and values is awaited one layer later.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from sparda_compile.errors import PassError
from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import (
    argument,
    awaited_event,
    instruction,
    set_argument,
    started_event,
    stream_of,
)
from sparda_compile.graph.liveness import set_keepalives, side_stream_inputs
from sparda_compile.graph.nodes import call_name, is_sparda, program_order
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import LAYER, SITE
from sparda_compile.isa.streams import BEHIND, COMPUTE, COPY, SELECT, STREAM_NAMES
from sparda_compile.isa.table import Work
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.schedule.cost import Cost, node_cost
from sparda_compile.report.schedule import Schedule, ScheduleRow

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import fx

__all__ = ["ScheduleTransfers", "simulate"]


@dataclasses.dataclass(frozen=True)
class ScheduleTransfers:
    """Place transfers. Counts: chains, moved, on_copy_stream, on_select_stream, keepalives."""

    name: ClassVar[str] = "schedule_transfers"
    requires: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFERS_ASYNC})
    ensures: ClassVar[frozenset[Fact]] = frozenset({Fact.TRANSFERS_SCHEDULED})
    preserves_numerics: ClassVar[bool] = True

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Reorder the graph in place."""
        mark_order(gm.graph)
        planner = _Planner(gm.graph, ctx)
        choices = planner.place_chains() if ctx.is_decode else planner.place_offload_waits()
        keepalives = set_keepalives(gm.graph)
        rows = simulate(list(gm.graph.nodes), planner.costs, ctx, planner.streams())
        schedule = Schedule(
            ctx.phase, ctx.machine.name, tuple(rows), tuple(choices), planner.baseline_us
        )
        streams = [stream_of(n) for n in gm.graph.nodes if is_sparda(n)]
        counts = {
            "chains": planner.num_chains,
            "moved": planner.num_moved,
            "on_copy_stream": streams.count(COPY),
            "on_select_stream": streams.count(SELECT),
            "keepalives": keepalives,
        }
        return PassResult(gm, modified=bool(planner.num_moved), counts=counts, schedule=schedule)


@dataclasses.dataclass
class _Chain:
    """The nodes that lead to one prefetch, in order, and where they could go.

    `stages` are those of scores, ids and plan that belong to it; a cut of n puts the last n of
    them on the select stream, all of them if there are fewer.
    """

    nodes: list[fx.Node]
    prefetch: fx.Node
    fork: fx.Node
    stages: list[fx.Node]
    places: list[tuple[str, fx.Node]]

    def side(self, cut: int) -> list[fx.Node]:
        """Return the stages that a cut puts on the select stream."""
        return self.stages[max(len(self.stages) - cut, 0) :]


class _Planner:
    """Moves chains within the dependence graph and compares predicted step times."""

    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self._graph = graph
        self._ctx = ctx
        self._dag = dependence_graph(graph)
        self.costs = {node: node_cost(node, ctx) for node in graph.nodes}
        self.baseline_us = _end(
            simulate(list(graph.nodes), self.costs, ctx, dict.fromkeys(graph.nodes, COMPUTE))
        )
        self.num_chains = 0
        self.num_moved = 0

    def streams(self) -> dict[fx.Node, int]:
        """Return the stream of every node as it stands."""
        return {node: stream_of(node) for node in self._graph.nodes}

    def place_chains(self) -> list[str]:
        """Place every chain of a decode step; returns the choices in words."""
        prefetches = self._starts(Work.TO_DEVICE)
        prefetches.sort(key=lambda n: LAYER.of(n))
        chains = [c for c in map(self._chain, prefetches) if c]
        self.num_chains = len(chains)
        self._sink_waits()
        if not chains:
            return []
        # Where the prediction is the same, the compute stream does less.
        most = max(len(chain.stages) for chain in chains)
        cuts = sorted(range(most + 1), reverse=self._ctx.machine.overlaps)
        options = [(place, cut) for cut in cuts for place in range(2)]
        best = min(options, key=lambda option: self._try(chains, [option] * len(chains)))
        decisions = [best] * len(chains)
        best_us = self._try(chains, decisions)
        # Chains differ at the ends of the model: let the first and the last one choose again.
        for i in {0, len(chains) - 1}:
            for option in options:
                changed = [*decisions[:i], option, *decisions[i + 1 :]]
                us = self._try(chains, changed)
                if us < best_us - 1e-6:
                    best_us, decisions = us, changed
        before = program_order(self._graph)
        self._apply(chains, decisions)
        after = program_order(self._graph)
        self.num_moved = sum(
            before[n] - before[c.nodes[0]] != after[n] - after[c.nodes[0]] or after[n] != before[n]
            for c in chains
            for n in c.nodes
        )
        return [self._describe(c, d) for c, d in zip(chains, decisions, strict=True)]

    def place_offload_waits(self) -> list[str]:
        """Let the offload of each layer of a prefill end one layer later."""
        self._sink_waits()
        anchors = [site.anchor_node for site in _SitePoints.of(self._graph)]
        starts = {started_event(n): n for n in self._starts(Work.TO_HOST)}
        choices = []
        for wait in self._waits():
            order = program_order(self._graph)
            start = starts.get(awaited_event(wait))
            later = [a for a in anchors if start is not None and order[a] > order[start]]
            if start is not None and later and self._may_move(wait, later[0], order):
                later[0].prepend(wait)
                self.num_moved += 1
                choices.append(f"{start.name} is awaited before {later[0].name}")
        return choices

    def _starts(self, work: Work) -> list[fx.Node]:
        """Return what starts a copy of that kind."""
        found = [(n, instruction(n)) for n in self._graph.nodes]
        return [n for n, it in found if it is not None and it.starts and it.work is work]

    def _waits(self) -> list[fx.Node]:
        return [n for n in self._graph.nodes if awaited_event(n) is not None]

    def _may_move(self, node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> bool:
        place = order[before]
        return all(order[p] < place for p in self._dag.predecessors(node))

    def _sink_waits(self) -> None:
        """Move every wait to just before the first op that needs it."""
        for wait in self._waits():
            order = program_order(self._graph)
            consumers = [order[n] for n in self._dag.successors(wait)]
            nodes = list(self._graph.nodes)
            if consumers and min(consumers) > order[wait] + 1:
                nodes[min(consumers)].prepend(wait)

    def _chain(self, prefetch: fx.Node) -> _Chain | None:
        layer = LAYER.of(prefetch)
        fork = argument(prefetch, "after")
        mine = {prefetch}
        stack = [prefetch]
        while stack:
            for source in stack.pop().all_input_nodes:
                own = LAYER.get(source) == layer and source.op != "placeholder"
                if own and source not in mine:
                    mine.add(source)
                    stack.append(source)
        plan = argument(prefetch, "miss_blocks").args[0]
        mine |= set(plan.users) & {n for n in plan.users if call_name(n) == "getitem"}
        order = program_order(self._graph)
        nodes = sorted(mine, key=lambda n: order[n])
        inside = set(nodes)
        needed = {p for n in nodes for p in self._dag.predecessors(n)} - inside
        if needed & self._below(nodes[:-1], order, order[nodes[-1]]):
            # Something outside needs the chain and is needed by it: a repair, behind its layer's
            # own append. It stays where it is.
            return None
        earliest = self._earliest(nodes, order)
        wait = self._previous_wait(prefetch, order, earliest)
        # What says itself on which stream it runs.
        stages = [n for n in nodes if (it := instruction(n)) is not None and it.stream is None]
        places = [(f"behind {earliest.name}", earliest)]
        if wait is not None:
            behind = wait.prev
            while LAYER.on(behind):  # may move itself; the model's nodes do not
                behind = behind.prev
            if order[behind] > order[earliest]:
                places.append((f"before {wait.name}", behind))
        return _Chain(nodes, prefetch, fork, stages, places)

    def _below(self, nodes: Sequence[fx.Node], order: dict[fx.Node, int], end: int) -> set[fx.Node]:
        """Return what depends on nodes and comes before a place in the program."""
        found: set[fx.Node] = set()
        stack = list(nodes)
        while stack:
            for user in self._dag.successors(stack.pop()):
                if user not in found and order[user] < end:
                    found.add(user)
                    stack.append(user)
        return found

    def _earliest(self, nodes: Sequence[fx.Node], order: dict[fx.Node, int]) -> fx.Node:
        """Return the last node that anything in the chain depends on."""
        inside = set(nodes)
        outside = {p for n in nodes for p in self._dag.predecessors(n)} - inside
        last: fx.Node = max((p for p in outside), key=lambda p: order[p])
        if last.op != "placeholder":
            return last
        # A chain without inputs may start anywhere; one layer ahead is enough.
        layer = LAYER.of(nodes[-1])
        before = [s.hidden for s in sites_of(self._graph) if s.layer < layer]
        first: fx.Node = next(n for n in self._graph.nodes if n.op != "placeholder").prev
        return before[-1] if before else first

    def _previous_wait(
        self, prefetch: fx.Node, order: dict[fx.Node, int], earliest: fx.Node
    ) -> fx.Node | None:
        """Return the first wait between the chain's earliest place and its prefetch."""
        between = [w for w in self._waits() if order[earliest] < order[w] < order[prefetch]]
        return between[0] if between else None

    def _try(self, chains: Sequence[_Chain], decisions: Sequence[tuple[int, int]]) -> float:
        """Return the predicted step time of a set of decisions."""
        nodes = _ordered(self._graph, chains, decisions)
        streams = {node: stream_of(node) for node in nodes}
        for chain, (_, cut) in zip(chains, decisions, strict=True):
            streams |= dict.fromkeys(chain.stages, COMPUTE)
            streams |= dict.fromkeys(chain.side(cut), SELECT)
        return round(_end(simulate(nodes, self.costs, self._ctx, streams)), 6)

    def _apply(self, chains: Sequence[_Chain], decisions: Sequence[tuple[int, int]]) -> None:
        for node in _ordered(self._graph, chains, decisions):
            last = next(iter(reversed(self._graph.nodes)))
            if node.op not in ("placeholder", "output"):
                last.prepend(node) if last.op == "output" else last.append(node)
        for chain, (_, cut) in zip(chains, decisions, strict=True):
            _set_streams(chain, chain.side(cut))
        order = program_order(self._graph)
        forks = {chain.fork for chain in chains}  # they moved, with inputs of their own
        for first, second in self._dag.edges:
            if second not in forks and order[first] >= order[second]:
                raise PassError(
                    f"schedule_transfers put {second.name} before {first.name}, which it needs."
                )

    def _describe(self, chain: _Chain, decision: tuple[int, int]) -> str:
        place, cut = decision
        where = chain.places[min(place, len(chain.places) - 1)][0]
        side = [n.name for n in chain.side(cut)]
        beside = f"; {', '.join(side)} on the select stream" if side else ""
        return f"{chain.prefetch.name}: {where}{beside}"


@dataclasses.dataclass(frozen=True)
class _SitePoints:
    """Where a layer's attention begins in the program."""

    anchor_node: fx.Node

    @classmethod
    def of(cls, graph: fx.Graph) -> list[_SitePoints]:
        return [cls(n) for n in graph.nodes if SITE.on(n)]


def _set_streams(chain: _Chain, side: Sequence[fx.Node]) -> None:
    """Put stages on the select stream behind the fork, which comes before the first of them.

    The copy then follows the selection: it takes the list of misses.
    """
    for stage in chain.stages:
        set_argument(stage, "stream", SELECT if stage in side else COMPUTE)
        set_argument(stage, "after", None)
    if not side:
        return
    first = side[0]
    set_argument(chain.prefetch, "after", None)
    set_argument(chain.fork, "inputs", side_stream_inputs([*side, chain.prefetch]))
    first.prepend(chain.fork)
    set_argument(first, "after", chain.fork)


def _ordered(
    graph: fx.Graph, chains: Sequence[_Chain], decisions: Sequence[tuple[int, int]]
) -> list[fx.Node]:
    """Return the program with every chain at its place."""
    moving = {n for chain in chains for n in chain.nodes}
    behind: dict[fx.Node, list[fx.Node]] = {}
    for chain, (place, _) in zip(chains, decisions, strict=True):
        anchor = chain.places[min(place, len(chain.places) - 1)][1]
        behind.setdefault(anchor, []).extend(chain.nodes)
    result: list[fx.Node] = []

    def add(nodes: Iterable[fx.Node]) -> None:
        for node in nodes:
            result.append(node)
            add(behind.get(node, ()))

    add(node for node in graph.nodes if node not in moving)
    return result


def _end(rows: Sequence[ScheduleRow]) -> float:
    return max((row.end_us for row in rows), default=0.0)


def simulate(
    nodes: Sequence[fx.Node],
    costs: dict[fx.Node, Cost],
    ctx: PassContext,
    streams: dict[fx.Node, int],
) -> list[ScheduleRow]:
    """Predict the times of a program.

    Each stream runs its nodes in program order. What a side stream does starts behind all that was
    issued before it to the streams that `streams.BEHIND` names; a wait holds its stream back to the
    event that it names. On a machine without overlap all streams are one.
    """
    clock = [0.0] * len(STREAM_NAMES)
    event_end: dict[int, float] = {}
    rows = []
    for node in nodes:
        if node.op in ("placeholder", "output"):
            continue
        name, cost, stream = call_name(node), costs[node], streams[node]
        lane = stream if ctx.machine.overlaps else COMPUTE
        exposed = 0.0
        if (awaited := awaited_event(node)) is not None:
            done = event_end.get(awaited, 0.0)
            exposed = max(done - clock[lane], 0.0) if ctx.machine.overlaps else 0.0
            start, end = clock[lane], clock[lane] + exposed
        else:
            start = max(clock[each] for each in (lane, *BEHIND[lane]))
            end = start + cost.us
        clock[lane] = end
        if (started := started_event(node)) is not None:
            event_end[started] = end
        if cost.us or is_sparda(node):
            layer = int(LAYER.get(node, -1))
            rows.append(
                ScheduleRow(node.name, name, layer, stream, start, end,
                            cost.hbm_bytes, cost.link_bytes, exposed)
            )  # fmt: skip
    return rows
