from __future__ import annotations

import pytest

from sparda_compile.bench.prr_summary import ablation, bars, headline, ladder

ROWS = {
    "torch_sdpa": {"median": 100.0},
    "torch_select": {"median": 60.0},
    "query": {"median": 50.0},
    "speculate_b1.5_c0.98": {"median": 38.0, "budget": 1.5},
    "speculate_b1_c0.98_update": {"median": 36.0, "budget": 1.0, "updates": True},
    "speculate_b1.5_c0.98_update": {"median": 40.0, "budget": 1.5, "updates": True},
    "reuse_last": {"median": 45.0, "unchanged": 0.25},
}


def test_headline_has_the_stated_budget_and_its_update():
    assert headline(ROWS, 1.5) == {
        "program": "speculate_b1.5_c0.98_update", "median": 40.0, "budget": 1.5, "updates": True,
    }  # fmt: skip


def test_ladder_stands_apart():
    found = {"programs": ROWS, "headline": {"median": 40.0}}
    assert ladder(found, 321.0) == {
        "torch_sdpa_without_graph": 321.0, "torch_sdpa": 100.0, "query": 50.0, "speculate": 40.0,
    }  # fmt: skip


def test_ablation_recomputes_in_every_step_that_changes():
    row = ablation({"programs": ROWS, "best_torch": "torch_sdpa"}, 40.0)
    # Selection takes 60 and attention 40, once more in three of four steps.
    assert row["recompute"] == round(100 / (60 + 0.75 * 40), 3)
    assert (row["kernels_alone"], row["repair"], row["ema"]) == (2.0, 2.222, 2.5)
    assert row["paper"] == {"recompute": 1.01, "repair": 1.30, "ema": 1.56}


def result(over_torch, over_query):
    line = {"over_torch": over_torch, "over_query": over_query}
    programs = {"query": {"over_torch": round(over_torch / over_query, 3)}}
    return {"by_overlap": {"0.9": {"headline": line, "programs": programs}, "0.7": {}}}


def test_bars_are_over_all_shapes():
    found = bars([result(1.7, 1.2), {"part": "attention"}, result(1.2, 0.99), {"by_overlap": {}}])
    assert found["shapes"] == 2
    assert found["found"] == {
        "best_over_torch": 1.7, "mean_over_torch": 1.45, "best_query_over_torch": 1.417,
        "mean_query_over_torch": 1.315, "least_over_query": 0.99,
    }  # fmt: skip
    assert found["passed"] == {
        "best_over_torch": True, "mean_over_torch": True, "best_query_over_torch": False,
        "mean_query_over_torch": False, "least_over_query": False,
    }  # fmt: skip
    assert found["bars"]["best_over_torch"] == pytest.approx(1.64)


def test_no_shape_has_no_bars():
    assert bars([{"part": "attention"}]) is None
