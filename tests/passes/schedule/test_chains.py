"""Chains: which nodes lead to a copy, where they may go, and on which stream."""

from __future__ import annotations

import pytest

from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.effects import argument, stream_of
from sparda_compile.graph.nodes import call_name, find_ops, program_order, snapshot
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import HINT, LAYER
from sparda_compile.isa.streams import COMPUTE, COPY, REPAIR, SELECT
from sparda_compile.passes.schedule.chains import Chains, ordered, set_streams

UNSCHEDULED = {"disable_passes": ("schedule_transfers", "fuse_selection"), "machine": "h200"}


@pytest.fixture
def program(plan_of):
    def of(**settings):
        graph = snapshot(plan_of("llama", **UNSCHEDULED, **settings).graph_module).graph
        mark_order(graph)
        chains = Chains(graph, dependence_graph(graph))
        return graph, [chains.chain(node) for node in find_ops(graph, "prefetch_blocks")]

    return of


def test_a_chain_leads_from_the_forecast_to_the_copy(program):
    _, chains = program(mode="forecast")
    for layer, chain in enumerate(chains):
        names = [call_name(node).removeprefix("sparda.") for node in chain.nodes]
        assert names[0] == "linear"
        assert names[-1] == "prefetch_blocks"
        assert [call_name(node).removeprefix("sparda.") for node in chain.stages] == [
            "score_blocks", "select_blocks", "plan_pages",
        ]  # fmt: skip
        assert {LAYER.of(node) for node in chain.nodes} == {layer}
        assert chain.fork in chain.nodes
        assert [node.name for node in chain.side(2)] == [f"block_ids_{layer}", f"plan_{layer}"]
        assert chain.side(9) == chain.stages
        assert chain.side(0) == []


@pytest.mark.parametrize("hint", ["forecast", "next_query"])
def test_what_a_hint_computes_is_the_first_stage_of_its_chain(program, hint):
    """So it may leave the compute stream, too, behind a fork that takes what it uses."""
    graph, chains = program(mode="exact", hint=hint)
    moving = [chain for chain in chains if chain is not None]
    assert len(moving) == (2 if hint == "forecast" else 1)
    for chain in moving:
        names = [call_name(node).removeprefix("sparda.") for node in chain.stages]
        assert names == ["run_piece", "score_blocks", "select_blocks", "plan_pages"]
        assert all(call_name(n).startswith(("sparda.", "getitem")) for n in chain.nodes)
        piece = chain.stages[0]
        for cut, first in ((4, piece), (3, chain.stages[1])):
            set_streams(chain, chain.side(cut))
            assert stream_of(piece) == (SELECT if cut == 4 else COMPUTE)
            assert argument(first, "after") is chain.fork
            assert first.prev is chain.fork
            taken = {n for n in first.all_input_nodes if n.op != "placeholder"} - {chain.fork}
            assert taken <= set(argument(chain.fork, "inputs"))
    graph.lint()


def test_a_chain_of_a_prompt_leads_from_the_forecast_to_the_mark_behind_its_copy(plan_of):
    plan = plan_of("llama", "sparse_prefill", mode="forecast", **UNSCHEDULED)
    graph = snapshot(plan.graph_module).graph
    mark_order(graph)
    for layer, stage in enumerate(find_ops(graph, "stage_blocks")):
        chain = Chains(graph, dependence_graph(graph)).chain(stage)
        names = [call_name(node).removeprefix("sparda.") for node in chain.nodes]
        assert names[0] == "linear"
        assert names[-1] == "record_event"
        assert chain.prefetch is stage
        assert [node.name for node in chain.stages] == [f"past_{layer}"]
        assert {LAYER.of(node) for node in chain.nodes} == {layer}
        assert {*stage.users, *chain.stages[0].users} & {*chain.nodes} >= {*stage.users}
        set_streams(chain, chain.side(1))
        assert (stream_of(chain.stages[0]), stream_of(stage)) == (SELECT, COPY)
        assert argument(chain.stages[0], "after") is chain.fork
        assert argument(stage, "after") is None


