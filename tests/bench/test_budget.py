from __future__ import annotations

import pytest

from sparda_compile.bench.budget import bench_budget, budget_row, plan_budget
from sparda_compile.bench.decode import DecodeSetting
from sparda_compile.bench.memory import GIB, FreeMemory, LargestBatch
from sparda_compile.bench.shapes import SHAPES

MIB = 1 << 20


def test_published_shape():
    free = FreeMemory(110 * GIB, 90 * GIB)
    found = {}
    for gib in (8, 16):
        plan = plan_budget(SHAPES["8b"], DecodeSetting(1), gib * GIB, free)
        found[gib] = {side: (best.batch_size, best.limited_by) for side, best in plan.items()}
    # Resident is 4 GiB and its summaries each; offloaded is 4 GiB of CPU memory each.
    assert found[8]["resident"] == (1, "budget")
    assert found[16]["resident"] == (3, "budget")
    assert found[8]["scheduled"][1] == "budget"
    assert 15 <= found[8]["scheduled"][0] <= 22
    assert found[16]["scheduled"] == (22, "CPU memory")


def test_sides_share_the_device():
    setting = DecodeSetting(1)
    alone = plan_budget(SHAPES["8b"], setting, 8 * GIB, FreeMemory(100 * GIB, 200 * GIB))
    tight = FreeMemory(alone["resident"].device_bytes + 2 * GIB, 200 * GIB)
    shared = plan_budget(SHAPES["8b"], setting, 8 * GIB, tight)
    assert shared["resident"] == alone["resident"]
    assert shared["scheduled"].limited_by == "device memory"
    assert shared["scheduled"].device_bytes <= 2 * GIB


def test_both_sides_are_measured(lab, setting):
    plan = plan_budget(lab.shape, setting, 2 * MIB, FreeMemory(GIB, GIB))
    told = []
    result = bench_budget(lab.captures, plan, 2 * MIB, setting, told.append)
    batches = {side: result[side]["batch_size"] for side in ("resident", "scheduled")}
    assert batches["scheduled"] > batches["resident"] > 0
    assert list(result["by_overlap"]) == ["0.0", "1.0"]
    row = result["by_overlap"]["1.0"]
    for side, batch in batches.items():
        assert row[side]["runs"] == setting.rounds * setting.steps
        rate = batch / row[side]["median"] * 1e6
        assert row[side]["tokens_per_s"] == pytest.approx(rate, abs=0.1)
    rates = [row[side]["tokens_per_s"] for side in ("scheduled", "resident")]
    assert row["throughput_ratio"] == pytest.approx(rates[0] / rates[1], rel=0.01)
    assert "skipped" not in result


def test_budget_for_nobody_is_left_out(lab, setting):
    plan = plan_budget(lab.shape, setting, 1000, FreeMemory(GIB, GIB))
    result = bench_budget(lab.captures, plan, 1000, setting, lambda text: None)
    assert result["by_overlap"] == {}
    assert result["skipped"] == "not one sequence of scheduled fits: budget"


def test_row():
    plan = {
        "resident": LargestBatch(2, "budget", 3 * GIB, 0),
        "scheduled": LargestBatch(10, "CPU memory", GIB, 4 * GIB),
    }
    times = {"0.9": {"resident": [1000.0] * 3, "scheduled": [2000.0] * 3}}
    row = budget_row(plan, 4 * GIB, times)
    assert row["budget_gib"] == 4.0
    assert row["scheduled"] == {
        "batch_size": 10, "limited_by": "CPU memory", "device_gib": 1.0, "host_gib": 4.0,
    }  # fmt: skip
    assert row["by_overlap"]["0.9"]["resident"]["tokens_per_s"] == 2000.0
    assert row["by_overlap"]["0.9"]["throughput_ratio"] == 2.5
