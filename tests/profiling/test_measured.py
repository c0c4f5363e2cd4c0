"""A measured step beside its schedule."""

from __future__ import annotations

import dataclasses
import functools
import json
import types

import pytest
import torch

from sparda_compile.errors import BackendUnavailableError, UnsupportedInputError
from sparda_compile.isa.streams import COMPUTE, COPY
from sparda_compile.profiling.measured import MeasuredSchedule, measure, measure_step
from sparda_compile.report.schedule import Schedule, ScheduleRow


@pytest.fixture(scope="module")
def measured(decode_trace):
    return measure(decode_trace.events, decode_trace.schedule, decode_trace.nodes, "H200", 800.0)


def test_every_node_has_both_times(measured, decode_trace):
    expected = [n.node for n in decode_trace.nodes if n.kernels or n.op == "sparda.wait_blocks"]
    assert [n.node for n in measured.nodes if n.op != "model"] == expected
    predicted = {row.node: row.end_us - row.start_us for row in decode_trace.schedule.rows}
    rows = {row.node: row.end_us - row.start_us for row in measured.rows}
    for node in measured.nodes:
        assert node.measured_us == rows[node.node]
        if node.op != "model":
            assert node.predicted_us == predicted[node.node]


def test_model_is_what_lies_between(measured):
    names = [(n.node, n.layer) for n in measured.nodes if n.op == "model"]
    assert names == [
        ("model_before_append_kv_0", -1),
        ("model_before_append_kv_1", 0),
        ("model_before_append_kv_2", 1),
        ("model_before_append_kv_3", 2),
        ("model_end", 3),
    ]


def test_predictions_are_counted_once(measured, decode_trace):
    compute = sum(n.predicted_us for n in measured.nodes if n.stream == COMPUTE)
    copy = sum(n.predicted_us for n in measured.nodes if n.stream == COPY)
    assert compute == pytest.approx(decode_trace.schedule.total_us)
    assert measured.predicted.step_us == pytest.approx(decode_trace.schedule.total_us)
    assert measured.predicted.copy_us == pytest.approx(copy)
    assert measured.predicted.exposed_us == decode_trace.schedule.exposed_us > 0
    assert measured.predicted.compute_us == pytest.approx(
        compute - decode_trace.schedule.exposed_us
    )


def test_sums_by_op(measured):
    ops = {times.name: times for times in measured.ops()}
    assert next(iter(ops)) == "model"
    assert ops["select_pages"].count == 4
    assert ops["select_pages"].predicted_us == 8.0
    # Where the cost model is far off: the launch time was predicted.
    assert 30 < ops["select_pages"].measured_us / 4 < 70
    assert ops["select_pages"].difference_us == ops["select_pages"].measured_us - 8.0
    assert sum(t.measured_us for t in ops.values()) == pytest.approx(
        sum(n.measured_us for n in measured.nodes)
    )


def test_sums_by_layer(measured):
    for stream in (COMPUTE, COPY):
        layers = measured.layers(stream)
        mine = [n for n in measured.nodes if n.stream == stream and n.op != "sparda.wait_blocks"]
        assert sum(t.count for t in layers) == len(mine)
        assert sum(t.measured_us for t in layers) == pytest.approx(sum(n.measured_us for n in mine))
    assert [t.name for t in measured.layers(COMPUTE)] == ["-1", "0", "1", "2", "3"]
    assert [t.name for t in measured.layers(COPY)] == ["0", "1", "2", "3"]


def test_median_replay_is_shown(decode_trace, measured):
    assert measured.replays_us == pytest.approx((1068.8, 850.6), abs=0.1)
    assert measured.measured.step_us == pytest.approx(850.6, abs=0.1)
    first = [e for e in decode_trace.events if e["args"].get("correlation") == 23]
    alone = measure(first, decode_trace.schedule, decode_trace.nodes, "H200")
    assert alone.measured.step_us == pytest.approx(1068.8, abs=0.1)
    assert alone.measured.overlap < measured.measured.overlap
    doubled = [{**e, "args": {**e["args"], "correlation": 900}} for e in first]
    slow = measure(decode_trace.events + doubled, decode_trace.schedule, decode_trace.nodes, "H200")
    assert slow.measured.step_us == pytest.approx(1068.8, abs=0.1)


