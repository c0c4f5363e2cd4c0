"""The grammar: a legal graph passes, and each rule is broken once."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import GraphInvariantError
from sparda_compile.passes.base import Fact
from sparda_compile.passes.effects import set_argument
from sparda_compile.passes.fx import find_ops
from sparda_compile.passes.manager import snapshot
from sparda_compile.passes.spec import check_spec

FACTS = frozenset(Fact)


@pytest.fixture
def graph(plan_of):
    """A copy of a right graph, to break."""
    plan = plan_of("llama", machine="h200", mode="exact", hint="forecast")
    return snapshot(plan.graph_module).graph


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def broken(graph, match):
    with pytest.raises(GraphInvariantError, match=match) as caught:
        check_spec(graph, FACTS, "some_pass")
    assert str(caught.value).startswith("after some_pass: ")
    assert str(caught.value).endswith("This is a bug of the pass.")


@pytest.mark.parametrize("mode", ["forecast", "query", "exact", "dense"])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_right_graphs_are_legal(plan_of, phase, mode):
    check_spec(plan_of("llama", phase, mode=mode).graph_module.graph, FACTS, "all")


def test_rules_hold_only_once_their_fact_does(plan_of):
    graph = plan_of("llama", mode="query").stage("find_attention").graph
    check_spec(graph, frozenset({Fact.SITES_TAGGED}), "find_attention")
    broken(graph, "kv_update was not replaced")


def test_value(graph):
    del named(graph, "plan_1").meta["val"]
    broken(graph, "plan_1 has no fake value")


def test_layer(graph):
    del named(graph, "prefetch_1").meta["sparda_layer"]
    broken(graph, "prefetch_1 belongs to no layer")


def test_two_copies_with_one_event(graph):
    events = [n.args[4] for n in find_ops(graph, "prefetch_blocks")]
    set_argument(find_ops(graph, "prefetch_blocks")[1], "event", events[0])
    broken(graph, "two copies record one event")


def test_wait_that_is_missing(graph):
    graph.erase_node(find_ops(graph, "wait_blocks")[0])
    broken(graph, "copies record events .* but waits are for")


def test_wait_for_another_event(graph):
    set_argument(find_ops(graph, "wait_blocks")[0], "event", 99)
    broken(graph, r"waits are for \[.*99\]")


def test_ticket_that_goes_nowhere(graph):
    first, second = find_ops(graph, "wait_blocks")[:2]
    set_argument(second, "ticket", first.args[0])
    broken(graph, "the ticket of .* goes to")


def test_no_end(graph):
    graph.erase_node(find_ops(graph, "advance_lengths")[0])
    broken(graph, "0 advance_lengths")


def test_two_ends(graph):
    end = find_ops(graph, "advance_lengths")[0]
    with graph.inserting_before(end):
        graph.node_copy(end)
    broken(graph, "2 advance_lengths")


def test_work_behind_the_end(graph):
    end = find_ops(graph, "advance_lengths")[0]
    append = find_ops(graph, "append_kv")[1]
    end.append(append)
    broken(graph, f"{append.name} comes after advance_lengths")


def test_misses_that_are_fetched_twice(graph):
    prefetch = named(graph, "prefetch_1")
    with graph.inserting_before(prefetch):
        graph.node_copy(prefetch)
    broken(graph, "the misses of plan_1 are fetched 2 times")


def test_attention_of_another_shape_than_its_query(graph):
    attention = find_ops(graph, "attend_missing")[0]
    attention.meta["val"] = torch.empty(1)
    broken(graph, f"{attention.name} has another shape than its query")
