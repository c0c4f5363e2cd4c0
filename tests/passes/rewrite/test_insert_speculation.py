"""InsertSpeculation: attention that begins early, what it is ordered by, and what is refused."""

from __future__ import annotations

import pytest

from sparda_compile.errors import TransferRaceError
from sparda_compile.graph.effects import argument, conflicts, is_disjoint, set_argument, stream_of
from sparda_compile.graph.nodes import copy_graph, fake_value, find_ops, program_order
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import LAYER, SITE
from sparda_compile.isa.streams import ATTEND, COMPUTE
from sparda_compile.passes.check.issued import extract_program
from sparda_compile.passes.check.verify_transfers import check_program

SPECULATE = {
    "mode": "speculate", "offload": "never", "machine": "h200", "speculate_where": "always",
}  # fmt: skip
PROMPTS = ("prefill", "sparse_prefill")


@pytest.fixture
def inserted(plan_of):
    """Return a function that gives the graph behind this pass and its counts."""

    def insert(model="llama", phase="decode", **settings):
        plan = plan_of(model, phase, **{**SPECULATE, **settings})
        record = next(s for s in plan.stages if s.name == "insert_speculation")
        return record.graph_module.graph, record.counts

    return insert


def by_layer(graph, name):
    return {LAYER.of(node): node for node in find_ops(graph, name)}


@pytest.mark.parametrize("phase", ["decode", *PROMPTS])
@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({}, (2, 0)),
        ({"model": "gemma3"}, (1, 0)),
        ({"speculate_where": "auto"}, (0, 2)),
        ({"machine": "cpu", "speculate_where": "auto"}, (0, 2)),
        ({"machine": "cpu", "speculate_where": "always"}, (2, 0)),
        ({"mode": "query"}, (0, 0)),
        ({"mode": "exact", "hint": "ema"}, (0, 0)),
    ],
    ids=["llama", "window beside", "no gain", "nothing beside", "always", "query", "exact"],
)
def test_counts(inserted, phase, settings, counts):
    graph, found = inserted(phase=phase, **settings)
    assert found == dict(zip(("speculated", "left"), counts, strict=True))
    ops = ("attend_predicted", "repair_predicted") if phase == "decode" else ("predict_ahead",)
    for name in ops:
        assert len(find_ops(graph, name)) == counts[0]
    if phase == "decode":
        others = 0 if settings.get("mode", "speculate") == "speculate" else 2
        assert len(find_ops(graph, "sparse_attention")) == counts[1] + others


def test_attention_begins_with_the_query_and_ends_behind_the_new_token(inserted):
    graph, _ = inserted(repair="union")
    order = program_order(graph)
    names = (
        "attend_predicted", "score_blocks", "select_blocks", "plan_pages", "append_kv",
        "update_summary", "repair_predicted", "update_prediction", "predict_ahead",
    )  # fmt: skip
    found = [by_layer(graph, name) for name in names]
    marks = {n.name: n for n in find_ops(graph, "record_event")}
    waits = {argument(w, "ticket").name: w for w in find_ops(graph, "wait_blocks")}
    for site in sites_of(graph):
        layer = site.layer
        places = [order[nodes[layer]] for nodes in found]
        assert places == sorted(places)
        attend, repair, update, predict = (found[i][layer] for i in (0, 6, 7, 8))
        assert argument(attend, "query").name == argument(repair, "query").name == site.query.name
        assert SITE.of(repair).layer == layer
        assert argument(repair, "union")
        assert fake_value(repair).shape == fake_value(site.query).shape
        parts = [argument(repair, name) for name in ("partial_out", "partial_lse")]
        assert [part.args[0] for part in parts] == [attend, attend]
        assert {stream_of(n) for n in (attend, update, predict)} == {ATTEND}
        assert stream_of(repair) == COMPUTE
        assert argument(update, "scores") is found[1][layer]
        for first, work in ((attend, [attend]), (update, [update, predict])):
            fork = argument(first, "after")
            assert fork.next is first
            used = {n for node in work for n in node.all_input_nodes} - {fork}
            assert set(argument(fork, "inputs")) == used
        ended = waits[f"parts_{layer}"]
        assert order[found[5][layer]] < order[ended] < order[repair]
        assert argument(marks[f"parts_{layer}"], "inputs") == parts
        ended = waits[f"prediction_{layer}"]
        assert order[ended] > max(order[n] for n in found[8].values())
        assert argument(ended, "keepalive") == [found[1][layer]]
    last = find_ops(graph, "advance_lengths")[0]
    assert last.prev is max(waits.values(), key=lambda w: order[w])