def test_a_repair_stays_where_it_is(program):
    graph, chains = program(mode="exact", hint="previous_step")
    prefetches = find_ops(graph, "prefetch_blocks")
    kinds = {node.name.startswith("hint"): chain for node, chain in zip(prefetches, chains,
                                                                       strict=True)}  # fmt: skip
    assert kinds[False] is None
    assert kinds[True] is not None


def test_a_chain_moves_as_a_whole(program):
    graph, chains = program(mode="forecast")
    chain = chains[1]
    new = ordered(graph, [chain], [(0, 0)])
    place = {node: i for i, node in enumerate(new)}
    assert sorted(new, key=lambda n: n.name) == sorted(graph.nodes, key=lambda n: n.name)
    at = [place[node] for node in chain.nodes]
    assert at == list(range(at[0], at[0] + len(at)))
    assert new[at[0] - 1] is chain.places[0][1]
    assert program_order(graph)[chain.prefetch] > place[chain.prefetch]


def test_a_cut_puts_stages_on_the_select_stream_behind_the_fork(program):
    graph, chains = program(mode="forecast")
    chain = chains[1]
    side = chain.side(2)
    set_streams(chain, side)
    assert [stream_of(node) for node in chain.stages] == [COMPUTE, SELECT, SELECT]
    assert argument(side[0], "after") is chain.fork
    assert argument(side[1], "after") is None
    assert argument(chain.prefetch, "after") is None
    assert chain.fork.next is side[0]
    assert set(side[0].all_input_nodes) <= {chain.fork, *argument(chain.fork, "inputs")}
    graph.lint()


@pytest.mark.parametrize("hint", ["ema", "previous_step"])
def test_what_takes_nothing_of_its_step_may_begin_any_number_of_layers_ahead(plan_of, hint):
    plan = plan_of("qwen3", **UNSCHEDULED, mode="exact", hint=hint)
    graph = snapshot(plan.graph_module).graph
    mark_order(graph)
    chains = Chains(graph, dependence_graph(graph))
    sites = sites_of(graph)
    ends = {LAYER.of(n): n.name for n in find_ops(graph, "offload_blocks")}
    guesses = [n for n in find_ops(graph, "prefetch_blocks") if n.name.startswith("hint")]
    for number, node in enumerate(guesses):
        places = chains.chain(node).places
        want = []
        for ahead in (1, 2, 4):
            if ahead <= number:
                site = sites[number - ahead]
                want += [f"behind {site.hidden.name}", f"behind {ends[site.layer]}"]
        assert [words for words, _ in places] == [*want, "at the beginning"]
        assert places[-1][1].op == "placeholder"


def test_a_second_chain_of_a_layer_waits_for_nothing_of_the_first_to_find_its_place(program):
    graph, chains = program(mode="exact", hint=("ema", "forecast"))
    sites = sites_of(graph)
    second = [c for c in chains if c is not None and c.prefetch.name.startswith("forecast")]
    for layer, chain in enumerate(second):
        order = program_order(graph)
        before = sites[max(layer - 1, 0)]
        assert order[chain.places[0][1]] >= order[before.hidden]
        assert not HINT.on(chain.places[0][1])


@pytest.mark.parametrize("page_format", ["model", "stored"])
@pytest.mark.parametrize("hint", ["next_query", "previous_layer", "mixture"])
def test_a_repair_of_a_layer_without_a_hint_stays_where_it_is(plan_of, hint, page_format):
    """With stored pages the append writes a tail of its own, and holds no repair back by itself."""
    settings = {"mode": "exact", "hint": hint, "kv_format": "int8", "page_format": page_format}
    graph = snapshot(plan_of("llama", **UNSCHEDULED, **settings).graph_module).graph
    mark_order(graph)
    chains = Chains(graph, dependence_graph(graph))
    repairs = [n for n in find_ops(graph, "prefetch_blocks") if stream_of(n) == REPAIR]
    assert {LAYER.of(node) for node in repairs} == {0, 1}
    assert [chains.chain(node) for node in repairs] == [None, None]
    plan_of("llama", machine="h200", **settings)  # and what is scheduled is proved
