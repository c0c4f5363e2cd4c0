"""What each mode means."""

from __future__ import annotations

import pytest

from sparda_compile import SpardaConfig
from sparda_compile.registry import HINTS, PREDICTORS
from sparda_compile.state.strategy import strategy_of


def strategy(**settings):
    return strategy_of(SpardaConfig(**settings))


def test_dense_reads_all():
    dense = strategy(mode="dense", selector="quest")
    flags = (dense.selects, dense.overlaps, dense.repairs, dense.needs_forecast)
    assert not any(flags)
    assert dense.hints == ()
    assert dense.scorers == ()


def test_query_selects_in_line():
    query = strategy(mode="query", selector="quest")
    assert query.selects
    assert not any((query.overlaps, query.repairs, query.needs_forecast))
    assert [scorer.name for scorer in query.scorers] == ["quest"]
    assert query.first_selector == "quest"


@pytest.mark.parametrize(
    ("selector", "first", "forecast"),
    [("infllm2", "infllm2", "forecast"), ("quest", "infllm2", "forecast"),
     ("nosa", "nosa", "nosa_forecast"), ("lowbit4", "lowbit4", "lowbit4_forecast")],
)  # fmt: skip
def test_forecast_selects_early(selector, first, forecast):
    by_forecast = strategy(mode="forecast", selector=selector)
    assert by_forecast.selects_by_forecast
    assert by_forecast.overlaps
    assert not by_forecast.repairs
    assert by_forecast.first_selector == first
    assert [scorer.name for scorer in by_forecast.scorers] == [forecast]


@pytest.mark.parametrize(
    ("mode", "steps", "prompts"),
    [("query", "lowbit2", "infllm2"), ("exact", "lowbit2", "infllm2"),
     ("forecast", "lowbit2_forecast", "forecast")],
)  # fmt: skip
def test_prompts_may_be_selected_for_by_another(mode, steps, prompts):
    settings = {"mode": mode, "hint": "ema", "selector": "lowbit2", "prefill_selector": "infllm2"}
    both = strategy(**settings)
    assert both.chooser.name == steps
    assert both.in_prompts.chooser.name == prompts
    assert [scorer.name for scorer in both.scorers] == [steps, prompts]
    assert both.selects_prompts
    assert both.first_selector == "lowbit2"
    assert both.in_prompts.first_selector == "infllm2"
    for unread in ({"prefill": "dense"}, {"top_k": None}, {"prefill_selector": "lowbit2"}):
        own = strategy(**{**settings, **unread})
        assert own.in_prompts is own
        assert [scorer.name for scorer in own.scorers] == [steps]
        assert own.selects_prompts


@pytest.mark.parametrize("hint", HINTS.names())
def test_exact_selects_by_the_query_and_repairs(hint):
    exact = strategy(mode="exact", hint=hint)
    assert exact.selects
    assert exact.overlaps
    assert exact.repairs
    assert not exact.selects_by_forecast
    assert exact.hints == (HINTS[hint],)
    assert exact.needs_forecast == (hint == "forecast")
    assert SpardaConfig(mode="exact", hint=hint).needs_forecast == exact.needs_forecast


def test_several_hints_stay_in_order_and_need_what_each_needs():
    names = ("next_query", "forecast", "ema")
    exact = strategy(mode="exact", hint=names)
    assert [hint.name for hint in exact.hints] == [*names]
    assert exact.needs_forecast
    assert not strategy(mode="exact", hint=("ema", "previous_step")).needs_forecast
    assert strategy(mode="query", hint=names).hints == ()


def test_speculation_selects_by_the_query_and_predicts():
    found = strategy(mode="speculate", offload="never")
    assert found.selects
    assert not any((found.selects_by_forecast, found.overlaps, found.repairs, found.hints))
    assert found.predictor is PREDICTORS["ema"]
    assert found.keepers == (PREDICTORS["ema"],)
    assert [scorer.name for scorer in found.scorers] == ["infllm2"]
    assert strategy(mode="query").keepers == ()
    assert strategy(mode="exact", hint="ema").keepers == (HINTS["ema"],)