@pytest.mark.parametrize("phase", PROMPTS)
def test_a_prompt_predicts_for_the_first_step(inserted, phase):
    graph, _ = inserted(phase=phase)
    totals = find_ops(graph, "number_tokens")[0]
    order = program_order(graph)
    begun = by_layer(graph, "begin_prediction")
    for layer, node in by_layer(graph, "predict_ahead").items():
        lengths = argument(node, "lengths")
        assert lengths.args == (totals, 2)
        assert argument(node, "num_new") == 0  # totals have them already
        assert stream_of(node) == COMPUTE
        assert order[begun[layer]] < order[node]


def test_parts_of_pages_and_of_the_table(plan_of):
    """The plan's is one of the table's entries only where no block has to leave."""
    graph = plan_of("llama", **SPECULATE).graph_module.graph
    attend, other = find_ops(graph, "attend_predicted")
    append, plan = find_ops(graph, "append_kv")[0], find_ops(graph, "select_pages")[0]
    repair = find_ops(graph, "repair_predicted")[0]
    pages, table = "sparda_pages_0", "sparda_block_table_0"
    assert is_disjoint(attend, append, pages)
    assert is_disjoint(append, attend, pages)
    assert is_disjoint(attend, plan, table)
    assert not is_disjoint(attend, plan, pages)
    assert not is_disjoint(repair, append, pages)
    assert not is_disjoint(other, append, pages)
    assert conflicts(attend, append) == conflicts(attend, plan) == []
    offloaded = plan_of("llama", mode="query", machine="h200", page_ratio=1.0).graph_module.graph
    evicting = find_ops(offloaded, "select_pages")[0]
    assert fake_value(argument(evicting, "page_block")).shape[-1] < 128
    assert not is_disjoint(attend, evicting, table)
    set_argument(attend, "lengths", argument(attend, "predicted"))
    assert not is_disjoint(attend, append, pages)
    set_argument(attend, "lengths", argument(append, "lengths"))


def erase_wait(graph, name):
    mark = next(n for n in graph.nodes if n.name == name)
    graph.erase_node(next(iter(mark.users)))
    graph.erase_node(mark)


def without_wait(graph):
    erase_wait(graph, "parts_1")


def wait_too_late(graph):
    mark = next(n for n in graph.nodes if n.name == "parts_1")
    find_ops(graph, "repair_predicted")[1].append(next(iter(mark.users)))


def wait_before_the_new_token(graph):
    mark = next(n for n in graph.nodes if n.name == "parts_1")
    find_ops(graph, "append_kv")[1].prepend(next(iter(mark.users)))


def without_fork(graph):
    attend = find_ops(graph, "attend_predicted")[1]
    fork = argument(attend, "after")
    set_argument(attend, "after", None)
    graph.erase_node(fork)


def without_fork_of_the_prediction(graph):
    update = find_ops(graph, "update_prediction")[0]
    fork = argument(update, "after")
    set_argument(update, "after", None)
    graph.erase_node(fork)


def prediction_never_awaited(graph):
    erase_wait(graph, "prediction_1")


def prediction_first(graph):
    """Renew the prediction before it was read; its scores are of the layer before then."""
    update, predict = (find_ops(graph, n)[1] for n in ("update_prediction", "predict_ahead"))
    fork, attend = argument(update, "after"), find_ops(graph, "attend_predicted")[1]
    scores, parts_fork = find_ops(graph, "score_blocks")[1], argument(attend, "after")
    parts_fork.prepend(scores)
    for node in (fork, update, predict):
        parts_fork.prepend(node)


def scores_not_kept(graph):
    mark = next(n for n in graph.nodes if n.name == "prediction_0")
    set_argument(next(iter(mark.users)), "keepalive", [])


RACES = {
    "without the wait": (without_wait, r"data: getitem.* repair_predicted_1|data: attend_pred"),
    "wait too late": (wait_too_late, r"data: .*repair_predicted_1"),
    "wait before the new token": (wait_before_the_new_token, r"state: append_kv_1 .* wait_blocks"),
    "without the fork": (without_fork, r"attend_predicted_1"),
    "without the prediction's fork": (without_fork_of_the_prediction, r"update_prediction_0"),
    "prediction never awaited": (prediction_never_awaited, r"predict|update"),
    "prediction first": (prediction_first, r"state: .*attend_predicted_1.* sparda_predicted_1"),
    "scores not kept": (scores_not_kept, r"keepalive: scores_0 is used by update_prediction_0"),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("name", RACES)
def test_the_verifier_refuses(plan_of, name, fused):
    """By happens-before alone: the grammar, which counts waits and forks, is not asked."""
    left_out = () if fused else ("fuse_selection",)
    graph = copy_graph(plan_of("llama", **SPECULATE, disable_passes=left_out).graph_module.graph)
    assert check_program(extract_program(graph)) > 0
    change, words = RACES[name]
    change(graph)
    with pytest.raises(TransferRaceError, match=words):
        check_program(extract_program(graph))
