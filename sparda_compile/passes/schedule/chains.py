"""Chains: what leads to one copy, and where in the program it could go.

    forecast, scores, ids, plan, fork, prefetch                  a step
    forecast, ids and scores of the past, fork, stage, record    a sparse prompt

A chain is moved as a whole. Its stages, which say themselves on which stream they run, may go to
the select stream from any of them on. One that takes nothing of this step, such as a prediction
from earlier ones, may begin any number of layers ahead.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sparda_compile.graph.effects import (
    argument,
    instruction,
    set_argument,
    started_event,
    stream_of,
    waits_of,
)
from sparda_compile.graph.liveness import side_stream_inputs
from sparda_compile.graph.nodes import call_name, is_sparda, program_order
from sparda_compile.graph.tags import HINT, LAYER, SITE
from sparda_compile.isa.streams import COMPUTE, REPAIR, SELECT

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import networkx as nx
    from torch import fx


__all__ = ["Chain", "Chains", "ordered", "set_streams"]


@dataclasses.dataclass
class Chain:
    """The nodes that lead to one copy, in order, and where they could go.

    `stages` are those that choose the blocks: scores, ids and plan, in front of them what a hint
    computes, or ids of the past; a cut of n puts the last n of them on the select stream, all of
    them if there are fewer.
    """

    nodes: list[fx.Node]
    prefetch: fx.Node
    fork: fx.Node
    stages: list[fx.Node]
    places: list[tuple[str, fx.Node]]

    def side(self, cut: int) -> list[fx.Node]:
        """Return the stages that a cut puts on the select stream."""
        return self.stages[max(len(self.stages) - cut, 0) :]


class Chains:
    """Finds chains in a program.

    Args:
        graph: The program.
        dag: Its dependences.
    """

    def __init__(self, graph: fx.Graph, dag: nx.DiGraph) -> None:
        self._graph = graph
        self._dag = dag
        self._order = program_order(graph)
        self._waits = waits_of(graph)
        self._attentions = [node for node in graph.nodes if SITE.on(node)]
        self._earliest: dict[int, fx.Node] = {}

    def chain(self, prefetch: fx.Node) -> Chain | None:
        """Return the chain that leads to a copy, None if it has to stay where it is."""
        if stream_of(prefetch) == REPAIR:
            # It is behind its layer's own selection, which compute makes and waits for.
            return None
        layer = LAYER.of(prefetch)
        fork = argument(prefetch, "after")
        last = _last_of(prefetch)
        mine = {last}
        stack = [last]
        while stack:
            for source in stack.pop().all_input_nodes:
                own = LAYER.get(source) == layer and source.op != "placeholder"
                if own and source not in mine:
                    mine.add(source)
                    stack.append(source)
        made = [n for n in mine if is_sparda(n)]
        mine |= {user for n in made for user in n.users if call_name(user) == "getitem"}
        order = self._order
        nodes = sorted(mine, key=lambda n: order[n])
        inside = set(nodes)
        needed = {p for n in nodes for p in self._dag.predecessors(n)} - inside
        # What says itself on which stream it runs, but for the copy.
        chosen = [(n, instruction(n)) for n in nodes if n not in (prefetch, last)]
        stages = [n for n, it in chosen if it is not None and it.stream is None]
        # Another hint's chain of the layer moves by itself: behind its earliest place is enough,
        # and what is tried keeps the two in order.
        others = {n for n in needed if HINT.on(n) and LAYER.of(n) == layer}
        before = [self._earliest[layer]] if others and layer in self._earliest else []
        earliest: fx.Node = max([*(needed - others), *before], key=lambda p: order[p])
        self._earliest[layer] = earliest
        if earliest.op == "placeholder":
            return Chain(nodes, prefetch, fork, stages, self._places_ahead(layer))
        wait = self._previous_wait(prefetch, order, earliest)
        places = [(f"behind {earliest.name}", earliest)]
        awaited = min(order[user] for user in last.users)
        end = self._end_behind(earliest, order, awaited)
        if end is not None:
            places.append((f"behind {end.name}", end))
        if wait is not None:
            behind = wait.prev
            while LAYER.on(behind):  # may move itself; the model's nodes do not
                behind = behind.prev
            if order[behind] > order[earliest]:
                places.append((f"before {wait.name}", behind))
        return Chain(nodes, prefetch, fork, stages, places)

    def _end_behind(self, node: fx.Node, order: dict[fx.Node, int], limit: int) -> fx.Node | None:
        """Return where the first attention behind a node ends, if that is before a place."""
        ends = map(_end_of, self._attentions)
        return next((end for end in ends if order[node] < order[end] < limit), None)

    def _places_ahead(self, layer: int) -> list[tuple[str, fx.Node]]:
        """Return places one, two, four and so on layers ahead, and the beginning of the step.

        Of each layer there are two: before all of it, and behind its attention.
        """
        before = [each for each in self._attentions if SITE.of(each).layer < layer]
        ahead = [before[-(1 << i)] for i in range(len(before).bit_length())]
        nodes = [node for each in ahead for node in (SITE.of(each).hidden, _end_of(each))]
        places = [(f"behind {node.name}", node) for node in nodes]
        first = next(n for n in self._graph.nodes if n.op != "placeholder")
        return [*places, ("at the beginning", first.prev)]

    def _previous_wait(
        self, prefetch: fx.Node, order: dict[fx.Node, int], earliest: fx.Node
    ) -> fx.Node | None:
        """Return the first wait between the chain's earliest place and its prefetch."""
        between = [w for w in self._waits if order[earliest] < order[w] < order[prefetch]]
        return between[0] if between else None


def _end_of(attention: fx.Node) -> fx.Node:
    """Return the last op of an attention's layer that stands right behind it."""
    node = attention
    while LAYER.get(node.next) == LAYER.of(attention) and is_sparda(node.next):
        node = node.next
    return node


def _last_of(copy: fx.Node) -> fx.Node:
    """Return what records that a copy has ended: the copy itself, or the mark behind it."""
    it = instruction(copy)
    if it is not None and it.starts:
        return copy
    users = [user for item in copy.users for user in item.users]
    return next(user for user in users if started_event(user) is not None)


def set_streams(chain: Chain, side: Sequence[fx.Node]) -> None:
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


def ordered(
    graph: fx.Graph, chains: Sequence[Chain], decisions: Sequence[tuple[int, int]]
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
