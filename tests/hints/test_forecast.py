from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import PassError
from sparda_compile.forecast.projection import graph_input
from sparda_compile.graph.nodes import call_name, fake_value, tensor_shape
from sparda_compile.graph.site import sites_of
from sparda_compile.hints import forecast
from sparda_compile.testing import build


def projections(graph):
    nodes = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    return {
        layer: nodes[graph_input(str(layer))]
        for layer in range(9)
        if graph_input(str(layer)) in nodes
    }


def test_projections_read_the_layer_before_and_the_first_its_own(lab):
    graph = lab.decode_graph("insert_forecast", mode="forecast")
    sites = sites_of(graph)
    weights = projections(graph)
    assert list(weights) == list(range(lab.num_layers))
    for layer, weight in weights.items():
        (projected,) = weight.users
        source = sites[max(layer - 1, 0)]
        assert projected.args[0].name == source.hidden.name
        assert tuple(fake_value(weight).shape) == lab.forecast[layer].shape


@pytest.mark.parametrize("mode", ["forecast", "exact"])
def test_scores_take_rotated_heads_one_per_group(lab, mode):
    graph = lab.decode_graph("insert_forecast", mode=mode)
    order = {node: i for i, node in enumerate(graph.nodes)}
    attention = lab.ops(graph, "sparse_attention")
    scores = [n for n in graph.nodes if call_name(n) == "sparda.score_blocks"]
    by_forecast = [n for n in scores if "forecast" in n.args]
    assert len(by_forecast) == lab.num_layers
    assert len(scores) == (2 if mode == "exact" else 1) * lab.num_layers
    for site, node in zip(sites_of(graph), by_forecast, strict=True):
        query = node.args[0]
        assert query.name != site.query.name
        assert tensor_shape(query)[1:] == (site.num_groups, 1, site.head_dim)
        if mode == "exact" and site.layer:
            assert order[node] < order[attention[site.layer - 1]]
        names = set()
        stack = [query]
        while stack:
            names.add(call_name(stack[-1]))
            stack += stack.pop().all_input_nodes
        assert any("cos" in name for name in names), "the rotation is missing"


def test_learned_positions_need_no_rotation():
    config = SpardaConfig(mode="forecast", lowering="eager")
    with pytest.warns(UserWarning, match="not trained"):
        fast = optimize(build("plain", seed=2), config)
    graph = fast.sparda.graph("decode", after="insert_forecast").graph
    for layer, weight in projections(graph).items():
        (projected,) = weight.users
        assert f"forecast_{layer}" in projected.name
    assert projections(graph)


def test_rotation_that_cannot_be_copied_is_refused_by_name(lab, monkeypatch):
    def refuse(*_):
        raise ValueError("twelve heads wanted")

    monkeypatch.setattr(forecast, "clone_region", refuse)
    with pytest.raises(PassError, match=r"layer 0.*twelve heads wanted.*mode='query'"):
        lab.decode_graph("insert_forecast", mode="forecast")
