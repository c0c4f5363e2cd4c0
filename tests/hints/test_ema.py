"""The predictor in a program: where its ops stand, what they take, and what their state becomes."""

from __future__ import annotations

import pytest
import torch

from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import program_order, tensor_shape
from sparda_compile.graph.site import sites_of
from sparda_compile.hints.ema import EmaHint
from sparda_compile.kernels import predict_blocks
from sparda_compile.kernels.calibrate import candidates
from sparda_compile.kernels.predict_blocks import predict_blocks_reference

CONFIG = {"mode": "exact", "hint": "ema", "machine": "h200"}
INF = float("inf")


def test_predictions_come_first_and_updates_follow_the_attention(lab):
    graph = lab.decode_graph("insert_forecast", ema_level=0.5, ema_damping=0.25, **CONFIG)
    order = program_order(graph)
    predicted, updates = lab.ops(graph, "predict_blocks"), lab.ops(graph, "update_prediction")
    scores, attention = lab.ops(graph, "score_blocks"), lab.ops(graph, "sparse_attention")
    assert set(predicted) == set(updates) == set(range(lab.num_layers))
    first = min(order[site.hidden] for site in sites_of(graph))
    for layer, node in predicted.items():
        assert order[node] < first
        assert [argument(node, n).name for n in ("level", "trend")] == [
            f"sparda_level_{layer}", f"sparda_trend_{layer}",
        ]  # fmt: skip
        assert argument(node, "damping") == 0.25
        update = updates[layer]
        assert argument(update, "scores") is scores[layer]
        assert argument(update, "level") is argument(node, "level")
        assert (argument(update, "level_weight"), argument(update, "trend_weight")) == (0.5, 0.3)
        assert argument(update, "are_comparable")
        assert order[attention[layer]] < order[update]


def test_updates_run_while_a_repair_is_copied(lab):
    graph = lab.decode_graph(None, page_ratio=1.0, **CONFIG)
    order = program_order(graph)
    for name in ("resident", "missing"):
        for layer, node in lab.ops(graph, f"attend_{name}").items():
            update = lab.ops(graph, "update_prediction")[layer]
            assert (order[node] < order[update]) == (name == "resident")


def test_the_wait_for_a_prediction_has_its_state(lab):
    graph = lab.decode_graph(None, page_ratio=1.0, **CONFIG)
    waits = [n for n in graph.nodes if "wait_blocks" in n.name]
    for layer in range(lab.num_layers):
        taken = [w for w in waits if w.args[0].name == f"hint_prefetch_{layer}"]
        names = {n.name for n in argument(taken[0], "buffers")}
        assert {f"sparda_level_{layer}", f"sparda_trend_{layer}"} <= names


@pytest.mark.parametrize("selector", ["infllm2", "quest"])
@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill"])
def test_a_prompt_begins_the_levels_behind_the_summary(lab, phase, selector):
    module = lab.module(selector=selector, **CONFIG)
    graph = module.programs.get(phase, 1, 256, last_only=True).plan.graph_module.graph
    order = program_order(graph)
    begun, summaries = lab.ops(graph, "begin_prediction"), lab.ops(graph, "update_summary")
    assert set(begun) == set(range(lab.num_layers))
    for layer, node in begun.items():
        site = sites_of(graph)[layer]
        assert argument(node, "query").name == site.query.name
        assert argument(node, "selector") == selector
        assert argument(node, "are_comparable") == (selector == "infllm2")
        assert order[summaries[layer]] < order[node]
        assert tensor_shape(argument(node, "level")) == tensor_shape(argument(node, "trend"))


@pytest.mark.parametrize("phase", ["prefill", "sparse_prefill"])
def test_a_prompt_calibrates_what_steps_read(lab, phase):
    module = lab.module(ema_calibrate=True, **CONFIG)
    graph = module.programs.get(phase, 1, 256, last_only=True).plan.graph_module.graph
    layout = module.programs.get("decode", 1, 256, last_only=True).plan.layout
    for layer, node in lab.ops(graph, "begin_prediction").items():
        assert argument(node, "calibrated").name == f"sparda_calibrated_{layer}"
        assert argument(node, "num_selected") == layout.num_selected
        assert argument(node, "sink_blocks") == layout.config.sink_blocks
        assert argument(node, "local_blocks") == layout.config.local_blocks
    graph = lab.decode_graph("insert_forecast", ema_calibrate=True, **CONFIG)
    for name in ("predict_blocks", "update_prediction"):
        for layer, node in lab.ops(graph, name).items():
            assert argument(node, "calibrated").name == f"sparda_calibrated_{layer}"


