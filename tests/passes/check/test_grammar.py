"""What a layer is made of: counts and order, each broken once, and where hints come from."""

from __future__ import annotations

import dataclasses

import pytest

from sparda_compile.graph.nodes import copy_graph
from sparda_compile.graph.op_index import OpIndex
from sparda_compile.passes.base import Fact
from sparda_compile.passes.check.grammar import (
    hints_of,
    layers_of,
    wrong_counts,
    wrong_order,
)

FACTS = frozenset(Fact)


@pytest.fixture(scope="module")
def plan(plan_of):
    return plan_of("llama", machine="h200", mode="exact", hint="previous_step", offload="always")


@pytest.fixture
def graph(plan):
    return copy_graph(plan.graph_module.graph)


@pytest.fixture
def context(plan, context_of):
    return context_of(plan)


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def counted(graph, context, facts=FACTS):
    return list(wrong_counts(layers_of(OpIndex(graph), context.layout), context, facts))


def ordered(graph, context):
    return list(wrong_order(layers_of(OpIndex(graph), context.layout)))


def test_right_graph(graph, context):
    assert counted(graph, context) == []
    assert ordered(graph, context) == []


def test_role_is_the_name_and_whose_it_is(graph, context):
    layer = layers_of(OpIndex(graph), context.layout)[1]
    roles = {role: [op.node.name for op in ops] for role, ops in layer.by_role.items()}
    assert roles["plan"] == ["plan_1"]
    assert roles["hint plan"] == ["hint_plan_1"]
    assert roles["hint prefetch_blocks"] == ["hint_prefetch_1"]
    assert roles["prefetch_blocks"] == ["prefetch_1"]
    assert len(roles["hint wait_blocks"]) == 1
    assert len(roles["wait_blocks"]) == 1
    assert len(roles["offload wait_blocks"]) == 1
    assert layer.one("recall_ids").node.name == "recall_ids_1"
    assert layer.one("extend_kv") is None


def test_op_that_is_gone(graph, context):
    graph.erase_node(named(graph, "append_kv_1"))
    assert counted(graph, context) == [
        "layer 1, that of attend_missing_1, has 0 append_kv where decode in mode exact has 1"
    ]


def test_op_that_is_there_twice(graph, context):
    node = named(graph, "remember_ids_0")
    with graph.inserting_after(node):
        twin = graph.node_copy(node)
    assert counted(graph, context) == [
        f"layer 0, that of attend_missing_0, has 2 remember_ids (remember_ids_0, {twin.name}) "
        "where decode in mode exact has 1"
    ]


def test_copies_are_in_line_until_they_have_starts_and_waits(plan, context):
    graph, facts = plan.stage("insert_forecast").graph, FACTS - {Fact.TRANSFERS_ASYNC}
    assert counted(graph, context, facts) == []
    wrong = counted(graph, context)
    assert any("has 1 fetch_blocks" in each for each in wrong)
    assert any("has 0 offload_blocks" in each for each in wrong)


def test_summary_that_takes_the_new_token_before_it_is_scored(graph, context):
    named(graph, "scores_1").prepend(named(graph, "update_summary_1"))
    assert ordered(graph, context) == ["scores_1 comes behind update_summary_1"]


def test_token_that_is_appended_behind_its_attention(graph, context):
    named(graph, "attend_missing_0").append(named(graph, "append_kv_0"))
    assert ordered(graph, context) == ["append_kv_0 comes behind attend_resident_0"]


def test_ids_that_are_remembered_before_they_are_recalled(graph, context):
    named(graph, "remember_ids_1").append(named(graph, "recall_ids_1"))
    assert ordered(graph, context) == ["recall_ids_1 comes behind remember_ids_1"]


class TestHintSource:
    """Layers: 0 a window, 1 and 2 of two groups, 3 of one."""

    @pytest.fixture
    def source(self, context):
        kinds = [("window", 2), ("sparse", 2), ("sparse", 2), ("sparse", 1)]
        layers = tuple(
            dataclasses.replace(context.layout.layers[0], layer=i, kind=kind, num_groups=groups)
            for i, (kind, groups) in enumerate(kinds)
        )

        def sources(layers=layers, **settings):
            config = context.config.replace(**settings)
            layout = dataclasses.replace(context.layout, layers=layers, config=config)
            changed = dataclasses.replace(context, layout=layout, config=config)
            found = [hints_of(layer, changed) for layer in layers]
            return [each[config.hint][1].layer if each else None for each in found]

        sources.layers = layers
        return sources

    @pytest.mark.parametrize("hint", ["forecast", "next_query"])
    def test_layer_before(self, source, hint):
        assert source(hint=hint) == [None, 0, 1, 2]

    @pytest.mark.parametrize("hint", ["previous_step", "ema"])
    def test_own_layer_where_only_earlier_steps_count(self, source, hint):
        assert source(hint=hint) == [None, 1, 2, 3]

    def test_first_layer_is_its_own_where_that_can_be(self, source):
        assert source(source.layers[1:], hint="forecast") == [1, 1, 2]
        assert source(source.layers[1:], hint="next_query") == [None, 1, 2]

    def test_ids_of_the_layer_before_need_the_same_groups(self, source):
        assert source(hint="previous_layer") == [None, None, 1, None]

    def test_only_mode_exact_has_hints(self, source):
        assert source(mode="forecast") == [None] * 4
