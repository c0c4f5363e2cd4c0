"""FuseProjections, told that it is on a GPU: what it joins, what it leaves, and what comes out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sparda_compile import SpardaConfig
from sparda_compile.errors import PassError
from sparda_compile.forecast.projection import to_inputs
from sparda_compile.forecast.start import initial_forecast
from sparda_compile.graph.nodes import call_name, fake_value, module_path, program_order, snapshot
from sparda_compile.graph.tags import FACTS, JOINED, LAYER
from sparda_compile.graph.text import graph_text
from sparda_compile.passes.base import Fact, PassContext
from sparda_compile.passes.machine import MACHINES
from sparda_compile.passes.manager import run_passes
from sparda_compile.passes.rewrite import fuse_projections
from sparda_compile.passes.rewrite.fuse_projections import FuseProjections
from sparda_compile.program.plan import forecast_shapes, make_plan
from sparda_compile.program.program import Program
from sparda_compile.runtime.kv_cache import KVCache

SMALL = {
    "machine": "h200", "top_k": 2, "sink_blocks": 1, "local_blocks": 1, "block_size": 16,
    "pool_size": 8, "pool_stride": 4, "lowering": "eager", "offload": "always",
}  # fmt: skip
CPU = torch.device("cpu")


@pytest.fixture
def on_gpu(monkeypatch):
    """Make the pass act; of the weights in fp32, k, v and forecasts are small, all else large."""
    monkeypatch.setattr(fuse_projections, "_on_gpu", lambda graph, ctx: True)
    machine = dataclasses.replace(MACHINES["h200"], memory_gbps=6.0)
    monkeypatch.setitem(MACHINES, "h200", machine)


@pytest.fixture
def planned(captures_of):
    """Return a function that plans a tiny model; unlike `plan_of`, it keeps nothing."""

    def plan(model="llama", phase="decode", *, batch_size=2, **settings):
        captures = captures_of(model)
        return make_plan(
            captures,
            phase,
            SpardaConfig(**{**SMALL, **settings}),
            batch_size=batch_size,
            max_tokens=256,
        )

    return plan


def record_of(plan):
    return next(s for s in plan.stages if s.name == "fuse_projections")


def joined_names(plan):
    """Return what each joined weight or bias is made of, as the names of the parts behind it."""
    gm = plan.graph_module
    return {name: len(parts) for name, parts in JOINED.of(gm).items()}


def parts_of(plan):
    """Return the projections that each joined one stands for, by its weight's name."""
    graph = record_of(plan).graph_module.graph
    groups = {}
    for whole in graph.nodes:
        if call_name(whole) == "linear" and whole.args[1].name.startswith("joined_weight"):
            (split,) = whole.users
            items = sorted(split.users, key=lambda n: n.args[1])
            groups[whole.args[1].name] = [_called(n) for n in items]
    return groups


def _called(part):
    own = part.name.startswith(("forecast_", "hint_", "sparda_"))
    return part.name.removesuffix("_part") if own else module_path(part).rsplit(".", 1)[-1]


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_nothing_to_do_on_the_cpu(planned, phase):
    plan = planned(phase=phase, mode="forecast")
    assert record_of(plan).counts == {"joined": 0, "into": 0}
    assert JOINED.of(plan.graph_module) == {}
    before = plan.stage("insert_forecast")
    assert graph_text(before.graph) == graph_text(record_of(plan).graph)


@pytest.mark.usefixtures("on_gpu")
def test_a_prefill_is_left_alone(planned):
    plan = planned(phase="prefill", mode="forecast")
    assert record_of(plan).counts == {"joined": 0, "into": 0}


@pytest.mark.usefixtures("on_gpu")
def test_all_projections_of_one_input_are_joined_where_one_is_small(planned):
    plan = planned(mode="forecast")
    # The input of the first layer feeds its own forecast and that of the second.
    assert record_of(plan).counts == {"joined": 8, "into": 2}
    assert [sorted(names) for names in parts_of(plan).values()] == [
        ["forecast_0", "forecast_1", "k_proj", "q_proj", "v_proj"],
        ["k_proj", "q_proj", "v_proj"],
    ]
    assert joined_names(plan) == {"joined_weight_0": 5, "joined_weight_1": 3}


@pytest.mark.usefixtures("on_gpu")
def test_of_low_rank_the_matrix_that_reads_the_input_is_joined(planned):
    plan = planned(mode="forecast", forecast_rank=8)
    assert [sorted(names) for names in parts_of(plan).values()] == [
        ["forecast_0_v", "forecast_1_v", "k_proj", "q_proj", "v_proj"],
        ["k_proj", "q_proj", "v_proj"],
    ]
    left = {n.name for n in plan.graph_module.graph.nodes if call_name(n) == "linear"}
    assert {"forecast_0_u", "forecast_1_u"} < left


