"""InsertForecast: who scores, with what, and one layer ahead of whom."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from sparda_compile.graph.effects import argument
from sparda_compile.graph.nodes import (
    call_name,
    fake_value,
    find_ops,
    nodes_between,
    program_order,
    tensor_shape,
)
from sparda_compile.graph.site import sites_of
from sparda_compile.graph.tags import HINT, HINTS, LAYER
from sparda_compile.graph.text import graph_text
from sparda_compile.sizes import SAMPLES


@pytest.fixture
def inserted(plan_of):
    """Return a function that gives the graph behind this pass and its counts."""

    def insert(model="llama", phase="decode", **settings):
        record = next(
            s for s in plan_of(model, phase, **settings).stages if s.name == "insert_forecast"
        )
        return record.graph_module.graph, record.counts

    return insert


def named(graph, name):
    return next(n for n in graph.nodes if n.name == name)


def test_forecast_replaces_the_query_of_every_score(inserted):
    graph, counts = inserted(mode="forecast")
    assert counts == {"forecasts": 1, "bootstraps": 1, "hints": 0}
    for scores in find_ops(graph, "score_blocks"):
        assert argument(scores, "selector") == "forecast"
        assert argument(scores, "scale") == 0.25  # of a head dim of 16
        assert tensor_shape(argument(scores, "query")) == (SAMPLES.batch, 2, 1, 16)


@pytest.mark.parametrize(("layer", "source"), [(0, 0), (1, 0)])
def test_forecast_comes_from_the_input_of_the_layer_before(inserted, layer, source):
    graph, _ = inserted(mode="forecast")
    site, target = sites_of(graph)[source], sites_of(graph)[layer]
    forecast = named(graph, f"forecast_{layer}")
    assert call_name(forecast) == "linear"
    hidden, weight = forecast.args
    assert hidden.name == site.hidden.name
    assert weight.name == f"sparda_forecast_{layer}"
    assert tensor_shape(weight) == (2 * 16, 64)
    assert fake_value(weight).dtype == torch.float32
    # Its result is ready before the layer's own projections have begun.
    scored = argument(named(graph, f"scores_{layer}"), "query")
    order = program_order(graph)
    assert order[scored] < order[named(graph, site.projection.name)]
    assert named(graph, target.query.name) not in nodes_between(forecast, scored)


def test_forecast_is_rotated_like_the_query_that_it_stands_for(inserted):
    graph, _ = inserted(mode="forecast")
    for site in sites_of(graph):
        scored = argument(named(graph, f"scores_{site.layer}"), "query")
        mine = nodes_between(named(graph, f"forecast_{site.layer}"), scored)
        names = sorted(call_name(n) for n in mine)
        expected = sorted(
            [*(call_name(n) for n in site.rotation if n in nodes_between(site.projection, n)),
             "unflatten", "transpose"]
        )  # fmt: skip
        assert names == expected


def test_model_without_rotation_needs_none(inserted):
    graph, counts = inserted("gpt2", mode="forecast")
    assert counts["forecasts"] + counts["bootstraps"] == 2
    for layer in (0, 1):
        scored = argument(named(graph, f"scores_{layer}"), "query")
        between = nodes_between(named(graph, f"forecast_{layer}"), scored)
        assert {call_name(n) for n in between} == {"unflatten", "transpose"}


def test_layer_behind_a_window_layer_takes_its_input(inserted):
    graph, counts = inserted("gemma3", mode="forecast")
    assert counts == {"forecasts": 1, "bootstraps": 0, "hints": 0}
    window = sites_of(graph)[0]
    assert window.window
    assert named(graph, "forecast_1").args[0].name == window.hidden.name


def test_exact_leaves_selection_to_the_query_and_adds_a_hint(inserted):
    graph, counts = inserted(mode="exact", hint="forecast")
    assert counts == {"forecasts": 0, "bootstraps": 0, "hints": 2}
    sites = sites_of(graph)
    for layer, site in enumerate(sites):
        scores = named(graph, f"scores_{layer}")
        assert argument(scores, "query").name == site.query.name
        assert argument(scores, "selector") == "infllm2"
        guess = named(graph, f"hint_scores_{layer}")
        assert argument(guess, "selector") == "forecast"
        ids = named(graph, f"hint_block_ids_{layer}")
        assert argument(ids, "scores") is guess
        assert HINTS.of(ids) == [("forecast", layer)]
        # Nobody takes the guess yet: it cannot change what is computed.
        assert list(ids.users) == []


def test_previous_step_remembers_and_recalls(inserted):
    graph, counts = inserted(mode="exact", hint="previous_step")
    assert counts["hints"] == 2
    order = program_order(graph)
    for layer, site in enumerate(sites_of(graph)):
        recalled, remembered = (
            next(n for n in find_ops(graph, op) if LAYER.of(n) == layer)
            for op in ("recall_ids", "remember_ids")
        )
        state = f"sparda_last_block_ids_{layer}"
        assert recalled.args[0].name == remembered.args[1].name == state
        assert remembered.args[0].name == f"block_ids_{layer}"
        projection = named(graph, site.projection.name)
        assert order[recalled] < order[projection] < order[remembered]
        assert HINTS.of(recalled) == [("previous_step", layer)]
    assert not any("sparda_forecast" in n.name for n in graph.nodes)


def test_previous_layer_has_no_hint_for_the_first(inserted):
    graph, counts = inserted(mode="exact", hint="previous_layer")
    assert counts["hints"] == 1
    assert HINTS.of(named(graph, "block_ids_0")) == [("previous_layer", 1)]
    assert not HINTS.on(named(graph, "block_ids_1"))


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "query"},
        {"mode": "dense"},
        {"mode": "forecast", "phase": "prefill"},
        {"mode": "exact", "phase": "prefill"},
    ],
)
def test_nothing_to_do(plan_of, settings):
    plan = plan_of("llama", **settings)
    before, after = (plan.stage(name) for name in ("replace_attention", "insert_forecast"))
    assert graph_text(before.graph) == graph_text(after.graph)
    record = next(s for s in plan.stages if s.name == "insert_forecast")
    assert set(record.counts.values()) == {0}


def test_new_nodes_are_for_the_target_and_have_values(inserted):
    graph, _ = inserted(mode="forecast")
    for layer in (0, 1):
        forecast = named(graph, f"forecast_{layer}")
        scored = argument(named(graph, f"scores_{layer}"), "query")
        for node in {forecast, *nodes_between(forecast, scored)}:
            assert LAYER.of(node) == layer
            assert node.meta["val"] is not None


class TestSeveralHints:
    SETTINGS: ClassVar = {
        "mode": "exact",
        "hint": ("previous_layer", "next_query", "forecast", "ema"),
    }

    @pytest.fixture
    def graph(self, plan_of):
        return plan_of("llama", **self.SETTINGS).stage("insert_forecast").graph

    def test_each_makes_its_own_guess_under_its_own_name(self, graph):
        guesses = [(guess, node.name) for node in graph.nodes for guess in HINTS.get(node, ())]
        assert {guess: name for guess, name in guesses if guess[1] == 1} == {
            ("ema", 1): "predict_blocks_1",
            ("next_query", 1): "next_query_block_ids_1",
            ("forecast", 1): "forecast_block_ids_1",
            ("previous_layer", 1): "block_ids_0",
        }

    def test_what_leads_to_a_guess_says_whose_it_is(self, graph):
        assert HINT.of(named(graph, "next_query_scores_1")) == "next_query"
        assert HINT.of(named(graph, "forecast_scores_1")) == "forecast"
        assert HINT.of(named(graph, "predict_blocks_0")) == "ema"
        for name in ("scores_1", "block_ids_0", "block_ids_1", "update_prediction_1"):
            assert not HINT.on(named(graph, name))

    def test_of_those_made_at_one_place_the_first_that_is_named_stands_first(self, graph, plan_of):
        def order(graph):
            names = [node.name for node in graph.nodes]
            return [names.index(f"{hint}_block_ids_1") for hint in ("next_query", "forecast")]

        assert order(graph) == sorted(order(graph))
        other = plan_of("llama", **{**self.SETTINGS, "hint": ("forecast", "next_query")})
        after = order(other.stage("insert_forecast").graph)
        assert after == sorted(after, reverse=True)
