"""What speculation takes: a line for each part, in schedules, measured steps, pages and traces."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from sparda_compile import SpardaConfig, explain
from sparda_compile.isa.streams import ATTEND, COMPUTE, COPY
from sparda_compile.profiling.kernel_trace import planned_nodes
from sparda_compile.profiling.measured import measure
from sparda_compile.report.schedule import ScheduleRow
from sparda_compile.report.speculation import PARTS, SpeculationPart, speculation_parts

CONFIG = SpardaConfig(
    mode="speculate", offload="never", speculate_where="always", machine="h200", top_k=4,
    local_blocks=1, block_size=16, prefill="dense",
)  # fmt: skip


@pytest.fixture(scope="module")
def report(traced_llama):
    return explain(traced_llama, CONFIG, max_tokens=4096)


@pytest.fixture(scope="module")
def decode(report):
    return next(each for each in report.schedules if each.phase == "decode")


def row(op, layer, stream, start, end, exposed=0.0):
    return ScheduleRow(f"{op}_{layer}", f"sparda.{op}", layer, stream, start, end, 0, 0, exposed)


def test_each_part_has_its_line():
    rows = [
        row("attend_predicted", 0, ATTEND, 0.0, 10.0),
        row("score_blocks", 0, COMPUTE, 1.0, 4.0),
        row("prefetch_blocks", 0, COPY, 3.0, 6.0),
        row("wait_blocks", 0, COMPUTE, 6.0, 10.0, 4.0),
        row("repair_predicted", 0, COMPUTE, 10.0, 13.0),
        row("update_prediction", 0, ATTEND, 12.0, 14.0),
        row("predict_ahead", 0, ATTEND, 14.0, 15.0),
        row("attend_predicted", 1, ATTEND, 15.0, 16.0),
    ]
    assert speculation_parts(rows) == [
        # Others run from 1 to 6, and nobody beside the second; a wait is no work.
        SpeculationPart("speculation", "attend", 2, 11.0, 5.0),
        SpeculationPart("repair and removal", "compute", 1, 3.0, 0.0),
        SpeculationPart("next prediction", "attend", 1, 3.0, 1.0),
    ]
    assert speculation_parts(rows[1:4]) == []


def test_ops_of_the_parts_are_ops(report):
    import sparda_compile.ops
    from sparda_compile.isa.table import INSTRUCTIONS

    assert sparda_compile.ops
    known = {f"sparda.{name}" for name in INSTRUCTIONS}
    assert {op for ops in PARTS.values() for op in ops} <= known


def test_a_planned_step_has_all_of_them(decode, traced_llama):
    assert [(p.name, p.stream, p.num_layers) for p in decode.speculation] == [
        ("speculation", "attend", 2),
        ("repair and removal", "compute", 2),
        ("next prediction", "attend", 2),
    ]
    early, repair, ahead = decode.speculation
    assert 0.0 < early.hidden_us <= early.us
    assert repair.us > 0.0
    assert ahead.us > 0.0
    plain = json.loads(json.dumps(decode.to_dict()))["speculation"]
    assert plain == [dataclasses.asdict(part) for part in decode.speculation]
    serial = explain(traced_llama, CONFIG.replace(mode="query"), max_tokens=4096)
    assert all(each.speculation == [] for each in serial.schedules)


def test_they_are_on_their_own_line_of_a_trace(decode, tmp_path):
    events = json.loads(decode.to_chrome_trace(tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    lines = {e["name"]: names[e["tid"]] for e in events if e["ph"] == "X"}
    assert lines["sparda.attend_predicted"] == lines["sparda.predict_ahead"] == "attend"
    assert lines["sparda.repair_predicted"] == "compute"


@pytest.fixture(scope="module")
def measured(traced_llama, decode):
    """Return a replay that took on each node what was predicted of it."""
    from sparda_compile.program.plan import make_plan

    plan = make_plan(traced_llama.captures, "decode", CONFIG, batch_size=1, max_tokens=4096)
    nodes = planned_nodes(plan.graph_module.graph, 1)
    kernels = {node.node: node.kernels for node in nodes}
    events = []
    for each in plan.schedule.rows:
        names = kernels.get(each.node) or (("gemm",) if each.op == "linear" else ())
        share = (each.end_us - each.start_us) / max(len(names), 1)
        for i, name in enumerate(names):
            begin = each.start_us + i * share
            events.append({
                "ph": "X", "cat": "kernel", "name": name, "ts": begin, "dur": share,
                "args": {"correlation": 1, "stream": each.stream},
            })  # fmt: skip
    return measure(events, plan.schedule, nodes, "H200")


def test_a_measured_step_has_all_of_them(measured, decode):
    parts = {each.name: each for each in measured.speculation()}
    assert list(parts) == ["speculation", "repair and removal", "next prediction"]
    for planned in decode.speculation:
        found = parts[planned.name]
        assert found.predicted_us == pytest.approx(planned.us)
        assert found.measured_us == pytest.approx(planned.us)
        assert found.count == planned.num_layers * (2 if planned.name == "next prediction" else 1)
    assert measured.measured.attend_us == pytest.approx(measured.predicted.attend_us)
    assert measured.measured.attend_us > 0.0
    assert [each["name"] for each in measured.to_dict()["speculation"]] == list(parts)


def test_the_page_of_a_measured_step_holds_their_stream(measured, tmp_path):
    text = measured.to_html(tmp_path / "page.html").read_text(encoding="ascii")
    (found,) = re.findall(r'<script type="application/json" id="payload">(.*?)</script>', text)
    payload = json.loads(found)
    assert payload["streams"] == ["compute", "copy", "select", "attend"]
    assert [p["name"] for p in payload["schedules"][0]["speculation"]] == list(PARTS)


@pytest.mark.browser
def test_a_browser_draws_them_in_a_lane_of_their_own(measured, decode, browse, tmp_path):
    shown = browse(measured.to_html(tmp_path / "page.html"))
    bars = [bar for bar in shown.having("bar") if float(bar["width"]) > 0]
    kinds = {}
    for bar in bars:
        kinds.setdefault(bar["class"].split()[1], set()).add(bar["y"])
    # Each twice: as planned, and below it as measured.
    assert kinds["early"] == {"230", "500"}
    assert kinds["ahead"] == {"230", "500"}
    assert kinds["repair"] == {"38", "308"}
    for what in ("predicted", "measured"):
        assert f"attend, {what}" in shown.texts["main"][0]
    for label in ("speculation, ", "repair and removal, ", "next prediction, "):
        assert label in shown.texts["legend"][0]


@pytest.mark.browser
def test_a_browser_counts_their_stream_by_layer(report, decode, browse, tmp_path):
    shown = browse(report.to_html(tmp_path / "page.html"))
    assert "Attend" in shown.texts["main"][0]
    for layer, text in enumerate(shown.texts["layers-decode-row"][:2]):
        mine = [r for r in decode.rows if (r.layer, r.stream) == (layer, ATTEND)]
        assert f"{sum(r.end_us - r.start_us for r in mine):.1f}" in text
    assert "NaN" not in shown.texts["main"][0]
    height = next(a for t, a in shown.tags if t == "svg" and "height" in a)["height"]
    assert int(height) == 30 + 60 * 4 + 26
    assert shown.texts["said"] == [report.selection, report.speculation]
    assert "expected to be repaired" in report.speculation