def test_speculation_predicts_by_what_a_prompt_is_calibrated_to(lab):
    config = {"mode": "speculate", "speculate_where": "always", "offload": "never"}
    graph = lab.decode_graph(None, machine="h200", ema_calibrate=True, **config)
    for name in ("predict_ahead", "update_prediction"):
        found = {
            layer: argument(node, "calibrated").name for layer, node in lab.ops(graph, name).items()
        }
        assert found == {n: f"sparda_calibrated_{n}" for n in range(lab.num_layers)}


def test_nothing_is_calibrated_by_default(lab):
    graph = lab.decode_graph("insert_forecast", **CONFIG)
    for name in ("predict_blocks", "update_prediction"):
        assert {argument(node, "calibrated") for node in lab.ops(graph, name).values()} == {None}
    layout = lab.module(**CONFIG).programs.get("decode", 1, 256, last_only=True).plan.layout
    assert set(EmaHint().state(layout, layout.layers[0])) == {"level", "trend"}


def test_each_prompt_is_calibrated_and_few_tokens_change_nothing(lab):
    module = lab.module(ema_calibrate=True, **CONFIG)
    cache = module.new_cache(256)
    module(torch.randint(0, 256, (2, 9)), past_key_values=cache)
    found = cache.kv.state["sparda_calibrated_1"]
    assert (found == 0.0).all()
    module(torch.randint(0, 256, (2, 100)), past_key_values=cache)
    grid = candidates(found.device).tolist()
    assert all(row in grid for row in found.tolist())
    kept = found.clone()
    for _ in range(3):
        module(torch.randint(0, 256, (2, 1)), past_key_values=cache)
    module(torch.randint(0, 256, (2, 5)), past_key_values=cache)
    assert torch.equal(found, kept)
    found[1] = torch.tensor([0.2, 0.1, 0.75])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(found[0], found[1])
    layout = cache.kv.layout
    larger = cache.kv.grow(type(layout)(layout.config, layout.layers, 2, 512))
    assert torch.equal(larger.state["sparda_calibrated_1"], found)
    cache.reset()
    assert (found == 0.0).all()


def level_of(cache, layer):
    return cache.kv.state[f"sparda_level_{layer}"]


@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_state_follows_prompt_steps_turns_beams_growth_and_reset(lab, prefill):
    module = lab.module(prefill=prefill, **CONFIG)
    cache = module.new_cache(256)
    module(torch.randint(0, 256, (2, 80)), past_key_values=cache)
    size = cache.kv.layout.config.block_size
    known = level_of(cache, 1) > -INF
    assert known[..., : 80 // size].all()
    assert not known[..., 80 // size + 1 :].any()
    before = level_of(cache, 1).clone()
    for _ in range(2 * size):
        module(torch.randint(0, 256, (2, 1)), past_key_values=cache)
    assert not torch.equal(level_of(cache, 1), before)
    assert (level_of(cache, 1) > -INF)[..., 80 // size + 1].all()
    before = level_of(cache, 1).clone()
    module(torch.randint(0, 256, (2, 5)), past_key_values=cache)
    assert (level_of(cache, 1)[..., :5] != before[..., :5]).any()
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(level_of(cache, 1)[0], level_of(cache, 1)[1])
    layout = cache.kv.layout
    larger = cache.kv.grow(type(layout)(layout.config, layout.layers, 2, 512))
    grown = larger.state["sparda_level_1"]
    assert torch.equal(grown[..., : layout.num_blocks], level_of(cache, 1))
    assert (grown[..., layout.num_blocks :] == -INF).all()
    cache.reset()
    assert (level_of(cache, 1) == -INF).all()
    assert (cache.kv.state["sparda_trend_1"] == 0).all()


def test_a_step_prefetches_what_the_state_says_before_it(lab, monkeypatch):
    predicted = {}

    def noted(level, *rest):
        predicted[level.data_ptr()] = ids = predict_blocks_reference(level, *rest)
        return ids

    monkeypatch.setattr(predict_blocks, "predict_blocks_reference", noted)
    module = lab.module(page_ratio=1.0, **CONFIG)
    cache = module.new_cache(256)
    module(torch.randint(0, 256, (1, 200)), past_key_values=cache)
    config, state = cache.kv.layout.config, cache.kv.state
    sizes = (config.block_size, config.sink_blocks, config.local_blocks)
    for _ in range(5):
        level, trend, lengths = (state[f"sparda_{n}"] for n in ("level_0", "trend_0", "lengths"))
        choice = (cache.kv.layout.num_selected, *sizes)
        want = predict_blocks_reference(level, trend, lengths, choice, 0.0)
        module(torch.randint(0, 256, (1, 1)), past_key_values=cache)
        assert torch.equal(predicted[level.data_ptr()], want)
