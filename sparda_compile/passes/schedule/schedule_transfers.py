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
same state when one of them writes it. Within them the pass moves each chain up: `choose_places`
says where to, and which ops of the chain go to the select stream. Waits sink to their consumer. It
moves nodes, sets `stream` and `after`, and renews the keepalive lists; it creates and deletes
nothing.

In a prefill the offload of a layer's keys and values is awaited one layer later. A sparse one that
picks from the past has chains, too: forecast, ids of the past, fork, stage, record.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

from sparda_compile.errors import PassError
from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import (
    awaited_event,
    instruction,
    started_event,
    stream_of,
    waits_of,
)
from sparda_compile.graph.liveness import set_keepalives
from sparda_compile.graph.nodes import is_sparda, program_order
from sparda_compile.graph.tags import LAYER, SITE
from sparda_compile.isa.streams import COMPUTE, COPY, SELECT
from sparda_compile.isa.table import Work
from sparda_compile.passes.base import Fact, PassContext, PassResult
from sparda_compile.passes.schedule.chains import Chain, Chains, ordered, set_streams
from sparda_compile.passes.schedule.choose_places import Decision, choose_places
from sparda_compile.passes.schedule.cost import costs_of
from sparda_compile.passes.schedule.simulate import Simulator
from sparda_compile.report.schedule import Schedule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import fx

__all__ = ["ScheduleTransfers"]


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
        choices = planner.place_chains()
        if not ctx.is_decode:
            choices += planner.place_offload_waits()
        keepalives = set_keepalives(gm.graph)
        rows = planner.simulator.rows(gm.graph.nodes, planner.streams())
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


class _Planner:
    """Moves chains within the dependence graph and compares predicted step times."""

    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self._graph = graph
        self._ctx = ctx
        self._dag = dependence_graph(graph)
        self.simulator = Simulator(costs_of(graph, ctx), ctx)
        self.baseline_us = self.simulator.end_us(graph.nodes, dict.fromkeys(graph.nodes, COMPUTE))
        self.num_chains = 0
        self.num_moved = 0

    def streams(self) -> dict[fx.Node, int]:
        """Return the stream of every node as it stands."""
        return {node: stream_of(node) for node in self._graph.nodes}

    def place_chains(self) -> list[str]:
        """Place every chain that leads to a copy; returns the choices in words."""
        prefetches = [*self._starts(Work.TO_DEVICE), *self._stages()]
        prefetches.sort(key=lambda n: LAYER.of(n))
        chains = [c for c in map(Chains(self._graph, self._dag).chain, prefetches) if c]
        self.num_chains = len(chains)
        self._sink_waits()
        if not chains:
            return []
        decisions = choose_places(self._graph, self._dag, chains, self._ctx)
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
        anchors = [node for node in self._graph.nodes if SITE.on(node)]
        starts = {started_event(n): n for n in self._starts(Work.TO_HOST)}
        choices = []
        for wait in waits_of(self._graph):
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

    def _stages(self) -> list[fx.Node]:
        """Return the copies of a prompt's past blocks that are on a stream of their own."""
        found = [(n, instruction(n)) for n in self._graph.nodes]
        staging = [n for n, it in found if it is not None and it.work is Work.TO_STAGING]
        return [n for n in staging if stream_of(n) == COPY]

    def _may_move(self, node: fx.Node, before: fx.Node, order: dict[fx.Node, int]) -> bool:
        place = order[before]
        return all(order[p] < place for p in self._dag.predecessors(node))

    def _sink_waits(self) -> None:
        """Move every wait to just before the first op that needs it."""
        for wait in waits_of(self._graph):
            order = program_order(self._graph)
            consumers = [order[n] for n in self._dag.successors(wait)]
            nodes = list(self._graph.nodes)
            if consumers and min(consumers) > order[wait] + 1:
                nodes[min(consumers)].prepend(wait)

    def _apply(self, chains: Sequence[Chain], decisions: Sequence[Decision]) -> None:
        for node in ordered(self._graph, chains, decisions):
            last = next(iter(reversed(self._graph.nodes)))
            if node.op not in ("placeholder", "output"):
                last.prepend(node) if last.op == "output" else last.append(node)
        for chain, (_, cut) in zip(chains, decisions, strict=True):
            set_streams(chain, chain.side(cut))
        order = program_order(self._graph)
        forks = {chain.fork for chain in chains}  # they moved, with inputs of their own
        for first, second in self._dag.edges:
            if second not in forks and order[first] >= order[second]:
                raise PassError(
                    f"schedule_transfers put {second.name} before {first.name}, which it needs."
                )

    def _describe(self, chain: Chain, decision: Decision) -> str:
        place, cut = decision
        where = chain.places[min(place, len(chain.places) - 1)][0]
        side = [n.name for n in chain.side(cut)]
        beside = f"; {', '.join(side)} on the select stream" if side else ""
        return f"{chain.prefetch.name}: {where}{beside}"
