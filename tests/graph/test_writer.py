"""The program writer: state inputs once each, plans with named results."""

from __future__ import annotations

import torch

from sparda_compile.graph.effects import argument
from sparda_compile.graph.emit import Emitter
from sparda_compile.graph.nodes import fake_value, find_ops, snapshot, tensor_shape
from sparda_compile.graph.writer import StateInputs, geometry_of, plan_pages, select_by_score


def writer(plan_of, **settings):
    plan = plan_of("llama", mode="query", **settings)
    graph = snapshot(plan.graph_module).graph
    layout = plan.layout.traced()
    return graph, layout, StateInputs(graph, layout)


def test_a_state_tensor_is_one_placeholder_of_the_layouts_shape(plan_of):
    graph, layout, state = writer(plan_of)
    before = len(graph.nodes)
    pages = state.get("pages", 1)
    assert state.get("pages", 1) is pages
    assert tensor_shape(pages) == layout.tensors(layout.layers[1])["pages"].shape
    assert state.lengths.name == "sparda_lengths"
    assert len(graph.nodes) == before  # the program has them already
    added = state.add("sparda_more", (2, 3), torch.int32)
    assert state.add("sparda_more", (2, 3), torch.int32) is added
    assert len(graph.nodes) == before + 1
    assert (added.op, fake_value(added).dtype) == ("placeholder", torch.int32)


def test_results_of_a_plan_have_their_names(plan_of):
    graph, layout, state = writer(plan_of, disable_passes=("fuse_selection",))
    ids = find_ops(graph, "select_blocks")[0]
    emit = Emitter(graph, ids.next, ids, 0)
    guess = plan_pages(emit, ids, state, layout, "hint_", is_hint=True)
    assert argument(guess.node, "is_hint") is True
    assert guess.node.name == "hint_plan_0"
    assert guess.tail_page.name == "hint_tail_page_0"
    assert fake_value(guess.is_miss).dtype == torch.bool
    assert [guess.page_ids.args[1], guess.tail_page.args[1]] == [0, 4]


def test_a_selection_scores_by_the_summary_of_its_selector(plan_of):
    graph, layout, state = writer(plan_of, disable_passes=("fuse_selection",))
    old = find_ops(graph, "score_blocks")[1]
    query, shape = argument(old, "query"), layout.layers[1]
    emit = Emitter(graph, old.next, old, 1)
    ids = select_by_score(emit, query, "infllm2", 0.5, shape, state, layout, prefix="again_")
    scores = argument(ids, "scores")
    assert (ids.name, scores.name) == ("again_block_ids_1", "again_scores_1")
    assert argument(scores, "summary") == argument(old, "summary")
    assert argument(scores, "scale") == 0.5
    sizes = ("num_blocks", "block_size", "pool_size", "pool_stride")
    assert tuple(argument(scores, name) for name in sizes) == geometry_of(layout)
