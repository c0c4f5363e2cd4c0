"""Which nodes of a program must stay in which order: by data, and by the state that they use.

The order of the ops that use state is written down once, while the program is as it was written:
that is what every schedule has to respect, and what the verifier measures it by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import networkx as nx

from sparda_compile.graph.effects import accesses, is_disjoint, uses_a_part
from sparda_compile.graph.tags import ORDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

__all__ = ["dependence_graph", "mark_order"]


def mark_order(graph: fx.Graph) -> None:
    """Write down the present order of all ops that use state."""
    for i, node in enumerate(graph.nodes):
        if accesses(node):
            ORDER.put(node, i)


def dependence_graph(graph: fx.Graph) -> nx.DiGraph:
    """Return data edges, and effect edges between conflicting ops in the order they were marked.

    An effect edge that follows from others is left out: an op of which every layer has one would
    else have an edge to each of the others.
    """
    dag = nx.DiGraph()
    by_state: dict[str, list[fx.Node]] = {}
    dag.add_edges_from((source, n) for n in graph.nodes for source in n.all_input_nodes)
    for node in graph.nodes:
        for access in accesses(node):
            by_state.setdefault(access.state, []).append(node)
    for state, users in by_state.items():
        in_order = sorted(set(users), key=lambda n: ORDER.of(n))
        dag.add_edges_from(_effect_edges(state, in_order))
    return dag


def _effect_edges(state: str, users: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield what orders the users of a state tensor; what follows from other edges is left out."""
    writes = {n: any(a.is_write for a in accesses(n) if a.state == state) for n in users}
    for place, second in enumerate(users):
        for first in reversed(users[:place]):
            if (writes[first] or writes[second]) and not is_disjoint(first, second, state):
                yield first, second
                # What came before a write is before it; but not what it is disjoint with.
                if writes[first] and not uses_a_part(first, state):
                    break
