"""The index of a graph's ops: by name, by layer, arguments by name."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument, bound_arguments
from sparda_compile.graph.nodes import is_sparda
from sparda_compile.graph.op_index import OpIndex, result_of
from sparda_compile.graph.site import sites_of


@pytest.fixture(scope="module")
def graph(plan_of):
    plan = plan_of("llama", machine="h200", mode="exact", hint="forecast", offload="always")
    return plan.graph_module.graph


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def test_every_op_is_there_in_order_and_under_its_layer(graph):
    index = OpIndex(graph)
    assert list(index.ops) == [n for n in graph.nodes if is_sparda(n)]
    places = [op.place for op in index.ops.values()]
    assert places == sorted(places)
    assert {op.layer for op in index.ops.values()} == {-1, 0, 1} == set(index.by_layer)
    assert [op.node for op in index.by_name["append_kv"]] == [
        named(graph, "append_kv_0"), named(graph, "append_kv_1")
    ]  # fmt: skip


def test_arguments_are_those_of_the_schema_with_defaults(graph):
    for node, op in OpIndex(graph).ops.items():
        assert op.args == {
            entry.name: argument(node, entry.name) for entry in node.target._schema.arguments
        }
        given = {name for name, _, _ in bound_arguments(node)}
        assert given <= set(op.args)
        assert set(op.tensors) <= set(op.args)
    scores = OpIndex(graph).ops[named(graph, "scores_0")]
    assert set(scores.tensors) == {"query", "summary", "lengths", "after"}


def test_sites_by_layer(graph):
    sites = OpIndex(graph).sites
    assert {layer: [n.name for n in nodes] for layer, nodes in sites.items()} == {
        site.layer: [f"attend_missing_{site.layer}"] for site in sites_of(graph)
    }


def test_maker_sees_through_the_choice_of_a_result(graph):
    index = OpIndex(graph)
    plan, chosen = named(graph, "plan_1"), named(graph, "tail_page_1")
    assert result_of(chosen) == (plan, 4)
    assert result_of(plan) is None
    assert index.maker(chosen) is index.ops[plan] is index.maker(plan)
    assert index.maker(named(graph, "sparda_lengths")) is None


def test_marker_that_capture_leaves_is_an_op_too(plan_of):
    captured = plan_of("llama", mode="query").stage("capture").graph
    assert len(OpIndex(captured).by_name["kv_update"]) == 2
