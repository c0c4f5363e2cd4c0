"""Choose where chains begin and which of their stages run beside: the search over the cost model.

A decision is a place and a cut, see `Chains`. The chains of a kind, which are those of a hint or
all of a program without hints, take one decision, so that every layer is alike:

    1. all kinds take the same numbers
    2. each kind in turn tries all of its own, if there are several, while the others keep theirs
    3. so do the first and the last chain: the ends of a model differ from its middle

The fastest is chosen of those that are at most 2% slower than the best one at an overlap of 0.5;
where the prediction is about the same, what was tried first. A time is the mean of two predicted
steps: as expected, and with copies that take `_MORE_COPIES` times as long.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from sparda_compile.graph.effects import stream_of
from sparda_compile.graph.tags import HINT
from sparda_compile.isa.streams import COMPUTE, SELECT
from sparda_compile.passes.schedule.chains import ordered
from sparda_compile.passes.schedule.cost import costs_of, longer_copies
from sparda_compile.passes.schedule.simulate import Simulator

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import networkx as nx
    from torch import fx

    from sparda_compile.passes.base import PassContext
    from sparda_compile.passes.schedule.chains import Chain
    from sparda_compile.passes.schedule.cost import Cost

__all__ = ["Decision", "choose_places"]

# Number of a chain's place, and how many of its stages go to the select stream.
Decision = tuple[int, int]

# What is predicted to be faster by less than a thousandth is not.
_CLEARLY: Final = 0.999
# A place has to do for copies that take so much longer, too: beside the model copies of 6 MB took
# an H200 143 us where the rate of one large copy says 114
# (benchmarks/results/2026-11-30-h200-profile-8b-b16-exact.json).
_MORE_COPIES: Final = 1.3
# And for text of which more blocks change than is expected: at this overlap no place may be slower
# than the best by more than this.
_LEAST_OVERLAP: Final = 0.5
_SLOWER: Final = 1.02


def choose_places(
    graph: fx.Graph, dag: nx.DiGraph, chains: Sequence[Chain], ctx: PassContext
) -> list[Decision]:
    """Return the decision of each chain.

    Args:
        graph: The program, in which no chain has moved.
        dag: Its dependences.
        chains: At least one, by layer.
        ctx: What the pass knows.
    """
    trials = _Trials(graph, dag, chains, ctx)
    kinds = [HINT.get(chain.prefetch) for chain in chains]
    every = range(len(chains))
    members = [[i for i in every if kinds[i] == kind] for kind in dict.fromkeys(kinds)]
    turns = [list(every), *(members if len(members) > 1 else []), [0], [len(chains) - 1]]
    best = tuple([(0, 0)] * len(chains))
    for changing in turns:
        for option in _options([chains[i] for i in changing], beside=ctx.machine.overlaps):
            trials.add(tuple(option if i in changing else best[i] for i in every))
        best = trials.best()
    return list(best)


def _options(chains: Sequence[Chain], *, beside: bool) -> list[Decision]:
    """Return what chains may decide, the best guess first.

    Where the prediction is about the same, the compute stream does less, and copies begin earlier:
    more of them may come than is expected.
    """
    most = max(len(chain.stages) for chain in chains)
    places = range(max(len(chain.places) for chain in chains))
    return [(place, cut) for cut in sorted(range(most + 1), reverse=beside) for place in places]


class _Trials:
    """Predicts the step of sets of decisions, one for each chain, and knows the best."""

    def __init__(
        self, graph: fx.Graph, dag: nx.DiGraph, chains: Sequence[Chain], ctx: PassContext
    ) -> None:
        self._graph = graph
        self._chains = chains
        self._streams = {node: stream_of(node) for node in graph.nodes}
        self._between = _edges_between(dag, chains)
        costs = costs_of(graph, ctx)
        self._expected = [Simulator(costs, ctx), Simulator(longer_copies(costs, _MORE_COPIES), ctx)]
        self._half = Simulator(_with_half(graph, ctx), ctx)
        self._least_half = math.inf
        self._known: set[tuple[Decision, ...]] = set()
        self._times: dict[tuple[Decision, ...], tuple[float, float]] = {}

    def add(self, decisions: tuple[Decision, ...]) -> None:
        """Predict the step of decisions, unless it is known, wrong, or refused already."""
        if decisions in self._known:
            return
        self._known.add(decisions)
        nodes = ordered(self._graph, self._chains, decisions)
        streams = dict(self._streams)
        for chain, (_, cut) in zip(self._chains, decisions, strict=True):
            streams |= dict.fromkeys(chain.stages, COMPUTE)
            streams |= dict.fromkeys(chain.side(cut), SELECT)
        if not self._keeps_order(nodes, streams):
            return
        half = self._half.end_us(nodes, streams)
        self._least_half = min(self._least_half, half)
        if half <= _SLOWER * self._least_half:
            times = [each.end_us(nodes, streams) for each in self._expected]
            self._times[decisions] = (sum(times) / len(times), half)

    def best(self) -> tuple[Decision, ...]:
        """Return the decisions that were tried first of those that are about as fast as any."""
        assert self._times, "some place keeps what chains need of each other in order"
        most = _SLOWER * self._least_half
        times = {tried: us for tried, (us, half) in self._times.items() if half <= most}
        least = min(times.values())
        return next(tried for tried, us in times.items() if us * _CLEARLY <= least)

    def _keeps_order(self, nodes: Sequence[fx.Node], streams: Mapping[fx.Node, int]) -> bool:
        """Whether what one chain needs of another comes before it."""
        if not self._between:
            return True
        order = {node: i for i, node in enumerate(nodes)}
        # Compute waits for the select stream only where it waits for the copy behind it.
        return not any(
            order[first] > order[second]
            or (streams[first] == SELECT and streams[second] == COMPUTE)
            for first, second in self._between
        )


def _with_half(graph: fx.Graph, ctx: PassContext) -> dict[fx.Node, Cost]:
    """Return costs where half of the blocks are new, or more if more are expected to be."""
    overlap = min(_LEAST_OVERLAP, ctx.config.expected_overlap)
    config = ctx.config.replace(expected_overlap=overlap)
    return costs_of(graph, dataclasses.replace(ctx, config=config))


def _edges_between(dag: nx.DiGraph, chains: Sequence[Chain]) -> list[tuple[fx.Node, fx.Node]]:
    """Return what has to stay in order in two chains: a layer with two hints has two."""
    chain_of = {node: i for i, chain in enumerate(chains) for node in chain.nodes}
    forks = {chain.fork for chain in chains}
    return [
        (first, second)
        for first, second in dag.edges
        if first in chain_of and second in chain_of and second not in forks
        if chain_of[first] != chain_of[second]
    ]