@pytest.mark.usefixtures("on_gpu")
def test_large_projections_are_left(planned, monkeypatch):
    plan = planned(mode="query")
    left = [
        module_path(n).rsplit(".", 1)[-1]
        for n in plan.graph_module.graph.nodes
        if call_name(n) == "linear" and not n.args[1].name.startswith("joined")
    ]
    per_layer = {"o_proj": 2, "gate_proj": 2, "up_proj": 2, "down_proj": 2}
    assert {name: left.count(name) for name in left} == {**per_layer, "lm_head": 1}
    # What a copy would cost too much for is left out, even beside a small one.
    monkeypatch.setattr(fuse_projections, "_MOST_BYTES", 8192)
    assert list(parts_of(planned(mode="query")).values()) == [["k_proj", "v_proj"]] * 2
    monkeypatch.undo()
    monkeypatch.setattr(fuse_projections, "_on_gpu", lambda graph, ctx: True)
    # Where a launch is as long as reading a layer, everything of one input is joined.
    slow = dataclasses.replace(MACHINES["h200"], launch_us=1e6)
    monkeypatch.setitem(MACHINES, "h200", slow)
    assert list(parts_of(planned(mode="query")).values()) == [
        ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    ] * 2  # fmt: skip


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("memory_gbps", [4.09, 4.1])
def test_a_projection_is_small_up_to_one_launch(planned, monkeypatch, memory_gbps):
    """K's weight has 8192 bytes, read in 2 microseconds at 4.096 GB/s."""
    machine = dataclasses.replace(MACHINES["h200"], memory_gbps=memory_gbps)
    monkeypatch.setitem(MACHINES, "h200", machine)
    assert record_of(planned(mode="query")).counts["into"] == (2 if memory_gbps > 4.096 else 0)


@pytest.mark.usefixtures("on_gpu")
def test_biases_are_joined_with_their_weights(planned):
    plan = planned("qwen2", mode="forecast")
    graph = record_of(plan).graph_module.graph
    # Forecasts have no bias: they do not go with keys and values that have one.
    assert sorted(sorted(names) for names in parts_of(plan).values()) == [
        ["forecast_0", "forecast_1"], ["k_proj", "q_proj", "v_proj"], ["k_proj", "q_proj", "v_proj"]
    ]  # fmt: skip
    biased = [n for n in graph.nodes if call_name(n) == "linear" and _bias_name(n)]
    both = [(n.args[1].name, _bias_name(n)) for n in biased if "joined" in _bias_name(n)]
    assert len(both) == 2
    sources = JOINED.of(plan.graph_module)
    weights = plan.captured.weights
    for weight, bias in both:
        assert len(sources[weight]) == len(sources[bias]) == 3
        for one, other in zip(sources[weight], sources[bias], strict=True):
            assert weights[one].dim() == 2
            assert weights[other].dim() == 1
            assert weights[one].shape[0] == weights[other].shape[0]


def _bias_name(node):
    return node.args[2].name if len(node.args) > 2 and node.args[2] is not None else ""


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("hint", ["forecast", "next_query", ("forecast", "next_query")])
def test_what_a_hint_projects_stays_apart_in_mode_exact(planned, hint):
    """Keys and values must be, bit for bit, those of mode query; nor do hints share a product."""
    plan = planned(mode="exact", hint=hint)
    groups = sorted(sorted(names) for names in parts_of(plan).values())
    assert groups == [["k_proj", "q_proj", "v_proj"]] * 2
    query = planned(mode="query")
    models = [names for names in parts_of(plan).values() if "k_proj" in names]
    assert models == list(parts_of(query).values())


@pytest.mark.usefixtures("on_gpu")
def test_next_query_is_not_joined_even_where_it_is_small(planned, monkeypatch):
    slow = dataclasses.replace(MACHINES["h200"], launch_us=1e6)
    monkeypatch.setitem(MACHINES, "h200", slow)
    parts = list(parts_of(planned(mode="exact", hint="next_query")).values())
    assert parts == [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]] * 2


@pytest.mark.usefixtures("on_gpu")
def test_parts_take_the_place_of_what_they_stand_for(planned):
    plan = planned(mode="forecast")
    before, after = plan.stage("insert_forecast").graph, record_of(plan).graph_module.graph
    order = program_order(after)
    old = {n.name: n for n in before.nodes}
    for part in [n for n in after.nodes if n.name.endswith("_part")]:
        was = old[part.name.removesuffix("_part")]
        assert call_name(was) == "linear"
        assert {u.name for u in part.users} == {u.name for u in was.users}
        assert fake_value(part).shape == fake_value(was).shape
        assert {k for k in was.meta if k != "val"} == {k for k in part.meta if k != "val"}
        assert LAYER.get(part) == LAYER.get(was)
        assert order[part] < min(order[u] for u in part.users)
    for name, sources in JOINED.of(plan.graph_module).items():
        node = next(n for n in after.nodes if n.name == name)
        shapes = [fake_value(old[source]).shape for source in sources]
        assert fake_value(node).shape == (sum(s[0] for s in shapes), *shapes[0][1:])
        (whole,) = node.users
        # It belongs to no layer: the scheduler neither moves it nor counts it as a forecast.
        assert not LAYER.on(whole)


