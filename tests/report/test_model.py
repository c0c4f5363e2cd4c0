"""`Report`: derived values, text and plain values."""

import dataclasses
import json

import pytest

from sparda_compile.errors import SpardaError
from sparda_compile.isa.streams import COPY
from sparda_compile.report import LayerPlan, PassSummary, Report, SiteSummary
from sparda_compile.report.schedule import Schedule, ScheduleRow

MIB = 1 << 20


@pytest.fixture
def report():
    sparse = SiteSummary(
        layer=0,
        module="model.layers.0.self_attn",
        form="sdpa",
        kind="sparse",
        reason="",
        num_heads=8,
        num_groups=2,
        head_dim=64,
        scale=0.125,
        window=0,
        softcap=0.0,
        projection="model.layers.0.self_attn.q_proj",
        position="rope",
    )
    window = dataclasses.replace(
        sparse, layer=1, form="eager", kind="window", reason="sliding window of 512", window=512
    )
    row = ScheduleRow("prefetch", "sparda.prefetch_blocks", 1, COPY, 0.0, 5.0, 0, 2048, 0.0)
    return Report(
        model="TinyForCausalLM",
        mode="forecast",
        batch_size=2,
        max_tokens=4096,
        sites=(sparse, window),
        layers=(LayerPlan(0, 8 * MIB, MIB, MIB // 2, 256), LayerPlan(1, 4 * MIB, MIB, 0, 256)),
        passes=(
            PassSummary("decode", "find_attention", {"sites": 2, "dense": 1}, 1.5, 9, 9, "a", "a"),
            PassSummary("decode", "fold", {}, 0.5, 9, 9, "a", "a"),
        ),
        schedules=(Schedule("decode", "cpu", (row,), ("in line",), 6.0),),
        forecast_parameters=500,
        model_parameters=20000,
    )


def test_planned_bytes_are_sums_over_layers(report):
    assert report.host_bytes == 12 * MIB
    assert report.device_bytes == 2 * MIB + MIB // 2 + 512


def test_sites_are_split_by_kind(report):
    assert [site.layer for site in report.sparse_sites] == [0]
    assert [site.layer for site in report.dense_sites] == [1]


def test_str_tells_everything_in_lines(report):
    assert str(report).split("\n") == [
        "TinyForCausalLM, mode forecast: 1 attentions rewritten, 1 left dense",
        "KV cache of 2 x 4096 tokens: 12.0 MiB in CPU memory, 2.5 MiB on the device",
        "Forecast: 500 parameters, 2.50% of the model",
        "  decode  find_attention: 2 sites, 1 dense",
        "  decode  fold: nothing to do",
        "  layer 0: sdpa 8/2 heads of 64, sparse",
        "  layer 1: eager 8/2 heads of 64, window (sliding window of 512)",
        "decode on cpu: 5.0 us predicted, 6.0 us with copies in line, 0.0 us exposed, "
        "2 KiB over the link",
    ]


def test_str_of_an_error_is_one_line(report):
    refused = dataclasses.replace(report, error="No attention was found.")
    assert str(refused) == "TinyForCausalLM: cannot be rewritten. No attention was found."


def test_str_of_a_model_without_weights_divides_by_nothing(report):
    bare = dataclasses.replace(report, forecast_parameters=0, model_parameters=0)
    assert "Forecast: 0 parameters, 0.00% of the model" in str(bare)


def test_to_dict_is_plain_and_leaves_graph_texts_out(report):
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["passes"][0] == {
        "phase": "decode",
        "name": "find_attention",
        "counts": {"sites": 2, "dense": 1},
        "ms": 1.5,
        "nodes_before": 9,
        "nodes_after": 9,
    }
    assert [SiteSummary(**site) for site in plain["sites"]] == list(report.sites)
    assert [LayerPlan(**layer) for layer in plain["layers"]] == list(report.layers)
    assert plain["schedules"] == [schedule.to_dict() for schedule in report.schedules]
    assert (plain["host_bytes"], plain["device_bytes"]) == (report.host_bytes, report.device_bytes)
    assert plain["error"] == ""


def test_to_dict_leaves_the_report_as_it_was(report):
    report.to_dict()["passes"][0]["counts"].clear()
    assert report.passes[0].counts == {"sites": 2, "dense": 1}
    assert [summary.before for summary in report.passes] == ["a", "a"]


def deep(report, num_layers=300):
    summary = dataclasses.replace(report.passes[0], before="b" * 1000, after="a" * 1000)
    return dataclasses.replace(
        report,
        sites=tuple(dataclasses.replace(report.sites[0], layer=i) for i in range(num_layers)),
        layers=tuple(LayerPlan(i, MIB, MIB, 0, 256) for i in range(num_layers)),
        passes=(summary,) * 30,
        selection="Selection begins at 6,145 tokens.",
    )


def test_shown_at_a_prompt_it_is_one_screen_however_deep_the_model(report):
    many = deep(report)
    lines = repr(many).split("\n")
    assert len(lines) <= 10
    assert lines[0] == (
        "<Report of TinyForCausalLM, mode forecast: 300 attentions rewritten, 0 left dense>"
    )
    assert "Selection begins at 6,145 tokens." in lines
    page = many._repr_html_()
    assert page.count("<tr>") == 4
    assert "<td>Selection begins at 6,145 tokens.</td>" in page
    assert "bbb" not in repr(many.passes)


def test_shown_at_a_prompt_a_refusal_is_its_sentence(report):
    refused = dataclasses.replace(report, error="No <attention>.")
    assert repr(refused) == "<Report of TinyForCausalLM: cannot be rewritten. No <attention>.>"
    assert "cannot be rewritten. No &lt;attention&gt;." in refused._repr_html_()


def test_bad_path_is_refused_before_the_page_is_made(report, tmp_path, monkeypatch):
    monkeypatch.setattr("sparda_compile.report.html._payload", None)
    with pytest.raises(SpardaError, match="it is a folder"):
        report.to_html(tmp_path)
    assert list(tmp_path.iterdir()) == []
