"""The edges that every schedule respects."""

from __future__ import annotations

import itertools

import networkx as nx
import pytest

from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import accesses, conflicts
from sparda_compile.graph.nodes import snapshot
from sparda_compile.graph.tags import ORDER


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def test_edges_are_data_and_effects(plan_of):
    graph = snapshot(plan_of("llama", mode="forecast").stage("fuse_selection")).graph
    mark_order(graph)
    dag = dependence_graph(graph)
    assert nx.is_directed_acyclic_graph(dag)
    append, attention = (named(graph, f"{n}_1") for n in ("append_kv", "sparse_attention"))
    assert dag.has_edge(named(graph, "select_pages_1"), named(graph, "miss_blocks_1"))
    assert dag.has_edge(append, attention)
    assert not dag.has_edge(attention, append)
    assert not dag.has_edge(append, named(graph, "sparse_attention_0"))
    for first, second in dag.edges:
        is_data = first in second.all_input_nodes
        assert is_data or conflicts(first, second)


def test_order_is_marked_once_on_what_uses_state(plan_of):
    graph = snapshot(plan_of("llama", mode="forecast").stage("fuse_selection")).graph
    mark_order(graph)
    marks = [ORDER.of(n) for n in graph.nodes if ORDER.on(n)]
    assert marks == sorted(marks)
    assert {n for n in graph.nodes if ORDER.on(n)} == {n for n in graph.nodes if accesses(n)}


@pytest.mark.parametrize("phase", ["decode", "prefill"])
@pytest.mark.parametrize("mode", ["forecast", "exact", "query"])
def test_what_is_left_out_follows_from_the_rest(plan_of, mode, phase):
    """Every two ops that conflict are ordered by some path."""
    graph = snapshot(plan_of("llama", phase, mode=mode).stage("fuse_selection")).graph
    mark_order(graph)
    dag = dependence_graph(graph)
    behind = {node: nx.descendants(dag, node) for node in dag}
    stateful = sorted((n for n in graph.nodes if accesses(n)), key=lambda n: ORDER.of(n))
    pairs = [p for p in itertools.combinations(stateful, 2) if conflicts(*p)]
    assert pairs
    assert [p for p in pairs if p[1] not in behind[p[0]]] == []
