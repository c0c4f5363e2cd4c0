"""What each op takes: each kind of argument is wrong once, and the sentence says how."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument, set_argument
from sparda_compile.graph.nodes import copy_graph, find_ops
from sparda_compile.graph.op_index import OpIndex
from sparda_compile.graph.tags import FACTS, SITE
from sparda_compile.passes.check.grammar import layers_of
from sparda_compile.passes.check.operands import wrong_operands


@pytest.fixture
def first_wrong(plan_of, context_of):
    """Return a function that changes a right graph and returns the first thing that is wrong."""

    def check(change, model="llama", phase="decode", **settings):
        settings = {"machine": "h200", "mode": "exact", "offload": "always", **settings}
        plan = plan_of(model, phase, **settings)
        graph, context = copy_graph(plan.graph_module.graph), context_of(plan)
        change({node.name: node for node in graph.nodes})
        index = OpIndex(graph)
        layers = layers_of(index, context.layout)
        facts = FACTS.of(plan.graph_module)
        return next(wrong_operands(index, layers, context, facts), None)

    return check


def put(op, name, value):
    """Return a change that lets an op take another node."""
    return lambda nodes: set_argument(nodes[op], name, nodes.get(value))


def put_at(op, name, place, value):
    """Return a change that lets an op take another node in a list."""

    def change(nodes):
        values = list(argument(nodes[op], name))
        values[place] = nodes[value]
        set_argument(nodes[op], name, values)

    return change


@pytest.mark.parametrize("model", ["llama", "gemma3"])
@pytest.mark.parametrize("phase", ["decode", "prefill", "sparse_prefill"])
def test_right_graphs(first_wrong, model, phase):
    assert first_wrong(lambda _: None, model, phase, hint="previous_step") is None


WRONG = {
    "state of another layer": (
        put("append_kv_1", "pages", "sparda_pages_0"),
        "append_kv_1 takes sparda_pages_0 as its pages, not sparda_pages_1",
    ),
    "another state": (
        put("plan_0", "page_block", "sparda_page_stamp_0"),
        "plan_0 takes sparda_page_stamp_0 as its page_block, not sparda_page_block_0",
    ),
    "another result of the plan": (
        put("append_kv_0", "tail_page", "page_ids_0"),
        "append_kv_0 takes page_ids_0 (result 0 of plan_0) as its tail_page, "
        "not result 4 of plan_0",
    ),
    "a result of the hint's plan": (
        put("prefetch_1", "miss_pages", "hint_miss_pages_1"),
        "prefetch_1 takes hint_miss_pages_1 (result 4 of hint_select_pages_1) as its miss_pages, "
        "not result 3 of plan_1",
    ),
    "another layer's selection": (
        put("plan_1", "block_ids", "block_ids_0"),
        "plan_1 takes block_ids_0 as its block_ids, no selection of layer 1",
    ),
    "another layer's scores": (
        put("block_ids_1", "scores", "scores_0"),
        "block_ids_1 takes scores_0 as its scores, not those of layer 1",
    ),
    "the hint's scores": (
        put("block_ids_1", "scores", "hint_scores_1"),
        "block_ids_1 takes hint_scores_1 as its scores, not those of layer 1",
    ),
    "another layer's keys": (
        put("append_kv_1", "k", "k_0"),
        "append_kv_1 takes k_0 as its k, not k_1",
    ),
    "a hint by the layer's query": (
        put("hint_scores_1", "query", "query_1"),
        "hint_scores_1 scores by query_1, not made for layer 1",
    ),
    "a Forecast's weights of another layer": (
        put_at("hint_piece_1", "inputs", 1, "sparda_forecast_0"),
        "hint_piece_1 takes sparda_forecast_0, which is of another layer",
    ),
    "a Forecast of another layer": (
        put("hint_scores_1", "query", "hint_piece_0"),
        "hint_scores_1 scores by hint_piece_0, not made for layer 1",
    ),
    "a summary's tensor": (
        put_at("update_summary_1", "tensors", 1, "sparda_recent_k_0"),
        "update_summary_1 takes [sparda_pooled_k_1, sparda_recent_k_0] as its tensors, not "
        "[sparda_pooled_k_1, sparda_recent_k_1]",
    ),
    "a buffer of another layer": (
        put_at("wait_blocks_1", "buffers", 0, "sparda_pages_0"),
        "wait_blocks_1 takes sparda_pages_0, which is of another layer",
    ),
    "a buffer that is gone": (
        put_at("wait_blocks_1", "buffers", 0, "sparda_host_1"),
        "wait_blocks_1 does not take sparda_pages_1 among its buffers",
    ),
    "an input of a fork": (
        put_at("fork_0", "inputs", 0, "page_ids_0"),
        "fork_0 does not take miss_blocks_0, which the work behind it uses",
    ),
    "no fork": (
        put("prefetch_0", "after", "nothing"),
        "prefetch_0 starts behind None, no fork of its layer",
    ),
    "a fork for two": (
        put("prefetch_0", "after", "hint_fork_0"),
        "hint_fork_0 goes to [hint_piece_0, prefetch_0], not to prefetch_0 alone",
    ),
    "the end": (
        put("advance_lengths", "lengths", "sparda_counters_0"),
        "advance_lengths takes sparda_counters_0 as its lengths, not sparda_lengths",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operand(first_wrong, name):
    change, sentence = WRONG[name]
    assert first_wrong(change) == sentence


STORED = {"kv_format": "fp8", "page_format": "stored"}
WRONG_OF_STORED = {
    "no tail": (
        put("attend_resident_1", "tail", "nothing"),
        "attend_resident_1 takes None as its tail, not sparda_tail_1",
    ),
    "the tail of another layer": (
        put("attend_missing_1", "tail", "sparda_tail_0"),
        "attend_missing_1 takes sparda_tail_0 as its tail, not sparda_tail_1",
    ),
    "new tokens in pages": (
        put("append_kv_0", "pages", "sparda_pages_0"),
        "append_kv_0 takes sparda_pages_0 as its pages, not sparda_tail_0",
    ),
    "a tail that is none": (
        lambda nodes: set_argument(nodes["append_kv_0"], "is_tail", False),
        "append_kv_0 takes False as its is_tail, not True",
    ),
    "a copy that unpacks": (
        lambda nodes: set_argument(nodes["prefetch_0"], "kv_format", "fp8"),
        "prefetch_0 takes 'fp8' as its kv_format, not 'model'",
    ),
    "attention that does not unpack": (
        lambda nodes: set_argument(nodes["attend_resident_0"], "kv_format", "model"),
        "attend_resident_0 takes 'model' as its kv_format, not 'fp8'",
    ),
}


@pytest.mark.parametrize("name", WRONG_OF_STORED)
def test_wrong_operand_beside_pages_of_stored_runs(first_wrong, name):
    change, sentence = WRONG_OF_STORED[name]
    assert first_wrong(change, hint="previous_step", **STORED) == sentence


@pytest.mark.parametrize("phase", ["decode", "prefill", "sparse_prefill"])
@pytest.mark.parametrize("mode", ["query", "forecast", "exact"])
def test_right_graphs_with_pages_of_stored_runs(first_wrong, mode, phase):
    settings = {"mode": mode, "hint": "forecast", **STORED}
    assert first_wrong(lambda _: None, "gemma3", phase, **settings) is None


def test_hint_takes_the_ids_of_the_layer_before(first_wrong):
    change = put("hint_plan_1", "block_ids", "block_ids_1")
    assert first_wrong(change, hint="previous_layer") == (
        "hint_plan_1 takes block_ids_1 as its block_ids, not block_ids_0"
    )


def test_forecast_is_the_layers_own(first_wrong):
    change = put("scores_1", "query", "query_0")
    assert (
        first_wrong(change, mode="forecast") == "scores_1 scores by query_0, not made for layer 1"
    )


def test_wait_for_the_other_event(first_wrong):
    def change(nodes):
        set_argument(nodes["wait_blocks_1"], "event", 77)

    assert (
        first_wrong(change) == "wait_blocks_1 waits for another event than hint_prefetch_1 records"
    )


def test_site_that_another_node_carries(first_wrong):
    def change(nodes):
        SITE.put(nodes["append_kv_1"], nodes["attend_missing_1"].meta.pop("sparda"))

    assert first_wrong(change) == (
        "the site of layer 1 is carried by [append_kv_1], not by [attend_missing_1]"
    )


def test_prefill_stores_by_its_table(first_wrong):
    change = put("offload_blocks_1", "block_table", "sparda_block_table_0")
    assert first_wrong(change, phase="prefill") == (
        "offload_blocks_1 takes sparda_block_table_0 as its block_table, not sparda_block_table_1"
    )


@pytest.mark.parametrize("wrong", ["num_past", "may_hide"])
def test_prefill_attends_by_what_its_caller_knows(first_wrong, wrong):
    """A number of the graph's own would be right for the prompts that it was made for alone."""
    change = put("prefill_attention_1", wrong, "sparda_none")
    assert first_wrong(change, phase="prefill") == (
        f"prefill_attention_1 takes None as its {wrong}, not sparda_{wrong}"
    )


@pytest.mark.parametrize("op", ["offload_blocks_1", "prefetch_1"])
def test_blocks_are_written_and_read_in_one_format(first_wrong, op):
    def change(nodes):
        set_argument(nodes[op], "kv_format", "int8")

    sentence = f"{op} takes 'int8' as its kv_format, not 'fp8'"
    assert first_wrong(change, mode="forecast", kv_format="fp8") == sentence
    assert first_wrong(change, mode="forecast") == sentence.replace("fp8", "model")


def test_a_wait_takes_the_pages_that_are_rounded(first_wrong):
    def change(nodes):
        wait = next(iter(nodes["offload_blocks_1"].users))
        set_argument(wait, "buffers", [nodes["sparda_host_1"]])

    assert first_wrong(change, mode="forecast", kv_format="fp8").endswith(
        "does not take sparda_pages_1 among its buffers"
    )


def test_ops_of_the_hint_stand_beside_the_layers_own(plan_of):
    """What the sentences above name is there: two plans and two copies for each layer."""
    graph = plan_of("llama", machine="h200", mode="exact", offload="always").graph_module.graph
    assert len(find_ops(graph, "prefetch_blocks")) == 4
    assert len(find_ops(graph, "plan_pages", "select_pages")) == 4
