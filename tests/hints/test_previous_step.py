from __future__ import annotations

from sparda_compile.graph.site import sites_of


def test_recall_comes_first_and_memory_follows_the_selection(lab):
    graph = lab.decode_graph("insert_forecast", mode="exact", hint="previous_step")
    order = {node.name: i for i, node in enumerate(graph.nodes)}
    sites = sites_of(graph)
    recalls, memories = lab.ops(graph, "recall_ids"), lab.ops(graph, "remember_ids")
    ids = lab.ops(graph, "select_blocks")
    assert set(recalls) == set(memories) == set(ids) == set(range(lab.num_layers))
    for layer in range(lab.num_layers):
        assert recalls[layer].args[0] is memories[layer].args[1]
        assert recalls[layer].args[0].name == f"sparda_last_block_ids_{layer}"
        assert memories[layer].args[0] is ids[layer]
        recall = order[recalls[layer].name]
        assert recall < min(order[site.hidden.name] for site in sites)
        assert recall < order[ids[layer].name] < order[memories[layer].name]


def test_only_this_hint_remembers(lab):
    for hint in ("forecast", "previous_layer"):
        graph = lab.decode_graph("insert_forecast", mode="exact", hint=hint)
        assert not lab.ops(graph, "recall_ids")
        assert not any("last_block_ids" in node.name for node in graph.nodes)