def test_nodes_without_kernels_count_to_the_model(decode_trace, measured):
    """`advance_lengths` launches an op of PyTorch, which stands among the model's."""
    cheaper = tuple(
        dataclasses.replace(row, end_us=row.start_us)
        if row.op == "sparda.advance_lengths" else row
        for row in decode_trace.schedule.rows
    )  # fmt: skip
    schedule = dataclasses.replace(decode_trace.schedule, rows=cheaper)
    other = measure(decode_trace.events, schedule, decode_trace.nodes, "H200")
    assert other.nodes[-1].predicted_us == pytest.approx(measured.nodes[-1].predicted_us - 2.0)


def test_to_dict_is_plain(measured):
    plain = json.loads(json.dumps(measured.to_dict()))
    assert (plain["device"], plain["machine"], plain["step_us"]) == ("H200", "h200", 800.0)
    assert plain["measured"] == dataclasses.asdict(measured.measured)
    assert plain["nodes"] == [dataclasses.asdict(node) for node in measured.nodes]
    assert len(plain["rows"]) == len(measured.rows)


def test_to_html_draws_both(measured, tmp_path):
    text = measured.to_html(tmp_path / "page.html").read_text(encoding="ascii")
    assert '"measured":{"decode":[["' in text
    assert "model_before_append_kv_3" in text
    assert "scores_0" in text


def test_trace_without_a_replay_is_refused(decode_trace):
    eager = [
        {**event, "args": {**event["args"], "correlation": i}}
        for i, event in enumerate(decode_trace.events)
    ]
    with pytest.raises(UnsupportedInputError, match=r"no replay .* cuda_graph=True"):
        measure(eager, decode_trace.schedule, decode_trace.nodes, "H200")


def plan_with(schedule):
    return types.SimpleNamespace(schedule=schedule)


@pytest.mark.parametrize(
    ("schedule", "what"),
    [(None, "has no schedule"), (Schedule("prefill", "h200", (), (), 0.0), "is of a prefill")],
)
def test_plan_without_a_decode_schedule_is_refused(schedule, what):
    with pytest.raises(UnsupportedInputError, match=what):
        measure_step(lambda: None, plan_with(schedule))


def test_measuring_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    row = ScheduleRow("a", "linear", -1, COMPUTE, 0.0, 1.0, 0, 0, 0.0)
    with pytest.raises(BackendUnavailableError, match="CUDA"):
        measure_step(lambda: None, plan_with(Schedule("decode", "h200", (row,), (), 0.0)))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["forecast", "query", "exact"])
def test_step_on_a_gpu(mode, tmp_path):
    from sparda_compile.bench.programs import build_program
    from sparda_compile.bench.shapes import SHAPES, build_model
    from sparda_compile.bench.synthetic import fill, follow, rewind
    from sparda_compile.program.captures import Captures
    from sparda_compile.runtime.kv_cache import KVCache

    device, tokens = torch.device("cuda"), 4096
    captures = Captures(build_model(SHAPES["tiny"], device, torch.bfloat16), {})
    settings = {"mode": mode, "top_k": 4, "local_blocks": 2, "block_size": 16}
    program = build_program(captures, "scheduled", 2, tokens, 96, **settings)
    cache = KVCache(program.plan.layout, device)
    fill(cache, tokens - 128)
    follow(cache, tokens - 128, 0.5)
    rewind(cache, tokens - 128)
    ids = torch.zeros((2, 1), dtype=torch.long, device=device)
    positions = torch.full_like(ids, tokens - 128)
    step = functools.partial(program, ids, positions, None, cache)
    found = measure_step(step, program.plan, replays=3, trace=tmp_path / "trace.json")
    assert isinstance(found, MeasuredSchedule)
    assert len(found.replays_us) == 3
    assert all(
        n.measured_us > 0 for n in found.nodes if n.op not in ("model", "sparda.wait_blocks")
    )
    assert (tmp_path / "trace.json").is_file()
