"""Which temporaries each wait keeps alive."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument, set_argument, stream_of
from sparda_compile.graph.liveness import set_keepalives, side_stream_inputs, side_stream_uses
from sparda_compile.graph.nodes import find_ops, is_sparda, program_order, snapshot, tensor_shape
from sparda_compile.isa.streams import COMPUTE, SELECT


@pytest.fixture
def graph_of(plan_of):
    def graph(phase="decode", **settings):
        settings = {"machine": "h200", "mode": "forecast"} | settings
        return snapshot(plan_of("llama", phase, **settings).graph_module).graph

    return graph


def kept(graph):
    """Return the names that each wait keeps, by the start of its copy."""
    waits = find_ops(graph, "wait_blocks")
    return {argument(w, "ticket").name: [n.name for n in argument(w, "keepalive")] for w in waits}


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


SETTINGS = [
    {"mode": "forecast"},
    {"mode": "forecast", "machine": "cpu"},
    {"mode": "query"},
    {"mode": "exact", "hint": "forecast"},
    {"mode": "exact", "hint": "previous_layer"},
    {"mode": "exact", "hint": "previous_step", "disable_passes": ("schedule_transfers",)},
    {"mode": "forecast", "phase": "prefill"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_each_temporary_of_a_side_stream_is_used_until_its_own_wait(graph_of, settings):
    graph = graph_of(**settings)
    order = program_order(graph)
    waits = {argument(w, "event"): order[w] for w in find_ops(graph, "wait_blocks")}
    starts = {
        order[n]: waits[argument(n, "event")]
        for n in find_ops(graph, "prefetch_blocks", "offload_blocks")
    }
    used = 0
    for node in graph.nodes:
        if is_sparda(node) and stream_of(node) != COMPUTE:
            own = starts[min(start for start in starts if start >= order[node])]
            for temporary in side_stream_uses(node):
                assert max(order[u] for u in temporary.users) >= own, temporary.name
                used += 1
    assert used


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_nothing_is_kept_without_need(graph_of, settings):
    graph = graph_of(**settings)
    order = program_order(graph)
    for wait in find_ops(graph, "wait_blocks"):
        for temporary in argument(wait, "keepalive"):
            others = [u for u in temporary.users if u is not wait]
            assert all(order[u] < order[wait] for u in others), temporary.name


def test_copy_alone_on_its_stream_keeps_its_lists(graph_of):
    graph = graph_of(machine="cpu")
    assert kept(graph) == {
        "prefetch_0": ["miss_blocks_0", "miss_pages_0"],
        "prefetch_1": ["miss_blocks_1", "miss_pages_1"],
        "offload_blocks_0": ["tail_page_0"],
        "offload_blocks_1": ["tail_page_1"],
    }


def test_whole_chain_keeps_scores_and_the_results_that_nobody_reads(graph_of):
    names = kept(graph_of())["prefetch_1"]
    assert {"scores_1", "is_miss_1", "miss_blocks_1", "miss_pages_1"} <= set(names)
    # These are read by the layer's own attention, behind the wait.
    assert not {"picked_ids_1", "page_ids_1", "tail_page_1"} & set(names)


def test_prefill_keeps_new_keys_and_values(graph_of):
    lists = kept(graph_of("prefill"))
    assert set(lists) == {"offload_blocks_0", "offload_blocks_1"}
    assert len(lists["offload_blocks_0"]) == 2
    # Behind the last layer nobody reads the numbers of the tokens either.
    numbers = {"token_positions", "token_columns", "token_totals"}
    assert len(set(lists["offload_blocks_1"]) - numbers) == 2
    assert numbers <= set(lists["offload_blocks_1"])


def test_setting_them_again_changes_nothing(graph_of):
    graph = graph_of(mode="exact")
    before = kept(graph)
    assert set_keepalives(graph) == sum(map(len, before.values()))
    assert kept(graph) == before


def test_later_use_makes_a_keepalive_needless(graph_of):
    graph = graph_of(machine="cpu")
    wait = next(w for w in find_ops(graph, "wait_blocks") if w.args[0].name == "prefetch_1")
    with graph.inserting_after(wait):
        graph.call_function(len, (named(graph, "miss_blocks_1"),))
    set_keepalives(graph)
    assert kept(graph)["prefetch_1"] == ["miss_pages_1"]


def test_wait_for_another_copy_keeps_nothing(graph_of):
    # The first wait joins both copies; each still keeps what its own copy uses.
    graph = graph_of(machine="cpu")
    waits = {w.args[0].name: w for w in find_ops(graph, "wait_blocks")}
    waits["offload_blocks_0"].prepend(waits["offload_blocks_1"])
    set_keepalives(graph)
    assert kept(graph)["offload_blocks_1"] == ["tail_page_1"]
    assert kept(graph)["offload_blocks_0"] == ["tail_page_0"]


def test_ids_that_another_layer_goes_by_live_until_its_copy_is_awaited(graph_of):
    graph = graph_of(mode="exact", hint="previous_layer")
    assert "block_ids_0" in kept(graph)["hint_prefetch_1"]


def test_copy_that_nobody_awaits_is_a_bug_of_ours(graph_of):
    graph = graph_of(machine="cpu")
    plan = named(graph, "select_pages_1")
    set_argument(plan, "stream", SELECT)
    last = find_ops(graph, "offload_blocks")[-1]
    last.append(plan)
    with pytest.raises(AssertionError, match="select_pages_1 is on a side stream"):
        set_keepalives(graph)


def test_tickets_are_no_temporaries(graph_of):
    for node in find_ops(graph_of(), "prefetch_blocks", "offload_blocks"):
        assert all(tensor_shape(n) != (0,) for n in side_stream_uses(node))


def test_fork_takes_what_the_work_behind_it_uses(graph_of):
    graph = graph_of()
    chain = [named(graph, n) for n in ("scores_1", "select_pages_1", "prefetch_1")]
    names = [n.name for n in side_stream_inputs(chain)]
    assert names[0] == chain[0].args[0].name
    state = {"sparda_lengths", "sparda_block_table_1", "sparda_pages_1", "sparda_host_1"}
    assert state <= set(names)
    assert not {"scores_1", "select_pages_1", "miss_blocks_1", "fork_1"} & set(names)
    assert argument(named(graph, "fork_1"), "inputs") == side_stream_inputs(chain)
