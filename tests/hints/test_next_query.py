from __future__ import annotations

import itertools

import pytest
import torch

from sparda_compile import SpardaConfig, optimize
from sparda_compile.errors import PassError
from sparda_compile.graph.evaluate import evaluate
from sparda_compile.graph.nodes import find_ops, tensor_shape
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import LAYER
from sparda_compile.hints import next_query
from sparda_compile.testing import build

CONFIG = {"mode": "exact", "hint": "next_query"}


def rehearsed(graph):
    """Return the query that each hint scores, by layer."""
    scores = [n for n in find_ops(graph, "score_blocks") if n.name.startswith("hint_")]
    return {LAYER.of(n): n for n in scores}


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_own_selector_scores_every_layer_but_the_first(lab, selector):
    graph = lab.decode_graph("insert_forecast", selector=selector, **CONFIG)
    sites, order = sites_of(graph), {node: i for i, node in enumerate(graph.nodes)}
    hints = rehearsed(graph)
    assert list(hints) == list(range(1, lab.num_layers))
    attention = lab.ops(graph, "sparse_attention")
    for layer, node in hints.items():
        assert selector in node.args
        assert sites[layer].scale in node.args
        assert tensor_shape(node.args[0]) == tensor_shape(sites[layer].query)
        assert order[node] < order[attention[layer - 1]]


def test_it_is_the_layers_query_of_the_input_of_the_layer_before(lab):
    """On one and the same input, rehearsal and query are bit for bit the same."""
    module = lab.module(**CONFIG)
    plan = module.programs.get("decode", 1, 256, last_only=True).plan
    graph = plan.stage("insert_forecast").graph
    # A site's nodes are those of the last graph; a stage has copies under the same names.
    nodes = {n.name: n for n in graph.nodes}
    weights = {name: value.detach() for name, value in plan.captured.weights.items()}
    position = next(n for n in graph.nodes if plan.captured.inputs.get(n.name) == "position_ids")
    for layer, node in rehearsed(graph).items():
        target, source = sites_of(graph)[layer], sites_of(graph)[layer - 1]
        hidden = torch.randn(tensor_shape(target.hidden))
        placeholders = {
            n: weights[n.name] for n in graph.nodes if n.op == "placeholder" and n.name in weights
        }
        known = {**placeholders, position: torch.tensor([[37]])}
        with torch.no_grad():
            query = evaluate(
                nodes[target.query.name], {**known, nodes[target.hidden.name]: hidden}, {}, 1
            )
            rehearsal = evaluate(node.args[0], {**known, nodes[source.hidden.name]: hidden}, {}, 1)
        assert torch.equal(query, rehearsal)


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
def test_exact_with_it_is_query_bit_for_bit(lab, selector):
    ids = torch.randint(0, 256, (1, 150))
    settings = {
        "max_new_tokens": 24, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    logits, stats = [], []
    for config in ({"mode": "query"}, CONFIG):
        module = lab.module(selector=selector, page_ratio=1.0, **config)
        logits.append(torch.stack(module.generate(ids, **settings).logits))
        stats.append(module.sparda.stats().layers)
    assert torch.equal(*logits)
    assert stats[1][0].misses == stats[0][0].misses
    assert all(0 <= stats[1][n].misses < stats[0][n].misses for n in range(1, lab.num_layers))


def test_fused_projections_and_learned_positions_are_copied_too():
    model = build("gpt2", attn_implementation="eager")
    config = SpardaConfig(lowering="eager", **CONFIG)
    fast = optimize(model, config)
    assert list(rehearsed(fast.sparda.graph("decode", after="insert_forecast").graph)) == [1]


def test_layers_of_other_widths_are_refused(lab, monkeypatch):
    widths = itertools.count(60)
    monkeypatch.setattr(next_query, "tensor_shape", lambda node: (1, 1, next(widths)))
    with pytest.raises(PassError, match=r"layer 1 reads.*61.*layer 0 has.*60.*previous_step"):
        lab.decode_graph("insert_forecast", **CONFIG)
