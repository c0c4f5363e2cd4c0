"""What the ops of one attention take; test_replace_attention.py has which ops there are."""

from __future__ import annotations

import pytest

from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import call_name, find_ops
from sparda_compile.graph.tags import SITE


@pytest.fixture
def graph_of(plan_of):
    """Return a function that gives the graph behind ReplaceAttention."""
    return lambda phase, **settings: (
        plan_of("llama", phase, **{"mode": "query"} | settings).stage("replace_attention").graph
    )


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_a_prompt_selects_by_the_layers_query_behind_its_own_keys(graph_of, selector):
    graph = graph_of("sparse_prefill", selector=selector)
    order = {node: i for i, node in enumerate(graph.nodes)}
    pairs = zip(find_ops(graph, "select_tokens"), find_ops(graph, "update_summary"), strict=True)
    for picked, updated in pairs:
        assert argument(picked, "selector") == selector
        assert argument(picked, "summary") == argument(updated, "tensors")
        assert order[updated] < order[picked]
    queries = [argument(node, "query") for node in find_ops(graph, "select_tokens")]
    assert queries == [argument(node, "query") for node in find_ops(graph, "attend_tokens")]


def test_the_cache_hears_of_what_the_prompt_has_read(graph_of):
    sparse, dense = graph_of("sparse_prefill"), graph_of("prefill")
    ids = [node.name for node in find_ops(sparse, "select_tokens")]
    assert [argument(n, "block_ids").name for n in find_ops(sparse, "extend_kv")] == ids
    assert [argument(n, "block_ids").name for n in find_ops(sparse, "attend_tokens")] == ids
    assert [argument(n, "block_ids") for n in find_ops(dense, "extend_kv")] == [None, None]


def test_every_new_attention_carries_its_site(graph_of):
    graph = graph_of("sparse_prefill")
    carriers = [call_name(node) for node in graph.nodes if SITE.on(node)]
    assert carriers == ["sparda.attend_tokens"] * 2