@pytest.mark.usefixtures("on_gpu")
def test_joined_weight_has_the_rows_of_its_parts_in_order(planned):
    plan = planned(mode="forecast")
    forecast = _forecast(plan)
    program = Program(plan, forecast)
    placeholders = [n.name for n in plan.graph_module.graph.nodes if n.op == "placeholder"]
    arguments = dict(zip(placeholders, program._arguments, strict=True))
    known = to_inputs(forecast) | plan.captured.weights
    for name, sources in JOINED.of(plan.graph_module).items():
        assert torch.equal(arguments[name].tensor, torch.cat([known[source] for source in sources]))


def _forecast(plan):
    graph, shapes = plan.stage("find_attention").graph, forecast_shapes(plan)
    return initial_forecast(graph, plan.sites, shapes, plan.captured, torch.float32)


def logits_of(plan, steps=40):
    program = Program(plan, _forecast(plan))
    kv = KVCache(plan.layout, CPU)
    generator = torch.Generator().manual_seed(0)
    out = []
    for step in range(steps):
        ids = torch.randint(0, 256, (2, 1), generator=generator)
        out.append(program(ids, torch.full((2, 1), step), None, kv))
        kv.advance(1, 1)
    return torch.stack(out)


@pytest.mark.parametrize(
    ("model", "mode", "rank"),
    [
        ("llama", "forecast", None),
        ("llama", "forecast", 8),
        ("llama", "exact", None),
        ("qwen2", "forecast", None),
        ("qwen2", "exact", None),
    ],
)
def test_logits_are_close_to_those_of_the_projections_apart(planned, request, model, mode, rank):
    want = logits_of(planned(model, mode=mode, forecast_rank=rank))
    request.getfixturevalue("on_gpu")
    plan = planned(model, mode=mode, forecast_rank=rank)
    assert record_of(plan).counts["joined"] >= 4
    torch.testing.assert_close(logits_of(plan), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("hint", ["forecast", "next_query"])
def test_exact_is_query_bit_for_bit(planned, hint):
    want = logits_of(planned(mode="query"))
    assert torch.equal(logits_of(planned(mode="exact", hint=hint)), want)


@pytest.mark.usefixtures("on_gpu")
def test_two_plans_share_no_names(planned):
    first, second = planned(mode="forecast"), planned(mode="query")
    assert len(JOINED.of(first.graph_module)["joined_weight_0"]) == 5
    assert len(JOINED.of(second.graph_module)["joined_weight_0"]) == 3


@pytest.mark.usefixtures("on_gpu")
def test_second_run_is_refused(planned):
    plan = planned(mode="forecast")
    gm = snapshot(plan.stage("insert_forecast"))
    FACTS.put(gm, frozenset({Fact.SITES_TAGGED, Fact.ATTENTION_REPLACED, Fact.FORECAST_INSERTED}))
    machine = MACHINES["h200"]
    ctx = PassContext(plan.layout.config, "decode", {}, "Model", plan.layout, machine)
    (record,) = run_passes(gm, [FuseProjections()], ctx)
    assert record.counts == {"joined": 8, "into": 2}
    with pytest.raises(PassError, match="fuse_projections has already run"):
        run_passes(gm, [FuseProjections()], ctx)


@pytest.mark.parametrize(
    ("device", "machine", "expected"),
    [
        ("cpu", "h200", False),
        ("cuda", "cpu", True),
        ("meta", "h200", True),  # it runs nowhere, and is planned for that machine
        ("meta", "cpu", False),
    ],
)
def test_the_device_is_that_of_the_inputs(planned, device, machine, expected):
    from torch._subclasses.fake_tensor import FakeTensorMode

    graph = snapshot(planned(mode="query").stage("capture")).graph
    with FakeTensorMode():
        for node in graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = torch.empty(1, device="cpu" if device == "cuda" else device)
        node = next(n for n in graph.nodes if n.op == "placeholder")
        node.meta["val"] = torch.empty(1, device=device)
    ctx = PassContext(SpardaConfig(), "decode", {}, "Model", None, MACHINES[machine])
    assert fuse_projections._on_gpu(graph, ctx) is expected
