"""State that ops use, taken from their schemas."""

from __future__ import annotations

import itertools

import pytest

from sparda_compile.graph.effects import (
    Access,
    accesses,
    argument,
    conflicts,
    is_disjoint,
    is_state,
    set_argument,
    stream_of,
)
from sparda_compile.graph.nodes import find_ops, is_sparda, snapshot
from sparda_compile.isa.streams import COMPUTE, COPY, REPAIR, SELECT
from sparda_compile.ops import OPS

WRITES = {
    "append_kv": {"pages"},
    "plan_pages": {"block_table", "page_block", "page_stamp", "counters"},
    "select_pages": {"block_table", "page_block", "page_stamp", "counters"},
    "prefetch_blocks": {"pages"},
    "fetch_blocks": {"pages"},
    # What a format rounds, it rounds on its page too.
    "offload_blocks": {"host", "pages", "counters"},
    "store_blocks": {"host", "pages", "counters"},
    "extend_kv": {"pages", "block_table", "page_block", "page_stamp"},
    "window_attention": {"ring_k", "ring_v"},
    "remember_ids": {"last_block_ids"},
    "remember_last": {"last_block_ids"},
    "update_prediction": {"level", "trend"},
    "learn_mixture": {"mixture"},
    "begin_prediction": {"level", "trend", "calibrated"},
    "predict_ahead": {"predicted"},
    "repair_predicted": {"counters"},
    "advance_lengths": {"lengths"},
    "update_summary": {"tensors"},
    "attend_tokens": {"staging"},
    "wait_blocks": {"buffers"},
}


@pytest.fixture
def graph(plan_of):
    plan = plan_of("llama", machine="h200", mode="exact", hint="forecast")
    return snapshot(plan.graph_module).graph


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def states(node, *, write):
    return {a.state for a in accesses(node) if a.is_write == write}


def test_ops_declare_what_they_change():
    for name, op in OPS.items():
        schema = op._opoverload._schema
        written = {a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write}
        assert written == WRITES.get(name, set()), name


def test_state_is_a_placeholder_with_its_prefix(graph):
    assert is_state(named(graph, "sparda_pages_0"))
    assert not is_state(named(graph, "plan_0"))
    assert not is_state(next(n for n in graph.nodes if n.op == "placeholder"))
    assert not is_state(3)
    with graph.inserting_before(next(iter(graph.nodes))):
        number = graph.placeholder("sparda_num_past")
    number.meta["val"] = 0
    assert not is_state(number)
    assert not is_state(None)


def test_accesses(graph):
    plan = named(graph, "plan_1")
    tables = ("block_table", "page_block", "page_stamp", "counters")
    assert states(plan, write=True) == {f"sparda_{name}_1" for name in tables}
    assert states(plan, write=False) == {"sparda_lengths"}
    scores = named(graph, "scores_0")
    assert states(scores, write=True) == set()
    summary = {"sparda_pooled_k_0", "sparda_recent_k_0"}
    assert states(scores, write=False) == {"sparda_lengths", *summary}
    assert summary <= states(find_ops(graph, "update_summary")[0], write=True)
    waited = {a for wait in find_ops(graph, "wait_blocks") for a in accesses(wait)}
    assert {Access("sparda_pages_1", True), Access("sparda_host_0", True)} <= waited


def test_what_uses_no_state(graph):
    assert accesses(next(n for n in graph.nodes if n.name.startswith("linear"))) == []
    # A fork takes state only to be kept in its place.
    fork = named(graph, "fork_1")
    assert any(is_state(n) for n in fork.all_input_nodes)
    assert accesses(fork) == []


def test_argument_by_name(graph):
    plan = named(graph, "plan_0")
    assert argument(plan, "block_ids") is named(graph, "block_ids_0")
    assert argument(plan, "is_hint") is False
    assert argument(plan, "stream") == COMPUTE
    assert argument(find_ops(graph, "prefetch_blocks")[0], "event") >= 0
    with pytest.raises(KeyError):
        argument(plan, "nonsense")


def test_default_of_an_argument_that_was_not_given(graph):
    scores = named(graph, "scores_0")
    scores.kwargs = {}
    assert (argument(scores, "stream"), argument(scores, "after")) == (0, None)


def test_argument_set_by_name(graph):
    plan = named(graph, "plan_0")
    set_argument(plan, "is_hint", True)
    set_argument(plan, "stream", COPY)
    assert argument(plan, "is_hint") is True
    assert argument(plan, "stream") == COPY
    assert plan.args[8] is True


def test_streams(graph):
    expected = {"hint_prefetch_1": COPY, "prefetch_1": REPAIR, "plan_1": COMPUTE, "fork_1": COMPUTE}
    expected["hint_select_pages_1"] = SELECT
    assert {name: stream_of(named(graph, name)) for name in expected} == expected
    assert {stream_of(n) for n in find_ops(graph, "offload_blocks")} == {COPY}
    assert {stream_of(n) for n in find_ops(graph, "wait_blocks", "append_kv")} == {COMPUTE}
    assert {stream_of(n) for n in graph.nodes if not is_sparda(n)} == {COMPUTE}


def test_conflicts_are_mutual_and_need_a_write(graph):
    nodes = [n for n in graph.nodes if accesses(n)]
    seen = set()
    for first, second in itertools.combinations(nodes, 2):
        both = conflicts(first, second)
        assert sorted(set(both)) == sorted(set(conflicts(second, first)))
        for state in both:
            assert {first, second} & {n for n in (first, second) if state in states(n, write=True)}
        seen.add(bool(both))
    assert seen == {True, False}


def test_layers_do_not_conflict(graph):
    assert conflicts(named(graph, "plan_0"), named(graph, "plan_1")) == []
    assert conflicts(named(graph, "plan_0"), named(graph, "hint_select_pages_0"))


def test_partial_attention_and_the_fetch_of_its_misses_touch_other_pages(graph):
    resident = find_ops(graph, "attend_resident")[1]
    repair, hint = named(graph, "prefetch_1"), named(graph, "hint_prefetch_1")
    pages = "sparda_pages_1"
    assert is_disjoint(resident, repair, pages)
    assert is_disjoint(repair, resident, pages)
    assert conflicts(resident, repair) == []
    # The hint's copy is for other pages than those that this plan knows to be there.
    assert not is_disjoint(resident, hint, pages)
    assert conflicts(resident, hint) == [pages]
    assert not is_disjoint(find_ops(graph, "attend_missing")[1], repair, pages)
