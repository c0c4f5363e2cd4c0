"""Choosing places: each hint takes its own, and a place has to do for more copies than expected."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from sparda_compile.bench.programs import predicted_us
from sparda_compile.bench.shapes import SHAPES, build_model
from sparda_compile.config import SpardaConfig
from sparda_compile.graph.dependences import dependence_graph, mark_order
from sparda_compile.graph.nodes import find_ops, program_order, snapshot
from sparda_compile.graph.site import sites_of
from sparda_compile.passes.rewrite import insert_prefetch
from sparda_compile.passes.schedule import choose_places
from sparda_compile.passes.schedule.chains import Chains
from sparda_compile.program.captures import Captures
from sparda_compile.program.plan import make_plan

TOKENS = 131072
INT4 = {"mode": "forecast", "kv_format": "int4"}
BOTH = {"mode": "exact", "hint": ("ema", "forecast"), "selector": "lowbit2"}
# Two hints whose best places differ: one needs nothing of the step, and the other a whole layer's
# query projection.
APART = {"mode": "exact", "hint": ("previous_step", "next_query"), "selector": "lowbit2"}


@functools.cache
def captures():
    """Return four layers of the 8.2B shape, without weights."""
    shape = dataclasses.replace(SHAPES["8b"], num_layers=4)
    return Captures(build_model(shape, torch.device("meta"), torch.bfloat16), {})


@functools.cache
def planned(batch_size=16, **settings):
    config = SpardaConfig(machine="h200", max_tokens=TOKENS, **settings)
    return make_plan(captures(), "decode", config, batch_size=batch_size, max_tokens=TOKENS)


def choice(plan, prefetch):
    (words,) = (c for c in plan.schedule.choices if c.startswith(f"{prefetch}: "))
    return words.removeprefix(f"{prefetch}: ").partition(";")[0]


def chosen_by(monkeypatch, batch_size=16, **settings):
    """Return the plan of a changed rule, which no other test is given."""
    with monkeypatch.context() as patch:
        for name in [name for name in settings if name.startswith("_")]:
            patch.setattr(choose_places, name, settings.pop(name))
        return planned.__wrapped__(batch_size, **settings)


class TestHints:
    def test_each_takes_a_place_of_its_own(self):
        plan = planned(24, **APART)
        order = program_order(plan.graph_module.graph)
        at = {node.name: place for node, place in order.items()}
        # The step before two layers ahead, the query of the next layer where its input exists.
        assert choice(plan, "previous_step_prefetch_2") == "behind hidden_0"
        assert choice(plan, "next_query_prefetch_2") == "behind hidden_1"
        assert at["previous_step_prefetch_2"] < at["hidden_1"] < at["next_query_prefetch_2"]

    def test_that_is_predicted_to_be_faster_than_one_number_for_both(self, monkeypatch):
        both = planned(24, **APART)
        # All chains together, as if they were of one kind.
        with monkeypatch.context() as patch:
            patch.setattr(choose_places, "HINT", _NoHint)
            alike = planned.__wrapped__(24, **APART)
        assert {choice(alike, f"{hint}_prefetch_2") for hint in APART["hint"]} == {
            "behind hidden_1"
        }
        assert both.schedule.total_us < 0.998 * alike.schedule.total_us

    def test_a_forecast_beside_the_model_makes_the_step_shorter(self, monkeypatch):
        beside = planned(1, **BOTH)
        for layer in range(4):
            (words,) = (
                c for c in beside.schedule.choices if c.startswith(f"forecast_prefetch_{layer}: ")
            )
            assert f"; forecast_piece_{layer}, " in words
        monkeypatch.setattr(insert_prefetch, "put_in_piece", lambda *_: 0)
        in_line = planned.__wrapped__(1, **BOTH)
        assert beside.schedule.total_us < in_line.schedule.total_us - 4 * 5.0

    def test_chains_of_one_layer_stay_in_order(self):
        """What the Forecast fetches depends on what EMA has brought."""
        order = program_order(planned(**BOTH).graph_module.graph)
        at = {node.name: place for node, place in order.items()}
        for layer in range(4):
            assert at[f"ema_prefetch_{layer}"] < at[f"forecast_prefetch_{layer}"]


class _NoHint:
    @staticmethod
    def get(node):
        return None


class TestHalf:
    """At an overlap of 0.5 no schedule is more than 2% slower than the best place."""

    def test_a_place_that_is_only_fast_as_expected_is_refused(self, monkeypatch):
        plan = planned(**INT4)
        bold = chosen_by(monkeypatch, _SLOWER=10.0, **INT4)
        assert choice(bold, "prefetch_2") == "behind offload_blocks_1"
        assert choice(plan, "prefetch_2") != choice(bold, "prefetch_2")
        assert bold.schedule.total_us < plan.schedule.total_us < 1.05 * bold.schedule.total_us
        half, bold_half = (predicted_us(captures(), each, 0.5) for each in (plan, bold))
        assert bold_half > choose_places._SLOWER * half

    def test_what_is_expected_decides_among_the_others(self, monkeypatch):
        settings = {"mode": "forecast", "batch_size": 1}
        plan, bold = planned(**settings), chosen_by(monkeypatch, _SLOWER=10.0, **settings)
        assert plan.schedule.choices == bold.schedule.choices
        assert choice(plan, "prefetch_2") == "behind offload_blocks_1"

    def test_copies_of_an_overlap_below_that_are_those_that_are_expected(self, monkeypatch):
        settings = {**INT4, "expected_overlap": 0.25}
        lower = chosen_by(monkeypatch, _LEAST_OVERLAP=0.25, **settings)
        assert planned(**settings).schedule.choices == lower.schedule.choices


def test_what_is_chosen_is_among_the_best_of_all_pairs(plan_of, monkeypatch):
    """Against a search of every pair of decisions, on a program that is small enough for that."""
    plan = plan_of(
        "llama", **BOTH, machine="h200", disable_passes=("schedule_transfers",), batch_size=4
    )
    graph = snapshot(plan.graph_module).graph
    mark_order(graph)
    dag = dependence_graph(graph)
    find = Chains(graph, dag)
    chains = [c for c in map(find.chain, find_ops(graph, "prefetch_blocks")) if c is not None]
    assert len(chains) == 2 * len(sites_of(graph))
    made = []
    real = choose_places._Trials

    def trials(*given):
        made.append(real(*given))
        return made[0]

    monkeypatch.setattr(choose_places, "_Trials", trials)
    ctx = context(plan)
    decisions = choose_places.choose_places(graph, dag, chains, ctx)
    (known,) = made
    chosen, _ = known._times[tuple(decisions)]
    options = choose_places._options(chains, beside=True)
    for first in options:
        for second in options:
            known.add((first, second) * (len(chains) // 2))
    most = choose_places._SLOWER * known._least_half
    best = min(us for us, half in known._times.values() if half <= most)
    assert chosen <= 1.01 * best


def context(plan):
    from sparda_compile.passes.base import PassContext

    layout = plan.layout
    return PassContext(
        layout.config, "decode", {}, "Model", layout.traced(), plan.machine, layout.batch_size
    )


@pytest.mark.parametrize("beside", [False, True])
def test_options_begin_with_what_is_better_where_nothing_decides(beside, plan_of):
    plan = plan_of("llama", mode="forecast", machine="h200", disable_passes=("schedule_transfers",))
    graph = snapshot(plan.graph_module).graph
    mark_order(graph)
    find = Chains(graph, dependence_graph(graph))
    chains = [find.chain(node) for node in find_ops(graph, "prefetch_blocks")]
    options = choose_places._options(chains, beside=beside)
    stages = max(len(chain.stages) for chain in chains)
    assert options[0] == (0, stages if beside else 0)
    assert len(options) == len(set(options))
    assert {cut for _, cut in options} == set(range(stages + 1))


@pytest.mark.parametrize(("more", "place"), [(1.0, "offload_blocks_0"), (1e5, "hidden_0")])
def test_a_place_has_to_do_for_more_copies_than_are_expected(plan_of, monkeypatch, more, place):
    monkeypatch.setattr(choose_places, "_MORE_COPIES", more)
    settings = {"mode": "forecast", "machine": "h200", "expected_overlap": 1.0}
    # Plans are shared, and their settings are what they are known by.
    plan = plan_of("llama", "decode", batch_size=3 if more > 1 else 2, **settings)
    (choice,) = (c for c in plan.schedule.choices if c.startswith("prefetch_1"))
    assert f"behind {place}" in choice
