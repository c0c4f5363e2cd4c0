"""Times of a layer's parts: sums by hand, those of the nodes, and whether a layer speculates."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile.graph.nodes import find_ops
from sparda_compile.passes.base import PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.schedule.cost import node_cost
from sparda_compile.passes.schedule.expected_blocks import expected_misses
from sparda_compile.passes.schedule.layer_times import (
    attends_before_repair,
    layer_times,
    speculates,
)

H200 = MACHINES["h200"]
QUICK = dataclasses.replace(H200, latency_us={**H200.latency_us, "repair_predicted": 2.0})
SPECULATE = {"mode": "speculate", "offload": "never", "machine": "h200"}
PAIRS = 3 * 2  # sequences, KV heads
HEADS = 2  # of queries, of one KV head
BLOCK = 2 * 64 * 16 * 4  # K and V, tokens, head dim, fp32
PARTIAL = HEADS * (16 + 1) * 4
US = 4300e3  # bytes per microsecond


def context(plan, machine=H200, **changes):
    config = plan.layout.config.replace(**changes)
    layout = dataclasses.replace(plan.layout, config=config).traced()
    return PassContext(config, plan.phase, {}, "Model", layout, machine, plan.layout.batch_size)


def as_measured(plan, batch):
    """Return a layer and what passes know, with the sizes of `sparda bench prr`."""
    sizes = {"num_groups": 2, "head_dim": 128, "dtype": torch.bfloat16}
    layout = dataclasses.replace(plan.layout, max_tokens=131072, batch_size=batch)
    ctx = dataclasses.replace(context(plan), layout=layout, batch_size=batch)
    return dataclasses.replace(plan.layout.layers[0], **sizes), ctx


@pytest.fixture
def plan(plan_of):
    return plan_of("llama", batch_size=3, **SPECULATE)


def test_sums_by_hand(plan):
    times = layer_times(plan.layout.layers[0], HEADS, context(plan))
    latency = H200.latency_of
    assert times.start_us == latency("attend_predicted")
    assert times.block_us == pytest.approx(PAIRS * (BLOCK + PARTIAL) / US)
    assert times.miss_us == pytest.approx(PAIRS * BLOCK / US)
    assert times.repair_us == pytest.approx(latency("repair_predicted") + PAIRS * 96 * PARTIAL / US)
    assert times.serial_us == pytest.approx(6.2 + PAIRS * 96 * BLOCK / US)
    windows = PAIRS * (8192 // 16) * 16 * 4  # pooled keys; those in the making come on top
    scores = 2 * PAIRS * 128 * 4
    known = H200.score_us("infllm2", windows + scores) + 8.8
    known += latency("append_kv") + latency("update_summary")
    assert times.select_us == pytest.approx(known, rel=5e-3)


def test_they_are_those_of_the_nodes(plan_of):
    plan = plan_of("llama", batch_size=3, speculate_where="always", **SPECULATE)
    ctx = context(plan)
    graph = plan.graph_module.graph
    times = layer_times(plan.layout.layers[0], HEADS, ctx)

    def us(*names):
        return sum(node_cost(find_ops(graph, name)[0], ctx).us for name in names)

    early = times.start_us + ctx.layout.num_predicted * times.block_us
    late = times.repair_us + expected_misses(ctx) * times.miss_us
    assert us("attend_predicted") == pytest.approx(early, rel=0.02)
    assert us("repair_predicted") == pytest.approx(late, rel=0.05)
    selecting = us("score_blocks", "select_pages", "append_kv", "update_summary")
    assert selecting == pytest.approx(times.select_us, rel=0.02)


def test_choosing_takes_two_launches_where_it_is_not_fused(plan):
    apart = {"disable_passes": ("fuse_selection",)}
    one, two = (
        layer_times(plan.layout.layers[0], HEADS, context(plan, **changes)).select_us
        for changes in ({}, apart)
    )
    assert two - one == pytest.approx(6.1 + 4.05 - 8.8)


def test_misses_are_the_current_block_and_what_changes(plan):
    assert expected_misses(context(plan, expected_overlap=0.75)) == 1 + 62 * 0.25
    assert expected_misses(context(plan, expected_overlap=1.0, top_k=None)) == 1.0


class TestSpeculates:
    def test_where_the_machine_gains(self, plan):
        shape = plan.layout.layers[0]
        assert speculates(shape, HEADS, context(plan, QUICK))
        slow = dataclasses.replace(H200, latency_us={**H200.latency_us, "repair_predicted": 9.0})
        assert not speculates(shape, HEADS, context(plan, slow))
        assert speculates(shape, HEADS, context(plan, slow, speculate_where="always"))

    @pytest.mark.parametrize("batch", [1, 16])
    def test_not_where_it_was_measured_slower(self, plan, batch):
        """128K tokens, 2 KV heads, 32 query heads: serial 24.2 and 79.3 us, 25.5 and 97.8 us."""
        shape, ctx = as_measured(plan, batch)
        assert not speculates(shape, 16, ctx)

    def test_what_was_measured_of_one_sequence(self, plan):
        shape, ctx = as_measured(plan, 1)
        times = layer_times(shape, 16, ctx)
        assert times.select_us + times.serial_us == pytest.approx(24.2, rel=0.15)
        assert times.speculating_us(96, 3) == pytest.approx(25.5, rel=0.15)
        assert times.speculating_us(192, 3) == pytest.approx(27.4, rel=0.15)

    def test_what_runs_beside_each_other_shares_the_bandwidth(self, plan):
        times = layer_times(plan.layout.layers[0], HEADS, context(plan))
        assert 0.0 < times.read_us < times.select_us
        times = dataclasses.replace(times, select_us=30.0, read_us=20.0, start_us=4.0, block_us=0.2)
        assert times.speculating_us(50, 0) == 30.0 + times.repair_us
        assert times.speculating_us(60, 0) == 32.0 + times.repair_us

    def test_not_where_nothing_runs_beside(self, plan):
        shape = plan.layout.layers[0]
        assert not speculates(shape, HEADS, context(plan, MACHINES["cpu"]))

    def test_not_where_more_is_attended_to_than_selection_hides(self, plan):
        shape = dataclasses.replace(plan.layout.layers[0], head_dim=256, num_groups=64)
        wide = context(plan, speculation_budget=4.0)
        assert layer_times(shape, HEADS, wide).block_us > 1.0
        assert not speculates(shape, HEADS, wide)

    def test_neither_windows_nor_other_modes(self, plan):
        shape = plan.layout.layers[0]
        window = dataclasses.replace(shape, kind="window", window=64)
        assert not speculates(window, HEADS, context(plan, speculate_where="always"))
        assert not speculates(shape, HEADS, context(plan, mode="query"))


class TestAttendsBeforeRepair:
    """The sizes of an 8B model at 128K tokens: a few late blocks of each sequence."""

    @pytest.fixture
    def exact(self, plan_of):
        settings = {"mode": "exact", "hint": "forecast", "machine": "h200"}
        return plan_of("llama", **settings, attend_before_repair="auto")

    @pytest.mark.parametrize(("batch", "is_early"), [(1, False), (2, True), (4, True), (16, True)])
    def test_where_a_repair_is_long_enough_to_be_hidden(self, exact, batch, is_early):
        shape, ctx = as_measured(exact, batch)
        assert attends_before_repair(shape, ctx) == is_early

    def test_not_where_hints_miss_nothing(self, exact):
        shape, ctx = as_measured(exact, 16)
        config = ctx.config.replace(expected_recall=1.0)
        assert not attends_before_repair(shape, dataclasses.replace(ctx, config=config))

    def test_where_it_is_asked_for_and_where_nothing_runs_beside(self, exact):
        shape, ctx = as_measured(exact, 1)
        config = ctx.config.replace(attend_before_repair="always")
        assert attends_before_repair(shape, dataclasses.replace(ctx, config=config))
        assert attends_before_repair(shape, dataclasses.replace(ctx, machine=MACHINES["cpu"]))
