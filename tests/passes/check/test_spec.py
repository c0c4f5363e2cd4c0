"""The grammar: a legal graph passes, and each rule is broken once."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.errors import GraphInvariantError
from sparda_compile.graph.effects import argument, set_argument
from sparda_compile.graph.nodes import find_ops, snapshot
from sparda_compile.graph.tags import LAYER
from sparda_compile.passes.base import Fact
from sparda_compile.passes.check.spec import check_spec

FACTS = frozenset(Fact)


@pytest.fixture
def plan(plan_of):
    return plan_of("llama", machine="h200", mode="exact", hint="forecast", offload="always")


@pytest.fixture
def graph(plan):
    """A copy of a right graph, to break."""
    return snapshot(plan.graph_module).graph


@pytest.fixture
def broken(plan, context_of):
    """Return a function that expects a graph to be refused."""

    def refused(graph, match):
        with pytest.raises(GraphInvariantError, match=match) as caught:
            check_spec(graph, FACTS, context_of(plan), "some_pass")
        assert str(caught.value).startswith("after some_pass: ")
        assert str(caught.value).endswith("This is a bug of the pass.")

    return refused


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


MODES = ("forecast", "query", "exact", "dense")
PHASES = [(mode, phase) for mode in MODES for phase in ("prefill", "decode")]
# A prompt that reads everything is dense.
PHASES += [(mode, "sparse_prefill") for mode in MODES if mode != "dense"]


@pytest.mark.parametrize(("mode", "phase"), PHASES)
def test_right_graphs_are_legal(plan_of, context_of, phase, mode):
    plan = plan_of("llama", phase, mode=mode)
    check_spec(plan.graph_module.graph, FACTS, context_of(plan), "all")


def test_rules_hold_only_once_their_fact_does(plan_of, plan, context_of, broken):
    graph = plan_of("llama", mode="query").stage("find_attention").graph
    check_spec(graph, frozenset({Fact.SITES_TAGGED}), context_of(plan), "find_attention")
    broken(graph, "kv_update was not replaced")


def test_value(graph, broken):
    del named(graph, "plan_1").meta["val"]
    broken(graph, "plan_1 has no fake value")


def test_layer(graph, broken):
    LAYER.drop(named(graph, "prefetch_1"))
    broken(graph, "prefetch_1 belongs to no layer")


def test_two_copies_with_one_event(graph, broken):
    events = [n.args[4] for n in find_ops(graph, "prefetch_blocks")]
    set_argument(find_ops(graph, "prefetch_blocks")[1], "event", events[0])
    broken(
        graph, r"event \d+ is recorded by \w*prefetch_\d and \w*prefetch_\d and awaited by wait_"
    )


def test_wait_that_is_missing(graph, broken):
    graph.erase_node(find_ops(graph, "wait_blocks")[0])
    broken(graph, r"is recorded by hint_prefetch_\d and awaited by nothing")


def test_wait_for_another_event(graph, broken):
    set_argument(find_ops(graph, "wait_blocks")[0], "event", 99)
    broken(graph, r"is recorded by hint_prefetch_\d and awaited by nothing")


def test_ticket_that_goes_nowhere(graph, broken):
    first, second = find_ops(graph, "wait_blocks")[:2]
    set_argument(second, "ticket", first.args[0])
    broken(graph, "the ticket of .* goes to")


def test_no_end(graph, broken):
    graph.erase_node(find_ops(graph, "advance_lengths")[0])
    broken(graph, "0 advance_lengths, one has to be behind wait_blocks_5")


def test_two_ends(graph, broken):
    end = find_ops(graph, "advance_lengths")[0]
    with graph.inserting_before(end):
        graph.node_copy(end)
    broken(graph, "2 advance_lengths")


def test_work_behind_the_end(graph, broken):
    end = find_ops(graph, "advance_lengths")[0]
    append = find_ops(graph, "append_kv")[1]
    end.append(append)
    broken(graph, f"{append.name} comes after advance_lengths")


def test_misses_that_are_fetched_twice(graph, broken):
    prefetch = named(graph, "prefetch_1")
    with graph.inserting_before(prefetch):
        graph.node_copy(prefetch)
    broken(graph, "event 7 is recorded by prefetch_2 and prefetch_1 and awaited by wait_blocks_3")


@pytest.mark.parametrize("change", ["in another order", "one too few"])
def test_a_piece_that_is_given_something_else(graph, broken, change):
    piece = named(graph, "hint_piece_1")
    first, second, *rest = argument(piece, "inputs")
    left = [second, first, *rest] if change == "in another order" else [first, second, *rest[1:]]
    set_argument(piece, "inputs", left)
    broken(graph, r"hint_piece_1 takes \[.*\], and its piece \[")


def test_attention_of_another_shape_than_its_query(graph, broken):
    attention = find_ops(graph, "attend_missing")[0]
    attention.meta["val"] = torch.empty(1)
    broken(graph, f"{attention.name} has another shape than its query")
